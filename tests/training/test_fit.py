import csv
import dataclasses
import json
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from tinyserve.modelfile import Label
from training import checkpoint, data, fit
from training.models import ARCHS, is_auxiliary
from training.recipes import RECIPES
from training.run import Config
from training.trainer import Trainer, pixel_statistics

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


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def untimed(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert differing == []


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
def test_history_has_one_row_an_epoch(finished):
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
def test_the_loss_falls_on_classes_that_can_be_learnt(finished):
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
def test_the_result_is_in_the_file_the_weights_and_the_words(finished):
    result = json.loads((finished.folder / "result.json").read_text())
    assert result.keys() == {"single centre view", "training_seconds"}
    score = result["single centre view"]
    assert score["images"] == 18
    assert score["top1"] == score["correct_top1"] / 18
    low, high = score["top1_ci95"]
    assert low < score["top1"] < high
    assert 0 < score["top1"] <= 14 / 18  # four pictures are in the wrong folder
    assert result["training_seconds"] == pytest.approx(
        sum(float(row["seconds"]) for row in history(finished.folder))
    )
    training = checkpoint.load_weights(finished.folder).training
    assert (training.val_top1, training.val_top5) == (score["top1"], score["top5"])
    assert f"({score['correct_top1']} of 18;" in finished.stdout
    assert len(finished.stdout.splitlines()) == 1


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
    assert config["environment"]["torch"] == torch.__version__


# Stopping and going on


@pytest.fixture(scope="module")
def interrupted(start_module, run_module, fit_arguments, tmp_path_factory) -> SimpleNamespace:
    """The run of ``finished``, killed after its first epoch, stopped after the second by SIGTERM
    and after the third by SIGINT, and resumed each time."""
    folder = tmp_path_factory.mktemp("runs") / "interrupted"
    arguments = ["training.fit", *fit_arguments, "--out", folder]
    exits, said, unfinished = {}, {}, {}
    stops = {1: signal.SIGKILL, 2: signal.SIGTERM, 3: signal.SIGINT}
    for epoch, number in stops.items():
        process = start_module(*arguments, *(["--resume"] if epoch > 1 else []))
        watchdog = threading.Timer(200, process.kill)
        watchdog.start()
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if line.startswith(f"epoch {epoch}:"):
                    time.sleep(0.05)  # into the next epoch, somewhere
                    process.send_signal(number)
                    break
            lines += process.stderr.readlines()
            exits[number] = process.wait()
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()
            process.stderr.close()
        said[number] = lines
        unfinished[number] = not (folder / "weights.pt").exists()
    last = run_module(*arguments, "--resume")
    assert last.returncode == 0, last.stderr
    return SimpleNamespace(
        folder=folder, exits=exits, said=said, unfinished=unfinished, last=last.stderr
    )


@pytest.mark.slow
def test_signals_have_their_exit_codes(interrupted):
    assert interrupted.exits == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
    assert all(interrupted.unfinished.values())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_so_in_one_line(interrupted, number):
    lines = interrupted.said[number]
    assert [line for line in lines if line.startswith("training.fit:")] == lines[-1:]
    assert "--resume" in lines[-1]
    assert str(interrupted.folder) in lines[-1]
    assert "Traceback" not in "".join(lines)


@pytest.mark.slow
def test_every_resumed_run_goes_on_and_does_not_start_over(interrupted):
    starts = [interrupted.said[signal.SIGTERM], interrupted.said[signal.SIGINT]]
    starts.append(interrupted.last.splitlines(keepends=True))
    for epochs_done, lines in enumerate(starts, start=1):
        assert lines[0].startswith("resumed at step ")
        assert 6 * epochs_done <= int(lines[0].split()[3]) < 24
    # Nothing can be saved at SIGKILL: that run goes on from the end of its last epoch.
    assert starts[0][0] == "resumed at step 6 of 24\n"


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(interrupted, finished):
    found = checkpoint.load_weights(interrupted.folder)
    expected = checkpoint.load_weights(finished.folder)
    assert_identical(found.state, expected.state)
    assert torch.equal(found.mean, expected.mean)
    assert found.training == expected.training


@pytest.mark.slow
def test_a_resumed_run_has_the_same_history_and_result(interrupted, finished):
    assert untimed(history(interrupted.folder)) == untimed(history(finished.folder))
    results = [
        json.loads((run.folder / "result.json").read_text()) for run in (interrupted, finished)
    ]
    assert results[0]["single centre view"] == results[1]["single centre view"]


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(finished, fit_arguments, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(finished.folder, folder)
    (folder / "weights.pt").unlink()
    assert fit.main([*fit_arguments, "--out", str(folder), "--resume"]) == 0
    assert_identical(
        checkpoint.load_weights(folder).state, checkpoint.load_weights(finished.folder).state
    )
    assert history(folder) == history(finished.folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--seed", "8"], "seed was 7, is 8"),
        (["--recipe", "modern"], "recipe was"),
        (["--lr", "0.01"], "recipe was"),
        (["--arch", "resnet20"], "arch was 'inception', is 'resnet20'"),
        (["--limit-train", "20"], "limit_train was None, is 20"),
        (["--precision", "bf16"], "precision was 'fp32', is 'bf16'"),
    ],
)
def test_a_run_goes_on_only_as_it_began(finished, fit_arguments, capsys, change, words):
    before = (finished.folder / "checkpoint.pt").read_bytes()
    code = fit.main([*fit_arguments, "--out", str(finished.folder), "--resume", *change])
    assert code == 2
    check_one_line(capsys, words)
    assert (finished.folder / "checkpoint.pt").read_bytes() == before


@pytest.mark.slow
def test_a_run_goes_on_only_with_its_data(finished, fit_arguments, folders, capsys):
    arguments = [*fit_arguments, "--out", str(finished.folder), "--resume", "--data", str(folders)]
    assert fit.main(arguments) == 2
    check_one_line(capsys, "fingerprint was")


@pytest.mark.slow
def test_a_run_is_not_started_over_by_accident(finished, fit_arguments, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.folder.iterdir()}
    assert fit.main([*fit_arguments, "--out", str(finished.folder)]) == 2
    check_one_line(capsys, "--resume goes on with it")
    assert {path: path.stat().st_mtime_ns for path in finished.folder.iterdir()} == before


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

    def make(seed: int = 1, limit_train: int | None = 12) -> Trainer:
        recipe = dataclasses.replace(
            RECIPES["modern"]("inception"), epochs=3, batch_size=4, sizes=((0.0, 24),), ema=0.9
        )
        config = Config(
            arch="inception",
            recipe=recipe,
            seed=seed,
            precision="fp32",
            image_size=64,
            limit_train=limit_train,
        )
        return Trainer(config, dataset, CPU)

    return make


def test_a_seed_gives_the_same_weights_and_another_seed_others(make_trainer):
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
def test_stopping_within_an_epoch_changes_no_bit(make_trainer, tmp_path, stop):
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


def test_averaged_weights_are_those_that_are_evaluated(make_trainer):
    trainer = make_trainer()
    averaged = state_after(trainer, 2)
    latest = trainer.model.state_dict()
    assert not torch.equal(averaged["stem.0.weight"], latest["stem.0.weight"])


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


def test_flat_pictures_can_be_normalised():
    flat = torch.full((3, 8, 8, 3), 7, dtype=torch.uint8)
    _, std = pixel_statistics(flat, torch.arange(3), mean_image=False)
    assert std.tolist() == [1, 1, 1]


# Short runs in this process


def fit_here(out: Path, photos: Path, arguments: str) -> int:
    common = ["--device", "cpu", "--precision", "fp32", "--data", str(photos), "--out", str(out)]
    return fit.main([*arguments.split(), *common])


@pytest.mark.slow
def test_the_paper_recipe_learns_and_is_tried_on_ten_crops(photos, tmp_path, capsys):
    arguments = "--arch baseline --recipe paper --epochs 3 --batch-size 6"
    assert fit_here(tmp_path / "run", photos, arguments) == 0
    losses = [float(row["train_loss"]) for row in history(tmp_path / "run")]
    assert losses[-1] < 0.7 * losses[0]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result.keys() == {"single centre view", "ten crops", "training_seconds"}
    assert result["ten crops"]["images"] == 18
    assert capsys.readouterr().out.count("top-1") == 2
    weights = checkpoint.load_weights(tmp_path / "run")
    assert weights.mean.shape == (64, 64, 3)
    assert weights.crop == 56
    # The paper's schedule is nearly at zero at the end of every epoch.
    assert float(history(tmp_path / "run")[0]["lr"]) < 0.2 * 0.02


@pytest.mark.slow
def test_limit_train_trains_on_so_many(photos, tmp_path):
    arguments = "--arch inception --recipe cpu --epochs 1 -b 4 --limit-train 9"
    assert fit_here(tmp_path / "run", photos, arguments) == 0
    assert checkpoint.load_weights(tmp_path / "run").training.train_images == 9
    assert history(tmp_path / "run")[0]["step"] == "2"


@pytest.mark.slow
def test_a_batch_larger_than_the_data_is_all_of_it(photos, tmp_path):
    arguments = "--arch inception --recipe cpu --epochs 1 -b 500 --limit-train 6"
    assert fit_here(tmp_path / "run", photos, arguments) == 0
    assert history(tmp_path / "run")[0]["step"] == "1"


def test_shipped_weights_have_no_auxiliary_heads_and_round_to_half(finished):
    state = checkpoint.load_weights(finished.folder).state
    assert not any(is_auxiliary(name) for name in state)
    assert all(torch.equal(v, v.half().float()) for v in state.values() if v.dim() >= 2)


# Refusals


def check_one_line(capsys: pytest.CaptureFixture[str], words: str) -> None:
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("training.fit: ")
    assert words in said[0]


@pytest.mark.slow
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
    ],
)
def test_arguments_that_cannot_be_used_are_refused(photos, tmp_path, capsys, arguments, words):
    common = ["--arch", "inception", "--device", "cpu", "--data", str(photos)]
    code = fit.main([*common, "--out", str(tmp_path / "run"), *arguments.split()])
    assert code == 2
    check_one_line(capsys, words)
    assert not (tmp_path / "run").exists()


