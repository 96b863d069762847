"""Which images are meant, and which labels are known for them.

Images are files, or members of archives (:mod:`tinyserve.archives`). Three layouts carry labels:
class folders (``samples/goldfish/1.jpg``), Tiny ImageNet's train split
(``train/n01443537/images/n01443537_0.JPEG``) and its val split (``val/images/val_0.JPEG`` with
``val/val_annotations.txt`` beside the folder). Labels are matched by wnid or class name, never by
position.
"""

import functools
import glob
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyserve import images
from tinyserve.errors import DataError, UsageError
from tinyserve.images import SUFFIXES, is_image_name
from tinyserve.members import Member, failed, is_archive, is_remote

ANNOTATIONS = "val_annotations.txt"
_IMAGES_FOLDER = "images"
_NUMBERS = re.compile(r"([0-9]+)")
_AnnotationsIn = Callable[[str], dict[str, str] | None]


STDIN = "-"
"""In place of a path: paths come in on stdin, one a line."""


@dataclass(frozen=True, slots=True)
class Input:
    """One image to classify."""

    path: str
    """As it was found, below the path that the user gave; in an archive, the archive's and then
    the member's name."""
    label: str | None
    """What the layout says it shows (a wnid or a folder's name), if it says anything. Whether that
    is a class of the model is for the model to decide."""
    member: Member | None = None
    """Of an archive; None for a file of its own."""
    folders: tuple[str, ...] = ()
    """Where the label is a folder's name, those of the folders that it lies in, the nearest first,
    up to the one that the user named: where the label is no class of the model, the first of these
    that is."""

    @property
    def possible_labels(self) -> tuple[str | None, ...]:
        """The label and the folders: the first of them that is a class is what it shows."""
        return self.label, *self.folders

    def read(self) -> bytes:
        """The image file; :class:`~tinyserve.errors.ImageError` where it cannot be read."""
        return images.read(self.path) if self.member is None else self.member.read()

    @property
    def in_memory(self) -> int:
        """Bytes that it holds already."""
        return 0 if self.member is None else self.member.in_memory

    @property
    def version(self) -> str:
        """:func:`version_of` its path."""
        return version_of(self.path)


def version_of(path: str) -> str:
    """Size and time of a file, or of the archive that a path leads into; empty without a file, as
    URIs are."""
    while path:
        try:
            status = os.stat(path)
        except NotADirectoryError:  # "photos.zip/cat/1.jpg"
            path = os.path.dirname(path)
        except (OSError, ValueError):
            break
        else:
            return f"{status.st_size}-{status.st_mtime_ns}"
    return ""


def find_inputs(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Input]:
    """All images below the given files, folders (searched recursively), glob patterns, archives and
    URIs.

    Order: as given; inside a folder, sorted by path with numbers in numeric order; inside an
    archive, its own. A file that is named is taken whatever its name; in folders and globs only
    image files count. ``-`` stands for paths on stdin. Of folders, archives and stdin nothing is
    listed before it is asked for; of a glob all that it matches, and of a URI all that is below it,
    is listed at once, to be sorted.

    Raises :class:`DataError` at once for a path that does not exist or holds no image, and
    :class:`~tinyserve.errors.UsageError` where a package to read an archive is missing.
    """
    if isinstance(paths, str | bytes | os.PathLike):
        raise TypeError("find_inputs takes many paths: put a single one in a list")
    # Annotations are looked for once a folder, not once an image; and anew each time, for they may
    # have been rewritten.
    beside = functools.lru_cache(maxsize=1024)(_annotations_beside)
    labelled = functools.partial(with_label, annotations_in=beside)
    names = [os.fspath(path) for path in paths]
    if not all(isinstance(name, str) for name in names):
        raise TypeError("paths are str or pathlib's, not bytes: os.fsdecode makes them so")
    alone = len(names) == 1
    return itertools.chain.from_iterable([_below(name, labelled, alone=alone) for name in names])


