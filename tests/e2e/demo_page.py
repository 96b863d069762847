"""The demo page for its tests: the real server, a real browser, and what stands on the page."""

import contextlib
import dataclasses
import http.client
import importlib.util
import io
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tinyserve import Prediction

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120
MILLISECONDS = 60_000
"""How long the browser waits for what a busy machine may take a while to show."""
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
    "--use-fake-device-for-media-stream",
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
    temporary: Path
    """The folder that it has for temporary files."""
    start_errors: str = ""

    def outside(self) -> list[str]:
        """What the server tried to reach off this machine."""
        lines = self.record.read_text().splitlines()
        assert any(line.startswith("local ") for line in lines), "nothing was recorded at all"
        return [line for line in lines if not line.startswith("local ")]


@contextlib.contextmanager
def started(
    command: str, folder: Path, ended_by: int = signal.SIGTERM, **variables: str
) -> Iterator[Server]:
    """The server that a command starts, given a port, until the end of a block.

    ``variables`` are added to its environment. It ends as with Ctrl-C, and keeps nobody's pictures.
    """
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed (pip install 'tinyserve[demo]')")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    port = free_port()
    found = Server(
        f"http://127.0.0.1:{port}/",
        *(folder / name for name in ("record", "stdout", "stderr", "temporary")),
    )
    found.temporary.mkdir()
    environment = {
        **os.environ,
        **variables,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
        "SOCKET_RECORD": str(found.record),
        "TMPDIR": str(found.temporary),
    }
    # Gradio must be kept quiet and apart by the page, not by whoever runs the tests.
    for name in (
        "GRADIO_ANALYTICS_ENABLED",
        "GRADIO_TEMP_DIR",
        "HF_HUB_OFFLINE",
        "HF_HUB_DISABLE_TELEMETRY",
    ):
        environment.pop(name, None)
    arguments = [sys.executable, *command.split(), "--port", str(port)]
    with (
        found.stdout.open("wb") as stdout,
        found.stderr.open("wb") as stderr,
        subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr) as app,
    ):
        try:
            wait_until_printed(app, found)
            yield dataclasses.replace(found, start_errors=found.stderr.read_text())
        finally:
            app.send_signal(ended_by)
            try:
                code = app.wait(60)
            finally:
                app.kill()  # or leaving the block would wait for it
    assert (code, list(found.temporary.iterdir())) == (0, [])


def noise(seed: int) -> Image.Image:
    """A gradient under noise: no two seeds look alike, and decoders that differ show it."""
    generator = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, 96)[None, :, None] * generator.random(3)
    grain = generator.integers(0, 56, (80, 96, 3))
    return Image.fromarray((ramp + grain).astype(np.uint8))


def save(path: Path) -> None:
    """A picture of the kind that the file's name tells."""
    image = noise(4)
    if path.stem == "turned":  # lies on its side, and says so
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, exif=exif, quality=80)
    elif path.stem == "clear":
        image.putalpha(Image.fromarray(np.asarray(image)[..., 0]))
        image.save(path)
    elif path.stem == "moved":
        image.save(path, save_all=True, append_images=[noise(5)])
    else:
        (image.convert("L") if path.stem == "grey" else image).save(path, quality=80)


def save_many(path: Path, count: int) -> None:
    """An archive of large pictures, all the same, which take a while to decode."""
    picture = io.BytesIO()
    noise(7).resize((1000, 1000)).save(picture, "PNG")
    with zipfile.ZipFile(path, "w") as zipped:
        for number in range(count):
            zipped.writestr(f"{number}.png", picture.getvalue())


def open_page(context: Any, server: Server) -> Any:
    page = context.new_page()
    page.set_default_timeout(MILLISECONDS)
    page.goto(server.url)
    page.wait_for_selector("#picture input[type=file]", state="attached")
    return page


def upload(page: Any, path: Path) -> None:
    """Choose one picture; whatever picture there is is taken away first."""
    remove = page.locator("#picture").get_by_label("Clear")
    if remove.count():
        remove.click()
    page.wait_for_selector("#picture input[type=file]", state="attached")
    page.set_input_files("#picture input[type=file]", path)


def shown(page: Any) -> list[tuple[str, float]]:
    """The names and probabilities on the page, best first, once there are any."""
    page.wait_for_selector("#classes .bars")
    # All of it at one moment: the page may be about to change.
    rows = page.evaluate(
        """[...document.querySelectorAll("#classes .bars li")].map(
            row => [row.querySelector("span").innerText, row.querySelector("data").value])"""
    )
    return [(name, float(value)) for name, value in rows]


def expected(predictions: Sequence[Prediction]) -> list[tuple[str, float]]:
    return [(p.name, pytest.approx(p.probability, abs=1e-6)) for p in predictions]


def words(page: Any, place: str) -> str:
    """What stands in a part of the page, or nothing."""
    texts: list[str] = page.locator(place).all_inner_texts()
    return " ".join(texts).strip()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + MILLISECONDS / 1000
    while not condition():
        assert time.monotonic() < deadline, "the page never showed it"
        time.sleep(0.05)


def on_this_machine(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob") or parts.hostname in ("127.0.0.1", "localhost")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def wait_until_printed(app: subprocess.Popen[bytes], server: Server) -> None:
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
