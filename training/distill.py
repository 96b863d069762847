"""Learning from networks that are trained already (Hinton et al., arXiv:1503.02531).

A teacher is either asked at every step about the very images that the student is shown, or once
about every whole image: see :class:`Teacher` and :func:`kept_answers`.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tinyserve.devices import CPU, OPENVINO
from tinyserve.engine import Engine
from tinyserve.errors import DataError, UsageError, os_reason
from tinyserve.files import candidate
from tinyserve.modelfile import Label, Training
from training import data, hardware, pretrained
from training.checkpoint import Weights
from training.evaluate import BATCH, GPU_BATCH, at_a_time


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A teacher that is asked about whole images, as it is served."""

    name: str
    """As :func:`training.pretrained.identify` has it."""
    arch: str
    labels: tuple[Label, ...]
    image_size: int
    batch: int
    """Images to ask about at a time."""
    ask: Callable[[data.Pixels], Tensor]
    """From images, uint8 ``[N, image_size, image_size, 3]``, to probabilities, ``[N, classes]``."""
    training: Training | None
    """How it was trained; None of a model file that was not trained here."""
    precision: str | None = None
    """In which it is asked; None for a model file, which has its own."""


def open_source(path: Path, device: torch.device, precision: str) -> Source:
    """A finished run's network on ``device``, or a model file on the best device for serving it.

    Raises :class:`~tinyserve.errors.TinyserveError` where there is neither.
    """
    if not path.is_dir():
        name = pretrained.identify(path)
        engine = Engine(path)
        card, on_cpu = engine.card, engine.provider in (CPU, OPENVINO)
        return Source(
            name=name,
            arch=card.architecture,
            labels=card.labels,
            image_size=card.image_size,
            batch=at_a_time(BATCH if on_cpu else GPU_BATCH, card.image_size),
            ask=lambda images: torch.from_numpy(engine.run(images)),
            training=card.training,
        )
    weights = pretrained.load(path)
    network = weights.served().to(device).to(memory_format=torch.channels_last)

    def ask(images: data.Pixels) -> Tensor:
        with torch.inference_mode(), hardware.autocast(device, hardware.PRECISIONS[precision]):
            answers: Tensor = network(torch.from_numpy(images).to(device))
        return answers.cpu()

    return Source(
        name=pretrained.identify(path),
        arch=weights.arch,
        labels=weights.labels,
        image_size=weights.image_size,
        batch=at_a_time(BATCH if device.type == "cpu" else GPU_BATCH, weights.image_size),
        ask=ask,
        training=weights.training,
        precision=precision,
    )


def kept_answers(sources: Sequence[Source], dataset: data.Dataset, temperature: float) -> Tensor:
    """The mean of the teachers' answers to every whole training image.

    Probabilities at a temperature, float16 ``[n, classes]``, in the order of the training images.
    They are kept beside the decoded images for every later run with the same teachers, asked in the
    same precision. Raises :class:`~tinyserve.errors.UsageError` for teachers of other classes or of
    images of another size, and :class:`~tinyserve.errors.DataError` where the answers cannot be
    kept.
    """
    images = dataset.train.images
    for source in sources:
        _check_classes(source.name, source.labels, dataset.classes)
        if source.image_size != images.shape[1]:
            raise UsageError(
                f"the teacher {source.name} is for images of {source.image_size} px, "
                f"not of {images.shape[1]} px"
            )
    asked = hashlib.sha256(images.data)
    teachers = [(source.name, source.precision) for source in sources]
    asked.update(json.dumps([teachers, temperature]).encode())
    path = data.cache_folder(dataset.root) / f"answers-{asked.hexdigest()[:16]}.npy"
    if not path.exists():
        names = " and ".join(source.name.rsplit(" ", 1)[0] for source in sources)
        print(f"asking {names} once about {len(images):,} images", file=sys.stderr)
        try:
            with candidate(path) as hidden, hidden.open("wb") as file:
                np.save(file, _ask(sources, images, temperature).numpy())
        except OSError as error:
            raise DataError(
                f"cannot keep the teacher's answers in {path.parent}: {os_reason(error)}"
            ) from error
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _ask(sources: Sequence[Source], images: data.Pixels, temperature: float) -> Tensor:
    answers = []
    count = min(source.batch for source in sources)
    with tqdm(total=len(images), desc="teacher", unit="image", disable=None) as bar:
        for start in range(0, len(images), count):
            batch = images[start : start + count]
            # Softmax of logits over T, from the softmax of the logits.
            soft = [(source.ask(batch).log() / temperature).softmax(dim=1) for source in sources]
            answers.append(torch.stack(soft).mean(dim=0).half())
            bar.update(len(batch))
    return torch.cat(answers)


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
