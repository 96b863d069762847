import dataclasses
import hashlib
import json

import numpy as np
import pytest

from tinyserve.errors import GateError, ModelFileError
from tinyserve.modelfile import (
    METADATA_KEY,
    Calibration,
    Evidence,
    Golden,
    Label,
    ModelCard,
    OperatingPoint,
    TaughtBy,
    Training,
    _digest,
    check_graph,
    find_model,
    installed_models,
    model_names,
    write_model,
)

IMAGES = np.arange(2 * 64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 64, 64, 3)
PROBABILITIES = np.array([[0.25, 0.75], [1.0, 0.0]], dtype=np.float32)

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
    evidence=(
        Evidence(
            provider="CPUExecutionProvider",
            reference="PyTorch 2.15, fp32",
            images=1000,
            batch_sizes=(1, 3, 64),
            top1_agreement=1.0,
            max_difference=1e-7,
            val_images=10_000,
            correct_top1=6000,
            correct_top5=8000,
            onnxruntime="1.31",
        ),
    ),
    golden=Golden.of(IMAGES, PROBABILITIES, tolerance=1e-3),
)
CALIBRATION = Calibration(
    temperature=1.5,
    source="tiny-imagenet-200, held out of training",
    fitted_images=500,
    images=500,
    ece_before=0.1,
    ece=0.02,
    points=(OperatingPoint(threshold=0.5, decided=200, correct=150),),
)
FINE_TUNED = dataclasses.replace(
    CARD,
    training=dataclasses.replace(
        CARD.training,
        epochs=5,
        initial=CARD.training,
        teachers=(
            TaughtBy(name="resnet20.onnx 1f", architecture="resnet20", training=CARD.training),
            TaughtBy(name="adopted.onnx 2e", architecture="other", training=None),
        ),
    ),
)


@pytest.mark.parametrize(
    "card",
    [
        CARD,
        FINE_TUNED,
        dataclasses.replace(CARD, calibration=CALIBRATION),
        dataclasses.replace(CARD, training=None, evidence=(), golden=None),
    ],
    ids=["full", "fine-tuned", "calibrated", "bare"],
)
def test_a_card_survives_its_document(card):
    assert ModelCard.from_json(card.to_json()) == card


def test_a_card_from_before_there_was_calibration_is_read():
    fields = json.loads(CARD.to_json())
    del fields["calibration"], fields["card_sha256"]
    document = json.dumps({**fields, "card_sha256": _digest(fields)})
    assert ModelCard.from_json(document) == CARD


def changed(**fields) -> str:
    return json.dumps({**json.loads(CARD.to_json()), **fields})


def test_golden_images_survive_their_document():
    golden = ModelCard.from_json(CARD.to_json()).golden
    images, probabilities = golden.arrays(64, 2)
    assert np.array_equal(images, IMAGES)
    assert np.array_equal(probabilities, PROBABILITIES)
    assert probabilities.dtype == np.float32
    for size, classes in ((32, 2), (64, 3)):
        with pytest.raises(ValueError):
            golden.arrays(size, classes)


@pytest.mark.parametrize(
    "fields", [{"crop": 48}, {"precision": "int8"}, {"labels": [{"wnid": None, "name": "x"}]}]
)
def test_a_card_that_was_changed_is_found_out(fields):
    with pytest.raises(GateError, match="changed after it was exported"):
        ModelCard.from_json(changed(**fields))


def test_a_file_is_the_graph_and_then_the_card(tmp_path):
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [value], [out])
    ).SerializeToString()
    path = tmp_path / "model.onnx"
    card = write_model(path, graph, CARD)
    assert path.read_bytes().startswith(graph)
    assert card == dataclasses.replace(
        CARD, graph_bytes=len(graph), graph_sha256=hashlib.sha256(graph).hexdigest()
    )
    check_graph(path, card)
    model = onnx.load(path)
    (entry,) = model.metadata_props
    assert entry.key == METADATA_KEY
    assert ModelCard.from_json(entry.value) == card
    check_graph(path, card)
    path.write_bytes(path.read_bytes().replace(b"Relu", b"Tanh"))
    with pytest.raises(GateError, match="graph was changed"):
        check_graph(path, card)
    whole = path.read_bytes()
    doc_string = b"\x32\x01x"  # field 6 of the model, one letter
    for changed_file in (doc_string + whole, graph + doc_string, whole + doc_string, whole[:-1]):
        path.write_bytes(changed_file)
        with pytest.raises(GateError, match="changed after it was exported"):
            check_graph(path, card)


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


def test_of_several_precisions_the_first_wanted_is_taken(tmp_path, monkeypatch):
    for name in ("net", "net.fp16", "net.int8", "half.fp16"):
        (tmp_path / f"{name}.onnx").touch()
    monkeypatch.setenv("TINYSERVE_MODELS", str(tmp_path))

    def found(name: str, *precisions: str) -> str:
        return find_model(name, precisions).name

    assert found("net", "int8", "fp32", "fp16") == "net.int8.onnx"
    assert found("net", "fp16", "fp32", "int8") == "net.fp16.onnx"
    assert found("net", "fp32") == "net.onnx"
    assert found("net.int8", "fp16", "fp32", "int8") == "net.int8.onnx"  # named whole
    assert found("half", "int8", "fp32", "fp16") == "half.fp16.onnx"
    assert find_model("net").name == "net.onnx"
    assert model_names() == ["half", "net"]
    with pytest.raises(ModelFileError, match=r"unknown model 'half' in int8 \(known: half\.fp16"):
        find_model("half", ["int8"])


def test_the_accuracy_is_the_files_own_where_it_was_measured():
    assert CARD.accuracy == (0.6, 0.8)
    worse = dataclasses.replace(CARD.evidence[0], correct_top1=5900)
    assert dataclasses.replace(CARD, evidence=(worse,)).accuracy == (0.59, 0.8)
    training = dataclasses.replace(CARD.training, val_top1=0.5)
    assert dataclasses.replace(CARD, evidence=(), training=training).accuracy == (0.5, 0.8)
    assert dataclasses.replace(CARD, evidence=(), training=None).accuracy is None


def test_an_unknown_name_lists_the_known_ones(tmp_path, monkeypatch):
    (tmp_path / "resnet20.onnx").touch()
    monkeypatch.setenv("TINYSERVE_MODELS", str(tmp_path))
    with pytest.raises(ModelFileError, match=r"unknown model 'vgg' \(known: resnet20\)"):
        find_model("vgg")


def test_no_models_at_all_says_where_was_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYSERVE_MODELS", str(tmp_path))
    with pytest.raises(ModelFileError, match=str(tmp_path)):
        find_model("resnet20")
