"""Runs that are stopped, killed or out of disk, and that go on."""

import contextlib
import io
import json
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from training import checkpoint, fit, run

Moment = Callable[[str], bool]
"""Whether a line of a run's stderr is the one to wait for."""


def hit(
    process: subprocess.Popen[str], number: signal.Signals, moment: Moment, wait: Callable[[], None]
) -> SimpleNamespace:
    """Send a signal after a line of stderr and a wait; the exit code and all lines of the run."""
    watchdog = threading.Timer(200, process.kill)
    watchdog.start()
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if moment(line):
                wait()
                process.send_signal(number)
                break
        lines += process.stderr.readlines()
        return SimpleNamespace(exit=process.wait(), lines=lines)
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stderr.close()


def run_here(arguments: list[str]) -> SimpleNamespace:
    """A run in this process, which saves the seconds that importing takes."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = fit.main(arguments)
    lines = stderr.getvalue().splitlines(keepends=True)
    return SimpleNamespace(exit=code, stdout=stdout.getvalue(), lines=lines)


def names(folder: Path) -> set[str]:
    """What is in the folder of a run, TensorBoard's events aside."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("events.out.")}


# Signals


@pytest.fixture(scope="module")
def interrupted(start_module, fit_arguments, tmp_path_factory) -> SimpleNamespace:
    """The run of ``finished``, stopped after its first epoch by SIGTERM and after its second by
    SIGINT, and resumed each time."""
    folder = tmp_path_factory.mktemp("runs") / "interrupted"
    arguments = [*fit_arguments, "--out", str(folder)]
    exits, said, unfinished = {}, {}, {}
    for epoch, number in {1: signal.SIGTERM, 2: signal.SIGINT}.items():
        life = hit(
            start_module("training.fit", *arguments, *(["--resume"] if epoch > 1 else [])),
            number,
            lambda line, epoch=epoch: line.startswith(f"epoch {epoch}:"),
            lambda: time.sleep(0.05),  # into the next epoch, somewhere
        )
        exits[number], said[number] = life.exit, life.lines
        unfinished[number] = not (folder / "weights.pt").exists()
    last = run_here([*arguments, "--resume"])
    assert last.exit == 0, last.lines
    return SimpleNamespace(
        folder=folder, exits=exits, said=said, unfinished=unfinished, last=last.lines
    )


@pytest.mark.slow
def test_signals_have_their_exit_codes(interrupted):
    assert interrupted.exits == {signal.SIGTERM: 143, signal.SIGINT: 130}
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
    starts = [interrupted.said[signal.SIGINT], interrupted.last]
    for epochs_done, lines in enumerate(starts, start=1):
        assert lines[0].startswith("resumed at step ")
        assert 6 * epochs_done <= int(lines[0].split()[3]) < 24


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(
    interrupted, finished, assert_identical
):
    found = checkpoint.load_weights(interrupted.folder)
    expected = checkpoint.load_weights(finished.folder)
    assert_identical(found.state, expected.state)
    assert torch.equal(found.mean, expected.mean)
    assert found.training == expected.training


@pytest.mark.slow
def test_a_resumed_run_has_the_same_history_and_result(interrupted, finished, untimed_history):
    assert untimed_history(interrupted.folder) == untimed_history(finished.folder)
    results = [
        json.loads((run.folder / "result.json").read_text()) for run in (interrupted, finished)
    ]
    assert results[0]["single centre view"] == results[1]["single centre view"]


# Kills


@pytest.fixture(scope="module")
def killed(start_module, fit_arguments, finished, tmp_path_factory) -> SimpleNamespace:
    """The run of ``finished``, killed at five random moments and once where it writes a checkpoint,
    and resumed each time."""
    folder = tmp_path_factory.mktemp("runs") / "killed"
    arguments = [*fit_arguments, "--out", str(folder)]
    began, ended = (
        (finished.folder / name).stat().st_mtime for name in ("config.json", "weights.pt")
    )
    epoch = (ended - began) / 4
    draw = random.Random(0)

    def introduced(line: str) -> bool:
        return " parameters, recipe " in line

    def finished_an_epoch(line: str) -> bool:
        return line.startswith("epoch ")

    def at_random() -> None:
        time.sleep(draw.uniform(0, 0.6 * epoch))

    def until_it_writes() -> None:
        def look() -> tuple[set[str], int]:
            return names(folder), (folder / "checkpoint.pt").stat().st_mtime_ns

        before, deadline = look(), time.monotonic() + 10 * epoch
        while look() == before and time.monotonic() < deadline:
            time.sleep(0.001)

    moments = [
        (introduced, at_random),
        (finished_an_epoch, at_random),
        (introduced, at_random),
        (finished_an_epoch, at_random),
        (introduced, at_random),
        (introduced, until_it_writes),
    ]
    lives = []
    for moment, wait in moments:
        # In the first epoch there is nothing yet to go on from.
        resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
        process = start_module("training.fit", *arguments, *resume)
        lives.append(hit(process, signal.SIGKILL, moment, wait))
    whole = checkpoint.load(folder / "checkpoint.pt")  # the write that was cut off did not harm it
    lives.append(run_here([*arguments, "--resume"]))
    assert lives[-1].exit == 0, lives[-1].lines
    return SimpleNamespace(folder=folder, lives=lives, step=whole["trainer"]["step"])


