"""Other people's classifiers in the form of ours.

A network exported by whatever made it becomes a model file: preprocessing goes into its graph, and
softmax where it has none. Needs the package ``onnx``, which serving does not.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tinyserve.devices import CPU, default_threads
from tinyserve.engine import Engine
from tinyserve.errors import (
    DeviceError,
    GateError,
    ModelFileError,
    OutputError,
    UsageError,
    first_line,
    os_reason,
)
from tinyserve.files import candidate
from tinyserve.modelfile import (
    INPUT_NAME,
    OUTPUT_NAME,
    Evidence,
    Golden,
    Label,
    ModelCard,
    write_model,
)
from tinyserve.onnxruntime_session import session_options

if TYPE_CHECKING:
    import onnx

BATCHES = (1, 3, 8)
MAX_DIFFERENCE = 1e-4
GOLDEN_TOLERANCE = 1e-2
SUM_TOLERANCE = 0.05
"""By which the sum of a row of probabilities may differ from 1: in 8 bits each is a multiple of
1/256."""

_PREFIX = "adopted/"


def adopt(
    source: Path,
    output: Path,
    *,
    labels: Sequence[Label],
    mean: Sequence[float],
    std: Sequence[float],
    size: int,
) -> ModelCard:
    """Write the classifier in ``source`` as a model file to ``output``; returns its card.

    ``source`` takes one float ``[batch, 3, size, size]``, RGB, normalised with ``mean`` and ``std``
    in units of 0..1, and gives logits or probabilities ``[batch, len(labels)]``. Raises
    :class:`~tinyserve.errors.ModelFileError` for anything else,
    :class:`~tinyserve.errors.UsageError` where ``output`` is a folder or ``source``,
    :class:`~tinyserve.errors.OutputError` where it cannot be written, and
    :class:`~tinyserve.errors.GateError`, leaving no file behind, where the new file does not
    compute what the old one does.
    """
    if output.is_dir():
        raise UsageError(f"cannot write {output}: it is a folder")
    if output.exists() and source.exists() and output.samefile(source):
        raise UsageError(f"{output} is the network itself: name another output")
    onnx = _onnx()
    model = _load(onnx, source)
    taken, given = _only_input_and_output(model, source)
    _check_shapes(taken, given, labels, size, source)
    card = ModelCard(
        architecture=source.stem,
        precision=_precision(onnx, model),
        labels=tuple(labels),
        image_size=size,
        crop=size,
        network_size=size,
        parameters=sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer),
        training=None,
    )
    _separate_signed_bytes(model)  # whose copies are no more parameters
    images = made_up_images(max(BATCHES), size)
    reference = _reference(model, taken.name, images, mean, std, source)
    if reference.shape != (len(images), len(labels)):  # the graph need not say it
        raise _wrong_shape(source, reference.shape, labels)
    softmax = not _are_probabilities(reference, source)
    if softmax:
        exponentials = np.exp(reference - reference.max(axis=1, keepdims=True))
        reference = exponentials / exponentials.sum(axis=1, keepdims=True)
    if not np.isfinite(reference).all():
        raise ModelFileError(f"{source} gives numbers that are not finite")
    try:
        graph = _wrapped(onnx, model, mean, std, size, len(labels), softmax=softmax)
    except Exception as error:  # protobuf and ONNX raise almost anything
        raise ModelFileError(
            f"{source} runs, but is no valid ONNX model with preprocessing ({first_line(error)})"
        ) from error
    try:
        with candidate(output) as path:
            write_model(path, graph, card)
            answers = _answers(path, images, source, output)
            # NumPy's maximum, which is NaN where one of them is.
            difference = float(
                np.max([np.abs(rows - reference[:batch]).max() for batch, rows in answers.items()])
            )
            agreement = float((answers[max(BATCHES)].argmax(1) == reference.argmax(1)).mean())
            if not difference <= MAX_DIFFERENCE:
                raise GateError(
                    f"a probability differs by {difference:.2g} from what {source} gives"
                )
            evidence = Evidence(
                provider=CPU,
                reference=f"{source.name}, ONNX Runtime, preprocessed outside",
                images=len(images),
                batch_sizes=BATCHES,
                top1_agreement=agreement,
                max_difference=difference,
                val_images=0,
                correct_top1=0,
                correct_top5=0,
                onnxruntime=ort.__version__,
            )
            golden = Golden.of(images, answers[max(BATCHES)], tolerance=GOLDEN_TOLERANCE)
            card = write_model(path, graph, replace(card, evidence=(evidence,), golden=golden))
    except OSError as error:
        raise OutputError(f"cannot write {output}: {os_reason(error)}") from error
    return card


def read_labels(path: Path) -> list[Label]:
    """Classes from a text file, one a line in the order of the output: a name, or a WordNet id, a
    space or tab, and a name."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read labels from {path}: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UsageError(f"{path}: line {number} is empty")
        first, *rest = line.split(maxsplit=1)
        is_wnid = len(first) == 9 and first[0] == "n" and first[1:].isdecimal()
        name = rest[0].strip() if rest else first
        found.append(Label(first, name) if is_wnid else Label(None, line.strip()))
    return found


