"""Channels of like range: the same function of a graph, in which 8 bits lose less.

A tensor has one step for all of its channels, and the largest channel sets it, though most have a
fraction of its range. ReLU, pooling and sums keep factors: a channel can be divided by one where it
is made and multiplied by it where it is used (arXiv:1906.04721). The factor is half of what would
make the channels' ranges the same (arXiv:2211.10438, in the logarithm): the rest of the difference
stays, where it does less harm, in the weights that use them.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from tinyserve.devices import CPU, default_threads
from tinyserve.modelfile import INPUT_NAME
from tinyserve.onnxruntime_session import session_options
from training.evaluate import at_a_time

_KEEP_FACTORS = frozenset({"Relu", "MaxPool", "AveragePool", "ReduceMean"})
_BATCH = 16
_MOST = 16.0
"""Times that a channel is made smaller or larger at most."""


@dataclass(slots=True)
class _Stream:
    """Tensors whose channels have the same factors: what is pooled, added and cut off at zero."""

    tensors: set[str]
    makers: list[onnx.NodeProto] = field(default_factory=list)
    users: list[onnx.NodeProto] = field(default_factory=list)
    seen_elsewhere: bool = False
    """Whether something else than these and what keeps factors makes or uses them."""

    def take_in(self, other: "_Stream") -> None:
        self.tensors |= other.tensors
        self.makers += other.makers
        self.users += other.users
        self.seen_elsewhere |= other.seen_elsewhere


def equalize(model: onnx.ModelProto, images: NDArray[np.uint8]) -> onnx.ModelProto:
    """The graph with the channels of every layer scaled to more equal ranges, the same function.

    ``images`` are those by which ranges are measured, uint8 ``[n, size, size, 3]``. Layers whose
    output goes elsewhere than through ReLU, pooling and sums into other layers stay as they are.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in made.graph.initializer}
    weights = {name: numpy_helper.to_array(tensor).copy() for name, tensor in tensors.items()}
    uses = Counter(name for node in made.graph.node for name in node.input)
    streams = [
        stream for stream in _streams(made.graph, weights) if _may_be_scaled(stream, weights, uses)
    ]
    for stream, ranges in zip(streams, _ranges(made, streams, images), strict=True):
        channels = len(ranges)
        layers = [_by_channel(weights[node.input[1]], channels) for node in stream.users]
        used = np.max([np.abs(layer).max(axis=(0, 2)) for layer in layers], axis=0)
        alive = (ranges > 0) & (used > 0)
        factors = np.ones(channels)
        factors[alive] = np.sqrt(ranges[alive] / used[alive])
        factors[alive] /= np.exp(np.log(factors[alive]).mean())
        factors = factors.clip(1 / _MOST, _MOST).astype(np.float32)
        for node in stream.makers:
            for name in node.input[1:]:
                weights[name] = (weights[name].T / factors).T
        for node, layer in zip(stream.users, layers, strict=True):
            scaled = layer * factors[:, None]
            weights[node.input[1]] = scaled.reshape(weights[node.input[1]].shape)
    for name, tensor in tensors.items():
        tensor.CopyFrom(numpy_helper.from_array(weights[name], name))
    return made


def _streams(graph: onnx.GraphProto, weights: dict[str, NDArray[np.float32]]) -> list[_Stream]:
    streams: dict[str, _Stream] = {}

    def of(name: str) -> _Stream:
        return streams.setdefault(name, _Stream({name}))

    for node in graph.node:
        inputs = [name for name in node.input if name not in weights]
        if node.op_type in ("Conv", "Gemm") and len(inputs) == 1:
            of(inputs[0]).users.append(node)
            of(node.output[0]).makers.append(node)
        elif _keeps_factors(node, [of(name) for name in inputs]):
            whole = of(inputs[0])
            for name in [*inputs, *node.output]:
                if (other := of(name)) is not whole:
                    whole.take_in(other)
                    streams.update(dict.fromkeys(other.tensors, whole))
        else:
            for name in [*inputs, *node.output]:
                of(name).seen_elsewhere = True
    for output in graph.output:
        of(output.name).seen_elsewhere = True
    return list({id(stream): stream for stream in streams.values()}.values())


def _keeps_factors(node: onnx.NodeProto, inputs: list[_Stream]) -> bool:
    if node.op_type == "Add":  # a constant would have to be scaled, too
        return len(inputs) == 2
    if node.op_type == "Reshape":  # it makes rows of feature maps, channel after channel
        return bool(inputs[0].makers)
    return node.op_type in _KEEP_FACTORS


def _may_be_scaled(
    stream: _Stream, weights: dict[str, NDArray[np.float32]], uses: Counter[str]
) -> bool:
    """``uses`` counts the nodes that a tensor goes into: what two layers share stays as it is."""
    return (
        bool(stream.makers and stream.users)
        and not stream.seen_elsewhere
        and len({len(weights[node.input[1]]) for node in stream.makers}) == 1
        and all(uses[name] == 1 for node in stream.makers for name in node.input[1:])
        and all(uses[node.input[1]] == 1 for node in stream.users)
        and all(_is_plain(node) for node in [*stream.makers, *stream.users])
    )


def _is_plain(node: onnx.NodeProto) -> bool:
    """A convolution of one group, or a matrix with a row for each output."""
    attributes: dict[str, int] = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Conv":
        return attributes.get("group", 1) == 1
    return attributes.get("transB", 0) == 1


def _by_channel(weights: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    """``[outputs, channels, values]``: of a flattened feature map a channel has many values."""
    return weights.reshape(len(weights), channels, -1)


def _ranges(
    model: onnx.ModelProto, streams: list[_Stream], images: NDArray[np.uint8]
) -> list[NDArray[np.float32]]:
    """The largest value of every channel of every stream, behind its ReLUs where it has some."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    rectified = {node.output[0] for node in model.graph.node if node.op_type == "Relu"}
    names = [
        stream.tensors & rectified or {node.output[0] for node in stream.makers}
        for stream in streams
    ]
    del watched.graph.output[:]
    for name in {name for some in names for name in some}:
        watched.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = ort.InferenceSession(
        watched.SerializeToString(), session_options(default_threads()), providers=[CPU]
    )
    order = [output.name for output in session.get_outputs()]
    largest: dict[str, NDArray[np.float32]] = {}
    batch = at_a_time(_BATCH, images.shape[1])
    for start in range(0, len(images), batch):
        found = session.run(order, {INPUT_NAME: images[start : start + batch]})
        for name, values in zip(order, found, strict=True):
            across = tuple(axis for axis in range(values.ndim) if axis != 1)
            most = np.abs(values).max(axis=across)
            largest[name] = np.maximum(largest.get(name, most), most)
    return [np.max([largest[name] for name in some], axis=0) for some in names]
