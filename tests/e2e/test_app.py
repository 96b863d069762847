"""The demo page, as its visitors meet it: the real ``python app.py`` in a real Chromium."""

import dataclasses
import http.client
import importlib.util
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tinyserve import Classifier, Prediction
from tinyserve.modelfile import DEFAULT_MODEL, PRECISIONS, find_model, model_names

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120
MILLISECONDS = 120_000
"""How long the browser waits for what a busy machine may take a while to show."""
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]

# Python runs a module of this name when it starts. Audit events come from below every way to use
# a socket, so nothing is missed; what would leave the machine is written down and refused.
SITECUSTOMIZE = """
import os, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments
    else:
        return
    if not isinstance(address, tuple):  # a Unix socket
        return
    host = address[0].decode() if isinstance(address[0], bytes) else address[0]
    local = host in (None, "", "localhost", "::1", "0.0.0.0") or host.startswith("127.")
    with open(os.environ["SOCKET_RECORD"], "a") as record:
        record.write(f"{'local' if local else 'OUTSIDE'} {event} {host}\\n")
    if not local:
        raise OSError(f"{event} {host}: refused by the test")

sys.addaudithook(watch)
"""


@dataclass(frozen=True)
class Server:
    url: str
    record: Path
    """What its sockets were asked for, see :data:`SITECUSTOMIZE`."""
    stdout: Path
    stderr: Path
    start_errors: str = ""

    def outside(self) -> list[str]:
        """What the server tried to reach off this machine."""
        lines = self.record.read_text().splitlines()
        assert any(line.startswith("local ") for line in lines), "nothing was recorded at all"
        return [line for line in lines if not line.startswith("local ")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed (pip install 'tinyserve[demo]')")
    folder = tmp_path_factory.mktemp("app")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    port = _free_port()
    found = Server(
        f"http://127.0.0.1:{port}/", folder / "record", folder / "stdout", folder / "stderr"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
        "SOCKET_RECORD": str(found.record),
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
    }
    # Gradio must be kept quiet by the page, not by whoever runs the tests.
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        environment.pop(name, None)
    command = [sys.executable, "app.py", "--port", str(port)]
    with (
        found.stdout.open("wb") as stdout,
        found.stderr.open("wb") as stderr,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr) as app,
    ):
        try:
            _wait_until_printed(app, found)
            yield dataclasses.replace(found, start_errors=found.stderr.read_text())
        finally:
            app.terminate()


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM)
        yield browser.new_context(permissions=["clipboard-read", "clipboard-write"])
        browser.close()


@pytest.fixture
def page(server: Server, context: Any) -> Iterator[Any]:
    page = context.new_page()
    page.set_default_timeout(MILLISECONDS)
    page.goto(server.url)
    page.wait_for_selector("input[type=file]", state="attached")
    yield page
    page.close()


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier()


@pytest.fixture
def jpeg(tmp_path: Path) -> Path:
    path = tmp_path / "picture.jpg"
    _image(1).save(path, quality=80)
    return path


