"""The device that a run trains on: which one, in which precision, and what it is called."""

import ctypes
import platform
import sys
from contextlib import suppress
from typing import Any

import torch

from tinyserve.devices import cpu_info, peak_resident_bytes
from tinyserve.errors import DeviceError, UsageError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of malloc.h

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def device(name: str) -> torch.device:
    """``cpu``, ``cuda``, or the better of the two for ``auto``.

    Raises :class:`~tinyserve.errors.DeviceError` for a GPU that cannot be used.
    """
    # Convolutions on a GPU would be in TF32 otherwise, where fp32 is said.
    torch.backends.cudnn.allow_tf32 = False
    # Batches come in few sizes: the fastest convolutions for each are found once.
    torch.backends.cudnn.benchmark = True
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: PyTorch finds no usable CUDA device here")
    return torch.device(name)


def precision(name: str, device: torch.device) -> str:
    """A key of :data:`PRECISIONS`; for ``auto`` the fastest that trains well on the device."""
    if name == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "fp16"
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Arithmetic in a precision, where it is a lower one than single."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step, where it is glibc.

    A step on the CPU frees and allocates gigabytes. By default glibc returns large blocks to the
    kernel and has them mapped and zeroed again: of an hour of training, half went into that.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 256 * 2**20)


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most that was allocated on a GPU, or was resident on a CPU where that is known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    return cpu_info("model name") or platform.processor() or platform.machine()
