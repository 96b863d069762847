"""Learning from networks that are trained already (Hinton et al., arXiv:1503.02531)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyserve.errors import UsageError
from tinyserve.modelfile import Label
from training.checkpoint import Weights


class Teacher(nn.Module):
    """The mean of one or more trained networks' answers to the images that a student is shown.

    Maps normalised images, float ``[N, 3, S, S]`` as the student gets them, to probabilities at a
    temperature, float32 ``[N, classes]``. Every network gets them with the normalisation and at the
    size that it knows. Raises :class:`~tinyserve.errors.UsageError` for networks of other classes
    than the student's, or that subtract a mean image, which cannot be placed on a crop.
    """

    def __init__(
        self, teachers: Sequence[Weights], classes: Sequence[Label], mean: Tensor, std: Tensor
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList()
        self.sizes = []
        if mean.dim() != 1:
            raise UsageError("a recipe that subtracts a mean image cannot have a teacher")
        for number, weights in enumerate(teachers):
            if list(weights.labels) != list(classes):
                raise UsageError(f"the teacher {weights.arch} knows other classes than this data")
            if weights.mean.dim() != 1:
                raise UsageError(f"the teacher {weights.arch} subtracts a mean image")
            self.networks.append(weights.network().to(memory_format=torch.channels_last))
            self.sizes.append(weights.network_size)
            # What the student's normalisation did, undone, and the teacher's instead.
            own_mean, own_std = weights.mean.to(mean.device), weights.std.to(mean.device)
            self.register_buffer(f"scale{number}", (std / own_std)[:, None, None])
            self.register_buffer(f"shift{number}", ((mean - own_mean) / own_std)[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, temperature: float) -> Tensor:
        answers = torch.zeros((), device=images.device)
        for number, (network, size) in enumerate(zip(self.networks, self.sizes, strict=True)):
            x = images * self.get_buffer(f"scale{number}") + self.get_buffer(f"shift{number}")
            if x.shape[-1] != size:
                x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
            answers = answers + (network(x).float() / temperature).softmax(dim=1)
        return answers / len(self.networks)


def divergence(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Mean KL divergence of a student from its teacher's probabilities, in nats, times T^2.

    ``logits`` is float ``[N, classes]``, ``targets`` what :class:`Teacher` returns at the same
    temperature. The factor keeps the gradient's size independent of the temperature.
    """
    student = (logits / temperature).log_softmax(dim=1)
    return F.kl_div(student, targets, reduction="batchmean") * temperature**2
