"""The gate: what a model file must show before it is kept."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from tinyserve.devices import CPU, cuda_problem, default_threads, device_name
from tinyserve.engine import Engine
from tinyserve.errors import GateError
from tinyserve.modelfile import INPUT_NAME, OUTPUT_NAME, Evidence
from tinyserve.onnxruntime_session import session_options
from training import data
from training.evaluate import ServedNetwork, at_a_time

GATE_IMAGES = 1000
GATE_BATCHES = (1, 3, 64)
SPEED_BATCHES = (1, 32)
SPEED_ROUNDS = 15
SUM_TOLERANCE = 1e-4
SURE = 0.9
"""A probability."""
NOISY_COPIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a file must keep to. Agreement and difference are with PyTorch in single precision, the
    loss of accuracy with the fp32 file, as a fraction of the images."""

    agreement: float = 0.0
    max_difference: float = 1.0
    accuracy_loss: float = 1.0
    faster: bool = False
    """Faster than the fp32 file, on the CPU: both with one image at a time, which waits for the
    weights, and with batches, which wait for the arithmetic."""
    golden_tolerance: float
    """How far a golden probability may be off on another machine."""


BOUNDS = {
    "fp32": Bounds(agreement=1.0, max_difference=1e-4, golden_tolerance=1e-3),
    "fp16": Bounds(agreement=0.995, golden_tolerance=2e-2),
    "int8": Bounds(accuracy_loss=0.005, faster=True, golden_tolerance=5e-2),
}