def made_up_images(count: int, size: int) -> NDArray[np.uint8]:
    """Smooth patches of colour, always the same, uint8 ``[count, size, size, 3]``: something for a
    classifier to answer to, where nobody gives real images."""
    coarse = np.random.default_rng(0).uniform(0, 255, (count, 5, 5, 3))
    place = np.linspace(0, 4, size)
    low = np.minimum(place.astype(int), 3)
    weights = np.zeros((size, 5))
    weights[np.arange(size), low] = 1 - (place - low)
    weights[np.arange(size), low + 1] = place - low
    smooth = np.einsum("yi,nijc,xj->nyxc", weights, coarse, weights)
    images: NDArray[np.uint8] = smooth.round().astype(np.uint8)
    return images


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise UsageError(
            "adopting a model needs the package onnx: pip install 'tinyserve[adopt]'"
        ) from error
    return onnx


def _load(package: Any, source: Path) -> "onnx.ModelProto":
    if not source.is_file():
        raise ModelFileError(f"no such model file: {source}")
    try:
        model: onnx.ModelProto = package.load(source)  # external data, too
        package.checker.check_model(model)
    except Exception as error:  # protobuf and ONNX raise almost anything
        raise ModelFileError(
            f"{source} is no ONNX model, or damaged ({first_line(error)})"
        ) from error
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if opset < 13:
        raise ModelFileError(f"{source} is of opset {opset}: export it again with 13 or later")
    return model


def _only_input_and_output(
    model: "onnx.ModelProto", source: Path
) -> "tuple[onnx.ValueInfoProto, onnx.ValueInfoProto]":
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    outputs = list(model.graph.output)
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelFileError(
            f"{source} has {len(inputs)} inputs and {len(outputs)} outputs, wanted one of each"
        )
    return inputs[0], outputs[0]


def _check_shapes(
    taken: "onnx.ValueInfoProto",
    given: "onnx.ValueInfoProto",
    labels: Sequence[Label],
    size: int,
    source: Path,
) -> None:
    shape = _shape(taken)
    wanted = (None, 3, size, size)
    if len(shape) != 4 or any(
        have is not None and want is not None and have != want
        for have, want in zip(shape, wanted, strict=True)
    ):
        raise ModelFileError(f"{source} takes {_words(shape)}, wanted batch x 3 x {size} x {size}")
    if shape[0] is not None:
        raise ModelFileError(
            f"{source} takes batches of {shape[0]} alone: export it with a dynamic batch"
        )
    kind = taken.type.tensor_type.elem_type
    if kind != 1:  # TensorProto.FLOAT
        raise ModelFileError(f"{source} does not take single-precision numbers")
    classes = _shape(given)
    if len(classes) != 2 or (classes[1] is not None and classes[1] != len(labels)):
        raise _wrong_shape(source, classes, labels)


def _wrong_shape(
    source: Path, shape: Sequence[int | None], labels: Sequence[Label]
) -> ModelFileError:
    return ModelFileError(f"{source} gives {_words(shape)}, but there are {len(labels):,} labels")


def _shape(value: "onnx.ValueInfoProto") -> list[int | None]:
    """None for what is given by name, or as 0 or -1, which some exporters write for any size."""
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.dim_value > 0 else None for dim in dims]


def _words(shape: Sequence[int | None]) -> str:
    return " x ".join("?" if size is None else str(size) for size in shape)


