"""OpenVINO gives the answers that ONNX Runtime gives, faster, and keeps to itself."""

import dataclasses
import os
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tinyserve import engine as engine_module
from tinyserve import images
from tinyserve.cli import main
from tinyserve.devices import CPU, OPENVINO, cuda_problem, openvino_problem
from tinyserve.engine import Engine, read_card
from tinyserve.errors import DeviceError, GateError, ModelFileError
from tinyserve.modelfile import find_model, installed_models, write_model

pytestmark = pytest.mark.skipif(openvino_problem() is not None, reason=str(openvino_problem()))
no_gpu = pytest.mark.skipif(cuda_problem() is None, reason="auto is CUDA here")


def test_threads_that_import_it_at_once_do_not_meet():
    script = """if True:
        import sys, threading
        from tinyserve.devices import import_openvino
        start, found = threading.Barrier(8), []
        def work():
            start.wait()
            found.append(import_openvino().__name__)
        threads = [threading.Thread(target=work) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(found.count("openvino"), "openvino_telemetry" in sys.modules)
    """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["8", "False"], run.stderr


@pytest.fixture(scope="module")
def pictures(samples) -> np.ndarray:
    """All 40 samples, uint8 [40, 64, 64, 3]."""
    return np.stack([images.load(path, size=64) for path in sorted(samples.rglob("*.JPEG"))])


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(find_model("inception"), device="openvino", streams=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", installed_models())
def test_every_shipped_model_passes_its_self_test(name, pictures):
    path = find_model(name)
    model = Engine(path, device="openvino")
    assert model.provider == OPENVINO
    assert model.fallback is None
    answers, expected = model.run(pictures), Engine(path, device="cpu").run(pictures)
    np.testing.assert_allclose(answers, expected, atol=model.card.golden.tolerance)
    assert (answers.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", installed_models())
def test_the_accuracy_is_the_one_in_the_file(name, tiny_imagenet, capsys):
    assert main(["verify", name, "--device", "openvino", "--data", str(tiny_imagenet)]) == 0
    assert "of 10,000) on OpenVINO" in capsys.readouterr().out


def test_probabilities_for_any_batch(engine, pictures):
    together = engine.run(pictures)
    assert together.shape == (40, 200)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together.sum(axis=1), 1, atol=1e-5)
    for count in (1, 7, 3):
        parts = np.array_split(pictures, range(count, 40, count))
        np.testing.assert_allclose(
            np.concatenate([engine.run(p) for p in parts]), together, atol=0.02
        )


def test_answers_stay_with_who_asked(engine, pictures):
    """More callers than streams, and what one was given is not overwritten by the next."""
    batches = np.array_split(pictures, 10) * 4
    expected = [engine.run(batch) for batch in batches[:10]] * 4
    with ThreadPoolExecutor(4) as pool:
        for found, known in zip(pool.map(engine.run, batches), expected, strict=True):
            np.testing.assert_array_equal(found, known)


def answer_in_a_fork(engine: Engine, pictures: np.ndarray) -> str:
    """How many classes a forked process finds, or why none; "nothing" where it does not end."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            os.write(writer, str(engine.run(pictures[:1]).shape[1]).encode())
        except DeviceError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        found = said.read() if select.select([said], [], [], 60)[0] else "nothing"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return found


def test_a_forked_process_says_so_and_does_not_wait(engine, pictures):
    engine.run(pictures[:1])
    assert "not in this forked process" in answer_in_a_fork(engine, pictures)


def test_one_stream_goes_on_in_a_forked_process_if_it_was_idle(pictures):
    engine = Engine(find_model("inception"), device="openvino")
    assert answer_in_a_fork(engine, pictures) == "200"
    end = threading.Event()

    def work() -> None:
        while not end.is_set():
            engine.run(pictures)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while engine._session._requests.qsize() == 2:
            time.sleep(0.001)
        assert "not in this forked process" in answer_in_a_fork(engine, pictures)
    finally:
        end.set()
        thread.join()
    assert engine.run(pictures).shape == (40, 200)


@pytest.mark.parametrize(("threads", "streams"), [(1, 1), (2, 2)])
def test_threads_and_streams_are_as_asked_for(threads, streams):
    path = find_model("baseline")
    model = Engine(path, device="openvino", threads=threads, streams=streams, self_test=False)
    compiled = model._session._requests.get().get_compiled_model()
    assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
    assert compiled.get_property("NUM_STREAMS") == streams


def test_a_file_that_is_no_model_is_refused(tmp_path, capfd):
    text = tmp_path / "text.onnx"
    text.write_text("no model")
    with pytest.raises(ModelFileError, match="is no ONNX model, or damaged"):
        Engine(text, device="openvino")
    assert capfd.readouterr() == ("", "")


def with_tolerance(path: Path, target: Path, tolerance: float | None) -> Path:
    """A copy with another tolerance, or without golden images."""
    card = read_card(path)
    golden = tolerance and dataclasses.replace(card.golden, tolerance=tolerance)
    graph = path.read_bytes()[: card.graph_bytes]
    write_model(target, graph, dataclasses.replace(card, golden=golden))
    return target


@no_gpu
def test_auto_is_openvino_where_that_passes_the_self_test(tmp_path, caplog):
    path = find_model("inception")
    assert Engine(path).provider == OPENVINO
    assert "OpenVINO" not in caplog.text
    here, there = (Engine(path, device=device).self_test() for device in ("cpu", "openvino"))
    assert here < there
    strict = with_tolerance(path, tmp_path / "strict.onnx", (here + there) / 2)
    model = Engine(strict, self_test=False)
    assert model.provider == CPU
    assert "fails its self-test on OpenVINO" in model.fallback
    assert model.fallback in caplog.text
    with pytest.raises(GateError, match="fails its self-test on OpenVINO"):
        Engine(strict, device="openvino")


@no_gpu
def test_without_a_self_test_auto_asks_openvino_for_one_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    replays = []
    replay = engine_module._replay_golden
    monkeypatch.setattr(engine_module, "_replay_golden", lambda *a: replays.append(a) or replay(*a))
    for _ in range(2):
        assert Engine(find_model("inception"), self_test=False).provider == OPENVINO
    assert len(replays) == 1


@no_gpu
def test_auto_does_not_trust_openvino_untested(tmp_path):
    path = with_tolerance(find_model("inception"), tmp_path / "untested.onnx", None)
    model = Engine(path)
    assert model.provider == CPU
    assert "no golden images to test OpenVINO with" in model.fallback
    assert Engine(path, device="openvino").provider == OPENVINO


def run(code: str, home: Path) -> subprocess.CompletedProcess:
    """In a process of its own, which has nothing in its environment that forbids telemetry."""
    kept = {name: os.environ[name] for name in ("PATH", "TINYSERVE_MODELS")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_nothing_is_sent_and_nothing_left_behind(tmp_path):
    """OpenVINO's import and ONNX Runtime's sessions report to their makers, unless prevented."""
    code = (
        "import sys\n"
        "sys.addaudithook(lambda event, _: event.startswith('socket.') and print(event))\n"
        "from tinyserve import Classifier\n"
        "for device in ('openvino', 'cpu'):\n"
        "    print(Classifier('baseline', device=device).engine.provider)\n"
        "import openvino, openvino_telemetry  # both are there for whoever wants them\n"
    )
    found = run(code, tmp_path)
    assert found.stdout.split() == [OPENVINO, CPU], found.stderr
    assert list(tmp_path.rglob("*")) == []


def test_without_openvino_its_extra_is_named_where_it_is_asked_for(tmp_path):
    start = "import sys; sys.modules['openvino'] = None\nfrom tinyserve.cli import main\n"
    found = run(start + "sys.exit(main(['verify', 'baseline', '--device', 'openvino']))", tmp_path)
    assert found.returncode == 5
    assert "OpenVINO is not installed (pip install 'tinyserve[openvino]')" in found.stderr
    found = run(start + "sys.exit(main(['verify', 'baseline']))", tmp_path)
    assert found.returncode == 0
    assert "OpenVINO" not in found.stderr + found.stdout
