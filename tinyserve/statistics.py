"""All figures of a report, collected while results stream by."""

import dataclasses
import heapq
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tinyserve import images
from tinyserve.classifier import Result
from tinyserve.dataset import Input
from tinyserve.errors import ImageError
from tinyserve.modelfile import ModelCard
from tinyserve.report import Summary, wilson_interval

RELIABILITY_BINS = 15
HISTOGRAM_BINS = 20
CONFUSIONS = 20
PICTURE_SIZE = 96
"""Longer side of a picture in a report, in pixels."""
EXAMPLES = 3
"""Pictures of each confusion."""
GALLERY = 24
"""Pictures of the most confident mistakes, and of the least certain answers."""
FAILURES = 50

_PAIRS_WITH_EXAMPLES = 2000
_LIGHT = 2**16
"""Bytes of a picture that may stay as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityBin:
    """Labelled images whose first prediction was given a probability from ``low`` to ``high``.

    ``confidence`` is the mean of these probabilities and ``accuracy`` the share that was right;
    None where there are no images.
    """

    low: float
    high: float
    images: int
    correct: int
    confidence: float | None
    accuracy: float | None
    accuracy_ci95: tuple[float, float] | None


class Reliability:
    """Collects how often predictions of each confidence are right."""

    def __init__(self) -> None:
        self._images = [0] * RELIABILITY_BINS
        self._correct = [0] * RELIABILITY_BINS
        self._confidence = [0.0] * RELIABILITY_BINS

    def add(self, confidence: float, correct: bool) -> None:
        place = _bin(confidence, RELIABILITY_BINS)
        self._images[place] += 1
        self._correct[place] += correct
        self._confidence[place] += confidence

    def bins(self) -> tuple[ReliabilityBin, ...]:
        return tuple(
            ReliabilityBin(
                low=place / RELIABILITY_BINS,
                high=(place + 1) / RELIABILITY_BINS,
                images=n,
                correct=correct,
                confidence=confidence / n if n else None,
                accuracy=correct / n if n else None,
                accuracy_ci95=wilson_interval(correct, n) if n else None,
            )
            for place, (n, correct, confidence) in enumerate(
                zip(self._images, self._correct, self._confidence, strict=True)
            )
        )

    def error(self) -> float | None:
        """The expected calibration error, a fraction: the mean distance of a bin's confidence from
        its accuracy, weighted by its images. None without images."""
        gaps = (abs(c - s) for c, s in zip(self._correct, self._confidence, strict=True))
        total = sum(self._images)
        return sum(gaps) / total if total else None


@dataclass(frozen=True, slots=True, kw_only=True)
class HistogramBin:
    """Images whose first prediction was given a probability from ``low`` to ``high``."""

    low: float
    high: float
    right: int
    wrong: int
    unlabelled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRow:
    """One class: ``images`` are labelled with it, ``correct`` of them were recognised, and
    ``predicted`` images of any class were called it. ``confused_with`` is what the others were
    called most often, ``confused`` times."""

    wnid: str | None
    name: str
    images: int
    correct: int
    accuracy: float | None
    accuracy_ci95: tuple[float, float] | None
    predicted: int
    confused_with: str | None
    confused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """``images`` of the ``of`` that are labelled ``label`` were called ``predicted``; the first
    few of them are ``examples``."""

    label: str
    predicted: str
    images: int
    of: int
    examples: tuple[Input, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One input with its first prediction; ``label`` and ``correct`` are None without label."""

    input: Input
    label: str | None
    predicted: str
    probability: float
    correct: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    input: Input
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """From the model's card. ``top1`` and ``top5`` are those in the file, ``temperature`` that of
    its calibration, ``fingerprint`` what the rows name the model by."""

    architecture: str
    parameters: int
    classes: int
    image_size: int
    views: int
    trained_on: str | None
    top1: float | None
    top5: float | None
    temperature: float | None
    fingerprint: str

    @classmethod
    def of(cls, card: ModelCard) -> "ModelFacts":
        top1, top5 = card.accuracy or (None, None)
        return cls(
            architecture=card.architecture,
            parameters=card.parameters,
            classes=len(card.labels),
            image_size=card.image_size,
            views=card.views,
            trained_on=card.training.dataset if card.training else None,
            top1=top1,
            top5=top5,
            temperature=card.calibration.temperature if card.calibration else None,
            fingerprint=card.fingerprint,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Every figure of a report.

    ``created`` is the time in UTC, ``paths`` what was asked for. ``classes`` are all of the model,
    in its order; ``confusions`` the most frequent ones, ``mistakes`` the most confident ones,
    ``failures`` the first ones.
    """

    created: str
    paths: tuple[str, ...]
    summary: Summary
    model: ModelFacts
    calibration_error: float | None
    reliability: tuple[ReliabilityBin, ...]
    histogram: tuple[HistogramBin, ...]
    classes: tuple[ClassRow, ...]
    confusions: tuple[Confusion, ...]
    mistakes: tuple[Example, ...]
    least_certain: tuple[Example, ...]
    failures: tuple[Failure, ...]

    def to_json(self) -> str:
        """The document, in which an input is its path."""

        def plain(value: Any) -> Any:
            if isinstance(value, Input):
                return value.path
            return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}

        return json.dumps(self, default=plain, indent=2, ensure_ascii=False) + "\n"


class Statistics:
    """Collects what a report shows while results stream by, in memory that does not grow with
    their number."""

    def __init__(self, card: ModelCard) -> None:
        self._card = card
        self._index = {label: place for place, label in enumerate(card.labels)}
        self._images = [0] * len(card.labels)
        self._predicted = [0] * len(card.labels)
        self._pairs: Counter[tuple[int, int]] = Counter()
        self._examples: dict[tuple[int, int], list[Input]] = {}
        self._reliability = Reliability()
        self._histogram = [[0, 0, 0] for _ in range(HISTOGRAM_BINS)]
        self._mistakes = _Largest(GALLERY)
        self._least_certain = _Largest(GALLERY)
        self._failures: list[Failure] = []

    def add(self, result: Result) -> None:
        label = None if result.label is None else self._index[result.label]
        if label is not None:
            self._images[label] += 1
        if result.error is not None:
            if len(self._failures) < FAILURES:
                # Its path is all that is shown.
                item = dataclasses.replace(result.input, member=None)
                self._failures.append(Failure(input=item, reason=result.error))
            return
        best = result.predictions[0]
        self._predicted[best.index] += 1
        self._least_certain.add(-best.probability, result)
        kind = 2 if label is None else int(not result.correct)
        self._histogram[_bin(best.probability, HISTOGRAM_BINS)][kind] += 1
        if label is None:
            return
        self._reliability.add(best.probability, bool(result.correct))
        pair = (label, best.index)
        self._pairs[pair] += 1
        if not result.correct:
            self._mistakes.add(best.probability, result)
            self._keep_example(pair, result.input)

    def _keep_example(self, pair: tuple[int, int], item: Input) -> None:
        kept = self._examples.setdefault(pair, [])
        if len(kept) < EXAMPLES:
            kept.append(_light(item))
        if len(self._examples) > _PAIRS_WITH_EXAMPLES:  # the rarer half cannot matter in the end
            common = heapq.nlargest(
                _PAIRS_WITH_EXAMPLES // 2, self._examples, key=self._pairs.__getitem__
            )
            self._examples = {pair: self._examples[pair] for pair in common}

    def report(self, summary: Summary, paths: Sequence[str]) -> Report:
        """All that was collected; ``paths`` are what the user asked for."""
        labels = self._card.labels
        mistaken = {pair: n for pair, n in self._pairs.items() if pair[0] != pair[1]}
        often = sorted(mistaken, key=lambda pair: (-mistaken[pair], pair))
        taken_for: dict[int, int] = {}
        for label, predicted in often:
            taken_for.setdefault(label, predicted)
        return Report(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            paths=tuple(paths),
            summary=summary,
            model=ModelFacts.of(self._card),
            calibration_error=self._reliability.error(),
            reliability=self._reliability.bins(),
            histogram=tuple(
                HistogramBin(
                    low=place / HISTOGRAM_BINS,
                    high=(place + 1) / HISTOGRAM_BINS,
                    right=right,
                    wrong=wrong,
                    unlabelled=unlabelled,
                )
                for place, (right, wrong, unlabelled) in enumerate(self._histogram)
            ),
            classes=tuple(
                self._class_row(place, taken_for.get(place)) for place in range(len(labels))
            ),
            confusions=tuple(
                Confusion(
                    label=labels[pair[0]].name,
                    predicted=labels[pair[1]].name,
                    images=mistaken[pair],
                    of=self._images[pair[0]],
                    examples=tuple(self._examples.get(pair, ())),
                )
                for pair in often[:CONFUSIONS]
            ),
            mistakes=_examples(self._mistakes.results()),
            least_certain=_examples(self._least_certain.results()),
            failures=tuple(self._failures),
        )

    def _class_row(self, place: int, taken_for: int | None) -> ClassRow:
        label, n = self._card.labels[place], self._images[place]
        correct = self._pairs[place, place]
        return ClassRow(
            wnid=label.wnid,
            name=label.name,
            images=n,
            correct=correct,
            accuracy=correct / n if n else None,
            accuracy_ci95=wilson_interval(correct, n) if n else None,
            predicted=self._predicted[place],
            confused_with=None if taken_for is None else self._card.labels[taken_for].name,
            confused=0 if taken_for is None else self._pairs[place, taken_for],
        )


def _light(item: Input) -> Input:
    """An input that holds no more of its image than a report shows."""
    if item.member is None or item.in_memory <= _LIGHT:
        return item
    buffer = io.BytesIO()
    try:
        images.thumbnail(item.read(), PICTURE_SIZE).save(buffer, "PNG")
    except ImageError:
        return item
    data = buffer.getvalue()
    member = dataclasses.replace(item.member, read=lambda: data, in_memory=len(data))
    return dataclasses.replace(item, member=member)


class _Largest:
    """The results with the largest scores, the first ones of equals."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._added = 0
        self._heap: list[tuple[float, int, Result]] = []

    def add(self, score: float, result: Result) -> None:
        self._added += 1
        order = (score, -self._added)
        if len(self._heap) == self._count and order < self._heap[0][:2]:
            return
        entry = (*order, dataclasses.replace(result, input=_light(result.input)))
        if len(self._heap) < self._count:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def results(self) -> list[Result]:
        """Largest score first."""
        return [result for *_, result in sorted(self._heap, reverse=True)]


def _examples(results: Iterable[Result]) -> tuple[Example, ...]:
    return tuple(
        Example(
            input=result.input,
            label=None if result.label is None else result.label.name,
            predicted=result.predictions[0].name,
            probability=result.predictions[0].probability,
            correct=result.correct,
        )
        for result in results
    )


def _bin(probability: float, count: int) -> int:
    """Which of ``count`` equal parts of 0 to 1 a probability is in."""
    return max(0, min(count - 1, int(probability * count)))
