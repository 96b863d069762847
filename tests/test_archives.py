"""Images inside zip and tar archives and Parquet tables."""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import sys
import tarfile
import zipfile

import pytest

from tinyserve import archives, images
from tinyserve.dataset import Input, find_inputs
from tinyserve.errors import DataError, ImageError, UsageError


@pytest.fixture
def jpeg(samples) -> bytes:
    return (samples / "goldfish" / "val_68.JPEG").read_bytes()


@pytest.fixture
def make_archive(tmp_path, jpeg):
    """Makes an archive of members with the one picture, by its suffix."""

    def make(name: str, members: list[str]) -> str:
        path = tmp_path / name
        if name.endswith(".zip"):
            with zipfile.ZipFile(path, "w") as archive:
                for member in members:
                    archive.writestr(member, jpeg)
        else:
            mode = {".gz": "w:gz", ".xz": "w:xz", ".tgz": "w:gz"}.get(path.suffix, "w")
            with tarfile.open(path, mode) as archive:
                for member in members:
                    info = tarfile.TarInfo(member)
                    info.size = len(jpeg)
                    archive.addfile(info, io.BytesIO(jpeg))
        return str(path)

    return make


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.TGZ", "a.tar.xz"])
def test_archives_are_read_in_place(make_archive, jpeg, name, tmp_path):
    path = make_archive(name.lower(), ["goldfish/1.jpg", "notes.txt", "teapot/2.JPEG", "top.png"])
    found = list(find_inputs([path]))
    assert [item.path for item in found] == [
        f"{path}/goldfish/1.jpg", f"{path}/teapot/2.JPEG", f"{path}/top.png"
    ]  # fmt: skip
    assert [item.label for item in found] == ["goldfish", "teapot", None]
    assert all(item.read() == jpeg for item in found)
    assert [entry.name for entry in tmp_path.iterdir()] == [name.lower()]


def test_the_official_archive_carries_its_labels(tmp_path, jpeg):
    path = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for member in ("train/n01443537/images/n01443537_0.JPEG", "val/images/val_0.JPEG"):
            archive.writestr(f"tiny-imagenet-200/{member}", jpeg)
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", "val_0.JPEG\tn03444034\t0\n")
    assert [item.label for item in find_inputs([str(path)])] == ["n01443537", "n03444034"]