@without_gpu
def test_a_gpu_that_is_not_there_is_refused(photos, tmp_path, capsys):
    arguments = ["--arch", "inception", "--data", str(photos), "--out", str(tmp_path / "run")]
    assert fit.main([*arguments, "--device", "cuda"]) == 5
    check_one_line(capsys, "no usable CUDA device")


@without_gpu
def test_precision_is_chosen_by_what_the_machine_has():
    assert fit._precision("auto", CPU) in ("fp32", "bf16")
    assert fit._precision("bf16", CPU) == "bf16"


def test_data_that_is_not_there_is_one_line(tmp_path, capsys):
    assert fit_here(tmp_path / "run", tmp_path / "nothing", "--arch inception") == 1
    check_one_line(capsys, "no such folder")


def test_resuming_what_was_never_begun_is_one_line(photos, tmp_path, capsys):
    assert fit_here(tmp_path / "run", photos, "--arch inception --resume") == 1
    check_one_line(capsys, "no checkpoint")
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_one_line(photos, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_text("no checkpoint")
    assert fit_here(tmp_path, photos, "--arch inception --resume") == 1
    check_one_line(capsys, "damaged")


def test_an_output_folder_that_is_a_file_is_one_line(photos, tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    assert fit_here(tmp_path / "run", photos, "--arch inception") == 2
    check_one_line(capsys, str(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "a file"


def test_a_batch_of_one_is_refused_where_batch_norm_cannot_have_it(photos, tmp_path, capsys):
    arguments = "--arch baseline --recipe cpu --epochs 1 --limit-train 1"
    assert fit_here(tmp_path / "run", photos, arguments) == 2
    check_one_line(capsys, "batch")


def test_a_run_that_diverges_stops_with_advice(photos, tmp_path, capsys):
    arguments = "--arch baseline --recipe paper --epochs 1 -b 6 --limit-train 24 --lr 1e38"
    assert fit_here(tmp_path / "run", photos, arguments) == 1
    said = capsys.readouterr().err
    assert "lower --lr" in said.splitlines()[-1]
    assert not (tmp_path / "run" / "weights.pt").exists()
