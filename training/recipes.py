"""How a network is trained, as plain data: a recipe is a function that returns a :class:`Recipe`.

``paper``   the schedule and augmentation of H. Yu's paper, ten epochs.
``modern``  warm-up and one cosine, random-resized crops, label smoothing, weight averaging.
``cpu``     the modern recipe cut down to what a few CPU cores do in an hour: small images first.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tinyserve.errors import UsageError

FIXED_SIZE = frozenset({"baseline", "alexnet"})
"""Architectures whose layout, a fully connected layer on the feature map, is for 56 px."""

SMALLEST_IMAGE = 24
"""Pixels; the deeper layers of the networks need as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to train one architecture. Sizes are the side of a square in pixels."""

    name: str
    epochs: int
    batch_size: int
    lr: float
    """Peak learning rate, at ``batch_size``."""
    schedule: Literal["cosine-restarts", "warmup-cosine"]
    restart_epochs: int = 1
    """Epochs from one restart of ``cosine-restarts`` to the next."""
    warmup: float = 0.0
    """Share of all steps over which the learning rate rises linearly to its peak."""
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float
    decay_norms_and_biases: bool = True
    clip_norm: float = 10.0
    label_smoothing: float = 0.0
    auxiliary_weight: float = 0.3
    """Weight of each auxiliary head's loss."""
    auxiliary_fades: bool = False
    """Let that weight fall linearly to zero over the run."""
    distill_weight: float = 0.7
    """With a teacher: weight of the divergence from it; the labels' loss has the rest."""
    distill_temperature: float = 2.0
    distill_once: bool = False
    """Ask a teacher once about each whole image and keep its answers, instead of at every step
    about the view that the student gets: that costs the time of less than an epoch, not most of
    every step. For images that CutMix or MixUp mix, its answers are mixed in the same shares."""
    batch_norm: bool
    """Add batch norm where the paper's layout has none."""
    dropout: float | None = None
    """Of every dropout layer, in place of the layout's: less for runs too short to overfit."""
    mean_image: bool
    """Subtract the mean training image; otherwise the mean colour."""
    crop: int
    """What counts at evaluation and in the exported file: the centre of the stored image."""
    sizes: tuple[tuple[float, int], ...]
    """Size of the images that the network is trained on, by progress: (share of all steps from
    which it holds, size). It is evaluated and served at the last one: networks are much worse at
    sizes they were not trained on (arXiv:1906.06423)."""
    crop_area: tuple[float, float] | None
    """Area of random resized crops as a fraction of the image; None for random crops unscaled."""
    last_crop_area: tuple[float, float] | None = None
    """The same from ``mix_until`` on, if not None: what is cropped looks larger than it will in the
    whole images that the network is served (arXiv:1906.06423)."""
    cutmix: float = 0.0
    """Share of batches in which part of every image is another's (arXiv:1905.04899)."""
    mixup: float = 0.0
    """Share of batches in which every image is blended with another (arXiv:1710.09412)."""
    mix_until: float = 0.85
    """Progress at which both stop: the last steps see unmixed images again."""
    ema: float | None = None
    """Decay of the running average of the weights, which is what is evaluated and exported; in
    the first steps it is less."""
    ten_crop: bool = False
    """Evaluate the final weights with ten-crop averaging, too."""

    def __post_init__(self) -> None:
        if min(self.epochs, self.restart_epochs, self.batch_size) < 1:
            raise UsageError("epochs, restart epochs and batch size must be at least 1")
        if not self.lr > 0:
            raise UsageError("the learning rate must be above 0")
        if self.crop < 1 or min(size for _, size in self.sizes) < 1:
            raise UsageError("crop and training sizes must be at least 1 pixel")
        if self.weight_decay < 0:
            raise UsageError("the weight decay must be at least 0")
        if self.nesterov and not self.momentum:
            raise UsageError("Nesterov momentum needs a momentum above 0")
        for area in (self.crop_area, self.last_crop_area):
            if area and not 0 < area[0] <= area[1] <= 1:
                raise UsageError(
                    "the area of crops must be two shares from 0 to 1, the smaller first"
                )
        if self.sizes[0][0] != 0 or list(self.sizes) != sorted(
            self.sizes, key=lambda size: size[0]
        ):
            raise UsageError("training sizes must start at progress 0 and be in order of progress")
        if self.sizes[-1][0] >= 1:
            raise UsageError("the last training size must start before progress 1")
        for name in ("warmup", "momentum", "label_smoothing", "dropout", "ema"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise UsageError(f"{name.replace('_', ' ')} must be at least 0 and below 1")
        if not self.clip_norm > 0 or not self.distill_temperature > 0:
            raise UsageError("the clipped norm and the temperature of distilling must be above 0")
        if self.auxiliary_weight < 0:
            raise UsageError("the auxiliary heads' weight must be at least 0")
        for name in ("distill_weight", "mix_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name.replace('_', ' ')} must be from 0 to 1")
        if not (self.cutmix >= 0 and self.mixup >= 0 and self.cutmix + self.mixup <= 1):
            raise UsageError("the shares of CutMix and MixUp must be from 0 to 1, together, too")

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step; steps count from 0 through all epochs."""
        return learning_rate(
            step,
            steps_per_epoch,
            schedule=self.schedule,
            peak=self.lr,
            warmup=self.warmup,
            epochs=self.epochs,
            restart_epochs=self.restart_epochs,
        )

    def changed(self, assignments: Iterable[str]) -> "Recipe":
        """This recipe with some fields set, each as ``field=value`` with the value in JSON."""
        known = {field.name: field for field in dataclasses.fields(self) if field.name != "name"}
        hints = get_type_hints(Recipe)
        changes: dict[str, Any] = {}
        for assignment in assignments:
            name, _, text = assignment.partition("=")
            if name not in known:
                raise UsageError(f"a recipe has no field {name!r} (known: {', '.join(known)})")
            try:
                value = _as_tuples(json.loads(text))
            except ValueError as error:
                raise UsageError(f"{assignment}: the value is not JSON") from error
            if not _fits(value, hints[name]):
                raise UsageError(f"{assignment}: {name} cannot have that value")
            changes[name] = value
        return dataclasses.replace(self, **changes)

    def at(self, image_size: int) -> "Recipe":
        """This recipe, made for stored images of 64 px, for images of another size.

        Sizes grow and shrink with the images, in steps of 8 px.
        """

        def scaled(size: int) -> int:
            return min(image_size, max(SMALLEST_IMAGE, round(size * image_size / 64 / 8) * 8))

        sizes = tuple((start, scaled(size)) for start, size in self.sizes)
        crop = scaled(self.crop)
        if crop == image_size and self.crop < 64:  # nothing would be left to crop
            crop = image_size * self.crop // 64
        return dataclasses.replace(self, crop=crop, sizes=sizes)

    @property
    def final_size(self) -> int:
        """The size at which the network is evaluated and served."""
        return self.sizes[-1][1]

    def auxiliary_weight_at(self, progress: float) -> float:
        """Weight of each auxiliary head's loss after a share of all steps."""
        return self.auxiliary_weight * (1 - progress if self.auxiliary_fades else 1)

    def crop_area_at(self, progress: float) -> tuple[float, float] | None:
        """Of random resized crops after a share of all steps, as a fraction of the image."""
        last = self.last_crop_area is not None and progress >= self.mix_until
        return self.last_crop_area if last else self.crop_area

    def training_size(self, step: int, steps_per_epoch: int) -> int:
        """The size of the images that the network is trained on at a step; the last is always at
        the size at which the network is served."""
        progress = (step + 1) / (self.epochs * steps_per_epoch)
        return [size for start, size in self.sizes if start < progress][-1]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a field was declared with."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is Ellipsis:
            return len(value) > 0 and all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if isinstance(value, bool):  # which is an int, too
        return hint is bool
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, hint)


