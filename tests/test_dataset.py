import io
import os
import sys
import zipfile
from pathlib import Path

import pytest

from tinyserve.dataset import Input, find_inputs, read_annotations, version_of
from tinyserve.errors import DataError, ImageError


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_folders_are_searched_and_sorted_with_numbers_in_numeric_order(tmp_path):
    for name in ("b/val_10.JPEG", "b/val_2.JPEG", "a/x.png", "a/notes.txt", "c/deep/y.webp"):
        touch(tmp_path / name)
    found = [os.path.relpath(item.path, tmp_path) for item in find_inputs([str(tmp_path)])]
    assert found == ["a/x.png", "b/val_2.JPEG", "b/val_10.JPEG", "c/deep/y.webp"]


def test_folders_may_be_as_deep_as_paths_are_long(tmp_path):
    folders = [tmp_path / "a"]
    for _ in range(1200):  # deeper than Python calls functions
        folders.append(f"{folders[-1]}/a")
    for folder in folders:
        os.mkdir(folder)
    try:
        image = f"{folders[-1]}/1.jpg"
        with open(image, "wb"):
            pass
        assert [item.path for item in find_inputs([str(tmp_path)])] == [image]
    finally:  # which pytest could not
        os.remove(image)
        for folder in reversed(folders):
            os.rmdir(folder)


def test_every_suffix_of_an_image_counts(tmp_path):
    for name in ("a.jfif", "b.jpe", "c.JPG", "d.tif", "e.txt"):
        touch(tmp_path / name)
    found = [os.path.basename(item.path) for item in find_inputs([str(tmp_path)])]
    assert found == ["a.jfif", "b.jpe", "c.JPG", "d.tif"]


def test_files_come_in_the_order_given_whatever_their_suffix(tmp_path):
    second, first = touch(tmp_path / "a.bin"), touch(tmp_path / "z.jpg")
    assert [i.path for i in find_inputs([str(first), str(second)])] == [str(first), str(second)]


def test_globs_take_images_and_folders(tmp_path):
    touch(tmp_path / "cat" / "1.jpg")
    touch(tmp_path / "2.jpg")
    touch(tmp_path / "3.txt")
    found = [os.path.relpath(i.path, tmp_path) for i in find_inputs([f"{tmp_path}/*"])]
    assert found == ["2.jpg", "cat/1.jpg"]


@pytest.mark.parametrize("pattern", ["**", "**/*", "**/", "**/*.jpg", "*", "a*/**"])
def test_what_a_glob_matches_in_several_ways_is_taken_once(tmp_path, monkeypatch, pattern):
    for name in ("a/1.jpg", "a/deep/2.jpg", "a/deep/er/3.jpg", "ab/4.jpg"):
        touch(tmp_path / name)
    for start in (f"{tmp_path}/", ""):
        monkeypatch.chdir(tmp_path)
        found = [os.path.relpath(item.path, tmp_path) for item in find_inputs([start + pattern])]
        assert found == ["a/1.jpg", "a/deep/2.jpg", "a/deep/er/3.jpg", "ab/4.jpg"]


def test_a_file_whose_name_looks_like_a_glob_is_taken_as_it_is(tmp_path):
    path = touch(tmp_path / "photo[1].jpg")
    assert [i.path for i in find_inputs([str(path)])] == [str(path)]


def test_links_are_followed_and_those_that_go_round_in_circles_end(tmp_path):
    touch(tmp_path / "a" / "1.jpg")
    touch(tmp_path / "b" / "2.jpg")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "other").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "first").symlink_to(tmp_path / "a")
    found = {os.path.relpath(item.path, tmp_path) for item in find_inputs([str(tmp_path)])}
    assert found == {"a/1.jpg", "a/other/2.jpg", "b/2.jpg", "b/first/1.jpg"}


