"""The one predictor: images in, predictions out. Everything that serves goes through it."""

import dataclasses
import functools
import os
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyserve import images
from tinyserve.dataset import Input
from tinyserve.devices import preferred_precisions
from tinyserve.engine import Engine, SelfTest
from tinyserve.errors import ImageError, UsageError, check_at_least_one
from tinyserve.modelfile import DEFAULT_MODEL, PRECISIONS, Label, ModelCard, find_model

_HELD = 128 * 2**20
"""Bytes of image files out of archives that all batches at work may hold, when they are full."""

FIRST_BATCH = 16
"""Images of the first batches, where no number is given."""

LARGEST_BATCH = 128
"""Images that such batches grow to, while they are quickly done."""

_QUICK = 0.06
"""Seconds that a batch may take for the next ones to be larger."""


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
    version: str
    """The input's when it was read."""
    error: str | None
    predictions: tuple[Prediction, ...]
    label: Label | None
    """The class that the input is known to show, if that is a class of the model."""
    rank: int | None
    """How many classes were thought likelier than the label; None without label or predictions."""
    unknown: bool = False
    """Whether the first prediction is not likely enough to be an answer."""

    @property
    def path(self) -> str:
        """The input's, as it was found."""
        return self.input.path

    @property
    def correct(self) -> bool | None:
        """Whether the first prediction is the label; a failed input is not. None without label."""
        return None if self.label is None else self.rank == 0

    @property
    def status(self) -> str:
        """``ok``, ``unknown`` or ``error``: exactly one of them."""
        return "error" if self.error is not None else "unknown" if self.unknown else "ok"

    def at_least(self, confidence: float | None) -> "Result":
        """The same, ``unknown`` if its first prediction is less likely than ``confidence``, from 0
        to 1; :class:`~tinyserve.errors.UsageError` for other numbers. None leaves it as it is."""
        if confidence is None:
            return self
        if not 0 <= confidence <= 1:
            raise UsageError(f"a confidence is from 0 to 1, not {confidence}")
        unknown = bool(self.predictions) and self.predictions[0].probability < confidence
        return self if unknown == self.unknown else dataclasses.replace(self, unknown=unknown)


