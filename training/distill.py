"""Learning from networks that are trained already (Hinton et al., arXiv:1503.02531).

A teacher is either asked at every step about the very images that the student is shown, or once
about some crops of every image, which are then all that the student is shown: see :class:`Teacher`
and :func:`kept_answers`. Both see the same, since answers about the whole image teach a student too
much of what is not in its crop (arXiv:2106.05237).
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tinyserve.engine import Engine
from tinyserve.errors import DataError, UsageError
from tinyserve.modelfile import Label
from training import augment, data, hardware, pretrained
from training.checkpoint import Weights
from training.recipes import Recipe

_ASKED_AT_ONCE = 64
"""Images."""


class Teacher(nn.Module):
    """The mean of one or more trained networks' answers to the images that a student is shown.

    Maps normalised images, float ``[N, 3, S, S]`` as the student gets them, to probabilities at a
    temperature, float32 ``[N, classes]``. Every network gets them with the normalisation and at the
    size that it knows. Raises :class:`~tinyserve.errors.UsageError` for networks of other classes
    than the student's, or that subtract a mean image, which cannot be placed on a crop.
    """

    def __init__(
        self, teachers: Sequence[Weights], classes: Sequence[Label], mean: Tensor, std: Tensor
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList()
        self.sizes = []
        if mean.dim() != 1:
            raise UsageError("a recipe that subtracts a mean image cannot have a teacher")
        for number, weights in enumerate(teachers):
            _check_classes(weights.arch, weights.labels, classes)
            if weights.mean.dim() != 1:
                raise UsageError(f"the teacher {weights.arch} subtracts a mean image")
            self.networks.append(weights.network().to(memory_format=torch.channels_last))
            self.sizes.append(weights.network_size)
            # What the student's normalisation did, undone, and the teacher's instead.
            own_mean, own_std = weights.mean.to(mean.device), weights.std.to(mean.device)
            self.register_buffer(f"scale{number}", (std / own_std)[:, None, None])
            self.register_buffer(f"shift{number}", ((mean - own_mean) / own_std)[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, temperature: float) -> Tensor:
        answers = torch.zeros((), device=images.device)
        for number, (network, size) in enumerate(zip(self.networks, self.sizes, strict=True)):
            x = images * self.get_buffer(f"scale{number}") + self.get_buffer(f"shift{number}")
            if x.shape[-1] != size:
                x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
            answers = answers + (network(x).float() / temperature).softmax(dim=1)
        return answers / len(self.networks)


@dataclass(frozen=True, slots=True)
class Source:
    """A teacher that is asked as it is served, about images of 8 bits."""

    name: str
    """As :func:`training.pretrained.identify` has it."""
    labels: tuple[Label, ...]
    image_size: int
    crop: int
    """Of an image of ``image_size``, the side of the centre that it looks at."""
    ask: Callable[[data.Pixels], Tensor]
    """From images, uint8 ``[N, image_size, image_size, 3]``, to probabilities, ``[N, classes]``."""

    def answers(self, images: Tensor, boxes: augment.Boxes) -> Tensor:
        """To what is in the boxes, all of which it sees; ``images`` is float ``[N, H, W, 3]``."""
        seen = augment.extract(images, boxes, self.crop).round().clamp(0, 255).to(torch.uint8)
        before = round((self.image_size - self.crop) / 2)
        after = self.image_size - self.crop - before
        framed = F.pad(seen, (before, after, before, after))
        return self.ask(framed.permute(0, 2, 3, 1).contiguous().numpy())


def open_source(path: Path, device: torch.device, precision: str) -> Source:
    """A finished run's network on ``device``, or a model file on the best device for serving it.

    Raises :class:`~tinyserve.errors.TinyserveError` where there is neither.
    """
    if not path.is_dir():
        name = pretrained.identify(path)
        engine = Engine(path)
        card = engine.card
        return Source(
            name,
            card.labels,
            card.image_size,
            card.crop if card.views == 1 else card.image_size,
            lambda images: torch.from_numpy(engine.run(images)),
        )
    weights = pretrained.load(path)
    network = weights.served().to(device).to(memory_format=torch.channels_last)

    def ask(images: data.Pixels) -> Tensor:
        with torch.inference_mode(), hardware.autocast(device, hardware.PRECISIONS[precision]):
            answers: Tensor = network(torch.from_numpy(images).to(device))
        return answers.cpu()

    name = pretrained.identify(path)
    return Source(name, weights.labels, weights.image_size, weights.crop, ask)


def crops_of(view: int, recipe: Recipe, count: int, height: int, width: int) -> augment.Boxes:
    """The crops of all training images that make up one view of them, the same in every run.

    ``count`` images of ``height`` x ``width`` pixels; the boxes are on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(view)  # and no GPU's
        return augment.training_crops(recipe, count, height, width, torch.device("cpu"))


