"""ResNet-20."""

import torch.nn.functional as F
from torch import Tensor, nn

from training.models.layers import init_classifier, init_weights


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them.

    Maps float ``[N, in_channels, H, W]`` to ``[N, out_channels, ceil(H/stride), ceil(W/stride)]``.
    Where the shape changes, the shortcut is a 1x1 convolution with batch norm; with
    ``residual=False`` there is none.
    """

    shortcut: nn.Module | None

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, residual: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity() if residual else None
        if residual and (stride != 1 or in_channels != out_channels):
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return F.relu(y, inplace=True)


def resnet20(
    num_classes: int = 200,
    *,
    image_size: int = 56,  # noqa: ARG001 (any size works: global average pool)
    batch_norm: bool = False,  # noqa: ARG001 (the paper's layout has it everywhere already)
    residual: bool = True,
) -> nn.Sequential:
    """ResNet (He et al., arXiv:1512.03385) as H. Yu laid it out for Tiny ImageNet.

    11.28 M parameters at 200 classes. 20 convolutions: the stem, sixteen in basic blocks and three
    1x1 projections. Shapes for a 56 px crop::

        images               [N,   3, 56, 56]
        conv 7x7, stride 1   [N,  64, 56, 56]  batch norm, ReLU
        2 basic blocks       [N,  64, 56, 56]
        2 basic blocks       [N, 128, 28, 28]
        2 basic blocks       [N, 256, 14, 14]
        2 basic blocks       [N, 512,  7,  7]
        global average pool  [N, 512]
        FC                   [N, num_classes]

    The second ReLU of a block follows the addition, as in He et al. The last batch norm of every
    block starts at zero (arXiv:1706.02677), so that each block starts as its shortcut.

    ``residual=False`` leaves the shortcuts out, all else equal: 11.11 M parameters, and no last
    batch norm starts at zero.
    """
    blocks: list[nn.Module] = []
    channels = 64
    for out_channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [
            BasicBlock(channels, out_channels, stride, residual=residual),
            BasicBlock(out_channels, out_channels, 1, residual=residual),
        ]
        channels = out_channels
    classifier = nn.Linear(channels, num_classes)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        classifier,
    )
    init_weights(model)
    init_classifier(classifier)
    for block in blocks:
        if isinstance(block, BasicBlock) and residual:
            nn.init.zeros_(block.norm2.weight)
    return model


def plain20(
    num_classes: int = 200, *, image_size: int = 56, batch_norm: bool = False
) -> nn.Sequential:
    """:func:`resnet20` without its shortcuts: what the residual connections are compared with."""
    return resnet20(num_classes, image_size=image_size, batch_norm=batch_norm, residual=False)
