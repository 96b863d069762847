"""Classifying on many machines, with Ray Data: each takes parts of the inputs and gives back rows.

The machines need this package and the inputs under the same paths, nothing else: the model comes to
them as bytes, and their rows go to the machine that asked, which alone writes. What a machine had
not done when it died is done by another.
"""

import contextlib
import itertools
import logging
import os
import pickle
import socket
import tempfile
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyserve.classifier import Classifier, model_file
from tinyserve.dataset import Input
from tinyserve.devices import default_threads
from tinyserve.engine import read_card
from tinyserve.errors import (
    DeviceError,
    OutputError,
    TinyserveError,
    UsageError,
    last_line,
    os_reason,
)
from tinyserve.files import candidate
from tinyserve.output import open_rows
from tinyserve.report import Tally

logger = logging.getLogger("tinyserve")

FORMATS = ("jsonl", "parquet")
LOCAL = "local"
"""In place of an address: a Ray of this machine alone, for the time of the job."""

_GPU_DEVICES = ("cuda", "tensorrt")

PART = 1_000
"""Inputs whose rows make a file: some seconds of work, which is what dies with a machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every machine does to its inputs: arguments of the command, with its defaults."""

    model: str
    precision: str
    device: str
    format: str
    k: int
    batch_size: int | None
    workers: int
    """Cores of a classifier, and the batches that it runs at a time."""
    self_test: bool

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"with Ray, rows are {' or '.join(FORMATS)}, not {self.format}")


@dataclass(frozen=True, slots=True)
class Part:
    """What became of some of the inputs."""

    number: int
    """Its place among the parts, from 0."""
    content: bytes
    """Of its file of rows."""
    tally: Tally
    precision: str
    provider: str
    fallback: str | None
    node: str
    """Ray's id of the machine."""


def classify(
    job: Job, inputs: Iterable[Input], output: str, *, address: str = LOCAL, part: int = PART
) -> Generator[Part, None, None]:
    """The parts of a job, in the order in which they are done and written to the folder ``output``.

    The files there, joined in the order of their names, are what one machine writes. Raises
    :class:`~tinyserve.errors.UsageError` where there is no Ray or no cluster at the address, or
    files are in the way, and what a machine could not do, such as
    :class:`~tinyserve.errors.DeviceError`.
    """
    folder = _empty_folder(output)
    with _ray(address) as ray:
        room, gpus = _share(ray.nodes(), job)
        tasks = [{"part": pickle.dumps(task)} for task in enumerate(_parts(inputs, part))]
        # The machines may have GPUs that this one has not.
        path = model_file(job.model, job.precision, "cuda" if gpus else "cpu")
        precision = read_card(path).precision
        if job.precision not in ("auto", precision):  # as a Classifier says it of its own file
            raise UsageError(f"{path} is of {precision}, not {job.precision}")
        worker = {
            "job": job,
            "model": (path.name, ray.put(path.read_bytes())),
            "folder": os.getcwd(),
        }
        done = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            _Worker,
            fn_constructor_kwargs=worker,
            batch_size=1,
            batch_format="pyarrow",
            # From 1, so that the job outlives machines; all at once, for it need not be found out
            # that there is work for them.
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=len(tasks), initial_size=min(room, len(tasks))
            ),
            num_cpus=job.workers,
            num_gpus=gpus,
        )
        fallback = None
        try:
            for row in done.iter_rows():
                result = pickle.loads(row["part"])
                if isinstance(result, TinyserveError):
                    raise result
                if result.fallback not in (None, fallback):
                    fallback = result.fallback
                    logger.warning("running on the CPU: %s", fallback)
                _write(folder / f"part-{result.number:06}.{job.format}", result.content)
                yield result
        except ray.exceptions.RayError as error:
            raise TinyserveError(f"Ray: {last_line(error)}") from error


