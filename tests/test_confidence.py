"""Answers that are given only where the model is sure enough, and how sure that has to be."""

import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinyserve.confidence import in_words, operating_point
from tinyserve.engine import read_card
from tinyserve.errors import UsageError
from tinyserve.modelfile import Calibration, OperatingPoint, find_model, write_model
from tinyserve.report import wilson_interval

POINTS = [(0.0, 1000, 500), (0.3, 600, 450), (0.5, 400, 360), (0.7, 100, 96), (0.9, 3, 3)]
CALIBRATION = Calibration(
    temperature=1.25,
    source="tiny-imagenet-200, held out of training",
    fitted_images=1000,
    images=1000,
    ece_before=0.094,
    ece=0.012,
    points=tuple(OperatingPoint(threshold=t, decided=d, correct=c) for t, d, c in POINTS),
)


def classify(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tinyserve.cli", *map(str, arguments), "--device", "cpu"],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        timeout=300,
    )


def refused(run: subprocess.CompletedProcess) -> str:
    """What was said by a command that cannot be run; nothing was classified."""
    assert run.returncode == 2
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    return run.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def shipped() -> Path:
    return find_model("inception")


@pytest.fixture(scope="module")
def calibrated(shipped, tmp_path_factory) -> Path:
    """A shipped model, said to be calibrated."""
    card = read_card(shipped)
    path = tmp_path_factory.mktemp("models") / "calibrated.onnx"
    graph = shipped.read_bytes()[: card.graph_bytes]
    write_model(path, graph, dataclasses.replace(card, calibration=CALIBRATION))
    return path


@pytest.mark.parametrize(
    ("target", "threshold"), [(0.0, 0.0), (0.46, 0.0), (0.5, 0.3), (0.8, 0.5), (0.9, 0.7)]
)
def test_the_lowest_threshold_that_surely_reaches_the_target(calibrated, target, threshold):
    card = read_card(calibrated)
    point = operating_point(card, target)
    assert point.threshold == threshold
    assert wilson_interval(point.correct, point.decided)[0] >= target
    assert f"{threshold:.2f} or more: right on {point.correct}" in in_words(point, card)


def test_a_few_right_answers_are_no_certainty(calibrated):
    """Three of three are right at 0.9: that may be luck."""
    words = r"the best, 0\.70, was right on 96 of 100 held-out images, at least 90\.2 % with 95 %"
    with pytest.raises(UsageError, match=words):
        operating_point(read_card(calibrated), 0.95)


def test_without_calibration_it_says_how_to_get_one(shipped):
    card = dataclasses.replace(read_card(shipped), calibration=None)
    with pytest.raises(UsageError, match=r"--min-confidence.*--holdout"):
        operating_point(card, 0.5)


@pytest.fixture(scope="module")
def decided(samples, calibrated, tmp_path_factory) -> tuple[list[dict], dict, str]:
    """Rows, summary and what was said about all samples and one file that is no image."""
    folder = tmp_path_factory.mktemp("decided")
    (folder / "goldfish").mkdir()
    (folder / "goldfish" / "damaged.jpg").write_bytes(b"no image")
    rows, summary = folder / "rows.jsonl", folder / "summary.json"
    run = classify(
        "classify", samples, folder / "goldfish", "-m", calibrated, "--target-precision", 0.5,
        "-o", rows, "--summary", summary,
    )  # fmt: skip
    assert run.returncode == 3
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    return found, json.loads(summary.read_text()), run.stderr


def test_rows_below_the_threshold_are_unknown_and_keep_their_predictions(decided):
    rows, _, said = decided
    assert "confidence 0.30 or more: right on 450 of 600 held-out images" in said
    assert rows[-1]["status"] == "error"
    for row in rows[:-1]:
        sure = row["predictions"][0]["probability"] >= 0.3
        assert row["status"] == ("ok" if sure else "unknown")
        assert len(row["predictions"]) == 5
        assert row["correct"] is (row["predictions"][0]["wnid"] == row["label"])


def test_the_summary_counts_what_was_decided(decided):
    rows, summary, said = decided
    by_status = {s: [r for r in rows if r["status"] == s] for s in ("ok", "unknown", "error")}
    counts = [len(found) for found in by_status.values()]
    assert [summary["ok"], summary["unknown"], summary["failed"]] == counts
    assert sum(counts) == summary["inputs"] == 41
    assert all(counts)
    right = sum(row["correct"] for row in by_status["ok"])
    assert summary["min_confidence"] == 0.3
    assert summary["coverage"] == counts[0] / 41
    assert summary["decided_labelled"] == counts[0]
    assert summary["decided_top1"] == right / counts[0]
    assert summary["decided_top1_ci95"] == list(wilson_interval(right, counts[0]))
    assert summary["top1"] == sum(row["correct"] for row in rows) / 41
    assert f"decided at 0.3 or more: {counts[0]}, {100 * counts[0] / 41:.2f} %" in said
    assert f"top-1 of the decided {100 * right / counts[0]:.2f} %" in said


def test_table_and_csv_say_unknown(samples):
    paths = [samples / "teapot", samples / "tabby"]
    table = classify("classify", *paths, "-m", "inception", "--min-confidence", 1)
    assert table.returncode == 0
    assert all(" ?  unknown:" in line and " % " in line for line in table.stdout.splitlines())
    assert "4 unknown" in table.stderr
    assert "of the decided" not in table.stderr  # none was
    run = classify("classify", *paths, "-m", "inception", "--min-confidence", 0, "--format", "csv")
    assert [row["status"] for row in csv.DictReader(io.StringIO(run.stdout))] == ["ok"] * 4


def test_without_a_threshold_nothing_is_unknown(samples, tmp_path):
    path = tmp_path / "summary.json"
    run = classify("classify", samples / "teapot", "-m", "inception", "--summary", path)
    summary = json.loads(path.read_text())
    assert (summary["ok"], summary["unknown"], summary["failed"]) == (2, 0, 0)
    assert summary["min_confidence"] is summary["coverage"] is summary["decided_top1"] is None
    assert "decided" not in run.stderr


def test_what_cannot_be_used_is_said_before_anything_is_classified(samples, calibrated):
    path = samples / "teapot"
    assert "must be from 0 to 1" in refused(classify("classify", path, "--min-confidence", 95))
    both = ("--min-confidence", 0.5, "--target-precision", 0.9)
    assert "not allowed with" in refused(classify("classify", path, *both))
    run = classify("classify", path, "-m", calibrated, "--target-precision", 0.99)
    assert refused(run).startswith("tinyserve: no confidence reaches a precision of 99 %")


def test_info_shows_the_calibration(calibrated):
    run = subprocess.run(
        [sys.executable, "-m", "tinyserve.cli", "info", calibrated],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert "temperature 1.250, fitted on 1,000 images of tiny-imagenet-200, held out" in run.stdout
    assert "error on 1,000 others 1.2 points, 9.4 without" in run.stdout
