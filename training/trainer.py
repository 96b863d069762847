"""A network, its optimizer and its data on one device, trained step by step."""

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tinyserve.errors import UsageError
from training import augment, pretrained
from training.checkpoint import Weights
from training.data import Dataset
from training.evaluate import Score, view_accuracy
from training.models import ARCHS
from training.recipes import Recipe
from training.run import Config, Row

CPU_PIXELS = 64 * 64 * 64
"""On a CPU a batch goes through the network in equal parts of at most this many pixels, 64 images
of 64 x 64: so much keeps the activations below 4 GB, and larger parts are no faster. Batch norm
then takes its statistics from a part."""

REFIT_IMAGES = 1024
"""Training images that give the batch norms of weights to start from their first statistics."""

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Trainer:
    """One training run from its first step to its last.

    Every random number of a step is drawn from a seed made of the run's seed and the step's number,
    so a run can stop after any step and go on from :meth:`state_dict` with no generator's state to
    restore.

    The images stay on ``device`` as uint8 ``[n, H, W, 3]``; a batch is cropped, flipped and
    normalised there.
    """

    lr: float
    """Learning rate of the last step."""
    size: int
    """Side in pixels of the images of the last step."""
    _order: Tensor | None
    """The epoch's permutation of the training images; drawn at its first step."""
    _sums: Tensor
    """Loss and hits of the epoch so far."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        device: torch.device,
        initial: Weights | None = None,
    ) -> None:
        recipe = config.recipe
        self.config, self.device = config, device
        self.images = torch.from_numpy(dataset.train.images).to(device)
        self.labels = torch.from_numpy(dataset.train.labels).to(device)
        self.val = (
            torch.from_numpy(dataset.val.images).to(device),
            torch.from_numpy(dataset.val.labels).to(device),
        )
        self.subset = _subset(len(self.labels), config.limit_train, device)
        self.batch_size = min(recipe.batch_size, len(self.subset))
        if self.batch_size == 1:
            raise UsageError("a batch must have at least 2 images, batch norm needs them")
        self.steps_per_epoch = len(self.subset) // self.batch_size
        self.steps = recipe.epochs * self.steps_per_epoch
        self.mean, self.std = pixel_statistics(
            self.images, self.subset, mean_image=recipe.mean_image
        )

        if initial is not None and initial.mean.dim() == 1:
            self.mean, self.std = initial.mean.to(device), initial.std.to(device)
        torch.manual_seed(config.seed)
        build = ARCHS[config.arch]
        network = build(
            len(dataset.classes), image_size=recipe.final_size, batch_norm=recipe.batch_norm
        )
        self.model = network.to(device).to(memory_format=torch.channels_last)
        if initial is not None:
            pretrained.start_from(self.model, initial, dataset.classes)
            self._refit_norms()
        self.optimizer = torch.optim.SGD(
            _parameter_groups(self.model, recipe),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            fused=True,
        )
        self.precision = PRECISIONS[config.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.average: AveragedModel | None = None
        if recipe.ema is not None:
            self.average = AveragedModel(
                self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True
            )
        self.step = 0
        self._start_epoch()

    @property
    def evaluated(self) -> nn.Module:
        """The network to evaluate and ship: the averaged one where the recipe averages."""
        return self.model if self.average is None else self.average.module

    def train_step(self) -> Tensor:
        """Train on the next batch; returns its loss, a scalar still on the device."""
        recipe = self.config.recipe
        if self._order is None:
            self._order = self._permutation()
        start = self.step % self.steps_per_epoch * self.batch_size
        indices = self._order[start : start + self.batch_size]
        self.lr = recipe.learning_rate(self.step, self.steps_per_epoch)
        self.size = recipe.training_size(self.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

        torch.manual_seed(_mix(self.config.seed, 1, self.step))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros_like(self._sums)
        for part in indices.tensor_split(self._parts()):
            x, y = self._batch(part)
            with torch.autocast(
                self.device.type, self.precision, enabled=self.precision != torch.float32
            ):
                outputs = self.model(x)
            loss, logits = _loss(outputs, y, recipe)
            loss = loss * (len(part) / len(indices))
            self.scaler.scale(loss).backward()
            hits = (logits.detach().argmax(dim=1) == y).sum()
            sums += torch.stack([loss.detach().double(), hits.double()])
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)

        self._sums += sums
        self.step += 1
        return sums[0]

    def finish_epoch(self) -> Row:
        """Validate after an epoch's last step; returns its row of the history.

        Validation during training is at the size and in the precision of the last step.
        """
        loss, hits = (self._sums / self.steps_per_epoch).tolist()  # waits for the device
        seconds = time.perf_counter() - self._epoch_began + self._seconds_before
        score = self.view_accuracy(self.evaluated, self.size, augment.CENTRE)
        row: Row = {
            "epoch": self.step // self.steps_per_epoch,
            "step": self.step,
            "size": self.size,
            "lr": self.lr,
            "train_loss": loss,
            "train_top1": hits / self.batch_size,
            "val_loss": score.loss,
            "val_top1": score.top1,
            "val_top5": score.top5,
            "images_per_second": self.steps_per_epoch * self.batch_size / seconds,
            "seconds": seconds,
        }
        self._start_epoch()
        return row

    def view_accuracy(self, network: nn.Module, size: int, views: augment.Views) -> Score:
        """Accuracy on the validation split with the probabilities of several views averaged."""
        images, labels = self.val
        return view_accuracy(
            network,
            images,
            labels,
            mean=self.mean,
            std=self.std,
            crop=self.config.recipe.crop,
            size=size,
            views=views,
            precision=self.precision,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that changes while training, for :meth:`load_state_dict`."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "step": self.step,
            "sums": self._sums.cpu(),
            "seconds": time.perf_counter() - self._epoch_began + self._seconds_before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another trainer of the same configuration stopped."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.step = state["step"]
        self._start_epoch()
        self._sums += state["sums"].to(self.device)
        self._seconds_before = state["seconds"]

    def _refit_norms(self) -> None:
        size = self.config.recipe.training_size(0, self.steps_per_epoch)
        some = self.subset[:: math.ceil(len(self.subset) / REFIT_IMAGES)]
        pixels = augment.normalise(self.images[some], self.mean, self.std)
        count, height, width, _ = pixels.shape
        crop = self.config.recipe.crop
        boxes = augment.placed_crops(count, height, width, crop, self.device)
        pretrained.refit_norms(self.model, augment.extract(pixels, boxes, size))

    def _start_epoch(self) -> None:
        self._order = None
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._epoch_began = time.perf_counter()
        self._seconds_before = 0.0

    def _parts(self) -> int:
        if self.device.type != "cpu":
            return 1
        return math.ceil(self.batch_size * self.size**2 / CPU_PIXELS)

    def _permutation(self) -> Tensor:
        torch.manual_seed(_mix(self.config.seed, 2, self.step // self.steps_per_epoch))
        return self.subset[torch.randperm(len(self.subset), device=self.device)]

    def _batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Augmented images, float ``[N, 3, size, size]``, and labels ``[N]``."""
        recipe = self.config.recipe
        pixels = augment.normalise(self.images[indices], self.mean, self.std)
        count, height, width, _ = pixels.shape
        if recipe.crop_area is None:
            boxes = augment.random_crops(count, height, width, recipe.crop, self.device)
        else:
            boxes = augment.random_resized_crops(
                count, height, width, recipe.crop_area, self.device
            )
        return augment.extract(pixels, boxes, self.size), self.labels[indices]


