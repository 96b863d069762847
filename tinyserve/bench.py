"""How fast the models are on this machine, and with which settings.

Every combination of model file, device and number of workers is measured in a process of its own,
so that its cold start and its memory are its own, too.
"""

import dataclasses
import itertools
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from tinyserve import kept
from tinyserve.classifier import Classifier
from tinyserve.dataset import version_of
from tinyserve.devices import peak_resident_bytes
from tinyserve.errors import OutputError, UsageError, os_reason

_BATCHES = 4
"""At least so many for each stream: in fewer, most of the time is the first's and the last's."""
_COPIES = 64
"""Files of each golden image; more than the batches that are at work at a time."""
_TUNED = "tuned.json"
"""Of :mod:`tinyserve.kept`: a file's best settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to run a model file with."""

    device: str
    workers: int
    batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one combination of settings gives.

    Speeds are in images a second: of the model alone, fed from memory, and end to end, from image
    files to results. ``p50_ms`` and ``p99_ms`` are of one image at a time, fed from memory, by one
    caller. ``cold_start`` is the seconds from the start of a process to its first answer,
    ``peak_bytes`` its largest memory up to then, smaller batches come first; None where the system
    does not tell.
    """

    file: str
    provider: str
    settings: Settings
    session: float
    end_to_end: float
    p50_ms: float
    p99_ms: float
    cold_start: float
    peak_bytes: int | None


def measure(
    files: Sequence[tuple[Path, str]],
    workers: Sequence[int],
    batch_sizes: Sequence[int],
    *,
    seconds: float,
) -> Iterator[Measurement]:
    """Each model file with its device in all combinations of the other settings, small batches
    first; each figure takes about so many ``seconds``. What a model file or a device raises comes
    through; :class:`~tinyserve.errors.UsageError` is for settings that take more memory than there
    is."""
    with tempfile.TemporaryDirectory(prefix="tinyserve-bench-") as folder:
        for (file, device), count in itertools.product(files, workers):
            # Not forked: a process that starts from nothing is what a cold start is.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                measured = process.submit(
                    _measure, file, device, count, batch_sizes, seconds, folder, time.time()
                )
                try:
                    yield from measured.result()
                except (BrokenProcessPool, MemoryError) as error:
                    raise UsageError(
                        f"measuring {file} with {count} workers and batches of up to "
                        f"{max(batch_sizes):,} ended early, probably for want of memory: try less"
                    ) from error


def _measure(
    file: Path,
    device: str,
    workers: int,
    batch_sizes: Sequence[int],
    seconds: float,
    folder: str,
    began: float,
) -> list[Measurement]:
    # The provider is part of what is measured; that it is not CUDA need not be said every time.
    logging.getLogger("tinyserve").setLevel(logging.ERROR)
    classifier = Classifier(str(file), device=device, streams=workers)
    pixels = _images(classifier)
    classifier.engine.run(pixels[:1])
    cold_start = time.time() - began
    paths = _write_files(pixels, folder)
    latencies = _latencies(classifier, pixels, seconds)
    speeds = [
        (
            size,
            _session(classifier, pixels, size, seconds),
            _files(classifier, paths, size, seconds),
            peak_resident_bytes(),
        )
        for size in sorted(batch_sizes)
    ]
    return [
        Measurement(
            file=str(file),
            provider=classifier.engine.provider,
            settings=Settings(device=device, workers=workers, batch_size=size),
            session=session,
            end_to_end=end_to_end,
            p50_ms=1000 * float(np.percentile(latencies, 50)),
            p99_ms=1000 * float(np.percentile(latencies, 99)),
            cold_start=cold_start,
            peak_bytes=peak,
        )
        for size, session, end_to_end, peak in speeds
    ]


def _images(classifier: Classifier) -> NDArray[np.uint8]:
    """The file's golden images, which are real ones; noise where it has none."""
    card = classifier.card
    if card.golden is not None:
        return card.golden.arrays(card.image_size, len(card.labels))[0]
    shape = (8, card.image_size, card.image_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _write_files(pixels: NDArray[np.uint8], folder: str) -> list[str]:
    paths = []
    for number, image in enumerate(pixels):
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=90)
        for copy in range(_COPIES):
            path = Path(folder, f"{number}-{copy}.jpg")
            path.write_bytes(data)
            paths.append(str(path))
    return paths


def _latencies(classifier: Classifier, pixels: NDArray[np.uint8], seconds: float) -> list[float]:
    found = []
    end = time.perf_counter() + seconds
    for image in itertools.cycle(pixels):
        began = time.perf_counter()
        classifier.engine.run(image[None])
        now = time.perf_counter()
        found.append(now - began)
        if now >= end:
            return found
    raise AssertionError("there are images")


def _session(
    classifier: Classifier, pixels: NDArray[np.uint8], batch_size: int, seconds: float
) -> float:
    engine = classifier.engine
    batch = pixels[np.arange(batch_size) % len(pixels)]
    engine.run(batch)
    began = time.perf_counter()

    def work(_: int) -> int:
        done = 0
        # Once at least: on a busy machine a thread may start when the time is over.
        while not done or time.perf_counter() < began + seconds:
            engine.run(batch)
            done += batch_size
        return done

    with ThreadPoolExecutor(engine.streams) as streams:
        done = sum(streams.map(work, range(engine.streams)))
    return done / (time.perf_counter() - began)


def _files(classifier: Classifier, paths: Sequence[str], batch_size: int, seconds: float) -> float:
    began = time.perf_counter()
    least = _BATCHES * classifier.engine.streams * batch_size

    def inputs() -> Iterator[str]:
        for sent, path in enumerate(itertools.cycle(paths)):
            late = time.perf_counter() - began >= seconds
            if late and sent >= least and sent % batch_size == 0:
                return
            yield path

    # To the end of all that was begun: what is still at work has taken its share of the time.
    done = sum(1 for _ in classifier.classify_many(inputs(), batch_size=batch_size))
    return done / (time.perf_counter() - began)


def best(measurements: Sequence[Measurement]) -> dict[str, Measurement]:
    """File to its fastest measurement, end to end."""
    fastest: dict[str, Measurement] = {}
    for entry in measurements:
        if entry.file not in fastest or entry.end_to_end > fastest[entry.file].end_to_end:
            fastest[entry.file] = entry
    return fastest


def save(fastest: dict[str, Measurement]) -> Path:
    """Keep the best settings, beside those of other files; returns where.

    Raises :class:`~tinyserve.errors.OutputError` where they cannot be written.
    """
    path = kept.folder() / _TUNED
    settings = {
        _key(Path(file)): dataclasses.asdict(entry.settings) for file, entry in fastest.items()
    }
    try:
        kept.add(_TUNED, settings)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {os_reason(error)}") from error
    return path


def tuned(file: Path) -> Settings:
    """The best settings of a model file; :class:`~tinyserve.errors.UsageError` where none are
    known, or the file has changed since."""
    try:
        return Settings(**kept.read(_TUNED)[_key(file)])
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"no settings were measured for {file}; run: tinyserve bench -m {file}"
        ) from error


def _key(file: Path) -> str:
    return f"{file.resolve()} {version_of(str(file))}"
