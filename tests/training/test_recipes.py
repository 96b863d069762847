import dataclasses
import itertools
import math

import pytest

from tinyserve.errors import UsageError
from training.models import ARCHS
from training.recipes import FIXED_SIZE, RECIPES, SMALLEST_IMAGE, Recipe

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


def test_the_cosine_may_restart_after_several_epochs():
    recipe = dataclasses.replace(RECIPES["paper"]("resnet20"), epochs=6, restart_epochs=3)
    rates = [recipe.learning_rate(step, STEPS) for step in range(6 * STEPS)]
    assert rates[: 3 * STEPS] == rates[3 * STEPS :] == sorted(rates[: 3 * STEPS], reverse=True)
    assert rates[0] == recipe.lr
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


def test_however_short_a_run_it_ends_at_the_size_that_is_served():
    recipe = dataclasses.replace(RECIPES["cpu"]("resnet20"), epochs=1)
    for steps in range(1, 9):
        assert recipe.training_size(steps - 1, steps) == recipe.final_size


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_one_for_every_architecture(name, arch):
    recipe = RECIPES[name](arch)
    assert recipe.name == name
    steps = recipe.epochs * STEPS
    assert all(0 < recipe.learning_rate(s, STEPS) <= recipe.lr for s in range(steps))
    last = recipe.training_size(steps - 1, STEPS)
    assert last <= 64 and recipe.crop <= 64
    if arch in FIXED_SIZE:
        # Their first fully connected layer fits the size that is exported.
        assert last == 56
    # What training resamples is resampled at evaluation, too, if the sizes leave a choice.
    assert recipe.crop == (64 if recipe.crop_area else 56)
    assert recipe.crop_area or not recipe.last_crop_area


def test_the_paper_recipe_is_the_layout_of_the_paper():
    for arch in ARCHS:
        recipe = RECIPES["paper"](arch)
        assert (recipe.epochs, recipe.batch_size, recipe.crop) == (10, 256, 56)
        assert not recipe.batch_norm
        assert recipe.mean_image
        assert recipe.ten_crop
        assert recipe.crop_area is None


def test_crops_have_another_area_for_the_last_steps():
    recipe = dataclasses.replace(
        RECIPES["modern"]("baseline"),
        crop_area=(0.25, 0.5),
        last_crop_area=(0.5, 1.0),
        mix_until=0.75,
    )
    assert [recipe.crop_area_at(p) for p in (0, 0.7, 0.75, 1)] == [(0.25, 0.5)] * 2 + [
        (0.5, 1.0)
    ] * 2
    same = dataclasses.replace(recipe, last_crop_area=None)
    assert {same.crop_area_at(p) for p in (0, 0.7, 0.75, 1)} == {(0.25, 0.5)}


# Other sizes of images


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_made_for_images_of_64_pixels(name, arch):
    recipe = RECIPES[name](arch)
    assert recipe.at(64) == recipe
    doubled = recipe.at(128)
    assert doubled.crop == 2 * recipe.crop
    assert doubled.sizes == tuple((start, 2 * size) for start, size in recipe.sizes)
    assert dataclasses.replace(doubled, crop=recipe.crop, sizes=recipe.sizes) == recipe


def test_small_images_are_never_made_smaller_than_the_networks_can_take():
    recipe = dataclasses.replace(
        RECIPES["modern"]("resnet20"), crop=56, sizes=((0.0, 24), (0.5, 32), (0.9, 64))
    )
    small = recipe.at(32)
    assert small.sizes == ((0.0, 24), (0.5, 24), (0.9, 32))
    assert small.crop == 28  # to the nearest 8 px that is all of the image
    assert recipe.at(48).sizes == ((0.0, 24), (0.5, 24), (0.9, 48))
    assert recipe.at(48).crop == 40


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_for_any_size_fits_into_its_images(name, arch):
    recipe = RECIPES[name](arch)
    for image_size in range(SMALLEST_IMAGE, 260):
        scaled = recipe.at(image_size)
        sizes = [size for _, size in scaled.sizes]
        assert all(SMALLEST_IMAGE <= size <= image_size for size in sizes)
        assert 0 < scaled.crop <= image_size
        if recipe.crop < 64:
            assert scaled.crop < image_size  # as random crops need it
        assert sizes == sorted(sizes)
        assert [start for start, _ in scaled.sizes] == [start for start, _ in recipe.sizes]


# Changes


def test_any_field_can_be_changed_by_its_value_in_json():
    recipe = RECIPES["modern"]("resnet20")
    changed = recipe.changed(
        [
            "epochs=3",
            "lr=1e-2",
            "nesterov=false",
            "ema=null",
            "crop_area=[0.25, 1]",
            "sizes=[[0, 32], [0.5, 64]]",
            'schedule="cosine-restarts"',
        ]
    )
    assert changed == dataclasses.replace(
        recipe,
        epochs=3,
        lr=0.01,
        nesterov=False,
        ema=None,
        crop_area=(0.25, 1),
        sizes=((0, 32), (0.5, 64)),
        schedule="cosine-restarts",
    )
    assert isinstance(changed.crop_area, tuple)
    assert [type(size) for size in changed.sizes] == [tuple, tuple]
    hash(changed)
    assert changed.training_size(0, 10) == 32


def test_without_changes_a_recipe_is_what_it_was():
    recipe = RECIPES["cpu"]("alexnet")
    assert recipe.changed([]) == recipe


def test_of_two_changes_of_one_field_the_last_counts():
    assert RECIPES["cpu"]("alexnet").changed(["epochs=3", "epochs=5"]).epochs == 5


