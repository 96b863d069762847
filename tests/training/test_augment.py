import numpy as np
import pytest
import torch
from PIL import Image

from training import augment
from training.augment import Boxes

CPU = torch.device("cpu")


@pytest.fixture
def pictures() -> torch.Tensor:
    """Eight uint8 pictures of 48 x 64, every value at random, so that no two crops are alike."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (8, 48, 64, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(3)


def planes_of(pictures: torch.Tensor) -> torch.Tensor:
    """Float ``[N, 3, H, W]``, not normalised."""
    return pictures.permute(0, 3, 1, 2).float()


def slices(planes: torch.Tensor, boxes: Boxes) -> torch.Tensor:
    """The regions by plain indexing, float ``[N, 3, S, S]``."""
    crops = []
    for i, picture in enumerate(planes):
        top, left = int(boxes.top[i]), int(boxes.left[i])
        height, width = int(boxes.height[i]), int(boxes.width[i])
        crop = picture[:, top : top + height, left : left + width]
        crops.append(crop.flip(2) if boxes.flip[i] else crop)
    return torch.stack(crops)


def test_whole_pixel_crops_are_slices_to_the_bit(pictures):
    seen = set()
    for _ in range(4):
        boxes = augment.random_crops(8, 48, 64, 40, CPU)
        found = augment.extract(planes_of(pictures), boxes, 40)
        assert torch.equal(found, slices(planes_of(pictures), boxes))
        seen |= set(boxes.flip.tolist())
    assert seen == {True, False}


def test_normalised_crops_are_slices_to_the_bit(pictures):
    planes = augment.normalise(
        pictures, torch.tensor([120.0, 110, 100]), torch.tensor([60.0, 50, 70])
    )
    boxes = augment.random_crops(8, 48, 64, 40, CPU)
    assert torch.equal(augment.extract(planes, boxes, 40), slices(planes, boxes))


def test_what_comes_out_is_channels_last(pictures):
    boxes = augment.random_crops(8, 48, 64, 40, CPU)
    found = augment.extract(planes_of(pictures), boxes, 40)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("region", "size"),
    [((0, 0, 48, 64), 24), ((0, 0, 48, 48), 17), ((7, 3, 40, 56), 24), ((4, 4, 40, 40), 39)],
)
def test_shrinking_agrees_with_pillow(pictures, region, size):
    top, left, height, width = region
    check_against_pillow(pictures, Boxes(*sides(top, left, height, width)), size)


def test_enlarging_agrees_with_pillow(pictures):
    # The whole image: at the edge of a smaller region Pillow repeats its border, while here the
    # pixels beyond it take part.
    check_against_pillow(pictures, Boxes(*sides(0, 0, 48, 64)), 80)


def sides(*values: float) -> list[torch.Tensor]:
    return [torch.full((8,), float(value)) for value in values] + [torch.zeros(8, dtype=torch.bool)]


def check_against_pillow(pictures: torch.Tensor, boxes: Boxes, size: int) -> None:
    found = augment.extract(planes_of(pictures), boxes, size).permute(0, 2, 3, 1).numpy()
    box = tuple(
        float(value[0])
        for value in (boxes.left, boxes.top, boxes.left + boxes.width, boxes.top + boxes.height)
    )
    for pixels, picture in zip(found, pictures.numpy(), strict=True):
        resized = Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR, box=box)
        difference = np.abs(pixels - np.asarray(resized, dtype=float))
        # Pillow reads nothing beyond the region, so its outermost pixels differ a little.
        inner = difference if box == (0, 0, 64, 48) else difference[2:-2, 2:-2]
        assert inner.max() <= 1.01  # Pillow rounds twice, to whole grey levels


def test_shrinking_a_flat_picture_keeps_its_colour():
    flat = torch.full((2, 3, 64, 64), 77.0)
    boxes = augment.random_resized_crops(2, 64, 64, (0.3, 1.0), CPU)
    assert torch.allclose(augment.extract(flat, boxes, 24), torch.tensor(77.0))


def test_random_boxes_stay_inside_and_reach_the_edges():
    boxes = augment.random_crops(2000, 48, 64, 40, CPU)
    assert set(boxes.top.tolist()) == set(range(9))
    assert set(boxes.left.tolist()) == set(range(25))
    assert 0.4 < boxes.flip.float().mean() < 0.6


def test_a_crop_of_the_full_size_is_the_whole_picture():
    boxes = augment.random_crops(50, 64, 64, 64, CPU)
    assert not boxes.top.any() and not boxes.left.any()


@pytest.mark.parametrize("area", [(0.35, 1.0), (1.0, 1.0), (0.08, 0.1)])
def test_random_resized_boxes_stay_inside_with_the_area_asked_for(area):
    boxes = augment.random_resized_crops(5000, 48, 64, area, CPU)
    assert (boxes.top >= 0).all() and (boxes.left >= 0).all()
    assert (boxes.top + boxes.height <= 48 + 1e-3).all()
    assert (boxes.left + boxes.width <= 64 + 1e-3).all()
    share = boxes.height * boxes.width / (48 * 64)
    assert share.max() <= area[1] + 1e-5
    uncut = (boxes.height < 48) & (boxes.width < 64)
    assert (share[uncut] >= area[0] - 1e-5).all()
    ratio = (boxes.width / boxes.height)[uncut]
    assert ((ratio > 3 / 4 - 1e-4) & (ratio < 4 / 3 + 1e-4)).all()
    assert 0.4 < boxes.flip.float().mean() < 0.6


def test_centre_crops_are_the_centre(pictures):
    boxes = augment.centre_crops(8, 48, 64, 40, CPU)
    found = augment.extract(planes_of(pictures), boxes, 40)
    assert torch.equal(found, pictures[:, 4:44, 12:52].permute(0, 3, 1, 2).float())


def test_normalise_takes_a_mean_colour_or_a_mean_image(pictures):
    mean, std = torch.tensor([10.0, 20, 30]), torch.tensor([2.0, 4, 8])
    found = augment.normalise(pictures, mean, std)
    assert found.shape == (8, 3, 48, 64)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    values = pictures[3, 5, 7].tolist()
    assert found[3, :, 5, 7].tolist() == [
        (values[0] - 10) / 2,
        (values[1] - 20) / 4,
        (values[2] - 30) / 8,
    ]
    mean_image = pictures.float().mean(dim=0)
    found = augment.normalise(pictures, mean_image, torch.ones(3))
    assert torch.allclose(found.mean(dim=0), torch.zeros(3, 48, 64), atol=1e-4)
