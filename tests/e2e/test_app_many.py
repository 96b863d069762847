"""The other tabs of the demo page, many pictures and models, and the looks of all of them."""

import csv
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_page import Server, open_page, shown, started, wait_for, words

from tinyserve import Classifier
from tinyserve.dataset import find_inputs
from tinyserve.engine import read_card
from tinyserve.modelfile import PRECISIONS, find_model, installed_models
from tinyserve.report import Tally

BAD = {
    "goldfish/notes.jpg": (b"no picture, just words\n", "not an image"),
    "tabby/empty.png": (b"", "empty file"),
    "teapot/half.jpg": (None, "damaged image"),
}
"""What does not belong into an archive of pictures, with what is said of it."""


@pytest.fixture(scope="module")
def archive(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 pictures in class folders, of which three are none."""
    path = tmp_path_factory.mktemp("archive") / "pictures.zip"
    photos = sorted(samples.glob("*/*.JPEG"))
    half = photos[0].read_bytes()[:1500]
    with zipfile.ZipFile(path, "w") as zipped:
        for number in range(200 - len(BAD)):
            photo = photos[number % len(photos)]
            zipped.write(photo, f"{photo.parent.name}/{number}.jpg")
        for name, (content, _) in BAD.items():
            zipped.writestr(name, half if content is None else content)
    return path


@pytest.fixture
def many(page: Any) -> Any:
    """The tab for many pictures."""
    page.get_by_role("tab", name="Many pictures").click()
    page.wait_for_selector("#files", state="visible")
    return page


def choose(page: Any, *paths: Path) -> None:
    page.set_input_files("#files input[type=file]", paths)
    page.get_by_text(paths[0].stem).first.wait_for()
    page.get_by_role("button", name="Classify them").click()


@pytest.mark.slow
@pytest.mark.browser
def test_archive_of_200_with_three_bad_ones(
    many: Any, server: Server, classifier: Classifier, archive: Path
) -> None:
    before = server.stderr.read_text()
    choose(many, archive)
    many.wait_for_selector("#totals .csv-link")
    results = list(classifier.classify_many(find_inputs([str(archive)])))
    tally = Tally()
    for result in results:
        tally.add(result)
    assert words(many, "#totals").startswith("200 pictures in ")
    assert "; 3 could not be read." in words(many, "#totals")
    top1, top5 = many.locator("#totals dd").all_inner_texts()
    assert top1 == f"{tally.correct_top1 / 2:.1f}\xa0%"
    assert top5 == f"{tally.correct_top5 / 2:.1f}\xa0%"
    assert "Of 200 labelled pictures" in words(many, "#totals")
    good = [result.predictions[0].name for result in results if result.predictions]
    wait_for(lambda: many.locator("#gallery .caption-label").count() == len(good) == 197)
    caption = many.locator("#gallery .caption-label").first.inner_text()
    assert good[0] in caption
    with many.expect_download() as download:
        many.locator("#totals .csv-link").click()
    rows = list(csv.DictReader(Path(download.value.path()).read_text().splitlines()))
    assert download.value.suggested_filename == "predictions.csv"
    assert len(rows) == 200
    for row, result in zip(rows, results, strict=True):
        assert row["path"] == result.path.removeprefix(f"{archive.parent}/")
        assert (row["error"] or None) == result.error
        if result.predictions:
            assert row["name_1"] == result.predictions[0].name
            assert float(row["probability_1"]) == pytest.approx(
                result.predictions[0].probability, abs=1e-6
            )
    failed = {row["path"]: row["error"] for row in rows if row["status"] == "error"}
    assert failed.keys() == {f"pictures.zip/{name}" for name in BAD}
    for name, (_, reason) in BAD.items():
        assert reason in failed[f"pictures.zip/{name}"]
    assert server.stderr.read_text() == before


@pytest.mark.browser
def test_bad_file_is_a_row_with_the_reason(many: Any, samples: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture, just words\n")
    choose(many, bad, samples / "goldfish" / "val_68.JPEG")
    many.wait_for_selector("#totals .csv-link")
    assert "2 pictures" in words(many, "#totals")
    # The table has hidden copies of its rows, to measure them.
    many.locator("#table").get_by_text("not an image").filter(visible=True).wait_for()
    assert many.locator("#totals dd").count() == 0, "accuracy of pictures without labels"


@pytest.mark.browser
def test_says_in_words_that_there_is_nothing_to_do(many: Any, tmp_path: Path) -> None:
    many.get_by_role("button", name="Classify them").click()
    wait_for(lambda: "choose some first" in words(many, "#totals .problem"))
    empty = tmp_path / "nothing.zip"
    with zipfile.ZipFile(empty, "w") as zipped:
        zipped.writestr("readme.txt", "no pictures")
    choose(many, empty)
    wait_for(lambda: "no images in nothing.zip" in words(many, "#totals .problem"))


@pytest.mark.browser
def test_models_are_described(page: Any) -> None:
    page.get_by_role("tab", name="Models").click()
    page.wait_for_selector(".cards article")
    for name, path in installed_models().items():
        card = read_card(path)
        article = page.locator(".cards article", has=page.get_by_text(name, exact=True))
        text = article.inner_text()
        assert f"{card.parameters:,}" in text
        assert card.accuracy is not None
        assert f"{100 * card.accuracy[0]:.1f}\xa0%" in text
        article.locator("summary", has_text=f"{len(card.labels)} classes").click()
        assert card.labels[-1].name in article.inner_text()


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[390, 1440])
def wide(
    request: pytest.FixtureRequest, context: Any, server: Server, scheme: str
) -> Iterator[Any]:
    size = {"width": request.param, "height": 844 if request.param < 640 else 900}
    with context.browser.new_context(viewport=size, color_scheme=scheme) as own:
        yield open_page(own, server)


@pytest.mark.slow
@pytest.mark.browser
def test_fits_phones_and_desktops_in_light_and_dark(wide: Any, scheme: str, tmp_path: Path) -> None:
    """Nothing wider than the window, and text that stands out; the pictures are for people."""
    width = wide.viewport_size["width"]

    def keep(name: str) -> None:
        wide.wait_for_timeout(300)  # what moves comes to rest
        wide.screenshot(path=tmp_path / f"{name}-{width}-{scheme}.png", full_page=True)
        assert wide.evaluate("document.documentElement.scrollWidth") <= width
        for selector in ("#classes", "#models", "#totals", ".cards"):
            part = wide.locator(selector).first
            if part.is_visible():
                scroll, client = part.evaluate("e => [e.scrollWidth, e.clientWidth]")
                assert scroll <= client, f"{selector} is cut off"

    keep("empty")
    wide.get_by_label("baseline", exact=True).first.check()  # looks fastest
    wide.locator("#samples .gallery-item").first.click()
    shown(wide)
    wide.wait_for_selector("#models table")
    wide.get_by_role("button", name="Where did it look?").click()
    wide.wait_for_selector("#heat img")
    keep("one")
    light = wide.evaluate(
        """[getComputedStyle(document.body).backgroundColor,
            getComputedStyle(document.querySelector("#classes .best")).color].map(
            colour => colour.match(/[0-9.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0))"""
    )
    background, text = light
    assert abs(background - text) > 450
    assert (background > text) == (scheme == "light")
    wide.get_by_role("tab", name="Many pictures").click()
    wide.get_by_role("button", name="Try the samples").click()
    wide.wait_for_selector("#totals .csv-link")
    wide.wait_for_selector("#gallery img")
    keep("many")
    wide.get_by_role("tab", name="Models").click()
    wide.wait_for_selector(".cards article")
    keep("models")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Server]]:
    """A page that shows a model by a long path; among the installed ones is a broken one."""
    folder = tmp_path_factory.mktemp("own")
    path = folder / ("of-models-" * 10) / "baseline_that_somebody_has_trained_anew.onnx"
    broken = path.parent / ("of_installed_models_" * 4) / "broken.onnx"
    broken.parent.mkdir(parents=True)
    broken.write_text("no model")
    shutil.copy(find_model("baseline", PRECISIONS[::-1]), path)
    models = f"{broken.parent}{os.pathsep}{os.environ['TINYSERVE_MODELS']}"
    with started(f"app.py --model {path}", folder, TINYSERVE_MODELS=models) as server:
        yield path, server


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_long_paths_cut_nothing_off(
    own: tuple[Path, Server], browser: Any, width: int, tmp_path: Path
) -> None:
    path, server = own

    def check(page: Any, *places: str) -> None:
        page.screenshot(path=tmp_path / f"{width}-{len(places)}.png", full_page=True)
        for place in places:
            parts = page.locator(place).filter(visible=True).all()
            assert parts
            for part in parts:
                scroll, client = part.evaluate("e => [e.scrollWidth, e.clientWidth]")
                assert scroll <= client, f"{place} is cut off"

    with browser.new_context(viewport={"width": width, "height": 844}) as context:
        page = open_page(context, server)
        page.locator("#samples .gallery-item").first.click()
        page.wait_for_selector("#models table")
        assert str(path.parent) in words(page, "#models [colspan]")
        page.get_by_role("button", name="Where did it look?").click()
        page.wait_for_selector("#heat img")
        check(page, "fieldset", "#models.block", "#heat-note")
        # What is too wide all the same, a class of one long word, can be scrolled to.
        models = page.locator("#models.block")
        assert models.evaluate("e => getComputedStyle(e).overflowX") == "auto"
        page.get_by_label("broken", exact=True).first.check()
        page.wait_for_selector("#classes .problem")
        check(page, "#classes.block")
        page.get_by_role("tab", name="Models").click()
        page.wait_for_selector(".cards article")
        check(page, ".cards article", ".cards")


@pytest.mark.slow
@pytest.mark.browser
def test_ones_own_model_is_described_too(own: tuple[Path, Server], browser: Any) -> None:
    path, server = own
    with browser.new_context() as context:
        page = open_page(context, server)
        page.get_by_role("tab", name="Models").click()
        page.wait_for_selector(".cards article")
        names = page.locator(".cards h3").all_inner_texts()
        assert sorted(names) == sorted([*installed_models(), "broken", str(path)])
        article = page.locator(".cards article", has=page.get_by_text(str(path), exact=True))
        assert f"{read_card(path).parameters:,}" in article.inner_text()


def test_many_by_name(client: Any, classifier: Classifier, archive: Path, samples: Path) -> None:
    from gradio_client import handle_file

    photo = samples / "tabby" / "val_76.JPEG"
    rows = client.predict([handle_file(archive), handle_file(photo)], api_name="/classify_many")
    results = list(classifier.classify_many(find_inputs([str(archive), str(photo)])))
    assert len(rows) == 201
    for row, result in zip(rows, results, strict=True):
        assert result.path.endswith(row["picture"])
        assert row["error"] == result.error
        assert [p["probability"] for p in row["predictions"]] == pytest.approx(
            [p.probability for p in result.predictions], abs=1e-6
        )
    assert [row["correct"] for row in rows[:200]] == [result.correct for result in results[:200]]


def test_one_file_by_name_needs_no_list(client: Any, samples: Path) -> None:
    from gradio_client import handle_file

    photo = handle_file(samples / "tabby" / "val_76.JPEG")
    alone = client.predict(photo, api_name="/classify_many")
    assert alone == client.predict([photo], api_name="/classify_many")


@pytest.mark.parametrize("nonsense", [None, 5, "path"])
def test_what_is_no_file_is_refused_in_words(client: Any, server: Server, nonsense: object) -> None:
    from gradio_client.exceptions import AppError

    before = server.stderr.read_text()
    with pytest.raises(AppError, match=r"^send an uploaded file$"):
        client.predict(nonsense, api_name="/classify_many")
    assert server.stderr.read_text() == before


def test_too_many_are_refused(client: Any, tmp_path: Path) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    path = tmp_path / "thousands.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        for number in range(1001):
            zipped.writestr(f"{number}.jpg", b"")
    with pytest.raises(AppError, match="more than 1,000 pictures"):
        client.predict([handle_file(path)], api_name="/classify_many")


def test_names_inside_an_archive_are_only_names(client: Any, samples: Path, tmp_path: Path) -> None:
    from gradio_client import handle_file

    path = tmp_path / "escape.zip"
    name = f"../../../..{tmp_path}/goldfish/escaped.jpg"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.write(samples / "goldfish" / "val_68.JPEG", name)
    (row,) = client.predict([handle_file(path)], api_name="/classify_many")
    assert row["picture"] == f"escape.zip/{name}"
    assert row["label"] == "n01443537"
    assert not (tmp_path / "goldfish").exists()
