"""``tinyserve serve`` as its users meet it: the real command, and their own clients unmodified."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import SECONDS, until

from tinyserve import Classifier

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
PROXIES = {"http_proxy", "https_proxy", "all_proxy"}
ENVIRONMENT = {key: value for key, value in os.environ.items() if key.lower() not in PROXIES} | {
    "PYTHONPATH": str(ROOT)
}


class Server:
    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self.log = log
        self.url = process.stdout.readline().strip()
        assert self.url, log.read_text()
        self.address = self.url.removeprefix("http://")
        until(lambda: self.get("/v2/health/ready").status_code == 200, "it is not ready")

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, trust_env=False, timeout=SECONDS)


@contextlib.contextmanager
def serving(folder: Path, *arguments: str):
    """``tinyserve serve`` with these arguments; its log is a file in ``folder``."""
    command = [sys.executable, "-m", "tinyserve.cli", "serve", "--port", "0", "--device", "cpu"]
    log = folder / "log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=ENVIRONMENT,
        ) as process,
    ):
        try:
            yield Server(process, log)
        finally:
            process.terminate()
            assert process.wait(SECONDS) == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    with serving(folder, "-m", "resnet20", "-m", "inception") as server:
        yield server
    assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="module")
def goldfish(samples):
    return samples / "goldfish" / "val_68.JPEG"


@pytest.fixture(scope="module")
def expected(goldfish):
    """Probabilities by class, of the command line's predictor."""
    predictions = Classifier("inception", device="cpu").classify(goldfish, k=200)
    return [p.probability for p in sorted(predictions, key=lambda p: p.index)]


@pytest.fixture
def tensors(goldfish):
    """The picture as a tensor of tritonclient's, of files and of pixels, in binary and in JSON."""
    import base64

    from tritonclient import http

    from tinyserve import images

    data = goldfish.read_bytes()
    pixels = images.load(data, size=64)[None]
    found = {}
    for kind, value in {
        "file": np.array([data], object),
        "file in JSON": np.array([base64.b64encode(data)], object),
        "pixels": pixels,
        "pixels in JSON": pixels,
    }.items():
        name, datatype = ("images", "UINT8") if "pixels" in kind else ("image_bytes", "BYTES")
        tensor = http.InferInput(name, list(value.shape), datatype)
        found[kind] = tensor.set_data_from_numpy(value, binary_data="JSON" not in kind)
    return found


