import dataclasses
import os
from pathlib import Path

import pytest
import torch

from tinyserve.errors import CheckpointError
from training import checkpoint
from training.models import ARCHS


def refused(folder: Path) -> str:
    """The words with which a run is refused."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_weights(folder).network()
    words = str(caught.value)
    assert "\n" not in words
    assert str(folder) in words
    return words


def change(folder: Path, **values: object) -> None:
    """Write other values into the weights of a run; None takes one out."""
    path = folder / "weights.pt"
    document = {**torch.load(path, weights_only=True), **values}
    torch.save({name: value for name, value in document.items() if value is not None}, path)


def test_weights_come_back_as_they_were_saved(small_weights, tmp_path):
    checkpoint.save_weights(tmp_path, small_weights)
    loaded = checkpoint.load_weights(tmp_path)
    tensors = {"mean", "std", "state"}
    for field in dataclasses.fields(loaded):
        if field.name not in tensors:
            assert getattr(loaded, field.name) == getattr(small_weights, field.name), field.name
    assert torch.equal(loaded.mean, small_weights.mean)
    assert torch.equal(loaded.std, small_weights.std)
    assert loaded.state.keys() == small_weights.state.keys()
    for name, value in loaded.state.items():
        assert value.dtype == small_weights.state[name].dtype
        assert torch.equal(value, small_weights.state[name])


def test_the_network_computes_the_same_after_a_roundtrip(small_weights, tmp_path):
    checkpoint.save_weights(tmp_path, small_weights)
    images = torch.randn(3, 3, 12, 12)
    network = checkpoint.load_weights(tmp_path).network()
    assert not network.training
    assert torch.equal(network(images), small_weights.network()(images))


def test_matrices_are_stored_in_half_precision(small_weights, tmp_path):
    checkpoint.save_weights(tmp_path, small_weights)
    stored = torch.load(tmp_path / "weights.pt", weights_only=True)["state"]
    assert {value.dtype for value in stored.values() if value.dim() >= 2} == {torch.float16}
    assert stored["classifier.bias"].dtype == torch.float32


def test_inception_needs_no_auxiliary_heads_to_be_loaded(small_weights, tmp_path):
    state = checkpoint.final_state(ARCHS["inception"](3))
    weights = dataclasses.replace(small_weights, arch="inception", batch_norm=False, state=state)
    checkpoint.save_weights(tmp_path, weights)
    network = checkpoint.load_weights(tmp_path).network()
    assert torch.equal(network.classifier.weight, state["classifier.weight"])


def test_saving_leaves_one_file_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for step in range(2):
        checkpoint.save(path, {"step": step})
        assert checkpoint.load(path) == {"step": step}
        assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1})
    # Something in the way: the file that is to be renamed cannot even be opened.
    (tmp_path / "checkpoint.pt.partial").mkdir()
    with pytest.raises(CheckpointError, match="cannot write") as caught:
        checkpoint.save(path, {"step": 2})
    assert "\n" not in str(caught.value)
    assert checkpoint.load(path) == {"step": 1}


def test_saving_where_no_file_can_be_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="cannot write") as caught:
        checkpoint.save(tmp_path / "file" / "checkpoint.pt", {})
    assert "\n" not in str(caught.value)


def test_a_partial_file_of_a_crash_is_never_read(small_run):
    (small_run / "weights.pt").rename(small_run / "weights.pt.partial")
    assert "is no training run" in refused(small_run)


def test_missing_runs_are_told_from_unfinished_ones(small_run, tmp_path):
    assert "no such run" in refused(tmp_path / "nothing")
    (small_run / "weights.pt").unlink()
    assert "is no training run" in refused(small_run)
    checkpoint.save(small_run / "checkpoint.pt", {})
    assert "has not finished" in refused(small_run)


@pytest.mark.parametrize("keep", [0, 10, 1000, -100])
def test_a_file_cut_short_is_refused(small_run, keep):
    path = small_run / "weights.pt"
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged" in refused(small_run)


def test_a_flipped_byte_is_refused(small_run):
    path = small_run / "weights.pt"
    content = bytearray(path.read_bytes())
    # In the middle, hence in a tensor, where only the zip's checksums know.
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert "damaged" in refused(small_run)


def test_text_is_refused(small_run):
    (small_run / "weights.pt").write_text("weights\n" * 100)
    assert "damaged or is no checkpoint" in refused(small_run)


def test_code_in_a_file_is_not_run(small_run, tmp_path):
    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    torch.save({"arch": Touch()}, small_run / "weights.pt")
    refused(small_run)
    assert not (tmp_path / "harmed").exists()


def test_other_objects_are_refused(small_run):
    torch.save([1, 2], small_run / "weights.pt")
    assert "no checkpoint of this program" in refused(small_run)
    torch.save({"step": 1}, small_run / "weights.pt")
    assert "is not the weights of a run" in refused(small_run)


def test_an_unknown_architecture_is_refused_with_those_known(small_run):
    change(small_run, arch="vgg")
    words = refused(small_run)
    assert "'vgg'" in words
    assert all(arch in words for arch in ARCHS)


@pytest.mark.parametrize("name", ["arch", "labels", "training", "state", "mean", "format"])
def test_a_missing_part_is_refused(small_run, name):
    change(small_run, **{name: None})
    assert name in refused(small_run)


def test_another_format_is_refused(small_run):
    change(small_run, format=2)
    assert "another version" in refused(small_run)


def test_a_network_without_all_its_weights_is_refused(small_run, small_weights):
    state = {k: v for k, v in small_weights.state.items() if k != "classifier.bias"}
    change(small_run, state=state)
    with pytest.raises(CheckpointError, match=r"weights without classifier\.bias"):
        checkpoint.load_weights(small_run).network()


def test_weights_of_another_shape_are_refused_in_one_line(small_run):
    change(small_run, crop=16, network_size=16)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_weights(small_run).network()
    assert "\n" not in str(caught.value)
