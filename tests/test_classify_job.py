"""Whole jobs of `tinyserve classify`: every input accounted for, whatever happens."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import termios
import time
import zipfile
from pathlib import Path

import pytest

from tinyserve import output as rows_module
from tinyserve.classifier import Classifier, Prediction, Result
from tinyserve.dataset import Input
from tinyserve.engine import read_card
from tinyserve.errors import OutputError
from tinyserve.modelfile import find_model, write_model
from tinyserve.output import open_rows
from tinyserve.resume import Resumed

COMMAND = (sys.executable, "-m", "tinyserve.cli", "classify", "-m", "baseline", "--device", "cpu")


def classify(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True, encoding="utf-8", timeout=300, **options,
    )  # fmt: skip


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def many(samples, tmp_path):
    """A folder of 600 pictures that are links to the samples."""
    folder = tmp_path / "many"
    folder.mkdir()
    pictures = sorted(samples.rglob("*.JPEG"))
    for number in range(600):
        os.link(shutil.copy(pictures[number % 40], tmp_path), folder / f"{number}.jpg")
    return folder


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_job_goes_on_where_it_was_cut_off(samples, tmp_path, suffix):
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    assert classify(samples, "-o", whole).returncode == 0
    content = whole.read_bytes()
    for length in (len(content) // 3, content.index(b"\n") + 1, 5, 0):
        cut.write_bytes(content[:length])
        run = classify(samples, "-o", cut, "--resume", "--summary", tmp_path / "s.json")
        assert run.returncode == 0, run.stderr
        assert cut.read_bytes() == content
        summary = json.loads((tmp_path / "s.json").read_text())
        assert (summary["inputs"], summary["labelled"]) == (40, 40)
        done = content[:length].count(b"\n") - (suffix == "csv")
        assert summary["kept"] == max(0, done)
    assert sorted(path.name for path in tmp_path.iterdir()) == [cut.name, "s.json", whole.name]


def test_a_finished_job_has_nothing_left_to_do(samples, tmp_path):
    output = tmp_path / "rows.jsonl"
    first = classify(samples, "-o", output).stderr.splitlines()[-1]
    before = output.read_bytes()
    run = classify(samples, "-o", output, "--resume")
    assert output.read_bytes() == before
    assert "40 images, 40 of them done before" in run.stderr
    assert run.stderr.splitlines()[-1] == first


def test_rows_that_no_longer_hold_are_made_anew(samples, tmp_path):
    folder = shutil.copytree(samples / "goldfish", tmp_path / "goldfish")
    changed, broken = sorted(folder.iterdir())
    output = tmp_path / "rows.jsonl"
    good = broken.read_bytes()
    broken.write_text("no picture")
    assert classify(folder, "-o", output).returncode == 3
    old = {row["path"]: row for row in rows_of(output)}
    shutil.copy(samples / "teapot" / "val_568.JPEG", changed)
    broken.write_bytes(good)
    assert classify(folder, "-o", output, "--resume").returncode == 0
    new = {row["path"]: row for row in rows_of(output)}
    assert len(rows_of(output)) == len(new) == 2
    assert new[str(changed)]["predictions"] != old[str(changed)]["predictions"]
    assert new[str(broken)]["status"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["-m", "inception"], "rows of another model"), (["-k", 3], "go on with -k 5")],
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_the_rows_of_another_job_are_left_alone(samples, tmp_path, suffix, arguments, words):
    output = tmp_path / f"rows.{suffix}"
    assert classify(samples / "goldfish", "-o", output).returncode == 0
    before = output.read_bytes()
    run = classify(samples / "bison", "-o", output, "--resume", *arguments)
    assert run.returncode == 2
    assert words in run.stderr
    assert output.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_rows_whose_files_are_gone_are_kept(samples, tmp_path):
    disk = shutil.copytree(samples / "goldfish", tmp_path / "disk")
    output = tmp_path / "rows.jsonl"
    assert classify(disk, "-o", output).returncode == 0
    disk.rename(tmp_path / "unmounted")
    run = classify(samples / "bison", "-o", output, "--resume")
    assert "2 of the rows are of inputs that were not asked for now" in run.stderr
    assert len(rows_of(output)) == 4


def test_rows_that_fell_out_and_were_not_asked_for_are_said(samples, tmp_path):
    folder = shutil.copytree(samples / "goldfish", tmp_path / "goldfish")
    changed, failed = sorted(folder.iterdir())
    failed.write_text("no picture")
    output = tmp_path / "rows.jsonl"
    assert classify(folder, "-o", output).returncode == 3
    os.utime(changed, (1, 1))
    run = classify(samples / "bison", "-o", output, "--resume")
    assert "2 rows that failed, or no longer hold" in run.stderr
    assert len(rows_of(output)) == 2
    assert "no longer" not in classify(samples / "bison", "-o", output, "--resume").stderr


def test_of_two_inputs_of_one_name_the_failed_one_stays_failed(samples, tmp_path):
    path, output = tmp_path / "twice.zip", tmp_path / "rows.jsonl"
    picture = (samples / "goldfish" / "val_68.JPEG").read_bytes()
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for data in (b"no picture", picture):
            archive.writestr("goldfish/a.jpg", data)
    assert classify(path, "-o", output).returncode == 3
    rows = rows_of(output)
    for _ in range(2):
        assert classify(path, "-o", output, "--resume").returncode == 3
        assert rows_of(output) == rows


def test_rows_are_made_anew_where_the_labels_were_corrected(samples, tmp_path):
    val = tmp_path / "val"
    (val / "images").mkdir(parents=True)
    for number, picture in enumerate(sorted((samples / "goldfish").iterdir())):
        shutil.copy(picture, val / "images" / f"val_{number}.JPEG")
    annotations, output = val / "val_annotations.txt", tmp_path / "rows.jsonl"
    # A mark of the order of bytes, as Windows' editors write it, is no part of a name.
    annotations.write_text("val_0.JPEG\tn02410509\nval_1.JPEG\tn01443537\n", "utf-8-sig")
    assert classify(val, "-o", output).returncode == 0
    assert [row["label"] for row in rows_of(output)] == ["n02410509", "n01443537"]
    annotations.write_text("val_0.JPEG\tn01443537\nval_1.JPEG\tn01443537\n")
    assert "2 images, 1 of them done before" in classify(val, "-o", output, "--resume").stderr
    assert [row["label"] for row in rows_of(output)] == ["n01443537"] * 2
    # Who asks for others is not held up by them.
    annotations.write_bytes(b"\xff")
    assert classify(samples / "bison", "-o", output, "--resume").returncode == 0
    assert len(rows_of(output)) == 4


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_names_that_are_not_utf8_have_one_row_after_all_resumptions(samples, tmp_path, suffix):
    output = tmp_path / f"rows.{suffix}"
    path, folder = tmp_path / "odd.tar", tmp_path / "folder"
    folder.mkdir()
    picture = shutil.copy(samples / "goldfish" / "val_68.JPEG", os.fsencode(folder) + b"/b\xe9.jpg")
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(picture, "goldfish/caf\udce9.jpg")
    assert classify(path, folder, "-o", output).returncode == 0
    before = output.read_bytes()
    run = classify(path, folder, "-o", output, "--resume")
    assert "2 images, 2 of them done before" in run.stderr
    assert output.read_bytes() == before
    # One may be called in truth what CSV has for another.
    literal = shutil.copy(picture, folder / r"c\udce9.jpg")
    assert classify(folder, "-o", output).returncode == 0
    os.utime(literal, (1, 1))
    assert "2 images, 1 of them done before" in classify(folder, "-o", output, "--resume").stderr


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ("\n", "0 cells"),
        ('"quoted", and so on\n', "cells"),
        ('"never closed\n' + "a line\n" * 2000, "cells in line"),
        ('"never closed\n' + "a line\n" * 20_000, "field larger"),
    ],
)
def test_a_csv_file_with_an_odd_line_loses_no_rows(samples, tmp_path, odd, words):
    output = tmp_path / "rows.csv"
    assert classify(samples / "goldfish", "-o", output).returncode == 0
    header, first, second = output.read_text().splitlines(keepends=True)
    output.write_text(text := header + first + odd + second)
    run = classify(samples / "goldfish", "-o", output, "--resume")
    assert run.returncode == 2
    assert "has lines that are no rows of classify" in run.stderr and words in run.stderr
    assert output.read_text() == text


def test_two_jobs_do_not_write_one_output(many, samples, tmp_path):
    output = tmp_path / "rows.jsonl"
    with subprocess.Popen([*COMMAND, str(many), "-o", str(output), "-b", "1", "-j", "1"]) as first:
        while not (output.exists() and output.stat().st_size):  # it opens before it locks
            time.sleep(0.001)
        first.send_signal(signal.SIGSTOP)
        try:
            for more in ([], ["--resume"]):
                second = classify(samples / "bison", "-o", output, *more)
                assert second.returncode == 1
                assert f"cannot write {output}: another job is writing it" in second.stderr
        finally:
            first.send_signal(signal.SIGCONT)
    assert first.returncode == 0
    assert [row["path"] for row in rows_of(output)] == [
        str(many / f"{number}.jpg") for number in range(600)
    ]


def test_what_a_killed_resumption_left_half_written_is_removed(samples, tmp_path):
    output = tmp_path / "rows [1].jsonl"
    assert classify(samples / "goldfish", "-o", output).returncode == 0
    before = output.read_bytes()
    for process in (1, 4321):
        (tmp_path / f".{output.name}.{process}.candidate").write_bytes(before[:100])
    (other := tmp_path / ".other.jsonl.1.candidate").touch()
    assert classify(samples / "goldfish", "-o", output, "--resume").returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {output.name, other.name}
    assert output.read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_rows_that_nobody_else_may_read_stay_so(samples, tmp_path):
    output = tmp_path / "rows.jsonl"
    assert classify(samples / "goldfish", "-o", output).returncode == 0
    output.chmod(0o600)
    assert classify(samples / "goldfish", "-o", output, "--resume").returncode == 0
    assert output.stat().st_mode & 0o777 == 0o600


def test_a_job_that_is_going_on_already_is_not_disturbed(samples, tmp_path):
    output = tmp_path / "rows.jsonl"
    assert classify(samples / "goldfish", "-o", output).returncode == 0
    before = output.read_bytes()
    first, second = (
        Resumed(str(output), "jsonl", Classifier("baseline", device="cpu"), k=5).results()
        for _ in range(2)
    )
    next(first)
    with pytest.raises(OutputError, match="another job is writing it"):
        next(second)
    assert len(list(first)) == 1
    assert output.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_an_output_does_not_take_the_place_of_an_input(samples, tmp_path):
    picture = Path(shutil.copy(samples / "goldfish" / "val_68.JPEG", tmp_path / "a"))
    before = picture.read_bytes()
    for option in ("-o", "--summary"):
        run = classify(picture, "--format", "jsonl", option, picture)
        assert run.returncode == 2
        assert "is one of the inputs" in run.stderr
    assert picture.read_bytes() == before
    rows = tmp_path / "rows.jsonl"
    assert classify(picture, "-o", rows, "--summary", rows).returncode == 2
    assert classify(picture, "-o", "/dev/null", "--summary", "/dev/null").returncode == 0
    os.mkfifo(tmp_path / "pipe")
    run = classify(picture, "-o", tmp_path / "pipe", "--resume")
    assert run.returncode == 2
    assert "is no file" in run.stderr


def test_a_summary_is_written_whoever_reads_along_and_whatever_becomes_of_the_report(
    samples, tmp_path
):
    summary = tmp_path / "summary.json"
    command = [*COMMAND, str(samples / "goldfish"), "--summary", str(summary)]
    with open("/dev/full", "w") as full:
        subprocess.run([*command, "-o", "/dev/null"], stderr=full, timeout=60)
    assert json.loads(summary.read_text())["labelled"] == 2
    summary.unlink()
    (tmp_path / "report" / "report.json").mkdir(parents=True)
    run = classify(*command[len(COMMAND) :], "--report", tmp_path / "report")
    assert run.returncode == 1
    assert "top-1" in run.stderr
    assert json.loads(summary.read_text())["labelled"] == 2


def test_where_one_thing_cannot_be_written_the_others_are(samples, tmp_path):
    output, report = tmp_path / "rows.jsonl", tmp_path / "report"
    assert classify(samples / "goldfish", "-o", output).returncode == 0
    again = [samples / "bison", "-o", output, "--resume", "--report", report]
    run = classify(*again, "--summary", "/dev/full")
    assert run.returncode == 1
    assert sorted(path.name for path in report.iterdir()) == ["index.html", "report.json"]
    *told, last = run.stderr.splitlines()
    assert "2 of the rows are of inputs that were not asked for now" in "\n".join(told)
    assert told[-1] == f"report: {report / 'index.html'}"
    assert last == "tinyserve: cannot write /dev/full: No space left on device"
    (report / "report.json").unlink()
    (report / "report.json").mkdir()
    run = classify(*again, "--summary", "/dev/full")
    assert "2 of the rows are of inputs that were not asked for now" in run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith("tinyserve: cannot write /dev/full: No space left on device; ")
    assert f"cannot write {report / 'report.json'}: Is a directory" in last


def test_the_bar_of_a_resumed_job_is_as_long_as_what_is_left(samples, tmp_path):
    output = tmp_path / "rows.jsonl"
    assert classify(samples, "-o", output).returncode == 0
    new = shutil.copy(samples / "goldfish" / "val_68.JPEG", tmp_path / "new.jpg")
    terminal, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 80))
    command = [*COMMAND, samples / "goldfish", new, "-o", output, "--resume"]
    assert subprocess.run(command, stderr=side, timeout=300).returncode == 0
    os.close(side)
    shown = b""
    with open(terminal, "rb", buffering=0) as reader, contextlib.suppress(OSError):
        while piece := reader.read(65_536):  # at its end, a terminal raises
            shown += piece
    assert b" 0/1 [" in shown
    assert b"41 images, 40 of them done before" in shown


def test_errors_of_others_are_not_taken_for_those_of_writing(tmp_path):
    with (
        pytest.raises(OSError, match=r"^no terminal$"),
        open_rows(str(tmp_path / "rows.jsonl"), "jsonl", k=1, model=""),
    ):
        raise OSError("no terminal")


def test_an_output_that_is_replaced_while_it_is_opened_loses_no_rows(tmp_path, monkeypatch):
    """As by a job that goes on with it, and is about to write into the new one."""
    path, new = tmp_path / "rows.jsonl", tmp_path / "new.jsonl"
    path.write_text("old\n")
    new.write_text("new\n")
    held = rows_module.held

    def held_late(output):
        os.replace(new, output)
        return held(output)

    monkeypatch.setattr(rows_module, "held", held_late)
    with (
        pytest.raises(OutputError, match="another job is writing it"),
        open_rows(str(path), "jsonl", k=1, model=""),
    ):
        pass
    assert path.read_text() == "new\n"


@pytest.mark.parametrize("name", ["rows.csv.gz", "rows.tsv", "rows.xlsx"])
def test_a_suffix_of_no_known_format_is_refused(samples, tmp_path, name):
    run = classify(samples / "goldfish", "-o", tmp_path / name)
    assert run.returncode == 2
    assert "give --format" in run.stderr
    assert classify(samples / "goldfish", "-o", tmp_path / "rows.2026-11-28").returncode == 0
    run = classify(samples / "goldfish", "-o", tmp_path / name, "--format", "csv")
    assert run.returncode == 0


def test_a_table_does_not_talk_to_the_terminal(samples, tmp_path):
    shutil.copy(samples / "goldfish" / "val_68.JPEG", tmp_path / "a\x1b[31m\nb.jpg")
    (line,) = classify(tmp_path).stdout.splitlines()
    assert "a\\x1b[31m\\nb.jpg" in line


def test_names_of_classes_do_not_talk_to_the_terminal_either(capsys):
    prediction = Prediction(0, None, "a\x1b[31m\nb", 0.5)
    result = Result(Input("1.jpg", None), "", None, (prediction,), None, None)
    with open_rows(None, "table", k=1, model="", widest=5) as write:
        write(result)
    (line,) = capsys.readouterr().out.splitlines()
    assert "50.0 % a\\x1b[31m\\nb" in line


def test_inputs_that_are_named_twice_have_two_rows(samples, tmp_path):
    picture = samples / "goldfish" / "val_68.JPEG"
    output = tmp_path / "rows.jsonl"
    assert classify(picture, "-o", output).returncode == 0
    assert classify(picture, picture, "-o", output, "--resume").returncode == 0
    assert len(rows_of(output)) == 2


def test_a_job_goes_on_under_another_spelling_of_its_paths(samples, tmp_path):
    shutil.copytree(samples / "goldfish", tmp_path / "goldfish")
    output = tmp_path / "rows.jsonl"
    assert classify("goldfish", "-o", output, cwd=tmp_path).returncode == 0
    (tmp_path / "goldfish" / "val_68.JPEG").rename(tmp_path / "goldfish" / "a..b.jpg")
    assert classify("goldfish", "-o", output, cwd=tmp_path).returncode == 0
    for spelling in ("./goldfish//", tmp_path / "goldfish"):
        run = classify(spelling, "-o", output, "--resume", cwd=tmp_path)
        assert "2 images, 2 of them done before" in run.stderr
        assert "not asked for" not in run.stderr
        assert len(rows_of(output)) == 2


def test_a_job_goes_on_behind_a_link(samples, tmp_path):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "rows.jsonl", tmp_path / "disk" / "rows.jsonl"
    link.symlink_to(target)
    assert classify(samples / "goldfish", "-o", link).returncode == 0
    assert classify(samples / "goldfish", samples / "bison", "-o", link, "--resume").returncode == 0
    assert link.is_symlink()
    assert len(rows_of(target)) == 4


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.zip", "a.tar.gz", "a.onnx"])
@pytest.mark.parametrize("option", ["-o", "--summary"])
def test_what_is_no_text_is_not_written_over(samples, tmp_path, name, option):
    """As where a shell puts the first of many pictures behind an option that had no value."""
    (tmp_path / name).write_bytes(b"content")
    run = classify(samples / "goldfish", option, tmp_path / name, "--format", "jsonl")
    assert (run.returncode, run.stdout) == (2, "")
    assert f"{tmp_path / name} is no name for what is written" in run.stderr
    assert (tmp_path / name).read_bytes() == b"content"


def test_a_dash_stands_for_stdout(samples, tmp_path):
    run = classify(samples / "goldfish", "-o", "-", cwd=tmp_path)
    assert (run.returncode, len(run.stdout.splitlines())) == (0, 2)
    run = classify(samples / "goldfish", "--summary", "-", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert list(tmp_path.iterdir()) == []


def test_without_readers_there_is_a_word_about_the_summary(samples, tmp_path):
    for wanted in (["--summary", tmp_path / "s.json"], ["--report", tmp_path / "report"], []):
        reader, writer = os.pipe()
        os.close(reader)
        run = subprocess.run(
            [*COMMAND, samples, *wanted], stdout=writer, stderr=subprocess.PIPE, text=True
        )
        os.close(writer)
        assert run.returncode == bool(wanted)
        assert ("there is no summary and no report" in run.stderr) == bool(wanted)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_summary_that_may_not_be_written_is_refused_before_the_work(samples, tmp_path):
    tmp_path.chmod(0o500)
    run = classify(samples / "goldfish", "--summary", tmp_path / "s.json")
    assert (run.returncode, run.stdout) == (1, "")
    assert "no permission" in run.stderr


def test_a_model_without_wordnet_ids_leaves_the_file_of_a_submission(samples, tmp_path):
    card = read_card(path := find_model("baseline", ("int8",)))
    graph = path.read_bytes()[: card.graph_bytes]
    labels = tuple(dataclasses.replace(label, wnid=None) for label in card.labels)
    model = tmp_path / "other.onnx"
    write_model(model, graph, dataclasses.replace(card, labels=labels))
    (tmp_path / "kept.txt").write_text("kept")
    run = classify(samples, "-m", model, "--submission", "-o", tmp_path / "kept.txt")
    assert run.returncode == 1
    assert "needs a model whose classes have WordNet ids" in run.stderr
    assert (tmp_path / "kept.txt").read_text() == "kept"


def test_a_table_in_parquet_is_there_when_it_is_whole(many, samples, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    output = tmp_path / "rows.parquet"
    assert classify(samples / "goldfish", "-o", output).returncode == 0
    before = output.read_bytes()
    with subprocess.Popen([*COMMAND, many, "-o", output, "-b", "1"], stderr=subprocess.PIPE) as job:
        while not list(tmp_path.glob(".rows.parquet.*")):
            time.sleep(0.001)
        job.send_signal(signal.SIGINT)
        assert b"interrupted" in job.stderr.read()
    assert job.returncode == 130
    assert output.read_bytes() == before
    assert not list(tmp_path.glob(".rows.parquet.*"))
    (tmp_path / "link.parquet").symlink_to(output)
    assert classify(samples, "-o", tmp_path / "link.parquet").returncode == 0
    assert (tmp_path / "link.parquet").is_symlink()
    assert parquet.read_table(output).num_rows == 40


def test_relative_rows_are_gone_on_with_where_they_began(samples, tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "rows.jsonl"
    shutil.copytree(samples / "goldfish", photos / "goldfish")
    assert classify("photos", "-o", output, cwd=tmp_path).returncode == 0
    before = output.read_bytes()
    for place, paths in ((photos, "."), ("/", photos)):
        run = classify(paths, "-o", output, "--resume", cwd=place)
        assert run.returncode == 2
        assert "go on from the folder where the job began" in run.stderr
        assert output.read_bytes() == before
    # But rows whose files are gone are kept where their folders are.
    shutil.rmtree(photos / "goldfish")
    shutil.copytree(samples / "teapot", photos / "teapot")
    assert classify("photos", "-o", output, "--resume", cwd=tmp_path).returncode == 0
    assert output.read_bytes().startswith(before)


def test_rows_of_other_inputs_are_kept_and_said(samples, tmp_path):
    output = tmp_path / "rows.jsonl"
    assert classify(samples / "goldfish", "-o", output).returncode == 0
    run = classify(samples / "teapot", "-o", output, "--resume")
    assert run.returncode == 0
    assert "4 images, 2 of them done before" in run.stderr
    assert "2 of the rows are of inputs that were not asked for now" in run.stderr
    assert len(rows_of(output)) == 4


def test_what_is_behind_a_uri_is_always_done_anew(samples, tmp_path):
    folder = shutil.copytree(samples / "goldfish", tmp_path / "goldfish")
    output = tmp_path / "rows.jsonl"
    assert classify(folder.as_uri(), "-o", output).returncode == 0
    first, second = rows_of(output)
    shutil.copy(samples / "teapot" / "val_568.JPEG", first["path"].removeprefix("file://"))
    run = classify(folder.as_uri(), "-o", output, "--resume")
    assert "done before" not in run.stderr
    again = rows_of(output)
    assert again[0]["predictions"] != first["predictions"]
    assert again[1:] == [second]


@pytest.mark.slow
def test_an_archive_of_many_large_files_takes_no_more_memory(samples, tmp_path):
    picture = (samples / "goldfish" / "val_68.JPEG").read_bytes() + bytes(2**20)
    program = (
        "import resource, sys; from tinyserve.cli import main; code = main(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024); sys.exit(code)"
    )
    peaks = []
    for count in (150, 450):
        path = tmp_path / "photos.tar"
        with tarfile.open(path, "w") as archive:
            for number in range(count):
                info = tarfile.TarInfo(f"goldfish/{number}.jpg")
                info.size = len(picture)
                archive.addfile(info, io.BytesIO(picture))
        command = [sys.executable, "-c", program, "classify", path, "-o", tmp_path / "rows.jsonl"]
        run = subprocess.run([*command, *COMMAND[4:]], capture_output=True, text=True, timeout=300)
        assert len(rows_of(tmp_path / "rows.jsonl")) == count, run.stderr
        peaks.append(int(run.stdout))
    assert peaks[1] < peaks[0] + 100  # MiB; the archive has 300 more


def test_archives_are_resumed(samples, tmp_path):
    path, output = tmp_path / "photos.zip", tmp_path / "rows.jsonl"
    with zipfile.ZipFile(path, "w") as archive:
        for picture in sorted(samples.rglob("*.JPEG"))[:6]:
            archive.write(picture, f"{picture.parent.name}/{picture.name}")
    assert classify(path, "-o", output).returncode == 0
    whole = output.read_text()
    output.write_text("".join(whole.splitlines(keepends=True)[:4]))
    assert "6 images, 4 of them done before" in classify(path, "-o", output, "--resume").stderr
    assert output.read_text() == whole


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost_or_doubled(many, tmp_path):
    output = tmp_path / "rows.jsonl"
    moments = random.Random(1)
    kills = 0
    for _ in range(5):
        command = [*COMMAND, str(many), "-o", str(output), "--resume", "-b", "4", "-j", "1"]
        before = output.stat().st_size if output.exists() else 0
        more = moments.randrange(60_000)  # bytes, of about 400,000 in all
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as run:
            while run.poll() is None:
                if output.exists() and output.stat().st_size > before + more:
                    run.send_signal(signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.001)
    assert kills == 5
    run = classify(many, "-o", output, "--resume")
    assert run.returncode == 0, run.stderr
    assert "600 images" in run.stderr
    found = [row["path"] for row in rows_of(output)]
    assert sorted(found) == sorted(str(path) for path in many.iterdir())


def test_max_errors_stops_a_job_that_goes_wrong(tmp_path):
    for number in range(200):
        (tmp_path / f"{number}.jpg").touch()
    run = classify(tmp_path, "--max-errors", 3, "--format", "jsonl", "-b", 4)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 3
    assert [row["status"] for row in rows] == ["error"] * 4
    assert "stopped: more than 3 inputs failed" in run.stderr
    assert classify(tmp_path, "--max-errors", 200).returncode == 3


@pytest.mark.parametrize("option", ["--min-confidence", "--target-precision"])
def test_a_submission_leaves_no_image_out(samples, option):
    run = classify(samples / "goldfish", "--submission", option, "0")
    assert (run.returncode, run.stdout) == (2, "")
    assert "a class for every image" in run.stderr


def test_paths_on_stdin_and_a_submission(samples):
    paths = [str(samples / "goldfish" / "val_68.JPEG"), "missing.jpg"]
    run = classify("-", "--submission", input="\n".join(paths))
    (line,) = run.stdout.splitlines()
    name, wnid = line.split()
    assert name == "val_68.JPEG" and wnid.startswith("n")
    assert run.returncode == 3
    assert "2 images, 1 failed" in run.stderr


def test_parquet_has_the_rows_of_jsonl(samples, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("rows.parquet", "rows.jsonl"):
        assert classify(samples, "-o", tmp_path / name).returncode == 0
    table = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    lines = rows_of(tmp_path / "rows.jsonl")
    assert [row["path"] for row in table] == [row["path"] for row in lines]
    for row, line in zip(table, lines, strict=True):
        assert row["predictions"][0]["name"] == line["predictions"][0]["name"]
        found, expected = (r["predictions"][0]["probability"] for r in (row, line))
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume"], "--resume goes on with the file that -o names"),
        (["--resume", "-o", "rows.parquet"], "only jsonl and csv outputs can be resumed"),
        (["--resume", "-o", "poem.jsonl"], "lines that are no rows"),
        (["--resume", "-o", "poem.csv"], "does not begin with the columns"),
        (["--format", "parquet"], "Parquet is written to a file"),
    ],
)
def test_what_cannot_be_resumed_or_written_says_so(samples, tmp_path, arguments, words):
    for name in ("poem.jsonl", "poem.csv"):
        (tmp_path / name).write_text("a rose\nis a rose\n")
    run = classify(samples, *arguments, cwd=tmp_path, env=_with_this_package())
    assert run.returncode == 2, run.stderr
    (line,) = run.stderr.splitlines()
    assert words in line
    assert (tmp_path / "poem.csv").read_text() == "a rose\nis a rose\n"


def _with_this_package() -> dict[str, str]:
    import tinyserve

    return {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(tinyserve.__file__))}


def test_names_with_ends_of_lines_are_one_row_each(samples, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a\rb.jpg", "a\nb.jpg", "a\r\nb, c.jpg", "z.jpg"):
        shutil.copy(samples / "goldfish" / "val_68.JPEG", folder / name)
    (folder / "y\r.jpg").touch()
    output = tmp_path / "rows.csv"
    assert classify(folder, "-k", 1, "-o", output).returncode == 3
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["path"] for row in rows) == sorted(str(path) for path in folder.iterdir())
    assert sum(row["status"] == "ok" for row in rows) == 4
    pyarrow_csv = pytest.importorskip("pyarrow.csv")
    options = pyarrow_csv.ParseOptions(newlines_in_values=True)
    assert pyarrow_csv.read_csv(output, parse_options=options).num_rows == 5
    run = classify(folder, "-k", 1, "-o", output, "--resume")
    assert "5 images, 4 of them done before, 1 failed" in run.stderr


@pytest.mark.parametrize("output", ["rows.jsonl", "rows.csv"])
def test_a_full_disk_is_one_line_and_the_job_can_go_on(samples, tmp_path, output):
    path = tmp_path / output
    limit = (5_000, resource.RLIM_INFINITY)

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    run = classify(samples, "-o", path, preexec_fn=fill)
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line == f"tinyserve: cannot write {path}: File too large"
    assert path.stat().st_size <= 5_000
    assert classify(samples, "-o", path, "--resume").returncode == 0
    lines = path.read_text().splitlines()
    rows = list(csv.DictReader(lines)) if output.endswith("csv") else rows_of(path)
    assert len({row["path"] for row in rows}) == len(rows) == 40


def test_a_full_disk_behind_stdout_is_one_line(samples):
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [*COMMAND, samples], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert run.returncode == 1
    assert run.stderr == "tinyserve: cannot write to stdout: No space left on device\n"


def test_every_odd_thing_in_a_folder_is_accounted_for(samples, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    shutil.copy(samples / "goldfish" / "val_68.JPEG", folder / "good.jpg")
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "folder.jpg").mkdir()
    shutil.copy(samples / "goldfish" / "val_68.JPEG", folder / "folder.jpg" / "inside.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "endless.jpg").symlink_to("/dev/zero")
    os.truncate(os.open(folder / "sparse.jpg", os.O_CREAT | os.O_WRONLY), 2**40)
    run = classify(folder, "--format", "jsonl")
    rows = {row["path"].rpartition("/")[2]: row for row in map(json.loads, run.stdout.splitlines())}
    assert run.returncode == 3
    assert {name for name, row in rows.items() if row["status"] == "ok"} == {
        "good.jpg", "inside.jpg"
    }  # fmt: skip
    assert {name: row["error"] for name, row in rows.items() if row["error"]} == {
        "dangling.jpg": "cannot read: No such file or directory",
        "pipe.jpg": "cannot read: not a file",
        "endless.jpg": "cannot read: not a file",
        "sparse.jpg": "too large: 1,099,511,627,776 bytes, more than 268,435,455",
    }


def test_a_file_that_vanishes_after_it_was_listed(many):
    command = [*COMMAND, str(many), "--format", "jsonl", "-b", "1", "-j", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        first = run.stdout.readline()
        for path in many.iterdir():
            path.unlink()
        rows = [json.loads(line) for line in (first, *run.stdout)]
    assert run.returncode == 3
    assert len(rows) == 600
    assert any(row["error"] == "cannot read: No such file or directory" for row in rows)


@pytest.mark.slow
def test_ten_thousand_empty_files(tmp_path):
    for number in range(10_000):
        (tmp_path / f"{number}.jpg").touch()
    run = classify(tmp_path, "--format", "csv")
    rows = list(csv.DictReader(run.stdout.splitlines()))
    assert run.returncode == 3
    assert {row["error"] for row in rows} == {"empty file (0 bytes)"}
    assert len(rows) == 10_000
