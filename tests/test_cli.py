"""The commands as users run them: real processes, their output and exit codes."""

import csv
import dataclasses
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tinyserve import kept
from tinyserve.classifier import Classifier
from tinyserve.cli import _parser, main
from tinyserve.cli import classify as classify_command
from tinyserve.devices import openvino_problem
from tinyserve.engine import read_card
from tinyserve.modelfile import TaughtBy, find_model, write_model


def tinyserve(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tinyserve.cli", *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        timeout=300,
    )


def assert_one_line_and_no_traceback(run) -> None:
    assert "Traceback" not in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1, run.stderr


@pytest.fixture(scope="module")
def classified(samples) -> subprocess.CompletedProcess:
    return tinyserve("classify", samples, "-m", "inception", "--format", "jsonl", "--device", "cpu")


def test_jsonl_has_one_line_an_input_in_order(classified, samples):
    rows = [json.loads(line) for line in classified.stdout.splitlines()]
    assert classified.returncode == 0
    assert len(rows) == 40
    paths = [Path(row["path"]) for row in rows]
    assert set(paths) == set(samples.rglob("*.JPEG"))
    assert [path.parent for path in paths] == sorted(path.parent for path in paths)
    for row in rows:
        assert list(row) == [
            "path", "status", "error", "label", "rank", "correct", "version", "model",
            "predictions",
        ]  # fmt: skip
        assert row["status"] == "ok"
        assert row["error"] is None
        assert len(row["predictions"]) == 5
        assert list(row["predictions"][0]) == ["index", "wnid", "name", "probability"]
        assert row["correct"] is (row["predictions"][0]["wnid"] == row["label"])


def test_summary_agrees_with_the_rows(samples, tmp_path):
    run = tinyserve(
        "classify", samples, "-m", "inception", "--device", "cpu",
        "-o", tmp_path / "rows.jsonl", "--summary", tmp_path / "s.json",
    )  # fmt: skip
    assert run.stdout == ""
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "s.json").read_text())
    assert list(summary) == [
        "model", "precision", "provider", "inputs", "kept", "ok", "failed", "labelled",
        "top1", "top1_ci95", "top5", "top5_ci95", "seconds", "images_per_second", "unknown",
        "min_confidence", "coverage", "decided_labelled", "decided_top1", "decided_top1_ci95",
    ]  # fmt: skip
    top5 = [row["label"] in [p["wnid"] for p in row["predictions"]] for row in rows]
    assert summary["inputs"] == summary["ok"] == summary["labelled"] == 40
    assert summary["top1"] == sum(row["correct"] for row in rows) / 40
    assert summary["top5"] == sum(top5) / 40
    assert summary["top1_ci95"][0] <= summary["top1"] <= summary["top1_ci95"][1]
    assert summary["provider"] == "CPUExecutionProvider"
    assert f"({sum(row['correct'] for row in rows)} of 40 labelled" in run.stderr


def test_table_shows_every_input_and_marks_right_and_wrong(samples):
    run = tinyserve("classify", samples, "-m", "inception", "--device", "cpu")
    lines = run.stdout.splitlines()
    assert len(lines) == 40
    assert all(("✓" in line) != ("✗" in line) for line in lines)
    assert all(len(line) <= 120 and " % " in line for line in lines)


def test_csv_has_columns_for_every_prediction(samples):
    run = tinyserve(
        "classify", samples / "teapot", "-m", "inception", "--format", "csv", "-k", 2, "-b", 1
    )
    rows = list(csv.DictReader(io.StringIO(run.stdout)))
    assert len(rows) == 2
    columns = ["path", "status", "error", "label", "rank", "correct", "version", "model"]
    assert list(rows[0]) == columns + [
        f"{field}_{place}" for place in (1, 2) for field in ("index", "wnid", "name", "probability")
    ]
    assert float(rows[0]["probability_1"]) >= float(rows[0]["probability_2"])


