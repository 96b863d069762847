"""Images inside other files, read in place: zip and tar archives, and tables in Parquet.

Nothing is ever written to disk, so member names like ``../../etc`` are only names. Members larger
than an image can be are refused, however small they are when compressed; of a table, only after a
few rows of it were unpacked together.
"""

import contextlib
import json
import os
import posixpath
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from itertools import repeat
from typing import Any

from tinyserve import images
from tinyserve.errors import DataError, ImageError, UsageError, first_line
from tinyserve.members import TARS, Member, failed

_IMAGE_COLUMNS = ("image", "img", "bytes", "content", "data")
"""Names looked for first among a table's columns that hold bytes."""
_ROWS = 16  # of a table that are in memory at a time


def needs(path: str) -> None:
    """Raise :class:`~tinyserve.errors.UsageError` where a package to read an archive is missing."""
    if path.lower().endswith(".parquet"):
        try:
            import pyarrow.parquet  # noqa: F401
        except ModuleNotFoundError as error:
            raise UsageError(f"{path}: Parquet needs: pip install 'tinyserve[parquet]'") from error


def members(path: str) -> Iterator[Member]:
    """The images in an archive, in its own order.

    Where an archive turns out to be damaged, the last member has no name and its reading fails.
    """
    lower = path.lower()
    if lower.endswith(".zip"):
        found = _zipped(path)
    elif lower.endswith(TARS):
        found = _tarred(path)
    else:
        found = _rows(path)
    try:
        yield from found
    except Exception as error:  # each compression has an error class of its own
        yield failed("", f"cannot read the archive: {first_line(error)}")


def read_texts(path: str, name: str) -> dict[str, str]:
    """The text files of this name in a zip archive, by their folders; none for other archives, of
    which no part can be read before it is its turn.

    Raises :class:`~tinyserve.errors.DataError` where one cannot be unpacked.
    """
    if not path.lower().endswith(".zip"):
        return {}
    texts = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            folder, base = posixpath.split(info.filename.replace("\\", "/"))
            if base == name:
                try:
                    texts[folder] = _unzip(archive, info).decode("utf-8-sig", errors="replace")
                except ImageError as error:
                    raise DataError(f"{path}/{info.filename}: {error}") from error
    return texts


def _zipped(path: str) -> Iterator[Member]:
    archive = _Zip(path)
    for info in archive.opened().infolist():
        if not info.is_dir() and images.is_image_name(info.filename):
            yield Member(info.filename, None, partial(_unzip_from, archive, info))


class _Zip:
    """A zip archive whose members may be read long after they were listed, in other threads and in
    other processes: it is opened as often as that takes, and few are open at a time."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._version = self._current_version()

    def opened(self) -> zipfile.ZipFile:
        """Raises :class:`OSError` where that fails, or it is not the file any more that it was."""
        process, archive = _OPEN.get(id(self), (0, None))
        # A forked process shares the place that the next byte is read from with its parent.
        if archive is None or process != os.getpid():
            if self._current_version() != self._version:
                raise OSError("the archive was changed")
            archive = zipfile.ZipFile(self._path)
            _OPEN[id(self)] = os.getpid(), archive
        with contextlib.suppress(KeyError):
            _OPEN.move_to_end(id(self))
            while len(_OPEN) > _MOST_OPEN:
                _OPEN.popitem(last=False)  # closed when nobody reads from it any more
        return archive

    def __del__(self) -> None:
        _OPEN.pop(id(self), None)

    def _current_version(self) -> tuple[int, int, int]:
        status = os.stat(self._path)
        return status.st_ino, status.st_size, status.st_mtime_ns


_MOST_OPEN = 16
_OPEN: OrderedDict[int, tuple[int, zipfile.ZipFile]] = OrderedDict()
"""By their :class:`_Zip`'s identity, with the process that opened them; the last used come last."""


def _unzip_from(archive: _Zip, info: zipfile.ZipInfo) -> bytes:
    try:
        opened = archive.opened()
    except (OSError, zipfile.BadZipFile) as error:
        raise ImageError(f"cannot be unpacked: {first_line(error)}") from error
    return _unzip(opened, info)


