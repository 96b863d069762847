import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from tinyserve import images
from tinyserve.classifier import Classifier
from tinyserve.dataset import find_inputs
from tinyserve.engine import Engine, read_card
from tinyserve.errors import GateError
from tinyserve.images import RESIZE_RULE
from tinyserve.modelfile import METADATA_KEY, ModelCard, find_model
from training import checkpoint, data, export, gate
from training.evaluate import ServedNetwork
from training.models import count_parameters

ROOT = Path(export.__file__).parents[1]


def served_network(weights: checkpoint.Weights, **changes: torch.Tensor) -> ServedNetwork:
    return ServedNetwork(
        weights.network(),
        changes.get("mean", weights.mean),
        changes.get("std", weights.std),
        image_size=weights.image_size,
        crop=weights.crop,
        network_size=weights.network_size,
    ).eval()


def check_one_line(capsys: pytest.CaptureFixture[str], words: str) -> None:
    said = [
        line
        for line in capsys.readouterr().err.splitlines()
        if not line.startswith(("fp32 on", "fp16 on", "int8", "note:"))
    ]
    assert len(said) == 1
    assert said[0].startswith("training.export: ")
    assert words in said[0]


@pytest.fixture(scope="module")
def exported(finished, run_module, tmp_path_factory) -> SimpleNamespace:
    """The model file of the run ``finished``, alone in its folder, and what was said."""
    folder = tmp_path_factory.mktemp("exported") / "models"
    result = run_module("training.export", finished.folder, "-o", folder)
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(
        path=folder / "inception.onnx",
        stdout=result.stdout,
        stderr=result.stderr,
        weights=checkpoint.load_weights(finished.folder),
    )


@pytest.fixture(scope="module")
def pictures(photos) -> np.ndarray:
    """The validation pictures as a model sees them, uint8 ``[18, 64, 64, 3]``."""
    paths = sorted((photos / "val").rglob("*.jpg"))
    return np.stack([images.load(path, size=64) for path in paths])


# The file


@pytest.mark.slow
def test_the_file_is_alone_and_its_path_is_said(exported):
    assert os.listdir(exported.path.parent) == ["inception.onnx"]
    assert exported.stdout == f"{exported.path}\n"
    notes = [line for line in exported.stderr.splitlines() if line.startswith("note:")]
    assert notes == ["note: not calibrated, as no images were held out of training"]
    assert "Traceback" not in exported.stderr
    assert "Warning" not in exported.stderr


@pytest.mark.slow
def test_without_a_folder_named_no_shipped_model_is_overwritten(small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export.main([str(small_run)]) == 0
    assert os.listdir("models") == ["baseline.onnx"]
    assert not Path("exported").exists()


@pytest.mark.slow
def test_the_file_is_valid_and_whole(exported):
    model = onnx.load(exported.path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert {t.data_location for t in model.graph.initializer} == {onnx.TensorProto.DEFAULT}
    assert {operator.domain for operator in model.opset_import} <= {"", "ai.onnx"}
    assert exported.path.stat().st_size < 5_000_000


@pytest.mark.slow
def test_the_auxiliary_heads_are_not_in_the_file(exported):
    model = onnx.load(exported.path)
    numbers = sum(
        int(np.prod(t.dims))
        for t in model.graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT
    )
    with_heads = sum(p.numel() for p in exported.weights.network().parameters())
    assert numbers < with_heads - 50_000


@pytest.mark.slow
def test_the_graph_has_the_promised_input_and_output(exported):
    session = ort.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    (taken,), given = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type) == ("images", "tensor(uint8)")
    assert isinstance(taken.shape[0], str)  # a name: any batch size
    assert taken.shape[1:] == [64, 64, 3]
    assert [(o.name, o.type, o.shape[1:]) for o in given] == [
        ("probabilities", "tensor(float)", [3])
    ]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 5, 18])
def test_probabilities_are_those_of_pytorch_at_every_batch_size(exported, pictures, batch):
    pictures = pictures[np.linspace(0, 17, batch).astype(int)]  # of every class
    found = Engine(exported.path, device="cpu").run(pictures)
    assert found.shape == (batch, 3)
    assert found.dtype == np.float32
    assert np.allclose(found.sum(axis=1), 1, atol=1e-5)
    with torch.inference_mode():
        expected = served_network(exported.weights)(torch.from_numpy(pictures)).numpy()
    assert np.abs(found - expected).max() < 1e-4
    if batch > 2:
        assert np.ptp(expected, axis=0).max() > 0.05  # not one answer to everything


