"""``tinyserve serve`` over real connections: routes, limits, faults, new model files."""

import asyncio
import base64
import contextlib
import dataclasses
import http.client
import io
import json
import logging
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import simplejpeg
from fastapi.testclient import TestClient
from PIL import Image
from serving import SECONDS, running, until

from tinyserve import Classifier, images
from tinyserve.devices import default_threads
from tinyserve.engine import Engine
from tinyserve.errors import ModelFileError, UsageError
from tinyserve.modelfile import find_model
from tinyserve.server import Limits, Settings, schema
from tinyserve.server.app import build_app
from tinyserve.server.models import Models
from tinyserve.server.run import Listener
from tinyserve.server.service import Service

INDEX = "/v2/repository/index"
INFER = "/v2/models/inception/infer"


@pytest.fixture(scope="module")
def server():
    with running("inception", "baseline") as server:
        yield server


@pytest.fixture(scope="module")
def classifier():
    return Classifier("inception", device="cpu")


@pytest.fixture(scope="module")
def goldfish(samples):
    return (samples / "goldfish" / "val_68.JPEG").read_bytes()


def files_document(*files, **more):
    data = [base64.b64encode(file).decode() for file in files]
    tensor = {"name": "image_bytes", "datatype": "BYTES", "shape": [len(files)], "data": data}
    return {"inputs": [tensor], **more}


def pixels_document(pixels, **more):
    tensor = {"name": "images", "datatype": "UINT8", "shape": pixels.shape, "data": pixels.tolist()}
    return {"inputs": [tensor], **more}


def test_a_picture_is_the_same_everywhere(server, classifier, samples):
    paths = sorted(samples.glob("*/*.JPEG"))[::6]
    for path in paths:
        data = path.read_bytes()
        expected = {p.index: p.probability for p in classifier.classify(path, k=200)}
        classify = server.post("/classify?k=200", content=data).json()
        by_classify = {p["index"]: p["probability"] for p in classify["predictions"]}
        by_file = server.post(INFER, json=files_document(data)).json()["outputs"][0]["data"]
        pixels = images.load(path, size=64)[None]
        by_pixels = server.post(INFER, json=pixels_document(pixels)).json()["outputs"][0]["data"]
        assert by_classify == pytest.approx(expected, abs=1e-6)
        assert dict(enumerate(by_file)) == pytest.approx(expected, abs=1e-6)
        assert dict(enumerate(by_pixels)) == pytest.approx(expected, abs=1e-6)


def test_many_pictures_come_back_in_their_order(server, classifier, samples):
    paths = sorted(samples.glob("*/*.JPEG"))  # more than a batch holds
    answer = server.post(INFER, json=files_document(*(path.read_bytes() for path in paths))).json()
    (output,) = answer["outputs"]
    assert output["shape"] == [40, 200]
    rows = np.array(output["data"]).reshape(40, 200)
    best = [classifier.classify(path)[0] for path in paths]
    assert rows.argmax(axis=1).tolist() == [prediction.index for prediction in best]
    assert rows.max(axis=1) == pytest.approx([p.probability for p in best], abs=1e-5)


def test_classify_gives_the_likeliest_classes(server, classifier, goldfish):
    answer = server.post("/classify?k=3", content=goldfish).json()
    assert answer["model"] == "inception"
    expected = [dataclasses.asdict(p) for p in classifier.classify(goldfish, k=3)]
    for found, wanted in zip(answer["predictions"], expected, strict=True):
        assert found == {**wanted, "probability": pytest.approx(wanted["probability"], abs=1e-6)}


def test_classify_by_another_model(server, goldfish):
    answer = server.post("/classify?model=baseline", content=goldfish).json()
    best = Classifier("baseline", device="cpu").classify(goldfish)[0]
    assert answer["model"] == "baseline"
    assert answer["predictions"][0]["index"] == best.index


def test_classify_takes_several_files_and_a_bad_one_harms_none(server, classifier, goldfish):
    files = [("a", ("a.jpg", goldfish)), ("b", ("b.txt", b"text")), ("c", ("ü.jpg", goldfish))]
    response = server.post("/classify", files=files)
    first, second, third = response.json()["results"]
    assert response.status_code == 200
    assert (first["file"], second["file"], third["file"]) == ("a.jpg", "b.txt", "ü.jpg")
    assert "not an image" in second["error"]
    best = classifier.classify(goldfish)[0].index
    assert first["predictions"][0]["index"] == third["predictions"][0]["index"] == best


