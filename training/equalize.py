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

_KEEP_FACTORS = frozenset({"Relu", "MaxPool", "AveragePool", "ReduceMean", "Add"})
_BATCH = 16
_MOST = 16.0
"""Times that a channel is made smaller or larger at most."""


@dataclass(slots=True)
class _Stream:
    """Tensors whose channels have the same factors: what is pooled, added and cut off at zero."""

    tensors: set[str]
    makers: list[onnx.NodeProto] = field(default_factory=list)
    users: list[onnx.NodeProto] = field(default_factory=list)


def equalize(model: onnx.ModelProto, images: NDArray[np.uint8]) -> onnx.ModelProto:
    """The graph with the channels of every layer scaled to more equal ranges, the same function.

    ``images`` are those by which ranges are measured, uint8 ``[n, size, size, 3]``. Layers whose
    output goes elsewhere than through ReLU, pooling and sums into other layers stay as they are.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in made.graph.initializer}
    weights = {name: numpy_helper.to_array(tensor).copy() for name, tensor in tensors.items()}
    streams = [
        stream for stream in _streams(made.graph, weights) if _may_be_scaled(stream, made, weights)
    ]
    for stream, ranges in zip(streams, _ranges(made, streams, images), strict=True):
        channels = len(ranges)
        uses = [_by_channel(weights[node.input[1]], channels) for node in stream.users]
        used = np.max([np.abs(use).max(axis=(0, 2)) for use in uses], axis=0)
        alive = (ranges > 0) & (used > 0)
        factors = np.ones(channels)
        factors[alive] = np.sqrt(ranges[alive] / used[alive])
        factors[alive] /= np.exp(np.log(factors[alive]).mean())
        factors = factors.clip(1 / _MOST, _MOST).astype(np.float32)
        for node in stream.makers:
            for name in node.input[1:]:
                weights[name] = (weights[name].T / factors).T
        for node, use in zip(stream.users, uses, strict=True):
            scaled = use * factors[:, None]
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
        if node.op_type in ("Conv", "Gemm"):
            of(inputs[0]).users.append(node)
            of(node.output[0]).makers.append(node)
        elif node.op_type in _KEEP_FACTORS or _flattens(node, of(inputs[0])):
            whole = of(inputs[0])
            for other in {id(of(name)): of(name) for name in [*inputs, *node.output]}.values():
                if other is not whole:
                    whole.tensors |= other.tensors
                    whole.makers += other.makers
                    whole.users += other.users
            streams.update(dict.fromkeys(whole.tensors, whole))
    return list({id(stream): stream for stream in streams.values()}.values())


def _flattens(node: onnx.NodeProto, stream: _Stream) -> bool:
    """Whether it makes rows of feature maps, channel after channel."""
    return node.op_type == "Reshape" and bool(stream.makers)


def _may_be_scaled(
    stream: _Stream, model: onnx.ModelProto, weights: dict[str, NDArray[np.float32]]
) -> bool:
    graph = model.graph
    if not stream.makers or not stream.users:
        return False
    known = {id(node) for node in [*stream.makers, *stream.users]}
    for node in graph.node:
        touched = stream.tensors & {*node.input, *node.output}
        passes = node.op_type in _KEEP_FACTORS or node.op_type == "Reshape"
        if touched and not (passes or id(node) in known):
            return False
        # What is added to, or made, elsewhere.
        if passes and touched and not {n for n in node.input if n not in weights} <= stream.tensors:
            return False
        if node.op_type == "Add" and touched and any(name in weights for name in node.input):
            return False
    uses = Counter(name for node in graph.node for name in node.input)
    channels = {len(weights[node.input[1]]) for node in stream.makers}
    return (
        len(channels) == 1
        and not stream.tensors & {output.name for output in graph.output}
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
    for start in range(0, len(images), _BATCH):
        found = session.run(order, {INPUT_NAME: images[start : start + _BATCH]})
        for name, values in zip(order, found, strict=True):
            across = tuple(axis for axis in range(values.ndim) if axis != 1)
            most = np.abs(values).max(axis=across)
            largest[name] = np.maximum(largest.get(name, most), most)
    return [np.max([largest[name] for name in some], axis=0) for some in names]