@pytest.mark.slow
def test_the_card_says_what_the_run_was(exported, finished):
    card = read_card(exported.path)
    weights = exported.weights
    result = json.loads((finished.folder / "result.json").read_text())
    assert (card.architecture, card.precision) == ("inception", "fp32")
    assert (card.image_size, card.crop, card.network_size) == (64, 64, 32)
    assert [label.name for label in card.labels] == ["amber", "jade", "violet"]
    assert card.parameters == count_parameters(weights.network())
    assert card.resize_rule == RESIZE_RULE
    assert card.training == weights.training
    assert card.training.val_top1 == result["single centre view"]["top1"]
    evidence = card.evidence[0]
    assert evidence.provider == "CPUExecutionProvider"
    assert evidence.images == 45  # all validation pictures, filled up with training pictures
    assert evidence.batch_sizes == (1, 3, 64)
    assert evidence.top1_agreement == 1
    assert 0 <= evidence.max_difference <= 1e-4
    assert evidence.val_images == 18
    assert evidence.correct_top1 == result["single centre view"]["correct_top1"]
    assert torch.__version__ in evidence.reference
    assert evidence.onnxruntime == ort.__version__
    assert card.golden.count == 8
    assert Engine(exported.path, device="cpu").self_test() < 1e-6


@pytest.mark.slow
def test_the_card_is_the_only_metadata(exported):
    model = onnx.load(exported.path)
    assert [entry.key for entry in model.metadata_props] == [METADATA_KEY]
    assert ModelCard.from_json(model.metadata_props[0].value) == read_card(exported.path)


@pytest.mark.slow
def test_no_path_of_this_machine_is_in_the_file(exported, finished):
    content = exported.path.read_bytes()
    private = [ROOT, Path(sys.prefix), finished.folder.parent, finished.data.parent]
    for path in [*private, *(path.resolve() for path in private)]:
        assert os.fsencode(path) not in content
    for word in (b"site-packages", b'.py"', b"training/models", b"torch/nn"):
        assert word not in content


@pytest.mark.slow
def test_serving_is_as_accurate_as_the_run_says_to_the_image(exported, finished):
    classifier = Classifier(str(exported.path), device="cpu")
    results = list(classifier.classify_many(find_inputs([str(finished.data / "val")])))
    assert len(results) == 18
    assert all(result.label is not None for result in results)
    score = json.loads((finished.folder / "result.json").read_text())["single centre view"]
    assert sum(result.correct for result in results) == score["correct_top1"]
    probabilities = Engine(exported.path, device="cpu").run(data.load(finished.data).val.images)
    labels = data.load(finished.data).val.labels
    loss = -np.log(probabilities[np.arange(18), labels]).mean()
    assert loss == pytest.approx(score["loss"], abs=1e-4)


@pytest.mark.slow
def test_nobody_else_can_tell_the_file_was_written_twice(exported):
    """The card with the gate's result replaces the one without: nothing of the first is left."""
    assert exported.path.read_bytes().count(b'"architecture"') == 1


# The gate's verdict


def forbid(monkeypatch: pytest.MonkeyPatch, precision: str = "fp32") -> None:
    """Make a bound that nothing keeps."""
    bounds = dataclasses.replace(gate.BOUNDS[precision], max_difference=-1.0)
    monkeypatch.setitem(gate.BOUNDS, precision, bounds)


@pytest.mark.slow
def test_a_file_that_fails_the_gate_is_not_left(small_run, tmp_path, monkeypatch, capsys):
    forbid(monkeypatch)
    output = tmp_path / "models"
    assert export.main([str(small_run), "-o", str(output)]) == 4
    check_one_line(capsys, "a probability differs")
    assert list(output.iterdir()) == []


@pytest.mark.slow
def test_an_older_file_outlives_one_that_fails_the_gate(small_run, tmp_path, monkeypatch):
    older = tmp_path / "baseline.onnx"
    older.write_bytes(b"of an earlier run")
    before = set(tmp_path.iterdir())
    forbid(monkeypatch)
    assert export.main([str(small_run), "-o", str(tmp_path)]) == 4
    assert older.read_bytes() == b"of an earlier run"
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_one_precision_that_fails_leaves_the_others(small_run, tmp_path, monkeypatch, capsys):
    forbid(monkeypatch, "fp16")
    arguments = [str(small_run), "-o", str(tmp_path / "models"), "--precision", "fp16,fp32"]
    assert export.main(arguments) == 4
    check_one_line(capsys, "fp16 on CPU: a probability differs")
    assert os.listdir(tmp_path / "models") == ["baseline.onnx"]


