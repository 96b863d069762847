"""`tinyserve bench`: its figures belong together, and `classify --tuned` uses the best settings."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tinyserve import bench
from tinyserve.errors import DeviceError
from tinyserve.modelfile import find_model


@pytest.fixture
def tinyserve(tmp_path):
    def run(*arguments) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "tinyserve.cli", *map(str, arguments)],
            capture_output=True, text=True, timeout=300,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        )  # fmt: skip

    return run


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copy(find_model("baseline", ("int8",)), tmp_path / "mine.onnx"))


@pytest.mark.parametrize("streams", [1, 3])
def test_all_images_that_were_begun_count(monkeypatch, streams):
    now = 0.0

    def classify_many(paths, batch_size):
        """The streams are as fast as one, a tenth of a second a batch, and give nothing earlier."""
        nonlocal now
        done = []
        for path in paths:
            done.append(path)
            if len(done) % batch_size == 0:
                now += 0.1
        yield from done

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now)
    stub = SimpleNamespace(engine=SimpleNamespace(streams=streams), classify_many=classify_many)
    assert bench._files(stub, ["a", "b", "c"], 4, seconds=1.05) == pytest.approx(40)


def test_a_stream_that_starts_late_runs_once():
    engine = SimpleNamespace(streams=2, run=lambda _: None)
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    assert bench._session(SimpleNamespace(engine=engine), pixels, 4, seconds=0) > 0


def test_what_goes_wrong_in_a_stream_is_not_a_speed_of_nothing():
    def run(_):
        raise DeviceError("gone")

    # The first call, which warms up, is still well.
    calls = iter([lambda _: None, run, run])
    engine = SimpleNamespace(streams=2, run=lambda batch: next(calls)(batch))
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    with pytest.raises(DeviceError, match="gone"):
        bench._session(SimpleNamespace(engine=engine), pixels, 4, seconds=0)


@pytest.mark.slow
def test_every_installed_file_is_measured(tinyserve, tmp_path, monkeypatch):
    for name in ("baseline.onnx", "baseline.int8.onnx"):  # as if of fp32, and in 8 bits
        shutil.copy(find_model("baseline", ("int8",)), tmp_path / name)
    monkeypatch.setenv("TINYSERVE_MODELS", str(tmp_path))
    run = tinyserve("bench", "--device", "cpu", "-j", 1, "-b", 1, "--seconds", 0.02, "--json")
    files = [Path(row["file"]).name for row in json.loads(run.stdout)]
    assert files == ["baseline.int8.onnx", "baseline.onnx"]


@pytest.mark.slow
def test_batches_that_no_memory_holds_are_one_line(tinyserve, model):
    run = tinyserve("bench", "-m", model, "-j", 1, "-b", 10**14, "--seconds", 0.01)
    assert (run.returncode, run.stdout) == (2, "")
    (line,) = run.stderr.splitlines()
    assert f"{model} with 1 workers and batches of up to 100,000,000,000,000 ended early" in line


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_a_measuring_process_that_is_killed_is_one_line(model, tmp_path):
    command = [sys.executable, "-m", "tinyserve.cli", "bench", "-m", model, "-j", "1"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(
        [*command, "--seconds", "60"], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        measuring = None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        end = time.monotonic() + 60
        while measuring is None and time.monotonic() < end:
            for child in children.read_text().split():
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    measuring = int(child)
            time.sleep(0.05)
        os.kill(measuring, signal.SIGKILL)
        (line,) = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 2
    assert "ended early" in line


@pytest.mark.slow
def test_the_fastest_settings_are_measured_and_used(tinyserve, model, samples, tmp_path):
    settings = ("--device", "cpu", "-j", 1, "-j", 2, "-b", 256, 1, "--seconds", 0.1)
    run = tinyserve("bench", "-m", model, *settings, "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert [(row["settings"]["workers"], row["settings"]["batch_size"]) for row in found] == [
        (1, 1), (1, 256), (2, 1), (2, 256)
    ]  # fmt: skip
    for row in found:
        assert row["provider"] == "CPUExecutionProvider"
        assert row["session"] > 0 and row["end_to_end"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["p50_ms"] < 1000 * row["cold_start"]
        assert 50e6 < row["peak_bytes"] < 2e9
    for small, large in (found[:2], found[2:]):
        assert large["peak_bytes"] > small["peak_bytes"] + 2**20
    (kept,) = json.loads((tmp_path / "cache" / "tinyserve" / "tuned.json").read_text()).values()
    assert kept == max(found, key=lambda row: row["end_to_end"])["settings"]
    assert str(tmp_path / "cache") in run.stderr

    assert tinyserve("classify", samples, "-m", model, "--tuned").returncode == 0
    os.utime(model, (1, 1))
    run = tinyserve("classify", samples, "-m", model, "--tuned")
    assert run.returncode == 2
    assert f"no settings were measured for {model}; run: tinyserve bench -m {model}" in run.stderr


def test_settings_are_not_asked_for_of_a_file_that_is_not_there(tinyserve, samples, tmp_path):
    run = tinyserve("classify", samples, "-m", tmp_path / "none.onnx", "--tuned")
    assert run.returncode == 1
    assert run.stderr == f"tinyserve: no such model file: {tmp_path / 'none.onnx'}\n"


@pytest.mark.slow
def test_the_table_marks_the_fastest_of_each_file(tinyserve, model):
    run = tinyserve("bench", "-m", model, "-j", 1, "-b", 1, 4, "--seconds", 0.05)
    header, *rows, legend = run.stdout.splitlines()
    assert header.split()[:4] == ["model", "device", "workers", "batch"]
    assert [row.split()[0] for row in rows] == ["mine", "mine"]
    assert sum("*" in row for row in rows) == 1
    assert legend.startswith("images/s")


def test_without_models_there_is_nothing_to_keep(tinyserve, tmp_path, monkeypatch):
    monkeypatch.setenv("TINYSERVE_MODELS", str(tmp_path))
    run = tinyserve("bench")
    assert (run.returncode, run.stdout) == (1, "")
    assert "no model files are installed" in run.stderr


def test_a_model_that_cannot_be_measured_is_one_line(tinyserve, tmp_path):
    (tmp_path / "text.onnx").write_text("no model")
    run = tinyserve("bench", "-m", tmp_path / "text.onnx")
    assert run.returncode == 1
    assert "no ONNX model" in run.stderr
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.slow
def test_what_was_measured_before_a_bad_file_is_shown_and_kept(tinyserve, model, tmp_path):
    (tmp_path / "text.onnx").write_text("no model")
    files = ("-m", model, "-m", tmp_path / "text.onnx")
    run = tinyserve("bench", *files, "-j", 1, "-b", 1, 2, "--seconds", 0.02, "--json")
    assert run.returncode == 1
    assert [row["settings"]["batch_size"] for row in json.loads(run.stdout)] == [1, 2]
    kept, error = run.stderr.splitlines()
    assert kept.startswith("kept for classify --tuned")
    assert "no ONNX model" in error