class Gate:
    """Compares files with the network that they come from, on validation images."""

    images: NDArray[np.uint8]
    """uint8 ``[n, size, size, 3]``, :data:`GATE_IMAGES` evenly spread over the validation split; a
    smaller split is filled up from the training split.

    In that case the loss of accuracy is measured on them, too: of thirty images one more that is
    wrong would be three points."""

    def __init__(
        self,
        served: ServedNetwork,
        graph: onnx.ModelProto,
        dataset: data.Dataset,
        *,
        reference: str,
    ) -> None:
        self._reference = reference
        self.val = dataset.val
        parts = [(self.val, spread(len(self.val), GATE_IMAGES))]
        missing = GATE_IMAGES - len(parts[0][1])
        if missing > 0:
            others = np.setdiff1d(np.arange(len(dataset.train)), dataset.held_out)
            parts.append((dataset.train, others[spread(len(others), missing)]))
        self.images, labels = (
            np.concatenate([getattr(split, name)[chosen] for split, chosen in parts])
            for name in ("images", "labels")
        )
        self._judged = data.Split(self.images, labels) if missing > 0 else self.val
        with torch.inference_mode():
            self._expected = in_batches(
                lambda part: served(torch.from_numpy(part)).numpy(),
                self.images,
                at_a_time(max(GATE_BATCHES), self.images.shape[1], served.views),
            )
        self._fp32 = graph.SerializeToString()
        self._fp32_correct: int | None = None

    def check(self, path: Path, precision: str) -> tuple[Evidence, ...]:
        """What the file shows on every provider of this machine.

        Raises :class:`GateError` where that breaks a bound of its precision.
        """
        bounds = BOUNDS[precision]
        evidence = []
        for device in ("cpu",) if cuda_problem() else ("cpu", "cuda"):
            engine = Engine(path, device=device)
            entry, correct = self._measure(engine, precision)
            evidence.append(entry)
            where = f"{precision} on {device_name(engine.provider)}"
            if not entry.top1_agreement >= bounds.agreement:
                raise GateError(
                    f"{where}: {100 * entry.top1_agreement:.2f} % have the same top-1 as in "
                    f"PyTorch, {100 * bounds.agreement:g} % is the least allowed"
                )
            if not entry.max_difference <= bounds.max_difference:
                raise GateError(
                    f"{where}: a probability differs by {entry.max_difference:.2e} from "
                    f"PyTorch's, {bounds.max_difference:.0e} is the most allowed"
                )
            if precision == "fp32" and engine.provider == CPU:
                self._fp32_correct = correct
            loss = (self._fp32_accuracy() - correct) / len(self._judged)
            if loss > bounds.accuracy_loss:
                raise GateError(
                    f"{where}: top-1 is {100 * loss:.2f} points below fp32 on "
                    f"{len(self._judged):,} images, "
                    f"{100 * bounds.accuracy_loss:g} are the most allowed"
                )
            if bounds.faster and engine.provider == CPU:
                ratios = [self._speed_ratio(engine, batch) for batch in SPEED_BATCHES]
                words = f"{ratios[0]:.2f} and {ratios[1]:.2f} times as fast as fp32"
                print(f"{where}: {words}, one image and batches of 32", file=sys.stderr)
                if min(ratios) <= 1:
                    raise GateError(f"{where}: {words}, which is not faster")
        return tuple(evidence)

    def steady_images(self, engine: Engine, count: int) -> NDArray[np.uint8]:
        """Images to test a file with on other machines, where numbers may be rounded otherwise.

        They are spread over the half of the images whose answers move least, from PyTorch's to
        this file's and when every number of the image is off by one at random: what is further off
        elsewhere is no rounding. Images with sure answers are left out, as these hide a good deal.
        """
        unsure = np.flatnonzero(self._expected.max(axis=1) < SURE)
        among = unsure if len(unsure) >= 2 * count else np.arange(len(self.images))
        images = self.images[among]
        answers = in_batches(engine.run, images, max(GATE_BATCHES))
        moved = np.abs(answers - self._expected[among]).max(axis=1)
        rng = np.random.default_rng(0)
        for _ in range(NOISY_COPIES):
            noise = rng.integers(-1, 2, images.shape, dtype=np.int16)
            noisy = (images + noise).clip(0, 255).astype(np.uint8)
            others = in_batches(engine.run, noisy, max(GATE_BATCHES))
            moved = np.maximum(moved, np.abs(others - answers).max(axis=1))
        steady = np.sort(np.argsort(moved, kind="stable")[: max(count, len(among) // 2)])
        return images[steady[spread(len(steady), count)]]

    def _measure(self, engine: Engine, precision: str) -> tuple[Evidence, int]:
        """The evidence, and how many of the images by which accuracy is judged are right."""
        agreement, difference = 1.0, 0.0
        where = f"{precision} on {device_name(engine.provider)}"
        for batch in GATE_BATCHES:
            found = in_batches(engine.run, self.images, batch, f"{precision}, batches of {batch}")
            if not np.allclose(found.sum(axis=1), 1, atol=SUM_TOLERANCE):
                raise GateError(f"{where}: the probabilities of an image do not sum to 1")
            agreement = min(agreement, float((found.argmax(1) == self._expected.argmax(1)).mean()))
            difference = max(difference, float(np.abs(found - self._expected).max()))
        answers = in_batches(
            engine.run, self.val.images, max(GATE_BATCHES), f"{precision}, accuracy"
        )
        labels = self.val.labels[:, None]
        best = np.argsort(-answers, axis=1, kind="stable")[:, :5] == labels
        correct, among_five = int(best[:, 0].sum()), int(best.sum())
        print(
            f"{where}: {100 * agreement:g} % the same top-1 "
            f"as in PyTorch, max |dp| {difference:.2e}, {len(self.images):,} images at batch "
            f"{', '.join(map(str, GATE_BATCHES))}; top-1 {100 * correct / len(self.val):.2f} % "
            f"({correct:,} of {len(self.val):,})",
            file=sys.stderr,
        )
        judged = correct
        if self._judged is not self.val:
            judged = int((found.argmax(1) == self._judged.labels).sum())
        evidence = Evidence(
            provider=engine.provider,
            reference=self._reference,
            images=len(self.images),
            batch_sizes=GATE_BATCHES,
            top1_agreement=agreement,
            max_difference=difference,
            val_images=len(self.val),
            correct_top1=correct,
            correct_top5=among_five,
            onnxruntime=ort.__version__,
        )
        return evidence, judged

    def _fp32_accuracy(self) -> int:
        """Right answers of the graph in single precision, on the CPU."""
        if self._fp32_correct is None:
            rows = in_batches(runner(self._fp32), self._judged.images, max(GATE_BATCHES))
            self._fp32_correct = int((rows.argmax(1) == self._judged.labels).sum())
        return self._fp32_correct

    def _speed_ratio(self, engine: Engine, batch: int) -> float:
        """Over fp32; by turns, so that what else the machine does slows both."""
        fp32 = runner(self._fp32)
        images = self.images[:batch]
        ratios = []
        for _ in range(SPEED_ROUNDS):
            began = time.perf_counter()
            fp32(images)
            between = time.perf_counter()
            engine.run(images)
            ratios.append((between - began) / (time.perf_counter() - between))
        return statistics.median(ratios)


def spread(count: int, wanted: int) -> NDArray[np.int64]:
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64)


Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Images, uint8 ``[n, size, size, 3]``, to probabilities, ``[n, classes]``."""


def runner(graph: bytes) -> Run:
    """A serialized graph, ready to run on the CPU as it is served there."""
    session = ort.InferenceSession(graph, session_options(default_threads()), providers=[CPU])

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        (rows,) = session.run([OUTPUT_NAME], {INPUT_NAME: images})
        return np.asarray(rows)

    return run


def in_batches(
    run: Run, images: NDArray[np.uint8], batch: int, what: str | None = None
) -> NDArray[np.float32]:
    """Probabilities of all images, run ``batch`` at a time; ``what`` is said beside a progress bar,
    without it there is none."""
    parts = np.array_split(images, range(batch, len(images), batch))
    bar = tqdm(parts, desc=what, disable=None if what else True, leave=False)
    return np.concatenate([run(part) for part in bar])
