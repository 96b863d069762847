import contextlib
import dataclasses
import hashlib
import http.server
import io
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tinyserve import images
from tinyserve.errors import DataError, ImageError
from tinyserve.modelfile import Label
from training import data
from training.recipes import RECIPES
from training.run import Config
from training.trainer import Trainer

CACHE = ".tinyserve-cache"


def overwrite_unnoticed(path: Path, content: bytes) -> None:
    """Other bytes under the same name, size and time."""
    before = path.stat()
    path.write_bytes(content[: before.st_size].ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


# What is read


def test_class_folders(folders):
    dataset = data.load(folders)
    assert dataset.name == "photos"
    assert dataset.classes == tuple(Label(None, name) for name in ("amber", "jade", "violet"))
    assert dataset.train.images.shape == (6, 64, 64, 3)
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int64
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.val.labels.tolist() == [0, 1, 2]
    assert len(dataset.val) == 3


def test_pixels_are_those_that_are_served(folders, make_picture):
    wide = make_picture(folders / "train" / "jade" / "wide.jpg", (40, 160, 90), 9, (160, 96))
    dataset = data.load(folders)
    # amber/0, amber/1, jade/0, jade/1, jade/wide
    assert np.array_equal(dataset.train.images[4], images.load(wide, size=64))
    assert np.array_equal(
        dataset.train.images[1], images.load(folders / "train" / "amber" / "1.jpg", size=64)
    )


def test_images_are_found_in_folders_below_a_class(folders, make_picture):
    make_picture(folders / "train" / "jade" / "more" / "deep" / "1.jpg", (40, 160, 90), 1)
    (folders / "train" / "jade" / "notes.txt").write_text("not a picture")
    assert data.load(folders).train.labels.tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_the_shape_of_tiny_imagenet(tiny_shaped):
    dataset = data.load(tiny_shaped)
    # Sorted by wnid, whatever the order of wnids.txt; the first of the synonyms; the wnid where
    # words.txt has none.
    assert dataset.classes == (Label("n01", "n01"), Label("n02", "jade"), Label("n03", "amber"))
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    # val_0, val_2, val_10: numeric order, labelled by the annotations.
    assert dataset.val.labels.tolist() == [1, 2, 0]
    for i, name in enumerate(("val_0", "val_2", "val_10")):
        path = tiny_shaped / "val" / "images" / f"{name}.JPEG"
        assert np.array_equal(dataset.val.images[i], images.load(path, size=64))


def test_a_greyscale_jpeg_has_three_equal_channels(folders):
    path = folders / "train" / "amber" / "0.jpg"
    with Image.open(path) as image:
        grey = image.convert("L")
    grey.save(path)
    with Image.open(path) as image:
        assert image.mode == "L"
        decoded = np.asarray(image)
    first = data.load(folders).train.images[0]
    assert np.array_equal(first, decoded[..., None].repeat(3, axis=2))


def test_another_size_is_stored_beside_the_first(folders):
    for size in (64, 32, 96, 64):
        dataset = data.load(folders, image_size=size)
        assert dataset.train.images.shape == (6, size, size, 3)
        assert dataset.val.images.shape == (3, size, size, 3)
        first = images.load(folders / "train" / "amber" / "0.jpg", size=size)
        assert np.array_equal(dataset.train.images[0], first)
    assert len(list((folders / CACHE).glob("*.npy"))) == 6


def test_bare_class_folders_are_a_data_set_too(bare, capsys):
    dataset = data.load(bare)
    assert dataset.name == "bare"
    assert dataset.classes == tuple(Label(None, name) for name in ("amber", "jade", "violet"))
    assert dataset.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert np.array_equal(dataset.train.images[6], images.load(bare / "jade" / "1.jpg", size=64))
    assert len(dataset.val) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"note: {bare} has no val/: 2 of 15 training images are held out for validation",
        "note: classes without validation images: violet",
    ]


