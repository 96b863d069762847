"""Two models on the same images: which one is right more often, and which one is faster."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinyserve import images
from tinyserve.classifier import Classifier
from tinyserve.dataset import Input
from tinyserve.errors import DataError, ImageError, UsageError
from tinyserve.modelfile import Label


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two. ``top1`` is a fraction of the labelled images, the speed that of the model
    alone, images being decoded already."""

    provider: str
    correct: int
    top1: float
    images_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """``agreement`` is the share of images with the same top-1, ``p_value`` that of McNemar's exact
    test, two-sided: how likely a split as uneven as ``only_a_right`` to ``only_b_right`` is between
    models that are equally good. ``speed_ratio`` is B's speed over A's, the median of batches."""

    images: int
    unreadable: int
    a: Side
    b: Side
    agreement: float
    only_a_right: int
    only_b_right: int
    p_value: float
    speed_ratio: float


def compare(
    a: Classifier,
    b: Classifier,
    inputs: Sequence[Input],
    *,
    batch_size: int = 32,
    watch: Callable[[int], object] = lambda _: None,
) -> Comparison:
    """Run both over the labelled ones of the inputs, batch by batch, taking turns at going first.

    ``watch`` is told how many images are done. Raises :class:`~tinyserve.errors.UsageError` where
    the models do not know the same classes, and :class:`~tinyserve.errors.DataError` where no
    image can be used.
    """
    if set(a.card.labels) != set(b.card.labels):
        raise UsageError("the two models know different classes")
    models = (a, b)
    sizes = {model.card.image_size for model in models}
    labelled = [(item, a.class_of(item)) for item in inputs]
    known = [(item, a.card.labels[index]) for item, index in labelled if index is not None]
    right: list[list[bool]] = [[], []]
    seconds: list[list[float]] = [[], []]
    agreed = unreadable = count = 0
    for start in range(0, len(known), batch_size):
        batch = known[start : start + batch_size]
        pixels: list[list[NDArray[np.uint8]]] = [[], []]
        truth: list[Label] = []
        for item, label in batch:
            try:
                data = item.read()
                loaded = {size: images.load(data, size=size) for size in sizes}
            except ImageError:
                unreadable += 1
                continue
            truth.append(label)
            for side in (0, 1):
                pixels[side].append(loaded[models[side].card.image_size])
        watch(len(batch))
        if not truth:
            continue
        answers: list[list[Label]] = [[], []]
        for side in (0, 1) if start // batch_size % 2 else (1, 0):
            stack = np.stack(pixels[side])
            began = time.perf_counter()
            best = models[side].engine.run(stack).argmax(axis=1)
            seconds[side].append(time.perf_counter() - began)
            answers[side] = [models[side].card.labels[index] for index in best]
        for side in (0, 1):
            right[side] += [x == y for x, y in zip(answers[side], truth, strict=True)]
        agreed += sum(x == y for x, y in zip(*answers, strict=True))
        count += len(truth)
    if not count:
        raise DataError(
            f"none of the {unreadable:,} labelled images can be read"
            if unreadable
            else "no image is labelled with a class of the models"
        )
    only_a = sum(x and not y for x, y in zip(*right, strict=True))
    only_b = sum(y and not x for x, y in zip(*right, strict=True))
    sides = [
        Side(
            provider=model.engine.provider,
            correct=sum(right[side]),
            top1=sum(right[side]) / count,
            images_per_second=count / sum(seconds[side]),
        )
        for side, model in enumerate(models)
    ]
    return Comparison(
        images=count,
        unreadable=unreadable,
        a=sides[0],
        b=sides[1],
        agreement=agreed / count,
        only_a_right=only_a,
        only_b_right=only_b,
        p_value=mcnemar(only_a, only_b),
        speed_ratio=float(np.median(np.divide(seconds[0], seconds[1]))),
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's exact test: the binomial test of ``only_a`` among both."""
    trials = only_a + only_b
    tail, term = 0, 1
    for k in range(min(only_a, only_b) + 1):
        tail += term
        term = term * (trials - k) // (k + 1)  # how many ways to choose k + 1
    return min(1.0, float(2 * tail / 2**trials)) if trials else 1.0
