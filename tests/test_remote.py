"""Images behind URIs; a file system that any machine has stands for the others."""

import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from tinyserve import images
from tinyserve.dataset import find_inputs
from tinyserve.errors import DataError, ImageError, UsageError

pytest.importorskip("pyarrow")


def test_what_is_below_a_uri_is_what_is_below_the_folder(samples):
    here = list(find_inputs([str(samples)]))
    there = list(find_inputs([samples.as_uri()]))
    assert sorted(item.path for item in there) == sorted(f"file://{item.path}" for item in here)
    labels = {f"file://{item.path}": item.label for item in here}
    assert {item.path: item.label for item in there} == labels
    for item in there[:3]:
        assert item.read() == Path(item.path.removeprefix("file://")).read_bytes()


def test_tiny_imagenets_val_is_labelled(tmp_path):
    images = tmp_path / "val" / "images"
    images.mkdir(parents=True)
    for number in (10, 2):
        (images / f"val_{number}.JPEG").write_bytes(b"")
    (tmp_path / "val" / "val_annotations.txt").write_text("val_2.JPEG\tn1\t\nval_10.JPEG\tn2\t\n")
    assert [item.label for item in find_inputs([(tmp_path / "val").as_uri()])] == ["n1", "n2"]


def test_annotations_that_cannot_be_read_are_an_error_and_may_change(tmp_path):
    folder = tmp_path / "val"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "val_0.JPEG").touch()
    annotations = folder / "val_annotations.txt"
    annotations.mkdir()
    with pytest.raises(DataError, match=rf"cannot read {annotations.as_uri()}: .*directory"):
        find_inputs([folder.as_uri()])
    annotations.rmdir()
    assert [item.label for item in find_inputs([folder.as_uri()])] == ["val"]
    for wnid in ("n1", "n02"):
        annotations.write_text(f"val_0.JPEG\t{wnid}\n")
        assert [item.label for item in find_inputs([folder.as_uri()])] == [wnid]


class Storage(http.server.BaseHTTPRequestHandler):
    """S3 as it answers those who may read one image, and who may list where ``lists`` is set."""

    lists = False

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        listing = b"<ListBucketResult><Name>bucket</Name><KeyCount>0</KeyCount></ListBucketResult>"
        self.answer(b"an image" if self.path.endswith(".jpg") else listing)

    def answer(self, body: bytes) -> None:
        allowed = self.path == "/bucket/val/images/1.jpg" or ("?" in self.path and self.lists)
        self.send_response(200 if allowed else 403)
        self.send_header("Content-Length", str(len(body) if body or not allowed else 8))
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("lists", [False, True])
def test_an_image_of_those_who_may_not_list_is_read_without_annotations(monkeypatch, lists):
    monkeypatch.setattr(Storage, "lists", lists)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Storage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = f"scheme=http&endpoint_override=127.0.0.1:{server.server_port}&region=us-east-1"
        try:
            uri = f"s3://key:secret@bucket/val/images/1.jpg?{options}"
            if lists:  # then they are there, and cannot be read
                with pytest.raises(DataError, match=r"val_annotations\.txt: .*ACCESS_DENIED"):
                    find_inputs([uri])
            else:
                (image,) = find_inputs([uri])
                assert (image.label, image.read()) == ("val", b"an image")
        finally:
            server.shutdown()


def test_options_are_not_in_the_rows(samples):
    uri = (samples / "goldfish").as_uri()
    paths = [item.path for item in find_inputs([f"{uri}?client_secret=x"])]
    assert paths == [item.path for item in find_inputs([uri])]


def test_one_file(samples):
    uri = (samples / "goldfish" / "val_68.JPEG").as_uri()
    (item,) = find_inputs([uri])
    assert (item.path, item.label) == (uri, "goldfish")


def test_the_uri_of_a_row_leads_to_its_image(samples, tmp_path):
    folder = tmp_path / "für [dich] #1 100% ?"
    folder.mkdir()
    content = (samples / "goldfish" / "val_68.JPEG").read_bytes()
    (folder / "mit Ü.jpg").write_bytes(content)
    (found,) = find_inputs([tmp_path.as_uri()])
    assert found.path == (folder / "mit Ü.jpg").as_uri().replace("[dich]", "%5Bdich%5D")
    assert found.label == folder.name
    (again,) = find_inputs([found.path])
    assert (again.path, again.label, again.read()) == (found.path, found.label, content)


def test_a_uri_with_spaces_and_accents_is_taken_as_it_is_written(tmp_path):
    (tmp_path / "Bilder für dich").mkdir()
    (tmp_path / "Bilder für dich" / "1.jpg").touch()
    (item,) = find_inputs([f"file://{tmp_path}/Bilder für dich"])
    assert item.path == (tmp_path / "Bilder für dich" / "1.jpg").as_uri()


def test_an_archive_behind_a_uri_is_to_be_downloaded(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.ZIP", "w") as archive:
        archive.writestr("1.jpg", b"")
    with pytest.raises(DataError, match=r"download .*images\.ZIP first"):
        find_inputs([(tmp_path / "images.ZIP").as_uri()])


def test_what_cannot_be_read_is_a_row_or_one_line(tmp_path):
    (tmp_path / "gone.jpg").touch()
    (item,) = find_inputs([tmp_path.as_uri()])
    (tmp_path / "gone.jpg").unlink()
    with pytest.raises(ImageError, match="cannot read"):
        item.read()
    for uri, error, words in (
        (tmp_path.as_uri(), DataError, "no images in"),
        ((tmp_path / "nowhere").as_uri(), DataError, "cannot list"),
        ("gopher://bucket/x", UsageError, "cannot read from gopher://bucket/x"),
    ):
        with pytest.raises(error, match=words) as raised:
            find_inputs([uri])
        assert "\n" not in str(raised.value)


def test_names_that_pyarrow_cannot_read_are_one_line(tmp_path):
    (tmp_path / "good.jpg").touch()
    Path(os.fsdecode(bytes(tmp_path) + b"/b\xff.jpg")).touch()
    with pytest.raises(DataError, match=r"cannot list .*utf-8") as raised:
        find_inputs([tmp_path.as_uri()])
    assert "\n" not in str(raised.value)


def test_too_large_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    (tmp_path / "large.jpg").write_bytes(bytes(11))
    (item,) = find_inputs([tmp_path.as_uri()])
    with pytest.raises(ImageError, match="too large: more than 10 bytes"):
        item.read()


@pytest.mark.parametrize("on_stdin", [False, True])
def test_classify_takes_uris(samples, on_stdin):
    uri = (samples / "goldfish").as_uri()
    run = subprocess.run(
        [sys.executable, "-m", "tinyserve.cli", "classify", "--device", "cpu",
         "--format", "jsonl", "-" if on_stdin else uri],
        input=uri if on_stdin else None, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert {json.loads(line)["label"] for line in run.stdout.splitlines()} == {"n01443537"}


def test_a_uri_on_stdin_that_cannot_be_read_is_a_row(samples, tmp_path, monkeypatch):
    good = (samples / "goldfish").as_uri()
    lines = f"{tmp_path.as_uri()}/nothing\nnowhere://x\n{good}\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    nothing, nowhere, *rest = find_inputs(["-"])
    assert nowhere.path == "nowhere://x"
    for item in (nothing, nowhere, *pickle.loads(pickle.dumps([nothing, nowhere]))):
        with pytest.raises(ImageError, match="cannot"):
            item.read()
    assert [item.label for item in rest] == ["goldfish"] * len(list(samples.glob("goldfish/*")))