def test_the_cache_in_a_tree_of_bare_class_folders_is_no_class(bare):
    first = data.load(bare)
    assert (bare / CACHE).is_dir()
    again = data.load(bare)
    assert again.classes == first.classes
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize("split", ["train", "val"])
def test_hidden_folders_are_no_classes(folders, make_picture, split):
    before = data.load(folders)
    make_picture(folders / split / ".thumbnails" / "0.jpg", (1, 2, 3), 1)
    after = data.load(folders)
    assert after.classes == before.classes
    assert (len(after.train), len(after.val)) == (6, 3)
    assert after.fingerprint == before.fingerprint


def test_hidden_folders_in_a_tree_of_bare_class_folders_are_no_classes(bare, make_picture):
    make_picture(bare / ".thumbnails" / "0.jpg", (1, 2, 3), 1)
    assert len(data.load(bare).classes) == 3


def test_a_class_without_training_images_is_named(folders, capsys):
    (folders / "train" / "white").mkdir()
    dataset = data.load(folders)
    assert [label.name for label in dataset.classes] == ["amber", "jade", "violet", "white"]
    assert 3 not in dataset.train.labels
    assert capsys.readouterr().err == "note: class folders without training images: white\n"


def test_files_of_formats_that_are_not_read_are_counted(folders, capsys):
    jade = folders / "train" / "jade"
    for path in (jade / "0.HEIC", jade / "1.heic", folders / "val" / "jade" / "2.avif"):
        path.write_bytes(b"")
    for name in ("notes.txt", ".DS_Store", "._0.jpg"):
        (jade / name).write_bytes(b"")
    assert len(data.load(folders).train) == 6
    assert capsys.readouterr().err == (
        "note: 3 files are no images that are known here (.avif, .heic), and left out\n"
    )
    data.load(folders, holdout=1)
    assert "note: 2 files are no images that are known here (.heic)" in capsys.readouterr().err
    (jade / "1.heic").rename(jade / "1")
    (jade / "0.HEIC").unlink()
    data.load(folders, holdout=1)
    assert "note: 1 file is no image that is known here (no suffix)" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "val"])
def test_pictures_beside_the_class_folders_are_counted(folders, make_picture, capsys, split):
    for name in ("0.jpg", "notes.txt", "._0.jpg"):
        make_picture(folders / split / name, (1, 2, 3), 1)
    dataset = data.load(folders)
    assert (len(dataset.train), len(dataset.val)) == (6, 3)
    place = f"in no class folder but in {folders / split} itself, and left out\n"
    assert capsys.readouterr().err == f"note: 1 image is {place}"
    make_picture(folders / split / "1.PNG", (1, 2, 3), 2)
    data.load(folders)
    assert capsys.readouterr().err == f"note: 2 images are {place}"


def test_pictures_beside_bare_class_folders_are_counted(bare, make_picture, capsys):
    make_picture(bare / "0.jpg", (1, 2, 3), 1)
    assert len(data.load(bare).train) == 15
    said = capsys.readouterr().err.splitlines()[0]
    assert said == f"note: 1 image is in no class folder but in {bare} itself, and left out"


def test_the_lists_of_tiny_imagenet_are_not_counted_as_files_left_out(tiny_shaped, capsys):
    data.load(tiny_shaped)
    assert capsys.readouterr().err == ""


def test_of_many_classes_without_training_images_a_few_are_named(folders, capsys):
    for i in range(7):
        (folders / "train" / f"white{i}").mkdir()
    data.load(folders)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(": white0, white1, white2, white3, white4, ...")


def test_validation_pictures_that_are_trained_on_are_counted(folders, capsys):
    data.load(folders)
    assert capsys.readouterr().err == ""
    for i, name in enumerate(("amber", "jade")):
        copy = folders / "val" / name / "copy.jpg"
        shutil.copy(folders / "train" / name / f"{i}.jpg", copy)
    data.load(folders)
    assert capsys.readouterr().err.splitlines() == [
        "note: 2 of 5 validation images are training images, too"
    ]


