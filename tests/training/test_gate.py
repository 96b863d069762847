from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tinyserve.engine import read_card
from tinyserve.errors import GateError
from tinyserve.modelfile import ModelCard, write_model
from training import checkpoint, data, export, gate
from training.evaluate import ServedNetwork


@pytest.fixture(scope="module")
def network() -> ServedNetwork:
    """Three classes told apart by the mean colour of 16 x 16 pixels."""
    linear = torch.nn.Linear(3, 3)
    linear.weight.data = 3 * torch.eye(3)
    linear.bias.data = torch.tensor([0.1, 0.0, -0.1])
    each = torch.nn.Conv2d(3, 3, 1, groups=3, bias=False)
    each.weight.data = torch.tensor([0.5, 1.0, 1.5]).reshape(3, 1, 1, 1)
    layers = torch.nn.Sequential(
        each,
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        linear,
    )
    return served(layers)


def served(layers: torch.nn.Module, mean: float = 110.0) -> ServedNetwork:
    return ServedNetwork(
        layers,
        torch.full((3,), mean),
        torch.full((3,), 60.0),
        image_size=16,
        crop=16,
        network_size=16,
    ).eval()


@pytest.fixture(scope="module")
def dataset(photos) -> data.Dataset:
    return data.load(photos, image_size=16)


@pytest.fixture
def model(network, small_weights: checkpoint.Weights, tmp_path) -> Path:
    """The file of ``network``."""
    card = ModelCard(
        architecture="linear",
        precision="fp32",
        labels=small_weights.labels,
        image_size=16,
        crop=16,
        network_size=16,
        parameters=12,
        training=None,
    )
    path = tmp_path / "linear.onnx"
    write_model(path, export.to_onnx(network, 16).SerializeToString(), card)
    return path


def gate_of(network: ServedNetwork, dataset: data.Dataset) -> gate.Gate:
    return gate.Gate(network, export.to_onnx(network, 16), dataset, reference="PyTorch")


def test_a_file_that_computes_the_same_passes_with_its_evidence(model, network, dataset):
    evidence, *_ = gate_of(network, dataset).check(model, "fp32")
    assert evidence.images == 45
    assert evidence.top1_agreement == 1
    assert evidence.max_difference <= 1e-6
    with torch.inference_mode():
        answers = network(torch.from_numpy(dataset.val.images)).argmax(dim=1).numpy()
    assert evidence.correct_top1 == int((answers == dataset.val.labels).sum())
    assert evidence.val_images == 18


def other_mean(network: ServedNetwork) -> ServedNetwork:  # too little for another top-1
    return served(network.network, mean=110.1)


def other_order(network: ServedNetwork) -> ServedNetwork:
    *layers, linear = network.network
    swapped = torch.nn.Linear(3, 3)
    swapped.weight.data, swapped.bias.data = linear.weight.roll(1, 0), linear.bias.roll(1, 0)
    return served(torch.nn.Sequential(*layers, swapped))


def not_a_number(network: ServedNetwork) -> ServedNetwork:
    return served(network.network, mean=float("nan"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_mean, "a probability differs by"),
        (other_order, "0.00 % have the same top-1"),
        (not_a_number, "fp32 on CPU"),
    ],
)
def test_what_computes_something_else_is_stopped(model, network, dataset, change, words):
    with pytest.raises(GateError) as caught:
        gate_of(change(network), dataset).check(model, "fp32")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_probabilities_must_sum_to_1(model, network, dataset):
    graph = onnx.load(model)
    softmax = next(node for node in graph.graph.node if node.op_type == "Softmax")
    softmax.op_type = "Sigmoid"
    del softmax.attribute[:]
    card = read_card(model)
    del graph.metadata_props[:]
    write_model(model, graph.SerializeToString(), card)
    with pytest.raises(GateError, match="do not sum to 1"):
        gate_of(network, dataset).check(model, "int8")


def test_half_precision_may_differ_a_little_but_not_in_its_answers(model, network, dataset):
    gate_of(network, dataset).check(model, "fp16")
    with pytest.raises(GateError, match=r"99\.5 % is the least allowed"):
        gate_of(other_order(network), dataset).check(model, "fp16")


