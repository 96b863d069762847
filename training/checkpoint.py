"""What a run leaves on disk: a checkpoint to go on from, and the final weights to export.

``checkpoint.pt`` holds everything that a run needs to go on to the same result as if it had never
stopped. ``weights.pt`` appears when a run has finished: see :class:`Weights`.
"""

import contextlib
import dataclasses
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyserve.errors import CheckpointError
from tinyserve.modelfile import Label, Training
from training.augment import CENTRE, Views
from training.evaluate import ServedNetwork
from training.models import ARCHS, is_auxiliary

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.pt"
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A trained network and all that is needed to export it.

    ``state`` is the state dict without auxiliary heads, float32, rounded to what float16 holds
    where a tensor has two or more dimensions: the file is half as large, and the accuracy in
    ``training`` is that of the rounded weights. ``mean`` (``[H, W, 3]`` or ``[3]``) and ``std``
    (``[3]``) are in units of 0..255, RGB. In pixels: ``image_size``, the side of stored images;
    ``crop``, the side of the centre that counts; ``network_size``, to which that is resized.
    """

    arch: str
    batch_norm: bool
    labels: tuple[Label, ...]
    image_size: int
    crop: int
    network_size: int
    mean: Tensor
    std: Tensor
    state: dict[str, Tensor]
    training: Training

    def network(self) -> nn.Module:
        """The network with these weights, in evaluation mode, float32, on the CPU."""
        model = ARCHS[self.arch](
            len(self.labels), image_size=self.network_size, batch_norm=self.batch_norm
        )
        if missing := {
            name for name in model.state_dict().keys() - self.state.keys() if not is_auxiliary(name)
        }:
            raise CheckpointError(f"weights without {', '.join(sorted(missing))}")
        try:
            model.load_state_dict(self.state, strict=False)
        except RuntimeError as error:
            raise CheckpointError(
                f"these weights do not fit {self.arch} with {len(self.labels)} classes "
                f"at {self.network_size} px"
            ) from error
        return model.eval()

    def served(self, views: Views = CENTRE) -> ServedNetwork:
        """The whole graph of the model file with these weights, like :meth:`network`."""
        return ServedNetwork(
            self.network(),
            self.mean,
            self.std,
            image_size=self.image_size,
            crop=self.crop,
            network_size=self.network_size,
            views=views,
        ).eval()


def final_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict to ship, see :class:`Weights`; on the CPU."""
    return {
        name: value.detach().cpu().half().float() if value.dim() >= 2 else value.detach().cpu()
        for name, value in model.state_dict().items()
        if not is_auxiliary(name)
    }


def save_weights(folder: Path, weights: Weights) -> None:
    document = {
        **{field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)},
        "format": _FORMAT,
        "labels": [dataclasses.asdict(label) for label in weights.labels],
        "training": dataclasses.asdict(weights.training),
        "state": {
            name: value.half() if value.dim() >= 2 else value
            for name, value in weights.state.items()
        },
    }
    save(folder / WEIGHTS, document)


def weights_of(folder: Path) -> Path:
    """The file of a finished run's weights; raises :class:`CheckpointError` where there is none."""
    if not folder.is_dir():
        raise CheckpointError(f"no such run: {folder}")
    if not (folder / WEIGHTS).exists():
        if (folder / CHECKPOINT).exists():
            raise CheckpointError(f"{folder} has not finished; go on with training.fit --resume")
        raise CheckpointError(
            f"{folder} is no training run: it has neither {WEIGHTS} nor {CHECKPOINT}"
        )
    return folder / WEIGHTS


def load_weights(folder: Path) -> Weights:
    """The final weights of the run in ``folder``; raises :class:`CheckpointError`."""
    path = weights_of(folder)
    document = load(path)
    try:
        if document.pop("format") != _FORMAT:
            raise CheckpointError(f"{path} is of another version of tinyserve")
        if document["arch"] not in ARCHS:
            raise CheckpointError(
                f"{path}: unknown architecture {document['arch']!r} (known: {', '.join(ARCHS)})"
            )
        document["labels"] = tuple(Label(**label) for label in document["labels"])
        document["training"] = Training.from_fields(document["training"])
        document["state"] = {
            name: value.float() if value.is_floating_point() else value
            for name, value in document["state"].items()
        }
        return Weights(**document)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not the weights of a run ({error})") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another path to write to, which takes the place of ``path`` at the end.

    ``path`` is at every moment the old file or the new one, whole. Raises :class:`CheckpointError`
    where that cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # PyTorch raises the latter
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write {path}: {reason}") from error


def save(path: Path, document: dict[str, Any]) -> None:
    """Write a checkpoint, see :func:`replacing`."""
    with replacing(path) as partial, partial.open("wb") as file:
        torch.save(document, file)
        file.flush()
        os.fsync(file.fileno())


def load(path: Path) -> dict[str, Any]:
    """A document written by :func:`save`, on the CPU; raises :class:`CheckpointError`."""
    try:
        # PyTorch does not compare the checksums that it writes.
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)
        document = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at {path}") from error
    except Exception as error:  # a damaged zip or pickle raises almost anything
        raise CheckpointError(f"{path} is damaged or is no checkpoint") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is no checkpoint of this program")
    return document