def test_held_out_pictures_that_are_trained_on_are_counted(bare, capsys):
    for name in ("amber", "jade"):
        for i in range(5):
            shutil.copy(bare / name / f"{i}.jpg", bare / name / f"{i} (1).jpg")
    dataset = data.load(bare)
    trained_on = np.delete(dataset.train.images, dataset.held_out, axis=0)
    twice = sum((trained_on == picture).all(axis=(1, 2, 3)).any() for picture in dataset.val.images)
    assert twice > 0
    note = f"note: {twice} of {len(dataset.val)} validation images are training images, too"
    assert capsys.readouterr().err.splitlines()[-1] == note


# What is held out


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 26])
def test_so_many_as_asked_for_are_held_out_evenly(photos, count, capsys):
    dataset = data.load(photos, holdout=count)
    assert len(dataset.val) == len(dataset.held_out) == len(set(dataset.held_out)) == count
    shares = np.bincount(dataset.val.labels, minlength=3)
    assert shares.max() - shares.min() <= 1
    assert len(dataset.train) == 27
    first, *lost = capsys.readouterr().err.splitlines()
    assert first == f"note: {count} of 27 training images are held out for validation"
    assert len(lost) == (count == 26)  # of a class all are


def test_large_classes_give_more_than_small_ones(bare, make_picture):
    for i in range(5, 20):
        make_picture(bare / "violet" / f"{i}.jpg", (120, 60, 180), i)
    dataset = data.load(bare, holdout=6)  # of 5, 5 and 20
    assert np.bincount(dataset.val.labels).tolist() == [1, 1, 4]


def test_what_is_held_out_is_what_is_validated_on(photos):
    whole = data.load(photos)
    assert len(whole.held_out) == 0
    dataset = data.load(photos, holdout=7)
    assert np.array_equal(dataset.train.images, whole.train.images)
    assert np.array_equal(dataset.val.images, dataset.train.images[dataset.held_out])
    assert np.array_equal(dataset.val.labels, dataset.train.labels[dataset.held_out])


def test_the_same_are_held_out_every_time(photos, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "photos", ignore=shutil.ignore_patterns(".*"))
    first = data.load(photos, holdout=9)
    # Whatever is drawn beside it, and at another size too.
    np.random.default_rng(5).random(3)
    for other in (
        data.load(photos, holdout=9),
        data.load(copy, holdout=9),
        data.load(photos, holdout=9, image_size=32),
    ):
        assert np.array_equal(other.held_out, first.held_out)


def test_what_is_held_out_is_drawn_from_all_of_a_class(photos):
    dataset = data.load(photos, holdout=9)  # three of each nine
    places = dataset.held_out % 9
    assert places.tolist() != [0, 1, 2] * 3
    assert places.tolist() != [6, 7, 8] * 3


@pytest.mark.parametrize("limit", [None, 8, 1000])
def test_what_is_held_out_is_never_trained_on(photos, limit):
    dataset = data.load(photos, holdout=7)
    config = Config(
        arch="inception",
        recipe=dataclasses.replace(RECIPES["cpu"]("inception"), batch_size=4),
        seed=0,
        precision="fp32",
        image_size=64,
        limit_train=limit,
        holdout=7,
    )
    subset = Trainer(config, dataset, torch.device("cpu")).subset.tolist()
    assert len(subset) == len(set(subset)) == min(limit or 20, 20)
    assert set(subset).isdisjoint(dataset.held_out.tolist())
    assert set(subset) <= set(range(27))


@pytest.mark.parametrize(("pictures", "held_out"), [(1, 1), (3, 1), (4, 2)])
def test_without_val_a_tenth_is_held_out_rounded_up(
    folders, make_picture, capsys, pictures, held_out
):
    shutil.rmtree(folders / "val")
    shutil.rmtree(folders / "train")
    for number, name in enumerate(("amber", "jade", "violet")):
        for i in range(pictures):
            make_picture(folders / "train" / name / f"{i}.jpg", (9, 9, 9), 10 * number + i)
    dataset = data.load(folders)
    assert len(dataset.val) == held_out
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        f"note: {folders} has no val/: {held_out} of {3 * pictures} training images "
        "are held out for validation"
    )
    lost = "note: classes of which all images are held out, so that they are not learnt: "
    assert [line.startswith(lost) for line in said[1:]] == (
        [True, False] if pictures == 1 else [False]
    )


