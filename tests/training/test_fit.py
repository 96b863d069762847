import dataclasses
import hashlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tinyserve.engine import Engine
from tinyserve.modelfile import Label
from training import augment, checkpoint, data, export, fit
from training import trainer as trainer_module
from training.models import ARCHS, count_parameters, is_auxiliary
from training.recipes import RECIPES
from training.run import Config
from training.trainer import Trainer, activations_per_pixel, pixel_statistics

COLUMNS = [
    "epoch",
    "step",
    "size",
    "lr",
    "train_loss",
    "train_top1",
    "val_loss",
    "val_top1",
    "val_top5",
    "images_per_second",
    "seconds",
]
TIMES = {"images_per_second", "seconds"}
CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


# A whole run


@pytest.mark.slow
def test_a_run_leaves_its_files_and_nothing_half_written(finished):
    names = {path.name for path in finished.folder.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert names - events == {
        "config.json",
        "history.csv",
        "curves.png",
        "checkpoint.pt",
        "weights.pt",
        "result.json",
    }


@pytest.mark.slow
def test_tensorboard_has_every_reading_of_the_loss(photos, tmp_path, monkeypatch, history):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(fit, "LOSS_EVERY", 2)
    arguments = "--arch baseline --recipe cpu --epochs 2 -b 2 --limit-train 8"
    assert fit_here(tmp_path / "run", photos, arguments) == 0
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for name in ("step/loss", "step/lr"):
        assert [event.step for event in events.Scalars(name)] == [2, 4, 6, 8]
    rates = [event.value for event in events.Scalars("step/lr")]
    assert rates[1::2] == pytest.approx([float(row["lr"]) for row in history(tmp_path / "run")])
    losses = [event.value for event in events.Scalars("epoch/train_loss")]
    assert losses == pytest.approx([float(row["train_loss"]) for row in history(tmp_path / "run")])


@pytest.mark.slow
def test_history_has_one_row_an_epoch(finished, history):
    rows = history(finished.folder)
    assert list(rows[0]) == COLUMNS
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    # 27 images in batches of 4: the last three of each epoch's permutation are left out.
    assert [row["step"] for row in rows] == ["6", "12", "18", "24"]
    recipe = dataclasses.replace(RECIPES["cpu"]("inception"), epochs=4, lr=0.05)
    assert len({row["size"] for row in rows}) > 1
    for row in rows:
        last = int(row["step"]) - 1
        assert int(row["size"]) == recipe.training_size(last, 6)
        assert float(row["lr"]) == recipe.learning_rate(last, 6)
        assert 0 <= float(row["val_top1"]) <= float(row["val_top5"]) == 1  # of three classes
        assert float(row["seconds"]) > 0


@pytest.mark.slow
def test_the_loss_falls_on_classes_that_can_be_learnt(finished, history):
    rows = history(finished.folder)
    losses = [float(row["train_loss"]) for row in rows]
    assert losses[-1] < 0.6 * losses[0]
    assert float(rows[-1]["train_top1"]) > 0.6


@pytest.mark.slow
def test_curves_are_a_picture(finished):
    with Image.open(finished.folder / "curves.png") as picture:
        assert picture.format == "PNG"
        picture.load()
        assert picture.width > picture.height > 300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50


@pytest.mark.slow
def test_the_result_is_in_the_file_the_weights_and_the_words(finished, history):
    result = json.loads((finished.folder / "result.json").read_text())
    assert result.keys() == {
        "single centre view",
        "training_seconds",
        "parameters",
        "peak_memory_bytes",
        "train_images",
        "held_out",
    }
    assert (result["train_images"], result["held_out"]) == (27, 0)
    score = result["single centre view"]
    assert score["images"] == 18
    assert score["top1"] == score["correct_top1"] / 18
    low, high = score["top1_ci95"]
    assert low < score["top1"] < high
    assert 0 < score["top1"] <= 14 / 18  # four pictures are in the wrong folder
    assert result["training_seconds"] == pytest.approx(
        sum(float(row["seconds"]) for row in history(finished.folder))
    )
    weights = checkpoint.load_weights(finished.folder)
    assert result["parameters"] == count_parameters(weights.network())
    # PyTorch alone takes more than 100 MB; more than 8 GB would be no bytes.
    assert 1e8 < result["peak_memory_bytes"] < 8e9
    training = weights.training
    assert (training.val_top1, training.val_top5) == (score["top1"], score["top5"])
    assert f"({score['correct_top1']} of 18;" in finished.stdout
    assert len(finished.stdout.splitlines()) == 1


@pytest.mark.slow
def test_a_finished_run_ends_with_what_to_do_next(finished):
    assert finished.stderr.splitlines()[-2:] == [
        f"export it with: python -m training.export {finished.folder} -o models/",
        "try it with:    tinyserve classify IMAGES -m models/inception.onnx",
    ]


@pytest.mark.slow
def test_the_weights_say_where_they_come_from(finished):
    weights = checkpoint.load_weights(finished.folder)
    dataset = data.load(finished.data)
    training = weights.training
    assert (weights.arch, weights.batch_norm, weights.crop) == ("inception", True, 64)
    assert weights.labels == tuple(Label(None, name) for name in ("amber", "jade", "violet"))
    assert training.dataset == "photos"
    assert training.dataset_fingerprint == dataset.fingerprint
    assert (training.train_images, training.val_images) == (27, 18)
    assert (training.recipe, training.epochs, training.seed) == ("cpu", 4, 7)
    assert training.precision == "fp32"
    pixels = dataset.train.images.reshape(-1, 3).astype(float)
    assert weights.mean.tolist() == pytest.approx(pixels.mean(axis=0))
    assert weights.std.tolist() == pytest.approx(pixels.std(axis=0))


@pytest.mark.slow
def test_the_config_remembers_everything(finished):
    config = json.loads((finished.folder / "config.json").read_text())
    assert config["data"] == str(finished.data.resolve())
    assert config["config"]["arch"] == "inception"
    assert config["config"]["seed"] == 7
    assert config["config"]["recipe"]["epochs"] == 4
    assert config["config"]["holdout"] == 0
    assert config["config"]["init"] is None
    assert config["config"]["teachers"] == []
    assert config["environment"]["torch"] == torch.__version__
    assert config["environment"]["processes"] == 1


# The trainer


def state_after(trainer: Trainer, steps: int) -> dict[str, Tensor]:
    while trainer.step < steps:
        trainer.train_step()
        if trainer.step % trainer.steps_per_epoch == 0:
            trainer.finish_epoch()
    return {name: value.clone() for name, value in trainer.evaluated.state_dict().items()}


@pytest.fixture
def make_trainer(photos):
    """A trainer with weight averaging, dropout, auxiliary heads and random resized crops."""
    dataset = data.load(photos)

    def make(
        seed: int = 1, limit_train: int | None = 12, precision: str = "fp32", **changes: object
    ) -> Trainer:
        recipe = dataclasses.replace(
            RECIPES["modern"]("inception"), epochs=3, batch_size=4, sizes=((0.0, 24),), ema=0.9
        )
        recipe = dataclasses.replace(recipe, **changes)
        config = Config(
            arch="inception",
            recipe=recipe,
            seed=seed,
            precision=precision,
            image_size=64,
            limit_train=limit_train,
        )
        return Trainer(config, dataset, CPU)

    return make


def test_a_seed_gives_the_same_weights_and_another_seed_others(make_trainer, assert_identical):
    first = state_after(make_trainer(seed=1), 2)
    torch.manual_seed(99)  # what other code drew before does not matter
    assert_identical(state_after(make_trainer(seed=1), 2), first)
    other = state_after(make_trainer(seed=2), 2)
    assert not torch.equal(other["stem.0.weight"], first["stem.0.weight"])


def test_seeds_differ_in_more_than_the_first_weights(make_trainer):
    first, other = make_trainer(seed=1), make_trainer(seed=2)
    other.model.load_state_dict(first.model.state_dict())
    assert first.train_step().item() != other.train_step().item()


@pytest.mark.parametrize("stop", [1, 4])
def test_stopping_within_an_epoch_changes_no_bit(make_trainer, tmp_path, stop, assert_identical):
    whole = make_trainer()
    assert whole.steps_per_epoch == 3
    first = make_trainer()
    state_after(first, stop)
    checkpoint.save(tmp_path / "checkpoint.pt", first.state_dict())
    second = make_trainer()
    second.load_state_dict(checkpoint.load(tmp_path / "checkpoint.pt"))
    assert second.step == stop
    while whole.step < 6:
        if whole.step == 3:
            whole.finish_epoch()
            if second.step == 3:
                second.finish_epoch()
        loss = whole.train_step().item()
        if whole.step > stop:
            assert second.train_step().item() == loss
    assert_identical(second.model.state_dict(), whole.model.state_dict())
    assert_identical(second.evaluated.state_dict(), whole.evaluated.state_dict())
    # The loss and the time of the epoch so far were saved, too.
    rows = [whole.finish_epoch(), second.finish_epoch()]
    assert all(row.pop(name) > 0 for row in rows for name in TIMES)
    assert rows[0] == rows[1]


def test_the_memory_of_a_network_is_counted_layer_by_layer():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Sequential(nn.BatchNorm2d(4), nn.MaxPool2d(2)),
        nn.Flatten(),
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert activations_per_pixel(network, 8) == 4 + 4 + 1 + 1
    assert all(module.training and not module._forward_hooks for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_on_a_cpu_a_batch_is_computed_in_parts_that_fit_the_network(make_trainer, monkeypatch):
    image = activations_per_pixel(make_trainer().model, 24) * 24**2
    for wanted, parts in ((1, 1), (2, 2), (4, 2)):  # batch norm needs two images
        monkeypatch.setattr("training.trainer.CPU_ACTIVATIONS", math.ceil(4 * image / wanted))
        trainer = make_trainer()
        shown = batches(trainer)
        assert [len(x) for x in shown] == [4 // parts] * parts * trainer.steps


def batches(trainer: Trainer) -> list[Tensor]:
    """What the network is shown at every step of a run."""
    shown: list[Tensor] = []
    hook = trainer.model.register_forward_pre_hook(lambda _, x: shown.append(x[0].clone()))
    for _ in range(trainer.steps):
        trainer.train_step()
    hook.remove()
    return shown


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_the_last_batches_are_not_mixed(make_trainer, mix):
    mixed = batches(make_trainer(**{mix: 1.0}, mix_until=0.5))
    plain = batches(make_trainer())
    assert len(mixed) == len(plain) == 9
    # The same pictures, cropped the same way, in either run.
    same = [torch.equal(a, b) for a, b in zip(mixed, plain, strict=True)]
    assert same == [False] * 5 + [True] * 4  # the fifth step begins before half of nine is done


def test_the_last_batches_are_cropped_less(make_trainer):
    sizes = {"crop_area": (0.25, 0.25), "last_crop_area": (1.0, 1.0)}
    trainer = make_trainer(**sizes, mix_until=0.5)
    areas = []
    for _ in range(trainer.steps):
        boxes = trainer._boxes()
        height, width = trainer.images.shape[1:3]
        areas.append(float((boxes.height * boxes.width).mean()) / (height * width))
        trainer.train_step()
    assert len(areas) == 9
    assert all(area == pytest.approx(0.25, abs=0.01) for area in areas[:5])
    assert all(area > 0.85 for area in areas[5:])  # sides that do not fit are cut


def test_cutmix_shows_every_picture_with_a_part_of_another(make_trainer):
    mixed, plain = (next(iter(batches(make_trainer(**mix)))) for mix in ({"cutmix": 1.0}, {}))
    own = (mixed == plain).all(dim=1)  # [N, S, S]
    others = (mixed == plain.roll(1, dims=0)).all(dim=1)
    assert (own | others).all()
    assert own.any() and others.any()


def test_as_many_batches_are_mixed_as_asked_for(make_trainer):
    trainer = make_trainer(cutmix=0.5, mixup=0.2, mix_until=0.9)
    torch.manual_seed(0)
    drawn = [trainer._choose_mix() for _ in range(1000)]
    assert drawn.count(trainer.mixes["cutmix"]) == pytest.approx(500, abs=60)
    assert drawn.count(trainer.mixes["mixup"]) == pytest.approx(200, abs=60)
    assert drawn.count(None) == pytest.approx(300, abs=60)


@pytest.mark.parametrize("mix", [{"cutmix": 1.0}, {"mixup": 1.0}, {"cutmix": 0.5, "mixup": 0.5}])
def test_mixed_batches_train_the_same_way_for_the_same_seed(make_trainer, assert_identical, mix):
    trainer = make_trainer(seed=3, **mix)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    losses = [trainer.train_step().item() for _ in range(2)]
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    first = trainer.model.state_dict()
    assert not torch.equal(first["stem.0.weight"], before["stem.0.weight"])
    again = make_trainer(seed=3, **mix)
    torch.manual_seed(99)
    assert [again.train_step().item() for _ in range(2)] == losses
    assert_identical(again.model.state_dict(), first)
    assert make_trainer(seed=4, **mix).train_step().item() != losses[0]


def test_a_run_with_mixed_batches_goes_on_to_the_same_weights(make_trainer, assert_identical):
    mix = {"cutmix": 0.5, "mixup": 0.5}
    whole, first, second = (make_trainer(**mix) for _ in range(3))
    expected = state_after(whole, 5)
    state_after(first, 2)
    second.load_state_dict(first.state_dict())
    assert_identical(state_after(second, 5), expected)


def test_averaged_weights_are_those_that_are_evaluated(make_trainer):
    trainer = make_trainer()
    averaged = state_after(trainer, 2)
    latest = trainer.model.state_dict()
    assert not torch.equal(averaged["stem.0.weight"], latest["stem.0.weight"])


def test_weights_are_averaged_as_pytorch_does_it(make_trainer):
    trainer = make_trainer(ema=0.3)

    def average(old, new, count):
        return get_ema_multi_avg_fn(min(0.3, (1 + int(count)) / (10 + int(count))))(old, new, count)

    expected = AveragedModel(trainer.model, multi_avg_fn=average, use_buffers=True)
    for _ in range(4):
        trainer.train_step()
        expected.update_parameters(trainer.model)
    ours = trainer.evaluated.state_dict()
    for name, value in expected.module.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(ours[name], value), name


def test_a_slow_average_does_not_outlast_a_short_run(make_trainer):
    trainer = make_trainer(ema=0.9999, epochs=8)
    first = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    averaged = state_after(trainer, trainer.steps)["stem.0.weight"]
    latest = trainer.model.state_dict()["stem.0.weight"]
    assert (averaged - latest).norm() < 0.3 * (averaged - first["stem.0.weight"]).norm()


def test_a_first_step_that_overflows_leaves_nothing_behind(make_trainer):
    trainer = make_trainer(precision="fp16")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    # What the optimizer would make in a step that is skipped has no values.
    assert all(
        not trainer.optimizer.state[parameter]["momentum_buffer"].any()
        for parameter in trainer.model.parameters()
    )
    before = trainer.model.state_dict()["stem.0.weight"].clone()
    trainer.train_step()
    assert trainer.scaler.get_scale() < 2.0**24
    assert torch.equal(trainer.model.state_dict()["stem.0.weight"], before)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    loss = [trainer.train_step().item() for _ in range(2)][-1]
    assert math.isfinite(loss)
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert not torch.equal(trainer.model.state_dict()["stem.0.weight"], before)


def test_what_is_done_between_two_epochs_is_no_time_of_training(make_trainer, monkeypatch):
    trainer = make_trainer()
    state_after(trainer, trainer.steps_per_epoch)
    now = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: now() + 1000)
    while trainer.step < 2 * trainer.steps_per_epoch:
        trainer.train_step()
    assert 0 < trainer.finish_epoch()["seconds"] < 1000


def test_an_epoch_sees_every_image_once_in_an_order_of_its_own(make_trainer):
    trainer = make_trainer(limit_train=None)
    orders = []
    for epoch in range(2):
        trainer.step = epoch * trainer.steps_per_epoch
        order = trainer._permutation().tolist()
        assert sorted(order) == list(range(27))
        orders.append(order)
    assert orders[0] != orders[1]
    assert orders[0] != list(range(27))


def test_limit_train_takes_the_same_images_whatever_the_seed(make_trainer):
    first, second = make_trainer(seed=1, limit_train=20), make_trainer(seed=2, limit_train=20)
    assert len(set(first.subset.tolist())) == 20
    assert torch.equal(first.subset, second.subset)
    assert set(first.labels[first.subset].tolist()) == {0, 1, 2}
    assert len(make_trainer(limit_train=1000).subset) == 27


def test_pixel_statistics_are_those_of_the_images_that_count():
    pictures = torch.randint(0, 256, (9, 6, 5, 3), dtype=torch.uint8)
    subset = torch.tensor([0, 3, 8])
    chosen = pictures[subset].double()
    mean, std = pixel_statistics(pictures, subset, mean_image=True)
    assert torch.allclose(mean.double(), chosen.mean(dim=0), atol=1e-4)
    assert torch.allclose(std.double(), chosen.flatten(0, 2).std(dim=0, correction=0), atol=1e-4)
    mean, _ = pixel_statistics(pictures, subset, mean_image=False)
    assert torch.allclose(mean.double(), chosen.mean(dim=(0, 1, 2)), atol=1e-4)


@pytest.mark.parametrize(("size", "at_a_time"), [(32, 1024), (64, 1024), (128, 256), (1024, 4)])
def test_large_pictures_are_counted_a_few_at_a_time(monkeypatch, size, at_a_time):
    parts = []
    split = torch.Tensor.split
    monkeypatch.setattr(
        torch.Tensor, "split", lambda self, count: parts.append(count) or split(self, count)
    )
    pictures = torch.randint(0, 256, (5, size, size, 3), dtype=torch.uint8)
    mean, _ = pixel_statistics(pictures, torch.arange(5), mean_image=False)
    assert parts == [at_a_time]
    assert torch.allclose(mean.double(), pictures.double().mean(dim=(0, 1, 2)), atol=1e-4)


def test_flat_pictures_can_be_normalised():
    flat = torch.full((3, 8, 8, 3), 7, dtype=torch.uint8)
    _, std = pixel_statistics(flat, torch.arange(3), mean_image=False)
    assert std.tolist() == [1, 1, 1]


def test_a_recipe_may_set_dropout(make_trainer):
    def shares(trainer):
        return [m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)]

    assert shares(make_trainer()) == [0.3, 0.3]
    assert shares(make_trainer(dropout=0.1)) == [0.1, 0.1]
    assert shares(make_trainer(dropout=0.0)) == [0.0, 0.0]


# Weights to start from


@pytest.mark.slow
def test_a_run_from_weights_begins_with_what_they_know(finished, make_trainer):
    weights = checkpoint.load_weights(finished.folder)
    dataset = data.load(finished.data)
    config = make_trainer().config
    trainer = Trainer(config, dataset, CPU, initial=weights)
    assert torch.equal(trainer.mean, weights.mean)
    assert torch.equal(trainer.std, weights.std)
    size = weights.network_size
    planes = augment.normalise(trainer.val[0], weights.mean, weights.std)
    boxes = augment.centre_crops(len(planes), 64, 64, weights.crop, CPU)
    images = augment.extract(planes, boxes, size)
    with torch.inference_mode():
        expected = weights.network()(images).softmax(dim=1)
        found = trainer.evaluated.eval()(images).softmax(dim=1)
    assert torch.allclose(found, expected, atol=1e-4)
    assert expected.std(dim=0).max() > 0.05


@pytest.mark.slow
def test_a_run_from_weights_is_ahead_of_one_from_scratch_and_says_so(
    finished, photos, tmp_path, history
):
    folder = tmp_path / "run"
    arguments = f"--arch inception --recipe cpu --epochs 1 -b 4 --lr 0.01 --init {finished.folder}"
    assert fit_here(folder, photos, arguments) == 0
    scratch, ahead = history(finished.folder)[0], history(folder)[0]
    assert float(ahead["train_loss"]) < 0.8 * float(scratch["train_loss"])
    assert float(ahead["train_top1"]) > float(scratch["train_top1"])
    before = checkpoint.load_weights(finished.folder).training
    training = checkpoint.load_weights(folder).training
    assert training.initial == before
    assert before.initial is None
    digest = hashlib.sha256((finished.folder / "weights.pt").read_bytes()).hexdigest()
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["init"] == f"{finished.folder.name} {digest}"


@pytest.mark.slow
def test_weights_of_other_classes_lose_their_last_layer_and_that_is_said(
    finished, bare, tmp_path, capsys
):
    words = "note: its classes are others: the last layer starts anew\n"
    arguments = "--arch inception --recipe cpu --epochs 1 -b 4 --limit-train 4"
    arguments += f" --init {finished.folder}"
    assert fit_here(tmp_path / "same", bare, arguments) == 0
    assert words not in capsys.readouterr().err
    (bare / "violet").rename(bare / "purple")
    assert fit_here(tmp_path / "others", bare, arguments) == 0
    assert words in capsys.readouterr().err


# Teachers


def test_a_run_learns_what_was_answered_about_each_image(make_trainer, photos):
    """Images whose answer is the next class: a network that fits the answers is always wrong."""
    recipe = dataclasses.replace(
        RECIPES["cpu"]("baseline"), epochs=20, batch_size=9, warmup=0.0, distill_weight=1.0
    )
    config = dataclasses.replace(
        make_trainer(limit_train=None).config, arch="baseline", recipe=recipe
    )
    dataset = data.load(photos)
    following = torch.eye(3)[(dataset.train.labels + 1) % 3]
    trainer = Trainer(config, dataset, CPU, answers=following.half())
    while trainer.step < trainer.steps:
        trainer.train_step()
        if trainer.step % trainer.steps_per_epoch == 0:
            accuracy = trainer.finish_epoch()["train_top1"]
    assert accuracy < 0.2


@pytest.mark.slow
def test_a_teacher_asked_once_and_one_asked_every_time(finished, photos, tmp_path, history):
    teacher = f"--arch inception --recipe cpu --epochs 1 -b 4 --teacher {finished.folder}"
    once, always = tmp_path / "once", tmp_path / "always"
    assert fit_here(once, photos, teacher) == 0
    assert fit_here(always, photos, f"{teacher} --set distill_once=false") == 0
    digest = hashlib.sha256((finished.folder / "weights.pt").read_bytes()).hexdigest()
    for folder in (once, always):
        config = json.loads((folder / "config.json").read_text())
        assert config["config"]["teachers"] == [f"{finished.folder.name} {digest}"]
        weights = checkpoint.load_weights(folder)
        (teacher,) = weights.training.teachers
        assert (teacher.name, teacher.architecture) == (
            f"{finished.folder.name} {digest}",
            "inception",
        )
        assert teacher.training == checkpoint.load_weights(finished.folder).training
    losses = [history(folder)[0]["train_loss"] for folder in (once, always)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_kept_answers_are_mixed_as_the_images_and_their_labels(photos, make_trainer, mix):
    """Answers that are always the next class, so that they can be told from the labels."""
    trainer = make_trainer(**{mix: 1.0}, mix_until=1.0)
    count = len(data.load(photos).classes)
    trainer.answers = torch.eye(count)[(trainer.labels + 1) % count].half()
    learnt = []
    loss = trainer._loss

    def spied(x: Tensor, targets: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        learnt.append((targets, wanted))
        return loss(x, targets, wanted)

    trainer._loss = spied
    for _ in range(trainer.steps):
        trainer.train_step()
    targets, wanted = (torch.cat(part) for part in zip(*learnt, strict=True))
    assert torch.allclose(wanted, targets.roll(1, dims=1), atol=1e-3)
    assert torch.allclose(targets.sum(dim=1), torch.ones(len(targets)))
    assert ((targets > 0.05).sum(dim=1) == 2).any()  # some of two classes


@pytest.mark.parametrize(
    ("option", "who"), [("--init", "the weights of --init"), ("--teacher", "the teacher inception")]
)
def test_weights_that_saw_what_is_held_out_now_are_said(
    finished, photos, tmp_path, capsys, option, who
):
    arguments = f"--arch inception {option} {finished.folder} --epochs 1 -b 4 --time-limit 0"
    words = f"note: {who} may have been trained on images that are held out now"
    for number, (holdout, expected) in enumerate((("--holdout 5", True), ("", False))):
        fit_here(tmp_path / str(number), photos, f"{arguments} {holdout}")
        assert (words in capsys.readouterr().err) is expected


def test_weights_are_refitted_to_as_many_images_as_memory_holds(make_trainer, monkeypatch):
    shown = []
    monkeypatch.setattr(trainer_module.pretrained, "refit_norms", lambda _, x: shown.append(len(x)))
    monkeypatch.setattr(trainer_module, "REFIT_IMAGES", (2, 20))
    trainer = make_trainer(limit_train=24)
    trainer.size = 24
    for activations, expected in ((1.0, 12), (1e9, 2), (2 * 240e6 / 24**2 / 6.5, 6)):
        trainer._activations = activations
        trainer._refit_norms()
        assert shown.pop() == expected


@pytest.mark.parametrize(
    ("given", "lr"), [("", 0.4 * 27 / 512), ("--lr 0.3", 0.3), ("--set lr=0.3", 0.3)]
)
def test_a_batch_of_few_images_has_a_lower_learning_rate(photos, tmp_path, capsys, given, lr):
    arguments = f"--arch inception --epochs 1 --time-limit 0 {given}"
    fit_here(tmp_path / "run", photos, arguments)
    recipe = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["recipe"]
    assert (recipe["batch_size"], recipe["lr"]) == (27, pytest.approx(lr))
    said = capsys.readouterr().err
    assert "note: a batch has all 27 images, not 512" in said
    assert "note: 1 step is few to learn in; --epochs 100 makes 100" in said
    assert ("the learning rate is as much lower: 0.0211" in said) is not given
    # The same command goes on with it.
    assert fit_here(tmp_path / "run", photos, f"{arguments} --resume") == 0
    assert "resumed" in capsys.readouterr().err


def test_memory_that_is_full_is_one_line(photos, tmp_path, monkeypatch, check_one_line):
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")

    monkeypatch.setattr(fit, "Trainer", full)
    assert fit_here(tmp_path / "run", photos, "--arch inception -b 4") == 1
    check_one_line("lower --batch-size")


# Short runs in this process


def fit_here(out: Path, photos: Path, arguments: str) -> int:
    common = ["--device", "cpu", "--precision", "fp32", "--data", str(photos), "--out", str(out)]
    return fit.main([*arguments.split(), *common])


@pytest.mark.slow
def test_the_paper_recipe_learns_and_is_tried_on_ten_crops(photos, tmp_path, capsys, history):
    arguments = "--arch baseline --recipe paper --epochs 3 --batch-size 6"
    assert fit_here(tmp_path / "run", photos, arguments) == 0
    losses = [float(row["train_loss"]) for row in history(tmp_path / "run")]
    assert losses[-1] < 0.7 * losses[0]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result.keys() >= {"single centre view", "ten crops", "training_seconds"}
    assert result["ten crops"]["images"] == 18
    assert capsys.readouterr().out.count("top-1") == 2
    weights = checkpoint.load_weights(tmp_path / "run")
    assert weights.mean.shape == (64, 64, 3)
    assert weights.crop == 56
    # The paper's schedule is nearly at zero at the end of every epoch.
    assert float(history(tmp_path / "run")[0]["lr"]) < 0.2 * RECIPES["paper"]("baseline").lr


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["paper", "modern"])
def test_ten_crops_are_tried_as_they_are_served_whatever_the_run_was_trained_in(
    photos, tmp_path, recipe
):
    folder = tmp_path / "run"
    arguments = f"--arch baseline --recipe {recipe} --epochs 1 -b 9 --lr 0.001 --set ten_crop=true"
    common = f"--device cpu --precision bf16 --data {photos} --out {folder}"
    assert fit.main([*arguments.split(), *common.split()]) == 0
    result = json.loads((folder / "result.json").read_text())["ten crops"]
    dataset, weights = data.load(photos), checkpoint.load_weights(folder)
    with torch.inference_mode():
        answers = weights.served(augment.TEN_CROPS)(torch.from_numpy(dataset.val.images))
    labels = torch.from_numpy(dataset.val.labels)
    expected = nn.functional.nll_loss(answers.log(), labels).item()
    assert result["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_limit_train_trains_on_so_many(photos, tmp_path, history):
    arguments = "--arch inception --recipe cpu --epochs 1 -b 4 --limit-train 9"
    assert fit_here(tmp_path / "run", photos, arguments) == 0
    assert checkpoint.load_weights(tmp_path / "run").training.train_images == 9
    assert history(tmp_path / "run")[0]["step"] == "2"


@pytest.mark.slow
def test_a_batch_larger_than_the_data_is_all_of_it(photos, tmp_path, history):
    arguments = "--arch inception --recipe cpu --epochs 1 -b 500 --limit-train 6"
    assert fit_here(tmp_path / "run", photos, arguments) == 0
    assert history(tmp_path / "run")[0]["step"] == "1"


@pytest.mark.slow
def test_any_field_of_the_recipe_can_be_set(photos, tmp_path, capsys):
    arguments = (
        "--arch inception --recipe cpu --time-limit 0 --epochs 3 "
        "--set label_smoothing=0 --set sizes=[[0,24],[0.5,48]] --set crop_area=null --set epochs=9"
    )
    assert fit_here(tmp_path / "run", photos, arguments) == 0
    recipe = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["recipe"]
    assert recipe["label_smoothing"] == 0
    assert recipe["sizes"] == [[0, 24], [0.5, 48]]
    assert recipe["crop_area"] is None
    assert recipe["epochs"] == 3  # an option of its own has the last word
    assert recipe["auxiliary_weight"] == 0.3
    assert ": 3 epochs of " in capsys.readouterr().err


@pytest.mark.slow
def test_a_network_for_larger_images_is_trained_and_exported(photos, tmp_path, capsys):
    run, exported = tmp_path / "run", tmp_path / "exported"
    arguments = "--arch baseline --recipe cpu --epochs 1 -b 9 --limit-train 18 --image-size 96"
    arguments += " --set crop=96"
    assert fit_here(run, photos, arguments) == 0
    weights = checkpoint.load_weights(run)
    assert (weights.image_size, weights.crop, weights.network_size) == (96, 96, 80)
    assert export.main([str(run), "-o", str(exported)]) == 0
    assert "not the data that the run was trained on" not in capsys.readouterr().err
    engine = Engine(exported / "baseline.onnx", device="cpu")
    assert (engine.card.image_size, engine.card.crop, engine.card.network_size) == (96, 96, 80)
    pictures = data.load(photos, image_size=96).val.images
    assert pictures.shape == (18, 96, 96, 3)
    with torch.inference_mode():
        expected = weights.served()(torch.from_numpy(pictures)).numpy()
    assert np.allclose(engine.run(pictures), expected, atol=1e-4)


def test_another_picture_is_said_and_not_what_it_makes_of_a_batch(
    bare, make_picture, tmp_path, capsys
):
    arguments = "--arch baseline --epochs 1 --time-limit 0"
    assert fit_here(tmp_path / "run", bare, arguments) == 0
    make_picture(bare / "jade" / "more.jpg", (9, 9, 9), 1)
    assert fit_here(tmp_path / "run", bare, f"{arguments} --resume") == 2
    assert "the images in bare are not those that it began with" in capsys.readouterr().err


@pytest.mark.slow
def test_bare_class_folders_are_enough_to_train(bare, tmp_path, capsys):
    run = tmp_path / "run"
    assert fit_here(run, bare, "--arch inception --recipe cpu --epochs 1 -b 4") == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("has no val/: 2 of 15 training images are held out for validation")
    assert "note: 3 steps are few to learn in; --epochs 34 makes 102" in said
    assert said[-2:] == [
        f"export it with: python -m training.export {run} -o models/",
        "try it with:    tinyserve classify IMAGES -m models/inception.onnx",
    ]
    training = checkpoint.load_weights(run).training
    assert training.dataset == "bare, 2 held out of train"
    assert (training.train_images, training.val_images) == (13, 2)


@pytest.mark.slow
def test_a_run_that_holds_images_out_says_so(photos, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = "--arch inception --recipe cpu --epochs 1 -b 4 --holdout 5"
    assert fit_here(run, photos, arguments) == 0
    training = checkpoint.load_weights(run).training
    assert training.dataset == "photos, 5 held out of train"
    assert (training.train_images, training.val_images) == (22, 5)
    assert training.dataset_fingerprint == data.load(photos, holdout=5).fingerprint
    result = json.loads((run / "result.json").read_text())
    assert result["single centre view"]["images"] == 5
    assert json.loads((run / "config.json").read_text())["config"]["holdout"] == 5
    captured = capsys.readouterr()
    assert "5 of 27 training images are held out for validation" in captured.err
    assert "of 5; 95 %" in captured.out


@pytest.mark.slow
def test_a_run_that_holds_images_out_is_exported_with_its_own_data(photos, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = "--arch baseline --recipe cpu --epochs 1 -b 4 --limit-train 4"
    assert fit_here(run, photos, f"{arguments} --image-size 24 --holdout 5") == 0
    capsys.readouterr()
    assert export.main([str(run), "-o", str(tmp_path / "exported")]) == 0
    assert "not the data that the run was trained on" not in capsys.readouterr().err


@pytest.mark.slow
def test_shipped_weights_have_no_auxiliary_heads_and_round_to_half(finished):
    state = checkpoint.load_weights(finished.folder).state
    assert not any(is_auxiliary(name) for name in state)
    assert all(torch.equal(v, v.half().float()) for v in state.values() if v.dim() >= 2)


# Refusals


@pytest.mark.slow
def test_a_recipe_can_be_seen_before_it_is_run(tmp_path, capsys):
    asked = "--arch alexnet --recipe cpu --set dropout=0.3 --epochs 7 --show-recipe"
    assert fit_here(tmp_path / "run", tmp_path / "nowhere", asked) == 0
    shown = json.loads(capsys.readouterr().out)
    expected = dataclasses.replace(RECIPES["cpu"]("alexnet"), dropout=0.3, epochs=7)
    assert shown == json.loads(json.dumps(dataclasses.asdict(expected)))
    assert not (tmp_path / "run").exists()


def test_an_unknown_architecture_is_refused_with_those_known(run_module, tmp_path):
    result = run_module("training.fit", "--arch", "vgg", "--out", tmp_path / "run")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert all(name in line for name in ("'vgg'", *ARCHS))
    assert result.stdout == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--arch vgg", "baseline, alexnet, inception, resnet20"),
        ("--precision fp16", "needs a GPU"),
        ("--epochs 0", "epochs"),
        ("--batch-size 0", "batch size"),
        ("--lr 0", "learning rate"),
        ("--lr nan", "learning rate"),
        ("--limit-train 0", "--limit-train"),
        ("--seed 18446744073709551616", "seed"),
        ("--holdout -1", "--holdout"),
        ("--image-size 23", "--image-size must be from 24"),
        ("--image-size 0", "--image-size"),
        ("--image-size 100000", "--image-size"),
        ("--set speed=3", "no field 'speed'"),
        ("--set epochs=0", "epochs"),
        ("--set lr=fast", "not JSON"),
        ("--set cutmix=2", "CutMix"),
        ("--set sizes=[[0,16]]", "inception cannot be trained on 16 px"),
        ("--arch baseline --set sizes=[[0,24],[0.5,56]]", "on 24 px and end at 56 px"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    photos, tmp_path, arguments, words, check_one_line
):
    common = ["--arch", "inception", "--device", "cpu", "--data", str(photos)]
    code = fit.main([*common, "--out", str(tmp_path / "run"), *arguments.split()])
    assert code == 2
    check_one_line(words)
    assert not (tmp_path / "run").exists()


@without_gpu
def test_a_gpu_that_is_not_there_is_refused(photos, tmp_path, check_one_line):
    arguments = ["--arch", "inception", "--data", str(photos), "--out", str(tmp_path / "run")]
    assert fit.main([*arguments, "--device", "cuda"]) == 5
    check_one_line("no usable CUDA device")


def test_data_that_is_not_there_is_one_line(tmp_path, check_one_line):
    assert fit_here(tmp_path / "run", tmp_path / "nothing", "--arch inception") == 1
    check_one_line("no such folder")


def spoilt(folder: Path, how: str) -> Path:
    """What is no trained network."""
    path = folder / "weights-of-mine"
    if how == "a text":
        path.write_text("no model")
    elif how == "an empty file":
        path.touch()
    elif how != "nothing":
        path.mkdir()
        if how == "a damaged run":
            (path / "weights.pt").write_text("no weights")
    return path


@pytest.mark.parametrize("option", ["--init", "--teacher"])
@pytest.mark.parametrize(
    "how", ["nothing", "a text", "an empty file", "a folder that is no run", "a damaged run"]
)
def test_weights_that_cannot_be_read_are_one_line(photos, tmp_path, check_one_line, option, how):
    path = spoilt(tmp_path, how)
    arguments = f"--arch inception --recipe cpu {option} {path}"
    assert fit_here(tmp_path / "run", photos, arguments) == 1
    check_one_line(str(path))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--init", "--teacher"])
def test_a_run_that_has_not_finished_is_named_so(photos, tmp_path, capsys, check_one_line, option):
    unfinished = tmp_path / "unfinished"
    assert fit_here(unfinished, photos, "--arch inception --recipe cpu --time-limit 0") == 0
    capsys.readouterr()
    arguments = f"--arch inception --recipe cpu {option} {unfinished}"
    assert fit_here(tmp_path / "run", photos, arguments) == 1
    check_one_line("has not finished")


def test_resuming_what_was_never_begun_is_one_line(photos, tmp_path, check_one_line):
    assert fit_here(tmp_path / "run", photos, "--arch inception --resume") == 1
    check_one_line("no checkpoint")
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_one_line(photos, tmp_path, check_one_line):
    (tmp_path / "checkpoint.pt").write_text("no checkpoint")
    assert fit_here(tmp_path, photos, "--arch inception --resume") == 1
    check_one_line("damaged")


def test_an_output_folder_that_is_a_file_is_one_line(photos, tmp_path, check_one_line):
    (tmp_path / "run").write_text("a file")
    assert fit_here(tmp_path / "run", photos, "--arch inception") == 2
    check_one_line(str(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "a file"


def test_a_batch_of_one_is_refused_where_batch_norm_cannot_have_it(
    photos, tmp_path, check_one_line
):
    arguments = "--arch baseline --recipe cpu --epochs 1 --limit-train 1"
    assert fit_here(tmp_path / "run", photos, arguments) == 2
    check_one_line("batch")


@pytest.mark.parametrize("batch_size", [6, 24])  # after one step, validation alone shows it
def test_a_run_that_diverges_stops_with_advice(photos, tmp_path, capsys, batch_size):
    arguments = "--arch baseline --recipe paper --epochs 1 --limit-train 24 --lr 1e38"
    arguments += f" -b {batch_size}"
    assert fit_here(tmp_path / "run", photos, arguments) == 1
    said = capsys.readouterr().err
    assert "lower --lr" in said.splitlines()[-1]
    assert not (tmp_path / "run" / "weights.pt").exists()


def test_a_finished_run_is_not_mixed_with_another(photos, tmp_path, capsys):
    arguments = "--arch baseline --recipe cpu --epochs 1 -b 6"
    assert fit_here(tmp_path / "run", photos, arguments) == 0
    (tmp_path / "run" / "checkpoint.pt").unlink()
    before = (tmp_path / "run" / "config.json").read_bytes()
    for option in ("", " --resume"):
        assert fit_here(tmp_path / "run", photos, arguments + option) == 2
        assert "holds a finished run" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize("more", ["", " --resume"])
def test_a_run_that_another_process_trains_is_left_alone(
    photos, tmp_path, capsys, check_one_line, more
):
    arguments = "--arch baseline --recipe cpu --epochs 1 -b 6"
    assert fit_here(tmp_path / "run", photos, f"{arguments} --time-limit 0") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    held = "import sys; from tinyserve.files import held; "
    held += "block = held(sys.argv[1]); print(block.__enter__(), flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "True\n"
        capsys.readouterr()
        assert fit_here(tmp_path / "run", photos, arguments + more) == 2
        check_one_line("another process is training")
        assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
        other.stdin.close()
    assert fit_here(tmp_path / "run", photos, f"{arguments} --resume") == 0


def test_workers_that_torchrun_did_not_start_are_refused(
    photos, tmp_path, monkeypatch, check_one_line
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert fit_here(tmp_path / "run", photos, "--arch baseline --recipe cpu") == 2
    check_one_line("WORLD_SIZE is 2")


def test_a_gpu_that_is_full_is_one_line(photos, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "train_step", full)
    assert fit_here(tmp_path / "run", photos, "--arch inception --recipe cpu -b 6") == 1
    said = capsys.readouterr().err
    assert "lower --batch-size" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_a_run_killed_before_its_first_checkpoint_starts_over(photos, tmp_path):
    arguments = "--arch baseline --recipe cpu --epochs 1 -b 6"
    assert fit_here(tmp_path / "run", photos, f"{arguments} --time-limit 0") == 0
    (tmp_path / "run" / "checkpoint.pt").unlink()
    assert fit_here(tmp_path / "run", photos, f"{arguments} --resume") == 0
    assert (tmp_path / "run" / "weights.pt").exists()