@pytest.mark.slow
def test_runs_were_killed_in_the_middle(killed):
    exits = [life.exit for life in killed.lives[:-1]]
    assert set(exits) <= {-signal.SIGKILL, 0}  # 0: the machine was faster this time
    assert exits.count(-signal.SIGKILL) >= 4
    assert killed.step >= 6


@pytest.mark.slow
def test_a_killed_run_loses_no_epoch_that_it_finished(killed):
    done = 0
    for life in killed.lives:
        resumed = [line for line in life.lines if line.startswith("resumed at step ")]
        step = int(resumed[0].split()[3]) if resumed else 0
        # At least what it said it had done; at most one epoch more, saved but not yet said.
        assert 6 * done <= step <= 6 * (done + 1)
        assert step % 6 == 0
        epochs = [line for line in life.lines if line.startswith("epoch ")]
        done = step // 6 + len(epochs)
    assert done == 4


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights_to_the_bit(
    killed, finished, untimed_history, assert_identical
):
    found = checkpoint.load_weights(killed.folder)
    expected = checkpoint.load_weights(finished.folder)
    assert_identical(found.state, expected.state)
    assert found.training == expected.training
    assert untimed_history(killed.folder) == untimed_history(finished.folder)


@pytest.mark.slow
def test_nothing_half_written_is_left_of_a_killed_run(killed, finished):
    assert names(killed.folder) == names(finished.folder)


# A time limit


@pytest.fixture(scope="module")
def sliced(fit_arguments, tmp_path_factory) -> SimpleNamespace:
    """The run of ``finished`` in slices of limited time, the first of which is over at once."""
    folder = tmp_path_factory.mktemp("runs") / "sliced"
    arguments = [*fit_arguments, "--out", str(folder)]
    slices: list[SimpleNamespace] = []
    while not (folder / "weights.pt").exists():
        # Longer every time, so that there is an end on any machine.
        resume = ["--resume"] if slices else []
        part = run_here([*arguments, *resume, "--time-limit", str(0.4 * len(slices))])
        part.left = names(folder)
        slices.append(part)
        assert len(slices) < 50
    return SimpleNamespace(folder=folder, slices=slices)


@pytest.mark.slow
def test_a_time_limit_is_no_failure(sliced):
    assert len(sliced.slices) >= 3
    assert [part.exit for part in sliced.slices] == [0] * len(sliced.slices)


@pytest.mark.slow
def test_a_run_out_of_time_leaves_a_checkpoint_and_no_weights(sliced):
    for part in sliced.slices[:-1]:
        assert "checkpoint.pt" in part.left
        assert part.left.isdisjoint({"weights.pt", "result.json"})
        assert not any(name.endswith(".partial") for name in part.left)
        assert part.stdout == ""
    # Without the limit nothing else would be there.
    assert sliced.slices[0].left == {"config.json", "checkpoint.pt"}


@pytest.mark.slow
def test_a_run_out_of_time_says_so_in_one_line(sliced):
    for part in sliced.slices[:-1]:
        assert [line for line in part.lines if line.startswith("training.fit:")] == part.lines[-1:]
        assert part.lines[-1].startswith("training.fit: time limit reached at step ")
        assert str(sliced.folder) in part.lines[-1]
        assert "--resume" in part.lines[-1]
    assert "training.fit: time limit reached at step 0 of 24; " in sliced.slices[0].lines[-1]
    assert not any("time limit" in line for line in sliced.slices[-1].lines)


@pytest.mark.slow
def test_every_slice_goes_on_at_the_step_where_the_last_one_ended(sliced):
    ended = 0
    for part in sliced.slices[1:]:
        assert part.lines[0] == f"resumed at step {ended} of 24\n"
        if part is not sliced.slices[-1]:
            ended = int(part.lines[-1].partition("at step ")[2].split()[0])
            assert ended < 24
    assert sliced.slices[-1].stdout.startswith("inception, single centre view: ")


@pytest.mark.slow
def test_a_run_in_slices_ends_with_the_same_weights_to_the_bit(
    sliced, finished, untimed_history, assert_identical
):
    found = checkpoint.load_weights(sliced.folder)
    expected = checkpoint.load_weights(finished.folder)
    assert_identical(found.state, expected.state)
    assert found.training == expected.training
    assert untimed_history(sliced.folder) == untimed_history(finished.folder)


@pytest.mark.slow
def test_the_weights_name_the_commit_that_their_run_began_with(
    fit_arguments, tmp_path, monkeypatch
):
    arguments = [*fit_arguments, "--out", str(tmp_path)]
    # Another commit every time it is asked for, as of a checkout that is worked on meanwhile.
    commits = iter(["a1a1a1", "b2b2b2", "c3c3c3", "d4d4d4"])
    monkeypatch.setattr(run, "_commit", lambda: next(commits))
    assert run_here([*arguments, "--time-limit", "0"]).exit == 0
    assert run_here([*arguments, "--resume"]).exit == 0
    recorded = json.loads((tmp_path / "config.json").read_text())["environment"]["commit"]
    assert recorded == "a1a1a1"
    assert checkpoint.load_weights(tmp_path).training.commit == recorded


