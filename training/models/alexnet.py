"""Reduced AlexNet."""

from collections import OrderedDict

from torch import nn

from training.models.layers import conv_relu, init_classifier, init_weights


def alexnet(
    num_classes: int = 200, *, image_size: int = 56, batch_norm: bool = False
) -> nn.Sequential:
    """AlexNet (Krizhevsky et al., 2012) as H. Yu reduced it for Tiny ImageNet.

    15.30 M parameters at 200 classes. All convolutions have stride 1 and "same" padding. Shapes
    for ``image_size=56``::

        images                      [N,   3, 56, 56]
        conv 7x7, conv 5x5          [N,  64, 56, 56]  ReLU after each
        max pool 2, batch norm      [N,  64, 28, 28]
        conv 5x5                    [N, 128, 28, 28]  ReLU
        max pool 2, batch norm      [N, 128, 14, 14]
        conv 3x3, conv 3x3          [N, 256, 14, 14]  ReLU after each
        max pool 2                  [N, 256,  7,  7]
        FC, dropout; FC, dropout    [N, 1024]         ReLU before each dropout
        FC                          [N, num_classes]

    Deviations: the dropout rate, which the paper does not give, is AlexNet's 0.5. An adaptive
    average pool before the first FC, which does nothing to images of ``image_size``, lets the
    network train on smaller ones for a while.
    ``batch_norm=True`` normalises after every convolution and hidden layer instead of after the
    first two pools.
    """
    side = image_size // 8

    def pool(channels: int) -> nn.Module:
        if batch_norm:
            return nn.MaxPool2d(2)
        return nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(channels))

    def hidden(in_features: int) -> list[nn.Module]:
        norm = [nn.BatchNorm1d(1024)] if batch_norm else []
        return [nn.Linear(in_features, 1024), *norm, nn.ReLU(inplace=True), nn.Dropout(0.5)]

    classifier = nn.Linear(1024, num_classes)
    model = nn.Sequential(
        OrderedDict(
            conv1=conv_relu(3, 64, 7, batch_norm=batch_norm),
            conv2=conv_relu(64, 64, 5, batch_norm=batch_norm),
            pool2=pool(64),
            conv3=conv_relu(64, 128, 5, batch_norm=batch_norm),
            pool3=pool(128),
            conv4=conv_relu(128, 256, 3, batch_norm=batch_norm),
            conv5=conv_relu(256, 256, 3, batch_norm=batch_norm),
            pool5=nn.MaxPool2d(2),
            fit=nn.AdaptiveAvgPool2d(side),
            flatten=nn.Flatten(),
            hidden=nn.Sequential(*hidden(256 * side * side), *hidden(1024)),
            classifier=classifier,
        )
    )
    init_weights(model)
    init_classifier(classifier)
    return model