def test_auto_says_why_it_runs_on_the_cpu_and_cuda_fails(samples):
    path = samples / "teapot"
    auto = tinyserve("classify", path, "-m", "inception")
    if "on CUDA" in auto.stderr:
        pytest.skip("CUDA works here")
    assert "running on the CPU: " in auto.stderr
    strict = tinyserve("classify", path, "-m", "inception", "--device", "cuda")
    assert strict.returncode == 5
    assert strict.stdout == ""
    assert_one_line_and_no_traceback(strict)


def make_odd_inputs(
    folder: Path, photo: bytes, picture: Image.Image, bomb: bytes
) -> tuple[set[str], set[str]]:
    """Every kind of difficult file; returns the names of the good ones and of the bad ones."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("L").save(folder / "grey.jpg")
    picture.save(folder / "rotated.jpg", exif=exif)
    picture.convert("RGBA").save(folder / "rgba.png")
    picture.convert("I;16").save(folder / "sixteen.png")
    picture.save(folder / "moving.gif", save_all=True, append_images=[picture.rotate(180)])
    (folder / "plain.jpg").write_bytes(photo)
    good = {path.name for path in folder.iterdir()}
    (folder / "text.jpg").write_text("no picture at all")
    (folder / "truncated.jpg").write_bytes(photo[: len(photo) // 2])
    (folder / "empty.jpg").touch()
    (folder / "bomb.png").write_bytes(bomb)
    return good, {path.name for path in folder.iterdir()} - good


def test_bad_inputs_are_named_and_good_ones_beside_them_classified(
    photo, picture, png_of_size, tmp_path
):
    folder = tmp_path / "odd"
    folder.mkdir()
    good, bad = make_odd_inputs(folder, photo.read_bytes(), picture, png_of_size(30_000, 30_000))
    run = tinyserve(
        "classify", folder, "-m", "inception", "--format", "jsonl", "--device", "cpu",
        "--summary", tmp_path / "s.json",
    )  # fmt: skip
    rows = {Path(row["path"]).name: row for row in map(json.loads, run.stdout.splitlines())}
    assert run.returncode == 3
    assert "Traceback" not in run.stderr
    assert {name for name, row in rows.items() if row["status"] == "ok"} == good
    assert {name for name, row in rows.items() if row["status"] == "error"} == bad
    for name in bad:
        assert rows[name]["error"]
        assert "\n" not in rows[name]["error"]
        assert rows[name]["predictions"] == []
    summary = json.loads((tmp_path / "s.json").read_text())
    assert (summary["inputs"], summary["ok"], summary["failed"]) == (11, 7, 4)
    assert summary["labelled"] == 0
    assert summary["top1"] is None


def test_failed_inputs_count_as_wrong(tmp_path):
    folder = tmp_path / "goldfish"
    folder.mkdir()
    (folder / "broken.jpg").write_text("no picture")
    run = tinyserve("classify", folder, "-m", "inception", "--summary", tmp_path / "s.json")
    summary = json.loads((tmp_path / "s.json").read_text())
    assert run.returncode == 3
    assert (summary["labelled"], summary["top1"], summary["top5"]) == (1, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["classify", "nowhere"], 1, "no such file or folder: nowhere"),
        (["classify", "EMPTY"], 1, "no images in"),
        (["classify", "SAMPLE", "-m", "vgg"], 1, "unknown model 'vgg' (known: "),
        (["classify", "SAMPLE", "-m", "TEXT.onnx"], 1, "no ONNX model"),
        (["classify", "SAMPLE", "-o", "nowhere/rows.csv", "--device", "cpu"], 1, "cannot write"),
        (["classify", "SAMPLE", "-o", "TEXT.jsonl", "--resume", "--device", "cpu"], 2, "no rows"),
        (["classify", "SAMPLE", "-o", "FLOAT.csv", "--resume", "--device", "cpu"], 2, "no rows"),
        (["classify", "BYTES"], 1, "val_annotations.txt: "),
        (["classify", "FOLDER"], 1, "val_annotations.txt: "),
        (["info", "vgg"], 1, "unknown model 'vgg' (known: "),
        (["info", "TEXT.onnx"], 1, "no ONNX model"),
    ],
)
def test_usage_errors_are_one_line(arguments, code, words, tmp_path, photo):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "TEXT.onnx").write_text("no model")
    (tmp_path / "TEXT.jsonl").write_text('{"predictions": []}\n')
    header = "path,status,error,label,rank,correct,version,model"
    (tmp_path / "FLOAT.csv").write_text(f"{header}\na.jpg,ok,,cat,0.0,True,1-1,x\n")
    for folder in ("BYTES", "FOLDER"):
        (tmp_path / folder / "images").mkdir(parents=True)
        shutil.copy(photo, tmp_path / folder / "images")
    (tmp_path / "BYTES" / "val_annotations.txt").write_bytes(b"val_0.JPEG\t\xff\n")
    (tmp_path / "FOLDER" / "val_annotations.txt").mkdir()
    places = {path.name: path for path in tmp_path.iterdir()} | {"SAMPLE": photo}
    run = tinyserve(*(places.get(argument, argument) for argument in arguments))
    assert run.returncode == code
    assert words in run.stderr
    assert run.stdout == ""
    assert_one_line_and_no_traceback(run)


def test_names_that_are_not_utf8_are_printed(photo, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    os.rename(photo, os.fsencode(folder) + b"/caf\xe9.jpg")
    for format_ in ("table", "csv", "jsonl"):
        run = tinyserve(
            "classify", folder, "-m", "inception", "--format", format_, "--device", "cpu"
        )
        assert run.returncode == 0, run.stderr
        assert "caf\\udce9.jpg" in run.stdout


def test_a_reader_that_leaves_early_is_no_error(samples):
    command = [sys.executable, "-m", "tinyserve.cli", "classify", str(samples), "-m", "inception"]
    with subprocess.Popen(
        [*command, "--format", "jsonl", "-b", "1", "-k", "200"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as run:  # fmt: skip
        run.stdout.readline()
        run.stdout.close()
        errors = run.stderr.read().decode()
        assert run.wait(timeout=60) == 0
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


def test_models_lists_what_is_there():
    run = tinyserve("models", "--json")
    rows = {row["model"]: row for row in json.loads(run.stdout)}
    assert run.returncode == 0
    assert {row["architecture"] for row in rows.values()} == {
        "baseline",
        "alexnet",
        "inception",
        "resnet20",
    }
    assert all(row["classes"] == 200 for row in rows.values())
    assert all(name.endswith(f".{row['precision']}") for name, row in rows.items())
    text = tinyserve("models").stdout
    assert all(name in text for name in rows)


def test_a_closed_stdout_is_no_traceback():
    command = f"exec {shlex.quote(sys.executable)} -m tinyserve.cli models >&-"
    run = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_closed_stderr_loses_no_rows(samples):
    command = f"exec {shlex.quote(sys.executable)} -m tinyserve.cli classify {samples}/goldfish"
    run = subprocess.run(
        ["sh", "-c", f"{command} --format jsonl 2>&-"], stdout=subprocess.PIPE, timeout=120
    )
    assert run.returncode == 0
    assert [json.loads(row)["status"] for row in run.stdout.splitlines()] == ["ok", "ok"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "tinyserve.cli", "labels", "resnet20"]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr == "tinyserve: No space left on device\n"


def test_a_summary_that_cannot_be_written_is_refused_before_the_work(samples, tmp_path):
    run = tinyserve("classify", samples, "--summary", tmp_path / "nowhere" / "s.json")
    assert (run.returncode, run.stdout) == (1, "")
    assert "there is no such folder" in run.stderr
    assert_one_line_and_no_traceback(run)


def test_models_goes_on_past_a_broken_one(tmp_path):
    (tmp_path / "broken.onnx").write_text("no model")
    (tmp_path / "inception.onnx").symlink_to(find_model("inception"))
    run = tinyserve("models", "--json", TINYSERVE_MODELS=str(tmp_path))
    assert run.returncode == 1
    assert [row["model"] for row in json.loads(run.stdout)] == ["inception"]
    assert "broken.onnx" in run.stderr
    assert_one_line_and_no_traceback(run)


def test_the_star_is_explained_where_there_is_one(tmp_path):
    assert "* what classify uses without -m" in tinyserve("models").stdout
    (tmp_path / "inception.onnx").symlink_to(find_model("inception"))
    assert "*" not in tinyserve("models", TINYSERVE_MODELS=str(tmp_path)).stdout


def test_info_prints_the_card():
    document = json.loads(tinyserve("info", "inception", "--json").stdout)
    assert document["format"] == 1
    assert len(document["labels"]) == 200
    assert document["evidence"][0]["val_images"] == 10_000
    assert document["golden"]["count"] == 8
    text = tinyserve("info", "inception").stdout
    assert "uint8 [batch, 64, 64, 3]" in text
    assert f"{document['parameters']:,} parameters" in text


@pytest.mark.parametrize("closed", ["<&- 2>&-", "<&- >&- 2>&-"])
def test_what_libraries_say_on_a_closed_stderr_is_not_among_the_rows(samples, tmp_path, closed):
    damaged = tmp_path / "damaged.tif"
    with Image.open(samples / "goldfish" / "val_68.JPEG") as picture:
        picture.convert("RGB").save(damaged, compression="tiff_lzw")
    content = bytearray(damaged.read_bytes())
    content[200:400] = bytes(200)  # of which libtiff complains, straight to descriptor 2
    damaged.write_bytes(content)
    output = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "tinyserve.cli", "classify", damaged, "-m", "inception"]
    line = f"{shlex.join(map(str, [*command, '--device', 'cpu', '-o', output]))} {closed}"
    assert subprocess.run(["bash", "-c", line], timeout=300, check=False).returncode == 3
    (row,) = output.read_text().splitlines()
    assert json.loads(row)["status"] == "error"


def test_a_reader_of_a_named_output_that_leaves_is_an_error(samples, tmp_path):
    os.mkfifo(tmp_path / "rows")
    with subprocess.Popen(["head", "-c", "10", tmp_path / "rows"], stdout=subprocess.DEVNULL):
        options = ("-m", "inception", "--device", "cpu", "-k", 200, "--format", "jsonl")
        run = tinyserve("classify", samples, *options, "-o", tmp_path / "rows")
    assert run.returncode == 1
    assert_one_line_and_no_traceback(run)
    assert f"cannot write {tmp_path / 'rows'}: Broken pipe" in run.stderr


def test_paths_from_a_folder_that_is_gone_are_rows(samples, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    paths = f"{samples / 'goldfish' / 'val_68.JPEG'}\nx.jpg\n"
    command = (
        f"cd {gone} && rmdir {gone} && {shlex.quote(sys.executable)} -m tinyserve.cli classify -"
    )
    run = subprocess.run(
        ["bash", "-c", f"{command} -m {find_model('inception')} --device cpu --format jsonl"],
        input=paths,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 3, run.stderr
    assert [json.loads(line)["status"] for line in run.stdout.splitlines()] == ["ok", "error"]


def test_nothing_is_kept_without_a_home(monkeypatch):
    for name, cache in (("HOME", "~"), ("XDG_CACHE_HOME", "relative")):
        monkeypatch.setenv(name, cache)
    assert kept.folder() == Path(os.devnull, "tinyserve")
    assert kept.read("self-tests.json") == {}
    with pytest.raises(OSError):
        kept.add("self-tests.json", {"a": 1})


def test_info_and_the_page_tell_where_weights_came_from(tmp_path):
    pytest.importorskip("gradio")
    from tinyserve.demo import model_cards

    taught = find_model("inception")
    card = read_card(taught)
    teachers = (
        TaughtBy(name="big.onnx 1f2e", architecture="resnet20", training=card.training),
        TaughtBy(name=f"my own.onnx {'3d4c' * 16}", architecture="other", training=None),
    )
    training = dataclasses.replace(card.training, initial=card.training, teachers=teachers)
    path = tmp_path / "taught.onnx"
    graph = taught.read_bytes()[: card.graph_bytes]
    write_model(path, graph, dataclasses.replace(card, training=training))
    lines = tinyserve("info", path).stdout.splitlines()
    found = [line.split(maxsplit=2)[2] for line in lines if line.startswith("taught by")]
    assert found[0].startswith("resnet20, big.onnx (1f2e), trained on tiny-imagenet-200, recipe ")
    assert found[1] == "other, my own.onnx (3d4c3d4c3d4c)"
    article = model_cards._card("taught", path)
    assert "<dt>taught by</dt><dd>resnet20, 100,000 images of tiny-imagenet-200" in article
    assert "; other</dd>" in article


def test_labels_are_printed_in_the_order_of_the_output():
    document = json.loads(tinyserve("labels", "inception", "--json").stdout)
    assert document == json.loads(tinyserve("info", "inception", "--json").stdout)["labels"]
    lines = tinyserve("labels", "inception").stdout.splitlines()
    assert lines[0].split() == ["0", "n01443537", "goldfish"]
    assert len(lines) == 200


def test_compare_prints_a_table_or_a_document(samples):
    command = ("compare", "inception", "baseline", "--data", str(samples), "--device", "cpu")
    run = tinyserve(*command)
    assert run.returncode == 0
    assert "A: inception" in run.stdout and "B: baseline" in run.stdout
    document = json.loads(tinyserve(*command, "--json").stdout)
    assert document["models"] == ["inception", "baseline"]
    assert f"{document['a']['correct']} of 40" in run.stdout
    assert 0 <= document["p_value"] <= 1


def test_compare_goes_on_past_a_broken_image_and_says_so(samples, tmp_path):
    folder = shutil.copytree(samples / "goldfish", tmp_path / "goldfish")
    (folder / "broken.jpg").touch()
    run = tinyserve("compare", "inception", "inception", "--data", str(tmp_path), "--device", "cpu")
    assert run.returncode == 3
    assert "1 images cannot be read" in run.stderr


COMMANDS = (
    *("classify", "models", "info", "labels", "verify", "compare", "bench", "doctor", "adopt"),
    *("triton", "serve"),
)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_says_what_the_command_does(command):
    run = tinyserve(*command, "--help")
    assert run.returncode == 0
    assert run.stdout.startswith("usage: tinyserve")


@pytest.mark.parametrize("command", [["serve"], ["bench"], ["triton", "repository"]])
def test_several_models_are_named_with_commas_or_one_by_one(command, tmp_path):
    path = tmp_path / "ours, and theirs.onnx"
    path.touch()
    given = ("-m", "baseline,inception", "-m", str(path), "-m", "resnet20")
    models = _parser(command[0]).parse_args([*command, *given]).model
    assert models == ["baseline", "inception", str(path), "resnet20"]


def test_a_job_that_is_not_listed_to_its_end_gets_all_the_workers(samples, monkeypatch, tmp_path):
    """Of an archive of photos only a part is in memory when the work is divided."""
    asked = []

    class Watched(Classifier):
        def __init__(self, *arguments, streams, **options):
            asked.append(streams)
            super().__init__(*arguments, streams=streams, **options)

    monkeypatch.setattr(classify_command, "Classifier", Watched)
    arguments = ("classify", samples, "-m", "baseline", "--device", "cpu", "-j", 5)
    for first, streams in ((40, 5), (39, 5), (1000, 2)):
        monkeypatch.setattr(classify_command, "_FIRST", first)
        size = 32 if first == 1000 else 1000
        output = tmp_path / f"{first}.jsonl"
        assert main([*map(str, arguments), "-b", str(size), "-o", str(output)]) == 0
        assert asked.pop() == streams
        assert len(output.read_text().splitlines()) == 40


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-errors", "few"], "must be a whole number, not 'few'"),
        (["--min-confidence", "high"], "must be a number, not 'high'"),
        (["--min-confidence", "1.5"], "must be from 0 to 1"),
        (["-k", "0"], "must be at least 1"),
    ],
)
def test_a_number_that_is_none_is_said_in_words(samples, arguments, words):
    run = tinyserve("classify", samples, *arguments)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].endswith(words)


def test_the_suffix_of_an_output_counts_in_any_case(samples, tmp_path):
    run = tinyserve(
        "classify", samples / "teapot", "-m", "baseline", "--device", "cpu",
        "-o", tmp_path / "ROWS.CSV",
    )  # fmt: skip
    assert run.returncode == 0
    assert len(list(csv.DictReader(io.StringIO((tmp_path / "ROWS.CSV").read_text())))) == 2


def test_a_summary_cannot_be_a_folder_and_stdin_must_be_open(samples, tmp_path):
    run = tinyserve("classify", samples, "--summary", tmp_path, "-o", tmp_path / "rows.jsonl")
    assert_one_line_and_no_traceback(run)
    assert not (tmp_path / "rows.jsonl").exists()
    command = [sys.executable, "-m", "tinyserve.cli", "classify", "-"]
    closed = subprocess.run(
        ["sh", "-c", f"{shlex.join(command)} <&-"], capture_output=True, text=True, timeout=60
    )
    assert_one_line_and_no_traceback(closed)
    assert (closed.returncode, closed.stderr) == (1, "tinyserve: stdin is closed\n")


def test_rows_are_json_whatever_the_terminal_can_show(samples, tmp_path):
    """In a terminal of ASCII a letter with an accent is escaped as JSON escapes it."""
    name = os.fsdecode("café ☕.jpg".encode() + b"\xff.jpg")
    shutil.copy(samples / "goldfish" / "val_68.JPEG", tmp_path / name)
    for encoding in ("ascii", "latin-1", "utf-8"):
        run = tinyserve(
            "classify", tmp_path, "-m", "baseline", "--device", "cpu", "--format", "jsonl",
            PYTHONIOENCODING=encoding,
        )  # fmt: skip
        assert json.loads(run.stdout)["path"] == str(tmp_path / name)


def test_what_pillow_finds_odd_is_not_said(samples, tmp_path):
    data = (samples / "goldfish" / "val_68.JPEG").read_bytes()
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0" + bytes(9)  # five entries, of which none is there
    odd = data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]
    (tmp_path / "odd.jpg").write_bytes(odd)
    run = tinyserve("classify", tmp_path, "-m", "baseline", "--device", "cpu", "--format", "jsonl")
    assert "Warning" not in run.stderr
    assert run.returncode == 0


@pytest.mark.skipif(openvino_problem() is not None, reason="auto and cpu are the same")
def test_a_device_from_the_environment_counts_for_tuned_settings_and_for_bench(tmp_path, samples):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "TINYSERVE_DEVICE": "cpu"}
    settings = ("-m", "baseline", "-j", 1, "-b", 1, "--seconds", 0.01)
    assert "OpenVINO" in tinyserve("bench", *settings, XDG_CACHE_HOME=str(tmp_path)).stdout
    run = tinyserve("classify", samples / "bison", "-m", "baseline", "--tuned", **environment)
    assert "on CPU" in run.stderr
    assert "OpenVINO" not in tinyserve("bench", *settings, **environment).stdout