class Classifier:
    """A model, ready to classify.

    ``model`` is the name of an installed model or the path of a model file. Of a model installed in
    several precisions, ``precision`` picks one: ``fp32``, ``fp16``, ``int8``, or ``auto`` for the
    one that suits the device. ``device``, ``threads``, ``streams`` and ``self_test`` are
    :class:`~tinyserve.engine.Engine`'s; one stream answers a single image soonest, as many as there
    are threads get the most images through. Safe to use from several threads.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        precision: str = "auto",
        device: str | None = None,
        threads: int | None = None,
        streams: int = 1,
        self_test: SelfTest = True,
    ) -> None:
        path = model_file(model, precision, device)
        self.engine = Engine(
            path, device=device, threads=threads, streams=streams, self_test=self_test
        )
        if precision not in ("auto", self.card.precision):  # of a path
            raise UsageError(f"{path} is of {self.card.precision}, not {precision}")
        self._labels_by_name = _label_names(self.card.labels)
        self._labels_by_key = _label_keys(self.card.labels)

    @property
    def card(self) -> ModelCard:
        return self.engine.card

    @functools.cached_property
    def fingerprint(self) -> str:
        """The card's, by which rows name the model; a digest of the whole card, so taken once."""
        return self.card.fingerprint

    def classify(self, source: images.Source, k: int = 5) -> tuple[Prediction, ...]:
        """The ``k`` likeliest classes of one image, best first.

        ``source`` is a path or the bytes of an image file. Raises
        :class:`~tinyserve.errors.ImageError` where it is no usable image, and
        :class:`~tinyserve.errors.UsageError` where ``k`` is less than 1.
        """
        image = images.load(source, size=self.card.image_size)
        return self.top(self.engine.run(image[None])[0], k)

    def classify_many(
        self,
        inputs: Iterable[Input | str | os.PathLike[str]],
        k: int = 5,
        batch_size: int | None = None,
    ) -> Generator[Result, None, None]:
        """One :class:`Result` for every input, in order, while they come; memory stays constant.

        Paths are those of image files; :func:`~tinyserve.dataset.find_inputs` gives what is in
        folders, archives and URIs, with its labels.
        An unusable image gets a result that says so and leaves its neighbours alone. As many
        batches as the engine has streams run at a time, while another is decoded. Unless
        ``batch_size`` is given, batches grow from :data:`FIRST_BATCH` images to
        :data:`LARGEST_BATCH`, as long as they are quickly done. What ``inputs`` raises comes after
        the results of those before. Raises :class:`~tinyserve.errors.UsageError` where ``k`` or
        ``batch_size`` is less than 1.
        """
        if isinstance(inputs, str | bytes | os.PathLike):
            raise TypeError("classify_many takes many inputs; classify takes one")
        check_at_least_one("k", k)
        check_at_least_one("batch_size", batch_size)
        return self._classify_many(map(_input, inputs), k, batch_size)

    def _classify_many(
        self, items: Iterator[Input], k: int, batch_size: int | None
    ) -> Generator[Result, None, None]:
        pending: deque[Future[list[Result]]] = deque()
        workers = self.engine.streams + 1
        pace = _Pace(batch_size)
        failed: list[Exception] = []
        with ThreadPoolExecutor(workers, thread_name_prefix="classify") as pool:
            try:
                for batch in _batches(_up_to_failure(items, failed), pace, _HELD // workers):
                    pending.append(pool.submit(self._timed_batch, batch, k, pace))
                    # One batch more than are at work, so that no thread waits for the caller.
                    if len(pending) > workers:
                        yield from pending.popleft().result()
                while pending:
                    yield from pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
        if failed:
            raise failed[0]

    def _timed_batch(self, batch: Sequence[Input], k: int, pace: "_Pace") -> list[Result]:
        start = time.perf_counter()
        results = self._classify_batch(batch, k)
        pace.took(len(batch), time.perf_counter() - start)
        return results

    def _classify_batch(self, batch: Sequence[Input], k: int) -> list[Result]:
        size = self.card.image_size
        pixels = np.empty((len(batch), size, size, 3), np.uint8)
        versions: list[str] = []
        errors: list[str | None] = []
        good = 0
        for item in batch:
            # Before it is read: should it change meanwhile, this is no longer its version.
            versions.append(item.version)
            try:
                pixels[good] = images.load(item.read(), size=size)
                errors.append(None)
                good += 1
            except ImageError as error:
                errors.append(str(error))
        labels = self.card.labels
        rows = (
            self.engine.run(pixels[:good]) if good else np.empty((0, len(labels)), dtype=np.float32)
        )
        indices = [self.class_of(item) for item in batch]
        predictions = iter(likeliest(rows, labels, k))
        ranks = _ranks(rows, [i for i, error in zip(indices, errors, strict=True) if not error])
        return [
            Result(
                item,
                version,
                error,
                () if error else next(predictions),
                None if index is None else labels[index],
                None if error else next(ranks),
            )
            for item, version, error, index in zip(batch, versions, errors, indices, strict=True)
        ]

    def top(self, row: NDArray[np.float32], k: int) -> tuple[Prediction, ...]:
        """The ``k`` likeliest classes, best first, in a row of probabilities, float32
        ``[classes]``."""
        return likeliest(row[None], self.card.labels, k)[0]

    def class_of(self, item: Input) -> int | None:
        """The class that an input shows, as its label says, or the nearest folder that is one."""
        found = map(self.label_index, item.possible_labels)
        return next((index for index in found if index is not None), None)

    def label_index(self, label: str | None) -> int | None:
        """The class that a label, a name or WordNet id, stands for; None where it is none."""
        if label is None:
            return None
        index = self._labels_by_name.get(_composed(label))
        return self._labels_by_key.get(_key(label)) if index is None else index


def likeliest(
    rows: NDArray[np.float32], labels: Sequence[Label], k: int
) -> list[tuple[Prediction, ...]]:
    """Of each row of probabilities, float32 ``[N, classes]``, the ``k`` likeliest classes, best
    first; of equal ones the first. Raises :class:`~tinyserve.errors.UsageError` where ``k`` is less
    than 1."""
    check_at_least_one("k", k)
    # For all rows at once, a place after the other: of a few places that takes less than to sort.
    rest, each = rows.copy(), np.arange(len(rows))
    best = np.empty((len(rows), min(k, rows.shape[1])), np.intp)
    for place in range(best.shape[1]):
        best[:, place] = rest.argmax(axis=1)
        rest[each, best[:, place]] = -np.inf
    probabilities = np.take_along_axis(rows, best, axis=1)
    return [
        tuple(
            [
                Prediction(index, labels[index].wnid, labels[index].name, probability)
                for index, probability in zip(*row, strict=True)
            ]
        )
        for row in zip(best.tolist(), probabilities.tolist(), strict=True)
    ]


def model_file(
    model: str | os.PathLike[str], precision: str = "auto", device: str | None = None
) -> Path:
    """The file that a :class:`Classifier` of these arguments loads."""
    if precision != "auto" and precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r} (known: auto, {', '.join(PRECISIONS)})")
    return find_model(model, preferred_precisions(device) if precision == "auto" else (precision,))