class _Worker:
    """A classifier on one of the machines. Ray makes it there and calls it with parts."""

    def __init__(self, job: Job, model: tuple[str, Any], folder: str) -> None:
        self._job, self._model = job, model
        self._classifier: Classifier | None = None
        # So that relative paths lead where they lead for whoever asked.
        with contextlib.suppress(OSError):
            os.chdir(folder)

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        number, inputs = pickle.loads(batch["part"][0].as_py())
        result: Part | TinyserveError
        try:
            result = self._classify(number, inputs)
        except TinyserveError as error:  # Ray would wrap it up, and give up others' parts, too
            result = error
        return pa.table({"part": [pickle.dumps(result)]})

    def _classify(self, number: int, inputs: list[Input]) -> Part:
        import ray

        job = self._job
        # Not made before now: what fails here is said to the user, what fails earlier by Ray.
        classifier = self._classifier = self._classifier or self._load()
        k = min(job.k, len(classifier.card.labels))
        tally = Tally()
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "rows")
            with open_rows(path, job.format, k=k, model=classifier.fingerprint) as write:
                for result in classifier.classify_many(inputs, k, job.batch_size):
                    tally.add(result)
                    write(result)
            content = Path(path).read_bytes()
        engine = classifier.engine
        return Part(
            number=number,
            content=content,
            tally=tally,
            precision=engine.card.precision,
            provider=engine.provider,
            fallback=engine.fallback,
            node=ray.get_runtime_context().get_node_id(),
        )

    def _load(self) -> Classifier:
        import ray

        name, content = self._model
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.write_bytes(ray.get(content))
            return Classifier(
                str(path),
                device=self._job.device,
                threads=self._job.workers,
                streams=self._job.workers,
                self_test=self._job.self_test,
            )


@contextlib.contextmanager
def _ray(address: str) -> Iterator[Any]:
    """Ray, connected, and quiet as far as it can be made: what it says at length in its logs, an
    error says in one line."""
    if "://" in address:
        raise UsageError(
            f"cannot reach Ray at {address}: Ray Data does not run through Ray's client; on a "
            "machine of the cluster, give HOST:PORT or auto"
        )
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise UsageError("--ray needs: pip install 'tinyserve[ray]'") from error
    cores = default_threads() if address == LOCAL else None
    try:
        if address.rpartition(":")[2].isdecimal():
            _check_server(address)
        ray.init(address=address, num_cpus=cores, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        if type(error) is ConnectionError and "RAY_AUTH_MODE" not in os.environ:
            why += "; where it wants a token, set RAY_AUTH_MODE=token"
        raise UsageError(f"cannot reach Ray at {address}: {why}") from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_server(address: str) -> None:
    """Raise :class:`OSError` where nothing listens, or something else than a Ray cluster, with
    which Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return
        # Ray's servers speak HTTP/2: to its preface they answer with a frame of type 4, settings.
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        if connection.makefile("rb").read(9)[3:4] != b"\4":
            raise OSError("what listens there is not a Ray cluster, whose port is mostly 6379")


def _share(nodes: Iterable[dict[str, Any]], job: Job) -> tuple[int, int]:
    """How many classifiers the machines have room for, and the GPUs that each takes, 1 or 0.

    Raises what Ray would wait for without end.
    """
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    with_gpu = [machine for machine in machines if machine.get("GPU", 0) >= 1]
    if job.device in _GPU_DEVICES and not with_gpu:
        raise DeviceError(
            f"device {job.device} cannot run: no machine of the Ray cluster has a GPU"
        )
    gpus = int(bool(with_gpu) and job.device in ("auto", *_GPU_DEVICES))
    room = 0
    for machine in with_gpu if gpus else machines:
        by_cores = machine.get("CPU", 0) // job.workers
        room += int(min(by_cores, machine["GPU"]) if gpus else by_cores)
    if not room:
        raise UsageError(f"no machine of the Ray cluster has {job.workers} CPUs for -j")
    return room, gpus


def _parts(inputs: Iterable[Input], size: int) -> Iterator[list[Input]]:
    """So many inputs at a time; of no inputs one part without any."""
    inputs = iter(inputs)
    yield list(itertools.islice(inputs, size))
    while part := list(itertools.islice(inputs, size)):
        yield part


def _empty_folder(output: str) -> Path:
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"{output} is not empty: rows of two jobs would mix there")
    except OSError as error:
        raise OutputError(f"cannot write to {output}: {os_reason(error)}") from error
    return folder


def _write(path: Path, content: bytes) -> None:
    try:
        with candidate(path) as file:
            file.write_bytes(content)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {os_reason(error)}") from error