def test_labels_in_an_archive_that_was_replaced_are_read_anew(tmp_path, jpeg):
    path = tmp_path / "a.zip"
    for wnid in ("n1", "n02"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("val/images/val_0.JPEG", jpeg)
            archive.writestr("val/val_annotations.txt", f"val_0.JPEG\t{wnid}\n")
        assert [item.label for item in find_inputs([str(path)])] == [wnid]


def how_many_open(paths: list[str]) -> int:
    """Descriptors of these files, whatever else this process has open."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the list itself
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sum(path in paths for path in found)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_few_of_many_archives_are_open_at_a_time(make_archive, jpeg, suffix):
    paths = [make_archive(f"{number}{suffix}", ["1.jpg", "2.jpg"]) for number in range(60)]
    inputs = find_inputs(paths)
    assert how_many_open(paths) == 0
    found = list(inputs)
    assert len(found) == 120
    for item in [*found, *found[::-1]]:
        assert item.read() == jpeg
        assert how_many_open(paths) <= 16
    del found, item
    assert how_many_open(paths) == 0


def read_or_why(item: Input) -> bytes | str:
    try:
        return item.read()
    except ImageError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["fork", "spawn"])
def test_members_of_a_zip_are_read_in_other_processes(make_archive, jpeg, kind):
    if kind not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {kind} here")
    names = [f"{number}.jpg" for number in range(200)]
    inputs = list(find_inputs([make_archive("a.zip", names)]))
    with multiprocessing.get_context(kind).Pool(4) as pool:
        assert set(pool.map(read_or_why, inputs, chunksize=5)) == {jpeg}


def test_members_of_a_zip_that_was_replaced_are_errors(make_archive, jpeg):
    path = make_archive("a.zip", ["1.jpg"])
    (item,) = find_inputs([path])
    os.rename(make_archive("b.zip", ["longer.jpg", "1.jpg"]), path)
    assert item.read() == jpeg  # as long as the old one is open
    archives._OPEN.clear()
    assert read_or_why(item) == "cannot be unpacked: the archive was changed"
    os.unlink(path)
    assert read_or_why(item).startswith("cannot be unpacked: [Errno 2] No such file")


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_inputs_can_be_sent_compared_and_printed(make_archive, jpeg, suffix):
    inputs = list(find_inputs([make_archive(f"a{suffix}", ["cat/1.jpg", "2.jpg"])]))
    again = pickle.loads(pickle.dumps(inputs))
    assert again == inputs
    assert again[0] != inputs[1]
    assert [item.read() for item in again] == [jpeg, jpeg]
    assert len(repr(inputs)) < 1000


def test_separators_of_windows_in_a_zip_lead_to_labels(tmp_path, jpeg):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for member in (r"goldfish\1.jpg", r"val\images\val_0.JPEG"):
            archive.writestr(member, jpeg)
        archive.writestr(r"val\val_annotations.txt", "\ufeffval_0.JPEG\tn03444034\t0\n")
    assert [item.label for item in find_inputs([str(path)])] == ["goldfish", "n03444034"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_names_that_lead_outside_are_only_names(make_archive, jpeg, name, tmp_path):
    path = make_archive(name, ["../../outside.jpg", "/etc/absolute.jpg"])
    found = list(find_inputs([path]))
    assert len(found) == 2
    assert all(item.read() == jpeg for item in found)
    assert not (tmp_path.parent / "outside.jpg").exists()


def test_a_bomb_is_refused_without_being_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 1_000_000)
    for name in ("a.zip", "a.tar.gz"):
        path = tmp_path / name
        if name == "a.zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("bomb.png", bytes(5_000_000))
        else:
            with tarfile.open(path, "w:gz") as archive:
                info = tarfile.TarInfo("bomb.png")
                info.size = 5_000_000
                archive.addfile(info, io.BytesIO(bytes(info.size)))
        assert path.stat().st_size < 100_000
        (item,) = find_inputs([str(path)])
        with pytest.raises(ImageError, match="too large"):
            item.read()


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.parquet"])
def test_an_archive_that_is_none_is_one_input_that_fails(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"no archive at all" * 100)
    (item,) = find_inputs([str(path)])
    assert item.path == str(path)
    with pytest.raises(ImageError, match="cannot read the archive"):
        item.read()


def test_the_members_before_the_damage_are_read(make_archive, jpeg, tmp_path):
    path = make_archive("a.tar", [f"cat/{number}.jpg" for number in range(20)])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2 + 700])
    *good, last = find_inputs([path])
    assert 5 <= len(good) < 20
    assert all(item.read() == jpeg for item in good)
    assert last.path == path
    with pytest.raises(ImageError, match="cannot read the archive"):
        last.read()


@pytest.mark.parametrize("damage", ["cut off", "cut off before it", "overwritten"])
def test_a_damaged_header_is_not_the_end_of_a_tar(make_archive, jpeg, tmp_path, damage):
    path = make_archive("a.tar", [f"cat/{number}.jpg" for number in range(9)])
    content = bytearray((tmp_path / "a.tar").read_bytes())
    header = content.index(b"cat/4.jpg")
    if damage == "cut off":
        del content[header + 300 :]
    elif damage == "cut off before it":
        del content[header:]
    else:
        content[header + 148 : header + 156] = b"0000000\0"  # its checksum
    (tmp_path / "a.tar").write_bytes(content)
    *good, last = find_inputs([path])
    assert [item.path for item in good] == [f"{path}/cat/{number}.jpg" for number in range(4)]
    assert all(item.read() == jpeg for item in good)
    words = "it ends" if damage == "cut off before it" else "damaged"
    with pytest.raises(ImageError, match=f"the archive: {words} after {header:,} bytes"):
        last.read()


def test_a_damaged_member_leaves_the_others_alone(make_archive, jpeg, tmp_path):
    path = make_archive("a.zip", ["1.jpg", "2.jpg"])
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[content.index(jpeg) + 700] ^= 1
    (tmp_path / "a.zip").write_bytes(content)
    damaged, whole = find_inputs([path])
    with pytest.raises(ImageError, match="cannot be unpacked"):
        damaged.read()
    assert whole.read() == jpeg


def test_an_archive_without_images_is_an_error(make_archive):
    with pytest.raises(DataError, match="no images in"):
        find_inputs([make_archive("a.zip", ["notes.txt"])])


def test_tables_hold_images_as_bytes_or_as_datasets_writes_them(tmp_path, jpeg):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    plain = tmp_path / "plain.parquet"
    parquet.write_table(
        pa.table({"id": [1, 2], "image": [jpeg, None], "label": ["goldfish", "teapot"]}), plain
    )
    first, empty = find_inputs([str(plain)])
    assert (first.path, first.label, first.read()) == (f"{plain}/0", "goldfish", jpeg)
    with pytest.raises(ImageError, match="no image in this row"):
        empty.read()

    features = {"info": {"features": {"label": {"names": ["goldfish", "teapot"]}}}}
    table = pa.table({"img": [{"bytes": jpeg, "path": None}] * 3, "label": [1, 0, -1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, tmp_path / "theirs.parquet")
    found = list(find_inputs([str(tmp_path / "theirs.parquet")]))
    assert [item.label for item in found] == ["teapot", "goldfish", None]
    assert all(item.read() == jpeg for item in found)


def test_a_table_without_images_is_one_input_that_fails(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"x": [1.5]}), tmp_path / "numbers.parquet")
    (item,) = find_inputs([str(tmp_path / "numbers.parquet")])
    with pytest.raises(ImageError, match="no column of images among x"):
        item.read()


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view"])
def test_bytes_are_read_however_arrow_keeps_them(tmp_path, jpeg, kind):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    column = pa.array([jpeg, None], getattr(pa, kind)())
    parquet.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    image, nothing = find_inputs([str(tmp_path / "a.parquet")])
    assert image.read() == jpeg
    with pytest.raises(ImageError, match="no image in this row"):
        nothing.read()


def test_of_several_columns_of_bytes_none_is_guessed(tmp_path, jpeg):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pa.table({"id": [b"1"], "picture": [jpeg]}), path)
    (found,) = find_inputs([str(path)])
    with pytest.raises(ImageError, match="which of the columns id, picture has the images"):
        found.read()


def test_a_row_without_an_image_keeps_its_label(tmp_path, jpeg):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"image": [jpeg, None], "label": ["cat", "dog"]}), path)
    assert [item.label for item in find_inputs([str(path)])] == ["cat", "dog"]


def test_a_row_that_is_too_large_is_no_image(tmp_path, jpeg, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    monkeypatch.setattr(images, "MAX_BYTES", 100_000)
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"image": [jpeg, bytes(100_001)]}), path)
    good, bomb = find_inputs([str(path)])
    assert good.read() == jpeg
    with pytest.raises(ImageError, match="too large: 100,001 bytes"):
        bomb.read()


def test_without_pyarrow_a_table_says_what_it_needs(tmp_path, make_archive, monkeypatch):
    (tmp_path / "a.parquet").touch()
    lines = f"{tmp_path}/a.parquet\n{make_archive('a.zip', ['cat/1.jpg'])}\n".encode()
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # importing it raises ModuleNotFoundError
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    words = r"a\.parquet: Parquet needs: pip install"
    with pytest.raises(UsageError, match=words):
        find_inputs([str(tmp_path / "a.parquet")])
    table, image = find_inputs(["-"])
    assert (table.path, image.label) == (str(tmp_path / "a.parquet"), "cat")
    with pytest.raises(ImageError, match=words):
        table.read()


def test_links_are_inputs_that_fail(tmp_path, jpeg):
    path = tmp_path / "a.tar"
    (tmp_path / "1.jpg").write_bytes(jpeg)
    (tmp_path / "2.jpg").hardlink_to(tmp_path / "1.jpg")
    (tmp_path / "3.jpg").symlink_to("1.jpg")
    with tarfile.open(path, "w") as archive:
        for name in ("1.jpg", "2.jpg", "3.jpg"):
            archive.add(tmp_path / name, f"cat/{name}")
    file, *links = find_inputs([str(path)])
    assert file.read() == jpeg
    assert [link.label for link in links] == ["cat", "cat"]
    for link in links:
        with pytest.raises(ImageError, match="a link"):
            link.read()


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_what_macos_notes_beside_an_image_is_none(make_archive, name):
    path = make_archive(name, ["cat/1.jpg", "__MACOSX/cat/._1.jpg", "cat/._1.jpg"])
    assert [item.path for item in find_inputs([path])] == [f"{path}/cat/1.jpg"]


def test_a_zip_is_looked_through_once_for_annotations(tmp_path, jpeg, monkeypatch):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(30):
            archive.writestr(f"train/n{number:08}/images/0.JPEG", jpeg)
    opened = []
    read_texts = archives.read_texts
    monkeypatch.setattr(
        archives, "read_texts", lambda *names: (opened.append(names), read_texts(*names))[1]
    )
    assert len(list(find_inputs([str(path)]))) == 30
    assert len(opened) == 1


def test_annotations_that_cannot_be_unpacked_are_an_error(tmp_path, jpeg):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("val/images/val_0.JPEG", jpeg)
        archive.writestr("val/val_annotations.txt", "val_0.JPEG\tn03444034\t0\n")
    content = bytearray(path.read_bytes())
    content[content.index(b"n03444034")] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"val_annotations\.txt"):
        list(find_inputs([str(path)]))
