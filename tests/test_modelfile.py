import dataclasses
import json

import pytest

from tinyserve.errors import ModelFileError
from tinyserve.modelfile import Label, ModelCard, Parity, Training, find_model, installed_models

CARD = ModelCard(
    architecture="inception",
    precision="fp32",
    labels=(Label("n01443537", "goldfish"), Label(None, "café")),
    image_size=64,
    crop=56,
    network_size=56,
    parameters=1_000_000,
    training=Training(
        dataset="tiny-imagenet-200",
        dataset_fingerprint="00ff",
        train_images=100_000,
        recipe="modern",
        epochs=60,
        seed=0,
        precision="fp16",
        commit="0123456789ab",
        val_images=10_000,
        val_top1=0.6,
        val_top5=0.8,
    ),
    parity=Parity(
        images=1000,
        batch_sizes=(1, 2, 32),
        provider="CPUExecutionProvider",
        top1_agreement=1.0,
        max_difference=1e-7,
        torch="2.15",
        onnxruntime="1.31",
    ),
)


FINE_TUNED = dataclasses.replace(
    CARD, training=dataclasses.replace(CARD.training, epochs=5, initial=CARD.training)
)


@pytest.mark.parametrize(
    "card",
    [CARD, FINE_TUNED, dataclasses.replace(CARD, training=None, parity=None)],
    ids=["full", "fine-tuned", "bare"],
)
def test_a_card_survives_its_document(card):
    assert ModelCard.from_json(card.to_json()) == card


def changed(**fields) -> str:
    return json.dumps({**json.loads(CARD.to_json()), **fields})


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("not json", "damaged metadata"),
        ("[]", "damaged metadata"),
        ("{}", "damaged metadata"),
        (changed(format=2), "model format 2"),
        (changed(surprise=1), "damaged metadata"),
        (changed(training="long"), "damaged metadata"),
        (changed(training={"epochs": 1}), "damaged metadata"),
        (changed(labels=[{"name": "only"}]), "damaged metadata"),
    ],
)
def test_other_documents_are_refused(document, words):
    with pytest.raises(ModelFileError, match=words):
        ModelCard.from_json(document)


def test_models_are_found_by_name_and_the_first_folder_wins(tmp_path, monkeypatch):
    for folder, name in (("one", "a"), ("two", "a"), ("two", "b.int8")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.onnx").touch()
    monkeypatch.setenv("TINYSERVE_MODELS", f"{tmp_path / 'one'}:{tmp_path / 'two'}")
    assert installed_models() == {
        "a": tmp_path / "one" / "a.onnx",
        "b.int8": tmp_path / "two" / "b.int8.onnx",
    }
    assert find_model("b.int8") == tmp_path / "two" / "b.int8.onnx"


def test_an_unknown_name_lists_the_known_ones(tmp_path, monkeypatch):
    (tmp_path / "resnet20.onnx").touch()
    monkeypatch.setenv("TINYSERVE_MODELS", str(tmp_path))
    with pytest.raises(ModelFileError, match=r"unknown model 'vgg' \(known: resnet20\)"):
        find_model("vgg")


def test_no_models_at_all_says_where_was_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYSERVE_MODELS", str(tmp_path))
    with pytest.raises(ModelFileError, match=str(tmp_path)):
        find_model("resnet20")