def learning_rate(
    step: int,
    steps_per_epoch: int,
    *,
    schedule: str,
    peak: float,
    warmup: float,
    epochs: int,
    restart_epochs: int = 1,
) -> float:
    """The learning rate of a step; steps count from 0 through all epochs.

    Raises :class:`ValueError` for a schedule that is not known.
    """
    if schedule == "cosine-restarts":
        # The paper's formula, with its step counting from 1.
        steps = restart_epochs * steps_per_epoch
        return peak / 2 * (math.cos(math.pi * (step % steps) / steps) + 1)
    if schedule != "warmup-cosine":
        raise ValueError(f"the schedule {schedule!r} is not known")
    steps = epochs * steps_per_epoch
    rise = warmup * steps
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    return peak / 2 * (math.cos(math.pi * (step - rise) / (steps - rise)) + 1)


_KIN = {"plain20": "resnet20"}
"""Architectures that are trained like another."""


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def paper(arch: str) -> Recipe:
    """The paper's recipe: SGD, a cosine that restarts every epoch, 56 px random crops and flips.

    An epoch is once through the training images here. The paper does not say what its epochs are;
    its hours suggest about five times through each: ``epochs=50`` with ``restart_epochs=5`` has its
    ten cosines, each five times through the images.

    Deviations: ``a`` is 0.1 as in the paper for inception and resnet20, but 0.05 for alexnet and
    baseline, whose large layers without batch norm do not get far, or diverge, at 0.1. Pixels are
    divided by their standard deviation, which the paper does not mention.
    """
    return Recipe(
        name="paper",
        epochs=10,
        batch_size=256,
        lr=0.05 if arch in FIXED_SIZE else 0.1,
        schedule="cosine-restarts",
        weight_decay=1e-4,
        batch_norm=False,
        mean_image=True,
        crop=56,
        sizes=((0.0, 56),),
        crop_area=None,
        ten_crop=True,
    )


