import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from tinyserve import devices, engine, onnxruntime_session
from tinyserve.devices import CPU, CUDA, OPENVINO, cuda_problem, device_name, openvino_problem
from tinyserve.engine import Engine, read_card
from tinyserve.errors import DeviceError, ModelFileError, UsageError
from tinyserve.modelfile import find_model, write_model


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)


def test_probabilities_for_any_batch(images):
    model = Engine(find_model("inception"), device="cpu")
    assert model.provider == CPU
    alone = np.concatenate([model.run(image[None]) for image in images])
    together = model.run(images)
    assert together.shape == (5, 200)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.skipif(cuda_problem() is None, reason="CUDA works here")
def test_cuda_is_strict_and_auto_falls_back_aloud(caplog):
    path = find_model("inception")
    with pytest.raises(DeviceError, match="device cuda cannot run: "):
        Engine(path, device="cuda")
    model = Engine(path, device="auto")
    assert model.provider == (CPU if openvino_problem() else OPENVINO)
    assert model.fallback
    assert f"running on the CPU: {model.fallback}" in caplog.text
    caplog.clear()
    assert Engine(path, device="cpu").fallback is None
    assert caplog.text == ""


@pytest.mark.parametrize(("name", "tf32"), [("resnet20.fp16", "1"), ("inception.int8", "0")])
def test_only_files_in_half_precision_may_round_on_a_gpu(monkeypatch, name, tf32):
    """Without TF32 ONNX Runtime keeps convolutions off the tensor cores, in any precision."""
    path, asked = find_model(name), []
    card = read_card(path)

    def open_session(*_, providers, **__):
        asked.extend(providers)
        raise RuntimeError("no GPU")

    monkeypatch.setattr(engine, "device_problem", lambda _: None)
    for module in (engine, onnxruntime_session):
        monkeypatch.setattr(module, "read_unprepared", lambda _: card)
    monkeypatch.setattr(onnxruntime_session.ort, "InferenceSession", open_session)
    with pytest.raises(DeviceError, match="no GPU"):
        Engine(path, device="cuda")
    assert [(provider, options["use_tf32"]) for provider, options in asked] == [(CUDA, tf32)]


def test_a_gpu_that_is_full_is_no_damaged_file(monkeypatch, caplog):
    open_session = engine.OnnxRuntimeSession

    def full(path, device, **options):
        if device == "cuda":
            raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer")
        return open_session(path, device, **options)

    monkeypatch.setattr(engine, "cuda_problem", lambda: None)
    monkeypatch.setattr(engine, "OnnxRuntimeSession", full)
    model = Engine(find_model("inception"), device="auto")
    assert "Failed to allocate memory" in model.fallback
    assert model.provider == (CPU if openvino_problem() else OPENVINO)
    assert f"running on the CPU: {model.fallback}" in caplog.text


def test_a_gpu_that_cannot_be_opened_says_why_and_prints_nothing(monkeypatch, capfd):
    """ONNX Runtime would print a banner and try again on the CPU by itself."""
    create = ort.InferenceSession._create_inference_session

    def broken(self, providers, *others):
        if providers[0][0] == CUDA:
            raise RuntimeError("CUDA failure 2: out of memory\nmore")
        create(self, providers, *others)

    monkeypatch.setattr(engine, "cuda_problem", lambda: None)
    monkeypatch.setattr(engine, "device_problem", lambda _: None)
    monkeypatch.setattr(ort.InferenceSession, "_create_inference_session", broken)
    assert "CUDA failure 2: out of memory" in Engine(find_model("inception")).fallback
    with pytest.raises(DeviceError, match=r"CUDA failure 2: out of memory$"):
        Engine(find_model("inception"), device="cuda")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_a_runtime_that_fails_is_one_line(device):
    if device == "openvino" and openvino_problem():
        pytest.skip(openvino_problem())
    model = Engine(find_model("inception"), device=device)
    words = f"{device_name(model.provider)} failed with 2 images at a time: "
    with pytest.raises(DeviceError, match=words) as raised:
        engine._run(model._session, np.zeros((2, 7, 7, 3), dtype=np.uint8))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_what_are_no_images_is_the_callers_error(device):
    if device == "openvino" and openvino_problem():
        pytest.skip(openvino_problem())
    model = Engine(find_model("inception"), device=device)
    with pytest.raises(TypeError, match="images are float32, not uint8"):
        model.run(np.zeros((2, 64, 64, 3), np.float32))
    for shape in [(2, 32, 32, 3), (2, 1, 1, 3), (2, 3, 64, 64), (64, 64, 3), (0, 64, 64, 3)]:
        with pytest.raises(ValueError, match=r"not \(1 or more, 64, 64, 3\)"):
            model.run(np.zeros(shape, np.uint8))


