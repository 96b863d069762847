import dataclasses
import itertools
import math

import pytest

from tinyserve.errors import UsageError
from training.models import ARCHS
from training.recipes import FIXED_CROP, RECIPES, Recipe

STEPS = 40
"""Steps of an epoch."""


def paper_rate(peak: float, t: int) -> float:
    """The paper's formula: t counts all steps from 1, T is the number of steps of an epoch."""
    return peak / 2 * (math.cos(math.pi * ((t - 1) % STEPS) / STEPS) + 1)


@pytest.mark.parametrize("step", [0, 1, 17, STEPS - 1, STEPS, 3 * STEPS + 5, 10 * STEPS - 1])
def test_the_paper_schedule_is_the_formula_of_the_paper(step):
    recipe = RECIPES["paper"]("resnet20")
    assert recipe.learning_rate(step, STEPS) == pytest.approx(paper_rate(0.1, step + 1), rel=1e-12)


def test_the_paper_schedule_restarts_every_epoch():
    recipe = RECIPES["paper"]("inception")
    for epoch in range(recipe.epochs):
        rates = [recipe.learning_rate(epoch * STEPS + i, STEPS) for i in range(STEPS)]
        assert rates[0] == recipe.lr
        assert rates == sorted(rates, reverse=True)
        assert 0 < rates[-1] < 0.01 * recipe.lr


@pytest.mark.parametrize("name", ["modern", "cpu"])
def test_the_rate_rises_linearly_and_falls_once_to_nearly_nothing(name):
    recipe = RECIPES[name]("inception")
    steps = recipe.epochs * STEPS
    rise = round(recipe.warmup * steps)
    assert rise > 1
    rates = [recipe.learning_rate(step, STEPS) for step in range(steps)]
    assert rates[0] == pytest.approx(recipe.lr / (rise + 1))
    rising = [after - before for before, after in itertools.pairwise(rates[: rise + 1])]
    assert rising == pytest.approx([recipe.lr / (rise + 1)] * rise)
    assert rates[rise] == max(rates) == pytest.approx(recipe.lr)
    assert rates[rise:] == sorted(rates[rise:], reverse=True)
    half_way = rise + (steps - rise) // 2
    assert recipe.learning_rate(half_way, STEPS) == pytest.approx(recipe.lr / 2, rel=0.02)
    assert 0 < rates[-1] < 1e-2 * recipe.lr


def test_without_warm_up_the_first_rate_is_the_peak():
    recipe = dataclasses.replace(RECIPES["modern"]("inception"), warmup=0.0)
    assert recipe.learning_rate(0, STEPS) == recipe.lr


def test_the_training_size_switches_at_its_share_of_all_steps():
    recipe = dataclasses.replace(
        RECIPES["cpu"]("inception"), epochs=2, sizes=((0.0, 24), (0.5, 32), (0.95, 48))
    )
    sizes = [recipe.training_size(step, 10) for step in range(20)]
    assert sizes == [24] * 10 + [32] * 9 + [48]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_one_for_every_architecture(name, arch):
    recipe = RECIPES[name](arch)
    assert recipe.name == name
    steps = recipe.epochs * STEPS
    assert all(0 < recipe.learning_rate(s, STEPS) <= recipe.lr for s in range(steps))
    last = recipe.training_size(steps - 1, STEPS)
    assert last <= 64 and recipe.crop <= 64
    if arch in FIXED_CROP:
        # Their first fully connected layer fits the size that is exported.
        assert recipe.crop == last == 56


def test_the_paper_recipe_is_the_layout_of_the_paper():
    for arch in ARCHS:
        recipe = RECIPES["paper"](arch)
        assert (recipe.epochs, recipe.batch_size, recipe.crop) == (10, 256, 56)
        assert not recipe.batch_norm
        assert recipe.mean_image
        assert recipe.ten_crop
        assert recipe.crop_area is None


INVALID = {
    "no epochs": {"epochs": 0},
    "negative epochs": {"epochs": -1},
    "empty batches": {"batch_size": 0},
    "no learning rate": {"lr": 0.0},
    "negative learning rate": {"lr": -0.1},
    "learning rate not a number": {"lr": math.nan},
    "no size at the start": {"sizes": ((0.5, 32),)},
    "sizes out of order": {"sizes": ((0.0, 24), (0.9, 48), (0.5, 32))},
}


@pytest.mark.parametrize("case", INVALID)
def test_values_that_make_no_sense_are_refused(case):
    recipe: Recipe = RECIPES["modern"]("inception")
    with pytest.raises(UsageError) as caught:
        dataclasses.replace(recipe, **INVALID[case])
    assert "\n" not in str(caught.value)