def _below(path: str, labelled: Callable[[str], Input], *, alone: bool) -> Iterator[Input]:
    if path == STDIN:
        if sys.stdin is None:  # closed before the start, by <&-
            raise DataError("stdin is closed")
        return _listed(sys.stdin.buffer, labelled)
    if is_remote(path):
        return _not_empty(_remote(path), f"no images in {path}")
    if os.path.isdir(path):
        return _not_empty(_walked(path, labelled), no_images(path))
    if is_archive(path):
        found = _not_empty(_archived(path), f"no images in {path}")
        # Of many, each would be open, with its table of contents, until it is its turn.
        return found if alone else _archived(path)
    if os.path.lexists(path):
        return iter([labelled(path)])
    if glob.has_magic(path):
        matches = sorted(glob.iglob(path, recursive=True), key=_natural_key)
        return _not_empty(_matched(matches, labelled), f"no image matches {path}")
    raise DataError(f"no such file or folder: {path}")


def no_images(folder: str | os.PathLike[str]) -> str:
    """What is said of a folder without any."""
    return f"no images in {folder} (looked for {', '.join(sorted(SUFFIXES))})"


def _not_empty(found: Iterator[Input], otherwise: str) -> Iterator[Input]:
    first = next(found, None)
    if first is None:
        raise DataError(otherwise)
    return itertools.chain([first], found)


def _matched(paths: Sequence[str], labelled: Callable[[str], Input]) -> Iterator[Input]:
    """The images among these, and those below the folders among them, each once: ``**`` matches
    what is in a folder, too."""
    folders = {path.rstrip(os.sep) for path in paths if os.path.isdir(path)}
    for path in paths:
        bare = path.rstrip(os.sep)
        above = os.path.dirname(bare)
        while above not in folders and above != os.path.dirname(above):
            above = os.path.dirname(above)
        if above in folders:
            continue
        if bare in folders:
            yield from _walked(path, labelled)
        elif is_image_name(path):
            yield labelled(path)


def _listed(lines: Iterable[bytes], labelled: Callable[[str], Input]) -> Iterator[Input]:
    """Of the paths and URIs on stdin, one that does not exist is an input that fails, as is an
    archive or a URI that cannot be listed."""
    for line in lines:
        path = os.fsdecode(line.rstrip(b"\r\n"))
        if os.path.isdir(path):
            yield from _walked(path, labelled)
        elif is_archive(path) or is_remote(path):
            try:
                yield from _archived(path) if is_archive(path) else _remote(path)
            except (DataError, UsageError) as error:
                yield Input(path, None, failed(path, str(error)))
        elif path:
            yield labelled(path)


def _archived(path: str) -> Iterator[Input]:
    from tinyserve import archives

    archives.needs(path)

    @functools.cache
    def all_annotations() -> dict[str, dict[str, str]]:
        """By folder: a zip archive's table of contents is long, and is gone through once."""
        return {
            folder: _parse_annotations(text, path)
            for folder, text in archives.read_texts(path, ANNOTATIONS).items()
        }

    def annotations(folder: str) -> dict[str, str] | None:
        return all_annotations().get(folder)

    for member in archives.members(path):
        if not member.name:
            yield Input(path, None, member)
            continue
        # Some zip files are written with Windows' separators.
        name = member.name.replace("\\", "/")
        label: str | None = member.label
        folders: tuple[str, ...] = ()
        if label is None:
            label, folders = _label(name, annotations, "")
        yield Input(f"{path}/{member.name}", label, member, folders)


def _remote(uri: str) -> Iterator[Input]:
    from tinyserve import remote

    @functools.cache
    def annotations(folder: str) -> dict[str, str] | None:
        text = remote.read_text(uri, f"{folder}/{ANNOTATIONS}")
        return None if text is None else _parse_annotations(text, uri)

    root, found = remote.members(uri)
    for member in sorted(found, key=lambda member: _natural_key(member.name)):
        label, folders = _label(member.name, annotations, None if member.name == root else root)
        yield Input(remote.uri_of(member.name, uri), label, member, folders)


