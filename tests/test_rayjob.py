"""Jobs on a Ray cluster: the rows are those of one machine, whatever happens to the machines."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

import tinyserve
from tinyserve import rayjob
from tinyserve.dataset import find_inputs
from tinyserve.errors import DeviceError, ModelFileError, UsageError
from tinyserve.modelfile import find_model
from tinyserve.report import Tally

# Ray's own; it sets what it warns of.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

COMMAND = (sys.executable, "-m", "tinyserve.cli", "classify", "-m", "resnet20", "--device", "cpu")

PACKAGE = str(Path(tinyserve.__file__).parent.parent)

JOB = rayjob.Job(
    model="resnet20", precision="auto", device="cpu", format="jsonl", k=5, batch_size=8, workers=1,
    self_test=True,
)  # fmt: skip


def classify(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": PACKAGE},
        capture_output=True, encoding="utf-8", timeout=300, **options,
    )  # fmt: skip


def rows_of(*paths: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(paths) for line in path.read_text().splitlines()]


def same_rows(found: list[dict], expected: list[dict]) -> bool:
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        for prediction, model in zip(row["predictions"], other["predictions"], strict=True):
            assert prediction.pop("probability") == pytest.approx(
                model.pop("probability"), abs=1e-5
            )
        assert row == other
    return True


@pytest.fixture(scope="module")
def cluster():
    """Ray on two nodes of this machine, each with one CPU."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", PACKAGE)  # which the workers are to find, however the tests did
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        cluster.add_node(**node)
        cluster.wait_for_nodes()
        yield cluster
        cluster.shutdown()


@pytest.fixture
def many(samples, tmp_path) -> Path:
    """A folder of 600 pictures that are links to the samples, and a file that is none."""
    folder = tmp_path / "many"
    folder.mkdir()
    pictures = sorted(samples.rglob("*.JPEG"))
    for number in range(600):
        (folder / f"{number}.jpg").symlink_to(pictures[number % 40])
    (folder / "broken.jpg").write_text("no picture")
    return folder


@pytest.mark.slow
def test_the_rows_are_those_of_one_machine(cluster, samples, tmp_path):
    shutil.copytree(samples, tmp_path / "in")
    (tmp_path / "in" / "goldfish" / "broken.jpg").write_text("no picture")
    here = classify("in", "-o", "here.jsonl", "--summary", "here.json", cwd=tmp_path)
    assert here.returncode == 3, here.stderr
    (tmp_path / "there").mkdir()
    there = classify(
        "in", "-o", "there", "--ray", cluster.address, "--summary", "there.json", cwd=tmp_path
    )
    assert there.returncode == 3, there.stderr
    (part,) = (tmp_path / "there").iterdir()
    assert part.name == "part-000000.jsonl"
    assert same_rows(rows_of(part), rows_of(tmp_path / "here.jsonl"))
    summaries = [json.loads((tmp_path / name).read_text()) for name in ("here.json", "there.json")]
    for summary in summaries:
        del summary["seconds"], summary["images_per_second"]
    assert summaries[0] == summaries[1]
    assert there.stderr.splitlines()[-1] == here.stderr.splitlines()[-1]
    # A second job does not mix its rows with those of the first.
    again = classify("in", "-o", "there", "--ray", cluster.address, cwd=tmp_path)
    assert again.returncode == 2
    assert "there is not empty" in again.stderr


