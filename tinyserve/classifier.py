"""The one predictor: images in, predictions out. Everything that serves goes through it."""

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinyserve import images
from tinyserve.dataset import Input
from tinyserve.engine import Engine, default_threads, preferred_precisions
from tinyserve.errors import ImageError, UsageError
from tinyserve.modelfile import DEFAULT_MODEL, PRECISIONS, Label, ModelCard, find_model

Source = str | os.PathLike[str] | bytes


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class with its probability, 0 to 1."""

    index: int
    wnid: str | None
    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one input. ``predictions`` are the likeliest classes, best first; empty and
    with ``error`` set where the input is no usable image."""

    input: Input
    error: str | None
    predictions: tuple[Prediction, ...]
    label: Label | None
    """The class that the input is known to show, if that is a class of the model."""
    rank: int | None
    """How many classes were thought likelier than the label; None without label or predictions."""

    @property
    def path(self) -> str:
        """The input's, as it was found."""
        return self.input.path

    @property
    def correct(self) -> bool | None:
        """Whether the first prediction is the label; a failed input is not. None without label."""
        return None if self.label is None else self.rank == 0


class Classifier:
    """A model, ready to classify.

    ``model`` is the name of an installed model or the path of a model file. Of a model installed in
    several precisions, ``precision`` picks one: ``fp32``, ``fp16``, ``int8``, or ``auto`` for the
    one that suits the device. ``device``, ``threads`` and ``self_test`` are
    :class:`~tinyserve.engine.Engine`'s. Safe to use from several threads.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        precision: str = "auto",
        device: str | None = None,
        threads: int | None = None,
        self_test: bool = True,
    ) -> None:
        if precision != "auto" and precision not in PRECISIONS:
            raise UsageError(
                f"unknown precision {precision!r} (known: auto, {', '.join(PRECISIONS)})"
            )
        precisions = preferred_precisions(device) if precision == "auto" else (precision,)
        path = find_model(model, precisions)
        self.engine = Engine(path, device=device, threads=threads, self_test=self_test)
        self._labels_by_key = _label_keys(self.card.labels)

    @property
    def card(self) -> ModelCard:
        return self.engine.card

    def classify(self, source: Source, k: int = 5) -> tuple[Prediction, ...]:
        """The ``k`` likeliest classes of one image, best first.

        ``source`` is a path or the bytes of an image file. Raises
        :class:`~tinyserve.errors.ImageError` where it is no usable image.
        """
        image = images.load(source, size=self.card.image_size)
        return self.top(self.engine.run(image[None])[0], k)

    def classify_many(
        self, inputs: Iterable[Input | str], k: int = 5, batch_size: int = 32
    ) -> Iterator[Result]:
        """One :class:`Result` for every input, in order, while they come; memory stays constant.

        An unusable image gets a result that says so and leaves its neighbours alone.
        """
        for batch in self._decoded_batches(inputs, batch_size):
            good = [image for _, image in batch if not isinstance(image, ImageError)]
            rows: Iterator[NDArray[np.float32]] = iter(
                self.engine.run(np.stack(good)) if good else ()
            )
            for item, image in batch:
                index = self.label_index(item.label)
                label = None if index is None else self.card.labels[index]
                if isinstance(image, ImageError):
                    yield Result(item, str(image), (), label, None)
                    continue
                row = next(rows)
                rank = None if index is None else _rank(row, index)
                yield Result(item, None, self.top(row, k), label, rank)

    def _decoded_batches(
        self, inputs: Iterable[Input | str], batch_size: int
    ) -> Iterator[list[tuple[Input, NDArray[np.uint8] | ImageError]]]:
        """Batches of decoded images; the next ones are decoded while the caller has this one."""
        pending: deque[tuple[Input, Future[NDArray[np.uint8] | ImageError]]] = deque()
        items = (Input(item, None) if isinstance(item, str) else item for item in inputs)
        with ThreadPoolExecutor(default_threads(), thread_name_prefix="decode") as pool:
            try:
                while True:
                    for item in itertools.islice(items, 3 * batch_size - len(pending)):
                        pending.append((item, pool.submit(self._decode, item)))
                    if not pending:
                        return
                    count = min(batch_size, len(pending))
                    batch = [pending.popleft() for _ in range(count)]
                    yield [(item, future.result()) for item, future in batch]
            finally:
                for _, future in pending:
                    future.cancel()

    def _decode(self, item: Input) -> NDArray[np.uint8] | ImageError:
        try:
            return images.load(item.read(), size=self.card.image_size)
        except ImageError as error:
            return error

    def top(self, row: NDArray[np.float32], k: int) -> tuple[Prediction, ...]:
        """The ``k`` likeliest classes, best first, in a row of probabilities, float32
        ``[classes]``."""
        best = np.argsort(-row, kind="stable")[:k]
        labels = self.card.labels
        return tuple(
            Prediction(int(i), labels[i].wnid, labels[i].name, float(row[i])) for i in best
        )

    def label_index(self, label: str | None) -> int | None:
        """The class that a label, a name or WordNet id, stands for; None where it is none."""
        return None if label is None else self._labels_by_key.get(_key(label))


def _rank(row: NDArray[np.float32], index: int) -> int:
    """Place of a class in the stable order of falling probability, from 0."""
    likelier = row > row[index]
    equal_before = row[:index] == row[index]
    return int(likelier.sum() + equal_before.sum())


def _key(label: str) -> str:
    """Folder names and class names that differ only in case and separators are the same."""
    return label.lower().replace("_", " ").replace("-", " ")


def _label_keys(labels: tuple[Label, ...]) -> dict[str, int]:
    """Index of each label by wnid and by name; names that two classes share name neither."""
    keys: dict[str, int] = {}
    shared = set()
    for index, label in enumerate(labels):
        key = _key(label.name)
        if key in keys:
            shared.add(key)
        keys[key] = index
    for key in shared:
        del keys[key]
    keys.update({_key(label.wnid): i for i, label in enumerate(labels) if label.wnid is not None})
    return keys
