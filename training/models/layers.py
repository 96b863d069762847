"""Building blocks that several architectures share."""

from torch import nn


def conv_relu(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Convolution with "same" padding, optionally batch-normalised, then ReLU.

    Maps float ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``.
    The convolution has a bias only where no batch norm follows, which would cancel it.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            padding=kernel_size // 2,
            bias=not batch_norm,
        )
    ]
    if batch_norm:
        layers.append(nn.BatchNorm2d(out_channels))
    layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def init_weights(model: nn.Module) -> None:
    """He initialisation (arXiv:1502.01852) for everything that feeds a ReLU; biases start at zero.

    The classifying layer, the last ``nn.Linear`` of a network or of an auxiliary head, starts small
    (standard deviation 0.01), so that the first loss is close to log(num_classes) at any width.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)


def init_classifier(linear: nn.Linear) -> None:
    """Start a classifying layer near zero, see :func:`init_weights`."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