@pytest.mark.slow
def test_a_file_that_passes_the_gate_replaces_the_older_one(small_run, tmp_path, photos, capsys):
    (tmp_path / "baseline.onnx").write_bytes(b"of an earlier run")
    before = set(tmp_path.iterdir())
    assert export.main([str(small_run), "-o", str(tmp_path)]) == 0
    assert set(tmp_path.iterdir()) == before
    # A mean image and a crop: what is computed is still what PyTorch computes.
    card = read_card(tmp_path / "baseline.onnx")
    assert (card.image_size, card.crop) == (16, 12)
    pixels = data.load(photos, image_size=16).val.images
    found = Engine(tmp_path / "baseline.onnx", device="cpu").run(pixels)
    with torch.inference_mode():
        served = served_network(checkpoint.load_weights(small_run))
        assert np.abs(served(torch.from_numpy(pixels)).numpy() - found).max() < 1e-4
    # The fingerprint in these weights is of no data at all.
    assert f"note: {photos} is not the data" in capsys.readouterr().err


# Refusals


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda run: shutil.rmtree(run), "no such run"),
        (lambda run: (run / "weights.pt").unlink(), "is no training run"),
        (lambda run: (run / "weights.pt").rename(run / "checkpoint.pt"), "has not finished"),
        (lambda run: (run / "weights.pt").write_text("no weights"), "damaged"),
        (lambda run: os.truncate(run / "weights.pt", 5000), "damaged"),
        (lambda run: (run / "config.json").write_text("[1]"), "with --data"),
        (lambda run: (run / "config.json").write_text('{"data": 3}'), "with --data"),
        (lambda run: (run / "config.json").write_text('{"data": "gone"}'), "at gone: name it with"),
    ],
    ids=["no folder", "no run", "unfinished", "text", "cut short", "list", "number", "moved"],
)
def test_what_is_no_finished_run_is_one_line(small_run, tmp_path, capsys, break_it, words):
    break_it(small_run)
    output = tmp_path / "models"
    assert export.main([str(small_run), "-o", str(output)]) == 1
    check_one_line(capsys, words)
    assert not output.exists()


def test_data_of_other_classes_is_one_line(small_run, tmp_path, bare, capsys):
    (bare / "jade").rename(bare / "onyx")
    output = tmp_path / "models"
    assert export.main([str(small_run), "-o", str(output), "--data", str(bare)]) == 2
    check_one_line(capsys, "has other classes")
    assert not output.exists()


@pytest.mark.slow
def test_files_with_other_weights_are_named_after_a_failure_too(
    small_run, tmp_path, capsys, monkeypatch
):
    shutil.copy(find_model("baseline", ("int8",)), tmp_path)

    def refused(*_: object) -> None:
        raise GateError("not good enough")

    monkeypatch.setattr(export.quantize, "to_int8", refused)
    assert export.main([str(small_run), "-o", str(tmp_path), "--precision", "fp32,int8"]) == 4
    said = capsys.readouterr().err
    assert "baseline.int8.onnx has other weights" in said
    assert said.splitlines()[-1] == "training.export: not good enough"


@pytest.mark.slow
def test_files_of_the_same_name_with_other_weights_are_named(small_run, tmp_path, capsys):
    shutil.copy(find_model("baseline", ("int8",)), tmp_path)
    assert export.main([str(small_run), "-o", str(tmp_path)]) == 0
    assert "baseline.int8.onnx has other weights" in capsys.readouterr().err
    (tmp_path / "baseline.int8.onnx").unlink()
    assert export.main([str(small_run), "-o", str(tmp_path), "--precision", "fp16"]) == 0
    assert "has other" not in capsys.readouterr().err
    assert export.main([str(small_run), "-o", str(tmp_path), "--views", "2"]) == 0
    assert "baseline.fp16.onnx has other views" in capsys.readouterr().err


def test_data_that_is_not_there_is_one_line(small_run, tmp_path, capsys):
    output = tmp_path / "models"
    arguments = [str(small_run), "-o", str(output), "--data", str(tmp_path / "nothing")]
    assert export.main(arguments) == 1
    check_one_line(capsys, "no such folder")
    assert not output.exists()


@pytest.mark.slow
def test_an_output_that_is_a_file_is_one_line(small_run, tmp_path, capsys):
    output = tmp_path / "models"
    output.write_text("a file")
    assert export.main([str(small_run), "-o", str(output)]) == 2
    check_one_line(capsys, "cannot write")
    assert output.read_text() == "a file"


@pytest.mark.slow
def test_a_folder_in_the_place_of_the_file_is_one_line(small_run, tmp_path, capsys):
    output = tmp_path / "models"
    (output / "baseline.onnx").mkdir(parents=True)
    assert export.main([str(small_run), "-o", str(output)]) == 2
    check_one_line(capsys, "cannot write")
    assert os.listdir(output) == ["baseline.onnx"]  # no candidate


