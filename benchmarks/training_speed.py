"""Training speed: ours, ours without data work (the limit), and the usual torchvision loop.

::

    python benchmarks/training_speed.py --data data/tiny-imagenet-200
    python benchmarks/training_speed.py --data DIR --arch resnet20 --size 64 --compile

The three take turns in one process, several rounds of the same steps each; medians are printed, and
ratios to the limit. The usual loop is ``ImageFolder``, ``DataLoader`` with a worker a core, and
torchvision's transforms, in front of the same network, optimizer and precision.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets
from torchvision.transforms import v2

from tinyserve.devices import usable_cores
from training import augment, data, hardware
from training.recipes import RECIPES
from training.run import Config
from training.trainer import Trainer

PREFETCHED = 2
"""Batches that each worker of a DataLoader keeps ready, by default."""


class Fed(Trainer):
    """A trainer that draws no crops."""

    def _boxes(self) -> augment.Boxes:
        return augment.centre_crops(
            self.batch_size, *self.images.shape[1:3], self.config.recipe.crop, self.device
        )


class Limit(Fed):
    """A trainer that is fed the same batch again and again."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def _batch(self, indices: Tensor, boxes: augment.Boxes) -> tuple[Tensor, Tensor]:
        if len(indices) not in self._known:
            self._known[len(indices)] = super()._batch(indices, boxes)
        return self._known[len(indices)]


class Usual(Fed):
    """A trainer that is fed by torchvision."""

    loader: Iterator[tuple[Tensor, Tensor]]

    def _parts(self) -> int:
        return 1

    def _batch(self, indices: Tensor, boxes: augment.Boxes) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        images, labels = next(self.loader)
        x = images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        return x, labels.to(self.device, non_blocking=True)


def usual_loader(
    root: Path, trainer: Trainer, workers: int
) -> Generator[tuple[Tensor, Tensor], None, None]:
    recipe = trainer.config.recipe
    size = recipe.final_size
    crop = (
        v2.RandomCrop(recipe.crop)
        if recipe.crop_area is None
        else v2.RandomResizedCrop(size, scale=recipe.crop_area, antialias=True)
    )
    transform = v2.Compose(
        [
            v2.ToImage(),
            crop,
            v2.Resize(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((trainer.mean / 255).tolist(), (trainer.std / 255).tolist()),
        ]
    )
    loader = DataLoader(
        datasets.ImageFolder(str(root / "train"), transform),
        batch_size=trainer.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=trainer.device.type == "cuda",
        drop_last=True,
    )
    while True:
        yield from loader


def seconds(trainer: Trainer, steps: int) -> float:
    """For so many training steps, the device's work included."""
    wait(trainer.device)
    began = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    wait(trainer.device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_flops(trainer: Trainer) -> int:
    """Floating-point operations of one step's forward and backward pass, an image."""
    size = trainer.config.recipe.final_size
    x = torch.randn(2, 3, size, size, device=trainer.device)
    with FlopCounterMode(display=False) as counter:
        outputs = trainer.model(x)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        first.sum().backward()
    trainer.optimizer.zero_grad()
    return counter.get_total_flops() // 2


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product: what this device can reach."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        wait(device)
        began = time.perf_counter()
        a @ b
        wait(device)
        times.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--size", type=int, help="pixels; default: the recipe's last")
    parser.add_argument("--batch-size", "-b", type=int, help="default: the recipe's")
    parser.add_argument("--steps", type=int, default=8, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--workers", "-j", type=int, default=usable_cores(), help="of the DataLoader"
    )
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()

    device = hardware.device("auto")
    if device.type == "cpu":
        hardware.keep_freed_memory()
    recipe = RECIPES["modern" if device.type == "cuda" else "cpu"](arguments.arch)
    recipe = dataclasses.replace(
        recipe,
        cutmix=0.0,
        sizes=((0.0, arguments.size or recipe.final_size),),
        batch_size=arguments.batch_size or recipe.batch_size,
    )
    config = Config(
        arch=arguments.arch,
        recipe=recipe,
        seed=0,
        precision=hardware.precision("auto", device),
        image_size=64,
        limit_train=None,
        compile=arguments.compile,
    )
    dataset = data.load(arguments.data)
    trainers = {
        "ours": Trainer(config, dataset, device),
        "without data work": Limit(config, dataset, device),
        "DataLoader": (usual := Usual(config, dataset, device)),
    }

    def turn(trainer: Trainer, steps: int) -> float:
        if trainer is not usual:
            return seconds(trainer, steps)
        # Its workers work in its own turn alone, and what they made ready before it does not count.
        with closing(usual_loader(arguments.data, usual, arguments.workers)) as usual.loader:
            for _ in range(PREFETCHED * arguments.workers):
                next(usual.loader)
            return seconds(usual, steps)

    print(
        f"{arguments.arch}, {recipe.final_size} px, batches of {usual.batch_size}, "
        f"{config.precision}, {hardware.name_of(device)}, "
        f"{'compiled' if arguments.compile else 'eager'}; "
        f"medians of {arguments.rounds} rounds of {arguments.steps} steps"
    )
    for trainer in trainers.values():
        turn(trainer, 2)
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(arguments.rounds):
        for name, trainer in trainers.items():
            times[name].append(turn(trainer, arguments.steps))
    images = arguments.steps * usual.batch_size
    speeds = {name: images / statistics.median(rounds) for name, rounds in times.items()}
    for name, speed in speeds.items():
        ratio = speed / speeds["without data work"]
        print(f"{name:18} {speed:9,.0f} images/s   {ratio:5.2f} of the limit")
    flops, peak = step_flops(usual), matmul_flops(device, trainers["ours"].precision)
    reached = speeds["ours"] * flops
    print(
        f"{flops / 1e9:.2f} GFLOP an image, forward and backward: {reached / 1e12:.2f} TFLOP/s, "
        f"{reached / peak:.0%} of a large matrix product's {peak / 1e12:.2f} TFLOP/s here"
    )


if __name__ == "__main__":
    main()