def _unzip(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(info) as file:
            return images.read_from(file)
    except ImageError:
        raise
    except Exception as error:  # each compression has an error class of its own
        raise ImageError(f"cannot be unpacked: {first_line(error)}") from error


_BROKEN_HEADERS = (
    tarfile.EmptyHeaderError,  # type: ignore[attr-defined]
    tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
    tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
)


class _Header(tarfile.TarInfo):
    """A member's header. One that is damaged, cut off or missing raises; to :mod:`tarfile` it would
    be the end of the archive, if it is not the first. A whole archive ends with empty blocks."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(archive)
        except _BROKEN_HEADERS as error:
            if not archive.offset:
                raise
            if isinstance(error, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
                raise ValueError(
                    f"it ends after {archive.offset:,} bytes, without a mark of the end: cut off, "
                    "or never finished"
                ) from error
            raise ValueError(f"damaged after {archive.offset:,} bytes: {error}") from error


def _tarred(path: str) -> Iterator[Member]:
    # As a stream: compressed ones cannot be read in any other order in reasonable time.
    with tarfile.open(path, "r|*", tarinfo=_Header) as archive:
        while info := archive.next():
            archive.members = []  # type: ignore[attr-defined]  # it would grow with every member
            if not images.is_image_name(info.name):
                continue
            if info.issym() or info.islnk():
                yield failed(info.name, "a link; unpack the archive to follow it")
                continue
            if not info.isfile():
                continue
            file = archive.extractfile(info)
            if file is None or info.size > images.MAX_BYTES:
                yield failed(info.name, images.too_large(info.size))
                continue
            data = images.read_from(file)
            yield Member(info.name, None, partial(bytes, data), len(data))


def _rows(path: str) -> Iterator[Member]:
    import pyarrow.compute as compute
    import pyarrow.parquet
    import pyarrow.types as types

    with pyarrow.parquet.ParquetFile(path) as table:
        schema = table.schema_arrow
        image = _image_column(schema)
        columns = [image] + (["label"] if "label" in schema.names else [])
        names = _label_names(schema)
        number = 0
        for batch in table.iter_batches(_ROWS, columns=columns):
            files = batch.column(image)
            if types.is_struct(files.type):
                files = compute.struct_field(files, "bytes")
            if types.is_binary_view(files.type):  # of which lengths are not computed
                files = files.cast(pyarrow.large_binary())
            labels = batch.column("label").to_pylist() if "label" in columns else repeat(None)
            # Of what is no image, not even a copy.
            lengths = compute.binary_length(files).to_pylist()
            for file, length, label in zip(files, lengths, labels, strict=False):
                if names is not None and isinstance(label, int) and 0 <= label < len(names):
                    label = names[label]
                label = label if isinstance(label, str) else None
                if length is None:
                    yield failed(str(number), "no image in this row", label)
                elif length > images.MAX_BYTES:
                    yield failed(str(number), images.too_large(length), label)
                else:
                    yield Member(str(number), label, partial(bytes, file.as_py()), length)
                number += 1


def _image_column(schema: Any) -> str:
    """Of bytes, or, as Hugging Face's ``datasets`` writes it, of structures with ``bytes``."""
    import pyarrow.types as types

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
        kinds = (types.is_binary, types.is_large_binary, types.is_binary_view)
        return any(is_kind(kind) for is_kind in kinds)

    usable = [field.name for field in schema if holds_bytes(field.type)]
    if not usable:
        raise ValueError(f"no column of images among {', '.join(schema.names)}")
    named = [name for name in _IMAGE_COLUMNS if name in usable]
    if not named and len(usable) > 1:
        raise ValueError(f"which of the columns {', '.join(usable)} has the images? Call it image")
    return (named or usable)[0]


def _label_names(schema: Any) -> list[str] | None:
    """The classes that numbers in ``label`` stand for, as ``datasets`` notes them."""
    try:
        notes = json.loads(schema.metadata[b"huggingface"])
        names = notes["info"]["features"]["label"]["names"]
    except (TypeError, KeyError, ValueError):
        return None
    return [str(name) for name in names]
