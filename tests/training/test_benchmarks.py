"""The scripts in benchmarks/ run, on a few pictures."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tinyserve.modelfile import find_model

ROOT = Path(__file__).resolve().parents[2]


def run(command: list[object], **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    one_thread = {"OMP_NUM_THREADS": "1", "TINYSERVE_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **one_thread, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_every_run_of_the_paper_is_made_kept_and_reported(photos, tmp_path):
    places = {
        "RUNS": str(tmp_path / "runs"),
        "RECORDS": str(tmp_path / "records"),
        "RESULTS": str(tmp_path / "RESULTS.md"),
        "FIGURES": str(tmp_path / "figures"),
    }
    command = [ROOT / "benchmarks" / "train_all.sh", "paper", "--", "--data", photos]
    command += ["--epochs", "1", "--batch-size", "9"]
    stopped = run(command, **places, TIME_LIMIT="0")
    assert (stopped.returncode, stopped.stdout) == (0, "out of time before resnet20-paper\n")
    done = run(command, **places)
    assert done.returncode == 0, done.stderr
    names = {f"{arch}-paper" for arch in ("baseline", "alexnet", "inception", "resnet20")}
    assert {path.name for path in (tmp_path / "records").iterdir()} == names
    report = (tmp_path / "RESULTS.md").read_text()
    assert all(f"`{name}`" in report for name in names)
    shutil.rmtree(tmp_path / "runs")
    again = run(command, **places)
    assert again.returncode == 0
    assert "epoch 1" not in again.stderr  # what is done stays as it is
    assert again.stdout.count(f"done, its record is {tmp_path / 'records'}") == 4


def test_runs_whose_teachers_weights_are_gone_are_left_out_aloud(tmp_path):
    script = ROOT / "benchmarks" / "train_all.sh"
    teacher = tmp_path / "records" / "resnet20-modern"
    teacher.mkdir(parents=True)
    (teacher / "result.json").touch()
    places = {"RUNS": str(tmp_path / "runs"), "RECORDS": str(tmp_path / "records")}
    found = run([script, "modern", "paper", "--", "--epochs", "1"], **places, PYTHON="echo")
    assert found.returncode == 0
    weights = tmp_path / "runs" / "resnet20-modern" / "weights.pt"
    for name in ("inception-modern", "alexnet-modern", "baseline-modern", "resnet20-distilled"):
        assert (
            f"{name} is left out: its teacher's weights ({weights}) are gone; remove {teacher} to "
            "train it again\n"
        ) in found.stderr
    assert "out of time in resnet20-paper" in found.stdout  # the first that can be run


def test_runs_with_arguments_of_ones_own_are_kept_apart(tmp_path):
    script = ROOT / "benchmarks" / "train_all.sh"
    folders = set()
    for more in ([], ["--", "--epochs", "1"], ["--", "--epochs", "2"]):
        found = run([script, "paper", *more], PYTHON="echo", RECORDS=str(tmp_path))
        assert found.returncode == 0
        folders |= set(re.findall(r"--out (\S+)/resnet20-paper", found.stdout))
    assert len(folders) == 3
    assert "runs" in folders


def test_a_run_that_fails_stops_no_other(tmp_path):
    places = {"RUNS": str(tmp_path), "RECORDS": str(tmp_path), "PYTHON": str(tmp_path / "python")}
    script = ROOT / "benchmarks" / "train_all.sh"
    for code, names in ((3, ["resnet20", "inception", "alexnet", "baseline"]), (130, ["resnet20"])):
        stub = f'#!/bin/sh\n[ "$2" = training.fit ] || exit 1\necho "$@"\nexit {code}\n'
        (tmp_path / "python").write_text(stub)
        (tmp_path / "python").chmod(0o755)
        found = run([script, "paper"], **places)
        assert found.returncode == code
        assert re.findall(r"--arch (\w+)", found.stdout) == names


def test_groups_of_runs_are_named():
    for arguments in ([], ["imagenet"], ["paper", "imagenet"]):
        found = run([ROOT / "benchmarks" / "train_all.sh", *arguments], PYTHON="echo")
        assert (found.returncode, found.stdout) == (2, "")
        assert "modern, paper, paper5, precision" in found.stderr


@pytest.mark.slow
def test_training_speed_is_printed_with_ratios(photos):
    command = [sys.executable, ROOT / "benchmarks" / "training_speed.py", "--data", photos]
    found = run([*command, "--arch", "baseline", "-b", "9", "--steps", "1", "--rounds", "2"])
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("of the limit") == 3
    assert "GFLOP an image" in found.stdout


@pytest.mark.slow
def test_training_speed_counts_the_images_of_batches_that_are_made(photos, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    speed = importlib.import_module("training_speed")
    monkeypatch.setattr(speed, "seconds", lambda _trainer, steps: float(steps))
    arguments = ["--arch", "baseline", "-b", "500", "-j", "0", "--steps", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["training_speed.py", "--data", str(photos), *arguments])
    speed.main()
    said = capsys.readouterr().out
    assert "batches of 27, " in said  # all that there are
    assert len(re.findall(r" 27 images/s +1\.00 of the limit", said)) == 3


@pytest.mark.slow
def test_inference_speed_is_printed_with_ratios_and_by_node():
    script, model = ROOT / "benchmarks" / "inference_speed.py", find_model("baseline")
    command = [sys.executable, script, model, "-b", "2", "--rounds", "2"]
    found = run([*command, "--with-fp32", "--with-pytorch", "--profile"])
    assert found.returncode == 0, found.stderr
    title, fp32, *others = found.stdout.splitlines()
    assert title == "batches of 2, 1 threads, medians of 2 rounds"
    assert re.fullmatch(r"baseline.onnx +fp32 +CPU .+ images/s +1.00", fp32)
    for name, count in {
        r"baseline.int8.onnx +int8": {1},
        r"  PyTorch, eager +fp32": {2},
        r"  PyTorch, compiled +fp32": {0, 2},  # where there is a C++ compiler
    }.items():
        row = re.compile(rf"{name} +CPU .+ images/s +\d+\.\d\d")
        assert sum(bool(row.fullmatch(line)) for line in others) in count
    assert "float [2, 3, 56, 56] -> float [2, 16, 56, 56]" in found.stdout
    assert any(re.fullmatch(r"QGemm +1 nodes +.+ ms +.+%", line) for line in others)


@pytest.mark.slow
def test_classify_is_printed_beside_its_session_a_peer_and_ten_lines(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "classify.py", "--models", "inception"]
    command += ["--rounds", "1", "--candidates", "0", "--peers", "torch", "--limit", "8"]
    command += ["--parts", "files,cold,memory", "--seconds", "0.05", "--memory-inputs", "5", "10"]
    found = run([*command, "--json", tmp_path / "found.json"])
    assert found.returncode == 0, found.stderr
    assert "left out" not in found.stderr
    document = json.loads((tmp_path / "found.json").read_text())
    rows = {(row["name"], row["settings"]): row for row in document["speeds"][0]["contenders"]}
    assert len(rows) == 6
    assert rows["tinyserve", "default"]["images"] == 40
    assert rows["torch", "fastest"]["images"] == 8
    # The peer runs the same network on the same pictures, and rounds otherwise: to inception no two
    # classes are as good as equal in any of them, as they are to baseline.
    assert rows["torch", "default"]["same_top1_as_ours"] == 1
    assert [row["name"] for row in document["cold"]][-1] == "ten lines"
    assert [row["inputs"] for row in document["memory"]] == [5, 10]
    assert all(f"ours, {settings}: " in found.stdout for settings in ("default", "fastest"))


@pytest.mark.slow
def test_serving_is_printed_beside_the_model_alone_of_a_file_too():
    script, model = ROOT / "benchmarks" / "serving.py", find_model("inception")
    found = run([sys.executable, script, model, "--connections", "1", "--seconds", "0.2"])
    assert found.returncode == 0, found.stderr
    assert re.search(r"^ +1 connections: .+ of the model alone", found.stdout, re.M)


NOT_FOUND = """
import http.server
server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
print(f"listening on 127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peer", "words"),
    [
        (None, "peer does not run: No such file or directory"),
        ("raise ImportError('no litserve')", "does not start: ImportError: no litserve"),
        ("print('listening on 127.0.0.1:1'); exit('no room')", "does not start: no room"),
        (NOT_FOUND, "the server answers 501: "),
    ],
    ids=["not there", "without LitServe", "ends at once", "refuses"],
)
def test_a_peer_that_does_not_serve_is_one_line(tmp_path, peer, words):
    python = tmp_path / "peer"
    if peer is not None:
        python.write_text(f"#!{sys.executable}\n{peer}")
        python.chmod(0o755)
    script = ROOT / "benchmarks" / "serving.py"
    found = run([sys.executable, script, "baseline", "--litserve", python, "--connections", "1"])
    assert found.returncode == 1
    (line,) = found.stderr.splitlines()
    assert words in line


