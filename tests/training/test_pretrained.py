import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from tinyserve.errors import CheckpointError, GateError
from tinyserve.modelfile import Label, ModelCard, write_model
from training import checkpoint, export, pretrained, quantize
from training.augment import VIEWS
from training.equalize import equalize
from training.evaluate import ServedNetwork
from training.models import ARCHS, is_auxiliary
from training.models.baseline import baseline

LABELS = tuple(Label(None, name) for name in ("amber", "jade", "violet"))
_Norm = nn.modules.batchnorm._BatchNorm


def trained(arch: str, small: checkpoint.Weights, *, batch_norm: bool) -> checkpoint.Weights:
    """Weights of an architecture whose batch norms are those of a trained network."""
    torch.manual_seed(1)
    network = ARCHS[arch](3, image_size=24, batch_norm=batch_norm)
    for module in network.modules():
        if isinstance(module, _Norm):
            nn.init.uniform_(module.weight, 0.2, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.3, 3)
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.3)
    return dataclasses.replace(
        small,
        arch=arch,
        batch_norm=batch_norm,
        labels=LABELS,
        image_size=28,
        crop=24,
        network_size=24,
        mean=torch.tensor([120.0, 110, 100]),
        state=checkpoint.final_state(network),
    )


def write_file(
    path: Path,
    weights: checkpoint.Weights,
    graph: onnx.ModelProto | None = None,
    **changes: object,
) -> Path:
    """The model file of some weights, without the gate."""
    card = ModelCard(
        architecture=weights.arch,
        precision="fp32",
        labels=weights.labels,
        image_size=weights.image_size,
        crop=weights.crop,
        network_size=weights.network_size,
        parameters=1,
        training=weights.training,
    )
    if graph is None:
        graph = export.to_onnx(weights.served(), weights.image_size)
    write_model(path, graph.SerializeToString(), dataclasses.replace(card, **changes))
    return path


@pytest.fixture(scope="module")
def exported(unchanged_weights) -> Callable[..., tuple[checkpoint.Weights, onnx.ModelProto]]:
    """What ``trained`` gives for the same arguments, and its graph, which takes seconds to make."""

    @functools.cache
    def export_once(arch: str, *, batch_norm: bool) -> tuple[checkpoint.Weights, bytes]:
        weights = trained(arch, unchanged_weights, batch_norm=batch_norm)
        return weights, export.to_onnx(weights.served(), weights.image_size).SerializeToString()

    def get(arch: str, *, batch_norm: bool = True) -> tuple[checkpoint.Weights, onnx.ModelProto]:
        weights, graph = export_once(arch, batch_norm=batch_norm)
        return weights, onnx.load_from_string(graph)

    return get


@pytest.fixture
def pictures() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randint(0, 256, (8, 28, 28, 3), dtype=torch.uint8)


def logits(weights: checkpoint.Weights, pictures: torch.Tensor) -> torch.Tensor:
    """Before the softmax, which would hide differences."""
    served = weights.served()
    found = []
    served.network.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    with torch.inference_mode():
        served(pictures)
    return found[0]


def assert_the_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.std(dim=0).min())
    assert scale > 0  # not one answer to everything
    assert float((found - expected).abs().max()) < 1e-3 * scale


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "batch_norm"),
    # The residual networks have batch norms in any case.
    [
        *((arch, True) for arch in ARCHS),
        ("baseline", False),
        ("alexnet", False),
        ("inception", False),
    ],
)
def test_an_exported_file_gives_the_network_back(exported, pictures, tmp_path, arch, batch_norm):
    weights, graph = exported(arch, batch_norm=batch_norm)
    found = pretrained.load(write_file(tmp_path / "model.onnx", weights, graph))
    assert (found.arch, found.labels, found.training) == (arch, LABELS, weights.training)
    assert found.batch_norm == batch_norm
    assert_the_same(logits(found, pictures), logits(weights, pictures))


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "views"), [("baseline", 2), ("baseline", 10), ("resnet20", 2)])
def test_a_file_of_several_views_gives_the_network_back(
    small_weights, pictures, tmp_path, arch, views
):
    weights = trained(arch, small_weights, batch_norm=True)
    graph = export.to_onnx(weights.served(VIEWS[views]), weights.image_size)
    found = pretrained.load(write_file(tmp_path / "model.onnx", weights, graph))
    assert_the_same(logits(found, pictures), logits(weights, pictures))


