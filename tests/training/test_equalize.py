"""Channels of like range, and the same function."""

import copy
import functools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from tinyserve.devices import CPU
from training import equalize as equalizing
from training import export
from training.equalize import equalize
from training.evaluate import ServedNetwork
from training.models import ARCHS

SIZE = 32


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, SIZE, SIZE, 3), dtype=np.uint8)


@functools.cache
def graph_of(arch: str) -> onnx.ModelProto:
    """A network whose channels differ as those of a trained one do, and more; do not change it."""
    torch.manual_seed(0)
    network = ARCHS[arch](5, image_size=SIZE, batch_norm=True)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.weight.data = torch.exp(torch.randn_like(module.weight))
            module.bias.data = torch.randn_like(module.bias) / 4
    grey = torch.full((3,), 110.0)
    served = ServedNetwork(network, grey, grey / 2, image_size=SIZE, crop=SIZE, network_size=SIZE)
    return export.to_onnx(served.eval(), SIZE)


def run(model: onnx.ModelProto, images: np.ndarray, *names: str) -> list[np.ndarray]:
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, names))
    session = ort.InferenceSession(watched.SerializeToString(), providers=[CPU])
    return session.run(["probabilities", *names], {"images": images})


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_the_function_stays_and_channels_become_alike(arch, images):
    model = graph_of(arch)
    before = model.SerializeToString()
    equal = equalize(model, images)
    assert model.SerializeToString() == before
    relus = [node.output[0] for node in model.graph.node if node.op_type == "Relu"]
    first, *were = run(model, images, *relus)
    second, *are = run(equal, images, *relus)
    np.testing.assert_allclose(second, first, atol=5e-4)
    assert first.std() > 0.01

    def spread(values: np.ndarray) -> float:
        """Of the logarithms of the channels' largest values."""
        most = np.abs(values).max(axis=tuple(axis for axis in range(values.ndim) if axis != 1))
        return float(np.log(most[most > 0]).std())

    spreads = [(spread(old), spread(new)) for old, new in zip(were, are, strict=True)]
    changed = [pair for pair in spreads if abs(pair[0] - pair[1]) > 1e-3]
    # What is concatenated stays as it is: of inception all but the stem and what each module makes
    # for its own next layer.
    assert len(changed) == {"inception": 19}.get(arch, len(relus))
    old, new = np.mean(changed, axis=0)
    assert new < 0.8 * old


@pytest.mark.slow
def test_a_layer_that_two_share_stays_as_it_is(images):
    model = copy.deepcopy(graph_of("resnet20"))
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    # The first block's two, of the same shape.
    convolutions[2].input[1] = convolutions[1].input[1]
    equal = equalize(model, images)
    name = convolutions[1].input[1]
    old, new = (
        next(numpy_helper.to_array(t) for t in m.graph.initializer if t.name == name)
        for m in (model, equal)
    )
    assert np.array_equal(old, new)
    np.testing.assert_allclose(run(equal, images)[0], run(model, images)[0], atol=1e-5)


@pytest.mark.slow
def test_of_large_images_fewer_are_measured_at_a_time(images, monkeypatch):
    model, asked = graph_of("baseline"), []
    expected = equalize(model, images).SerializeToString()

    def at_a_time(count: int, size: int) -> int:
        asked.append(size)
        return min(count, 3)

    monkeypatch.setattr(equalizing, "at_a_time", at_a_time)
    assert equalize(model, images).SerializeToString() == expected
    assert asked == [SIZE]
