"""``tinyserve serve --ui``: the page and the protocol on one address, over one predictor."""

import shutil
import subprocess
import sys
import time
import zipfile

import httpx
import pytest
from demo_page import save_many, wait_for
from serving import SECONDS, running

from tinyserve import Classifier
from tinyserve.modelfile import find_model
from tinyserve.server import Limits

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def server():
    with running("inception", ui=True) as server:
        yield server


@pytest.fixture(scope="module")
def bare():
    """A server without the page."""
    with running("inception") as server:
        yield server


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2"),
        ("GET", "/v2/"),
        ("GET", "/v2/nowhere"),
        ("GET", "/v2/models/nope"),
        ("GET", "/v2/models/inception/ready/"),
        ("GET", "/v2/models/inception/infer"),
        ("PUT", "/v2/models/inception/infer"),
        ("DELETE", "/v2/health/live"),
        ("GET", "/classify"),
        ("POST", "/classify/"),
        ("POST", "/classify/nowhere"),
        ("POST", "/metrics"),
        ("GET", "/metrics/"),
        ("GET", "/docs/nowhere"),
        ("POST", "/openapi.json"),
    ],
)
def test_the_page_changes_no_answer_of_the_protocol(server, bare, method, path):
    with_page, without = server.request(method, path), bare.request(method, path)
    assert with_page.status_code == without.status_code
    assert with_page.text == without.text
    for name in ("allow", "content-type"):
        assert with_page.headers.get(name) == without.headers.get(name)
    leads_to = [httpx.URL(a.headers.get("location", "")).path for a in (with_page, without)]
    assert leads_to[0] == leads_to[1]


def test_the_page_takes_no_route_away(server):
    assert "tinyserve" in server.get("/").text
    assert server.get("/v2/health/ready").status_code == 200
    assert server.get("/v2/models/inception").json()["name"] == "inception"
    assert server.get("/metrics").text.startswith("# HELP")
    assert server.get("/docs").status_code == 200
    assert server.get("/nowhere").status_code == 404


def test_the_same_picture_has_the_same_answer_everywhere(server, samples):
    from gradio_client import Client, handle_file

    path = samples / "teapot" / "val_568.JPEG"
    expected = [p.probability for p in Classifier("inception", device="cpu").classify(path)]
    posted = server.post("/classify", content=path.read_bytes()).json()["predictions"]
    client = Client(f"http://127.0.0.1:{server.port}", verbose=False)
    page = client.predict(handle_file(str(path)), "inception", api_name="/classify")
    for predictions in (posted, page["predictions"]):
        found = [prediction["probability"] for prediction in predictions]
        assert found == pytest.approx(expected, abs=1e-6)


def asked(server, image, name="classify"):
    """What an endpoint of the page answers, as its stream has it."""
    started = server.post(f"/gradio_api/call/{name}", json={"data": [image, "inception"]})
    return server.get(f"/gradio_api/call/{name}/{started.json()['event_id']}").text


def test_a_client_names_no_file_of_the_servers_machine(server, samples, tmp_path):
    secret = shutil.copy(samples / "teapot" / "val_568.JPEG", tmp_path / "secret.jpg")
    with zipfile.ZipFile(tmp_path / "secret.zip", "w") as archive:
        archive.write(secret, "payroll.jpg")
    for path in (str(secret), str(tmp_path / "secret.zip"), "/etc/hostname"):
        for meta in ({}, {"meta": {"_type": "gradio.FileData"}}):
            file = {"path": path, **meta}
            for answer in (asked(server, file), asked(server, [file], "classify_many")):
                assert answer.startswith("event: error"), answer
                assert "payroll" not in answer and "probability" not in answer


def test_what_the_page_is_sent_has_the_servers_limits(samples):
    with running("inception", ui=True, limits=Limits(body_bytes=100_000)) as server:
        for path in ("/gradio_api/queue/join", "/gradio_api/call/classify"):
            assert server.post(path, content=bytes(100_001)).status_code == 413
        # Uploads are written to files and have a limit of their own.
        files = {"files": ("a.jpg", bytes(100_001))}
        assert server.post("/gradio_api/upload", files=files).status_code == 200
        assert "not an image" in asked(server, uploaded(server, bytes(100_001)))
        photo = (samples / "teapot" / "val_568.JPEG").read_bytes()
        assert "probability" in asked(server, uploaded(server, photo))


def uploaded(server, content):
    (path,) = server.post("/gradio_api/upload", files={"files": ("a.jpg", content)}).json()
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def test_a_long_job_holds_nobody_up(server, samples, tmp_path):
    from gradio_client import Client, handle_file

    def rows(client, path):
        return client.submit([handle_file(path)], "inception", api_name="/classify_many")

    address = f"http://127.0.0.1:{server.port}"
    patient, quick = (Client(address, verbose=False) for _ in range(2))
    photo = samples / "teapot" / "val_568.JPEG"
    alone = rows(quick, photo).result()
    save_many(tmp_path / "many.zip", 60)
    long = rows(patient, tmp_path / "many.zip")
    wait_for(lambda: long.status().code.name == "PROCESSING")
    meanwhile = rows(quick, photo).result()
    assert not long.done()
    assert [row["predictions"] for row in meanwhile] == [row["predictions"] for row in alone]
    each = [[p["probability"] for p in row["predictions"]] for row in long.result()]
    assert each == [pytest.approx(each[0], abs=1e-6)] * 60


def test_the_page_offers_what_is_served_and_what_is_installed(tmp_path):
    from gradio_client import Client

    mine = tmp_path / "mine.onnx"
    mine.symlink_to(find_model("inception"))
    with running("resnet20", str(mine), ui=True) as server:
        client = Client(f"http://127.0.0.1:{server.port}", verbose=False)
        offered = set(client.predict(api_name="/models"))
    assert offered == {"baseline", "alexnet", "inception", "resnet20", "mine"}


def test_browsers_have_no_keys(tmp_path):
    (tmp_path / "keys").write_text("secret\n")
    run = subprocess.run(
        [
            *(sys.executable, "-m", "tinyserve.cli", "serve", "--port", "0"),
            *("--ui", "--api-key-file", str(tmp_path / "keys")),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 2
    assert "--ui goes without --api-key-file" in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_an_open_page_does_not_hold_the_server_back():
    """Its stream ends with the server, which waits half a minute for what does not."""
    with running("inception", ui=True) as server:
        url = f"http://127.0.0.1:{server.port}/gradio_api/heartbeat/somebody"
        with httpx.stream("GET", url, timeout=SECONDS) as stream:
            lines = stream.iter_lines()
            assert "ALIVE" in next(lines)
            began = time.monotonic()
            server.listener.stop()
            assert not any("error" in line for line in lines)
    assert time.monotonic() - began < Limits().end_seconds / 2
