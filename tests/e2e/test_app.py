"""The demo page, as its visitors meet it: the real ``python app.py`` in a real Chromium."""

import http.client
import io
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from demo_page import (
    MILLISECONDS,
    ROOT,
    START_SECONDS,
    Server,
    expected,
    free_port,
    noise,
    on_this_machine,
    save,
    save_many,
    shown,
    started,
    upload,
    wait_for,
    words,
)
from PIL import Image

from tinyserve import Classifier, Prediction, images
from tinyserve.modelfile import DEFAULT_MODEL, PRECISIONS, find_model, model_names
from tinyserve.occlusion import occlude


@pytest.mark.browser
@pytest.mark.parametrize("name", ["plain.jpg", "turned.jpg", "grey.jpeg", "clear.png", "moved.gif"])
def test_shows_what_the_classifier_says(
    page: Any, classifier: Classifier, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    save(path)
    upload(page, path)
    assert shown(page) == expected(classifier.classify(path))
    assert " ms on " in words(page, "#classes .note")


@pytest.mark.browser
def test_other_model_answers_too(page: Any, jpeg: Path) -> None:
    other = next((name for name in model_names() if name != DEFAULT_MODEL), None)
    if other is None:
        pytest.skip("only one model is installed")
    upload(page, jpeg)
    before = shown(page)
    answer = expected(Classifier(other).classify(jpeg))
    assert before != answer
    page.get_by_label(other, exact=True).first.check()
    wait_for(lambda: shown(page) == answer)


@pytest.mark.browser
def test_sample_is_classified_when_clicked(page: Any, classifier: Classifier) -> None:
    samples = sorted((ROOT / "samples").glob("*/*.JPEG"))
    if not samples:
        pytest.skip("no samples")
    thumbnail = page.locator("#samples .gallery-item").last
    name = thumbnail.locator("img").get_attribute("src").rpartition("/")[2]
    thumbnail.click()
    (sample,) = (sample for sample in samples if sample.name == name)
    assert shown(page) == expected(classifier.classify(sample))


@pytest.mark.browser
def test_picture_can_be_pasted(page: Any, classifier: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "pasted.png"
    noise(2).save(path)
    page.evaluate(
        """async bytes => navigator.clipboard.write([new ClipboardItem(
            {"image/png": new Blob([new Uint8Array(bytes)], {type: "image/png"})})])""",
        list(path.read_bytes()),
    )
    page.get_by_label("Paste from clipboard").click()
    assert shown(page) == expected(classifier.classify(path))


@pytest.mark.browser
def test_picture_can_be_taken_with_the_camera(page: Any) -> None:
    """Chromium's own test picture stands in for the camera's."""
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    # A photo taken before the camera's first picture has no pixels, and Gradio then says nothing.
    page.wait_for_function("document.querySelector('video')?.videoWidth > 0")
    page.get_by_label("capture photo").click()
    assert len(shown(page)) == 5


@pytest.mark.browser
def test_shows_the_pixels_that_the_model_sees(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    noise(6).resize((300, 150)).save(path)
    upload(page, path)
    enlarged = picture_in(page, "#seen")
    small = np.asarray(enlarged.resize((64, 64), Image.Resampling.NEAREST))
    assert (small == images.load(path, size=64)).all()
    blocks = np.asarray(enlarged).reshape(64, 8, 64, 8, 3)
    assert (blocks == blocks[:, :1, :, :1]).all(), "the pixels are not crisp"
    assert words(page, "#seen-note") == "64 × 64 pixels"


@pytest.mark.browser
def test_all_models_side_by_side(page: Any, samples: Path) -> None:
    path = samples / "goldfish" / "val_68.JPEG"
    upload(page, path)
    page.wait_for_selector("#models table")
    rows = page.evaluate(
        """[...document.querySelectorAll("#models tbody tr")].map(row =>
            [row.querySelector("th").firstChild.data, row.cells[1].innerText,
             Number(row.querySelector("data").value), row.cells[3].innerText])"""
    )
    answers = {name: Classifier(name).classify(path)[0] for name in model_names()}
    common, votes = Counter(best.name for best in answers.values()).most_common(1)[0]
    assert rows == [
        [
            name,
            best.name,
            pytest.approx(best.probability, abs=1e-6),
            "✓" if best.name == common else "–",
        ]
        for name, best in answers.items()
    ]
    voters = f"All {votes}" if votes == len(answers) else f"{votes} of {len(answers)}"
    assert f"{voters} models say {common}." in words(page, "#models")


@pytest.mark.browser
def test_says_where_it_looked(page: Any, classifier: Classifier, samples: Path) -> None:
    page.get_by_role("button", name="Where did it look?").click()
    wait_for(lambda: words(page, "#heat-note") == "Choose a picture first.")
    path = samples / "sombrero" / "val_193.JPEG"
    upload(page, path)
    best = classifier.classify(path)[0]
    shown(page)
    page.get_by_role("button", name="Where did it look?").click()
    page.wait_for_selector("#heat img")
    assert best.name in words(page, "#heat-note")
    assert f"from {100 * best.probability:.1f}\xa0% to " in words(page, "#heat-note")
    picture_in(page, "#heat")
    # Another model would have looked elsewhere.
    page.get_by_label("alexnet", exact=True).first.check()
    page.wait_for_selector("#heat img", state="detached")


@pytest.mark.browser
def test_works_with_the_keyboard_alone(page: Any) -> None:
    def press_tab_until(focused: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement.matches('{focused}')"):
                return
        pytest.fail(f"no way to {focused} with the Tab key")

    press_tab_until("#samples .gallery-item")
    page.keyboard.press("Enter")
    before = shown(page)
    press_tab_until("input[value=inception]")
    page.keyboard.press("Space")
    wait_for(lambda: shown(page) != before)
    press_tab_until("#explain")
    page.keyboard.press("Enter")
    page.wait_for_selector("#heat img")
    page.get_by_role("tab", name="One picture").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#files", state="visible")


@pytest.mark.browser
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("bad.jpg", b"no picture, just words\n", "not an image"),
        ("half.jpg", None, "damaged image"),
        ("empty.jpg", b"", "empty file"),
    ],
    ids=["text", "truncated", "empty"],
)
def test_says_in_words_what_is_no_picture(
    page: Any,
    server: Server,
    jpeg: Path,
    tmp_path: Path,
    name: str,
    content: bytes | None,
    reason: str,
) -> None:
    bad = tmp_path / name
    half = jpeg.read_bytes()[: jpeg.stat().st_size // 2]
    bad.write_bytes(half if content is None else content)
    before = server.stderr.read_text()
    upload(page, jpeg)
    assert shown(page)
    upload(page, bad)
    wait_for(lambda: reason in words(page, "#classes .problem"))
    assert words(page, "#classes .problem").startswith("⚠️ Cannot classify this picture: ")
    assert page.locator("#classes .bars").count() == 0, "an old answer stands"
    page.wait_for_selector("#models table", state="detached")
    assert "Traceback" not in page.inner_text("body")
    assert server.stderr.read_text() == before


@pytest.mark.browser
def test_text_file_is_refused_in_words(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no picture, just words\n")
    upload(page, path)
    page.get_by_text("Invalid file type").first.wait_for()


@pytest.mark.browser
def test_huge_picture_is_refused_in_words(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    Image.new("1", (9_500, 9_500)).save(path)
    assert path.stat().st_size < 100_000
    upload(page, path)
    wait_for(lambda: "too large" in words(page, "#classes .problem"))


@pytest.mark.browser
def test_browser_calls_no_other_machine(context: Any, server: Server, jpeg: Path) -> None:
    called: list[str] = []
    page = context.new_page()
    page.set_default_timeout(MILLISECONDS)
    page.on("request", lambda request: called.append(request.url))
    page.on("websocket", lambda websocket: called.append(websocket.url))
    page.goto(server.url)
    page.wait_for_selector("input[type=file]", state="attached")
    upload(page, jpeg)
    shown(page)
    page.wait_for_load_state("networkidle")
    # What a browser may look up without a request: <link rel="preconnect"> and its like.
    called += page.evaluate(
        "[...document.querySelectorAll('link[href], [src]')].map(e => e.href || e.src)"
    )
    page.close()
    assert any(url.endswith("/gradio_api/upload") or "/upload?" in url for url in called)
    assert [url for url in called if not on_this_machine(url)] == []


@pytest.mark.browser
def test_server_calls_no_other_machine(page: Any, server: Server, jpeg: Path) -> None:
    upload(page, jpeg)
    assert shown(page)
    assert server.outside() == []


@pytest.mark.parametrize("name", ["plain.jpg", "turned.jpg", "clear.png"])
def test_endpoint_gives_the_very_same_numbers(
    client: Any, classifier: Classifier, tmp_path: Path, name: str
) -> None:
    from gradio_client import handle_file  # type: ignore[import-untyped]

    path = tmp_path / name
    save(path)
    answer = client.predict(handle_file(path), api_name="/classify")
    assert [Prediction(**fields) for fields in answer["predictions"]] == [
        *classifier.classify(path)
    ]
    assert (answer["model"], answer["error"]) == (DEFAULT_MODEL, None)
    assert answer["milliseconds"] > 0


def test_endpoint_opens_neither_addresses_nor_foreign_files(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    noise(3).save(secret)
    meta = {"_type": "gradio.FileData"}
    for image in (
        {"path": "https://example.com/picture.png", "meta": meta},
        {"path": str(secret), "meta": meta},
        {"path": str(secret)},
    ):
        answer = _call(server, [image, DEFAULT_MODEL])
        assert "confidence" not in answer
    assert server.outside() == []


def test_endpoint_takes_no_path_for_a_model(client: Any, jpeg: Path) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    path = str(find_model(DEFAULT_MODEL, PRECISIONS[::-1]).resolve())
    with pytest.raises(AppError, match="unknown model"):
        client.predict(handle_file(jpeg), path, api_name="/classify")


def test_comparison_by_name(client: Any, jpeg: Path) -> None:
    from gradio_client import handle_file

    answers = client.predict(handle_file(jpeg), api_name="/compare")
    assert {answer["model"]: answer["predictions"][0]["probability"] for answer in answers} == {
        name: Classifier(name).classify(jpeg)[0].probability
        for name in client.predict(api_name="/models")
    }


def test_explanation_by_name(client: Any, jpeg: Path) -> None:
    from gradio_client import handle_file

    answer = client.predict(handle_file(jpeg), "baseline", api_name="/explain")
    baseline = Classifier("baseline")
    best = baseline.classify(jpeg)[0]
    assert Prediction(**answer["prediction"]) == best
    occlusion = occlude(baseline.engine, images.load(jpeg, size=64), best.index)
    assert answer["heat"] == occlusion.heat.tolist()
    assert answer["lowest"] == occlusion.lowest


def test_readme_client(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio_client", reason="gradio is not installed")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "gradio_client" in block)
    assert "http://127.0.0.1:7860" in block
    exec(block.replace("http://127.0.0.1:7860", server.url), names := {})
    names["page"].close()
    assert "'name': 'goldfish'" in capsys.readouterr().out


def test_page_can_be_part_of_another_application() -> None:
    script = """
import functools, json
import fastapi, fastapi.testclient
from tinyserve import Classifier
from tinyserve.demo import build_page, options
app = fastapi.FastAPI()
load = functools.cache(functools.partial(Classifier, device="cpu"))
page = build_page(["baseline"], load)
import gradio
gradio.mount_gradio_app(app, page, "/ui", **options())
with fastapi.testclient.TestClient(app) as client:
    assert "tinyserve" in client.get("/ui/").text
    print(*client.get("/ui/gradio_api/info").json()["named_endpoints"])
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.split() == ["/classify", "/compare", "/explain", "/classify_many", "/models"]


def test_an_application_that_has_gradio_keeps_its_uploads_where_they_are() -> None:
    script = """
import os
import gradio
from tinyserve import Classifier
from tinyserve.demo import build_page
before = gradio.utils.get_upload_folder()
assert build_page(["baseline"], Classifier).GRADIO_CACHE == before, before
assert "GRADIO_TEMP_DIR" not in os.environ
"""
    environment = {name: value for name, value in os.environ.items() if name != "GRADIO_TEMP_DIR"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_uploads_are_in_a_folder_of_their_own(client: Any, server: Server, jpeg: Path) -> None:
    from gradio_client import handle_file

    client.predict(handle_file(jpeg), api_name="/classify")
    (folder,) = server.temporary.iterdir()
    assert folder.name.startswith("tinyserve-")
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IRWXU
    assert any(path.read_bytes() == jpeg.read_bytes() for path in folder.glob("*/picture.jpg"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "ended_by"),
    [
        ("app.py", signal.SIGTERM),
        ("app.py", signal.SIGINT),
        ("-m tinyserve.cli serve --ui", signal.SIGTERM),
        ("-m tinyserve.cli serve --ui", signal.SIGINT),
    ],
)
def test_an_end_during_a_job_leaves_no_uploads(command: str, ended_by: int, tmp_path: Path) -> None:
    gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed")
    path = tmp_path / "many.zip"
    save_many(path, 40)
    with started(command, tmp_path, ended_by) as server:
        client = gradio_client.Client(server.url, verbose=False, analytics_enabled=False)
        job = client.submit([gradio_client.handle_file(path)], api_name="/classify_many")
        wait_for(lambda: job.status().code.name == "PROCESSING")


@pytest.mark.slow
def test_starts_where_a_proxy_is_set_up(tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    variables = {"http_proxy": nowhere, "HTTP_PROXY": nowhere, "no_proxy": "intranet.example"}
    with started("app.py", tmp_path, **variables) as server:
        assert server.start_errors == ""


@pytest.mark.slow
def test_starts_with_next_to_nothing(tmp_path: Path) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    port = free_port()
    app = Path(__file__).parents[2] / "app.py"
    command = f"exec {sys.executable} {app} --host ::1 --port {port} --model inception >&-"
    errors = tmp_path / "errors"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            ["/bin/bash", "-c", command],
            env={"HOME": str(tmp_path), "TINYSERVE_DEVICE": "cpu"},
            cwd=app.parent,
            stderr=stderr,
        )
    try:

        def answers() -> bool:
            assert process.poll() is None, errors.read_text()
            connection = http.client.HTTPConnection("::1", port, timeout=10)
            try:
                connection.request("GET", "/")
                return connection.getresponse().status == 200
            except OSError:
                return False
            finally:
                connection.close()

        wait_for(answers)
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert errors.read_text() == ""
    assert process.returncode == 0


def test_start_is_quiet(server: Server) -> None:
    url, line = server.stdout.read_text().splitlines()
    assert url == server.url
    assert line.startswith(f"{DEFAULT_MODEL} on ")
    assert server.start_errors == ""


@pytest.mark.parametrize(
    ("options", "before", "code", "words"),
    [
        (["--model", "nope"], "", 1, "unknown model 'nope'"),
        (["-m", "nope"], "", 1, "unknown model 'nope'"),
        (["--port", "{taken}"], "", 2, "cannot listen on 127.0.0.1 port"),
        ([], "sys.modules['gradio'] = None", 2, "pip install 'tinyserve[demo]'"),
        (
            [],
            "import os; os.environ['GRADIO_TEMP_DIR'] = '/proc/none'",
            2,
            "no folder for uploads: [Errno 2] No such file or directory: '/proc/none'",
        ),
        (
            [],
            # As where everything is read-only: no file can be given a first byte.
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))",
            2,
            "no folder for uploads: [Errno 2] No usable temporary directory found",
        ),
    ],
    ids=["model", "m", "port", "gradio", "uploads", "read-only"],
)
def test_failed_start_is_one_line(
    options: Sequence[str], before: str, code: int, words: str
) -> None:
    script = f"import runpy, sys; {before}\nrunpy.run_path('app.py', run_name='__main__')"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ran = subprocess.run(
            [sys.executable, "-c", script, *(o.format(taken=port) for o in options)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
    assert (ran.returncode, ran.stdout) == (code, "")
    (line,) = ran.stderr.splitlines()
    assert words in line


def _call(server: Server, data: list[object]) -> str:
    """The events that the endpoint answers with; unlike Gradio's client, this uploads nothing."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=START_SECONDS)
    address = "/gradio_api/call/classify"
    headers = {"Content-Type": "application/json"}
    connection.request("POST", address, json.dumps({"data": data}), headers)
    event = json.load(connection.getresponse())["event_id"]
    connection.request("GET", f"{address}/{event}")
    answer = connection.getresponse().read().decode()
    connection.close()
    return answer


def picture_in(page: Any, place: str) -> Image.Image:
    """The picture that a part of the page shows, once it does."""
    address = page.wait_for_selector(f"{place} img").get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(address).body())).convert("RGB")
