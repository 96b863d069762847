import pytest
import torch
from torch import nn
from torchvision.transforms.v2.functional import ten_crop

from training import augment
from training.evaluate import BATCH, ServedNetwork, centre_accuracy, served_accuracy

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
    boxes = augment.centre_crops(len(pictures), 16, 16, crop, device)
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
        boxes = augment.Boxes(
            top=torch.full((9,), (16.0 - width) * row),
            left=torch.full((9,), (16.0 - width) * column),
            height=torch.full((9,), float(width)),
            width=torch.full((9,), float(width)),
            flip=torch.full((9,), flip),
        )
        pixels = augment.extract(normalised, boxes, size)
        seen.add(round(float(pixels[0, 0, 0, 0]), 4))
        expected += Seen()(pixels).softmax(dim=1) / number
    assert torch.allclose(served(pictures), expected, atol=1e-5)
    assert len(seen) == number


def test_ten_crops_are_corners_centre_and_their_mirrors(pictures):
    served = ServedNetwork(
        Seen(), torch.zeros(3), torch.ones(3),
        image_size=16, crop=12, network_size=12, views=augment.TEN_CROPS,
    )  # fmt: skip
    served(pictures)
    found = served.network.pixels.unflatten(0, (10, 9))
    expected = torch.stack(ten_crop(pictures.permute(0, 3, 1, 2).float(), [12, 12]))
    # The same ten in another order.
    same = (found[:, None] == expected[None]).flatten(2).all(dim=2)
    assert torch.equal(same.sum(dim=0), torch.ones(10, dtype=torch.long))
    assert torch.equal(same.sum(dim=1), torch.ones(10, dtype=torch.long))


def test_both_ways_to_measure_accuracy_agree(pictures):
    network = Seen()
    served = ServedNetwork(network, MEAN, STD, image_size=16, crop=12, network_size=8)
    labels = torch.tensor([0, 1, 2] * 3)
    found = served_accuracy(served, pictures, labels)
    expected = centre_accuracy(
        network, pictures, labels, mean=MEAN, std=STD, crop=12, size=8, precision=torch.float32
    )
    top1 = served(pictures).argmax(dim=1) == labels
    assert found.correct_top1 == expected.correct_top1 == int(top1.sum())
    assert found.correct_top5 == found.images == 9  # of three classes
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)


def test_of_images_with_several_views_fewer_are_evaluated_at_a_time():
    seen = []
    network = Seen()
    network.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    served = ServedNetwork(
        network, MEAN[0, 0], STD, image_size=64, crop=56, network_size=56, views=augment.TEN_CROPS
    )
    pictures = torch.randint(0, 256, (70, 64, 64, 3), dtype=torch.uint8)
    labels = torch.zeros(70, dtype=torch.long)
    score = served_accuracy(served, pictures, labels)
    assert max(seen) <= BATCH
    assert sum(seen) == 10 * score.images == 700
    assert score.correct_top1 == int((served(pictures).argmax(dim=1) == labels).sum())