@pytest.mark.slow
def test_what_cannot_be_listed_on_stdin_is_the_row_of_one_machine(cluster, samples, tmp_path):
    lines = f"nowhere://x\n{samples}/goldfish\n{tmp_path.as_uri()}/nothing\n"
    here = classify("-", "-o", tmp_path / "here.jsonl", input=lines)
    assert here.returncode == 3, here.stderr
    there = classify("-", "-o", tmp_path / "there", "--ray", cluster.address, input=lines)
    assert there.returncode == 3, there.stderr
    rows = rows_of(*(tmp_path / "there").iterdir())
    assert [row["status"] for row in rows] == ["error", "ok", "ok", "error"]
    assert same_rows(rows, rows_of(tmp_path / "here.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "cut.onnx"}, ModelFileError, "no ONNX model"),
        ({"model": "mine.onnx", "precision": "fp16"}, UsageError, "^mine.onnx is of int8, not"),
        ({"device": "cuda"}, DeviceError, "no machine of the Ray cluster has a GPU"),
        ({"workers": 64}, UsageError, "no machine of the Ray cluster has 64 CPUs"),
    ],
)
def test_what_the_machines_cannot_do(cluster, samples, tmp_path, monkeypatch, change, error, words):
    monkeypatch.chdir(tmp_path)
    Path("cut.onnx").write_bytes(b"no model")
    Path("mine.onnx").symlink_to(find_model("inception"))
    job = dataclasses.replace(JOB, **change)
    inputs = list(find_inputs([str(samples)]))
    with pytest.raises(error, match=words) as raised:
        list(rayjob.classify(job, inputs, "out", address=cluster.address))
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_machine_dies_half_way_and_the_rows_are_complete(cluster, many, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    here = classify(many, "-o", tmp_path / "here.parquet")
    assert here.returncode == 3, here.stderr
    inputs = list(find_inputs([str(many)]))
    tally = Tally()
    mortal = next(iter(cluster.worker_nodes))
    done, killed_after = [], 0
    job = dataclasses.replace(JOB, format="parquet")
    out = tmp_path / "out"
    for part in rayjob.classify(job, inputs, str(out), address=cluster.address, part=20):
        tally.merge(part.tally)
        done.append(part)
        # Once it has shown that it is at work.
        if not killed_after and part.node == mortal.node_id:
            cluster.remove_node(mortal, allow_graceful=False)
            killed_after = len(done)
    assert 0 < killed_after < 25
    assert sorted(part.number for part in done) == list(range(31))
    assert {part.node for part in done} == {mortal.node_id, cluster.head_node.node_id}
    assert (tally.inputs, tally.failed) == (601, 1)
    rows = [row for path in sorted(out.iterdir()) for row in parquet.read_table(path).to_pylist()]
    assert same_rows(rows, parquet.read_table(tmp_path / "here.parquet").to_pylist())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "-o, a folder"),
        (["-o", "out", "--resume"], "--ray goes without --resume"),
        (["-o", "out", "--min-confidence", "0"], "--ray goes without --min-confidence"),
        (["-o", "out", "--format", "csv"], "rows are jsonl or parquet, not csv"),
        (["-o", "full"], "full is not empty"),
        (["photos.zip", "-o", "out"], "unpack the archive of photos.zip/cat/1.jpg first"),
    ],
)
def test_what_cannot_be_done_with_ray_says_so(samples, tmp_path, arguments, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "rows.jsonl").touch()
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(next(samples.glob("*/*.JPEG")), "cat/1.jpg")
    run = classify(samples, *arguments, "--ray", cwd=tmp_path)
    assert run.returncode == 2, run.stderr
    (line,) = run.stderr.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("greeting", "words"),
    [(None, "refused"), (b"HTTP/1.0 400 Bad\r\n\r\n", "not a Ray cluster"), (b"", "not a Ray")],
    ids=["nobody", "a web server", "a server that hangs up"],
)
def test_an_address_where_no_ray_listens_is_said_at_once(tmp_path, greeting, words):
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = "127.0.0.1:{1}".format(*server.getsockname())

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(greeting)

        if greeting is None:
            server.close()
        else:
            threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UsageError, match=f"cannot reach Ray at {address}: .*{words}"):
            next(rayjob.classify(JOB, [], str(tmp_path), address=address))


def test_a_client_of_ray_is_refused(tmp_path):
    with pytest.raises(UsageError, match="give HOST:PORT or auto"):
        next(rayjob.classify(JOB, [], str(tmp_path), address="ray://127.0.0.1:10001"))
