"""Changed and damaged model files are found out."""

import base64
import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tinyserve import engine
from tinyserve.classifier import Classifier
from tinyserve.cli import main
from tinyserve.dataset import find_inputs
from tinyserve.devices import openvino_problem
from tinyserve.engine import Engine, read_card
from tinyserve.errors import GateError
from tinyserve.modelfile import METADATA_KEY, Evidence, ModelCard, find_model, write_model

CPU = "CPUExecutionProvider"


def parts(path: Path) -> tuple[bytes, ModelCard]:
    """The graph and the card of a model file."""
    card = read_card(path)
    return path.read_bytes()[: card.graph_bytes], card


@pytest.fixture
def copy(tmp_path) -> Path:
    path = tmp_path / "inception.onnx"
    path.write_bytes(find_model("inception").read_bytes())
    return path


def swap_labels(card: ModelCard) -> ModelCard:
    first, second, *rest = card.labels
    return dataclasses.replace(card, labels=(second, first, *rest))


def flip_a_weight_byte(path: Path) -> None:
    graph, _ = parts(path)
    content = bytearray(path.read_bytes())
    content[len(graph) // 2] ^= 0x40
    path.write_bytes(content)


def rewrite(path: Path, change) -> None:
    """Change the graph as someone with the onnx package would, metadata kept."""
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def change_the_mean(model: onnx.ModelProto) -> None:
    (mean,) = (tensor for tensor in model.graph.initializer if tensor.name == "mean")
    mean.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(mean) + 40, "mean"))