def pixel_statistics(images: Tensor, subset: Tensor, *, mean_image: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of stored images, in units of 0..255.

    ``images`` is uint8 ``[n, H, W, 3]``, ``subset`` the indices that count. The mean is an image,
    float32 ``[H, W, 3]``, or a colour, ``[3]``; the deviation is ``[3]``.
    """
    total = torch.zeros(images.shape[1:], dtype=torch.float64, device=images.device)
    squares = torch.zeros_like(total)
    for indices in subset.split(1024):
        pixels = images[indices].double()
        total += pixels.sum(dim=0)
        squares += pixels.square().sum(dim=0)
    mean = total / len(subset)
    colour = mean.mean(dim=(0, 1))
    std = ((squares / len(subset)).mean(dim=(0, 1)) - colour.square()).sqrt()
    # Pictures of one flat colour have no deviation to divide by.
    return (mean if mean_image else colour).float(), std.clamp(min=1).float()


def _loss(outputs: Tensor | tuple[Tensor, ...], y: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The training loss, and the main logits ``[N, classes]``."""
    logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
    smoothing = recipe.label_smoothing
    loss = F.cross_entropy(logits.float(), y, label_smoothing=smoothing)
    for head in auxiliary:
        extra = F.cross_entropy(head.float(), y, label_smoothing=smoothing)
        loss = loss + recipe.auxiliary_weight * extra
    return loss, logits


def _parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    decay = recipe.weight_decay if recipe.decay_norms_and_biases else 0.0
    return [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": decay},
    ]


def _subset(count: int, limit: int | None, device: torch.device) -> Tensor:
    """Indices of the training images to use: all, or ``limit`` drawn at random, always the same."""
    if limit is None or limit >= count:
        return torch.arange(count, device=device)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(count, generator=generator)[:limit]
    return chosen.sort().values.to(device)


def _mix(*numbers: int) -> int:
    """One seed from several numbers, so that neighbouring runs and steps share no randomness."""
    mixed = 0
    for number in numbers:
        mixed = (mixed ^ number) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 29
    return mixed
