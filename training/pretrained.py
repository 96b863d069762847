"""A trained network to start from or to learn from, read from a run's folder or a model file.

An exported file holds each batch norm folded into the layer before it. :func:`load` reads
such a network back with its batch norms as identities plus a bias, which computes the same in
evaluation mode; :func:`refit_norms` then makes them real ones again, for further training.
"""

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from tinyserve.engine import read_card
from tinyserve.errors import CheckpointError, GateError, ModelFileError, os_reason
from tinyserve.modelfile import Label, check_graph
from training import checkpoint
from training.models import ARCHS, is_auxiliary

_PREFIX = "network."
"""Of the names that the network's tensors have in a model file."""

_Norm = nn.modules.batchnorm._BatchNorm


def load(path: Path) -> checkpoint.Weights:
    """The weights of a finished run's folder, or of a ``.onnx`` file that was exported from one.

    Raises :class:`~tinyserve.errors.CheckpointError` where there is neither, and
    :class:`~tinyserve.errors.GateError` where a file was changed after it was exported.
    """
    if path.is_dir():
        return checkpoint.load_weights(path)
    if not path.exists():
        raise CheckpointError(f"no such run or model file: {path}")
    try:
        card = read_card(path)
        check_graph(path, card)
        graph = onnx.load(path).graph
    except GateError:
        raise
    except ModelFileError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # protobuf and ONNX raise almost anything
        raise CheckpointError(f"{path} is damaged or is no model file") from error
    if card.training is None:
        raise CheckpointError(f"{path} is not the export of a training run")
    if card.architecture not in ARCHS:
        raise CheckpointError(f"{path}: unknown architecture {card.architecture!r}")
    tensors = _tensors(graph)
    # The mean of several views is a node that may take the name.
    mean = tensors["mean_1"] if "mean_1" in tensors else tensors.get("mean")
    if mean is None or "scale" not in tensors:
        raise CheckpointError(f"{path} does not hold the mean and scale of its images")
    for batch_norm in (True, False):
        model = ARCHS[card.architecture](
            len(card.labels), image_size=card.network_size, batch_norm=batch_norm
        )
        state = _unfold(model, tensors)
        # Norms leave no trace in a graph, but some layouts that have them pool otherwise.
        if state is not None and _windows(model) == _windows_in(graph):
            return checkpoint.Weights(
                arch=card.architecture,
                batch_norm=batch_norm,
                labels=card.labels,
                image_size=card.image_size,
                crop=card.crop,
                network_size=card.network_size,
                mean=_whole_mean(mean, card.image_size),
                std=1 / tensors["scale"].reshape(-1, 3)[0],
                state=state,
                training=card.training,
            )
    raise CheckpointError(f"{path} does not hold the tensors of {card.architecture}")


def _windows(model: nn.Module) -> set[object]:
    """The sides of the windows over which maxima are taken."""
    return {
        module.kernel_size
        for name, module in model.named_modules()
        if isinstance(module, nn.MaxPool2d) and not is_auxiliary(name)
    }


def _windows_in(graph: onnx.GraphProto) -> set[object]:
    return {
        attribute.ints[0]
        for node in graph.node
        if node.op_type == "MaxPool"
        for attribute in node.attribute
        if attribute.name == "kernel_shape"
    }


def _tensors(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """All constants of a graph by name, in single precision where they are not whole numbers.

    What was quantized, as ``<name>_quantized`` with a scale for each first index, is under its own
    name, too.
    """
    found = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    found = {
        name: value.float() if value.is_floating_point() else value for name, value in found.items()
    }
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in found:
            value, scale = found[node.input[0]].float(), found[node.input[1]]
            if len(node.input) > 2:
                value = value - found[node.input[2]].float().reshape(-1, *[1] * (value.dim() - 1))
            name = node.input[0].removesuffix("_quantized")
            found[name] = value * scale.reshape(-1, *[1] * (value.dim() - 1))
    return {
        name: value
        for name, value in found.items()
        if "_quantized" not in name and not name.endswith(("_scale", "_zero_point"))
    }


def _whole_mean(mean: Tensor, image_size: int) -> Tensor:
    """A mean colour, or a mean image, continued to its edges where the graph holds its centre."""
    pixels = mean.reshape(-1, 3)
    if (pixels == pixels[0]).all():
        return pixels[0]
    side = math.isqrt(len(pixels))
    first = round((image_size - side) / 2)  # where ServedNetwork crops
    last = image_size - side - first
    image = pixels.reshape(1, side, side, 3).movedim(3, 1)
    padded = F.pad(image, (first, last, first, last), mode="replicate")
    return padded[0].movedim(0, 2).contiguous()


def identify(path: Path) -> str:
    """Name and SHA-256 of the file that :func:`load` reads."""
    file = checkpoint.weights_of(path) if path.is_dir() else path
    try:
        with file.open("rb") as stream:
            return f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}"
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {os_reason(error)}") from error