def kept_answers(
    sources: Sequence[Source],
    dataset: data.Dataset,
    recipe: Recipe,
    wanted: Tensor | None = None,
) -> list[Tensor]:
    """The mean of the teachers' answers to every view of the training images that a run shows.

    For each view probabilities at the recipe's temperature, float16 ``[n, classes]``, in the order
    of the training images; zeros but for the ``wanted`` ones, by default all. They are kept beside
    the decoded images for every later run that shows the same to the same teachers. Raises
    :class:`~tinyserve.errors.UsageError` for teachers of other classes or of images of another
    size, and :class:`~tinyserve.errors.DataError` where the answers cannot be kept.
    """
    images = dataset.train.images
    for source in sources:
        _check_classes(source.name, source.labels, dataset.classes)
        if source.image_size != images.shape[1]:
            raise UsageError(
                f"the teacher {source.name} is for images of {source.image_size} px, "
                f"not of {images.shape[1]} px"
            )
    indices = torch.arange(len(images)) if wanted is None else wanted
    asked = hashlib.sha256(images.data)
    asked.update(json.dumps([[s.name, s.crop] for s in sources]).encode())
    asked.update(indices.numpy().data)
    asked.update(str(recipe.distill_temperature).encode())
    views = []
    for view in range(min(recipe.distill_views, recipe.epochs)):
        boxes = crops_of(view, recipe, *images.shape[:3])
        about = asked.copy()
        about.update(boxes.as_bytes())
        path = data.cache_folder(dataset.root) / f"answers-{about.hexdigest()[:16]}.npy"
        if not path.exists():
            title = f"teacher, view {view + 1}"
            answers = _ask(sources, images, boxes, indices, recipe.distill_temperature, title)
            _keep(path, answers)
        views.append(torch.from_numpy(np.load(path, mmap_mode="c")))
    return views


def _keep(path: Path, answers: Tensor) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.save(file, answers.numpy())
        os.replace(partial, path)
    except OSError as error:
        raise DataError(
            f"cannot keep the teacher's answers in {path.parent}: {error.strerror or error}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _ask(
    sources: Sequence[Source],
    images: data.Pixels,
    boxes: augment.Boxes,
    wanted: Tensor,
    temperature: float,
    title: str,
) -> Tensor:
    answers = torch.zeros(len(images), len(sources[0].labels), dtype=torch.float16)
    with tqdm(total=len(wanted), desc=title, unit="image", disable=None) as bar:
        for indices in wanted.split(_ASKED_AT_ONCE):
            pixels = torch.from_numpy(images[indices.numpy()]).float()
            # Softmax of logits over T, from the softmax of the logits.
            soft = [
                (source.answers(pixels, boxes[indices]).log() / temperature).softmax(dim=1)
                for source in sources
            ]
            answers[indices] = torch.stack(soft).mean(dim=0).half()
            bar.update(len(indices))
    return answers


def _check_classes(teacher: str, known: Sequence[Label], classes: Sequence[Label]) -> None:
    if list(known) != list(classes):
        raise UsageError(f"the teacher {teacher} knows other classes than this data")


def divergence(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Mean KL divergence of a student from its teacher's probabilities, in nats, times T^2.

    ``logits`` is float ``[N, classes]``, ``targets`` what :class:`Teacher` returns at the same
    temperature. The factor keeps the gradient's size independent of the temperature.
    """
    student = (logits / temperature).log_softmax(dim=1)
    return F.kl_div(student, targets, reduction="batchmean") * temperature**2
