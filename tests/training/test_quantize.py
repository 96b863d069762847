"""The graph in 8 bits, as ONNX Runtime runs it: what makes it fast is there."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tinyserve.devices import CPU
from tinyserve.onnxruntime_session import session_options
from training import export, quantize
from training.evaluate import ServedNetwork
from training.models import ARCHS


@pytest.fixture(scope="module", params=["baseline", "alexnet", "inception"])
def graph(request, tmp_path_factory) -> onnx.GraphProto:
    """What ONNX Runtime makes of an untrained network that pools, in 8 bits."""
    torch.manual_seed(0)
    network = ARCHS[request.param](5, image_size=32, batch_norm=True)
    colour = torch.full((3,), 110.0)
    served = ServedNetwork(network, colour, colour / 2, image_size=40, crop=32, network_size=32)
    images = np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "_METHODS", {"minmax": quantize._METHODS["minmax"]})
        model = quantize.to_int8(export.to_onnx(served.eval(), 40), images, images).model
    return optimized(model, tmp_path_factory.mktemp(request.param))


def optimized(model: onnx.ModelProto, folder: Path) -> onnx.GraphProto:
    options = session_options(threads=1)
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    return onnx.load(options.optimized_model_filepath).graph


def named(graph: onnx.GraphProto, *kinds: str) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type in kinds]


@pytest.mark.slow
def test_all_of_the_network_but_its_last_layer_is_in_8_bits(graph):
    assert len(named(graph, "QLinearConv")) > 0
    assert named(graph, "Conv", "FusedConv", "Relu") == []
    assert len(named(graph, "QuantizeLinear")) == len(named(graph, "DequantizeLinear")) == 1
    assert len(named(graph, "Gemm", "FusedGemm")) == 1


@pytest.mark.slow
def test_pooling_is_done_where_channels_are_last(graph):
    assert named(graph, "MaxPool") == []
    before, after = (named(graph, kind)[0] for kind in ("QuantizeLinear", "DequantizeLinear"))
    nodes = list(graph.node)
    between = nodes[nodes.index(before) : nodes.index(after)]
    # Once to channels last, and at most once back, not around every convolution.
    assert sum(node.op_type == "Transpose" for node in between) <= 2


@pytest.mark.slow
def test_what_is_concatenated_has_one_range(graph):
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in named(graph, "QLinearConcat"):
        scale, zero, *parts = node.input
        assert {float(values[name]) for name in parts[1::3]} == {float(values[scale])}
        assert {int(values[name]) for name in parts[2::3]} == {int(values[zero])}


@pytest.mark.slow
def test_the_mean_is_subtracted_from_rows_not_from_pixels(graph):
    (subtraction,) = named(graph, "Sub")
    values = {tensor.name: tensor.dims for tensor in graph.initializer}
    assert list(values[subtraction.input[1]]) == [3 * 32]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 33, 67])
def test_any_number_of_images_of_any_size_can_be_calibrated_on(monkeypatch, count):
    torch.manual_seed(0)
    network = ARCHS["baseline"](5, image_size=32, batch_norm=True).eval()
    colour = torch.full((3,), 110.0)
    served = ServedNetwork(network, colour, colour / 2, image_size=48, crop=32, network_size=32)
    images = np.random.default_rng(0).integers(0, 256, (count, 48, 48, 3), dtype=np.uint8)
    seen = []

    class Watched(quantize._Images):
        def get_next(self):
            batch = super().get_next()
            seen.append(0 if batch is None else len(batch["images"]))
            return batch

    monkeypatch.setattr(quantize, "_Images", Watched)
    made = quantize.to_int8(export.to_onnx(served.eval(), 48), images, images)
    assert made.method in quantize._METHODS
    assert made.agreement > 0.9
    whole = count // min(count, 32) * min(count, 32)
    assert sum(seen) == whole * len(quantize._METHODS)
    assert max(seen) <= 32


def test_of_larger_images_fewer_are_calibrated_on_at_a_time():
    sizes = {size: quantize._Images(np.empty((64, size, size, 3), np.uint8)) for size in (64, 256)}
    assert [reader.slice for reader in sizes.values()] == [32, 2]
    assert [len(reader) for reader in sizes.values()] == [64, 64]


def sum_of_two(ranges: dict[str, tuple[float, float]]) -> onnx.ModelProto:
    """``out = ReLU(a + b)``, all three in 8 bits of these ranges."""
    nodes, constants = [], []
    for name, (low, high) in ranges.items():
        scale = np.float32((high - low) / 255)
        zero = np.uint8(round(-low / scale))
        for what, value in (("scale", scale), ("zero", zero)):
            constants.append(numpy_helper.from_array(np.asarray(value), f"{name}_{what}"))
        of = [f"{name}_scale", f"{name}_zero"]
        nodes.append(helper.make_node("QuantizeLinear", [name, *of], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *of], [f"{name}_d"]))
    nodes.insert(4, helper.make_node("Add", ["a_d", "b_d"], ["out"]))
    ends = {
        name: [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in names]
        for name, names in {"inputs": ["a", "b"], "outputs": ["out_d"]}.items()
    }
    graph = helper.make_graph(nodes, "sum", **ends, initializer=constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def ranges_in(model: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    values = {t.name: numpy_helper.to_array(t).item() for t in model.graph.initializer}
    return {
        name: (
            -values[f"{name}_zero"] * values[f"{name}_scale"],
            (255 - values[f"{name}_zero"]) * values[f"{name}_scale"],
        )
        for name in ("a", "b", "out")
    }


def error_of(model: onnx.ModelProto) -> float:
    a, b = np.meshgrid(np.linspace(-30, 30, 101), np.linspace(0, 10, 101))
    a, b = a.ravel().astype(np.float32), b.ravel().astype(np.float32)
    session = ort.InferenceSession(model.SerializeToString(), providers=[CPU])
    (found,) = session.run(None, {"a": a, "b": b})
    return float(np.abs(found - (a + b).clip(0, 20)).mean())


def test_what_is_added_has_no_range_that_a_relu_hides():
    model = sum_of_two({"a": (-30, 30), "b": (0, 10), "out": (0, 20)})
    before = error_of(model)
    quantize._trim_addends(model.graph)
    found = ranges_in(model)
    assert found["a"] == pytest.approx((-10, 20), abs=0.1)
    assert found["b"] == pytest.approx((0, 10))
    assert found["out"] == pytest.approx((0, 20))
    assert error_of(model) < 0.7 * before


def test_what_no_relu_follows_keeps_its_range():
    ranges = {"a": (-30, 30), "b": (0, 10), "out": (-20, 20)}
    model = sum_of_two(ranges)
    before = ranges_in(model)
    quantize._trim_addends(model.graph)
    assert ranges_in(model) == before
