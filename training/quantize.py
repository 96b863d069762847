"""The exported graph in half precision and in 8 bits."""

import io
import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from tinyserve.modelfile import INPUT_NAME
from training.equalize import equalize
from training.evaluate import at_a_time
from training.gate import in_batches, runner

CALIBRATION_IMAGES = 256
CHOICE_IMAGES = 1000
"""Training images by which the best way to 8 bits is chosen: others than those calibrated on."""

_BATCH = 32
_LEVELS = 255
"""Steps from the least number of 8 bits to the greatest."""
_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with weights and arithmetic in half precision, input and output as they were.

    In single precision stay: everything before the first convolution, as half precision has steps
    of an eighth near a grey level of 255, and from the average over the last feature map on, whose
    sum could overflow, or else the softmax.
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    graph.ClearField("value_info")  # of the types that they had
    nodes = list(graph.node)
    kinds = [node.op_type for node in nodes]
    start, stop = kinds.index("Conv"), kinds.index("Softmax")
    if "ReduceMean" in kinds[start:stop]:
        stop = max(i for i in range(start, stop) if kinds[i] == "ReduceMean")
    before, middle, after = nodes[:start], nodes[start:stop], nodes[stop:]

    weights = {tensor.name: tensor for tensor in graph.initializer}
    for name in {name for node in middle for name in node.input}:
        if name in weights and weights[name].data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(weights[name]).astype(np.float16)
            weights[name].CopyFrom(numpy_helper.from_array(array, name))
    entering = _cast(before, middle, onnx.TensorProto.FLOAT16)
    leaving = _cast(middle, after, onnx.TensorProto.FLOAT)
    graph.ClearField("node")
    graph.node.extend([*before, *entering, *middle, *leaving, *after])
    return half


def _cast(
    givers: Sequence[onnx.NodeProto], takers: Sequence[onnx.NodeProto], to: int
) -> list[onnx.NodeProto]:
    """Nodes that cast what goes from the one to the other; the takers are changed to take that."""
    given = {name for node in givers for name in node.output}
    casts = {}
    for node in takers:
        for place, name in enumerate(node.input):
            if name in given:
                cast = f"{name}_{onnx.TensorProto.DataType.Name(to).lower()}"
                casts[cast] = onnx.helper.make_node("Cast", [name], [cast], f"cast_{cast}", to=to)
                node.input[place] = cast
    return list(casts.values())


@dataclass(frozen=True, slots=True)
class Int8:
    """A graph in 8 bits, and how it was made."""

    model: onnx.ModelProto
    method: str
    """Which estimate of the activations' ranges."""
    agreement: float
    """Share of :data:`CHOICE_IMAGES` training images with the same top-1 as in single precision."""


def to_int8(
    model: onnx.ModelProto, calibration: NDArray[np.uint8], choice: NDArray[np.uint8]
) -> Int8:
    """The graph with convolutions and fully connected layers in 8 bits, in the QDQ form.

    Activations are unsigned, weights signed and scaled by channel: the pair that processors
    multiply fastest. Weights have 7 bits: x86 processors without VNNI add products up in 16 bits,
    which those of 8 overflow. What comes before the network and its last layer stay in single
    precision: they are a small part of the time and a large part of the error. The first
    convolution does not: ONNX Runtime keeps the channels last from one 8-bit convolution to the
    next, but first behind one in single precision, where it pools 8-bit numbers fifty times as
    slowly. So pooling took more than a third of inception's time.

    Channels are equalized first, see :mod:`training.equalize`.

    ``calibration`` and ``choice`` are uint8 ``[n, size, size, 3]``. Every estimate of the ranges is
    tried, and the one kept that agrees best with single precision on ``choice``.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        equal = equalize(model, calibration)
        onnx.save(onnx.shape_inference.infer_shapes(equal), prepared)
        kept = [*_before_network(model), *_last(model)]
        expected = _answers(model, choice)
        candidates = []
        reader = _Images(calibration)
        for name, method in _METHODS.items():
            path = Path(folder) / f"{name}.onnx"
            with _quiet():
                quantize_static(
                    prepared,
                    path,
                    reader,
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    reduce_range=True,
                    nodes_to_exclude=kept,
                    calibrate_method=method,
                    # For all methods, not only that one, and in memory that does not grow with the
                    # images: the outputs of every layer are kept for one slice of them at a time.
                    extra_options={"CalibStridedMinMax": reader.slice},
                )
            quantized = onnx.load(path)
            _share_ranges(quantized.graph)
            _trim_addends(quantized.graph)
            same = float((_answers(quantized, choice) == expected).mean())
            candidates.append(Int8(quantized, name, same))
    return max(candidates, key=lambda candidate: candidate.agreement)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer prints its progress, and advises to fuse what is fused already."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


class _Images(CalibrationDataReader):  # type: ignore[misc]
    """Images for the calibrator, which takes them a slice at a time, all as long."""

    slice: int
    """Images."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self.slice = min(at_a_time(_BATCH, images.shape[1]), len(images))
        self._images = images[: len(images) // self.slice * self.slice]
        self._next: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self._images)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._next = self._images[start_index:end_index]

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        images, self._next = self._next, None
        return None if images is None else {INPUT_NAME: images}


