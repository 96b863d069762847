import pytest
import torch
from torch import nn

from training import augment
from training.evaluate import ServedNetwork, served_accuracy, view_accuracy

MEAN = torch.rand(16, 16, 3) * 255
STD = torch.tensor([50.0, 60, 70])


class Seen(nn.Module):
    """A network whose logits are the mean colours it sees; keeps the pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.pixels = x
        return x.mean(dim=(2, 3)) * 10


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (9, 16, 16, 3), dtype=torch.uint8)


@pytest.mark.parametrize(("crop", "size"), [(16, 16), (12, 12), (16, 8), (12, 7)])
@pytest.mark.parametrize("mean", [MEAN, MEAN[0, 0]], ids=["mean image", "mean colour"])
def test_what_is_served_is_seen_as_in_training(pictures, crop, size, mean):
    served = ServedNetwork(Seen(), mean, STD, image_size=16, crop=crop, network_size=size)
    probabilities = served(pictures)
    device = torch.device("cpu")
    boxes = augment.placed_crops(len(pictures), 16, 16, crop, device)
    expected = augment.extract(augment.normalise(pictures, mean, STD), boxes, size)
    assert served.network.pixels.shape == (9, 3, size, size)
    assert torch.allclose(served.network.pixels, expected, atol=1e-5)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(9))


@pytest.mark.parametrize("number", [2, 10])
@pytest.mark.parametrize(("crop", "size"), [(12, 12), (12, 7), (16, 8)])
def test_views_are_those_of_training_and_their_probabilities_are_averaged(
    pictures, crop, size, number
):
    views = augment.VIEWS[number]
    served = ServedNetwork(
        Seen(), MEAN, STD, image_size=16, crop=crop, network_size=size, views=views
    )
    expected = torch.zeros(9, 3)
    moved = any(place[:2] != (0.5, 0.5) for place in views)
    width = 14 if crop == 16 and moved else crop  # 7/8, to have room for corners
    normalised = augment.normalise(pictures, MEAN, STD)
    seen = set()
    for row, column, flip in views:
        boxes = augment.placed_crops(
            9, 16, 16, width, torch.device("cpu"), row=row, column=column, flip=flip
        )
        pixels = augment.extract(normalised, boxes, size)
        seen.add(round(float(pixels[0, 0, 0, 0]), 4))
        expected += Seen()(pixels).softmax(dim=1) / number
    assert torch.allclose(served(pictures), expected, atol=1e-5)
    assert len(seen) == number


def test_both_ways_to_measure_accuracy_agree(pictures):
    network = Seen()
    served = ServedNetwork(network, MEAN, STD, image_size=16, crop=12, network_size=8)
    labels = torch.tensor([0, 1, 2] * 3)
    found = served_accuracy(served, pictures, labels)
    expected = view_accuracy(
        network, pictures, labels, mean=MEAN, std=STD, crop=12, size=8,
        views=augment.CENTRE, precision=torch.float32,
    )  # fmt: skip
    top1 = served(pictures).argmax(dim=1) == labels
    assert found.correct_top1 == expected.correct_top1 == int(top1.sum())
    assert found.correct_top5 == found.images == 9  # of three classes
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)