def test_a_damaged_file_is_one_with_a_gpu_too(monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "cuda_problem", lambda: None)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ModelFileError, match="no ONNX model"):
        Engine(path, device="auto")


def test_threads_are_divided_among_streams():
    path = find_model("inception")
    for streams, each in ((1, 4), (2, 2), (8, 1)):
        model = Engine(path, device="cpu", threads=4, streams=streams, self_test=False)
        assert model._session._session.get_session_options().intra_op_num_threads == each
    with pytest.raises(UsageError, match="streams must be at least 1"):
        Engine(path, device="cpu", streams=0)
    with pytest.raises(UsageError, match="threads must be at least 1, not 0"):
        Engine(path, device="cpu", threads=0)


def test_a_file_that_is_no_model_is_refused(tmp_path, samples):
    with pytest.raises(ModelFileError, match="no such model file"):
        Engine(tmp_path / "missing.onnx")
    text = tmp_path / "text.onnx"
    text.write_text("no model")
    for path in (text, samples / "teapot" / "val_568.JPEG"):
        with pytest.raises(ModelFileError, match="no ONNX model, or damaged") as caught:
            Engine(path, device="cpu")
        assert "\n" not in str(caught.value)


def test_a_model_cut_short_is_refused(tmp_path):
    whole = find_model("inception").read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelFileError, match="damaged"):
        Engine(path, device="cpu")


def relu(path: Path, opset: int) -> Path:
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value], [out])
    sets = [onnx.helper.make_opsetid("", opset)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=sets, ir_version=10), path)
    return path


def test_somebody_elses_model_is_refused(tmp_path):
    with pytest.raises(ModelFileError, match="none that tinyserve exported"):
        read_card(relu(tmp_path / "relu.onnx", opset=18))


def test_what_this_runtime_cannot_load_is_not_called_damaged(tmp_path):
    with pytest.raises(ModelFileError, match=r"newer.onnx cannot be loaded \(.*failed:"):
        Engine(relu(tmp_path / "newer.onnx", opset=999), device="cpu")


def test_a_card_that_does_not_fit_its_graph_is_refused(tmp_path):
    source = find_model("inception")
    card = read_card(source)
    path = tmp_path / "wrong.onnx"
    graph = source.read_bytes()[: card.graph_bytes]
    write_model(path, graph, dataclasses.replace(card, image_size=32))
    with pytest.raises(ModelFileError, match="not what its metadata says"):
        read_card(path)


@pytest.mark.parametrize(
    ("flags", "exact"), [({"avx2"}, False), ({"avx512_vnni"}, True), ({"avx_vnni"}, True)]
)
def test_weights_are_made_exact_where_the_processor_is_not(monkeypatch, flags, exact):
    """To do so takes a tenth of a second or two."""
    monkeypatch.setattr(devices, "cpu_flags", lambda: frozenset(flags))
    options = onnxruntime_session.session_options(threads=1)
    name = "session.x64quantprecision"
    if exact:
        with pytest.raises(RuntimeError, match=name):
            options.get_session_config_entry(name)
    else:
        assert options.get_session_config_entry(name) == "1"