def test_a_link_that_cannot_be_followed_fails_and_takes_nothing_with_it(tmp_path):
    touch(tmp_path / "1.jpg")
    touch(tmp_path / "a" / "2.jpg")
    (tmp_path / "latest").symlink_to("latest")
    (tmp_path / "odd").symlink_to(tmp_path / "1.jpg" / "inside")
    found = list(find_inputs([str(tmp_path)]))
    names = [os.path.relpath(item.path, tmp_path) for item in found]
    assert names == ["1.jpg", "a/2.jpg", "latest", "odd"]
    for item, words in zip(found[2:], ("symbolic links", "Not a directory"), strict=True):
        with pytest.raises(ImageError, match=words):
            item.read()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_an_input_that_fails(tmp_path):
    touch(tmp_path / "closed" / "1.jpg")
    touch(tmp_path / "open" / "2.jpg")
    (tmp_path / "closed").chmod(0)
    closed, readable = find_inputs([str(tmp_path)])
    assert readable.path.endswith("2.jpg")
    with pytest.raises(ImageError, match="cannot read"):
        closed.read()


def test_nothing_is_listed_before_it_is_asked_for(tmp_path, monkeypatch):
    touch(tmp_path / "a" / "1.jpg")
    touch(tmp_path / "b" / "2.jpg")
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    inputs = find_inputs([str(tmp_path)])
    assert next(inputs).path.endswith("1.jpg")
    assert not any(path.endswith("b") for path in listed)
    assert next(inputs).path.endswith("2.jpg")
    assert any(path.endswith("b") for path in listed)


def test_paths_come_in_on_stdin(tmp_path, monkeypatch):
    touch(tmp_path / "goldfish" / "1.jpg")
    touch(tmp_path / "goldfish" / "caf\udce9.jpg")
    lines = f"{tmp_path}/goldfish/1.jpg\r\n\n{tmp_path}/missing.jpg\n{tmp_path}/goldfish"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    found = [(os.path.relpath(i.path, tmp_path), i.label) for i in find_inputs(["-"])]
    assert found == [
        ("goldfish/1.jpg", "goldfish"),
        ("missing.jpg", tmp_path.name),
        ("goldfish/1.jpg", "goldfish"),
        ("goldfish/caf\udce9.jpg", "goldfish"),
    ]


def test_an_archive_on_stdin_is_opened(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("goldfish/1.jpg", b"")
    lines = f"{tmp_path}/photos.zip\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    (found,) = find_inputs(["-"])
    assert (found.path, found.label) == (f"{tmp_path}/photos.zip/goldfish/1.jpg", "goldfish")


def test_a_version_changes_with_the_file_and_inside_an_archive_with_the_archive(tmp_path):
    path = touch(tmp_path / "photos.zip")
    before = version_of(str(path))
    assert before == version_of(f"{path}/cat/../1.jpg") != ""
    path.write_bytes(b"xx")
    assert version_of(f"{path}/cat/1.jpg") != before
    assert version_of(str(tmp_path / "missing.jpg")) == version_of("") == ""


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


def test_annotations_that_were_rewritten_are_read_anew(tmp_path):
    for number in range(2):
        touch(tmp_path / "val" / "images" / f"val_{number}.JPEG")
    annotations = tmp_path / "val" / "val_annotations.txt"

    def annotate(wnid):
        annotations.write_text(f"val_0.JPEG\t{wnid}\nval_1.JPEG\t{wnid}\n")

    def labels():
        return [item.label for item in find_inputs([str(tmp_path)])]

    annotate("n1")
    earlier = find_inputs([str(tmp_path)])
    assert next(earlier).label == "n1"
    annotate("n02")
    assert labels() == ["n02"] * 2
    assert next(earlier).label == "n1"  # labels of one list are of one time
    assert labels() == ["n02"] * 2
    annotations.unlink()
    assert labels() == ["val"] * 2


def test_one_file_of_val_knows_its_label_from_any_working_directory(tmp_path, monkeypatch):
    touch(tmp_path / "val" / "images" / "val_0.JPEG")
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn03444034\n")
    monkeypatch.chdir(tmp_path / "val" / "images")
    assert list(find_inputs(["val_0.JPEG"])) == [Input("val_0.JPEG", "n03444034")]


@pytest.mark.parametrize("path", ["photos", b"photos", Path("photos")])
def test_a_path_of_its_own_is_no_list(path):
    with pytest.raises(TypeError, match="put a single one in a list"):
        find_inputs(path)


def test_paths_are_pathlibs_too_but_no_bytes(samples):
    folder = samples / "goldfish"
    assert list(find_inputs(iter([folder]))) == list(find_inputs([str(folder)]))
    with pytest.raises(TypeError, match="not bytes"):
        find_inputs([os.fsencode(folder)])


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
