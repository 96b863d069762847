"""One model file in one ONNX Runtime session, and the truth about the device that runs it."""

import ctypes
import functools
import logging
import math
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tinyserve.errors import DeviceError, GateError, ModelFileError, UsageError
from tinyserve.modelfile import INPUT_NAME, METADATA_KEY, OUTPUT_NAME, ModelCard, check_graph

logger = logging.getLogger("tinyserve")

DEVICES = ("auto", "cpu", "cuda")
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

_ERRORS_ONLY = 3  # ONNX Runtime's severity; its warnings are about graph details nobody can act on


class Engine:
    """A loaded model: uint8 images in, probabilities out.

    ``device`` is one of :data:`DEVICES`, by default ``$TINYSERVE_DEVICE`` or ``auto``. ``cuda``
    runs on CUDA or raises :class:`DeviceError`; ``auto`` falls back to the CPU, says so in a
    warning of the logger ``tinyserve``, and keeps the reason in :attr:`fallback`. ``threads`` is
    the number of CPU threads, by default ``$TINYSERVE_NUM_THREADS`` or all this process may use;
    ``streams`` is how many callers of :meth:`run` at a time they are shared between.

    A file that carries golden images is tested with them at once, unless ``self_test`` is False.
    Raises :class:`ModelFileError` for files that are no models of this package, and
    :class:`GateError` for those that were changed or that answer otherwise here than they should.
    """

    card: ModelCard
    provider: str
    """The ONNX Runtime execution provider that really runs the model."""
    fallback: str | None
    """Why ``auto`` runs on the CPU and not on CUDA; None where it did not have to fall back."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str | None = None,
        threads: int | None = None,
        streams: int = 1,
        self_test: bool = True,
    ) -> None:
        device = _wanted_device(device)
        self.streams = streams
        options = session_options(max(1, (threads or default_threads()) // streams))
        self.path = Path(path)
        self.fallback = None
        problem = cuda_problem() if device != "cpu" else None
        if device == "cpu":
            self._session = _open(self.path, options, [CPU])
        elif device == "cuda":
            if problem:
                raise DeviceError(f"device cuda cannot run: {problem}")
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            self._session = _open(self.path, options, [CUDA], error=DeviceError)
        else:
            self._session = _open(self.path, options, [CPU] if problem else [CUDA, CPU])
        self.provider = self._session.get_providers()[0]
        if device == "cuda" and self.provider != CUDA:
            raise DeviceError(f"device cuda cannot run: ONNX Runtime chose {self.provider}")
        if device == "auto" and self.provider == CPU:
            self.fallback = problem or "ONNX Runtime could not load its CUDA provider"
            logger.warning("running on the CPU: %s", self.fallback)
        self.card = _card(self.path, self._session)
        if self_test:
            self.self_test()

    def self_test(self) -> float | None:
        """The largest difference of a probability from the golden ones; None without golden images.

        Raises :class:`GateError` where the file was changed or the difference is too large, as a
        broken driver or library or a damaged download make it.
        """
        check_graph(self.path, self.card)
        golden = self.card.golden
        if golden is None:
            return None
        try:
            images, expected = golden.arrays(self.card.image_size, len(self.card.labels))
        except (ValueError, zlib.error) as error:
            raise ModelFileError(f"{self.path}: damaged golden images ({error})") from error
        difference = float(np.abs(self.run(images) - expected).max())
        if not difference <= golden.tolerance:  # not a number is no pass
            raise GateError(
                f"{self.path} fails its self-test on {device_name(self.provider)}: a probability "
                f"is off by {difference:.2g}, more than {golden.tolerance:g}"
            )
        return difference

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities, float32 ``[N, classes]``, rows summing to 1.

        ``images``: uint8 ``[N, size, size, 3]``, RGB, ``size`` as in the card; any N from 1 up.
        """
        (probabilities,) = self._session.run([OUTPUT_NAME], {INPUT_NAME: images})
        return np.asarray(probabilities)


