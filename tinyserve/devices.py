"""Which devices run models here, and why the others do not.

What a library says of itself is not enough: ONNX Runtime lists CUDA wherever its build supports it.
So the driver is asked, and every library that is needed is loaded.
"""

import contextlib
import ctypes
import functools
import importlib.util
import io
import math
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import onnxruntime as ort

from tinyserve.errors import UsageError, check_at_least_one

MOST_THREADS = 4096
"""More are meant for something else, and ONNX Runtime fails on them in words of its own."""

DEVICES = ("auto", "cpu", "cuda", "openvino", "tensorrt")

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
OPENVINO = "OpenVINO"
"""OpenVINO's own runtime, which is no execution provider of ONNX Runtime."""

_redirecting_stdout = threading.Lock()
"""Each thread puts back what it found, which must not be what another had put there."""
_importing_openvino = threading.Lock()
"""What :func:`import_openvino` hides for a moment, it hides from all threads."""


def wanted_device(device: str | None) -> str:
    """The device asked for, by default ``$TINYSERVE_DEVICE`` or ``auto``."""
    device = device or os.environ.get("TINYSERVE_DEVICE") or "auto"
    if device not in DEVICES:
        raise UsageError(f"unknown device {device!r} (known: {', '.join(DEVICES)})")
    return device


def device_name(provider: str) -> str:
    """A provider's name for people: "CPU", "CUDA", "OpenVINO", "TensorRT"."""
    return "TensorRT" if provider == TENSORRT else provider.removesuffix("ExecutionProvider")


def preferred_precisions(device: str | None = None) -> tuple[str, ...]:
    """Precisions by how well they suit a device, ``device`` as for :class:`Engine`: on NVIDIA GPUs
    half precision is the fastest, on CPUs, with OpenVINO or without, 8 bits."""
    device = wanted_device(device)
    if device in ("cuda", "tensorrt") or (device == "auto" and cuda_problem() is None):
        return ("fp16", "fp32", "int8")
    return ("int8", "fp32", "fp16")


def device_problem(device: str) -> str | None:
    """Why a device, any of :data:`DEVICES` but ``auto``, cannot run here; None if it seems that it
    can."""
    problems = {"cuda": cuda_problem, "openvino": openvino_problem, "tensorrt": tensorrt_problem}
    return problems[device]() if device in problems else None


@functools.cache
def cuda_problem() -> str | None:
    """Why ONNX Runtime's CUDA provider cannot run here; None if it seems that it can."""
    if CUDA not in ort.get_available_providers():
        return "this build of ONNX Runtime has no CUDA provider (install onnxruntime-gpu)"
    if problem := driver_problem():
        return problem
    # CUDA and cuDNN installed as Python packages are on no library path; this finds them. It prints
    # what it does not find, to stdout.
    with _redirecting_stdout, contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    if missing := _missing_library("cuda") or _missing_library("cudnn"):
        return f"{missing} cannot be loaded (pip install 'tinyserve[cuda]')"
    return None


@functools.cache
def driver_problem() -> str | None:
    """Why the NVIDIA driver is of no use here; None if it finds a GPU."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return f"no NVIDIA driver ({library} not found)"
    if (code := driver.cuInit(0)) != 0:
        return f"the NVIDIA driver does not start (cuInit: error {code})"
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver finds no GPU"
    return None


@functools.cache
def tensorrt_problem() -> str | None:
    """Why ONNX Runtime's TensorRT provider cannot run here; None if it seems that it can."""
    if problem := cuda_problem():
        return problem
    if TENSORRT not in ort.get_available_providers():
        return "this build of ONNX Runtime has no TensorRT provider (install onnxruntime-gpu)"
    if missing := _missing_library("tensorrt"):
        return f"{missing} cannot be loaded (install TensorRT and put it on the library path)"
    return None


@functools.cache
def openvino_problem() -> str | None:
    """Why OpenVINO cannot run here; None if it seems that it can."""
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed (pip install 'tinyserve[openvino]')"
    try:
        import_openvino()
    except (ImportError, OSError) as error:
        return f"OpenVINO does not load: {error}"
    return None