_MODERN_LR = {"baseline": 0.8, "alexnet": 0.1, "inception": 0.4, "resnet20": 0.4}
_MODERN_WEIGHT_DECAY = {"baseline": 3e-4, "alexnet": 5e-4, "inception": 2e-4, "resnet20": 5e-4}
_MODERN_EPOCHS = {"baseline": 60, "alexnet": 80, "inception": 60, "resnet20": 60}
_MODERN_CUTMIX = {"baseline": 0.0, "alexnet": 0.5, "inception": 0.0, "resnet20": 0.5}


def modern(arch: str) -> Recipe:
    """Warm-up and one cosine, Nesterov momentum, random-resized crops, averaged weights; CutMix for
    alexnet and resnet20.

    Inception, a tenth of the others' size, is held back by regularisation rather than helped.

    Baseline, most of it one large matrix, wants a high learning rate: of 0.08, 0.3, 0.8 and 2, in
    batches of 512, 0.8 was right most often after three epochs, on 5,000 images held out. On 30,000
    images for 30 epochs, CutMix on half of the batches cost it 1.9 points on these 5,000. Six
    epochs more on crops of 0.8 of the area or more gave it 29.1 %, on crops of half or more 28.4 %.

    All are evaluated on the whole image: what random-resized crops show is resampled, and with one
    layer of filters a network is lost on pixels that are not. Trained so for 18 epochs, baseline
    knew 30 % of 4,000 training images whole and resized to 56 px, 23 % by their centres of 56 px.
    """
    arch = _KIN.get(arch, arch)
    fixed = arch in FIXED_SIZE
    baseline = arch == "baseline"
    return Recipe(
        name="modern",
        epochs=_MODERN_EPOCHS[arch],
        batch_size=512,
        lr=_MODERN_LR[arch],
        schedule="warmup-cosine",
        warmup=0.05,
        nesterov=True,
        weight_decay=_MODERN_WEIGHT_DECAY[arch],
        decay_norms_and_biases=False,
        label_smoothing=0.05 if arch == "inception" else 0.1,
        auxiliary_fades=True,
        batch_norm=True,
        dropout=0.2 if baseline else None,
        mean_image=False,
        crop=64,
        sizes=((0.0, 56),) if fixed else ((0.0, 48), (0.4, 64)),
        crop_area=(0.5, 1.0) if arch in ("inception", "baseline") else (0.35, 1.0),
        last_crop_area=(0.8, 1.0) if baseline else None,
        cutmix=_MODERN_CUTMIX[arch],
        mix_until=0.7 if baseline else 0.85,
        ema=0.999,
    )


_CPU_EPOCHS = {"baseline": 2, "alexnet": 2, "inception": 2, "resnet20": 4}
_CPU_LR = {"baseline": 0.2, "alexnet": 0.05, "inception": 0.2, "resnet20": 0.2}
_CPU_SIZES = {
    "baseline": ((0.0, 56),),
    "alexnet": ((0.0, 24), (0.6, 32), (0.88, 56)),
    "inception": ((0.0, 24), (0.65, 32)),
    "resnet20": ((0.0, 24), (0.55, 32), (0.92, 48)),
}


def cpu(arch: str) -> Recipe:
    """A few epochs, most of them on small images: for a machine without a GPU."""
    arch = _KIN.get(arch, arch)
    fixed = arch in FIXED_SIZE
    return dataclasses.replace(
        modern(arch),
        name="cpu",
        epochs=_CPU_EPOCHS[arch],
        batch_size=128,
        lr=_CPU_LR[arch],
        warmup=0.15,
        label_smoothing=0.05,
        crop=56 if fixed else 64,
        sizes=_CPU_SIZES[arch],
        crop_area=None if fixed else (0.6, 1.0),
        last_crop_area=None,
        auxiliary_fades=False,
        distill_once=True,
        cutmix=0.0,
        ema=None,
    )


RECIPES: dict[str, Callable[[str], Recipe]] = {"paper": paper, "modern": modern, "cpu": cpu}