def walk_images(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Paths of the image files below a folder, sorted; links to folders are followed unless they
    lead round in a circle. A folder that cannot be read is among the paths itself."""
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [(os.fspath(folder), ())]
    while waiting:
        path, above = waiting.pop()
        # Names and no more: of these, a folder may hold a million.
        found: list[str] = []
        folders: list[str] = []
        try:
            status = os.stat(path)
            here = (status.st_dev, status.st_ino)
            if here in above:
                continue
            with os.scandir(path) as entries:
                for entry in entries:
                    if _is_folder(entry):
                        folders.append(entry.name)
                    elif is_image_name(entry.name):
                        found.append(entry.name)
        except OSError:
            yield path
            continue
        found.sort(key=_natural_key)
        for name in found:
            yield os.path.join(path, name)
        del found
        folders.sort(key=_natural_key, reverse=True)
        waiting += [(os.path.join(path, name), (*above, here)) for name in folders]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether to look inside. Where that cannot be told, as of a link that leads to itself, too: it
    fails there, by itself, and the rest of its folder is found."""
    try:
        return entry.is_dir()
    except OSError:
        return True


def read_annotations(path: str | os.PathLike[str]) -> dict[str, str]:
    """File name to wnid, from a ``val_annotations.txt`` of Tiny ImageNet.

    Raises :class:`DataError` where it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows' editors put a mark before it
    except (OSError, ValueError) as error:  # other bytes than UTF-8 are a ValueError
        raise DataError(f"cannot read {path}: {error}") from error
    return _parse_annotations(text, str(path))


def _parse_annotations(text: str, path: str) -> dict[str, str]:
    labels = {}
    for line in text.splitlines():
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if not wnid:
            raise DataError(f"{path}: not a line of Tiny ImageNet annotations: {line[:60]!r}")
        labels[name] = wnid
    return labels


def _annotations_beside(folder: str) -> dict[str, str] | None:
    path = os.path.join(folder, ANNOTATIONS)
    return _annotations_of(path, version_of(path)) if os.path.exists(path) else None


@functools.lru_cache(maxsize=16)
def _annotations_of(path: str, _version: str) -> dict[str, str]:
    """Read once, as long as the file has this version."""
    return read_annotations(path)


def _walked(root: str, labelled: Callable[..., Input]) -> Iterator[Input]:
    above = _absolute(root)
    return (labelled(path, root=above) for path in walk_images(root))


def with_label(
    path: str,
    annotations_in: _AnnotationsIn = _annotations_beside,
    *,
    root: str | None = None,
) -> Input:
    """An image file, with the label that its place says, below ``root``, an absolute path."""
    label, folders = _label(_absolute(path), annotations_in, root)
    return Input(path, label, None, folders)


def _absolute(path: str) -> str:
    try:
        return os.path.abspath(path)
    except OSError:  # the folder that we are in was removed
        return path


def _label(
    path: str, annotations_in: _AnnotationsIn, root: str | None = None
) -> tuple[str | None, tuple[str, ...]]:
    """:attr:`Input.label` and :attr:`Input.folders`, the latter where there is a ``root``."""
    folder, name = os.path.split(path)
    folders = () if root is None else _folders(folder, root)
    if os.path.basename(folder) == _IMAGES_FOLDER:
        folder = os.path.dirname(folder)
        annotations = annotations_in(folder)
        if annotations is not None:
            return annotations.get(name), ()
    # The same object for all images of a class.
    return sys.intern(os.path.basename(folder)) or None, folders


@functools.lru_cache(maxsize=1024)
def _folders(folder: str, root: str) -> tuple[str, ...]:
    """The names of a folder and of those above it up to ``root``."""
    names: list[str] = []
    while True:
        folder_above, name = os.path.split(folder)
        if not name:
            return tuple(names)
        names.append(name)
        if folder == root:
            return tuple(names)
        folder = folder_above


def _natural_key(name: str) -> str:
    """Sort key that puts ``val_2`` before ``val_10``: each number begins with its length."""
    return _NUMBERS.sub(_with_length, name)


def _with_length(number: re.Match[str]) -> str:
    digits = number[0].lstrip("0")
    zeros = len(number[0]) - len(digits)
    return f"\0{chr(len(digits))}{digits}{chr(max(0, 255 - zeros))}"
