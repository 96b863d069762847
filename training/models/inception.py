"""Reduced GoogLeNet (Inception v1)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.models.layers import conv_relu, init_classifier, init_weights


class Widths(NamedTuple):
    """Output channels of the six convolutions of one inception module."""

    conv1: int
    reduce3: int
    conv3: int
    reduce5: int
    conv5: int
    pool_proj: int

    @property
    def out_channels(self) -> int:
        return self.conv1 + self.conv3 + self.conv5 + self.pool_proj


MODULES = (
    Widths(32, 48, 64, 8, 16, 16),
    Widths(64, 64, 96, 16, 48, 32),
    Widths(96, 48, 104, 8, 24, 32),
    Widths(80, 56, 112, 12, 32, 32),
    Widths(64, 64, 64, 12, 32, 32),
    Widths(55, 72, 72, 16, 32, 32),
    Widths(64, 80, 80, 8, 64, 64),
    Widths(64, 80, 80, 16, 64, 64),
    Widths(96, 96, 96, 24, 64, 64),
)
POOL_AFTER = (2, 5, 7)
AUXILIARY_AFTER = (3, 6)


class InceptionModule(nn.Module):
    """Four parallel branches over the same input, concatenated along the channels.

    Maps float ``[N, in_channels, H, W]`` to ``[N, widths.out_channels, H, W]``.
    """

    def __init__(self, in_channels: int, widths: Widths, *, batch_norm: bool) -> None:
        super().__init__()
        self.branch1 = conv_relu(in_channels, widths.conv1, 1, batch_norm=batch_norm)
        self.branch3 = nn.Sequential(
            conv_relu(in_channels, widths.reduce3, 1, batch_norm=batch_norm),
            conv_relu(widths.reduce3, widths.conv3, 3, batch_norm=batch_norm),
        )
        self.branch5 = nn.Sequential(
            conv_relu(in_channels, widths.reduce5, 1, batch_norm=batch_norm),
            conv_relu(widths.reduce5, widths.conv5, 5, batch_norm=batch_norm),
        )
        self.branch_pool = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            conv_relu(in_channels, widths.pool_proj, 1, batch_norm=batch_norm),
        )

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x))
        return torch.cat(branches, dim=1)


def auxiliary_head(in_channels: int, num_classes: int, *, batch_norm: bool) -> nn.Sequential:
    """Classifier on an inner feature map, float ``[N, in_channels, H, W]`` with H, W >= 5."""
    classifier = nn.Linear(128, num_classes)
    head = nn.Sequential(
        nn.AvgPool2d(5, stride=3),
        conv_relu(in_channels, 128, 1, batch_norm=batch_norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        classifier,
    )
    init_weights(head)
    init_classifier(classifier)
    return head


class Inception(nn.Module):
    """See :func:`inception`."""

    def __init__(self, num_classes: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.stem = conv_relu(3, 64, 7, batch_norm=batch_norm)
        self.inception = nn.ModuleList()
        self.aux_heads = nn.ModuleDict()
        channels = 64
        for number, widths in enumerate(MODULES, start=1):
            self.inception.append(InceptionModule(channels, widths, batch_norm=batch_norm))
            channels = widths.out_channels
            if number in AUXILIARY_AFTER:
                self.aux_heads[str(number)] = auxiliary_head(
                    channels, num_classes, batch_norm=batch_norm
                )
        self.downsample = nn.MaxPool2d(3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        init_weights(self.stem)
        init_weights(self.inception)
        init_classifier(self.classifier)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits ``[N, num_classes]``; in training mode a tuple (logits, *auxiliary logits)."""
        auxiliary = []
        x = self.stem(x)
        for number, module in enumerate(self.inception, start=1):
            x = module(x)
            if self.training and number in AUXILIARY_AFTER:
                auxiliary.append(self.aux_heads[str(number)](x))
            if number in POOL_AFTER:
                x = self.downsample(x)
        logits: Tensor = self.classifier(self.pool(x).flatten(1))
        return (logits, *auxiliary) if self.training else logits


def inception(
    num_classes: int = 200,
    *,
    image_size: int = 56,  # noqa: ARG001 (any size works: global average pool)
    batch_norm: bool = False,
) -> Inception:
    """GoogLeNet (Szegedy et al., arXiv:1409.4842) as H. Yu reduced it for Tiny ImageNet.

    1.054 M parameters at 200 classes, 1.163 M with the two auxiliary heads. Every convolution has
    stride 1 and "same" padding and is followed by ReLU. Shapes for a 56 px crop::

        images                          [N,   3, 56, 56]
        conv 7x7                        [N,  64, 56, 56]
        module 1, 2, max pool 3/2       [N, 240, 28, 28]
        module 3  (auxiliary head)      [N, 256, 28, 28]
        module 4, 5, max pool 3/2       [N, 192, 14, 14]
        module 6  (auxiliary head)      [N, 191, 14, 14]
        module 7, max pool 3/2          [N, 272,  7,  7]
        module 8, 9                     [N, 320,  7,  7]
        global average pool             [N, 320]
        FC                              [N, num_classes]

    The heads (average pool 5/3, 1x1-128, global average pool, dropout 0.3, FC) run only in training
    mode, where each one's loss counts 0.3; they are not part of saved weights.

    Deviations: the heads' pooling to a vector is an average, where GoogLeNet has a hidden fully
    connected layer. ``batch_norm=True`` normalises after every convolution.
    """
    return Inception(num_classes, batch_norm=batch_norm)