def test_another_name_for_val_is_said(folders, capsys):
    (folders / "val").rename(folders / "valid")
    (folders / "test").mkdir()
    data.load(folders)
    assert (
        "note: not read: test/, valid/; name a validation split val/\n" in capsys.readouterr().err
    )


def test_images_that_classify_will_take_for_another_class_are_said(folders, make_picture, capsys):
    words = "named as another class"
    make_picture(folders / "train" / "jade" / "images" / "9.jpg", (9, 9, 9), 1)  # as Tiny ImageNet
    data.load(folders)
    assert words not in capsys.readouterr().err
    make_picture(folders / "train" / "jade" / "2020" / "9.jpg", (9, 9, 9), 2)
    (folders / "train" / "amber").rename(folders / "train" / "images")
    (folders / "val" / "amber").rename(folders / "val" / "images")
    data.load(folders)
    assert words not in capsys.readouterr().err
    make_picture(folders / "train" / "jade" / "violet" / "9.jpg", (9, 9, 9), 3)
    data.load(folders)
    assert (
        f"note: 1 image lies inside of class folders in folders {words}" in capsys.readouterr().err
    )


def test_a_split_that_is_there_is_not_looked_at_where_images_are_held_out(folders, make_picture):
    before = data.load(folders, holdout=2)
    make_picture(folders / "val" / "white" / "0.jpg", (1, 2, 3), 1)
    damage(folders / "val" / "jade" / "0.jpg")
    after = data.load(folders, holdout=2)
    assert after.fingerprint == before.fingerprint
    assert np.array_equal(after.held_out, before.held_out)


def test_damaged_pictures_are_not_held_out(folders, capsys):
    damage(folders / "train" / "amber" / "0.jpg")
    dataset = data.load(folders, holdout=4, skip_bad=True)
    assert len(dataset.train) == 5
    assert dataset.val.images.any(axis=(1, 2, 3)).all()
    assert np.array_equal(dataset.val.images, dataset.train.images[dataset.held_out])
    assert "4 of 5 training images" in capsys.readouterr().err


@pytest.mark.parametrize("count", [6, 7, 1000, -1])
def test_something_must_be_left_to_train_on(folders, count):
    with pytest.raises(DataError, match="training images out") as caught:
        data.load(folders, holdout=count)
    assert "6 training images" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_copies_have_the_same_fingerprint_and_other_data_another(folders, tmp_path):
    copy = tmp_path / "copy" / "photos"
    shutil.copytree(folders, copy, copy_function=shutil.copyfile)  # with new times
    original = data.load(folders).fingerprint
    assert data.load(copy).fingerprint == original
    (copy / "train" / "amber" / "0.jpg").rename(copy / "train" / "jade" / "00.jpg")
    assert data.load(copy).fingerprint != original


@pytest.mark.parametrize("where", [".", "train/..", "../{name}"])
def test_data_have_one_fingerprint_from_wherever_they_are_named(folders, monkeypatch, where):
    before = data.load(folders).fingerprint
    monkeypatch.chdir(folders)
    assert data.load(Path(where.format(name=folders.name))).fingerprint == before


@pytest.mark.parametrize("holdout", [0, 3])
def test_data_of_which_images_were_left_out_have_a_fingerprint_of_their_own(
    folders, tmp_path, holdout
):
    # What is held out is chosen of the images that can be read.
    path = folders / "train" / "jade" / "0.jpg"
    content = path.read_bytes()
    whole = data.load(folders, holdout=holdout).fingerprint
    path.write_bytes(bytes(len(content)))
    without = data.load(folders, holdout=holdout, skip_bad=True).fingerprint
    assert without != whole
    assert data.load(folders, holdout=holdout, skip_bad=True).fingerprint == without
    copy = shutil.copytree(folders, tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))
    assert data.load(copy, holdout=holdout, skip_bad=True).fingerprint == without
    path.write_bytes(content)
    assert data.load(folders, holdout=holdout, skip_bad=True).fingerprint == whole