def test_int8_must_keep_the_accuracy_and_be_faster(model, network, dataset, monkeypatch):
    # The file is the fp32 one: as accurate, but faster only by chance.
    monkeypatch.setattr(gate.Gate, "_speed_ratio", lambda *_: 1.7)
    gate_of(network, dataset).check(model, "int8")
    for slower in (1, 32):  # one image at a time, or batches
        monkeypatch.setattr(
            gate.Gate, "_speed_ratio", lambda *a, slower=slower: 0.98 if a[2] == slower else 1.7
        )
        with pytest.raises(GateError, match="not faster"):
            gate_of(network, dataset).check(model, "int8")
    # Here the network that it is compared with is better: by all 45 images, for 18 are too few.
    better = gate_of(network, dataset)
    better._fp32_correct = 45
    with pytest.raises(GateError, match="points below fp32 on 45 images"):
        better.check(model, "int8")


def test_a_small_validation_split_does_not_judge_alone(model, network, dataset, monkeypatch):
    monkeypatch.setattr(gate.Gate, "_speed_ratio", lambda *_: 1.7)
    monkeypatch.setitem(gate.BOUNDS, "int8", gate.Bounds(accuracy_loss=0.03, golden_tolerance=1))
    with torch.inference_mode():
        pictures = np.concatenate([dataset.val.images, dataset.train.images])
        answers = network(torch.from_numpy(pictures)).argmax(dim=1).numpy()
    right = int((answers == np.concatenate([dataset.val.labels, dataset.train.labels])).sum())
    one_better = gate_of(network, dataset)
    one_better._fp32_correct = right + 1  # one of 45, and of 18 it would be too many
    one_better.check(model, "int8")
    two_better = gate_of(network, dataset)
    two_better._fp32_correct = right + 2
    with pytest.raises(GateError, match="points below fp32"):
        two_better.check(model, "int8")


def test_the_pictures_are_spread_over_the_validation_split(network, dataset, monkeypatch):
    monkeypatch.setattr(gate, "GATE_IMAGES", 4)
    assert np.array_equal(gate_of(network, dataset).images, dataset.val.images[[0, 6, 11, 17]])
    monkeypatch.setattr(gate, "GATE_IMAGES", 20)
    chosen = gate_of(network, dataset).images
    assert np.array_equal(chosen[:18], dataset.val.images)
    assert np.array_equal(chosen[18:], dataset.train.images[[0, 26]])


def test_no_picture_counts_twice_where_the_validation_split_is_held_out(network, photos):
    dataset = data.load(photos / "train", image_size=16)
    assert len(dataset.held_out)
    images = gate_of(network, dataset).images
    assert len(images) == len(dataset.train)
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


class Answers:
    """An engine that answers as ``network`` does, off by ``error`` where images are darker."""

    def __init__(self, network: ServedNetwork, error: float = 0, darker: float = 0) -> None:
        self._network, self._error, self._darker = network, error, darker

    def run(self, images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            answers = self._network(torch.from_numpy(images)).numpy()
        dark = images.mean(axis=(1, 2, 3)) < self._darker
        answers[dark, 0] += self._error
        return answers


def test_images_that_rounding_moves_are_not_those_to_test_with(network, dataset, monkeypatch):
    found = gate_of(network, dataset)
    darker = np.quantile(found.images.mean(axis=(1, 2, 3)), 0.3)
    monkeypatch.setattr(gate, "SURE", 1.1)
    steady = found.steady_images(Answers(network, 0.1, darker), 8)
    assert len(np.unique(steady, axis=0)) == 8
    assert (steady.mean(axis=(1, 2, 3)) > darker).all()


def test_images_with_sure_answers_are_not_those_to_test_with(network, dataset, monkeypatch):
    found = gate_of(network, dataset)
    sureness = np.sort(found._expected.max(axis=1))
    monkeypatch.setattr(gate, "SURE", sureness[20])
    with torch.inference_mode():
        steady = network(torch.from_numpy(found.steady_images(Answers(network), 8)))
    assert steady.max() < sureness[20]
    monkeypatch.setattr(gate, "SURE", sureness[10])  # too few of the others
    assert len(found.steady_images(Answers(network), 8)) == 8