class _Pace:
    """How many images make a batch: as many as were asked for, or what suits the model.

    On two cores a network that does thousands of images a second was a fifth faster in batches of
    128 than of 32, between which its threads do little but change places; one that does a hundred
    was a tenth faster in batches of 16, and its memory was half.
    """

    def __init__(self, batch_size: int | None) -> None:
        self.batch_size = batch_size or FIRST_BATCH
        self._most = 0 if batch_size else LARGEST_BATCH

    def took(self, images: int, seconds: float) -> None:
        """Several threads may say so; of those with batches of one size only the first counts."""
        if images == self.batch_size < self._most and seconds < _QUICK:
            self.batch_size *= 2


def _input(item: Input | str | os.PathLike[str]) -> Input:
    if isinstance(item, bytes):  # which os.fspath takes for a path
        raise TypeError(
            "classify_many takes paths and Inputs; classify takes the bytes of an image"
        )
    return item if isinstance(item, Input) else Input(os.fspath(item), None)


def _up_to_failure(items: Iterator[Input], failed: list[Exception]) -> Iterator[Input]:
    """The items before the one that cannot be had, of which ``failed`` tells why."""
    try:
        yield from items
    except Exception as error:
        failed.append(error)


def _batches(items: Iterator[Input], pace: _Pace, most: int) -> Iterator[list[Input]]:
    """So many inputs at a time, fewer where they hold more than ``most`` bytes already."""
    batch: list[Input] = []
    held = 0
    for item in items:
        batch.append(item)
        held += item.in_memory
        if len(batch) >= pace.batch_size or held > most:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _ranks(rows: NDArray[np.float32], indices: Sequence[int | None]) -> Iterator[int | None]:
    """Place of each row's class in the stable order of falling probability, from 0."""
    index = np.array([-1 if i is None else i for i in indices], dtype=np.intp)[:, None]
    own = np.take_along_axis(rows, index, axis=1)
    before = (rows > own) | ((rows == own) & (np.arange(rows.shape[1]) < index))
    for i, rank in zip(indices, before.sum(axis=1).tolist(), strict=True):
        yield None if i is None else rank


def _key(label: str) -> str:
    """Folder names and class names that differ only in case, separators, and how their letters are
    composed, which macOS changes, are the same."""
    return _composed(label).lower().replace("_", " ").replace("-", " ")


def _composed(label: str) -> str:
    return unicodedata.normalize("NFC", label)


def _label_names(labels: tuple[Label, ...]) -> dict[str, int]:
    """Index of each label by its very name, where no other has it: of classes whose names differ
    in case alone, each is known by its own."""
    names = [_composed(label.name) for label in labels]
    count = Counter(names)
    return {name: index for index, name in enumerate(names) if count[name] == 1}


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