def test_a_name_that_is_no_utf8_does_not_lose_the_answer(server, goldfish):
    head = b'--x\r\nContent-Disposition: form-data; name="a"; filename="\\ud800.jpg"\r\n\r\n'
    kind = "multipart/form-data; boundary=x; charset=unicode_escape"
    body = head + goldfish + b"\r\n--x--\r\n"
    response = server.post("/classify", content=body, headers={"Content-Type": kind})
    assert response.status_code == 200
    assert response.json()["results"][0]["file"] == "?.jpg"


def test_small_and_large_files_of_a_request_keep_their_order(server, classifier, samples):
    """Some are decoded where they are, others in threads."""
    paths = sorted(samples.glob("*/*.JPEG"))[:3]
    small = [path.read_bytes() for path in paths]
    buffer = io.BytesIO()
    Image.open(paths[1]).resize((640, 640)).save(buffer, "PNG")
    body = files_document(small[0], buffer.getvalue(), small[2])
    rows = np.array(server.post(INFER, json=body).json()["outputs"][0]["data"]).reshape(3, 200)
    for row, data in zip(rows, (small[0], buffer.getvalue(), small[2]), strict=True):
        best = classifier.classify(data)[0]
        assert (row.argmax(), row.max()) == (best.index, pytest.approx(best.probability, abs=1e-5))


def test_a_form_of_nothing_but_bad_files_is_refused(server):
    response = server.post("/classify", files={"a": b"text", "b": b""})
    assert response.status_code == 422
    assert len(response.json()["results"]) == 2


def test_what_the_server_says_of_itself_and_its_models(server):
    assert server.get("/v2").json()["extensions"] == ["binary_tensor_data", "classification"]
    assert server.get("/v2/health/live").json() == {"live": True}
    ready = server.get("/v2/health/ready").json()
    assert ready == {"ready": True, "devices": {"inception": "CPU", "baseline": "CPU"}}
    assert server.get("/v2/models/baseline/ready").json() == {"name": "baseline", "ready": True}
    assert server.get("/v2/models/baseline/versions/1/ready").status_code == 200
    metadata = server.get("/v2/models/inception").json()
    assert metadata == server.get("/v2/models/inception/versions/1").json()
    assert metadata["inputs"][0]["shape"] == [-1, 64, 64, 3]
    assert metadata["outputs"] == [
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 200]}
    ]
    assert metadata["parameters"]["device"] == "CPU"
    assert metadata["parameters"]["precision"] == "int8"
    # What rows of classify name it by, too.
    fingerprint = Classifier("inception", device="cpu").fingerprint
    assert metadata["parameters"]["fingerprint"] == fingerprint
    assert server.metric("tinyserve_model_info", fingerprint=fingerprint) == 1
    index = server.post("/v2/repository/index", json={"ready": True}).json()
    assert [entry["name"] for entry in index] == ["inception", "baseline"]
    assert index == server.post("/v2/repository/index").json()


JSON = {"Content-Type": "application/json"}
FIELD = b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\ncat.jpg\r\n--x--\r\n'
_FORM = "multipart/form-data; boundary=x"
FORM = {"Content-Type": _FORM}
FILE = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a.jpg"\r\n\r\ndata\r\n'
REFUSED = [
    (404, "GET", "/nothing", b"", {}),
    (404, "GET", "/v2/models/vgg", b"", {}),
    (404, "GET", "/v2/models/inception/versions/2", b"", {}),
    (404, "GET", "/v2/models/vgg/ready", b"", {}),
    (404, "POST", "/v2/models/vgg/infer", b"{}", JSON),
    (404, "POST", "/v2/models/inception/versions/2/infer", b"{}", JSON),
    (404, "POST", "/classify?model=vgg", b"x", {}),
    (405, "DELETE", "/v2", b"", {}),
    (405, "GET", "/classify", b"", {}),
    (400, "POST", INFER, b"no JSON", JSON),
    (400, "POST", INFER, b"{}", {**JSON, "Inference-Header-Content-Length": "3"}),
    (400, "POST", "/classify?k=0", b"x", {}),
    (400, "POST", "/classify?k=many", b"x", {}),
    (400, "POST", "/classify", b"no form", FORM),
    (400, "POST", "/classify", b"no form", {"Content-Type": "multipart/form-data"}),
    (400, "POST", "/classify", FIELD, FORM),
    (400, "POST", "/classify", FILE, FORM),
    (400, "POST", "/classify", FILE + FILE[:-3], FORM),
    (
        400,
        "POST",
        "/classify",
        FILE + b"--x--",
        {"Content-Type": FORM["Content-Type"] + "; charset=undefined"},
    ),
    (400, "POST", "/v2/repository/index", b"[]", JSON),
    (415, "POST", "/classify", b"{}", JSON),
    (415, "POST", INFER, b"x", {"Content-Type": "image/jpeg"}),
    (415, "POST", INFER, b"x", {"Content-Encoding": "gzip"}),
    (404, "POST", "/classify/", b"x", {}),
    (422, "POST", "/classify", b"no picture", {}),
    (422, "POST", "/classify", b"", {}),
]


