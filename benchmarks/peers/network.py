"""The network of a model file, as PyTorch has it: what every peer runs, with the same weights."""

import csv
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training import pretrained


@dataclass(frozen=True)
class Network:
    """``module`` maps normalised images, float ``[N, 3, size, size]``, to logits of ``classes``
    classes. The images are the centre of what was read, ``crop`` of its shorter side wide;
    ``mean`` and ``std`` are in units of 0..1."""

    module: nn.Module
    classes: int
    size: int
    crop: float
    mean: list[float]
    std: list[float]


def load(model: Path) -> Network:
    weights = pretrained.load(model)
    # The usual transforms know mean colours, not mean images.
    mean = weights.mean.reshape(-1, 3).mean(dim=0)
    return Network(
        weights.network(),
        len(weights.labels),
        weights.network_size,
        weights.crop / weights.image_size,
        (mean / 255).tolist(),
        (weights.std / 255).tolist(),
    )


def run(
    classify: Callable[[Tensor], tuple[Tensor, Tensor]],
    loader: Iterable[tuple[Tensor, Tensor]],
    names: Sequence[str],
    rows: Path,
    first: Tensor,
) -> None:
    """Classify all that a loader gives, write the rows, and print the speed as one JSON line.

    ``classify`` gives probabilities and classes; ``first`` is a batch to warm up with.
    """
    with torch.inference_mode():
        classify(first)
        began = time.perf_counter()
        probabilities, classes = zip(*(classify(images) for images, _ in loader), strict=True)
        found = zip(
            names, torch.cat(classes).tolist(), torch.cat(probabilities).tolist(), strict=True
        )
        with rows.open("w", newline="") as file:
            csv.writer(file).writerows([name, *best, *shares] for name, best, shares in found)
        seconds = time.perf_counter() - began
    print(json.dumps({"images": len(names), "images_per_second": len(names) / seconds}))
