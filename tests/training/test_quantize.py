"""The graph in 8 bits, as ONNX Runtime runs it: what makes it fast is there."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

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
