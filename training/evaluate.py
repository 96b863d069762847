"""Accuracy on a split, and the network as it is served."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training import augment, hardware

BATCH, GPU_BATCH = 64, 500
"""Images of 64 x 64 that are evaluated at a time; of larger ones as many fewer."""


class ServedNetwork(nn.Module):
    """The whole graph of a model file: pixels to probabilities.

    Maps uint8 ``[N, image_size, image_size, 3]``, RGB, to float32 ``[N, classes]``, rows summing to
    1: centre crop of ``crop`` pixels, normalisation, channels first, resized to ``network_size`` as
    in training if that differs, the network, its logits divided by ``temperature``, softmax.
    Several ``views`` are run as one batch, and their probabilities averaged; where ``crop`` leaves
    no room to move, all of them are 7/8 as wide.
    """

    mean: Tensor
    """Of each row of pixels, ``[width * 3]``, or of an image, ``[1, height, width * 3]``; ``scale``
    is of each row. ONNX Runtime subtracts what is as long as a row some thirty times as fast as the
    three numbers of a pixel, which took a third of the time of the 8-bit baseline."""
    scale: Tensor
    rows: Tensor | None
    """Interpolation weights ``[views, network_size, image_size]`` of the rows, and ``columns`` of
    the columns: crop, mirror and resize in one. None where nothing is resized."""
    columns: Tensor | None
    temperature: float = 1.0

    def __init__(
        self,
        network: nn.Module,
        mean: Tensor,
        std: Tensor,
        *,
        image_size: int,
        crop: int,
        network_size: int,
        views: augment.Views = augment.CENTRE,
    ) -> None:
        super().__init__()
        self.network = network
        self.centre: slice | None = None
        rows = columns = None
        if network_size != crop or views != augment.CENTRE:
            if crop == image_size and any((y, x) != (0.5, 0.5) for y, x, _ in views):
                crop = round(crop * 7 / 8)
            room = image_size - crop
            places = torch.tensor([(y, x) for y, x, _ in views], device=mean.device)
            starts = (places * room).round()
            length = torch.full((len(views),), float(crop), device=mean.device)
            rows = augment.interpolation(starts[:, 0], length, image_size, network_size)
            columns = augment.interpolation(starts[:, 1], length, image_size, network_size)
            mirrored = torch.tensor([flip for *_, flip in views], device=mean.device)
            columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
        elif crop < image_size:  # a slice of everything would stay in the exported graph
            offset = round((image_size - crop) / 2)
            self.centre = slice(offset, offset + crop)
        width = crop if self.centre else image_size
        one_colour = mean.dim() == 1
        mean = mean.repeat(width) if one_colour else self._crop(mean[None]).flatten(2)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", (1 / std).repeat(width))
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    @property
    def views(self) -> int:
        """How many views of an image are averaged."""
        return 1 if self.rows is None else len(self.rows)

    def _crop(self, images: Tensor) -> Tensor:
        return images if self.centre is None else images[:, self.centre, self.centre]

    def forward(self, images: Tensor) -> Tensor:
        logits = self.logits(images)
        if self.temperature != 1:  # dividing by one would stay in the exported graph
            logits = logits / self.temperature
        probabilities = logits.softmax(dim=-1)
        return probabilities if logits.dim() == 2 else probabilities.mean(dim=0)

    def logits(self, images: Tensor) -> Tensor:
        """What the network itself gives: float32 ``[N, classes]``, or ``[views, N, classes]``."""
        pixels = (self._crop(images).flatten(2).float() - self.mean) * self.scale
        # Contiguous: of channels that come last, the exporter makes the final pooling a gathering
        # by computed addresses, and OpenVINO 2026.4 then gets the first convolution wrong.
        pixels = pixels.unflatten(2, (-1, 3)).permute(0, 3, 1, 2).contiguous()
        views = self.views
        if self.rows is not None and self.columns is not None:
            if views == 1:
                pixels = self.rows[0] @ pixels @ self.columns[0].T
            else:
                resized = self.rows[:, None, None] @ pixels @ self.columns[:, None, None].mT
                pixels = resized.flatten(0, 1)
        logits: Tensor = self.network(pixels).float()
        return logits if views == 1 else logits.unflatten(0, (views, -1))


@dataclass(frozen=True, slots=True)
class Score:
    """Counts over a split; ``loss`` is the mean cross-entropy in nats."""

    images: int
    correct_top1: int
    correct_top5: int
    loss: float

    @property
    def top1(self) -> float:
        return self.correct_top1 / self.images

    @property
    def top5(self) -> float:
        return self.correct_top5 / self.images


class _Counter:
    """Adds up on the device, so that evaluation waits for the device once, at the end."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.images = 0

    def add(self, log_probabilities: Tensor, labels: Tensor) -> None:
        # torch.topk breaks ties arbitrarily; top-1 is argmax, the first of equals, as in serving.
        top1 = log_probabilities.argmax(dim=1) == labels
        k = min(5, log_probabilities.shape[1])
        top5 = (log_probabilities.topk(k, dim=1).indices == labels[:, None]).any(dim=1)
        loss = -log_probabilities.gather(1, labels[:, None]).sum()
        self.sums += torch.stack([top1.sum().double(), top5.sum().double(), loss.double()])
        self.images += len(labels)

    def score(self) -> Score:
        top1, top5, loss = self.sums.tolist()
        return Score(self.images, round(top1), round(top5), loss / self.images)


def served_accuracy(served: ServedNetwork, images: Tensor, labels: Tensor) -> Score:
    """Accuracy of the served graph, with all its views, in the graph's own precision."""
    counter = _Counter(images.device)
    served.eval()
    with torch.inference_mode():
        for indices in _batches(labels, images.shape[1], served.views):
            probabilities = served(images[indices])
            counter.add(probabilities.clamp(min=1e-30).log(), labels[indices])
    return counter.score()


def centre_accuracy(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    crop: int,
    size: int,
    precision: torch.dtype,
) -> Score:
    """Accuracy on the centre ``crop`` x ``crop`` of the images, resampled to ``size`` x ``size``;
    the network, and it alone, under autocast, as in training."""
    device = images.device
    counter = _Counter(device)
    network.eval()
    with torch.inference_mode():
        for indices in _batches(labels, size):
            planes = augment.normalise(images[indices], mean, std)
            count, _, height, width = planes.shape
            boxes = augment.centre_crops(count, height, width, crop, device)
            x = augment.extract(planes, boxes, size)
            with hardware.autocast(device, precision):
                logits = network(x)
            counter.add(logits.float().log_softmax(dim=1), labels[indices])
    return counter.score()


def _batches(labels: Tensor, size: int, views: int = 1) -> Iterator[slice]:
    count = at_a_time(BATCH if labels.device.type == "cpu" else GPU_BATCH, size, views)
    for start in range(0, len(labels), count):
        yield slice(start, start + count)


def at_a_time(count: int, size: int, views: int = 1) -> int:
    """As many images of ``size`` x ``size`` as take the memory of ``count`` of 64 x 64, at most
    ``count``."""
    return max(1, min(count, int(count * 64**2 / (size**2 * views))))