@pytest.mark.slow
def test_a_mean_image_comes_back_where_it_counts(small_weights, pictures, tmp_path):
    weights = trained("baseline", small_weights, batch_norm=True)
    weights = dataclasses.replace(weights, mean=torch.rand(28, 28, 3) * 255)
    found = pretrained.load(write_file(tmp_path / "model.onnx", weights))
    assert found.mean.shape == (28, 28, 3)
    assert_the_same(logits(found, pictures), logits(weights, pictures))


def test_the_centre_of_a_mean_image_is_continued_to_its_edges():
    whole = torch.arange(6.0).reshape(1, 6, 1).expand(6, 6, 3).contiguous()
    found = pretrained._whole_mean(whole[1:5, 1:5].reshape(-1), 6)
    assert found[0, :, 2].tolist() == found[3, :, 0].tolist() == [1, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("image_size", [16, 17, 18, 19])
def test_a_mean_image_is_subtracted_as_before_wherever_its_centre_is(image_size):
    def served(mean: torch.Tensor) -> ServedNetwork:
        return ServedNetwork(
            nn.Identity(), mean, torch.ones(3), image_size=image_size, crop=8, network_size=8
        )

    before = served(torch.rand(image_size, image_size, 3)).mean
    found = pretrained._whole_mean(before, image_size)
    assert found.shape == (image_size, image_size, 3)
    assert torch.equal(served(found).mean, before)


@pytest.mark.slow
def test_a_file_in_half_precision_gives_nearly_the_same_network(exported, pictures, tmp_path):
    weights, graph = exported("inception")
    graph = quantize.to_fp16(graph)
    path = write_file(tmp_path / "model.onnx", weights, graph, precision="fp16")
    found, expected = logits(pretrained.load(path), pictures), logits(weights, pictures)
    error = float((found - expected).abs().max() / expected.std())
    assert 1e-5 < error < 0.02


def filters(weights: checkpoint.Weights) -> dict[str, torch.Tensor]:
    """Those of every convolution with the batch norm behind it, ``[out_channels, values]``."""
    state = weights.state
    return {
        name: (state[f"{name}.0.weight"].flatten(1).T * state[f"{name}.1.weight"]).T
        for name in {name.rsplit(".", 2)[0] for name in state if name.endswith("running_var")}
    }


@pytest.mark.slow
def test_a_file_in_8_bits_gives_every_weight_to_half_a_step(exported, pictures, tmp_path):
    weights, graph = exported("inception")
    # The channels that the quantizer scales are scaled in both.
    equal = equalize(graph, pictures.numpy())
    single = write_file(tmp_path / "model.onnx", weights, equal)
    graph = quantize.to_int8(graph, pictures.numpy(), pictures.numpy()).model
    path = write_file(tmp_path / "model.int8.onnx", weights, graph, precision="int8")
    expected, found = (filters(pretrained.load(file)) for file in (single, path))
    assert len(expected) == 55
    for name, values in expected.items():
        steps = values.abs().amax(dim=1) / 64  # 7 bits: from -64 to 64
        errors = (found[name] - values).abs().amax(dim=1) / steps
        assert 0.1 < float(errors.max()) < 0.501, name


@pytest.mark.slow
def test_a_file_that_was_changed_is_refused(exported, tmp_path):
    path = write_file(tmp_path / "model.onnx", *exported("baseline"))
    pretrained.load(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in a weight
    path.write_bytes(content)
    with pytest.raises(GateError, match="its graph was changed after it was exported"):
        pretrained.load(path)


def test_a_run_is_read_as_its_weights(small_run, small_weights):
    found = pretrained.load(small_run)
    assert found.training == small_weights.training
    for name, value in small_weights.state.items():
        assert torch.equal(found.state[name], value)


def test_names_tell_weights_apart(small_run, small_weights, tmp_path):
    first = pretrained.identify(small_run)
    assert first.startswith("run ")
    other = shutil.copytree(small_run, tmp_path / "other" / "run")
    assert pretrained.identify(other) == first
    changed = {name: value + 1 for name, value in small_weights.state.items()}
    checkpoint.save_weights(other, dataclasses.replace(small_weights, state=changed))
    assert pretrained.identify(other) != first


def spoilt(path: Path, exported: Callable[..., Any], how: str) -> Path:
    if how == "missing":
        return path
    if how == "text":
        path.write_text("no model")
    elif how == "not ours":
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), path)
    elif how == "adopted":
        write_file(path, *exported("baseline"), training=None)
    elif how == "unknown architecture":
        write_file(path, *exported("baseline"), architecture="vgg")
    elif how == "other architecture":
        write_file(path, *exported("baseline"), architecture="inception")
    return path


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "text",
        "not ours",
        pytest.param("adopted", marks=pytest.mark.slow),
        pytest.param("unknown architecture", marks=pytest.mark.slow),
        pytest.param("other architecture", marks=pytest.mark.slow),
    ],
)
def test_what_holds_no_such_network_is_one_line(exported, tmp_path, how):
    path = spoilt(tmp_path / "model.onnx", exported, how)
    with pytest.raises(CheckpointError) as caught:
        pretrained.load(path)
    assert "model.onnx" in str(caught.value)
    assert "\n" not in str(caught.value)