def test_an_image_repaired_unnoticed_changes_the_fingerprint(folders):
    path = folders / "train" / "jade" / "0.jpg"
    content = path.read_bytes()
    whole = data.load(folders, image_size=32, skip_bad=True).fingerprint
    overwrite_unnoticed(path, b"")
    assert data.load(folders, skip_bad=True).fingerprint != whole
    overwrite_unnoticed(path, content)
    assert data.load(folders, skip_bad=True).fingerprint == whole


# The cache


def test_a_second_load_reads_no_picture(folders):
    first = data.load(folders)
    pixels = first.train.images.copy()
    for path in folders.rglob("*.jpg"):
        overwrite_unnoticed(path, b"no picture any more")
    again = data.load(folders)
    assert np.array_equal(again.train.images, pixels)
    assert np.array_equal(again.val.images, first.val.images)


def test_a_changed_picture_is_read_again(folders, make_picture):
    before = data.load(folders).train.images.copy()
    make_picture(folders / "train" / "amber" / "1.jpg", (0, 0, 255), 99)
    after = data.load(folders).train.images
    assert not np.array_equal(after[1], before[1])
    assert np.array_equal(np.delete(after, 1, axis=0), np.delete(before, 1, axis=0))


def test_a_picture_changed_to_one_of_the_same_size_is_read_again(folders):
    path = folders / "val" / "jade" / "9.bmp"  # not compressed: every colour is as long
    Image.new("RGB", (64, 64), "red").save(path)
    assert (data.load(folders).val.images[2] == (255, 0, 0)).all()
    size, time_before = path.stat().st_size, path.stat().st_mtime_ns
    Image.new("RGB", (64, 64), "blue").save(path)
    os.utime(path, ns=(time_before, time_before + 1_000_000_000))
    assert path.stat().st_size == size
    assert (data.load(folders).val.images[2] == (0, 0, 255)).all()


def test_training_cannot_write_into_the_cache(folders):
    data.load(folders).train.images[:] = 0
    assert data.load(folders).train.images.any()


_STUCK = """
import pathlib, sys, time
from tinyserve import images
from training import data
load = images.load
images.load = lambda path, size: time.sleep(60) if "9.jpg" in path else load(path, size=size)
data.load(pathlib.Path(sys.argv[1]))
"""


