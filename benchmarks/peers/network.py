"""The network of a model file, as PyTorch has it: what every peer runs, with the same weights."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

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