# A full disk


def check_failed_write(result: subprocess.CompletedProcess[str], file: Path) -> None:
    """That a run ended with one line about a file that it could not write, and left no part."""
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("training.fit:")] == lines[-1:]
    assert str(file) in lines[-1]
    assert file.parent.is_dir()
    assert [path.name for path in file.parent.iterdir() if "partial" in path.name] == []


@pytest.fixture
def begun(fit_arguments, tmp_path, capsys) -> Path:
    """The folder of a run with a checkpoint of its first step."""
    folder = tmp_path / "run"
    assert fit.main([*fit_arguments, "--out", str(folder), "--time-limit", "0"]) == 0
    capsys.readouterr()
    return folder


@pytest.mark.slow
def test_where_a_checkpoint_cannot_be_written_the_old_one_stays(
    begun, run_on_a_full_disk, fit_arguments
):
    path = begun / "checkpoint.pt"
    before = path.read_bytes()
    assert len(before) > 2_000_000
    arguments = [*fit_arguments, "--out", begun, "--resume"]
    result = run_on_a_full_disk(2_000_000, "training.fit", *arguments)
    assert "resumed at step 0 of 24" in result.stderr
    check_failed_write(result, path)
    assert path.read_bytes() == before
    assert checkpoint.load(path)["trainer"]["step"] == 0


@pytest.mark.slow
def test_where_the_weights_cannot_be_written_the_run_can_go_on(
    finished, run_on_a_full_disk, fit_arguments, tmp_path, assert_identical
):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    (folder / "weights.pt").unlink()
    before = (folder / "checkpoint.pt").read_bytes()
    arguments = [*fit_arguments, "--out", str(folder), "--resume"]
    result = run_on_a_full_disk(500_000, "training.fit", *arguments)
    check_failed_write(result, folder / "weights.pt")
    assert result.stdout == ""
    assert not (folder / "weights.pt").exists()
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert fit.main(arguments) == 0
    assert_identical(
        checkpoint.load_weights(folder).state, checkpoint.load_weights(finished.folder).state
    )


@pytest.mark.slow
@pytest.mark.usefixtures("finished")  # for which the images were decoded
def test_a_run_that_cannot_even_write_its_config_does_not_begin(
    run_on_a_full_disk, fit_arguments, tmp_path
):
    folder = tmp_path / "run"
    result = run_on_a_full_disk(100, "training.fit", *fit_arguments, "--out", folder)
    check_failed_write(result, folder / "config.json")
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_where_the_decoded_images_cannot_be_written_the_cache_stays_empty(
    folders, run_on_a_full_disk, tmp_path
):
    arguments = ["--arch", "inception", "--data", folders, "--out", tmp_path / "run"]
    result = run_on_a_full_disk(10_000, "training.fit", *arguments, "--device", "cpu")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1
    assert line.startswith("training.fit: ")
    cache = folders / ".tinyserve-cache"
    assert str(cache) in line
    assert list(cache.iterdir()) == []


# Going on with a run


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(
    finished, fit_arguments, tmp_path, history, assert_identical
):
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
        (["--recipe", "modern"], "recipe.name was 'cpu', is 'modern'"),
        (["--lr", "0.01"], "recipe.lr was 0.05, is 0.01"),
        (["--arch", "resnet20"], "arch was 'inception', is 'resnet20'"),
        (["--limit-train", "20"], "limit_train was None, is 20"),
        (["--precision", "bf16"], "precision was 'fp32', is 'bf16'"),
        (["--holdout", "5"], "holdout was 0, is 5"),
        (["--image-size", "32"], "image_size was 64, is 32"),
        (["--set", "label_smoothing=0"], "label_smoothing"),
    ],
)
def test_a_run_goes_on_only_as_it_began(finished, fit_arguments, change, words, check_one_line):
    before = (finished.folder / "checkpoint.pt").read_bytes()
    code = fit.main([*fit_arguments, "--out", str(finished.folder), "--resume", *change])
    assert code == 2
    check_one_line(words)
    assert (finished.folder / "checkpoint.pt").read_bytes() == before


@pytest.mark.slow
def test_a_run_goes_on_only_with_its_data(finished, fit_arguments, folders, check_one_line):
    arguments = [*fit_arguments, "--out", str(finished.folder), "--resume", "--data", str(folders)]
    assert fit.main(arguments) == 2
    check_one_line("are not those that it began with")


@pytest.mark.slow
def test_a_run_is_not_started_over_by_accident(finished, fit_arguments, check_one_line):
    before = {path: path.stat().st_mtime_ns for path in finished.folder.iterdir()}
    assert fit.main([*fit_arguments, "--out", str(finished.folder)]) == 2
    check_one_line("--resume goes on with it")
    assert {path: path.stat().st_mtime_ns for path in finished.folder.iterdir()} == before