def test_a_decode_that_was_killed_leaves_nothing_that_is_taken_for_whole(folders, make_picture):
    root = Path(data.__file__).parents[1]
    last = folders / "train" / "violet" / "9.jpg"
    make_picture(last, (120, 60, 180), 5)
    process = subprocess.Popen([sys.executable, "-c", _STUCK, str(folders)], cwd=root)
    try:
        deadline = time.monotonic() + 60
        while not list((folders / CACHE).glob(".train-*.candidate")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list((folders / CACHE).glob("*.npy")) == []
    assert np.array_equal(data.load(folders).train.images[6], images.load(last, size=64))


def test_a_cut_off_array_is_not_used(folders):
    pixels = data.load(folders).train.images.copy()
    (array,) = (folders / CACHE).glob("train-*.npy")
    array.with_name(f".{array.name}.1.candidate").write_bytes(array.read_bytes()[:5000])
    array.unlink()
    assert np.array_equal(data.load(folders).train.images, pixels)


def test_where_no_cache_can_be_made_beside_the_data_it_is_the_users(folders, tmp_path, monkeypatch):
    # A link that leads nowhere: no folder can be made of that name, not even by root.
    (folders / CACHE).symlink_to(tmp_path / "nowhere" / "cache")
    check_user_cache(folders, tmp_path, monkeypatch)


def test_a_folder_that_is_read_only_is_cached_in_the_users_cache(folders, tmp_path, monkeypatch):
    if os.geteuid() == 0:
        pytest.skip("root may write to read-only folders: run the tests as another user")
    folders.chmod(0o555)
    try:
        check_user_cache(folders, tmp_path, monkeypatch)
    finally:
        folders.chmod(0o755)


def check_user_cache(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    pixels = data.load(folders).train.images.copy()
    assert len(list((tmp_path / "xdg" / "tinyserve").glob("*.npy"))) == 2
    assert not (folders / CACHE).exists()
    for path in folders.rglob("*.jpg"):
        overwrite_unnoticed(path, b"no picture any more")
    assert np.array_equal(data.load(folders).train.images, pixels)


# Damage


def test_a_damaged_picture_stops_with_its_name_and_their_number(folders):
    path = folders / "train" / "jade" / "1.jpg"
    damage(path)
    for _ in range(2):  # decoding, and from the cache
        with pytest.raises(DataError, match="1 of 6 train images cannot be read") as caught:
            data.load(folders)
        assert str(path) in str(caught.value)
        assert "--skip-bad" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_picture_that_could_not_be_read_for_a_while_is_read_again(
    folders, capsys, monkeypatch, skip_bad
):
    path = folders / "train" / "jade" / "1.jpg"
    load = images.load

    def forbidden(source, *, size):
        if str(source) == str(path):
            raise ImageError("cannot read: Permission denied")
        return load(source, size=size)

    with monkeypatch.context() as patch:
        patch.setattr(images, "load", forbidden)
        if skip_bad:
            assert len(data.load(folders, skip_bad=True).train) == 5
        else:
            with pytest.raises(DataError, match="Permission denied"):
                data.load(folders)
    capsys.readouterr()
    for _ in range(2):
        dataset = data.load(folders, skip_bad=skip_bad)
        assert len(dataset.train) == 6
        found = [
            image for image in dataset.train.images if np.array_equal(image, load(path, size=64))
        ]
        assert len(found) == 1
        assert "skipped" not in capsys.readouterr().err


def test_only_the_first_few_of_many_damaged_pictures_are_named(folders):
    for path in (folders / "train").rglob("*.jpg"):
        damage(path)
    with pytest.raises(DataError, match="6 of 6 train images") as caught:
        data.load(folders)
    assert str(caught.value).count(".jpg") == 5


def test_skip_bad_goes_on_without_them_and_counts(folders, capsys):
    whole = data.load(folders)
    damage(folders / "train" / "jade" / "0.jpg")
    damage(folders / "val" / "amber" / "0.jpg")
    for _ in range(2):
        dataset = data.load(folders, skip_bad=True)
        assert dataset.train.labels.tolist() == [0, 0, 1, 2, 2]
        assert np.array_equal(dataset.train.images, whole.train.images[[0, 1, 3, 4, 5]])
        assert dataset.val.labels.tolist() == [1, 2]
        said = capsys.readouterr().err
        assert str(folders / "train" / "jade" / "0.jpg") in said
        assert "skipped 1 of 6 train images" in said
        assert "skipped 1 of 3 val images" in said


def test_skip_bad_does_not_go_on_without_any_image(folders):
    for path in (folders / "val").rglob("*.jpg"):
        damage(path)
    with pytest.raises(DataError, match="val images"):
        data.load(folders, skip_bad=True)


def test_a_link_to_a_missing_picture_is_a_damaged_one(folders, capsys):
    link = folders / "train" / "amber" / "2.jpg"
    link.symlink_to(folders / "moved.jpg")
    with pytest.raises(DataError, match="1 of 7 train images") as caught:
        data.load(folders)
    assert str(link) in str(caught.value)
    assert len(data.load(folders, skip_bad=True).train) == 6
    assert "skipped 1 of 7" in capsys.readouterr().err


def no_folder(root: Path) -> None:
    shutil.rmtree(root)


def no_train(root: Path) -> None:
    shutil.rmtree(root / "train")


def no_classes(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    (root / "train" / "loose.jpg").write_bytes(b"")


def nothing_at_all(root: Path) -> None:
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "val")


def one_class(root: Path) -> None:
    shutil.rmtree(root / "train" / "jade")
    shutil.rmtree(root / "train" / "violet")


def one_bare_class(root: Path) -> None:
    nothing_at_all(root)
    (root / "photos-of-me").mkdir()


def splits_of_other_names(root: Path) -> None:
    (root / "train").rename(root / "Training")
    (root / "val").rename(root / "validation")


def no_pictures_in_val(root: Path) -> None:
    for path in (root / "val").rglob("*.jpg"):
        path.unlink()


def no_pictures_in_train(root: Path) -> None:
    for path in (root / "train").rglob("*.jpg"):
        path.rename(path.with_suffix(".txt"))


def a_class_in_latin_1(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "jade").rename(os.fsdecode(os.fsencode(root / split) + b"/caf\xe9"))


def words_in_latin_1(root: Path) -> None:
    (root / "words.txt").write_bytes(b"jade\tpierre pr\xe9cieuse\n")


def unknown_class(root: Path) -> None:
    (root / "val" / "jade").rename(root / "val" / "emerald")


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (no_folder, "no such folder"),
        (no_train, "a folder val/, but no train/"),
        (
            nothing_at_all,
            "no class folders: wanted <class>/\\*, or train/<class>/\\* and val/<class>/",
        ),
        (one_class, "one class folder, amber/: wanted two or more"),
        (one_bare_class, "one class folder, photos-of-me/: wanted two or more"),
        (splits_of_other_names, "Training, validation, which look like splits"),
        (no_classes, "no class folders"),
        (no_pictures_in_val, "no images in .*val .looked for .bmp, .gif, "),
        (no_pictures_in_train, "no images in .*train .looked for .bmp, .gif, "),
        (a_class_in_latin_1, "class folder 'caf.*' is not UTF-8"),
        (words_in_latin_1, "words.txt is not UTF-8"),
        (unknown_class, "not a class of train/: 'emerald'"),
    ],
)
def test_what_cannot_be_understood_is_said_in_one_line(folders, break_it, words):
    break_it(folders)
    with pytest.raises(DataError, match=words) as caught:
        data.load(folders)
    assert str(folders) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_wnid_in_the_annotations_is_refused(tiny_shaped):
    path = tiny_shaped / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace("n02", "n77"))
    with pytest.raises(DataError, match="not a class of train/: 'n77'"):
        data.load(tiny_shaped)