def read_card(path: str | os.PathLike[str]) -> ModelCard:
    """What a model file says of itself, without preparing it to run; :class:`ModelFileError`."""
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return _card(Path(path), _open(Path(path), options, [CPU]))


def _wanted_device(device: str | None) -> str:
    device = device or os.environ.get("TINYSERVE_DEVICE") or "auto"
    if device not in DEVICES:
        raise UsageError(f"unknown device {device!r} (known: {', '.join(DEVICES)})")
    return device


def session_options(threads: int) -> ort.SessionOptions:
    """How models are run on the CPU, with so many threads."""
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    # Threads that wait by spinning take the cores from whatever else runs: another model, decoding,
    # another process. On two cores the 8-bit models are a third slower with it, even alone.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def preferred_precisions(device: str | None = None) -> tuple[str, ...]:
    """Precisions by how well they suit a device, ``device`` as for :class:`Engine`: on CUDA half
    precision is the fastest, on CPUs 8 bits."""
    if _wanted_device(device) != "cpu" and cuda_problem() is None:
        return ("fp16", "fp32", "int8")
    return ("int8", "fp32", "fp16")


def device_name(provider: str) -> str:
    """A provider's name for people: "CPU", "CUDA"."""
    return provider.removesuffix("ExecutionProvider")


def default_threads() -> int:
    """CPU threads to use: ``$TINYSERVE_NUM_THREADS``, or the cores that this process may use.

    That is the smaller of the affinity mask and the cgroup's quota: more threads than that wait
    for each other, and ONNX Runtime's own default counts the whole machine.
    """
    wanted = os.environ.get("TINYSERVE_NUM_THREADS")
    if wanted:
        if not wanted.isdecimal() or int(wanted) < 1:
            raise UsageError(f"TINYSERVE_NUM_THREADS must be a whole number from 1, not {wanted!r}")
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return cores


@functools.cache
def cuda_problem() -> str | None:
    """Why CUDA cannot run here, as far as the driver tells; None if it seems that it can.

    ONNX Runtime lists CUDA as available wherever its build supports it, so the driver is asked.
    """
    if CUDA not in ort.get_available_providers():
        return "this build of ONNX Runtime has no CUDA provider (install onnxruntime-gpu)"
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
    # CUDA and cuDNN installed as Python packages are on no library path; this finds them.
    ort.preload_dlls()
    return None


def _open(
    path: Path,
    options: ort.SessionOptions,
    providers: list[str],
    error: type[ModelFileError] | type[DeviceError] = ModelFileError,
) -> ort.InferenceSession:
    if not path.is_file():
        raise ModelFileError(f"no such model file: {path}")
    try:
        return ort.InferenceSession(path, options, providers=providers)
    except Exception as cause:  # ONNX Runtime's errors share no base class
        if error is DeviceError:
            raise DeviceError(
                f"device cuda cannot run {path.name}: {_first_line(cause)}"
            ) from cause
        raise ModelFileError(
            f"{path} is no ONNX model, or damaged ({_first_line(cause)})"
        ) from cause


def _card(path: Path, session: ort.InferenceSession) -> ModelCard:
    document = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if document is None:
        raise ModelFileError(f"{path} is an ONNX model, but none that tinyserve exported")
    try:
        card = ModelCard.from_json(document)
    except (ModelFileError, GateError) as error:
        raise type(error)(f"{path}: {error}") from error
    size, classes = card.image_size, len(card.labels)
    inputs = [(i.name, i.type, i.shape[1:]) for i in session.get_inputs()]
    outputs = [(o.name, o.type, o.shape[1:]) for o in session.get_outputs()]
    if inputs != [(INPUT_NAME, "tensor(uint8)", [size, size, 3])] or outputs != [
        (OUTPUT_NAME, "tensor(float)", [classes])
    ]:
        raise ModelFileError(
            f"{path}: its graph is not what its metadata says: {inputs} -> {outputs}"
        )
    return card


def _first_line(error: Any) -> str:
    return str(error).strip().partition("\n")[0]