def import_openvino() -> Any:
    """The package ``openvino``, which is kept from calling home.

    Its importing sends usage statistics and leaves files in the home directory, unless the package
    that does so cannot be imported: then OpenVINO puts a dummy in its place.
    """
    telemetry = "openvino_telemetry"
    with _importing_openvino:
        before = sys.modules.get(telemetry)
        sys.modules[telemetry] = None  # type: ignore[assignment]  # importing it raises ImportError
        try:
            import openvino
            import openvino.frontend
        finally:
            if before is None:
                del sys.modules[telemetry]
            else:
                sys.modules[telemetry] = before
    return openvino


def _missing_library(name: str) -> str | None:
    """The first shared library that cannot be loaded of those that cuDNN or a provider of ONNX
    Runtime needs; None if all can, and outside Linux, where the session itself has to show."""
    if sys.platform != "linux":
        return None
    library = "libcudnn.so.9"
    if name != "cudnn":
        folder = Path(ort.__file__).parent / "capi"
        library = str(folder / f"libonnxruntime_providers_{name}.so")
    try:
        ctypes.CDLL(library)
    except OSError as error:
        # A provider's own library wants symbols that only a session brings, and all that it needs
        # is loaded before it says so.
        missing, found, _ = str(error).partition(": cannot open shared object file")
        return missing if found else None
    return None


def default_threads() -> int:
    """CPU threads to use: ``$TINYSERVE_NUM_THREADS``, or the cores that this process may use.

    That is the smaller of the affinity mask and the cgroup's quota: more threads than that wait
    for each other, and ONNX Runtime's own default counts the whole machine.
    """
    wanted = os.environ.get("TINYSERVE_NUM_THREADS")
    if wanted:
        if not wanted.isdecimal():
            raise UsageError(f"TINYSERVE_NUM_THREADS must be a whole number, not {wanted!r}")
        check_threads("TINYSERVE_NUM_THREADS", int(wanted))
        return int(wanted)
    quota = cpu_quota()
    return usable_cores() if quota is None else max(1, min(usable_cores(), math.ceil(quota)))


def check_threads(name: str, value: int | None) -> None:
    """Raise :class:`UsageError` for what cannot be a number of threads; None is a default."""
    check_at_least_one(name, value)
    if value is not None and (value > MOST_THREADS or value != int(value)):
        raise UsageError(f"{name} must be a whole number up to {MOST_THREADS:,}, not {value}")


def usable_cores() -> int:
    """Cores in the affinity mask of this process."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the cgroup of this process may use; None without a limit.
    ``/proc`` and ``/sys`` are those of ``root``."""
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    """Of the groups that this process is in, and of those around them: the least of all holds."""
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:  # another system
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        folder, files = root / "sys/fs/cgroup", ["cpu.max"]
        if "cpu" in controllers.split(","):
            folder, files = folder / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        elif controllers:  # of cgroup v1, in which each controller has groups of its own
            continue
        # A container may see its own group at the top alone, and its name as it is outside.
        below = PurePosixPath(group.lstrip("/"))
        for place in (below, *below.parents):
            try:
                texts = [(folder / place / file).read_text() for file in files]
                quota, period = map(int, " ".join(texts).split())
            except (OSError, ValueError):  # not there, or "max"
                continue
            if quota > 0:  # v1 has -1 for no limit
                yield quota / period


def cpu_info(*names: str) -> str:
    """What Linux says of the first processor under one of these names; empty where it does not, and
    on other systems."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            found = (line.partition(":")[2] for line in lines if line.startswith(names))
            return next(found, "").strip()
    except OSError:
        return ""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What this processor can do, in the words of Linux; empty on other systems."""
    return frozenset(cpu_info("flags", "Features").split())  # on x86 and on ARM


def sums_bytes_exactly() -> bool:
    """Whether this x86 processor is known to have VNNI, which adds up products of 8 bits in 32."""
    return not cpu_flags().isdisjoint({"avx512_vnni", "avx_vnni"})


def peak_resident_bytes() -> int | None:
    """The most memory that this process has had; None where the system does not say."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