def _unfold(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The state dict of ``model`` from a graph's tensors; None where they do not fit.

    A batch norm that is missing was folded into the layer registered just before it, whose new bias
    is called ``<layer>.bias``, or ``<layer>.weight_bias`` where it had none. Biases of zero are not
    in a graph at all.
    """
    state = {name: value for name, value in model.state_dict().items() if not is_auxiliary(name)}
    found = {
        name: tensors[_PREFIX + name]
        for name, value in state.items()
        if _PREFIX + name in tensors and tensors[_PREFIX + name].shape == value.shape
    }
    used = {_PREFIX + name for name in found}
    before = ""
    for name, module in model.named_modules():
        if is_auxiliary(name) or next(module.parameters(recurse=False), None) is None:
            continue
        if not isinstance(module, _Norm):
            before = name
            if f"{name}.bias" in state:
                found.setdefault(f"{name}.bias", torch.zeros_like(state[f"{name}.bias"]))
            continue
        found.setdefault(f"{name}.num_batches_tracked", torch.zeros((), dtype=torch.long))
        if f"{name}.weight" in found or f"{before}.weight" not in found:
            continue
        bias = f"{_PREFIX}{before}.weight_bias"
        used.add(bias)
        found[f"{name}.bias"] = tensors.get(bias, torch.zeros(module.num_features))
        found[f"{name}.running_mean"] = torch.zeros(module.num_features)
        found[f"{name}.running_var"] = torch.ones(module.num_features) - module.eps
        # Filters of the length that they start with: one step size suits neither the dwarfs nor
        # the giants that folding leaves.
        filters = found[f"{before}.weight"]
        length = (filters.flatten(1).norm(dim=1) / math.sqrt(2)).clamp(min=1e-12)
        found[f"{before}.weight"] = (filters.transpose(0, -1) / length).transpose(0, -1)
        if f"{before}.bias" in found:
            found[f"{before}.bias"] = found[f"{before}.bias"] / length
        found[f"{name}.weight"] = length
    unused = {name for name in tensors if name.startswith(_PREFIX)} - used
    return found if found.keys() == state.keys() and not unused else None


def refit_norms(model: nn.Module, images: Tensor) -> None:
    """Give every batch norm the statistics of ``images``, without changing what ``model`` computes.

    ``images`` is normalised, float ``[N, 3, S, S]``, on the model's device. Scale and bias follow
    the new statistics, so that in evaluation mode every layer's output stays what it was, and
    training mode computes nearly the same.
    """

    def refit(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _Norm)
        assert norm.running_mean is not None and norm.running_var is not None
        (x,) = inputs
        across = [dim for dim in range(x.dim()) if dim != 1]
        variance, mean = torch.var_mean(x.float(), dim=across, correction=0)
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        norm.bias.add_((mean - norm.running_mean) * scale)
        norm.weight.copy_(scale * (variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    norms: Iterable[nn.Module] = [m for m in model.modules() if isinstance(m, _Norm)]
    hooks = [norm.register_forward_pre_hook(refit) for norm in norms]
    training = model.training
    model.eval()  # no dropout, and in layer order: each norm is refitted before it is applied
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)


def start_from(
    model: nn.Module, arch: str, weights: checkpoint.Weights, classes: tuple[Label, ...]
) -> None:
    """Copy trained weights into a network of the same architecture, ``arch``.

    The classifying layer keeps its own start unless the classes are the same, in the same order.
    Auxiliary heads, which no file holds, keep theirs.
    """
    if weights.arch != arch:  # which may have all of its layers, and more
        raise CheckpointError(f"the weights to start from are of {weights.arch}, not of {arch}")
    own = model.state_dict()
    same_classes = weights.labels == classes
    classifier = _classifier(model)
    taken = {
        name: value
        for name, value in weights.state.items()
        if same_classes or not name.startswith(classifier)
    }
    if misfits := [
        name for name, value in taken.items() if name not in own or own[name].shape != value.shape
    ]:
        raise CheckpointError(
            f"the weights to start from, {weights.arch} at {weights.network_size} px, "
            f"do not fit this network (at {misfits[0]})"
        )
    model.load_state_dict(taken, strict=False)


def _classifier(model: nn.Module) -> str:
    """How the names of the network's last linear layer begin."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    *_, last = (name for name in layers if not is_auxiliary(name))
    return f"{last}."