def test_a_val_picture_without_annotation_is_refused(tiny_shaped, make_picture):
    make_picture(tiny_shaped / "val" / "images" / "val_3.JPEG", (0, 0, 0), 1)
    with pytest.raises(DataError, match="not a class"):
        data.load(tiny_shaped)


# The download


class Server(http.server.ThreadingHTTPServer):
    """Serves one file, understands Range, and can be told to misbehave."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = content
        self.ranges: list[str | None] = []
        self.cut_after: int | None = None
        """Hang up after so many bytes of the next answer."""
        self.reset = False
        """Hang up with a reset rather than in order."""
        self.understands_range = True
        self.url = f"http://127.0.0.1:{self.server_port}/archive.zip"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers["Range"]
        server.ranges.append(wanted)
        body = server.content
        if not self.path.endswith("archive.zip"):
            self.send_error(404)
            return
        if wanted and server.understands_range:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            body = body[start:]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cut_after is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: server.cut_after])
        self.wfile.flush()
        server.cut_after = None
        if server.reset:
            time.sleep(0.2)  # a reset overtakes what was sent just before
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *_arguments: object) -> None:
        pass


def zip_of(root_name: str, *, extra: int = 0) -> bytes:
    """A zip of two files in a folder, one of them of ``extra`` bytes that do not compress."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as bundle:
        bundle.writestr(f"{root_name}/wnids.txt", "n01\n")
        noise = np.random.default_rng(0).integers(0, 256, extra, dtype=np.uint8).tobytes()
        bundle.writestr(f"{root_name}/train/noise.bin", noise)
    return buffer.getvalue()