PEER = """#!{python}
import json, sys
with open(sys.argv[sys.argv.index("--rows") + 1], "w") as rows:
    rows.write("000000.JPEG,0")
print(json.dumps({{"images": 1, "images_per_second": 1 if "-b" in sys.argv else 9}}))
"""


@pytest.mark.slow
def test_the_fastest_settings_of_a_peer_may_be_its_defaults(tmp_path, samples):
    peer = tmp_path / "peer"
    peer.write_text(PEER.format(python=sys.executable))
    peer.chmod(0o755)
    command = [sys.executable, ROOT / "benchmarks" / "classify.py", "--models", "baseline"]
    command += ["--data", samples / "goldfish", "--limit", "1", "--parts", "files", "--rounds", "1"]
    command += ["--peers", "torch", "--peer-python", peer, "--seconds", "0.02", "--candidates", "1"]
    found = run([*command, "--json", tmp_path / "found.json"])
    assert found.returncode == 0, found.stderr
    document = json.loads((tmp_path / "found.json").read_text())
    fastest = document["speeds"][0]["contenders"][-1]
    assert (fastest["name"], fastest["settings"], fastest["options"]) == ("torch", "fastest", "")


@pytest.mark.slow
def test_a_peer_that_does_not_run_is_left_out_aloud():
    command = [sys.executable, ROOT / "benchmarks" / "classify.py", "--models", "baseline"]
    command += ["--rounds", "1", "--peers", "huggingface", "--peer-python", "/no/such/python"]
    found = run([*command, "--parts", "files", "--seconds", "0.02"])
    assert found.returncode == 0, found.stderr
    assert "huggingface is left out" in found.stderr
    assert "tinyserve, default" in found.stdout