@pytest.mark.parametrize("kind", ["file", "file in JSON", "pixels", "pixels in JSON"])
@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient(server, tensors, expected, kind, binary):
    from tritonclient import http

    output = http.InferRequestedOutput("probabilities", binary_data=binary)
    with http.InferenceServerClient(server.address) as client:
        result = client.infer("inception", [tensors[kind]], outputs=[output], request_id="mine")
    assert result.get_response()["id"] == "mine"
    assert result.as_numpy("probabilities")[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_classification(server, tensors, expected, binary):
    from tritonclient import http

    output = http.InferRequestedOutput("probabilities", binary_data=binary, class_count=3)
    with http.InferenceServerClient(server.address) as client:
        found = client.infer("inception", [tensors["file"]], outputs=[output])
    (row,) = found.as_numpy("probabilities")
    value, index, name = (row[0].decode() if binary else row[0]).split(":")
    assert len(row) == 3
    assert int(index) == int(np.argmax(expected))
    assert float(value) == pytest.approx(max(expected), abs=1e-6)
    assert name == Classifier("inception", device="cpu").card.labels[int(index)].name


def test_tritonclient_asks_for_more_at_a_time(server, tensors, expected):
    from tritonclient import http

    with http.InferenceServerClient(server.address, concurrency=8) as client:
        sent = [client.async_infer("inception", [tensors["pixels"]]) for _ in range(8)]
        for request in sent:
            row = request.get_result().as_numpy("probabilities")[0]
            assert row == pytest.approx(expected, abs=1e-5)


def test_tritonclient_with_asyncio(server, tensors, expected):
    from tritonclient.http import aio

    async def main():
        async with aio.InferenceServerClient(server.address) as client:
            assert await client.is_server_ready()
            asked = (client.infer("inception", [tensors["file"]]) for _ in range(8))
            return [result.as_numpy("probabilities")[0] for result in await asyncio.gather(*asked)]

    for row in asyncio.run(main()):
        assert row == pytest.approx(expected, abs=1e-5)


def test_tritonclient_asks_for_health_metadata_and_errors(server, tensors):
    from tritonclient import http
    from tritonclient.utils import InferenceServerException

    with http.InferenceServerClient(server.address) as client:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("inception", "1")
        assert not client.is_model_ready("vgg")
        assert client.get_server_metadata()["name"] == "tinyserve"
        assert client.get_model_metadata("resnet20")["platform"] == "onnxruntime_onnx"
        names = [entry["name"] for entry in client.get_model_repository_index()]
        assert names == ["resnet20", "inception"]
        with pytest.raises(InferenceServerException, match="unknown model 'vgg'"):
            client.infer("vgg", [tensors["pixels"]])


def test_curl(server, goldfish, expected):
    def curl(*arguments):
        command = ["curl", "-sS", *map(str, arguments)]
        run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    url = f"{server.url}/classify?model=inception&k=1"
    (best,) = curl("--data-binary", f"@{goldfish}", url)["predictions"]
    assert best["probability"] == pytest.approx(max(expected), abs=1e-6)
    form = curl("-F", f"a=@{goldfish}", "-F", f"b=@{ROOT / 'README.md'}", url)["results"]
    assert form[0]["predictions"] == [best]
    assert "not an image" in form[1]["error"]


def test_the_clients_of_the_readme(server):
    clients = [block for block in BLOCKS if "localhost:8000" in block and "gradio" not in block]
    assert all(any(name in client for client in clients) for name in ("requests", "triton"))
    for client in clients:
        code = client.replace("localhost:8000", server.address)
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=120,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert "goldfish" in run.stdout


KSERVE = """
import asyncio, sys
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

async def main(url):
    client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=60))
    print(await client.is_server_live(url), await client.is_server_ready(url),
          await client.is_model_ready(url, "inception"))
    images = np.zeros((2, 64, 64, 3), np.uint8)
    for binary in (False, True):
        tensor = InferInput("images", list(images.shape), "UINT8")
        tensor.set_data_from_numpy(images, binary_data=binary)
        request = InferRequest("inception", [tensor])
        answer = await client.infer(url, request, model_name="inception")
        print(*answer.outputs[0].shape)

asyncio.run(main(sys.argv[1]))
"""


def test_kserve(server):
    python = os.environ.get("KSERVE_PYTHON")
    if not python:
        pytest.skip("KSERVE_PYTHON names no Python with kserve, whose requirements clash with ours")
    run = subprocess.run(
        [python, "-c", KSERVE, server.url],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=180,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True", "True", "True", "2", "200", "2", "200"]


def test_metrics_are_what_prometheus_reads(server):
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    ours = {name: family.type for name, family in families.items() if name.startswith("tinyserve")}
    kinds = {name: kind for name, kind in ours.items() if not name.endswith("_created")}
    assert kinds == {
        "tinyserve_requests": "counter",
        "tinyserve_reloads": "counter",
        "tinyserve_request_seconds": "histogram",
        "tinyserve_stage_seconds": "histogram",
        "tinyserve_batch_images": "histogram",
        "tinyserve_queue_images": "gauge",
        "tinyserve_model_info": "gauge",
    }
    assert all(family.documentation for family in families.values() if family.name in kinds)
    assert {"process_open_fds", "process_resident_memory_bytes"} <= set(families)


@pytest.mark.slow
def test_schemathesis_finds_nothing_but_pictures_missing(server, tmp_path):
    tool = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("schemathesis is not installed")
    command = [tool, "run", f"{server.url}/openapi.json", "--max-examples", "4", "--no-color"]
    command += ["--phases", "examples,coverage,fuzzing", "--generation-deterministic"]
    # No tool can make up pictures, and what is no picture is refused.
    command += ["--exclude-checks", "positive_data_acceptance"]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, timeout=300
    )
    assert run.returncode == 0, run.stdout
    assert "Tested: 12" in run.stdout


def test_the_log_is_json_with_the_id_of_each_request(tmp_path):
    with serving(tmp_path, "-m", "inception", "--log-format", "json") as server:
        url = f"{server.url}/v2?key=secret"
        httpx.get(url, headers={"X-Request-Id": "trace-7"}, trust_env=False, timeout=SECONDS)
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    (line,) = (line for line in lines if line.get("id") == "trace-7")
    assert (line["status"], line["method"], line["path"]) == (200, "GET", "/v2")
    assert line["ms"] >= 0 and line["client"] == "127.0.0.1"
    assert all({"time", "level"} <= line.keys() for line in lines)


def test_more_than_this_machine_without_a_key_is_warned_of(tmp_path):
    with serving(tmp_path, "-m", "inception", "--host", "0.0.0.0") as server:
        pass
    assert "--api-key-file asks for a key" in server.log.read_text()
    keys = tmp_path / "keys"
    keys.write_text("secret")
    command = ["-m", "inception", "--host", "0.0.0.0", "--api-key-file", str(keys)]
    with serving(tmp_path, *command) as server:
        pass
    assert "asks for a key" not in server.log.read_text()


def load(address: str, body: bytes, told: threading.Event, lost: list[str]) -> int:
    """Requests over one connection after the other until there is no more server; how many were
    answered. A request that was sent over a good connection and not answered is lost; a connection
    that was never answered may have been made to a server that had left already."""
    host, port = address.split(":")
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    answered = 0
    while True:
        try:
            connection = socket.create_connection((host, int(port)), timeout=SECONDS)
        except ConnectionError:
            assert told.is_set()
            return answered
        with connection, connection.makefile("rb") as answers:
            close, good = False, False
            while not close:
                try:
                    connection.sendall(head + body)
                    status = answers.readline()
                except ConnectionError:
                    status = b""
                if not status:
                    assert told.is_set() and not good
                    return answered
                good = True
                headers = dict(
                    line.strip().lower().split(b": ", 1) for line in iter(answers.readline, b"\r\n")
                )
                answers.read(int(headers[b"content-length"]))
                close = headers.get(b"connection") == b"close"
                if b" 200 " not in status:
                    lost.append(status.decode())
                answered += 1


@pytest.mark.slow
def test_sigterm_under_load_loses_no_request(goldfish, tmp_path):
    body, told = goldfish.read_bytes(), threading.Event()
    lost: list[str] = []
    answered: list[int] = []

    def client() -> None:
        try:
            answered.append(load(server.address, body, told, lost))
        except Exception as error:
            lost.append(repr(error))

    with serving(tmp_path, "-m", "inception") as server:
        clients = [threading.Thread(target=client) for _ in range(16)]
        for thread in clients:
            thread.start()
        until(lambda: server.log.read_text().count("path=/classify") > 50)
        told.set()
        server.process.send_signal(signal.SIGTERM)
        for thread in clients:
            thread.join(SECONDS)
        assert server.process.wait(SECONDS) == 0
    assert lost == []
    assert server.log.read_text().count("path=/classify") == sum(answered)


@pytest.mark.slow
def test_the_benchmark_prints_ratios():
    script = [sys.executable, ROOT / "benchmarks" / "serving.py", "inception", "--seconds", "0.3"]
    for arguments, words in [
        (["--connections", "1,4", "--rounds", "1"], "of the model alone"),
        (["--overload", "20", "--pixels"], "queue / throughput"),
    ]:
        run = subprocess.run(
            [*script, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
        )
        assert run.returncode == 0, run.stderr
        assert words in run.stdout
        assert "lost" not in run.stdout