def swap_red_and_blue(model: onnx.ModelProto) -> None:
    (first,) = (node for node in model.graph.node if "images" in node.input)
    order = numpy_helper.from_array(np.array([2, 1, 0]), "bgr")
    model.graph.initializer.append(order)
    gather = onnx.helper.make_node("Gather", ["images", "bgr"], ["swapped"], axis=3)
    first.input[0] = "swapped"
    nodes = [gather, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def tamper_with_labels(path: Path) -> None:
    model = onnx.load(path)
    (entry,) = (entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    fields = json.loads(entry.value)
    fields["labels"][0], fields["labels"][1] = fields["labels"][1], fields["labels"][0]
    entry.value = json.dumps(fields)
    onnx.save(model, path)


MUTATIONS = {
    "a weight's byte": flip_a_weight_byte,
    "two labels": tamper_with_labels,
    "the mean": lambda path: rewrite(path, change_the_mean),
    "red and blue": lambda path: rewrite(path, swap_red_and_blue),
}


@pytest.mark.parametrize("what", MUTATIONS)
@pytest.mark.parametrize("command", ["verify", "classify"])
def test_a_changed_file_is_refused_with_exit_code_4(copy, samples, capsys, what, command):
    MUTATIONS[what](copy)
    arguments = {"verify": ["verify", str(copy)], "classify": ["classify", str(samples)]}[command]
    if command == "classify":
        arguments += ["-m", str(copy)]
    assert main([*arguments, "--device", "cpu"]) == 4
    said = capsys.readouterr()
    assert "changed after it was exported" in said.err
    assert said.out == ""


def sealed_again(path: Path, graph_change) -> None:
    """A changed graph under a card that fits it: only what it computes can give it away."""
    graph, card = parts(path)
    model = onnx.load_model_from_string(graph)
    graph_change(model)
    write_model(path, model.SerializeToString(), card)


@pytest.mark.parametrize("change", [change_the_mean, swap_red_and_blue])
def test_the_golden_images_find_what_no_digest_can(copy, change):
    sealed_again(copy, change)
    with pytest.raises(GateError, match="fails its self-test on CPU"):
        Engine(copy, device="cpu")
    assert Engine(copy, device="cpu", self_test=False).run(np.zeros((1, 64, 64, 3), np.uint8)).any()


@pytest.fixture
def replayed(monkeypatch) -> list[Path]:
    """The files whose golden images are replayed."""
    replay, paths = engine._replay_golden, []

    def watched(path, session):
        paths.append(path)
        return replay(path, session)

    monkeypatch.setattr(engine, "_replay_golden", watched)
    return paths


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.mark.usefixtures("cache")
def test_what_has_passed_is_not_tested_again_under_the_same_circumstances(
    copy, replayed, monkeypatch
):
    def tested_again(**arguments) -> bool:
        replayed.clear()
        Engine(copy, **{"device": "cpu", "self_test": "once", **arguments})
        return bool(replayed)

    assert tested_again()
    assert not tested_again()
    assert tested_again(self_test=True)
    os.utime(copy, (1, 1))
    assert tested_again()
    assert not tested_again()
    monkeypatch.setattr(engine.OnnxRuntimeSession, "runtime", "ONNX Runtime 0.1")
    assert tested_again()
    assert not tested_again()
    monkeypatch.setattr(engine, "cpu_flags", lambda: frozenset({"another"}))
    assert tested_again()
    assert not tested_again()
    monkeypatch.setattr(engine, "cpu_flags", frozenset)
    assert tested_again() and tested_again()


@pytest.mark.usefixtures("cache")
def test_a_failure_is_not_kept(copy):
    sealed_again(copy, swap_red_and_blue)
    for _ in range(2):
        with pytest.raises(GateError, match="fails its self-test on CPU"):
            Engine(copy, device="cpu", self_test="once")


@pytest.mark.usefixtures("cache")
@pytest.mark.skipif(openvino_problem() is not None, reason="there is no other device")
def test_what_has_passed_on_one_device_is_tested_on_another(copy, replayed):
    Engine(copy, device="cpu", self_test="once")
    Engine(copy, device="openvino", self_test="once")
    assert len(replayed) == 2
    Engine(copy, device="cpu", self_test="once")
    Engine(copy, device="openvino", self_test="once")
    assert len(replayed) == 2


def test_a_cache_that_is_damaged_or_cannot_be_written_is_done_without(copy, cache, replayed):
    file = cache / "tinyserve" / "self-tests.json"
    for damage in ("{", "[]", '{"CPUExecutionProvider": 1}'):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(damage)
        Engine(copy, device="cpu", self_test="once")
    assert len(replayed) == 3
    assert [path.name for path in file.parent.iterdir()] == ["self-tests.json"]
    shutil.rmtree(cache)
    cache.write_text("in the way")
    Engine(copy, device="cpu", self_test="once")
    assert len(replayed) == 4


@pytest.mark.usefixtures("cache")
def test_classify_tests_a_file_when_it_is_used_for_the_first_time(copy, samples, replayed):
    command = ["classify", str(samples / "goldfish"), "-m", str(copy), "--device", "cpu"]
    assert main([*command, "--no-self-test"]) == 0
    assert replayed == []
    assert main(command) == main(command) == 0
    assert replayed == [copy]
    sealed_again(copy, swap_red_and_blue)
    assert main(command) == main(command) == 4


def test_the_self_test_says_by_how_much_the_answers_differ(copy):
    difference = Engine(copy, device="cpu").self_test()
    assert 0 <= difference < 1e-5


def test_golden_images_that_are_damaged_are_a_damaged_file(copy, capsys):
    graph, card = parts(copy)
    for images in ("!", base64.b64encode(b"no pixels").decode()):
        golden = dataclasses.replace(card.golden, images=images)
        write_model(copy, graph, dataclasses.replace(card, golden=golden))
        assert main(["verify", str(copy)]) == 1
        assert "damaged golden images" in capsys.readouterr().err


def with_evidence(path: Path, correct: int, images: int = 40) -> None:
    graph, card = parts(path)
    evidence = Evidence(
        provider=CPU,
        reference="nothing",
        images=images,
        batch_sizes=(1,),
        top1_agreement=1.0,
        max_difference=0.0,
        val_images=images,
        correct_top1=correct,
        correct_top5=images,
        onnxruntime="1",
    )
    write_model(path, graph, dataclasses.replace(card, evidence=(evidence,)))


@pytest.fixture
def right(samples) -> int:
    """How many of the samples the model gets right."""
    return sum(
        r.correct for r in Classifier("inception").classify_many(find_inputs([str(samples)]))
    )


def test_the_accuracy_is_measured_again(copy, samples, right, capsys):
    with_evidence(copy, right)
    assert main(["verify", str(copy), "--data", str(samples), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["replay"]["correct_top1"] == right
    assert document["replay"]["difference"] == 0
    assert document["self_test"]["golden_images"] == 8


def test_an_unreadable_file_counts_against_the_accuracy_where_it_has_a_label(
    copy, samples, right, tmp_path, capsys
):
    with_evidence(copy, right)
    data = shutil.copytree(samples, tmp_path / "data")
    (data / "broken.jpg").write_bytes(b"no picture")
    assert main(["verify", str(copy), "--data", str(data)]) == 0
    shutil.copy(data / "broken.jpg", next((data / "bison").iterdir()))
    assert main(["verify", str(copy), "--data", str(data)]) == 4
    assert "1 unreadable" in capsys.readouterr().err


def test_another_accuracy_is_exit_code_4(copy, samples, right, capsys):
    with_evidence(copy, right + 1)
    assert main(["verify", str(copy), "--data", str(samples)]) == 4
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("tinyserve: top-1"))
    assert f"top-1 is {right} of 40" in line
    assert str(right + 1) in line


def test_other_images_than_those_of_the_evidence_are_refused_before_the_work(
    copy, samples, right, capsys, monkeypatch
):
    with_evidence(copy, right, images=41)
    monkeypatch.setattr(Classifier, "classify_many", lambda *_: pytest.fail("classified"))
    assert main(["verify", str(copy), "--data", str(samples)]) == 2
    assert "40 labelled images here" in capsys.readouterr().err


def test_images_that_training_held_out_are_not_asked_for(copy, samples, right, capsys):
    with_evidence(copy, right, images=4)
    graph, card = parts(copy)
    training = dataclasses.replace(card.training, dataset="photos, 4 held out of train")
    write_model(copy, graph, dataclasses.replace(card, training=training))
    assert main(["verify", str(copy), "--data", str(samples)]) == 2
    said = capsys.readouterr().err
    assert "40 labelled images here, but the accuracy in the file is of 4 that training" in said
    assert "leave out --data" in said
    assert "name the validation split" not in said


def test_swapped_labels_under_a_good_seal_change_the_accuracy(copy, samples):
    graph, card = parts(copy)
    classifier = Classifier(str(copy), device="cpu")
    inputs = find_inputs([str(samples)])
    truth = {r.label for r in classifier.classify_many(inputs) if r.correct}
    indices = [card.labels.index(label) for label in sorted(truth, key=lambda label: label.name)]
    labels = list(card.labels)
    a, b = indices[:2]
    labels[a], labels[b] = labels[b], labels[a]
    right = sum(r.correct for r in classifier.classify_many(inputs))
    write_model(copy, graph, dataclasses.replace(card, labels=tuple(labels)))
    with_evidence(copy, right)
    assert main(["verify", str(copy), "--data", str(samples)]) == 4