@pytest.mark.parametrize(("status", "method", "path", "body", "headers"), REFUSED)
def test_what_cannot_be_served_is_refused_in_one_line(server, status, method, path, body, headers):
    response = server.request(method, path, content=body, headers=headers)
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    assert response.json()["error"] and "\n" not in response.json()["error"]


def test_a_bad_picture_among_good_ones_is_named(server, goldfish):
    response = server.post(INFER, json=files_document(goldfish, b"text", goldfish))
    assert response.status_code == 422
    assert response.json()["error"].startswith("image_bytes[1]: ")


def test_a_picture_that_unpacks_to_too_much_is_refused(server, png_of_size):
    response = server.post("/classify", content=png_of_size(30_000, 30_000))
    assert response.status_code == 422
    assert "too large" in response.json()["error"]


def test_pixels_of_another_size_are_refused(server):
    response = server.post(INFER, json=pixels_document(np.zeros((1, 32, 32, 3), np.uint8)))
    assert response.status_code == 400
    assert "[n, 64, 64, 3]" in response.json()["error"]


def test_a_request_id_comes_back_if_it_is_sane(server):
    def id_of(sent):
        return server.get("/v2", headers={"X-Request-Id": sent}).headers["x-request-id"]

    assert id_of("trace-1.a_B") == "trace-1.a_B"
    assert id_of("two words") != "two words"
    assert id_of("x" * 129) != "x" * 129
    assert id_of("") != id_of("")


def test_an_answer_comes_in_one_piece(server):
    with socket.create_connection((server.host, server.port), timeout=SECONDS) as connection:
        for _ in range(50):  # two pieces may happen to be read as one
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65_536).endswith(b'{"live":true}')


def test_the_page_of_routes_loads_nothing_from_elsewhere(server):
    page = server.get("/docs").text
    document = server.get("/openapi.json").json()
    assert "src=" not in page and "http" not in page
    assert all(path in page for path in document["paths"])


def test_what_the_server_itself_fails_with_is_its_log_s_business(monkeypatch, goldfish, caplog):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by chance")

    with running() as server:
        monkeypatch.setattr(Models, "get", broken)
        response = server.post(INFER, json=files_document(goldfish))
        assert response.status_code == 500
        assert "its log says why" in response.json()["error"]
        assert server.metric("tinyserve_requests_total", status="500") == 1
    assert "by chance" in caplog.text


def test_metrics_count_what_happened(server, goldfish):
    route = {"route": "/classify"}
    good, bad = ({**route, "status": status} for status in ("200", "422"))
    before = [
        server.metric("tinyserve_requests_total", **good),
        server.metric("tinyserve_requests_total", **bad),
        server.metric("tinyserve_batch_images_sum", model="inception"),
    ]
    server.post("/classify", files=[("file", goldfish)] * 3)
    server.post("/classify", content=b"text")
    after = [
        server.metric("tinyserve_requests_total", **good),
        server.metric("tinyserve_requests_total", **bad),
        server.metric("tinyserve_batch_images_sum", model="inception"),
    ]
    assert np.subtract(after, before).tolist() == [1, 1, 3]
    assert server.metric("tinyserve_model_info", model="inception", device="CPU") == 1
    assert server.metric("tinyserve_queue_images", model="inception") == 0
    for stage in ("decode", "compute", "queue", "run"):
        assert server.metric("tinyserve_stage_seconds_count", stage=stage) > 0