ARCHIVE = zip_of("photos", extra=5_000_000)
EXPECTED = {"md5": hashlib.md5(ARCHIVE).hexdigest(), "size": len(ARCHIVE)}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")  # a proxy of the machine knows nothing of this server
    with Server(ARCHIVE) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where to download to; the folder above it does not exist either."""
    return tmp_path / "data" / "photos"


def check_complete(target: Path) -> None:
    assert (target / "wnids.txt").read_text() == "n01\n"
    assert (target / "train" / "noise.bin").stat().st_size == 5_000_000
    assert os.listdir(target.parent) == [target.name]  # neither archive nor half a folder is left


def test_download_unpacks_and_leaves_nothing_else(server, target):
    data.download(target, url=server.url, **EXPECTED)
    check_complete(target)
    assert server.ranges == [None]


@pytest.mark.parametrize("reset", [False, True])
def test_download_goes_on_where_the_connection_was_cut(server, target, reset):
    server.cut_after, server.reset = 3_500_000, reset
    with pytest.raises(DataError) as caught:
        data.download(target, url=server.url, **EXPECTED)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    (part,) = target.parent.iterdir()
    have = part.stat().st_size
    assert 1_000_000 < have <= 3_500_000
    data.download(target, url=server.url, **EXPECTED)
    check_complete(target)
    assert server.ranges == [None, f"bytes={have}-"]


def test_download_starts_over_where_the_server_cannot_go_on(server, target):
    target.parent.mkdir()
    target.with_name("photos.zip.part").write_bytes(b"of an earlier download")
    server.understands_range = False
    data.download(target, url=server.url, **EXPECTED)
    check_complete(target)


@pytest.mark.parametrize("size", [EXPECTED["size"], EXPECTED["size"] - 1])
def test_a_file_with_another_checksum_is_refused_and_removed(server, target, size):
    with pytest.raises(DataError, match="not the file expected"):
        data.download(target, url=server.url, md5="0" * 32, size=size)
    assert list(target.parent.iterdir()) == []


def test_a_download_damaged_on_the_way_is_refused_and_the_next_is_whole(server, target):
    target.parent.mkdir()
    target.with_name("photos.zip.part").write_bytes(b"of another file altogether")
    with pytest.raises(DataError, match="not the file expected"):
        data.download(target, url=server.url, **EXPECTED)
    data.download(target, url=server.url, **EXPECTED)
    check_complete(target)


def test_offline_is_said_at_once_with_the_folder_that_would_do(target, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]  # free again, and closed, at the end of this block
    began = time.monotonic()
    with pytest.raises(DataError, match="cannot download") as caught:
        data.download(target, url=f"http://127.0.0.1:{port}/archive.zip", **EXPECTED)
    assert time.monotonic() - began < 5
    assert "\n" not in str(caught.value)
    assert str(target) in str(caught.value)
    assert "--data" in str(caught.value)
    assert not target.exists()


def test_a_server_that_says_nothing_is_given_up(target, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/archive.zip"
        with pytest.raises(DataError, match="timed out"):
            data.download(target, url=url, **EXPECTED, timeout=0.3)


def test_a_server_without_the_file_is_an_error_of_one_line(server, target):
    with pytest.raises(DataError, match="Not Found"):
        data.download(target, url=server.url + "x", **EXPECTED)
    assert not target.exists()


def test_half_an_unpacked_folder_never_has_the_name(server, target):
    broken = bytearray(ARCHIVE)
    broken[len(broken) // 2] ^= 1  # found only while it is unpacked, after the first file
    server.content = bytes(broken)
    expected = {"md5": hashlib.md5(broken).hexdigest(), "size": len(broken)}
    with pytest.raises((DataError, zipfile.BadZipFile)):
        data.download(target, url=server.url, **expected)
    assert not target.exists()
    # What is left of it does not get into the next try.
    with contextlib.suppress(FileNotFoundError):
        target.with_name("photos.zip.part").unlink()
    stray = target.with_name("photos.unpacking") / "photos" / "stray.txt"
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_text("of an earlier try")
    server.content = ARCHIVE
    data.download(target, url=server.url, **EXPECTED)
    check_complete(target)
    assert not (target / "stray.txt").exists()


def test_data_that_is_there_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.DEFAULT_ROOT.mkdir(parents=True)
    assert data.locate(None) == data.DEFAULT_ROOT
    assert data.locate(tmp_path / "mine") == tmp_path / "mine"
