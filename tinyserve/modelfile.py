"""What is written inside a model file, and where model files are found.

A model file is one ``.onnx`` file that says everything about itself in one JSON document, kept
under :data:`METADATA_KEY` in the ONNX metadata. Its graph has one input, ``images``: uint8
``[batch, size, size, 3]``, RGB, and one output, ``probabilities``: float32 ``[batch, classes]``.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyserve.errors import ModelFileError
from tinyserve.images import RESIZE_RULE

FORMAT = 1
METADATA_KEY = "tinyserve"
INPUT_NAME = "images"
OUTPUT_NAME = "probabilities"
DEFAULT_MODEL = "resnet20"


@dataclass(frozen=True, slots=True)
class Label:
    """One class. ``wnid`` is its WordNet id (``n01443537``), None for classes that have none."""

    wnid: str | None
    name: str


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

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "Training":
        """The inverse of :func:`dataclasses.asdict`."""
        initial = fields.get("initial")
        return cls(**{**fields, "initial": None if initial is None else cls.from_fields(initial)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Proof that the file computes what the trained network computes, on validation images.

    ``max_difference`` is the largest absolute difference of any probability.
    """

    images: int
    batch_sizes: tuple[int, ...]
    provider: str
    top1_agreement: float
    max_difference: float
    torch: str
    onnxruntime: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """All that a model file says of itself.

    ``image_size`` is the side in pixels of the images that the graph takes, ``crop`` the side of
    their centre that counts, ``network_size`` the side to which the graph resizes that before the
    network sees it; ``labels`` are in the order of the output.
    """

    architecture: str
    precision: str
    labels: tuple[Label, ...]
    image_size: int
    crop: int
    network_size: int
    parameters: int
    training: Training | None
    parity: Parity | None
    resize_rule: str = RESIZE_RULE
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, document: str) -> "ModelCard":
        """The card in a metadata document; :class:`ModelFileError` where that is not one."""
        try:
            fields: dict[str, Any] = json.loads(document)
            number = fields["format"]
            if number != FORMAT:
                raise ModelFileError(f"model format {number}, this version reads format {FORMAT}")
            fields["labels"] = tuple(Label(**label) for label in fields["labels"])
            if fields["training"] is not None:
                fields["training"] = Training.from_fields(fields["training"])
            if fields["parity"] is not None:
                fields["parity"]["batch_sizes"] = tuple(fields["parity"]["batch_sizes"])
                fields["parity"] = Parity(**fields["parity"])
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(f"damaged metadata ({error})") from error


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


def find_model(name: str) -> Path:
    """The file of a model, given its name or its path; raises :class:`ModelFileError`."""
    if name.endswith(".onnx") or os.sep in name:
        return Path(name)
    models = installed_models()
    if name not in models:
        known = ", ".join(models) or f"none; looked in {', '.join(map(str, search_folders()))}"
        raise ModelFileError(f"unknown model {name!r} (known: {known})")
    return models[name]
