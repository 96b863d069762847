import os

import pytest

from tinyserve.dataset import Input, find_inputs, read_annotations
from tinyserve.errors import DataError


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_folders_are_searched_and_sorted_with_numbers_in_numeric_order(tmp_path):
    for name in ("b/val_10.JPEG", "b/val_2.JPEG", "a/x.png", "a/notes.txt", "c/deep/y.webp"):
        touch(tmp_path / name)
    found = [os.path.relpath(item.path, tmp_path) for item in find_inputs([str(tmp_path)])]
    assert found == ["a/x.png", "b/val_2.JPEG", "b/val_10.JPEG", "c/deep/y.webp"]


def test_files_come_in_the_order_given_whatever_their_suffix(tmp_path):
    second, first = touch(tmp_path / "a.bin"), touch(tmp_path / "z.jpg")
    assert [i.path for i in find_inputs([str(first), str(second)])] == [str(first), str(second)]


def test_globs_take_images_and_folders(tmp_path):
    touch(tmp_path / "cat" / "1.jpg")
    touch(tmp_path / "2.jpg")
    touch(tmp_path / "3.txt")
    found = [os.path.relpath(i.path, tmp_path) for i in find_inputs([f"{tmp_path}/*"])]
    assert found == ["2.jpg", "cat/1.jpg"]


def test_a_file_whose_name_looks_like_a_glob_is_taken_as_it_is(tmp_path):
    path = touch(tmp_path / "photo[1].jpg")
    assert [i.path for i in find_inputs([str(path)])] == [str(path)]


def test_links_that_go_round_in_circles_end(tmp_path):
    touch(tmp_path / "a" / "1.jpg")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert len(find_inputs([str(tmp_path)])) == 1


def test_class_folders_are_labels(samples):
    labels = {item.label for item in find_inputs([str(samples)])}
    assert {"goldfish", "pill_bottle", "iPod"} <= labels


def test_tiny_imagenet_layouts_carry_labels(tmp_path):
    touch(tmp_path / "train" / "n01443537" / "images" / "n01443537_0.JPEG")
    touch(tmp_path / "val" / "images" / "val_0.JPEG")
    touch(tmp_path / "val" / "images" / "val_1.JPEG")
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn03444034\t0\t32\t44\t62\n")
    assert [i.label for i in find_inputs([str(tmp_path / "train")])] == ["n01443537"]
    for start in ("val", "val/images"):
        labels = [i.label for i in find_inputs([str(tmp_path / start)])]
        assert labels == ["n03444034", None]


def test_one_file_of_val_knows_its_label_from_any_working_directory(tmp_path, monkeypatch):
    touch(tmp_path / "val" / "images" / "val_0.JPEG")
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn03444034\n")
    monkeypatch.chdir(tmp_path / "val" / "images")
    assert find_inputs(["val_0.JPEG"]) == [Input("val_0.JPEG", "n03444034")]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("missing", "no such file or folder"),
        ("empty", "no images in"),
        ("*.jpg", "no image matches"),
    ],
)
def test_nothing_found_is_an_error_that_names_the_path(tmp_path, path, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=words):
        find_inputs([str(tmp_path / path)])


def test_annotations_of_another_form_are_refused(tmp_path):
    path = tmp_path / "val_annotations.txt"
    path.write_text("val_0.JPEG n01443537\n")
    with pytest.raises(DataError, match="not a line"):
        read_annotations(path)