def refused(*assignments: str) -> str:
    """The words with which a change is refused."""
    with pytest.raises(UsageError) as caught:
        RECIPES["modern"]("inception").changed(assignments)
    words = str(caught.value)
    assert "\n" not in words
    return words


@pytest.mark.parametrize(
    "assignment", ["speed=3", "=3", "speed", "name=3", "Epochs=3", "epochs =3"]
)
def test_an_unknown_field_is_refused_with_those_known(assignment):
    words = refused(assignment)
    assert repr(assignment.partition("=")[0]) in words
    known = {field.name for field in dataclasses.fields(Recipe)} - {"name"}
    listed = words.partition("(known: ")[2].removesuffix(")").split(", ")
    assert set(listed) == known


@pytest.mark.parametrize("value", ["", "abc", "'x'", "[1, 2", "1,5", "None", "True", "0.1.2"])
def test_a_value_that_is_no_json_is_refused(value):
    words = refused(f"lr={value}")
    assert words == f"lr={value}: the value is not JSON"


@pytest.mark.parametrize(
    "assignment",
    [
        'epochs="ten"',
        "epochs=2.5",
        "epochs=null",
        "batch_size=8.5",
        'lr="fast"',
        "lr=[0.1]",
        'momentum="high"',
        "weight_decay=null",
        "clip_norm=null",
        'schedule="linear"',
        'batch_norm="no"',
        "crop=null",
        "sizes=5",
        "sizes=[]",
        "sizes=[0]",
        "sizes=[[0]]",
        'sizes=[[0, "large"]]',
        "crop_area=[0.5]",
        'ema="yes"',
        "cutmix=null",
        'mix_until="late"',
    ],
)
def test_a_value_of_the_wrong_type_is_refused(assignment):
    assert assignment.partition("=")[0] in refused(assignment)


def test_a_change_cannot_make_a_recipe_that_makes_no_sense():
    assert "epochs" in refused("epochs=0")
    assert "CutMix and MixUp" in refused("cutmix=0.7", "mixup=0.7")


# Auxiliary heads


def test_the_auxiliary_heads_keep_their_weight_or_fade_to_nothing():
    kept = RECIPES["cpu"]("inception")
    fading = dataclasses.replace(kept, auxiliary_weight=0.4, auxiliary_fades=True)
    assert not kept.auxiliary_fades
    shares = (0.0, 0.25, 0.5, 1.0)
    assert [kept.auxiliary_weight_at(share) for share in shares] == [0.3] * 4
    assert [fading.auxiliary_weight_at(share) for share in shares] == pytest.approx(
        [0.4, 0.3, 0.2, 0.0]
    )


def test_the_modern_recipe_lets_the_auxiliary_heads_fade():
    recipe = RECIPES["modern"]("inception")
    assert recipe.auxiliary_weight_at(0.0) == 0.3
    assert recipe.auxiliary_weight_at(1.0) == 0.0


# Refusals


def test_shares_of_mixed_batches_up_to_all_of_them_are_taken():
    recipe = RECIPES["modern"]("resnet20")
    for cutmix, mixup in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        changed = dataclasses.replace(recipe, cutmix=cutmix, mixup=mixup)
        assert (changed.cutmix, changed.mixup) == (cutmix, mixup)


INVALID = {
    "no epochs": {"epochs": 0},
    "negative epochs": {"epochs": -1},
    "empty batches": {"batch_size": 0},
    "restarts without an epoch between them": {"restart_epochs": 0},
    "no learning rate": {"lr": 0.0},
    "negative learning rate": {"lr": -0.1},
    "learning rate not a number": {"lr": math.nan},
    "negative weight decay": {"weight_decay": -1e-4},
    "Nesterov without momentum": {"momentum": 0.0, "nesterov": True},
    "no crop": {"crop": 0},
    "a size of nothing": {"sizes": ((0.0, 0),)},
    "areas the wrong way round": {"crop_area": (1.0, 0.5)},
    "an area of nothing": {"crop_area": (0.0, 0.5)},
    "an area of more than all": {"crop_area": (0.5, 1.5)},
    "last areas the wrong way round": {"last_crop_area": (1.0, 0.5)},
    "no size at the start": {"sizes": ((0.5, 32),)},
    "sizes out of order": {"sizes": ((0.0, 24), (0.9, 48), (0.5, 32))},
    "a size after the end": {"sizes": ((0.0, 24), (1.0, 56))},
    "a negative share of CutMix": {"cutmix": -0.1},
    "a negative share of MixUp": {"mixup": -0.1, "cutmix": 0.5},
    "more CutMix than batches": {"cutmix": 1.1},
    "more MixUp than batches": {"cutmix": 0.0, "mixup": 1.1},
    "more of both than batches": {"cutmix": 0.6, "mixup": 0.6},
    "a share not a number": {"mixup": math.nan},
    "gradients clipped to nothing": {"clip_norm": 0.0},
    "gradients turned round": {"clip_norm": -1.0},
    "no temperature": {"distill_temperature": 0.0},
    "more distilling than all": {"distill_weight": 5.0},
    "a negative weight": {"auxiliary_weight": -1.0},
    "mixing that ends before it begins": {"mix_until": -3.0},
}


@pytest.mark.parametrize("case", INVALID)
def test_values_that_make_no_sense_are_refused(case):
    recipe: Recipe = RECIPES["modern"]("inception")
    with pytest.raises(UsageError) as caught:
        dataclasses.replace(recipe, **INVALID[case])
    assert "\n" not in str(caught.value)
