"""The demo page, served and opened."""

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_page import (
    CHROMIUM,
    ROOT,
    SITECUSTOMIZE,
    Server,
    free_port,
    noise,
    open_page,
    wait_until_printed,
)

from tinyserve import Classifier


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed (pip install 'tinyserve[demo]')")
    folder = tmp_path_factory.mktemp("app")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    port = free_port()
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
            wait_until_printed(app, found)
            yield dataclasses.replace(found, start_errors=found.stderr.read_text())
        finally:
            app.terminate()
            code = app.wait(60)
    left = [path.name for path in (folder / "uploads").rglob("*.jpg") if path.is_file()]
    assert (code, left) == (0, [])  # it ends as with Ctrl-C, and keeps nobody's pictures


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser: Any) -> Any:
    return browser.new_context(permissions=["clipboard-read", "clipboard-write", "camera"])


@pytest.fixture
def page(server: Server, context: Any) -> Iterator[Any]:
    page = open_page(context, server)
    yield page
    page.close()


@pytest.fixture(scope="session")
def classifier() -> Classifier:
    return Classifier()


@pytest.fixture
def jpeg(tmp_path: Path) -> Path:
    path = tmp_path / "picture.jpg"
    noise(1).save(path, quality=80)
    return path


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed")
    client = gradio_client.Client(server.url, verbose=False, analytics_enabled=False)
    yield client
    client.close()