def test_keys_open_everything_and_health_needs_none(goldfish, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first\nvoilà\n\n", "utf-8-sig")  # as Windows' editors write it
    with running(api_key_file=keys) as server:
        for key in ("first", "voilà"):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert server.post("/classify", content=goldfish, headers=headers).status_code == 200
        for value in ("", "first", "Bearer", "Bearer third", "Basic first", "Bearer ü"):
            headers = {"Authorization": value.encode()}
            for path in ("/v2", "/metrics", "/docs", "/openapi.json", "/nothing"):
                response = server.get(path, headers=headers)
                assert (response.status_code, list(response.json())) == (401, ["error"])
                assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert server.get(path).status_code == 200
            asked = server.request("HEAD", path)
            assert (asked.status_code, asked.content) == (200, b"")
        document = server.get("/openapi.json", headers={"Authorization": "Bearer first"}).json()
        assert document["security"]


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
def test_what_is_not_compressed_is_taken(server, goldfish, encoding):
    headers = {"Content-Encoding": encoding}
    assert server.post("/classify", content=goldfish, headers=headers).status_code == 200


@pytest.mark.slow
def test_connections_that_find_no_descriptor_are_said_once_a_second():
    command = [sys.executable, "-m", "tinyserve.cli", "serve", "-m", "inception", "--port", "0"]
    line = f"ulimit -n 80; exec {shlex.join([*command, '--device', 'cpu'])}"
    with subprocess.Popen(
        ["bash", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            url = process.stdout.readline().strip()
            port = int(url.rpartition(":")[2])
            until(lambda: httpx.get(f"{url}/v2/health/ready").status_code == 200)
            with contextlib.ExitStack() as stack:
                for _ in range(120):
                    stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                time.sleep(2.5)
            until(lambda: httpx.get(f"{url}/v2/health/live").status_code == 200)
        finally:
            process.terminate()
        said = process.stderr.read().splitlines()
    lines = [line for line in said if "no more connections can be accepted: Too many" in line]
    assert 1 <= len(lines) <= 5
    assert not any("Traceback" in line for line in said)


def test_all_addresses_are_those_of_ipv4_too():
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with running(host="::") as server:
        for host in ("127.0.0.1", "[::1]"):
            assert httpx.get(f"http://{host}:{server.port}/v2/health/live").json() == {"live": True}


def test_what_cannot_start_says_why(tmp_path):
    empty = tmp_path / "keys"
    empty.touch()
    for error, words, settings in [
        (ModelFileError, "unknown model", {"models": ("vgg",)}),
        (UsageError, "two models", {"models": ("inception", "inception")}),
        (UsageError, "holds no key", {"api_key_file": empty}),
        (UsageError, "cannot read", {"api_key_file": tmp_path / "missing"}),
        (UsageError, "cannot listen", {"host": "no such host", "models": ("inception",)}),
        (UsageError, "cannot listen", {"host": "x" * 64, "models": ("inception",)}),
        (UsageError, "one name or more", {"models": "inception"}),
        (UsageError, "one name or more", {"models": ()}),
        (UsageError, "port must be", {"port": 70000}),
        (UsageError, "max_queue must be", {"max_queue": 0}),
        (UsageError, "max_batch_size must be", {"max_batch_size": 0}),
        (UsageError, "max_batch_size must be at most", {"max_batch_size": 99999999}),
        (UsageError, "max_delay_ms must be", {"max_delay_ms": -1.0}),
        (UsageError, "log_format is one of", {"log_format": "xml"}),
    ]:
        with pytest.raises(error, match=words):
            Listener(Settings(**{"device": "cpu", "port": 0, **settings}))
    with running() as server, pytest.raises(UsageError, match=f"port {server.port}"):
        Listener(Settings(models=("inception",), device="cpu", port=server.port))


def test_the_application_answers_in_another_server_too(goldfish):
    service = Service(Settings(models=("inception",), device="cpu"))
    with TestClient(build_app(service)) as client:
        work = client.portal.start_task_soon(service.work)
        try:
            until(lambda: client.get("/v2/health/ready").status_code == 200)
            found = client.post("/classify", content=goldfish).json()
            assert found["predictions"][0]["name"] == "goldfish"
        finally:
            work.cancel()


def test_not_ready_before_it_is_warm(monkeypatch, goldfish):
    warm = threading.Event()
    start = Models.start

    async def slow(models):
        await asyncio.to_thread(warm.wait, SECONDS)
        await start(models)

    monkeypatch.setattr(Models, "start", slow)
    with running(ready=False) as server:
        try:
            assert server.get("/v2/health/live").status_code == 200
            ready = server.get("/v2/health/ready")
            assert (ready.status_code, ready.json()["ready"]) == (503, False)
            assert server.get("/v2/models/inception/ready").status_code == 503
            assert server.post("/classify", content=goldfish).status_code == 503
            assert server.post("/v2/repository/index").json()[0]["state"] == "UNAVAILABLE"
            assert server.post("/v2/repository/index", json={"ready": True}).json() == []
        finally:
            warm.set()
        until(lambda: server.get("/v2/health/ready").status_code == 200)
        assert server.post("/classify", content=goldfish).status_code == 200


LIMITS = Limits(
    body_bytes=100_000,
    json_bytes=20_000,
    all_bodies_bytes=150_000,
    head_seconds=0.5,
    body_seconds=0.5,
    answer_seconds=0.5,
    leave_seconds=0.1,
)


@pytest.fixture(scope="module")
def strict():
    with running(limits=LIMITS, max_queue=8) as server:
        yield server


def test_a_body_that_is_too_long_by_its_header_or_by_counting(strict):
    assert strict.post("/classify", content=bytes(100_001)).status_code == 413
    chunks = (bytes(1000) for _ in range(101))  # of unknown length
    assert strict.post("/classify", content=chunks).status_code == 413
    assert strict.post("/classify", content=bytes(100_000)).status_code == 422


@pytest.mark.parametrize("path", [INDEX, INFER])
def test_json_that_is_too_long(strict, path):
    assert strict.post(path, content=b"[" * 20_001, headers=JSON).status_code == 413


def test_a_long_query_of_the_index_is_read_off_the_event_loop(server, monkeypatch):
    threads = []
    parse = schema.IndexQuery.model_validate_json

    def watched(body):
        threads.append(threading.current_thread().name)
        return parse(body)

    monkeypatch.setattr(schema.IndexQuery, "model_validate_json", watched)
    answer = server.post(INDEX, json={"ready": True, "x": [0] * 100_000})
    assert [entry["name"] for entry in answer.json()] == ["inception", "baseline"]
    assert [name.partition("_")[0] for name in threads] == ["decode"]


def test_more_pictures_than_the_queue_ever_holds(strict, goldfish):
    assert strict.post("/classify", files=[("f", goldfish)] * 8).status_code == 200
    assert strict.post("/classify", files=[("f", goldfish)] * 9).status_code == 413
    assert strict.post(INFER, json=files_document(*[b"x"] * 9)).status_code == 413


def connect(server):
    timeout = SECONDS / 3  # less than for what idle connections are kept
    return socket.create_connection((server.host, server.port), timeout=timeout)


HEAD = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\n"


def rest_of(connection):
    """What a server still says until it closes the connection."""
    received = b""
    try:
        while data := connection.recv(65_536):
            received += data
    except ConnectionError:
        pass
    return received


def test_a_body_that_comes_too_slowly(strict):
    with connect(strict) as connection:
        connection.sendall(HEAD + b"\r\n" + bytes(100))
        assert b" 408 " in connection.recv(65_536).partition(b"\r\n")[0]


def test_a_body_that_comes_too_slowly_behind_another_request():
    limits = dataclasses.replace(LIMITS, head_seconds=0.2)
    with running(limits=limits) as server, connect(server) as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n" + HEAD + b"\r\n" + bytes(100))
        assert answers_on(connection, 2) == [200, 408]


def test_what_is_no_http_is_counted_and_logged_with_who_sent_it(strict, caplog):
    caplog.set_level(logging.INFO, "tinyserve.access")
    counted = {"route": "other", "status": "400"}
    before = strict.metric("tinyserve_requests_total", **counted)
    with connect(strict) as connection:
        connection.sendall(b"junk\r\n\r\n")
        assert b" 400 " in rest_of(connection).partition(b"\r\n")[0]
    fields = [record.fields for record in caplog.records if record.name == "tinyserve.access"]
    assert {"status": 400, "client": "127.0.0.1"} in fields
    assert strict.metric("tinyserve_requests_total", **counted) == before + 1


@pytest.mark.parametrize("sent", [b"", b"GET / HT", HEAD, b"GET /v2 HTTP/1.1\r\n\r\nGET /v2 HT"])
def test_a_head_that_never_ends_closes_the_connection(strict, sent):
    with connect(strict) as connection:
        connection.sendall(sent)
        rest_of(connection)  # comes to an end


def test_endless_headers_close_the_connection(strict):
    with connect(strict) as connection, pytest.raises(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        while True:
            connection.sendall(bytes(b"x" * 65_536))


def long_answers(count):
    """Requests that ask for all that is to be said of eight pictures."""
    picture = simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    part = b'--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n' + picture
    body = (part + b"\r\n") * 8 + b"--x--\r\n"
    head = (
        "POST /classify?k=200 HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x"
        f"\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return (head.encode() + body) * count


def test_a_client_that_reads_no_answers_is_let_go(strict):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((strict.host, strict.port))
        connection.sendall(long_answers(60))  # of a hundred kilobytes each, more than buffers hold
        mine = connection.getsockname()
        until(lambda: mine in clients_of(strict), "it was not even taken")
        until(lambda: mine not in clients_of(strict), "the connection stays open")


def answers_on(connection, count):
    """Statuses of the next answers, each of a length that is said."""
    found, received = [], b""
    while len(found) < count:
        head, separator, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        if separator and len(body) >= int(length[1]):
            found.append(int(head[9:12]))
            received = body[int(length[1]) :]
            continue
        data = connection.recv(65_536)
        assert data, "the connection was closed"
        received += data
    return found


def test_a_connection_is_kept_when_the_body_comes_after_the_answer(strict):
    """The rest of a body that nobody waited for is no idle time, nor does it end the waiting."""
    with connect(strict) as connection:
        long = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n"
        connection.sendall(long)
        assert answers_on(connection, 1) == [413]
        connection.sendall(bytes(200_000))
        time.sleep(2 * LIMITS.head_seconds)
        connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answers_on(connection, 1) == [200]


def clients_of(server):
    connections = server.listener._server.server_state.connections
    return {connection.client for connection in list(connections)}


def test_all_bodies_together_are_bounded(strict):
    with connect(strict) as first, connect(strict) as second:
        for connection in (first, second):
            head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n"
            connection.sendall(head + bytes(89_000))
        statuses = sorted(c.recv(65_536).split(b" ", 2)[1] for c in (first, second))
    assert statuses == [b"408", b"503"]


def test_bodies_of_clients_that_have_gone_are_not_kept(goldfish, monkeypatch):
    """Not even where they wait for a thread to decode them."""
    body = bytes(8 * 2**20)
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    busy, done = threading.Event(), threading.Event()
    load = images.load

    def wait(file, **options):
        busy.set()
        assert done.wait(SECONDS)
        return load(file, **options)

    monkeypatch.setattr(images, "load", wait)
    with running() as server, ThreadPoolExecutor(1) as clients:
        files = [("f", goldfish)] * (4 + default_threads())  # some for each thread
        first = clients.submit(server.post, "/classify", files=files)
        assert busy.wait(SECONDS)
        tracemalloc.start()
        try:
            for number in range(1, 5):
                with connect(server) as connection:
                    connection.sendall(head + body)
                    until(lambda: server.metric("tinyserve_queue_images") > len(files))
                until(lambda n=number: server.metric("tinyserve_requests_total", status="499") == n)
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            done.set()
        assert first.result().status_code == 200
    assert held < len(body)


@pytest.mark.slow
def test_a_hundred_clients_each_that_stall_break_off_and_send_garbage(strict, goldfish):
    garbage = np.random.default_rng(0)
    before = {thread.name for thread in threading.enumerate()}
    stalling = [connect(strict) for _ in range(100)]
    for number, connection in enumerate(stalling):
        connection.sendall((HEAD + b"\r\n" + bytes(100))[: 5 + number])
    for number in range(100):
        with connect(strict) as connection:
            connection.sendall(HEAD + b"\r\n" + bytes(10 * number))
    for number in range(100):
        with connect(strict) as connection:
            connection.sendall(garbage.bytes(10 + 10 * number))
    assert strict.post("/classify", content=goldfish).status_code == 200
    for connection in stalling:
        rest_of(connection)
        connection.close()
    until(lambda: len(clients_of(strict)) <= 1, "connections stay open")
    assert strict.metric("tinyserve_requests_total", status="500") == 0
    assert strict.metric("tinyserve_queue_images") == 0
    after = {thread.name for thread in threading.enumerate()}
    assert {name for name in after - before if not name.startswith("decode")} == set()


class Gate:
    """Lets batches through one after the other."""

    def __init__(self, monkeypatch):
        self.open = threading.Event()
        self.open.set()
        self.waiting = threading.Event()
        self.computed = []
        run = Engine.run

        def gated(engine, pixels):
            if threading.current_thread().name == "batcher":
                self.waiting.set()
                assert self.open.wait(SECONDS)
                self.computed.append(len(pixels))
            return run(engine, pixels)

        monkeypatch.setattr(Engine, "run", gated)

    def close(self):
        self.open.clear()
        self.waiting.clear()


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def test_requests_that_wait_are_computed_together(gate, goldfish):
    with running() as server, ThreadPoolExecutor(9) as clients:
        gate.close()
        first = clients.submit(server.post, "/classify", content=goldfish)
        assert gate.waiting.wait(SECONDS)
        others = [clients.submit(server.post, "/classify", content=goldfish) for _ in range(7)]
        until(lambda: server.metric("tinyserve_queue_images") == 8)
        gate.open.set()
        answers = [future.result().json() for future in [first, *others]]
    assert gate.computed == [1, 7]
    best = {answer["predictions"][0]["index"] for answer in answers}
    assert len(best) == 1


@pytest.mark.parametrize("path", ["/classify", INFER])
def test_a_client_that_goes_away_is_not_computed(gate, goldfish, path):
    body = goldfish if path == "/classify" else json.dumps(files_document(goldfish)).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with running() as server, ThreadPoolExecutor(1) as clients:
        gate.close()
        first = clients.submit(server.post, "/classify", content=goldfish)
        assert gate.waiting.wait(SECONDS)
        with connect(server) as connection:
            connection.sendall(head + body)
            until(lambda: server.metric("tinyserve_queue_images") == 2)
        until(lambda: server.metric("tinyserve_queue_images") == 1)
        gate.open.set()
        assert first.result().status_code == 200
        assert server.metric("tinyserve_requests_total", status="499") == 1
    assert gate.computed == [1]


def test_a_full_queue_answers_503_and_when_to_come_back(gate, goldfish):
    with running(max_queue=2) as server, ThreadPoolExecutor(2) as clients:
        gate.close()
        waiting = [clients.submit(server.post, "/classify", content=goldfish) for _ in range(2)]
        until(lambda: server.metric("tinyserve_queue_images") == 2)
        refused = server.post("/classify", content=goldfish)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "queue is full" in refused.json()["error"]
        gate.open.set()
        assert [future.result().status_code for future in waiting] == [200, 200]


async def flood(port, connections, requests, body):
    """Statuses of requests over connections that are all open at a time, and the heads of 503s."""
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)

    async def client():
        statuses = []
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(requests):
            writer.write(head + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1])
                for line in answer.lower().splitlines()
                if line.startswith(b"content-length")
            )
            await reader.readexactly(length)
            statuses.append(int(answer[9:12]))
            assert (statuses[-1] == 503) == (b"retry-after" in answer)
        writer.close()
        await writer.wait_closed()
        return statuses

    found = await asyncio.gather(*(client() for _ in range(connections)))
    return [status for statuses in found for status in statuses]


@pytest.mark.slow
def test_more_connections_than_the_queue_holds_get_200_or_503(goldfish):
    with running(max_queue=16) as server:
        statuses = asyncio.run(flood(server.port, 300, 3, goldfish))
        assert server.metric("tinyserve_requests_total", route="/classify") == 900
    assert len(statuses) == 900
    assert set(statuses) == {200, 503}


@pytest.mark.slow
def test_busy_connections_keep_no_new_one_waiting(goldfish):
    count, most = 300, 10  # 3 to 5 answers on two idle cores, 6 on busy ones
    request = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(goldfish)
    request += goldfish

    async def ask_until_each_has_an_answer(port):
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
        answers = [0] * count

        async def ask(place):
            reader, writer = streams[place]
            while not all(answers):
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head.lower())[1]
                await reader.readexactly(int(length))
                answers[place] += 1
            writer.close()
            await writer.wait_closed()

        # All at once, as after a restart: the server has not accepted most of them yet.
        await asyncio.wait_for(asyncio.gather(*map(ask, range(count))), SECONDS)
        return answers

    with running(max_queue=16) as server:
        answers = asyncio.run(ask_until_each_has_an_answer(server.port))
    assert max(answers) <= most


@pytest.fixture
def model_file(tmp_path):
    """A copy of a model that may be replaced."""
    path = tmp_path / "net.onnx"
    shutil.copy(find_model("inception"), path)
    return path


def replace(path, content):
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.rename(path)


def architecture(server):
    return server.get("/v2/models/net").json()["parameters"]["architecture"]


def test_a_new_file_takes_over_and_a_bad_one_does_not(model_file, goldfish, caplog):
    good = find_model("baseline").read_bytes()
    expected = Classifier("baseline", device="cpu").classify(goldfish)[0]
    with running(str(model_file)) as server:
        assert architecture(server) == "inception"
        replace(model_file, good)
        until(lambda: architecture(server) == "baseline")
        best = server.post("/classify", content=goldfish).json()["predictions"][0]
        assert best["index"] == expected.index
        assert best["probability"] == pytest.approx(expected.probability, abs=1e-6)
        assert server.metric("tinyserve_model_info", architecture="baseline") == 1
        assert server.metric("tinyserve_model_info", architecture="inception") == 0
        damaged = bytearray(good)
        damaged[len(damaged) // 2] ^= 255
        for number, content in enumerate([bytes(damaged), b"no model", b""], start=1):
            replace(model_file, content)
            until(lambda n=number: server.metric("tinyserve_reloads_total", result="refused") == n)
            assert architecture(server) == "baseline"
            assert server.post("/classify", content=goldfish).status_code == 200
        assert caplog.text.count("the new file is refused") == 3
        model_file.unlink()
        replace(model_file, find_model("inception").read_bytes())
        until(lambda: architecture(server) == "inception")


def test_a_file_that_may_be_read_later_takes_over_then(model_file, monkeypatch):
    load = Engine.__init__

    def refuse(*_, **__):  # root may read everything
        raise ModelFileError("cannot be read")

    with running(str(model_file)) as server:
        monkeypatch.setattr(Engine, "__init__", refuse)
        replace(model_file, find_model("baseline").read_bytes())
        until(lambda: server.metric("tinyserve_reloads_total", result="refused") == 1)
        monkeypatch.setattr(Engine, "__init__", load)
        model_file.chmod(0o644)
        until(lambda: architecture(server) == "baseline")


def test_a_file_that_is_replaced_while_it_is_loaded_takes_over(model_file, monkeypatch):
    load = Engine.__init__

    def slow_load(self, path, **options):
        load(self, path, **options)
        monkeypatch.setattr(Engine, "__init__", load)
        replace(model_file, find_model("baseline").read_bytes())

    monkeypatch.setattr(Engine, "__init__", slow_load)
    with running(str(model_file)) as server:
        until(lambda: architecture(server) == "baseline")


@pytest.mark.slow
def test_a_file_replaced_ten_times_under_load_loses_no_request(model_file, goldfish, monkeypatch):
    monkeypatch.setattr("tinyserve.server.models._POLL_SECONDS", 0.1)
    contents = [find_model(name).read_bytes() for name in ("baseline", "inception")]
    best = {
        Classifier(name, device="cpu").classify(goldfish)[0].index
        for name in ("baseline", "inception")
    }
    done = threading.Event()
    queues = threads_of_batchers()

    def client(url):
        found = []
        with httpx.Client(base_url=url, timeout=SECONDS, trust_env=False) as session:
            while not done.is_set():
                response = session.post("/classify", content=goldfish)
                found.append((response.status_code, response.json()["predictions"][0]["index"]))
        return found

    with running(str(model_file)) as server, ThreadPoolExecutor(4) as clients:
        url = f"http://127.0.0.1:{server.port}"
        loads = [clients.submit(client, url) for _ in range(4)]
        try:
            for number in range(10):
                replace(model_file, contents[number % 2])
                until(lambda n=number: server.metric("tinyserve_reloads_total") > n)
        finally:
            done.set()
        answers = [answer for load in loads for answer in load.result()]
        assert server.metric("tinyserve_reloads_total", result="taken") == 10
        until(lambda: threads_of_batchers() == queues + 1, "an old queue stays")
    assert {status for status, _ in answers} == {200}
    assert {index for _, index in answers} == best


def threads_of_batchers():
    return sum(thread.name == "batcher" for thread in threading.enumerate())


def test_leaving_is_said_and_what_came_is_answered(gate, goldfish):
    with running(limits=dataclasses.replace(LIMITS, leave_seconds=1)) as server:
        gate.close()
        waiting = http.client.HTTPConnection(server.host, server.port, timeout=SECONDS)
        waiting.request("POST", "/classify", body=goldfish)
        assert gate.waiting.wait(SECONDS)
        server.listener.stop()
        ready = server.get("/v2/health/ready")
        assert ready.status_code == 503
        assert ready.headers["connection"] == "close"
        gate.open.set()
        response = waiting.getresponse()
        assert response.status == 200
        assert json.loads(response.read())["predictions"]
        assert response.headers["connection"] == "close"


def test_without_the_extra_it_says_what_to_install():
    code = "import sys; sys.modules['uvicorn'] = None; from tinyserve.cli import main; "
    command = [sys.executable, "-c", code + "sys.exit(main(['serve']))"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert run.returncode == 2
    assert "pip install 'tinyserve[serve]'" in run.stderr