def _answers(model: onnx.ModelProto, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Top-1 of every image."""
    rows = in_batches(runner(model.SerializeToString()), images, _BATCH)
    best: NDArray[np.int64] = rows.argmax(axis=1)
    return best


def _before_network(model: onnx.ModelProto) -> Iterator[str]:
    """Names of the nodes before the first convolution: crop, normalisation, resize."""
    for node in model.graph.node:
        if node.op_type == "Conv":
            return
        yield node.name


def _last(model: onnx.ModelProto) -> list[str]:
    """The last layer and all that follows it, which is the softmax: its output in 256 steps would
    not sum to 1."""
    nodes = model.graph.node
    last = max(i for i, node in enumerate(nodes) if node.op_type in ("Conv", "Gemm", "MatMul"))
    return [node.name for node in nodes[last:]]


def _share_ranges(graph: onnx.GraphProto) -> None:
    """Give all that is concatenated the range of the whole.

    It would be rounded to that next anyway. Rounded once it is more exact, and what has the same
    range is joined by copying, in a third of the time.
    """
    makers = {name: node for node in graph.node for name in node.output}
    takers = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type != "Concat":
            continue
        whole = takers[node.output[0]]
        if whole.op_type != "QuantizeLinear":  # of shapes, not of activations
            continue
        for name in node.input:
            dequantize = makers[name]
            quantize = makers[dequantize.input[0]]
            quantize.input[1:] = dequantize.input[1:] = whole.input[1:]
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def _trim_addends(graph: onnx.GraphProto) -> None:
    """Give what is added in front of a ReLU no more range than is seen behind it.

    What outweighs the largest other addend to the negative ends as zero, and above the range of the
    sum it is cut off: without that, the steps of what is in between are finer.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    takers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            takers[name].append(node)

    def range_of(node: onnx.NodeProto) -> tuple[float, float]:
        scale, zero = (numpy_helper.to_array(tensors[name]).item() for name in node.input[1:3])
        return -zero * scale, (_LEVELS - zero) * scale

    for node in graph.node:
        if node.op_type != "Add":
            continue
        givers = [makers[name] for name in node.input if name in makers]
        behind = takers[node.output[0]]
        if [giver.op_type for giver in givers] != ["DequantizeLinear"] * 2:
            continue
        if [taker.op_type for taker in behind] != ["QuantizeLinear"]:
            continue
        least, most = range_of(behind[0])
        if least < 0:  # no ReLU
            continue
        ranges = [range_of(giver) for giver in givers]
        lows = [max(own[0], -other[1]) for own, other in zip(ranges, ranges[::-1], strict=True)]
        highs = [min(own[1], most - low) for own, low in zip(ranges, lows[::-1], strict=True)]
        for giver, low, high in zip(givers, lows, highs, strict=True):
            quantized, scale_and_zero = giver.input[0], giver.input[1:3]
            if len(takers[giver.output[0]]) > 1 or len(takers[quantized]) > 1 or low >= 0:
                continue  # it is used for more than this sum, or is not negative
            scale = np.float32((high - low) / _LEVELS)
            zero = np.uint8(round(-low / scale))
            for name, value in zip(scale_and_zero, (scale, zero), strict=True):
                tensors[name].CopyFrom(numpy_helper.from_array(np.asarray(value), name))
