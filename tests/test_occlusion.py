"""Does the heat lie where the evidence is? With the shipped model and real pictures."""

import numpy as np
import pytest

from tinyserve import Classifier, images
from tinyserve.dataset import walk_images
from tinyserve.occlusion import Occlusion, occlude


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier("inception", device="cpu")


def explain(classifier: Classifier, image: np.ndarray) -> tuple[int, Occlusion]:
    index = int(classifier.engine.run(image[None])[0].argmax())
    return index, occlude(classifier.engine, image, index)


@pytest.mark.parametrize(
    ("row", "column", "name"),
    [(0, 0, "goldfish"), (0, 32, "goldfish"), (32, 0, "tabby"), (32, 32, "tabby")],
)
def test_heat_lies_in_the_corner_with_the_object(classifier, samples, row, column, name):
    photo = next(walk_images(samples / name))
    image = np.full((64, 64, 3), 220, np.uint8)
    corner = np.s_[row : row + 32, column : column + 32]
    image[corner] = images.load(photo, size=32)
    index = classifier.label_index(name)
    heat = np.clip(occlude(classifier.engine, image, index).heat, 0, None)
    assert heat[corner].sum() > 0.6 * heat.sum()
    assert heat[corner].max() == heat.max()


def test_hot_places_matter_more_than_cold_ones(classifier, samples):
    """Painting over the hottest fifth costs the class more than painting over the coldest."""
    hot = cold = 0.0
    for path in [*walk_images(samples)][::5]:
        image = images.load(path, size=64)
        index, found = explain(classifier, image)
        mean = image.mean(axis=(0, 1)).astype(np.uint8)
        for share, hottest in ((0.8, True), (0.2, False)):
            limit = np.quantile(found.heat, share)
            place = found.heat >= limit if hottest else found.heat <= limit
            painted = np.where(place[:, :, None], mean, image)
            left = float(classifier.engine.run(painted[None])[0, index])
            hot += (found.probability - left) * hottest
            cold += (found.probability - left) * (not hottest)
    assert hot > 2 * max(cold, 0)


def test_numbers_are_what_they_say(classifier, samples):
    image = images.load(samples / "tabby" / "val_76.JPEG", size=64)
    untouched = image.copy()
    index, found = explain(classifier, image)
    assert (image == untouched).all()
    assert found.heat.shape == (64, 64)
    assert found.heat.dtype == np.float32
    assert found.probability == pytest.approx(float(classifier.engine.run(image[None])[0, index]))
    assert np.abs(found.heat).max() <= 1
    # A mean over spots cannot exceed what the best spot does.
    assert found.heat.max() <= found.probability - found.lowest + 1e-6


def test_covering_nothing_of_interest_costs_nothing(classifier):
    flat = np.full((64, 64, 3), 128, np.uint8)
    _, found = explain(classifier, flat)
    assert not found.heat.any()
    assert found.lowest == pytest.approx(found.probability)
