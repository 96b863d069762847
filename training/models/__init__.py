"""The architectures: ``ARCHS`` maps a name to the function that builds the network.

Every builder has the same signature::

    builder(num_classes=200, *, image_size=56, batch_norm=False) -> nn.Module

The module maps normalised images, float ``[N, 3, image_size, image_size]``, RGB, to logits,
float ``[N, num_classes]``. ``image_size`` is the side in pixels of the crop that the network sees;
it fixes the shape of the first fully connected layer where there is one and is ignored by the
networks that end in a global average pool. ``batch_norm=False`` is the layout of the paper,
``True`` adds batch normalisation where the paper has none.

A network may return a tuple ``(logits, auxiliary_logits, ...)`` while it is in training mode; in
evaluation mode it returns the logits alone.
"""

from collections.abc import Callable

from torch import nn

from training.models.alexnet import alexnet
from training.models.baseline import baseline
from training.models.inception import inception
from training.models.resnet20 import plain20, resnet20

ARCHS: dict[str, Callable[..., nn.Module]] = {
    "baseline": baseline,
    "alexnet": alexnet,
    "inception": inception,
    "resnet20": resnet20,
    "plain20": plain20,
}


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars, without those of auxiliary heads, which only training has."""
    return sum(
        parameter.numel() for name, parameter in model.named_parameters() if not is_auxiliary(name)
    )


def is_auxiliary(name: str) -> bool:
    """Whether a parameter or buffer of this name belongs to a head that exists only in training."""
    return name.startswith("aux_heads.")
