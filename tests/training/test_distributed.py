import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tinyserve.errors import UsageError
from training import checkpoint, data
from training.distributed import ALONE, Workers, joined
from training.recipes import RECIPES
from training.run import Config
from training.trainer import Trainer

ARGUMENTS = [
    *("--arch", "baseline", "--recipe", "paper", "--epochs", "2", "--batch-size", "6"),
    *("--holdout", "3", "--device", "cpu", "--precision", "fp32", "--seed", "3"),
]
"""Of a network with neither batch norm nor dropout, on random crops."""


@pytest.fixture(scope="module")
def train(run_module, photos) -> Callable[..., Path]:
    """Train into a folder in one process or several."""

    def run(out: Path, *arguments: str, processes: int) -> Path:
        command = ["training.fit", *ARGUMENTS, "--data", photos, "--out", out, *arguments]
        if processes > 1:
            launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command = [*launcher, "-m", *command]
        result = run_module(*command)
        assert result.returncode == 0, result.stderr
        # Only the first process speaks.
        assert result.stderr.count("export it with") == 1
        assert result.stdout.count("single centre view") == 1
        assert result.stderr.count("are held out for validation") == 1
        return out

    return run


def losses(run: Path) -> list[float]:
    lines = (run / "history.csv").read_text().splitlines()
    column = lines[0].split(",").index("train_loss")
    return [float(line.split(",")[column]) for line in lines[1:]]


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "alone", processes=1)


@pytest.fixture(scope="module")
def together(train, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "together", processes=2)


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_the_same_batch(alone, together):
    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
    assert losses(alone)[0] != pytest.approx(losses(alone)[1], abs=1e-3)
    found, expected = (checkpoint.load_weights(run).state for run in (together, alone))
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=2e-3), name  # rounded to half


@pytest.mark.slow
def test_the_run_says_how_many_trained_it_and_is_written_once(together, alone):
    config = json.loads((together / "config.json").read_text())
    assert config["environment"]["processes"] == 2
    names = [
        sorted(path.name for path in run.iterdir() if not path.name.startswith("events"))
        for run in (together, alone)
    ]
    assert names[0] == names[1]
    assert len(list(together.glob("events*"))) == 1


@pytest.mark.slow
def test_a_run_goes_on_in_two_processes_where_two_stopped(train, together, tmp_path):
    run = shutil.copytree(together, tmp_path / "run")
    (run / "weights.pt").unlink()
    train(run, "--resume", processes=2)
    found, expected = (checkpoint.load_weights(folder).state for folder in (run, together))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _train_apart(rank: int, folder: str, photos: str) -> None:
    """One of two processes; saves its batch norms' means before and after the epoch's end."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    recipe = dataclasses.replace(
        RECIPES["modern"]("baseline"), epochs=1, batch_size=6, ema=0.9, sizes=((0.0, 24),)
    )
    config = Config(
        arch="baseline", recipe=recipe, seed=0, precision="fp32", image_size=64, limit_train=6
    )
    dataset = data.load(Path(photos))
    trainer = Trainer(config, dataset, torch.device("cpu"), workers=Workers(rank, 2))
    trainer.train_step()

    def means() -> list[torch.Tensor]:
        return [
            value.clone()
            for network in (trainer.model, trainer.evaluated)
            for name, value in network.named_buffers()
            if name.endswith("running_mean")
        ]

    before = means()
    row = trainer.finish_epoch()
    torch.save((before, means(), row["val_loss"]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_batch_norm_statistics_are_averaged_before_they_are_used(photos, tmp_path):
    mp.spawn(_train_apart, (str(tmp_path), str(photos)), nprocs=2)
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    (first, after, loss), (second, other_after, other_loss) = saved
    assert len(after) == 4  # two norms, of the network and of its running average
    for one, two, mean, other_mean in zip(first, second, after, other_after, strict=True):
        assert not torch.allclose(one, two, rtol=1e-3)
        assert torch.allclose(mean, (one + two) / 2, rtol=1e-5, atol=1e-7)
        assert torch.equal(mean, other_mean)
    assert loss == other_loss


def test_shares_are_a_partition_of_the_batch():
    shares = [Workers(rank, 4).share(12) for rank in range(4)]
    assert [list(range(12))[share] for share in shares] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9, 10, 11],
    ]


def test_all_processes_stop_where_there_are_fewer_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(UsageError, match="2 and 1"), joined(torch.device("cuda")):
            pass


def test_a_process_alone_joins_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(torch.device("cpu")) as workers:
        assert workers == ALONE
        assert not dist.is_initialized()
        with workers.first_before_others():
            pass
        assert workers.total(torch.tensor(3.0)).item() == 3
