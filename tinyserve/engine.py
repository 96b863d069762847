"""One model file, ready to run, and the truth about the device that runs it."""

import contextlib
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tinyserve import kept
from tinyserve.dataset import version_of
from tinyserve.devices import (
    CPU,
    CUDA,
    OPENVINO,
    check_threads,
    cpu_flags,
    cuda_problem,
    default_threads,
    device_name,
    device_problem,
    openvino_problem,
    wanted_device,
)
from tinyserve.errors import (
    DeviceError,
    GateError,
    ModelFileError,
    TinyserveError,
    first_line,
    last_line,
)
from tinyserve.modelfile import ModelCard, check_graph
from tinyserve.onnxruntime_session import OnnxRuntimeSession, read_unprepared
from tinyserve.openvino_session import OpenVinoSession

logger = logging.getLogger("tinyserve")

SelfTest = bool | Literal["once"]
"""Whether a file is tested before it is used; see :class:`Engine`."""

_PASSED = "self-tests.json"
"""Of :mod:`tinyserve.kept`: under which circumstances files have passed."""


class Session(Protocol):
    """A model file in one of the runtimes."""

    card: ModelCard
    provider: str
    runtime: str
    """With its version."""

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]: ...


class Engine:
    """A loaded model: uint8 images in, probabilities out. Safe to use from several threads.

    ``device`` is one of :data:`~tinyserve.devices.DEVICES`, by default ``$TINYSERVE_DEVICE`` or
    ``auto``. A device that is named runs the model, or :class:`DeviceError` is raised. ``auto`` is
    CUDA where that works; else the CPU, with OpenVINO where that is installed and passes the file's
    self-test, and with ONNX Runtime otherwise. What it had to do without is the warning that it
    logs (logger ``tinyserve``), and :attr:`fallback`.

    ``threads`` is the number of CPU threads, by default ``$TINYSERVE_NUM_THREADS`` or all this
    process may use. ``streams`` is how many threads will call :meth:`run` at once; the CPU threads
    are divided among them. One caller is served best by one stream, a pool of workers that keeps
    every core busy by a stream for each.

    A file that carries golden images is tested with them at once, unless ``self_test`` is False;
    with ``"once"``, unless on a CPU the same file has passed before, with the same processor and
    runtime: that is kept in the user's cache folder. So is, whatever ``self_test``, that it has
    passed with OpenVINO, without which ``auto`` does not take that. Raises :class:`ModelFileError`
    for files that are no models of this package, and :class:`GateError` for those that were changed
    or that answer otherwise here than they should.
    """

    fallback: str | None
    """Why ``auto`` does not run on CUDA, and why not with OpenVINO where that is installed; None
    where it runs on CUDA, and for a device that was named."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str | None = None,
        threads: int | None = None,
        streams: int = 1,
        self_test: SelfTest = True,
    ) -> None:
        device = wanted_device(device)
        check_threads("streams", streams)
        check_threads("threads", threads)
        self.streams = streams
        self._threads = threads or default_threads()
        self.path = Path(path)
        self.fallback = None
        self._once = self_test is not True  # without a test, ``auto`` still asks OpenVINO for one
        tested = False
        if device == "auto":
            self._session, tested = self._open_best()
        elif problem := device_problem(device):
            raise DeviceError(f"device {device} cannot run: {problem}")
        else:
            self._session = self._open(device)
        if self_test and not tested:
            self._test(self._session)
        if self.fallback:
            logger.warning("running on the CPU: %s", self.fallback)

    @property
    def card(self) -> ModelCard:
        return self._session.card

    @property
    def provider(self) -> str:
        """What really runs the model: an execution provider of ONNX Runtime, or ``OpenVINO``."""
        return self._session.provider

    def self_test(self) -> float | None:
        """The largest difference of a probability from the golden ones; None without golden images.

        Raises :class:`GateError` where the file was changed or the difference is too large, as a
        broken driver or library or a damaged download make it.
        """
        check_graph(self.path, self.card)
        return _replay_golden(self.path, self._session)

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities, float32 ``[N, classes]``, rows summing to 1.

        ``images``: uint8 ``[N, size, size, 3]``, RGB, ``size`` as in the card; any N from 1 up.
        Raises :class:`TypeError` and :class:`ValueError` for others, and :class:`DeviceError` where
        the device fails, by running out of memory for one.
        """
        side = self.card.image_size
        if images.dtype != np.uint8:  # some runtimes would convert them
            raise TypeError(f"images are {images.dtype}, not uint8")
        if images.shape[1:] != (side, side, 3) or not len(images):
            raise ValueError(f"images are {images.shape}, not (1 or more, {side}, {side}, 3)")
        return _run(self._session, images)

    def _open_best(self) -> tuple[Session, bool]:
        """On the best device there is, and whether the file has been tested there; what keeps it
        from a better one goes to ``fallback``."""
        self.fallback = cuda_problem()
        if self.fallback is None:
            try:
                session = self._open("cuda", strict=False)
            except DeviceError as error:  # its memory is full, for one
                self.fallback = str(error)
            else:
                if session.provider == CUDA:
                    return session, False
                self.fallback = "ONNX Runtime could not load its CUDA provider"
        if openvino_problem() is None:
            try:
                session = self._open("openvino")
                self._test(session)
                if session.card.golden is None:
                    raise GateError(f"{self.path} has no golden images to test OpenVINO with")
                return session, True
            except (DeviceError, GateError) as error:
                self.fallback += f"; not with OpenVINO: {error}"
        return self._open("cpu"), False

    def _test(self, session: Session) -> None:
        # Before the test: should the file change meanwhile, it is another that has passed.
        now = _circumstances(self.path, session) if self._once else None
        subject = f"{session.provider} {self.path.resolve()}"
        if now and kept.read(_PASSED).get(subject) == now:
            return
        check_graph(self.path, session.card)
        _replay_golden(self.path, session)
        if now:
            with contextlib.suppress(OSError):  # it is tested again, then
                kept.add(_PASSED, {subject: now})

    def _open(self, device: str, *, strict: bool = True) -> Session:
        threads, streams = self._threads, self.streams
        with _errors_in_words(self.path, device):
            if device == "openvino":
                return OpenVinoSession(self.path, threads=threads, streams=streams)
            return OnnxRuntimeSession(
                self.path, device, threads=threads, streams=streams, strict=strict
            )