@pytest.mark.browser
@pytest.mark.parametrize("name", ["plain.jpg", "turned.jpg", "grey.jpeg", "clear.png", "moved.gif"])
def test_shows_what_the_classifier_says(
    page: Any, classifier: Classifier, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    _save(path)
    _upload(page, path)
    assert _shown(page) == _expected(classifier.classify(path))
    assert " ms on " in _status(page)


@pytest.mark.browser
def test_other_model_answers_too(page: Any, jpeg: Path) -> None:
    other = next((name for name in model_names() if name != DEFAULT_MODEL), None)
    if other is None:
        pytest.skip("only one model is installed")
    _upload(page, jpeg)
    before = _shown(page)
    expected = _expected(Classifier(other).classify(jpeg))
    assert expected != before
    page.get_by_label(other, exact=True).check()
    _wait_for(lambda: _shown(page) == expected)


@pytest.mark.browser
def test_sample_is_classified_when_clicked(page: Any, classifier: Classifier) -> None:
    samples = sorted((ROOT / "samples").glob("*/*.JPEG"))
    if not samples:
        pytest.skip("no samples")
    thumbnail = page.locator("#samples .gallery-item").last
    name = thumbnail.locator("img").get_attribute("src").rpartition("/")[2]
    thumbnail.click()
    (expected,) = (_expected(classifier.classify(s)) for s in samples if s.name == name)
    assert _shown(page) == expected


@pytest.mark.browser
def test_picture_can_be_pasted(page: Any, classifier: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "pasted.png"
    _image(2).save(path)
    page.evaluate(
        """async bytes => navigator.clipboard.write([new ClipboardItem(
            {"image/png": new Blob([new Uint8Array(bytes)], {type: "image/png"})})])""",
        list(path.read_bytes()),
    )
    page.get_by_label("Paste from clipboard").click()
    assert _shown(page) == _expected(classifier.classify(path))


@pytest.mark.browser
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no picture, just words\n", "not an image"),
        (None, "damaged image"),
        (b"", "empty file"),
    ],
    ids=["text", "truncated", "empty"],
)
def test_says_in_words_what_is_no_picture(
    page: Any,
    server: Server,
    jpeg: Path,
    tmp_path: Path,
    content: bytes | None,
    words: str,
) -> None:
    bad = tmp_path / "bad.jpg"
    half = jpeg.read_bytes()[: jpeg.stat().st_size // 2]
    bad.write_bytes(half if content is None else content)
    before = server.stderr.read_text()
    _upload(page, jpeg)
    assert _shown(page)
    _upload(page, bad)
    _wait_for(lambda: words in _status(page))
    assert _status(page).startswith("⚠️ Cannot classify this picture: ")
    assert page.locator("[data-testid=label-output-value]").count() == 0, "an old answer stands"
    assert "Traceback" not in page.inner_text("body")
    assert server.stderr.read_text() == before


@pytest.mark.browser
def test_browser_calls_no_other_machine(context: Any, server: Server, jpeg: Path) -> None:
    called: list[str] = []
    page = context.new_page()
    page.set_default_timeout(MILLISECONDS)
    page.on("request", lambda request: called.append(request.url))
    page.on("websocket", lambda websocket: called.append(websocket.url))
    page.goto(server.url)
    page.wait_for_selector("input[type=file]", state="attached")
    _upload(page, jpeg)
    _shown(page)
    page.wait_for_load_state("networkidle")
    # What a browser may look up without a request: <link rel="preconnect"> and its like.
    called += page.evaluate(
        "[...document.querySelectorAll('link[href], [src]')].map(e => e.href || e.src)"
    )
    page.close()
    assert any(url.endswith("/gradio_api/upload") or "/upload?" in url for url in called)
    assert [url for url in called if not _on_this_machine(url)] == []


@pytest.mark.browser
def test_server_calls_no_other_machine(page: Any, server: Server, jpeg: Path) -> None:
    _upload(page, jpeg)
    assert _shown(page)
    assert server.outside() == []


@pytest.mark.parametrize("name", ["plain.jpg", "turned.jpg", "clear.png"])
def test_endpoint_gives_the_very_same_numbers(
    client: Any, classifier: Classifier, tmp_path: Path, name: str
) -> None:
    from gradio_client import handle_file  # type: ignore[import-untyped]

    path = tmp_path / name
    _save(path)
    label, status = client.predict(handle_file(path), DEFAULT_MODEL, api_name="/classify")
    assert [(c["label"], c["confidence"]) for c in label["confidences"]] == [
        (p.name, p.probability) for p in classifier.classify(path)
    ]
    assert " ms on " in status


def test_endpoint_opens_neither_addresses_nor_foreign_files(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    _image(3).save(secret)
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

    path = str(find_model(DEFAULT_MODEL, PRECISIONS[::-1]).resolve())
    label, status = client.predict(handle_file(jpeg), path, api_name="/classify")
    assert "unknown model" in status
    assert not label


def test_start_is_quiet(server: Server) -> None:
    url, line = server.stdout.read_text().splitlines()
    assert url == server.url
    assert line.startswith(f"{DEFAULT_MODEL} on ")
    assert server.start_errors == ""


@pytest.mark.parametrize(
    ("options", "before", "code", "words"),
    [
        (["--model", "nope"], "", 1, "unknown model 'nope'"),
        (["--port", "{taken}"], "", 2, "cannot listen on 127.0.0.1 port"),
        ([], "sys.modules['gradio'] = None", 2, "pip install 'tinyserve[demo]'"),
    ],
    ids=["model", "port", "gradio"],
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


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed")
    client = gradio_client.Client(server.url, verbose=False, analytics_enabled=False)
    yield client
    client.close()


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


def _image(seed: int) -> Image.Image:
    """A gradient under noise: no two seeds look alike, and decoders that differ show it."""
    generator = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, 96)[None, :, None] * generator.random(3)
    noise = generator.integers(0, 56, (80, 96, 3))
    return Image.fromarray((ramp + noise).astype(np.uint8))


def _save(path: Path) -> None:
    """A picture of the kind that the file's name tells."""
    image = _image(4)
    if path.stem == "turned":  # lies on its side, and says so
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, exif=exif, quality=80)
    elif path.stem == "clear":
        image.putalpha(Image.fromarray(np.asarray(image)[..., 0]))
        image.save(path)
    elif path.stem == "moved":
        image.save(path, save_all=True, append_images=[_image(5)])
    else:
        (image.convert("L") if path.stem == "grey" else image).save(path, quality=80)


def _upload(page: Any, path: Path) -> None:
    """Choose a file; whatever picture there is is taken away first."""
    remove = page.locator("#picture").get_by_label("Clear")
    if remove.count():
        remove.click()
    page.wait_for_selector("#picture input[type=file]", state="attached")
    page.set_input_files("#picture input[type=file]", path)


def _shown(page: Any) -> list[tuple[str, str]]:
    """The names and percentages on the page, once there are any."""
    page.wait_for_selector("[data-testid=label-output-value]")
    # All of it at one moment: the page may be about to change.
    heading, *rows = page.evaluate(
        """[...document.querySelectorAll(
            "[data-testid=label-output-value], #classes [data-testid$='-confidence-set']"
        )].map(element => element.innerText.split("\\n").map(line => line.trim()))"""
    )
    shown = [(lines[0], lines[-1]) for lines in rows]
    assert heading == [shown[0][0]]
    return shown


def _expected(predictions: Sequence[Prediction]) -> list[tuple[str, str]]:
    return [(p.name, f"{math.floor(100 * p.probability + 0.5)}%") for p in predictions]


def _status(page: Any) -> str:
    texts: list[str] = page.locator("#status .prose").all_inner_texts()
    return "".join(texts).strip()


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + MILLISECONDS / 1000
    while not condition():
        assert time.monotonic() < deadline, "the page never showed it"
        time.sleep(0.05)


def _on_this_machine(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob") or parts.hostname in ("127.0.0.1", "localhost")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _wait_until_printed(app: subprocess.Popen[bytes], server: Server) -> None:
    """Until the address is printed, which comes after the server answers."""
    deadline = time.monotonic() + START_SECONDS
    while not server.stdout.read_text().count("\n") >= 2:
        if app.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"app.py did not start:\n{server.stderr.read_text()}")
        time.sleep(0.2)
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=START_SECONDS)
    connection.request("GET", "/")
    assert connection.getresponse().status == http.client.OK
    connection.close()
