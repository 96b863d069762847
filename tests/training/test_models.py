import math

import pytest
import torch
from torch import nn

from training.checkpoint import final_state
from training.models import ARCHS, count_parameters, is_auxiliary
from training.models.baseline import baseline

PARAMETERS = {
    "baseline": 13_052_296,
    "alexnet": 15_303_176,
    "inception": 1_053_911,
    "resnet20": 11_279_112,
    "plain20": 11_105_288,
}
"""Without batch norm where the paper has none, at 200 classes."""

every_arch = pytest.mark.parametrize("arch", ARCHS)
both_layouts = pytest.mark.parametrize("batch_norm", [False, True])


def random_images(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_every_architecture_is_pinned():
    assert list(ARCHS) == list(PARAMETERS)


@every_arch
def test_the_layout_of_the_paper_has_its_parameters(arch):
    assert count_parameters(ARCHS[arch](200, batch_norm=False)) == PARAMETERS[arch]


@every_arch
def test_batch_norm_hardly_changes_the_size(arch):
    with_norm = count_parameters(ARCHS[arch](200, batch_norm=True))
    assert with_norm == pytest.approx(PARAMETERS[arch], rel=0.05)


@pytest.mark.parametrize("arch", ["baseline", "alexnet", "inception"])
def test_batch_norm_follows_every_convolution_where_it_is_asked_for(arch):
    layers = list(ARCHS[arch](5, image_size=32, batch_norm=True).modules())
    convolutions = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    assert convolutions
    assert all(isinstance(layers[i + 1], nn.BatchNorm2d) for i in convolutions)
    assert all(layers[i].bias is None for i in convolutions)


def test_baseline_pools_as_in_the_paper_or_over_windows_that_overlap():
    image = torch.zeros(1, 16, 56, 56)
    image[0, 0, 20, 20] = 1
    plain, overlapping = (baseline(batch_norm=norm).pool(image)[0, 0] for norm in (False, True))
    assert plain.shape == overlapping.shape == (28, 28)
    assert plain.nonzero().tolist() == [[10, 10]]
    assert overlapping.nonzero().tolist() == [[y, x] for y in (9, 10, 11) for x in (9, 10, 11)]


@every_arch
@both_layouts
def test_images_become_logits_of_every_class(arch, batch_norm):
    network = ARCHS[arch](7, image_size=32, batch_norm=batch_norm).eval()
    with torch.inference_mode():
        logits = network(random_images(2, 32))
    assert logits.shape == (2, 7)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


@every_arch
@both_layouts
def test_the_first_loss_is_that_of_a_guess(arch, batch_norm):
    torch.manual_seed(0)
    network = ARCHS[arch](200, image_size=32, batch_norm=batch_norm).train()
    outputs = network(random_images(4, 32))
    for logits in outputs if isinstance(outputs, tuple) else (outputs,):
        loss = -logits.log_softmax(dim=1).mean().item()  # over all labels that there could be
        assert loss == pytest.approx(math.log(200), rel=0.25)


@every_arch
@both_layouts
def test_gradient_reaches_every_parameter(arch, batch_norm):
    torch.manual_seed(0)
    network = ARCHS[arch](7, image_size=32, batch_norm=batch_norm).train()
    # A block of resnet20 starts as its shortcut: the zero that makes it so hides the rest of it.
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
    outputs = network(random_images(4, 32))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    targets = torch.arange(4)
    sum(nn.functional.cross_entropy(logits, targets) for logits in outputs).backward()
    dead = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert dead == []


def test_inception_has_auxiliary_logits_in_training_only():
    network = ARCHS["inception"](7)
    trained = network.train()(random_images(2, 24))
    assert isinstance(trained, tuple)
    assert [logits.shape for logits in trained] == [(2, 7)] * 3
    assert isinstance(network.eval()(random_images(2, 24)), torch.Tensor)


def test_auxiliary_heads_are_not_shipped():
    network = ARCHS["inception"](7)
    assert any(is_auxiliary(name) for name in network.state_dict())
    shipped = final_state(network)
    assert shipped.keys() == {
        name for name in network.state_dict() if not name.startswith("aux_heads.")
    }


def test_what_is_shipped_survives_half_precision():
    for value in final_state(ARCHS["resnet20"](7)).values():
        if value.dim() >= 2:
            assert torch.equal(value, value.half().float())


def test_resnet20_has_twenty_convolutions():
    layers = ARCHS["resnet20"](200).modules()
    assert sum(isinstance(layer, nn.Conv2d) for layer in layers) == 20


def norms_of_blocks(network: nn.Module) -> list[torch.Tensor]:
    """The scale of the last batch norm of every block."""
    return [value for name, value in network.named_parameters() if name.endswith("norm2.weight")]


def test_resnet20_starts_every_block_as_its_shortcut():
    scales = norms_of_blocks(ARCHS["resnet20"](7))
    assert len(scales) == 8
    assert not any(scale.any() for scale in scales)


def test_plain20_is_resnet20_without_its_shortcuts():
    plain, residual = ARCHS["plain20"](7), ARCHS["resnet20"](7)
    shapes = {name: value.shape for name, value in residual.state_dict().items()}
    assert {name: value.shape for name, value in plain.state_dict().items()} == {
        name: shape for name, shape in shapes.items() if "shortcut" not in name
    }
    assert not any("shortcut" in name for name, _ in plain.named_modules())
    assert sum(isinstance(layer, nn.Conv2d) for layer in plain.modules()) == 17


def test_no_block_of_plain20_starts_at_zero_where_nothing_goes_around_it():
    scales = norms_of_blocks(ARCHS["plain20"](7))
    assert len(scales) == 8
    assert all((scale == 1).all() for scale in scales)


def test_what_plain20_answers_goes_through_every_block():
    torch.manual_seed(0)
    network = ARCHS["plain20"](7).eval()
    images = random_images(2, 24)
    with torch.inference_mode():
        before = network(images)
        for scale in norms_of_blocks(network):
            kept = scale.clone()
            scale.zero_()
            assert network(images).std(dim=0).max() == 0  # it no longer sees the images
            scale.copy_(kept)
        assert before.std(dim=0).max() > 0
        assert torch.equal(network(images), before)


def test_plain20_trains_from_its_own_start():
    torch.manual_seed(0)
    network = ARCHS["plain20"](4, batch_norm=True).train()
    images, labels = random_images(8, 24), torch.arange(8) % 4
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        stem = network.get_parameter("0.weight")
        assert stem.grad.abs().sum() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("arch", ["inception", "resnet20", "plain20"])
@pytest.mark.parametrize("size", [24, 25, 64])
def test_networks_that_end_in_a_global_pool_take_any_size(arch, size):
    network = ARCHS[arch](7).train()
    outputs = network(random_images(2, size))
    assert (outputs[0] if isinstance(outputs, tuple) else outputs).shape == (2, 7)


def test_alexnet_built_for_56_pixels_trains_on_32():
    network = ARCHS["alexnet"](7, image_size=56, batch_norm=True).train()
    assert network(random_images(2, 32)).shape == (2, 7)
    assert network(random_images(2, 56)).shape == (2, 7)


def test_alexnet_sees_its_own_size_unpooled():
    network = ARCHS["alexnet"](7, image_size=56).eval()
    maps = torch.randn(1, 256, 7, 7)
    assert torch.equal(network.fit(maps), maps)