@pytest.mark.slow
@pytest.mark.parametrize("missing", [1_000_000, 1000], ids=["at once", "when evidence is added"])
def test_a_full_disk_is_one_line_and_nothing_half_written(
    small_run, run_on_a_full_disk, tmp_path, missing
):
    output = tmp_path / "models"
    (older,) = export.export(small_run, output)
    before = older.read_bytes()
    result = run_on_a_full_disk(len(before) - missing, "training.export", small_run, "-o", output)
    assert result.returncode == 2
    assert ("fp32 on CPU" in result.stderr) == (missing == 1000)  # was the gate reached?
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("training.export:")]
    assert lines == [f"training.export: cannot write into {output}: File too large"]
    assert os.listdir(output) == ["baseline.onnx"]
    assert older.read_bytes() == before


@pytest.mark.slow
def test_an_unknown_precision_is_refused_with_those_known(small_run, tmp_path, capsys):
    assert export.main([str(small_run), "-o", str(tmp_path), "--precision", "fp32,int4"]) == 2
    check_one_line(capsys, "unknown precision 'int4' (known: fp32, fp16, int8)")


# Other precisions, and files instead of runs


@pytest.fixture(scope="module")
def half(finished, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("half")
    (path,) = export.export(finished.folder, output, precisions=["fp16"])
    return path


@pytest.mark.slow
def test_half_precision_is_half_as_large_and_answers_alike(half, exported, pictures):
    assert half.name == "inception.fp16.onnx"
    assert half.stat().st_size < 0.6 * exported.path.stat().st_size
    card = read_card(half)
    assert card.precision == "fp16"
    assert card.evidence[0].top1_agreement >= 0.995
    found, expected = (Engine(path, device="cpu").run(pictures) for path in (half, exported.path))
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).max() < 0.02
    model = onnx.load(half)
    kinds = {tensor.data_type for tensor in model.graph.initializer if tensor.dims}
    assert onnx.TensorProto.FLOAT16 in kinds
    (softmax,) = (node for node in model.graph.node if node.op_type == "Softmax")
    sources = {name: node for node in model.graph.node for name in node.output}
    assert sources[softmax.input[0]].op_type == "Gemm"  # in single precision, like the softmax


@pytest.mark.slow
def test_a_file_can_be_exported_again(small_run, tmp_path, photos):
    pictures = data.load(photos, image_size=16).val.images
    sources = export.export(small_run, tmp_path / "first", precisions=["fp32", "fp16"])
    for source, tolerance in zip(sources, (1e-5, 1e-2), strict=True):
        (again,) = export.export(source, tmp_path, data_root=photos)
        assert read_card(again).training == read_card(source).training
        found, expected = (Engine(path, device="cpu").run(pictures) for path in (again, source))
        assert np.abs(found - expected).max() < tolerance


def test_of_8_bits_only_8_bits_can_be_made(tmp_path, photos, capsys):
    source = find_model("inception", ("int8",))
    assert export.main([str(source), "-o", str(tmp_path), "--data", str(photos)]) == 2
    check_one_line(capsys, "is int8: only int8 can be made of it")


@pytest.mark.slow
def test_a_file_does_not_know_its_data(exported, tmp_path, capsys):
    assert export.main([str(exported.path), "-o", str(tmp_path)]) == 2
    check_one_line(capsys, "name it with --data")


@pytest.mark.slow
@pytest.mark.parametrize("views", [2, 10])
def test_views_are_averaged_in_the_graph(small_weights, small_run, tmp_path, photos, views):
    classifier = torch.randn(3, 1024, generator=torch.Generator().manual_seed(0)) / 10
    weights = dataclasses.replace(
        small_weights,
        mean=torch.tensor([120.0, 110, 100]),
        state={**small_weights.state, "classifier.weight": classifier},
    )
    checkpoint.save_weights(small_run, weights)
    pictures = data.load(photos, image_size=16).val.images
    mirrored = np.ascontiguousarray(pictures[:, :, ::-1])

    def difference(views):
        (path,) = export.export(small_run, tmp_path / str(views), views=views)
        assert read_card(path).views == views
        found, other = (Engine(path, device="cpu").run(seen) for seen in (pictures, mirrored))
        assert np.allclose(found.sum(axis=1), 1, atol=1e-5)
        return np.abs(found - other).max()

    assert difference(1) > 0.01
    # Every view has its mirror image among the views.
    assert difference(views) < 1e-4
