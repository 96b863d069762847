"""Augmentation and evaluation views, a batch at a time on the device that holds the images.

Shape letters: N images of a batch, H, W their stored height and width, S the side of the square
that the network sees. Stored images are uint8 ``[N, H, W, 3]``, RGB; :func:`normalise` makes planes
of them, float32 ``[N, 3, H, W]``, and :func:`extract` what the network sees, float32
``[N, 3, S, S]`` in channels_last memory order.

Every crop, flip and resize is one linear map a side: a matrix of interpolation weights,
``[N, S, H]`` for the rows and ``[N, S, W]`` for the columns. Random crops, random resized crops,
ten-crop views and smaller training sizes are then all the same two batched matrix products.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

Views = tuple[tuple[float, float, bool], ...]
"""Evaluation views: vertical and horizontal place of the crop, as fractions of the free space, and
whether it is mirrored."""

CENTRE: Views = ((0.5, 0.5, False),)
TEN_CROPS: Views = tuple(
    (row, column, flip)
    for flip in (False, True)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5))
)
"""Corners and centre, and their mirror images."""
VIEWS: dict[int, Views] = {1: CENTRE, 2: (*CENTRE, (0.5, 0.5, True)), 10: TEN_CROPS}
"""What a model file can average, by number."""


@dataclass(frozen=True, slots=True)
class Boxes:
    """One square or oblong region of each image, in pixels of the stored image, each ``[N]``."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    """bool: mirror left and right."""

    def __getitem__(self, part: slice) -> "Boxes":
        """The regions of some of the images."""
        return Boxes(
            self.top[part], self.left[part], self.height[part], self.width[part], self.flip[part]
        )


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """``(images - mean) / std`` as float32 planes ``[N, 3, H, W]``; both in units of 0..255.

    ``mean`` is a mean image ``[H, W, 3]`` or a mean colour ``[3]``, ``std`` is ``[3]``.
    """
    # Put into planes as bytes, and changed in place: of all this, most is moving numbers around.
    planes = images.permute(0, 3, 1, 2).contiguous().float()
    mean = mean[:, None, None] if mean.dim() == 1 else mean.permute(2, 0, 1)
    return planes.sub_(mean).div_(std[:, None, None])


def random_crops(count: int, height: int, width: int, size: int, device: torch.device) -> Boxes:
    """Regions of ``size`` x ``size`` at random whole-pixel places, half of them mirrored."""
    side = torch.full((count,), float(size), device=device)
    return Boxes(
        top=torch.randint(0, height - size + 1, (count,), device=device).float(),
        left=torch.randint(0, width - size + 1, (count,), device=device).float(),
        height=side,
        width=side,
        flip=torch.rand(count, device=device) < 0.5,
    )


def random_resized_crops(
    count: int, height: int, width: int, area: tuple[float, float], device: torch.device
) -> Boxes:
    """Regions that cover a random share of the image's area, half of them mirrored.

    The share is uniform in ``area`` (fractions of 1), the aspect ratio log-uniform between 3:4 and
    4:3 (GoogLeNet's crop, arXiv:1409.4842); a side that would not fit is cut to the image.
    """
    share = torch.empty(count, device=device).uniform_(*area) * (height * width)
    ratio = (
        torch.empty(count, device=device).uniform_(-1, 1).mul(torch.log(torch.tensor(4 / 3))).exp()
    )
    box_width = (share * ratio).sqrt().clamp(max=width)
    box_height = (share / ratio).sqrt().clamp(max=height)
    return Boxes(
        top=torch.rand(count, device=device) * (height - box_height),
        left=torch.rand(count, device=device) * (width - box_width),
        height=box_height,
        width=box_width,
        flip=torch.rand(count, device=device) < 0.5,
    )


def centre_crops(count: int, height: int, width: int, size: int, device: torch.device) -> Boxes:
    """The ``size`` x ``size`` in the centre of every image."""
    side = torch.full((count,), float(size), device=device)
    return Boxes(
        top=torch.full_like(side, (height - size) / 2).round(),
        left=torch.full_like(side, (width - size) / 2).round(),
        height=side,
        width=side,
        flip=torch.zeros(count, dtype=torch.bool, device=device),
    )


def extract(planes: Tensor, boxes: Boxes, size: int) -> Tensor:
    """The regions of normalised images ``[N, 3, H, W]``, resampled to ``[N, 3, size, size]``.

    Bilinear; where a region shrinks, with the antialiasing that Pillow does, so that what the
    network sees in training looks like what it is served.
    """
    count, channels, height, width = planes.shape
    rows = interpolation(boxes.top, boxes.height, height, size)
    columns = interpolation(boxes.left, boxes.width, width, size)
    columns = torch.where(boxes.flip[:, None, None], columns.flip(1), columns)
    # Planes, so that both products are of large matrices; three channels innermost, as the images
    # are stored, would make them as thin as three columns.
    narrow = torch.bmm(planes.reshape(count, channels * height, width), columns.transpose(1, 2))
    narrow = narrow.reshape(count, channels, height, size)
    pixels = torch.matmul(rows[:, None], narrow)  # [N, 1, S, H] @ [N, 3, H, S]
    return pixels.contiguous(memory_format=torch.channels_last)


def interpolation(start: Tensor, length: Tensor, full: int, size: int) -> Tensor:
    """Weights ``[N, size, full]`` that resample ``full`` pixels' range start..start+length to size.

    A triangle filter as wide as the step between two output pixels, at least one pixel; rows sum
    to 1. Whole-pixel crops without scaling give rows of a single 1.
    """
    step = (length / size)[:, None, None]
    outputs = torch.arange(size, device=start.device, dtype=torch.float32)[None, :, None]
    centres = start[:, None, None] + (outputs + 0.5) * step - 0.5
    inputs = torch.arange(full, device=start.device, dtype=torch.float32)[None, None, :]
    distances = (inputs - centres).abs_().div_(step.clamp(min=1))
    weights = distances.neg_().add_(1).clamp_(min=0)
    return weights.div_(weights.sum(dim=2, keepdim=True))
