"""What is written inside a model file, and where model files are found.

A model file is one ``.onnx`` file that says everything about itself in one JSON document, kept
under :data:`METADATA_KEY` in the ONNX metadata. Its graph has one input, ``images``: uint8
``[batch, size, size, 3]``, RGB, and one output, ``probabilities``: float32 ``[batch, classes]``.
"""

import base64
import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyserve.errors import GateError, ModelFileError, os_reason
from tinyserve.images import RESIZE_RULE

FORMAT = 1
METADATA_KEY = "tinyserve"
INPUT_NAME = "images"
OUTPUT_NAME = "probabilities"
DEFAULT_MODEL = "resnet20"
PRECISIONS = ("fp32", "fp16", "int8")

_DIGEST = "card_sha256"
_CHUNK = 1 << 20
_METADATA_PROPS = 14  # the field's number in onnx.proto


@dataclass(frozen=True, slots=True)
class Label:
    """One class. ``wnid`` is its WordNet id (``n01443537``), None for classes that have none."""

    wnid: str | None
    name: str


HELD_OUT = " held out of train"
"""So ends :attr:`Training.dataset` where the accuracy is of images of the training split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the weights came about. Accuracies are fractions of ``val_images``, single centre view,
    as the trainer measured them."""

    dataset: str
    dataset_fingerprint: str
    train_images: int
    recipe: str
    epochs: int
    seed: int
    precision: str
    commit: str | None
    val_images: int
    val_top1: float
    val_top5: float
    initial: "Training | None" = None
    """Of the weights that the run started from; None where it started from scratch."""
    teachers: "tuple[TaughtBy, ...]" = ()
    """The networks whose answers were learnt, beside the labels. Files made before they were noted
    name none."""

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "Training":
        """The inverse of :func:`dataclasses.asdict`."""
        initial = fields.get("initial")
        teachers = (TaughtBy.from_fields(teacher) for teacher in fields.get("teachers", ()))
        return cls(
            **{
                **fields,
                "initial": None if initial is None else cls.from_fields(initial),
                "teachers": tuple(teachers),
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaughtBy:
    """A network that another learnt from: its ``architecture`` and training, and in ``name`` that
    of its run or file, and the SHA-256 of the weights' file."""

    name: str
    architecture: str
    training: Training | None
    """None of a network that was not trained here."""

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "TaughtBy":
        """The inverse of :func:`dataclasses.asdict`."""
        training = fields["training"]
        return cls(
            **{**fields, "training": None if training is None else Training.from_fields(training)}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was measured before the file was kept, on one execution provider of ONNX Runtime.

    The answers to ``images`` images, in batches of each of ``batch_sizes``, were compared with
    those of ``reference``: ``top1_agreement`` is the share with the same top-1,
    ``max_difference`` the largest absolute difference of any probability. Of all ``val_images``
    validation images ``correct_top1`` were right, and ``correct_top5`` among the first five; 0 of 0
    where there are none.
    """

    provider: str
    reference: str
    images: int
    batch_sizes: tuple[int, ...]
    top1_agreement: float
    max_difference: float
    val_images: int
    correct_top1: int
    correct_top5: int
    onnxruntime: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """A few images with the probabilities that the file gave for them when it was made.

    ``images`` is uint8 ``[n, size, size, 3]``, deflated, ``probabilities`` float32
    ``[n, classes]``, little-endian; both in base64. ``tolerance`` is how far a probability may be
    off on another machine.
    """

    count: int
    images: str
    probabilities: str
    tolerance: float

    @classmethod
    def of(
        cls, images: NDArray[np.uint8], probabilities: NDArray[np.float32], *, tolerance: float
    ) -> "Golden":
        return cls(
            count=len(images),
            images=base64.b64encode(zlib.compress(images.tobytes(), 9)).decode(),
            probabilities=base64.b64encode(probabilities.astype("<f4").tobytes()).decode(),
            tolerance=tolerance,
        )

    def arrays(self, size: int, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """The images and their probabilities; ValueError where they are not of this shape."""
        # Never more than is expected, whatever a file of unknown origin unpacks to.
        expected = self.count * size * size * 3
        unpacking = zlib.decompressobj()
        pixels = unpacking.decompress(base64.b64decode(self.images), expected)
        if unpacking.unconsumed_tail:
            raise ValueError("more pixels than expected")
        images = np.frombuffer(pixels, np.uint8).reshape(self.count, size, size, 3)
        numbers = np.frombuffer(base64.b64decode(self.probabilities), "<f4")
        return images, numbers.astype(np.float32).reshape(self.count, classes)


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """Of the images measured, ``decided`` had a first prediction of at least ``threshold``, and
    ``correct`` of these were right."""

    threshold: float
    decided: int
    correct: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How the probabilities were made to mean what they say, and how well that went.

    The graph divides the network's logits by ``temperature``, which was fitted on
    ``fitted_images``. On ``images`` others, neither trained nor fitted on, the file itself was
    measured: the expected calibration error was ``ece_before`` without the temperature, in
    PyTorch, and is ``ece``; ``points`` are the precision and the coverage at rising thresholds.
    Both sets come from ``source``.
    """

    temperature: float
    source: str
    fitted_images: int
    images: int
    ece_before: float
    ece: float
    points: tuple[OperatingPoint, ...]

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "Calibration":
        """The inverse of :func:`dataclasses.asdict`."""
        points = tuple(OperatingPoint(**point) for point in fields["points"])
        return cls(**{**fields, "points": points})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """All that a model file says of itself.

    ``image_size`` is the side in pixels of the images that the graph takes, ``crop`` the side of
    their centre that counts, ``network_size`` the side to which the graph resizes that before the
    network sees it; ``views`` is how many views of an image the graph averages; ``labels`` are in
    the order of the output. ``graph_bytes`` and ``graph_sha256`` are length and digest of the part
    of the file before the card.
    """

    architecture: str
    precision: str
    labels: tuple[Label, ...]
    image_size: int
    crop: int
    network_size: int
    views: int = 1
    parameters: int
    training: Training | None
    evidence: tuple[Evidence, ...] = ()
    golden: Golden | None = None
    calibration: Calibration | None = None
    """None where no images were held out to calibrate with."""
    graph_bytes: int = 0
    graph_sha256: str = ""
    resize_rule: str = RESIZE_RULE
    format: int = FORMAT

    @property
    def accuracy(self) -> tuple[float, float] | None:
        """Top-1 and top-5 of this very file, as fractions of the validation images, or else of its
        weights; None where neither was measured."""
        for entry in self.evidence:
            if entry.val_images:
                return entry.correct_top1 / entry.val_images, entry.correct_top5 / entry.val_images
        return None if self.training is None else (self.training.val_top1, self.training.val_top5)

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change with the weights, the labels or anything else."""
        return _digest(dataclasses.asdict(self))[:12]

    def to_json(self) -> str:
        """The document, with a digest of itself."""
        fields = dataclasses.asdict(self)
        return json.dumps({**fields, _DIGEST: _digest(fields)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, document: str) -> "ModelCard":
        """The card in a metadata document.

        Raises :class:`ModelFileError` where that is not one, and :class:`GateError` where it was
        changed after it was written.
        """
        try:
            fields: dict[str, Any] = json.loads(document)
            number = fields["format"]
            if number != FORMAT:
                raise ModelFileError(f"model format {number}, this version reads format {FORMAT}")
            digest = fields.pop(_DIGEST)
            genuine = digest == _digest(fields)
            fields["labels"] = tuple(Label(**label) for label in fields["labels"])
            if fields["training"] is not None:
                fields["training"] = Training.from_fields(fields["training"])
            fields["evidence"] = tuple(
                Evidence(**{**entry, "batch_sizes": tuple(entry["batch_sizes"])})
                for entry in fields["evidence"]
            )
            if fields["golden"] is not None:
                fields["golden"] = Golden(**fields["golden"])
            if fields.get("calibration") is not None:
                fields["calibration"] = Calibration.from_fields(fields["calibration"])
            card = cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(f"damaged metadata ({error})") from error
        if not genuine:
            raise GateError("its metadata was changed after it was exported")
        return card


def _digest(fields: dict[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_model(path: Path, graph: bytes, card: ModelCard) -> ModelCard:
    """Write a model file: a serialized ONNX model without metadata, and after it the card.

    Returns the card as it was written, with the graph's digest.
    """
    digest = hashlib.sha256(graph).hexdigest()
    card = dataclasses.replace(card, graph_bytes=len(graph), graph_sha256=digest)
    # An ONNX file is one protocol buffer message, and the concatenation of two is their merger: the
    # second holds the field metadata_props alone, with one pair of strings.
    pair = _field(1, METADATA_KEY.encode()) + _field(2, card.to_json().encode())
    path.write_bytes(graph + _field(_METADATA_PROPS, pair))
    return card


Port = tuple[str, str, tuple[Any, ...]]
"""Name, NumPy's name of the type, and shape of an input or output of a graph; whatever stands for
the size of the batch comes first in the shape."""


def read_document(
    path: Path, document: str | None, inputs: Sequence[Port], outputs: Sequence[Port]
) -> ModelCard:
    """The card of a file, out of its metadata.

    Raises :class:`ModelFileError` where there is none or it does not fit the graph, and
    :class:`GateError` where it was changed after it was written.
    """
    if document is None:
        raise ModelFileError(f"{path} is an ONNX model, but none that tinyserve exported")
    try:
        card = ModelCard.from_json(document)
    except (ModelFileError, GateError) as error:
        raise type(error)(f"{path}: {error}") from error
    size, classes = card.image_size, len(card.labels)
    found = [(name, kind, shape[1:]) for name, kind, shape in (*inputs, *outputs)]
    if len(inputs) != 1 or found != [
        (INPUT_NAME, "uint8", (size, size, 3)),
        (OUTPUT_NAME, "float32", (classes,)),
    ]:
        raise ModelFileError(
            f"{path}: its graph is not what its metadata says: {[*inputs]} -> {[*outputs]}"
        )
    return card


def check_graph(path: Path, card: ModelCard) -> None:
    """Raise :class:`GateError` unless the graph in a file is the one that its card describes, and
    :class:`ModelFileError` where the file cannot be read."""
    graph, left = hashlib.sha256(), card.graph_bytes
    try:
        # Not mapped: where another process cuts a mapped file short, this one is killed.
        with path.open("rb") as file:
            while left and (chunk := file.read(min(left, _CHUNK))):
                graph.update(chunk)
                left -= len(chunk)
            rest = file.read()
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {os_reason(error)}") from error
    # Behind the graph there is the card's field alone: others would be read as the graph's. Its
    # content begins where the length ends, which takes one to five bytes.
    alone = any(rest == _field(_METADATA_PROPS, rest[start:]) for start in range(2, 7))
    if graph.hexdigest() != card.graph_sha256 or not alone:
        raise GateError(f"{path}: its graph was changed after it was exported")


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer message."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def search_folders() -> list[Path]:
    """Where model files are looked for: ``$TINYSERVE_MODELS`` (folders, separated as in ``$PATH``),
    or ``exported/`` here, in the checkout that this package runs from, and inside the package."""
    if wanted := os.environ.get("TINYSERVE_MODELS"):
        return [Path(folder) for folder in wanted.split(os.pathsep) if folder]
    package = Path(__file__).resolve().parent
    return [Path("exported"), package.parent / "exported", package / "exported"]


def installed_models() -> dict[str, Path]:
    """Name to file of every model found, the first of each name; names are file names less
    ``.onnx``."""
    models: dict[str, Path] = {}
    for folder in search_folders():
        for path in sorted(folder.glob("*.onnx")):
            models.setdefault(path.stem, path)
    return models


def model_names() -> list[str]:
    """The models found, each once whatever the number of its precisions."""
    return list(dict.fromkeys(_without_precision(name)[0] for name in installed_models()))


def _without_precision(name: str) -> tuple[str, str | None]:
    """A file's name without the precision at its end, and that; fp32 is not in a name."""
    base, _, ending = name.rpartition(".")
    return (base, ending) if base and ending in PRECISIONS[1:] else (name, None)


def find_model(name: str | os.PathLike[str], precisions: Sequence[str] = PRECISIONS) -> Path:
    """The file of a model, given its path, its name, or its name less the precision.

    Of ``resnet20.fp16`` and ``resnet20.int8``, ``resnet20`` means the first that there is in the
    order of ``precisions``; a name without a precision is a file of fp32. Raises
    :class:`ModelFileError` where there is none.
    """
    if isinstance(name, os.PathLike) or name.endswith(".onnx") or os.sep in name:
        path = Path(name)
        if not os.path.isfile(path):  # not an error for names that no file can have
            raise ModelFileError(f"no such model file: {path}")
        return path
    models = installed_models()
    base, named = _without_precision(name)
    variants = {
        precision: base if precision == "fp32" else f"{base}.{precision}"
        for precision in ([named] if named else precisions)
        if precision in precisions
    }
    found = [models[variant] for variant in variants.values() if variant in models]
    if not found:
        known = ", ".join(models) or f"none; looked in {', '.join(map(str, search_folders()))}"
        of = "" if set(precisions) == set(PRECISIONS) else f" in {' or '.join(precisions)}"
        raise ModelFileError(f"unknown model {name!r}{of} (known: {known})")
    return found[0]
