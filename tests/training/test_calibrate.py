import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from tinyserve.engine import Engine, read_card
from tinyserve.modelfile import Training
from training import calibrate, checkpoint, data, export, pretrained
from training.calibrate import fit_temperature, were_held_out

HELD_OUT = 12


def drawn(count: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[count, 1, 5]``, and labels drawn as likely as ``logits / scale`` say."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((count, 5), generator=generator) * 2
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return logits[:, None] * scale, labels


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_the_temperature_is_what_the_logits_are_too_large_by(scale):
    logits, labels = drawn(20_000, scale)
    assert fit_temperature(logits, labels) == pytest.approx(scale, rel=0.05)


def test_views_that_are_averaged_get_the_likeliest_temperature():
    logits, labels = drawn(2000, 2.0)
    views = torch.cat([logits, logits.roll(1, dims=0)], dim=1)
    best = fit_temperature(views, labels)

    def loss(temperature: float) -> float:
        probabilities = (views.double() / temperature).softmax(dim=-1).mean(dim=1)
        surprise = -probabilities[torch.arange(2000), labels].log().sum().item()
        return surprise + math.log(temperature) ** 2 / (2 * calibrate.PRIOR**2)

    assert all(loss(best) <= loss(best * factor) for factor in (0.9, 0.98, 1.02, 1.1))


def test_what_is_always_right_or_always_wrong_stays_within_the_range():
    logits, right = 3 * torch.eye(5)[:, None].repeat(10_000, 1, 1), torch.arange(5).repeat(10_000)
    low, high = calibrate.TEMPERATURES
    assert low < fit_temperature(logits, right) < 0.4
    assert fit_temperature(logits, right.roll(1)) == pytest.approx(high, rel=1e-3)


def test_a_few_images_cannot_make_the_answers_extreme():
    logits, right = 4 * torch.eye(5)[:, None], torch.arange(5)  # 93 % sure
    assert 0.9 < fit_temperature(logits, right) < 1
    assert 1 < fit_temperature(logits, right.roll(1)) < 2


# Which runs can be calibrated


@pytest.fixture
def held_out(photos) -> data.Dataset:
    return data.load(photos, image_size=16, holdout=HELD_OUT)


@pytest.fixture
def trained(small_weights, held_out) -> Training:
    """Of a run that held images out."""
    return dataclasses.replace(
        small_weights.training,
        dataset=held_out.described,
        dataset_fingerprint=held_out.fingerprint,
        train_images=27 - HELD_OUT,
    )


def test_only_images_that_no_weights_have_seen_count(trained, held_out, photos):
    assert were_held_out(trained, held_out)
    assert not were_held_out(trained, data.load(photos, image_size=16))
    other = dataclasses.replace(trained, dataset_fingerprint="1" * 64)
    assert not were_held_out(other, held_out)
    assert not were_held_out(trained, data.load(photos, image_size=16, holdout=HELD_OUT + 3))
    # Weights to start from: with the same images held out, of all images, of other data.
    fewer = dataclasses.replace(trained, train_images=10)  # --limit-train
    seen = dataclasses.replace(trained, dataset="photos, 3 held out of train")
    copied = dataclasses.replace(trained, dataset=f"copy, {HELD_OUT} held out of train")
    whole_copy = dataclasses.replace(trained, dataset="copy")
    elsewhere = dataclasses.replace(other, dataset="imagenet")
    whole = dataclasses.replace(other, dataset="photos", train_images=27)
    assert trained.dataset == f"photos, {HELD_OUT} held out of train"
    for initial, expected in (
        (trained, True), (fewer, True), (seen, False), (other, False), (whole, False),
        (elsewhere, True), (copied, True), (whole_copy, False),
    ):  # fmt: skip
        assert were_held_out(dataclasses.replace(trained, initial=initial), held_out) is expected
        later = dataclasses.replace(trained, initial=initial)
        assert were_held_out(dataclasses.replace(trained, initial=later), held_out) is expected


# In the file


@pytest.fixture
def calibrated_run(small_run, small_weights, trained):
    """``small_run``, surer of what is wrong, as if it had held images out."""
    state = {
        name: -3 * value if name.startswith("classifier.") else value
        for name, value in small_weights.state.items()
    }
    surer = dataclasses.replace(small_weights, state=state, training=trained)
    checkpoint.save_weights(small_run, surer)
    config = json.loads((small_run / "config.json").read_text())
    (small_run / "config.json").write_text(json.dumps({**config, "config": {"holdout": HELD_OUT}}))
    return small_run


@pytest.mark.slow
@pytest.mark.parametrize("views", [1, 2])
def test_the_graph_answers_with_the_temperature_that_its_card_names(
    calibrated_run, held_out, tmp_path, capsys, views
):
    paths = export.export(calibrated_run, tmp_path, precisions=("fp32", "fp16"), views=views)
    served = checkpoint.load_weights(calibrated_run).served(export.VIEWS[views])
    pictures = held_out.val.images
    with torch.inference_mode():
        logits = served.logits(torch.from_numpy(pictures))
    plain = logits.softmax(dim=-1).reshape(-1, HELD_OUT, 3).mean(dim=0).numpy()
    fitted, measured = slice(0, None, 2), slice(1, None, 2)
    for path, tolerance in zip(paths, (1e-5, 1e-2), strict=True):
        found = read_card(path).calibration
        assert found.temperature == pytest.approx(
            fit_temperature(
                logits.reshape(-1, HELD_OUT, 3).movedim(0, 1)[fitted],
                torch.from_numpy(held_out.val.labels[fitted]),
            ),
            rel=1e-3,
        )
        assert abs(math.log(found.temperature)) > 0.1
        answers = Engine(path, device="cpu").run(pictures)
        expected = (logits / found.temperature).softmax(dim=-1).reshape(-1, HELD_OUT, 3).mean(dim=0)
        assert np.abs(answers - expected.numpy()).max() < tolerance
        if views == 1:
            assert (answers.argmax(axis=1) == plain.argmax(axis=1)).all()

        assert found.fitted_images == found.images == HELD_OUT // 2
        assert found.source == "photos, held out of training"
        confidence = answers[measured].max(axis=1)
        right = answers[measured].argmax(axis=1) == held_out.val.labels[measured]
        assert [point.threshold for point in found.points] == [i / 100 for i in range(100)]
        for point in found.points:
            assert point.decided == (confidence >= point.threshold).sum()
            assert point.correct == right[confidence >= point.threshold].sum()
        assert found.points[0].decided == HELD_OUT // 2
        assert 0 <= found.ece <= 1
        assert 0 <= found.ece_before <= 1
    said = capsys.readouterr().err
    for precision in ("fp32", "fp16"):
        assert f"{precision} on 6 held-out images: calibration error" in said
    assert "not calibrated" not in said


@pytest.mark.slow
def test_a_file_that_is_exported_again_keeps_its_calibration(calibrated_run, tmp_path, photos):
    (path,) = export.export(calibrated_run, tmp_path)
    (again,) = export.export(path, tmp_path / "again", data_root=photos)
    first, second = (read_card(file).calibration for file in (path, again))
    assert second.temperature == pytest.approx(first.temperature, rel=1e-3)
    assert second.points == first.points
    # What is learned from a file are its logits, whatever its temperature.
    network = pretrained.load(path).network()
    original = checkpoint.load_weights(calibrated_run).network()
    x = torch.rand((2, 3, 12, 12))
    with torch.inference_mode():
        assert torch.allclose(network(x), original(x), atol=1e-4)
