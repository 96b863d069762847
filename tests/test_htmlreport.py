"""The report of a job: its figures, and the page that shows them."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import numpy as np
import pytest
import simplejpeg

from tinyserve import images
from tinyserve.classifier import Classifier, Prediction, Result
from tinyserve.dataset import Input, find_inputs
from tinyserve.engine import read_card
from tinyserve.errors import OutputError
from tinyserve.htmlreport import FIGURES, PAGE, make_folder, page, write_report
from tinyserve.members import Member
from tinyserve.modelfile import Label, ModelCard, find_model, write_model
from tinyserve.report import Tally, wilson_interval
from tinyserve.statistics import GALLERY, Reliability, Report, Statistics


def classify(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tinyserve.cli", "classify", *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "TINYSERVE_DEVICE": "cpu"},
        timeout=300,
    )


class Document(HTMLParser):
    """The tags and the text of a page; complains where tags do not match."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def job(samples, tmp_path_factory) -> tuple[Path, list[dict], subprocess.CompletedProcess]:
    """The report on all samples and two files that are no images, and the rows of the same job."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "goldfish").mkdir()
    (folder / "goldfish" / "empty.jpg").touch()
    (folder / "goldfish" / "text.jpg").write_text("no image")
    run = classify(
        samples, folder / "goldfish", "-m", "inception", "-o", folder / "rows.jsonl",
        "--report", folder / "new" / "report", "--min-confidence", 0.25,
    )  # fmt: skip
    assert run.returncode == 3, run.stderr
    rows = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return folder / "new" / "report", [json.loads(row) for row in rows], run


@pytest.fixture(scope="module")
def figures(job) -> dict:
    return json.loads((job[0] / FIGURES).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def document(job) -> Document:
    return Document((job[0] / PAGE).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def card() -> ModelCard:
    return read_card(find_model("inception"))


def test_two_files_and_where_they_are(job):
    folder, _, run = job
    assert sorted(os.listdir(folder)) == [PAGE, FIGURES]
    assert f"report: {folder / PAGE}" in run.stderr


# The figures


def test_totals(figures, job):
    _, rows, _ = job
    summary = figures["summary"]
    assert summary["inputs"] == summary["labelled"] == 42
    assert summary["failed"] == 2
    right = sum(row["correct"] for row in rows)
    among_five = sum(row["label"] in [p["wnid"] for p in row["predictions"]] for row in rows)
    assert summary["top1"] == right / 42
    assert summary["top1_ci95"] == list(wilson_interval(right, 42))
    assert summary["top5"] == among_five / 42
    assert summary["top5_ci95"] == list(wilson_interval(among_five, 42))
    assert summary["coverage"] == sum(row["status"] == "ok" for row in rows) / 42


def test_classes(figures, job, card):
    _, rows, _ = job
    assert [row["wnid"] for row in figures["classes"]] == [label.wnid for label in card.labels]
    for found in figures["classes"]:
        mine = [row for row in rows if row["label"] == found["wnid"]]
        assert found["images"] == len(mine)
        assert found["correct"] == sum(row["correct"] for row in mine)
        called = [row["predictions"][0] for row in rows if row["predictions"]]
        assert found["predicted"] == sum(best["wnid"] == found["wnid"] for best in called)
        wrong = Counter(
            row["predictions"][0]["name"]
            for row in mine
            if row["predictions"] and not row["correct"]
        )
        assert found["confused"] == max(wrong.values(), default=0)
        assert wrong[found["confused_with"]] == found["confused"]
        if mine:
            assert found["accuracy"] == found["correct"] / found["images"]
            interval = list(wilson_interval(found["correct"], found["images"]))
            assert found["accuracy_ci95"] == interval
    goldfish = next(row for row in figures["classes"] if row["name"] == "goldfish")
    assert goldfish["images"] == 4  # two of them failed, which is wrong


def test_confusions_mistakes_and_failures(figures, job):
    _, rows, _ = job
    wrong = [row for row in rows if row["predictions"] and not row["correct"]]
    pairs = Counter((row["label"], row["predictions"][0]["wnid"]) for row in wrong)
    found = figures["confusions"]
    assert [confusion["images"] for confusion in found] == sorted(pairs.values(), reverse=True)[:20]
    paths = {row["path"]: row for row in wrong}
    for confusion in found:
        assert 1 <= len(confusion["examples"]) == min(3, confusion["images"])
        assert {paths[path]["predictions"][0]["name"] for path in confusion["examples"]} == {
            confusion["predicted"]
        }
    surest = sorted((row["predictions"][0]["probability"] for row in wrong), reverse=True)
    assert [mistake["probability"] for mistake in figures["mistakes"]] == surest[:GALLERY]
    assert {mistake["input"] for mistake in figures["mistakes"]} <= paths.keys()
    least = sorted(row["predictions"][0]["probability"] for row in rows if row["predictions"])
    assert [e["probability"] for e in figures["least_certain"]] == least[:GALLERY]
    errors = {row["path"]: row["error"] for row in rows if row["error"]}
    assert {f["input"]: f["reason"] for f in figures["failures"]} == errors


def test_confidence(figures, job):
    _, rows, _ = job
    answers = [(r["predictions"][0]["probability"], r["correct"]) for r in rows if r["predictions"]]
    error = 0.0
    assert len(figures["reliability"]) == 15
    for found in figures["reliability"]:
        inside = [(p, right) for p, right in answers if found["low"] <= p < found["high"]]
        assert found["images"] == len(inside)
        if inside:
            confidence = sum(p for p, _ in inside) / len(inside)
            accuracy = sum(right for _, right in inside) / len(inside)
            assert found["confidence"] == pytest.approx(confidence)
            assert found["accuracy"] == accuracy
            error += abs(confidence - accuracy) * len(inside) / 40
    assert figures["calibration_error"] == pytest.approx(error)
    for found in figures["histogram"]:
        inside = [right for p, right in answers if found["low"] <= p < found["high"]]
        assert [found["right"], found["wrong"]] == [sum(inside), len(inside) - sum(inside)]
        assert found["unlabelled"] == 0


def test_what_is_certain_is_in_the_last_bin():
    reliability = Reliability()
    for confidence, correct in ((0.0, False), (1.0, True), (1.0, False)):
        reliability.add(confidence, correct)
    assert [part.images for part in reliability.bins()] == [1, *[0] * 13, 2]
    assert reliability.error() == pytest.approx(1 / 3)
    assert Reliability().error() is None


# The page


def test_every_figure_of_the_page_is_in_the_document(document, figures):
    summary = figures["summary"]
    low, high = summary["top1_ci95"]
    for words in (
        f"{100 * summary['top1']:.2f} %",
        f"95 % interval {100 * low:.2f} to {100 * high:.2f}",
        f"{100 * summary['coverage']:.2f} %",
        f"{100 * figures['calibration_error']:.1f} points",
        "40 classified, 2 failed, 42 labelled",
        "on CPU",
        figures["model"]["fingerprint"],
        "2 inputs could not be used",
        "empty file (0 bytes)",
    ):
        assert words in document.text
    for confusion in figures["confusions"]:
        assert f"{confusion['label']} taken for {confusion['predicted']}" in document.text
    headings = [name for name, _ in document.tags if name in ("h1", "h2", "h3")]
    assert headings[:4] == ["h1", "h2", "h3", "h3"]
    assert headings.count("h1") == 1


def test_the_page_needs_nothing_else(job, document):
    assert {tag for tag, _ in document.tags} & {"script", "iframe", "object", "style"} == {"style"}
    for _, attributes in document.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:")
    text = (job[0] / PAGE).read_text(encoding="utf-8")
    assert not re.findall(r"https?:|url\(|@import", text)
    assert len(text) < 1_000_000


def test_pictures_are_described_and_small(document, figures):
    pictures = document.all("img")
    shown = sum(len(confusion["examples"]) for confusion in figures["confusions"])
    assert len(pictures) == shown + len(figures["mistakes"])
    for picture in pictures:
        assert re.search(r"taken for|called .+, labelled", picture["alt"])
        assert max(int(picture["width"]), int(picture["height"])) <= 96
    assert all(drawing["aria-label"] for drawing in document.all("svg"))
    assert {cell["scope"] for cell in document.all("th")} == {"col", "row"}


def made_report(card: ModelCard, results: list[Result], **totals) -> Report:
    tally, statistics = Tally(), Statistics(card)
    for result in results:
        tally.add(result)
        statistics.add(result)
    facts = {"model": "m", "precision": "int8", "provider": "CPUExecutionProvider", "seconds": 1.0}
    return statistics.report(tally.summary(**facts | totals), ["photos"])


def made_result(card: ModelCard, path: str, best: int, label: int | None, p: float) -> Result:
    truth = None if label is None else card.labels[label]
    prediction = Prediction(best, card.labels[best].wnid, card.labels[best].name, p)
    rank = None if label is None else int(best != label)
    return Result(Input(path, None), "", None, (prediction,), truth, rank)


def test_unlabelled_inputs_get_what_was_predicted(samples, tmp_path):
    for path in sorted(samples.rglob("*.JPEG"))[:6]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    run = classify(tmp_path, "-m", "inception", "--report", tmp_path / "report")
    assert run.returncode == 0
    figures = json.loads((tmp_path / "report" / FIGURES).read_text())
    assert figures["calibration_error"] is figures["summary"]["top1"] is None
    assert figures["confusions"] == figures["mistakes"] == []
    assert sum(row["predicted"] for row in figures["classes"]) == 6
    assert sum(part["unlabelled"] for part in figures["histogram"]) == 6
    found = Document((tmp_path / "report" / PAGE).read_text())
    assert "Predicted classes" in found.text
    assert "6 classified, 0 labelled" in found.text
    assert len(found.all("img")) == len(figures["least_certain"]) == 6
    for words in ("accuracy", "mistakes", "confusions", "wrong"):
        assert words not in found.text.replace("accuracy in the file", "")


def test_where_everything_failed_there_is_still_a_page(card):
    def failed(number: int) -> Result:
        member = Member(f"{number}.jpg", None, partial(bytes, bytes(10**6)), 10**6)
        item = Input(f"a.tar/{number}.jpg", None, member)
        return Result(item, "", "damaged image", (), None, None)

    results = [failed(number) for number in range(60)]
    report = made_report(card, results)
    found = Document(page(report))
    assert "60 inputs could not be used; these are the first 50." in found.text
    assert len(report.failures) == 50
    assert sum(failure.input.in_memory for failure in report.failures) == 0
    assert found.all("svg") == found.all("img") == []


def test_names_are_text_and_never_markup(samples, card, tmp_path):
    hostile = """</title><script>alert('1')</script><img src=x onerror="alert(2)">&amp;"""
    folder = tmp_path / '<b onclick="x">&'
    folder.mkdir()
    data = (samples / "teapot" / "val_59.JPEG").read_bytes()
    names = [f"{name}.jpg" for name in ("<script>x<", "'\"&lt;", "${title}$title")]
    for name in names:
        (folder / name).write_bytes(data)
    (folder / "<u>.png").write_bytes(b"no image")
    labels = tuple(Label(None, f"{hostile}{i}") for i in range(len(card.labels)))
    source = find_model("inception")
    model = tmp_path / "<i>.onnx"
    changed = dataclasses.replace(card, labels=labels, architecture=hostile)
    write_model(model, source.read_bytes()[: card.graph_bytes], changed)
    inputs = list(find_inputs([str(folder)]))
    classifier = Classifier(str(model), device="cpu", self_test=False)
    results = [
        dataclasses.replace(result, label=labels[0], rank=9 if result.predictions else None)
        for result in classifier.classify_many(inputs)
    ]
    report = made_report(classifier.card, results, model="<i>")
    text = page(dataclasses.replace(report, paths=(str(folder),)))
    found = Document(text)
    assert {"script", "i", "b", "u"} & {tag for tag, _ in found.tags} <= {"i", "b"}
    assert found.all("b") == [{}] * len(found.all("b"))
    assert [a for a in found.all("i") if "class" not in a] == []  # those of the charts' keys
    assert all(
        not any(name.startswith("on") for name in attributes) for _, attributes in found.tags
    )
    assert hostile in found.text
    assert str(folder) in found.text
    assert "<u>.png" in found.text
    titles = {attributes.get("title") for attributes in found.all("img")}
    assert {str(folder / name) for name in names} <= titles


def test_a_picture_that_vanished_or_is_damaged_is_said_to_be(card, samples, tmp_path):
    real = str(samples / "teapot" / "val_59.JPEG")
    results = [
        made_result(card, real, 1, 0, 0.9),
        made_result(card, str(tmp_path / "gone.jpg"), 2, 0, 0.8),
        made_result(card, f"{real}/inside.jpg", 3, 0, 0.7),  # as of an archive
    ]
    found = Document(page(made_report(card, results)))
    assert len(found.all("img")) == 2  # among the confusions and among the mistakes
    assert found.text.count("not at hand any more") == 2
    assert found.text.count("in an archive") == 2
    (tmp_path / "gone.jpg").write_text("no picture")
    assert Document(page(made_report(card, results))).text.count("cannot be read") == 2


@pytest.mark.slow
def test_large_pictures_that_are_in_memory_are_kept_small(card):
    noise = np.random.default_rng(0).integers(0, 256, (500, 700, 3), np.uint8)
    file = simplejpeg.encode_jpeg(noise, quality=95)
    assert len(file) > 400_000
    results = []
    for number in range(200):  # 200 pairs of classes, each of which keeps an example
        result = made_result(card, f"a.tar/{number}.jpg", number, 0, number / 200)
        data = bytearray(file)  # a copy for each
        member = Member(result.input.path, None, lambda data=data: bytes(data), len(data))
        results.append(
            dataclasses.replace(result, input=dataclasses.replace(result.input, member=member))
        )
    report = made_report(card, results)
    kept = [*report.mistakes, *report.least_certain]
    kept_inputs = [example.input for example in kept if example.correct is False]
    kept_inputs += [item for confusion in report.confusions for item in confusion.examples]
    assert len(kept_inputs) > 60
    assert max(item.in_memory for item in kept_inputs) < 40_000
    sizes = {images.decode(item.read()).shape for item in kept_inputs}
    assert sizes == {(69, 96, 3)}
    assert len(Document(page(report)).all("img")) >= 40


def test_a_name_that_is_not_utf8_can_be_written(card, tmp_path):
    path = os.fsdecode(b"caf\xe9.jpg")
    report = made_report(card, [made_result(card, path, 1, 0, 0.9)])
    write_report(tmp_path, report)
    Document((tmp_path / PAGE).read_text(encoding="utf-8"))
    figures = json.loads((tmp_path / FIGURES).read_text(encoding="utf-8"))
    assert figures["mistakes"][0]["input"] == path


def test_a_name_of_two_classes_is_still_a_mistake(card, samples):
    twins = dataclasses.replace(
        card, labels=(Label("n1", "crane"), Label("n2", "crane"), *card.labels[2:])
    )
    results = [made_result(twins, str(samples / "teapot" / "val_59.JPEG"), 1, 0, 0.9)]
    report = made_report(twins, results)
    assert len(report.mistakes) == 1
    assert 'class="wrong">90.0 %' in page(report)


def test_a_resumed_job_reports_all_inputs_at_its_own_confidence(samples, tmp_path):
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "report"
    first = classify(samples / "teapot", "-m", "inception", "-o", rows, "--min-confidence", 0)
    assert first.returncode == 0
    run = classify(
        samples / "teapot", samples / "tabby", "-m", "inception", "-o", rows, "--resume",
        "--min-confidence", 1, "--report", folder,
    )  # fmt: skip
    assert "2 of them done before" in run.stderr
    assert [json.loads(row)["status"] for row in rows.read_text().splitlines()] == ["unknown"] * 4
    figures = json.loads((folder / FIGURES).read_text())
    assert figures["summary"]["inputs"] == figures["summary"]["unknown"] == 4
    assert sum(row["images"] for row in figures["classes"]) == 4


# Where it cannot be written


def test_an_unwritable_folder_is_one_line_before_anything_is_classified(samples, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        run = classify(samples / "teapot", "-m", "inception", "--report", folder)
        assert run.returncode == 1
        assert run.stdout == ""
        (line,) = (line for line in run.stderr.splitlines() if "running on" not in line)
        assert line.startswith(f"tinyserve: cannot write {folder}: ")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_folder_in_the_place_of_the_page_is_one_line_and_nothing_half_written(card, tmp_path):
    (tmp_path / PAGE).mkdir()
    make_folder(tmp_path)
    with pytest.raises(OutputError, match=r"cannot write .*index\.html"):
        write_report(tmp_path, made_report(card, []))
    assert sorted(os.listdir(tmp_path)) == [PAGE, FIGURES]


# Memory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_inputs(card):
    card = dataclasses.replace(card, labels=card.labels[:60])
    random, statistics = Random(0), Statistics(card)

    def add(count: int) -> int:
        for _ in range(count):
            best, label = random.randrange(60), random.randrange(60)
            path = f"{'a/folder/of/many/' * 12}{random.random()}.jpg"
            statistics.add(made_result(card, path, best, label, random.random()))
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = add(12_000)  # of nearly all 3,600 pairs of classes there were some
        assert add(12_000) - before < 1_500_000  # of the 4,000,000 bytes that their inputs take
    finally:
        tracemalloc.stop()


def test_the_most_frequent_confusions_keep_their_pictures(card):
    """However many rare ones come before, between and after them."""
    results = []
    for i in range(60):
        results += [made_result(card, f"often{i}.jpg", 1, 0, 0.5)]
        results += [
            made_result(card, "rare.jpg", (i + j) % 200, j, 0.5) for j in range(100) if i % 200
        ]
    confusions = made_report(card, results).confusions
    assert (confusions[0].images, confusions[0].of) == (61, 119)
    assert confusions[0].examples[0].path == "often0.jpg"
    assert len(confusions[0].examples) == 3