def _separate_signed_bytes(model: "onnx.ModelProto") -> None:
    """Give every use of a constant of signed bytes a constant of its own.

    On processors that sum products of 8 bits inexactly ONNX Runtime makes weights and their zero
    points unsigned, and refuses to do that twice to one.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = node.attribute[0].t
    used: set[str] = set()
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name not in constants or constants[name].data_type != constants[name].INT8:
                continue
            if name in used:
                copy = graph.initializer.add()
                copy.CopyFrom(constants[name])
                node.input[place] = copy.name = f"{name} of {node.output[0]} {place}"
            used.add(name)


def _reference(
    model: "onnx.ModelProto",
    name: str,
    images: NDArray[np.uint8],
    mean: Sequence[float],
    std: Sequence[float],
    source: Path,
) -> NDArray[np.float32]:
    """What the model gives, with the preprocessing that its own users do."""
    pixels = (images / 255.0 - np.array(mean)) / np.array(std)
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)
    try:
        options = session_options(default_threads())
        session = ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
        (rows,) = session.run(None, {name: planes})
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise ModelFileError(f"{source} does not run: {first_line(error)}") from error
    return np.asarray(rows, dtype=np.float32)


def _answers(
    path: Path, images: NDArray[np.uint8], source: Path, output: Path
) -> dict[int, NDArray[np.float32]]:
    """What the new file gives, by the size of the batch."""
    try:
        engine = Engine(path, device="cpu")
        return {batch: engine.run(images[:batch]) for batch in BATCHES}
    except (DeviceError, ModelFileError) as error:
        said = str(error).replace(str(path), str(output))  # nobody knows of the hidden file
        raise ModelFileError(f"{source} cannot be adopted: {said}") from error


def _are_probabilities(rows: NDArray[np.float32], source: Path) -> bool:
    """Whether they are, and not logits."""
    if not ((rows >= 0) & (rows <= 1 + SUM_TOLERANCE)).all():
        return False
    if not np.allclose(rows.sum(axis=1), 1, rtol=0, atol=SUM_TOLERANCE):
        raise ModelFileError(
            f"{source} gives numbers from 0 to 1 whose sum is not 1, which are neither "
            "probabilities of one class nor logits: export it without its last layer"
        )
    return True


def _wrapped(
    onnx: Any,
    model: "onnx.ModelProto",
    mean: Sequence[float],
    std: Sequence[float],
    size: int,
    classes: int,
    *,
    softmax: bool,
) -> bytes:
    """The graph from uint8 images to probabilities, serialized."""
    # Whatever its tensors are called, they do not collide with ours.
    inner = onnx.compose.add_prefix(model, _PREFIX)
    # Before version 4 every initializer had to be an input, too, and ours are none.
    inner.ir_version = max(inner.ir_version, 4)
    taken, given = _only_input_and_output(inner, Path())
    node, floats = onnx.helper.make_node, onnx.TensorProto.FLOAT
    graph = inner.graph
    offset, scale = 255 * np.array(mean), 1 / (255 * np.array(std))
    graph.initializer.extend(
        onnx.numpy_helper.from_array(values.astype(np.float32), key)
        for key, values in (("mean", offset), ("scale", scale))
    )
    before = [
        node("Cast", [INPUT_NAME], ["pixels"], to=floats),
        node("Sub", ["pixels", "mean"], ["centred"]),
        node("Mul", ["centred", "scale"], ["normalised"]),
        node("Transpose", ["normalised"], [taken.name], perm=[0, 3, 1, 2]),
    ]
    kind = "Softmax" if softmax else "Identity"
    after = [
        node("Cast", [given.name], ["answers"], to=floats),  # some give half precision
        node(kind, ["answers"], [OUTPUT_NAME], **({"axis": 1} if softmax else {})),
    ]
    nodes = [*before, *graph.node, *after]
    weights = [value for value in graph.input if value.name != taken.name]
    # What is written of the shapes inside need not be true: ONNX Runtime goes by its own.
    for field in ("node", "input", "output", "value_info"):
        graph.ClearField(field)
    graph.node.extend(nodes)
    value = onnx.helper.make_tensor_value_info
    shape = ["batch", size, size, 3]
    graph.input.extend([value(INPUT_NAME, onnx.TensorProto.UINT8, shape), *weights])
    graph.output.append(value(OUTPUT_NAME, floats, ["batch", classes]))
    inner.ClearField("metadata_props")
    onnx.checker.check_model(inner, full_check=True)
    content: bytes = inner.SerializeToString()
    return content


def _precision(onnx: Any, model: "onnx.ModelProto") -> str:
    """Of most of the weights."""
    sizes: dict[int, int] = {}
    for tensor in model.graph.initializer:
        sizes[tensor.data_type] = sizes.get(tensor.data_type, 0) + int(np.prod(tensor.dims))
    kind = max(sizes, key=lambda key: sizes[key], default=onnx.TensorProto.FLOAT)
    names = {
        onnx.TensorProto.FLOAT16: "fp16",
        onnx.TensorProto.INT8: "int8",
        onnx.TensorProto.UINT8: "int8",
    }
    return names.get(kind, "fp32")
