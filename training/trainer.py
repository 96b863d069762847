"""A network, its optimizer and its data on one device, trained step by step."""

import itertools
import math
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tinyserve.errors import UsageError
from training import augment, hardware, pretrained
from training.checkpoint import Weights
from training.data import Dataset
from training.distill import Teacher, divergence
from training.distributed import ALONE, Workers
from training.evaluate import at_a_time, centre_accuracy
from training.models import ARCHS
from training.recipes import Recipe
from training.run import Config, Row

CPU_ACTIVATIONS = 240_000_000
"""On a CPU a batch goes through the network in equal parts, each with at most so many outputs of
layers: 40 images of 64 x 64 for resnet20, 1,300 of 56 x 56 for baseline, whose large matrices cost
the same for a part of any size. A process that trains by the modern recipe then peaks at 1.7 GB
beside the images, and larger parts are no faster. Batch norm takes its statistics from a part."""

REFIT_IMAGES = (32, 1024)
"""At least and at most so many training images give the batch norms of weights to start from their
first statistics: as many as take the memory of two parts of a batch on a CPU."""


class Trainer:
    """One training run from its first step to its last.

    Every random number of a step is drawn from a seed made of the run's seed and the step's number,
    so a run can stop after any step and go on from :meth:`state_dict` with no generator's state to
    restore.

    The images stay on ``device`` as uint8 ``[n, H, W, 3]``; a batch is cropped, flipped, normalised
    and mixed there. Where several processes train together, each computes its share of every batch,
    and all of them call every method here at the same step. They train what one would alone, but
    for batch norm, which sees a share, and dropout and mixing, which draw for each share.

    The run learns from ``teachers``, which are asked at every step, or from ``answers`` that they
    gave before, see :func:`training.distill.kept_answers`.
    """

    lr: float
    """Learning rate of the last step."""
    size: int
    """Side in pixels of the images of the last step."""
    _activations: float
    """Numbers that all layers give for each pixel of an image."""
    _order: Tensor | None
    """The epoch's permutation of the training images; drawn at its first step."""
    _sums: Tensor
    """Loss and hits of the epoch so far, in this process."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        device: torch.device,
        *,
        initial: Weights | None = None,
        teachers: Sequence[Weights] = (),
        answers: Tensor | None = None,
        workers: Workers = ALONE,
    ) -> None:
        recipe = config.recipe
        self.config, self.device, self.workers = config, device, workers
        self.images = torch.from_numpy(dataset.train.images).to(device)
        self.labels = torch.from_numpy(dataset.train.labels).to(device)
        self.val = (
            torch.from_numpy(dataset.val.images).to(device),
            torch.from_numpy(dataset.val.labels).to(device),
        )
        self.subset = _subset(dataset, config.limit_train).to(device)
        self.batch_size = min(recipe.batch_size, len(self.subset))
        if self.batch_size % workers.count:
            raise UsageError(
                f"batches of {self.batch_size} images cannot be shared by {workers.count} "
                "processes: choose a multiple with --batch-size"
            )
        if self.batch_size // workers.count == 1:
            each = "a batch" if workers.count == 1 else "each process's part of a batch"
            raise UsageError(f"{each} must have at least 2 images, batch norm needs them")
        self.steps_per_epoch = len(self.subset) // self.batch_size
        self.steps = recipe.epochs * self.steps_per_epoch
        self.mean, self.std = pixel_statistics(
            self.images, self.subset, mean_image=recipe.mean_image
        )
        if initial is not None and initial.mean.dim() == 1:
            self.mean, self.std = initial.mean.to(device), initial.std.to(device)

        torch.manual_seed(config.seed)
        network = ARCHS[config.arch](
            len(dataset.classes), image_size=recipe.final_size, batch_norm=recipe.batch_norm
        )
        if recipe.dropout is not None:
            for module in network.modules():
                if isinstance(module, nn.Dropout):
                    module.p = recipe.dropout
        self.model = network.to(device).to(memory_format=torch.channels_last)
        self._activations = activations_per_pixel(self.model, recipe.final_size)
        if initial is not None:
            pretrained.start_from(self.model, config.arch, initial, dataset.classes)
            self._refit_norms()
        self.average: _RunningAverage | None = None
        if recipe.ema is not None:
            self.average = _RunningAverage(self.model, recipe.ema)
        self.teacher: nn.Module | None = None
        if teachers:
            self.teacher = Teacher(teachers, dataset.classes, self.mean, self.std).to(device)
        self.answers = None if answers is None else answers.to(device)
        self.classes = len(dataset.classes)
        self.mixes = _mixes() if recipe.cutmix or recipe.mixup else {}
        self._network: nn.Module = self.model
        if workers.count > 1:
            # Batch norm keeps each process's own running statistics; they are averaged before they
            # are used, which costs less than sending them at every step.
            with warnings.catch_warnings():
                # Its successor, forward_sync_buffers, is not in all versions that will do.
                warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
                self._network = DistributedDataParallel(
                    self.model, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        if config.compile:
            # Once for each of a recipe's few sizes: one network for any size is a slower one.
            self._network = cast(nn.Module, torch.compile(self._network, dynamic=False))
            if self.teacher is not None:
                self.teacher = cast(nn.Module, torch.compile(self.teacher, dynamic=False))
        self.optimizer = torch.optim.SGD(
            _parameter_groups(self.model, recipe),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            fused=True,
        )
        if recipe.momentum:
            # Otherwise the fused optimizer's first step makes them, without values: where float16
            # overflows in that very step, it is skipped and they stay so.
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.precision = hardware.PRECISIONS[config.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.step = 0
        # Set by an epoch's first step: what is written between two epochs is no time of training.
        self._epoch_began: float | None = None
        self._seconds_before = 0.0
        self._start_epoch()

    @property
    def evaluated(self) -> nn.Module:
        """The network to evaluate and ship: the averaged one where the recipe averages."""
        return self.model if self.average is None else self.average.module

    @property
    def progress(self) -> float:
        """Share of all steps that are done."""
        return self.step / self.steps

    def train_step(self) -> Tensor:
        """Train on the next batch; returns this process's loss, a scalar still on the device."""
        recipe = self.config.recipe
        if self._epoch_began is None:
            self._epoch_began = time.perf_counter()
        if self._order is None:
            self._order = self._permutation()
        start = self.step % self.steps_per_epoch * self.batch_size
        indices = self._order[start : start + self.batch_size]
        self.lr = recipe.learning_rate(self.step, self.steps_per_epoch)
        self.size = recipe.training_size(self.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

        torch.manual_seed(_mix(self.config.seed, 1, self.step))
        # Drawn for the whole batch: every process crops as one process alone would.
        boxes = self._boxes()
        mix = self._choose_mix()
        if self.workers.count > 1:  # dropout differs
            torch.manual_seed(_mix(self.config.seed, 3, self.step, self.workers.rank))
        share = self.workers.share(self.batch_size)
        indices, boxes = indices[share], boxes[share]
        self._network.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros_like(self._sums)
        parts = _split(len(indices), self._parts())
        for part in parts:
            x, y = self._batch(indices[part], boxes[part])
            targets, wanted = y, self._kept(indices[part])
            if mix is not None:
                x, targets, wanted = self._mixed(mix, x, y, wanted)
            if self.teacher is not None:
                wanted = self._asked(self.teacher, x)
            with nullcontext() if part is parts[-1] else self._without_sync():
                loss, logits = self._loss(x, targets, wanted)
                loss = loss * (len(y) / len(indices))
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
        sums = self.workers.total(self._sums) / self.steps_per_epoch
        loss, hits = sums.tolist()  # waits for the device
        seconds = self._seconds()
        self._average_buffers()
        score = centre_accuracy(
            self.evaluated,
            *self.val,
            mean=self.mean,
            std=self.std,
            crop=self.config.recipe.crop,
            size=self.size,
            precision=self.precision,
        )
        row: Row = {
            "epoch": self.step // self.steps_per_epoch,
            "step": self.step,
            "size": self.size,
            "lr": self.lr,
            "train_loss": loss / self.workers.count,
            "train_top1": hits / self.batch_size,
            "val_loss": score.loss,
            "val_top1": score.top1,
            "val_top5": score.top5,
            "images_per_second": self.steps_per_epoch * self.batch_size / seconds,
            "seconds": seconds,
        }
        self._start_epoch()
        return row

    def state_dict(self) -> dict[str, Any]:
        """All that changes while training, for :meth:`load_state_dict`."""
        self._average_buffers()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "step": self.step,
            "sums": self.workers.total(self._sums).cpu(),
            "seconds": self._seconds(),
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
        if self.workers.first:
            self._sums += state["sums"].to(self.device)
        self._seconds_before = state["seconds"]

    def _refit_norms(self) -> None:
        recipe = self.config.recipe
        self.size = recipe.training_size(0, self.steps_per_epoch)
        least, most = REFIT_IMAGES
        wanted = int(2 * CPU_ACTIVATIONS / (self.size**2 * self._activations))
        wanted = min(most, max(least, wanted))
        some = self.subset[:: math.ceil(len(self.subset) / wanted)]
        _, height, width, _ = self.images.shape
        boxes = augment.centre_crops(len(some), height, width, recipe.crop, self.device)
        x, _ = self._batch(some, boxes)
        pretrained.refit_norms(self.model, x)

    def _start_epoch(self) -> None:
        self._order = None
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._epoch_began = None
        self._seconds_before = 0.0

    def _seconds(self) -> float:
        if self._epoch_began is None:
            return self._seconds_before
        return self._seconds_before + time.perf_counter() - self._epoch_began

    def _parts(self) -> int:
        if self.device.type != "cpu":
            return 1
        count = self.batch_size // self.workers.count
        wanted = math.ceil(count * self.size**2 * self._activations / CPU_ACTIVATIONS)
        return min(wanted, count // 2)  # batch norm needs two images

    def _permutation(self) -> Tensor:
        torch.manual_seed(_mix(self.config.seed, 2, self.step // self.steps_per_epoch))
        return self.subset[torch.randperm(len(self.subset), device=self.device)]

    def _boxes(self) -> augment.Boxes:
        recipe = self.config.recipe
        _, height, width, _ = self.images.shape
        area = recipe.crop_area_at(self.progress)
        if area is None:
            return augment.random_crops(self.batch_size, height, width, recipe.crop, self.device)
        return augment.random_resized_crops(self.batch_size, height, width, area, self.device)

    def _choose_mix(self) -> nn.Module | None:
        """What to mix this step's images with each other by, if at all."""
        recipe = self.config.recipe
        if self.progress >= recipe.mix_until or not (recipe.cutmix or recipe.mixup):
            return None
        draw = torch.rand(()).item()
        if draw < recipe.cutmix:
            return self.mixes["cutmix"]
        return self.mixes["mixup"] if draw < recipe.cutmix + recipe.mixup else None

    def _batch(self, indices: Tensor, boxes: augment.Boxes) -> tuple[Tensor, Tensor]:
        """Augmented images, float ``[N, 3, size, size]``, and labels ``[N]``."""
        planes = augment.normalise(self.images[indices], self.mean, self.std)
        return augment.extract(planes, boxes, self.size), self.labels[indices]

    def _kept(self, indices: Tensor) -> Tensor | None:
        """What teachers answered before, probabilities ``[N, classes]``, if they did."""
        return None if self.answers is None else self.answers[indices].float()

    def _asked(self, teacher: nn.Module, x: Tensor) -> Tensor:
        """What the teacher answers now, probabilities ``[N, classes]``."""
        with torch.no_grad(), hardware.autocast(self.device, self.precision):
            answers: Tensor = teacher(x, self.config.recipe.distill_temperature)
        return answers

    def _mixed(
        self, mix: nn.Module, x: Tensor, labels: Tensor, answers: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images mixed with each other, and in the same shares their labels, as probabilities
        ``[N, classes]``, and a teacher's answers to the images before."""
        known = F.one_hot(labels, self.classes).float()
        if answers is not None:
            known = torch.cat([known, answers], dim=1)
        x, known = mix(x, known)
        x = x.contiguous(memory_format=torch.channels_last)  # which MixUp loses on GPUs
        targets = known[:, : self.classes]
        return x, targets, None if answers is None else known[:, self.classes :]

    def _loss(self, x: Tensor, targets: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and the main logits ``[N, classes]``.

        ``targets`` is labels ``[N]``, or probabilities ``[N, classes]`` where images were mixed;
        ``wanted`` is a teacher's answers.
        """
        recipe = self.config.recipe
        with hardware.autocast(self.device, self.precision):
            outputs = self._network(x)
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        logits = logits.float()
        smoothing = recipe.label_smoothing
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        if wanted is not None:
            weight, temperature = recipe.distill_weight, recipe.distill_temperature
            loss = (1 - weight) * loss + weight * divergence(logits, wanted, temperature)
        weight = recipe.auxiliary_weight_at(self.progress)
        for head in auxiliary:
            extra = F.cross_entropy(head.float(), targets, label_smoothing=smoothing)
            loss = loss + weight * extra
        return loss, logits

    def _without_sync(self) -> AbstractContextManager[None]:
        """Gradients stay in this process until the last part of its share of the batch."""
        if isinstance(self._network, DistributedDataParallel):
            return self._network.no_sync()
        return nullcontext()

    def _average_buffers(self) -> None:
        """Give every process the mean of all processes' batch norm statistics."""
        if self.workers.count == 1:
            return
        for network in (self.model, self.average):
            for buffer in network.buffers() if network is not None else ():
                if buffer.is_floating_point():
                    buffer.copy_(self.workers.total(buffer) / self.workers.count)


class _RunningAverage(AveragedModel):
    """A network's parameters and buffers, averaged with a decay.

    The decay is less at first, so that an average goes back over a ninth of the steps so far at
    most: the first weights are soon forgotten, and short runs need no decay of their own.

    Does what its parent would, but leaves the count of updates where it is: sent to a GPU at every
    step, it makes the host wait for the GPU.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network, use_buffers=True)
        self._decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        averages, values = (
            [*network.parameters(), *network.buffers()] for network in (self.module, model)
        )
        if self.n_averaged == 0:
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)
        else:
            floats = [
                pair for pair in zip(averages, values, strict=True) if pair[0].is_floating_point()
            ]
            count = int(self.n_averaged)
            average_all = get_ema_multi_avg_fn(min(self._decay, (1 + count) / (10 + count)))
            average_all(*(list(part) for part in zip(*floats, strict=True)), self.n_averaged)
        self.n_averaged += 1


def pixel_statistics(images: Tensor, subset: Tensor, *, mean_image: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of stored images, in units of 0..255.

    ``images`` is uint8 ``[n, H, W, 3]``, ``subset`` the indices that count. The mean is an image,
    float32 ``[H, W, 3]``, or a colour, ``[3]``; the deviation is ``[3]``.
    """
    total = torch.zeros(images.shape[1:], dtype=torch.float64, device=images.device)
    squares = torch.zeros_like(total)
    for indices in subset.split(at_a_time(1024, images.shape[1])):
        pixels = images[indices].double()
        total += pixels.sum(dim=0)
        squares += pixels.square().sum(dim=0)
    mean = total / len(subset)
    colour = mean.mean(dim=(0, 1))
    std = ((squares / len(subset)).mean(dim=(0, 1)) - colour.square()).sqrt()
    # Pictures of one flat colour have no deviation to divide by.
    return (mean if mean_image else colour).float(), std.clamp(min=1).float()


def activations_per_pixel(network: nn.Module, size: int) -> float:
    """Numbers that all layers of a network give for an image of ``size``, for each of its pixels.

    The network sees one, float ``[1, 3, size, size]``.
    """
    count = 0

    def add(_: nn.Module, __: Any, output: Tensor) -> None:
        nonlocal count
        count += output.numel()

    layers = [module for module in network.modules() if not any(module.children())]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    training, device = network.training, next(network.parameters()).device
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size, device=device))
    network.train(training)
    for hook in hooks:
        hook.remove()
    return count / size**2


def _parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    decay = recipe.weight_decay if recipe.decay_norms_and_biases else 0.0
    return [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": decay},
    ]


def _subset(dataset: Dataset, limit: int | None) -> Tensor:
    """Indices of the training images to use: all that are not held out, or ``limit`` of them drawn
    at random, always the same."""
    kept = torch.ones(len(dataset.train), dtype=torch.bool)
    kept[torch.from_numpy(dataset.held_out)] = False
    indices = kept.nonzero().flatten()
    if limit is None or limit >= len(indices):
        return indices
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(indices), generator=generator)[:limit]
    return indices[chosen.sort().values]


def _mixes() -> dict[str, nn.Module]:
    """Mixing each other's images, by name."""
    from torchvision.transforms import v2  # takes two seconds to start

    return {"cutmix": v2.CutMix(), "mixup": v2.MixUp(alpha=0.2)}


def _split(count: int, parts: int) -> list[slice]:
    """``count`` items in nearly equal parts."""
    edges = [round(part * count / parts) for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _mix(*numbers: int) -> int:
    """One seed from several numbers, so that neighbouring runs and steps share no randomness."""
    mixed = 0
    for number in numbers:
        mixed = (mixed ^ number) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 29
    return mixed
