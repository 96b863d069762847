import math
import shutil

import numpy as np
import pytest

from tinyserve import compare as comparison
from tinyserve.classifier import Classifier
from tinyserve.dataset import Input, find_inputs
from tinyserve.errors import DataError, UsageError


@pytest.fixture(scope="module")
def models() -> tuple[Classifier, Classifier]:
    return Classifier("inception", device="cpu"), Classifier("resnet20", device="cpu")


def test_a_comparison_counts_what_the_two_say_one_by_one(models, samples):
    a, b = models
    inputs = list(find_inputs([str(samples)]))
    found = comparison.compare(a, b, inputs, batch_size=7)
    first, second = (list(model.classify_many(inputs)) for model in models)
    right = [[result.correct for result in results] for results in (first, second)]
    assert found.images == len(inputs) == 40
    assert (found.a.correct, found.b.correct) == tuple(map(sum, right))
    assert found.only_a_right == sum(x and not y for x, y in zip(*right, strict=True))
    assert found.only_b_right == sum(y and not x for x, y in zip(*right, strict=True))
    same = [x.predictions[0].index == y.predictions[0].index for x, y in zip(first, second)]  # noqa: B905
    assert found.agreement == sum(same) / 40
    assert 0 < found.agreement < 1
    assert found.p_value == comparison.mcnemar(found.only_a_right, found.only_b_right)
    assert found.a.images_per_second > 0
    assert found.speed_ratio > 0


def test_a_model_agrees_with_itself(models, samples):
    found = comparison.compare(models[0], models[0], list(find_inputs([str(samples)])))
    assert found.agreement == 1
    assert (found.only_a_right, found.only_b_right, found.p_value) == (0, 0, 1.0)
    assert found.speed_ratio > 0


def test_images_that_cannot_be_read_are_counted_and_left_out(models, samples, tmp_path):
    folder = shutil.copytree(samples / "goldfish", tmp_path / "goldfish")
    (folder / "broken.jpg").write_bytes(b"no picture")
    found = comparison.compare(*models, list(find_inputs([str(folder)])))
    assert (found.images, found.unreadable) == (2, 1)


def test_where_none_can_be_read_that_is_said(models, tmp_path):
    (tmp_path / "goldfish").mkdir()
    (tmp_path / "goldfish" / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the 1 labelled images can be read"):
        comparison.compare(*models, list(find_inputs([str(tmp_path)])))


def test_without_labelled_images_there_is_nothing_to_compare(models, samples):
    picture = str(next((samples / "goldfish").iterdir()))
    with pytest.raises(DataError, match="no image is labelled"):
        comparison.compare(*models, [Input(picture, None), Input(picture, "no such class")])


@pytest.mark.parametrize(
    ("a", "b"), [(0, 0), (3, 3), (1, 5), (5, 1), (0, 10), (12, 40), (700, 650)]
)
def test_mcnemar_is_the_binomial_test(a, b):
    n = a + b
    tail = np.sum([math.comb(n, k) / 2**n for k in range(min(a, b) + 1)]) if n else 1
    assert comparison.mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))
    assert comparison.mcnemar(a, b) == comparison.mcnemar(b, a)


def test_mcnemar_of_a_large_table_is_as_the_normal_distribution_has_it():
    a, b = 14_600, 15_000
    corrected = (abs(a - b) - 1) / math.sqrt(a + b)
    assert comparison.mcnemar(a, b) == pytest.approx(math.erfc(corrected / math.sqrt(2)), rel=1e-3)


def test_mcnemar_of_a_known_table():
    # 2 * (1 + 10 + 45) / 2^10
    assert comparison.mcnemar(2, 8) == pytest.approx(0.109375)


def test_models_of_different_classes_are_not_compared(models, samples):
    class Other:
        card = type("Card", (), {"labels": models[0].card.labels[:5], "image_size": 64})

    with pytest.raises(UsageError, match="different classes"):
        comparison.compare(models[0], Other(), list(find_inputs([str(samples)])))
