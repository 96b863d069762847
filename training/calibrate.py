"""Probabilities that mean what they say: a temperature, and what to expect of each confidence.

A trained network is often too sure of itself, or not sure enough. Dividing its logits by one
number, fitted on images that it was not trained on, mends most of that and changes no ranking of
classes (Guo et al., *On Calibration of Modern Neural Networks*, 2017).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyserve.engine import Engine
from tinyserve.modelfile import Calibration, OperatingPoint, Training
from tinyserve.statistics import Reliability
from training.data import Dataset, Split, held_out_of, name_of
from training.evaluate import ServedNetwork, at_a_time
from training.gate import in_batches

TEMPERATURES = (0.1, 10.0)
"""The range that is searched."""
PRIOR = 0.25
"""How far the logarithm of a temperature is expected to be from 0: what little a few images say is
weighed against that, and a thousand outweigh it. A few that are all right would else ask for 0."""
THRESHOLDS = 100

_BATCH = 64


@dataclass(frozen=True, slots=True)
class Calibrator:
    """A temperature, and the held-out images to measure every file on that it went into."""

    temperature: float
    source: str
    fitted_images: int
    ece_before: float
    measured: Split

    @classmethod
    def fit(cls, served: ServedNetwork, dataset: Dataset) -> "Calibrator":
        """Fit the temperature on half of the held-out images; the other half is for measuring."""
        # They are in the order of their classes, so every second one is an even half of all.
        fitted, measured = (
            Split(dataset.val.images[half::2], dataset.val.labels[half::2]) for half in (0, 1)
        )
        before = _logits(served, measured).softmax(dim=-1).mean(dim=1)
        return cls(
            temperature=fit_temperature(_logits(served, fitted), torch.from_numpy(fitted.labels)),
            source=f"{dataset.name}, held out of training",
            fitted_images=len(fitted),
            ece_before=_calibration_error(before.numpy(), measured.labels),
            measured=measured,
        )

    def measure(self, engine: Engine) -> Calibration:
        """What a file with this temperature in it shows on the images kept for that."""
        probabilities = in_batches(engine.run, self.measured.images, _BATCH)
        confidence = probabilities.max(axis=1)
        correct = probabilities.argmax(axis=1) == self.measured.labels
        points = (
            OperatingPoint(
                threshold=threshold,
                decided=int((confidence >= threshold).sum()),
                correct=int(correct[confidence >= threshold].sum()),
            )
            for threshold in (step / THRESHOLDS for step in range(THRESHOLDS))
        )
        return Calibration(
            temperature=self.temperature,
            source=self.source,
            fitted_images=self.fitted_images,
            images=len(self.measured),
            ece_before=self.ece_before,
            ece=_calibration_error(probabilities, self.measured.labels),
            points=tuple(points),
        )


def were_held_out(training: Training, dataset: Dataset) -> bool:
    """Whether the weights have not seen the images that ``dataset`` holds out.

    The weights that they started from must have been trained with the same images held out, or on
    other data.
    """
    return (
        len(dataset.held_out) >= 2
        and _held_the_same_out(training, dataset.fingerprint, dataset.described)
        and not may_have_seen(training.initial, training.dataset_fingerprint, training.dataset)
    )


def may_have_seen(training: Training | None, fingerprint: str, described: str) -> bool:
    """Whether weights, or any that they started from, were trained on a data set of this name or
    fingerprint, but did not hold the same images out."""
    while training is not None:
        same_data = training.dataset_fingerprint == fingerprint
        related = same_data or name_of(training.dataset) == name_of(described)
        if related and not _held_the_same_out(training, fingerprint, described):
            return True
        training = training.initial
    return False


def _held_the_same_out(training: Training, fingerprint: str, described: str) -> bool:
    """Of the same data, as many images held out are always the same."""
    theirs = training.dataset_fingerprint, held_out_of(training.dataset)
    return theirs == (fingerprint, held_out_of(described))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """What to divide logits by for the likeliest answers, within :data:`TEMPERATURES`.

    That is the maximum a posteriori of the temperature, whose logarithm is normally distributed
    around 0 with the standard deviation :data:`PRIOR`. ``logits`` is ``[N, views, classes]``, the
    views' probabilities being averaged; ``labels`` int64 ``[N]``.
    """

    def loss(log_temperature: float) -> float:
        log_probabilities = (logits.double() / math.exp(log_temperature)).log_softmax(dim=-1)
        answers = log_probabilities.logsumexp(dim=1)  # less the logarithm of the number of views
        surprise = float(torch.nn.functional.nll_loss(answers, labels, reduction="sum"))
        return surprise + (log_temperature / PRIOR) ** 2 / 2

    low, high = (math.log(end) for end in TEMPERATURES)
    while high - low > 1e-4:  # the loss has one minimum: leave out the third that cannot hold it
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return math.exp((low + high) / 2)


def _logits(served: ServedNetwork, split: Split) -> Tensor:
    """Of each image in each view: ``[N, views, classes]``."""

    def run(part: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits = served.logits(torch.from_numpy(part))
        return np.asarray(logits.reshape(-1, *logits.shape[-2:]).movedim(0, 1).numpy())

    with torch.inference_mode():
        batch = at_a_time(_BATCH, split.images.shape[1], served.views)
        return torch.from_numpy(in_batches(run, split.images, batch, "held-out images"))


def _calibration_error(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    reliability = Reliability()
    correct = probabilities.argmax(axis=1) == labels
    for confidence, right in zip(probabilities.max(axis=1), correct, strict=True):
        reliability.add(float(confidence), bool(right))
    return reliability.error() or 0.0
