"""The demo page, served and opened."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_page import CHROMIUM, Server, noise, open_page, started

from tinyserve import Classifier


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with started("app.py", tmp_path_factory.mktemp("app")) as server:
        yield server


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
