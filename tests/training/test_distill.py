import dataclasses
import math

import numpy as np
import pytest
import torch

from tinyserve.errors import DataError, UsageError
from training import augment, checkpoint, data, export
from training.distill import Teacher, divergence, kept_answers, open_source
from training.models import ARCHS


@pytest.fixture
def pictures() -> torch.Tensor:
    """uint8 ``[6, 16, 16, 3]``."""
    torch.manual_seed(5)
    return torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8)


def colour_weights(weights: checkpoint.Weights, seed: int, **changes: object) -> checkpoint.Weights:
    """Another network of the same layout that subtracts a mean colour and sees the whole image."""
    torch.manual_seed(seed)
    network = ARCHS["baseline"](3, image_size=16, batch_norm=True)
    torch.nn.init.normal_(network.get_submodule("classifier").weight, std=0.05)
    return dataclasses.replace(
        weights,
        crop=16,
        network_size=16,
        mean=torch.tensor([100.0, 120, 140]),
        state=checkpoint.final_state(network),
        **changes,
    )


def shown(pictures: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """The pictures, whole, as a student with this normalisation gets them."""
    return augment.normalise(pictures, mean, std)


def test_a_teacher_answers_as_it_is_served_whatever_the_students_normalisation(
    small_weights, pictures
):
    weights = colour_weights(small_weights, 1)
    mean, std = torch.tensor([10.0, 20, 30]), torch.tensor([90.0, 80, 70])
    teacher = Teacher([weights], weights.labels, mean, std)
    with torch.inference_mode():
        found = teacher(shown(pictures, mean, std), 1.0)
        expected = weights.served()(pictures)
    assert torch.allclose(found, expected, atol=1e-5)
    assert expected.std(dim=0).max() > 0.01


def test_several_teachers_answer_with_their_mean(small_weights, pictures):
    both = [colour_weights(small_weights, seed) for seed in (1, 2)]
    mean, std = both[0].mean, both[0].std
    x = shown(pictures, mean, std)
    labels = small_weights.labels
    with torch.inference_mode():
        each = [Teacher([weights], labels, mean, std)(x, 2.0) for weights in both]
        found = Teacher(both, labels, mean, std)(x, 2.0)
    assert not torch.allclose(each[0], each[1], atol=0.01)
    assert torch.allclose(found, (each[0] + each[1]) / 2)


def test_a_teacher_sees_the_size_that_it_knows(small_weights):
    weights = colour_weights(small_weights, 1)
    teacher = Teacher([weights], weights.labels, weights.mean, weights.std)
    flat = torch.ones(2, 3, 1, 1) * torch.tensor([0.5, -0.3, 0.1])[:, None, None]
    with torch.inference_mode():
        answers = [teacher(flat.expand(2, 3, size, size), 1.0) for size in (8, 16, 40)]
    assert torch.allclose(answers[0], answers[1], atol=1e-5)
    assert torch.allclose(answers[2], answers[1], atol=1e-5)


def test_a_higher_temperature_gives_softer_answers(small_weights, pictures):
    weights = colour_weights(small_weights, 1)
    teacher = Teacher([weights], weights.labels, weights.mean, weights.std)
    x = shown(pictures, weights.mean, weights.std)
    with torch.inference_mode():
        sharp, soft = teacher(x, 1.0), teacher(x, 4.0)
    assert torch.all(soft.amax(dim=1) < sharp.amax(dim=1))
    assert torch.equal(soft.argmax(dim=1), sharp.argmax(dim=1))


def test_a_teacher_is_not_trained(small_weights):
    weights = colour_weights(small_weights, 1)
    teacher = Teacher([weights], weights.labels, weights.mean, weights.std)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


# Asked once


@pytest.fixture
def dataset(small_weights, pictures, tmp_path) -> data.Dataset:
    split = data.Split(pictures.numpy(), np.arange(6) % 3)
    none = np.array([], dtype=np.int64)
    return data.Dataset("pictures", small_weights.labels, split, split, none, tmp_path, "0" * 64)


@pytest.fixture
def answers_of(dataset, tmp_path):
    """The answers of some weights, as those of finished runs, under names of their own."""

    def answers(
        *teachers: checkpoint.Weights,
        name: str | None = None,
        dataset: data.Dataset = dataset,
        temperature: float = 2.0,
        precision: str = "fp32",
    ) -> torch.Tensor:
        sources = []
        for number, weights in enumerate(teachers):
            folder = tmp_path / f"run-{number}"
            folder.mkdir(exist_ok=True)
            checkpoint.save_weights(folder, weights)
            source = open_source(folder, torch.device("cpu"), precision)
            sources.append(dataclasses.replace(source, name=name or source.name))
        return kept_answers(sources, dataset, temperature)

    return answers


def test_answers_are_those_of_the_served_networks_at_a_temperature(
    small_weights, pictures, answers_of
):
    # One that subtracts a mean image, too, which cannot be asked about crops.
    teachers = [small_weights, colour_weights(small_weights, 1)]
    with torch.inference_mode():
        expected = torch.zeros(6, 3)
        for weights in teachers:
            logits = weights.served().logits(pictures)
            expected += (logits / 2.0).softmax(dim=1) / 2
    found = answers_of(*teachers)
    assert found.dtype == torch.float16
    assert torch.allclose(found.float(), expected, atol=1e-3)
    assert expected.std(dim=0).max() > 0.01


def test_answers_are_kept_for_the_same_question_alone(small_weights, dataset, answers_of, capsys):
    first, second = (colour_weights(small_weights, seed) for seed in (1, 2))
    answers = answers_of(first, name="one 8c")
    assert "asking one once about 6 images\n" in capsys.readouterr().err
    # The name is what identifies a teacher: under the same one nobody is asked again.
    assert torch.equal(answers_of(second, name="one 8c"), answers)
    assert "asking" not in capsys.readouterr().err
    assert not torch.allclose(answers_of(second), answers, atol=0.01)
    assert not torch.equal(answers_of(first, name="one 8c", temperature=1.0), answers)
    assert not torch.equal(answers_of(first, name="one 8c", precision="bf16"), answers)
    turned = data.Split(dataset.train.images[::-1].copy(), dataset.train.labels)
    other = answers_of(first, name="one 8c", dataset=dataclasses.replace(dataset, train=turned))
    assert torch.allclose(other.flip(0), answers, atol=1e-3)
    assert not list(dataset.root.rglob(".*.candidate"))


@pytest.mark.slow
def test_a_model_file_answers_as_the_run_that_it_was_exported_from(small_run, photos, tmp_path):
    assert export.main([str(small_run), "-o", str(tmp_path)]) == 0
    images = data.load(photos, image_size=16).train.images
    run, file = (
        open_source(path, torch.device("cpu"), "fp32")
        for path in (small_run, tmp_path / "baseline.onnx")
    )
    assert (file.labels, file.image_size) == (run.labels, run.image_size)
    assert file.name != run.name
    assert torch.allclose(file.ask(images), run.ask(images), atol=1e-4)


def test_teachers_of_other_classes_or_sizes_are_not_asked(small_weights, dataset, answers_of):
    weights = colour_weights(small_weights, 1)
    with pytest.raises(UsageError, match="other classes"):
        answers_of(weights, dataset=dataclasses.replace(dataset, classes=weights.labels[::-1]))
    with pytest.raises(UsageError, match="of 32 px, not of 16 px"):
        answers_of(dataclasses.replace(weights, image_size=32))
    assert not list(dataset.root.rglob("answers-*"))


def test_answers_that_cannot_be_kept_are_one_line(small_weights, dataset, answers_of, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match=r"cannot keep the teacher's answers in .*No space left"):
        answers_of(colour_weights(small_weights, 1))
    assert not list(dataset.root.rglob("*answers*"))


def test_divergence_is_that_of_the_definition():
    logits = torch.tensor([[1.0, 2, 0.5], [0, 0, 3]])
    targets = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    temperature = 2.0
    expected = 0.0
    for row, wanted in zip(logits.tolist(), targets.tolist(), strict=True):
        exponentials = [math.exp(value / temperature) for value in row]
        for value, p in zip(exponentials, wanted, strict=True):
            expected += p * math.log(p / (value / sum(exponentials)))
    expected *= temperature**2 / len(logits)
    assert divergence(logits, targets, temperature).item() == pytest.approx(expected, rel=1e-5)
    same = divergence(logits, (logits / temperature).softmax(dim=1), temperature)
    assert same.item() == pytest.approx(0, abs=1e-6)


def test_teachers_that_cannot_teach_this_are_refused(small_weights):
    weights = colour_weights(small_weights, 1)
    labels, mean, std = weights.labels, weights.mean, weights.std
    with pytest.raises(UsageError, match="other classes"):
        Teacher([weights], labels[::-1], mean, std)
    with pytest.raises(UsageError, match="mean image"):
        Teacher([small_weights], labels, mean, std)
    with pytest.raises(UsageError, match="mean image"):
        Teacher([weights], labels, torch.zeros(16, 16, 3), std)
