"""What the page says, without a page: Gradio is not needed here."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tinyserve import Classifier, Prediction
from tinyserve.demo import render
from tinyserve.demo.answers import Answer, Answers, loader
from tinyserve.errors import ImageError, ModelFileError, UsageError


@pytest.fixture(scope="module")
def baseline() -> Classifier:
    return Classifier("baseline", device="cpu")


@pytest.fixture
def answers(baseline: Classifier, tmp_path: Path) -> Answers:
    def load(name: str) -> Classifier:
        if name == "broken":
            raise ModelFileError("<broken> is damaged")
        return baseline

    return Answers(["baseline", "broken"], load, tmp_path / "uploads")


@pytest.fixture
def upload(samples: Path, tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "uploads" / "0123" / "fish.jpg"
    path.parent.mkdir(parents=True)
    shutil.copy(samples / "goldfish" / "val_68.JPEG", path)
    return {"path": str(path)}


def answer(model: str, name: str) -> Answer:
    return Answer(model, "CPU", 1_000_000, 1.0, (Prediction(0, None, name, 0.5),))


def test_a_model_that_cannot_be_loaded_leaves_the_others_alone(answers, upload):
    good, bad = answers.compare(upload)
    assert (good.model, good.error, len(good.predictions)) == ("baseline", None, 5)
    assert (bad.model, bad.error, bad.predictions) == ("broken", "<broken> is damaged", ())
    table = render.comparison([good, bad])
    assert "&lt;broken&gt; is damaged" in table
    assert "<broken>" not in table


@pytest.mark.parametrize(
    ("guesses", "words"),
    [
        (["cat", "cat", "cat"], "All 3 models say <strong>cat</strong>."),
        (["cat", "dog", "cat"], "2 of 3 models say <strong>cat</strong>."),
        (["cat", "dog", "fish"], "No two models agree."),
    ],
)
def test_says_how_far_the_models_agree(guesses, words):
    table = render.comparison([answer(str(i), name) for i, name in enumerate(guesses)])
    assert words in table
    expected = max(guesses.count(name) for name in guesses)
    assert table.count("✓") == (expected if expected > 1 else 0)


def test_classes_of_one_name_are_told_apart():
    found = [
        Prediction(134, "n02012849", "crane", 0.5),
        Prediction(517, "n03126707", "crane", 0.2),
        Prediction(3, None, "cat", 0.1),
        Prediction(4, None, "cat", 0.1),
        Prediction(5, None, "dog", 0.1),
    ]
    expected = ["crane (n02012849)", "crane (n03126707)", "cat (class 3)", "cat (class 4)", "dog"]
    assert render.names(found) == expected


def test_a_loaded_model_waits_for_no_other(monkeypatch):
    begun, may_end, loads = threading.Event(), threading.Event(), []

    def slow(name: str, device: str | None) -> str:
        loads.append(name)
        if name == "slow":
            begun.set()
            assert may_end.wait(60)
        return f"{name} on {device}"

    monkeypatch.setattr("tinyserve.demo.answers.Classifier", slow)
    load = loader("cpu")
    load("loaded")
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(load, "slow") for _ in range(2)]
        assert begun.wait(60)
        assert load("loaded") == "loaded on cpu"
        assert not any(future.done() for future in both)
        may_end.set()
        assert {future.result() for future in both} == {"slow on cpu"}
    assert loads == ["loaded", "slow"]  # of two who ask at a time, one


def test_names_are_escaped():
    html = render.bars(answer("<model>", "<class>"))
    assert "&lt;class&gt;" in html
    assert "<class>" not in html


@pytest.mark.parametrize("name", ["../secret.jpg", "uploads-beside/0.jpg", "\0", 5000 * "a"])
def test_only_uploads_are_opened(answers, tmp_path, name):
    with pytest.raises(ImageError, match="not uploaded"):
        answers.classify({"path": f"{tmp_path}/uploads/../{name}"}, "baseline")


@pytest.mark.usefixtures("upload")
@pytest.mark.parametrize(("name", "words"), [("", "not uploaded"), ("*/*.jpg", "is not here")])
def test_a_folder_of_uploads_is_no_upload(answers, tmp_path, name, words):
    with pytest.raises(ImageError, match=words):
        answers.inputs([{"path": f"{tmp_path}/uploads/{name}"}])


@pytest.mark.parametrize("nonsense", [None, "path", {}, {"path": 5}])
def test_what_is_no_upload_is_refused(answers, nonsense):
    with pytest.raises(UsageError, match="uploaded file"):
        answers.classify(nonsense, "baseline")
    for files in (nonsense, [nonsense]):
        with pytest.raises(UsageError, match="uploaded file"):
            answers.inputs(files)


def test_one_file_needs_no_list(answers, upload):
    (found,), (alone,) = answers.inputs([upload]), answers.inputs(upload)
    assert alone.path == found.path


def test_of_archives_only_zip_is_taken(answers, tmp_path):
    path = tmp_path / "uploads" / "pictures.tar"
    path.parent.mkdir()
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="takes zip"):
        answers.inputs([{"path": str(path)}])


def test_inputs_have_the_names_that_their_owner_knows(answers, upload):
    (found,) = answers.inputs([upload])
    assert found.path == "fish.jpg"
    assert found.version == ""
    assert found.read() == Path(upload["path"]).read_bytes()


def test_an_upload_says_nothing_of_a_file_of_its_name_here(answers, upload, tmp_path, monkeypatch):
    (tmp_path / "fish.jpg").write_text("a file of the server's")
    monkeypatch.chdir(tmp_path)
    (result,) = answers.classifier("baseline").classify_many(answers.inputs([upload]))
    assert (result.input.path, result.version, result.error) == ("fish.jpg", "", None)


@pytest.mark.parametrize("size", [64, 100])
def test_pictures_are_enlarged_by_whole_pixels(size):
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    heat = np.linspace(-1, 1, size * size, dtype=np.float32).reshape(size, size)
    large = np.asarray(render.enlarged(image))
    scale = len(large) // size
    assert (large[::scale, ::scale] == image).all()
    assert render.overlay(image, heat).size == large.shape[:2]
    render.overlay(image, np.zeros_like(heat))