def read_card(path: str | os.PathLike[str]) -> ModelCard:
    """What a model file says of itself, without preparing it to run; :class:`ModelFileError`."""
    path = Path(path)
    with _errors_in_words(path, "cpu"):
        return read_unprepared(path)


def _run(session: Session, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    try:
        return session.run(images)
    except Exception as cause:  # neither runtime's errors share a base class
        count = f"{len(images)} image{'' if len(images) == 1 else 's'} at a time"
        name = device_name(session.provider)
        raise DeviceError(f"{name} failed with {count}: {_in_a_line(cause, name)}") from cause


def _circumstances(path: Path, session: Session) -> list[str] | None:
    """All that the result of a self-test on a CPU depends on; None for a CPU that is not known, and
    on other devices, whose drivers and memory fail more often."""
    processor = " ".join(sorted(cpu_flags()))
    if session.provider not in (CPU, OPENVINO) or not processor:
        return None
    # By its time, this module stands for what of this package is between a file and its answers.
    return [version_of(str(path)), session.runtime, version_of(__file__), processor]


def _replay_golden(path: Path, session: Session) -> float | None:
    golden, card = session.card.golden, session.card
    if golden is None:
        return None
    try:
        images, expected = golden.arrays(card.image_size, len(card.labels))
    except (ValueError, zlib.error) as error:
        raise ModelFileError(f"{path}: damaged golden images ({error})") from error
    difference = float(np.abs(_run(session, images) - expected).max())
    if not difference <= golden.tolerance:  # not a number is no pass
        raise GateError(
            f"{path} fails its self-test on {device_name(session.provider)}: a probability "
            f"is off by {difference:.3g}, more than {golden.tolerance:g}"
        )
    return difference


@contextlib.contextmanager
def _errors_in_words(path: Path, device: str) -> Iterator[None]:
    """What a runtime raises while it opens a file, as an error of this package, in one line."""
    if not path.is_file():
        raise ModelFileError(f"no such model file: {path}")
    if not path.stat().st_size:  # OpenVINO reads it as a model of nothing
        raise ModelFileError(f"{path} is empty (0 bytes)")
    try:
        yield
    except TinyserveError:
        raise
    except Exception as cause:  # neither runtime's errors share a base class
        said = _in_a_line(cause, device)
        if device == "cpu":
            # By its name: an ONNX Runtime that has lost its files has no such type.
            damaged = type(cause).__name__ == "InvalidProtobuf"
            wrong = "is no ONNX model, or damaged" if damaged else "cannot be loaded"
            raise ModelFileError(f"{path} {wrong} ({said})") from cause
        with _errors_in_words(path, "cpu"):
            read_unprepared(path)  # a file that no device can run is not the device's fault
        raise DeviceError(f"device {device} cannot run {path.name}: {said}") from cause


def _in_a_line(cause: Exception, runtime: str) -> str:
    # OpenVINO says where in its source it happened before it says what.
    return last_line(cause) if runtime.lower() == "openvino" else first_line(cause)