# Going on from weights


@pytest.mark.parametrize("arch", ["baseline", "inception", "resnet20", "alexnet"])
def test_refitting_the_norms_changes_no_answer_and_fits_them_to_the_images(small_weights, arch):
    model = trained(arch, small_weights, batch_norm=True).network()
    torch.manual_seed(3)
    x = torch.randn(64, 3, 24, 24)
    with torch.no_grad():
        before = model(x)
        pretrained.refit_norms(model, x)
        assert torch.allclose(model(x), before, atol=1e-3 * float(before.abs().max()))
        seen: list[tuple[_Norm, torch.Tensor]] = []
        hooks = [
            module.register_forward_pre_hook(lambda norm, x: seen.append((norm, x[0])))
            for name, module in model.named_modules()
            if isinstance(module, _Norm) and not is_auxiliary(name)
        ]
        model(x)
    assert len(seen) == len(hooks) > 0
    for norm, inputs in seen:
        values = inputs.transpose(0, 1).flatten(1)
        scale = float(values.std())
        assert torch.allclose(norm.running_mean, values.mean(dim=1), atol=1e-2 * scale)
        assert torch.allclose(norm.running_var, values.var(dim=1, correction=0), rtol=0.02)
    assert not model.training


@pytest.mark.slow
def test_folded_filters_start_at_the_length_of_fresh_ones(exported, tmp_path):
    found = pretrained.load(write_file(tmp_path / "model.onnx", *exported("resnet20"))).network()
    for name, parameter in found.named_parameters():
        if parameter.dim() == 4:
            lengths = parameter.flatten(1).norm(dim=1)
            assert torch.allclose(lengths, torch.full_like(lengths, 2**0.5), atol=1e-4), name


def test_the_classifier_is_taken_over_only_for_the_same_classes(small_weights):
    weights = trained("inception", small_weights, batch_norm=True)
    for classes in (LABELS, LABELS[::-1], (*LABELS, Label(None, "white"))):
        fresh = ARCHS["inception"](len(classes), batch_norm=True)
        before = fresh.state_dict()["classifier.weight"].clone()
        pretrained.start_from(fresh, weights.arch, weights, classes)
        after = fresh.state_dict()
        wanted = weights.state["classifier.weight"] if classes == LABELS else before
        assert torch.equal(after["classifier.weight"], wanted)
        assert torch.equal(after["stem.0.weight"], weights.state["stem.0.weight"])


def test_weights_of_another_network_are_refused(small_weights):
    # Its layers are all there in resnet20, which has shortcuts besides.
    plain = trained("plain20", small_weights, batch_norm=True)
    with pytest.raises(CheckpointError, match="are of plain20, not of resnet20"):
        pretrained.start_from(ARCHS["resnet20"](3), "resnet20", plain, plain.labels)
    with pytest.raises(CheckpointError, match="do not fit"):
        pretrained.start_from(
            baseline(3, image_size=24), "baseline", small_weights, small_weights.labels
        )
