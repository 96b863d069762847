"""Which files are meant, and which labels are known for them.

Three layouts carry labels: class folders (``samples/goldfish/1.jpg``), Tiny ImageNet's train split
(``train/n01443537/images/n01443537_0.JPEG``) and its val split (``val/images/val_0.JPEG`` with
``val/val_annotations.txt`` beside the folder). Labels are matched by wnid or class name, never by
position.
"""

import functools
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyserve import images
from tinyserve.errors import DataError
from tinyserve.images import SUFFIXES

ANNOTATIONS = "val_annotations.txt"
_IMAGES_FOLDER = "images"
_NUMBERS = re.compile(r"([0-9]+)")


@dataclass(frozen=True, slots=True)
class Input:
    """One image to classify."""

    path: str
    """As it was found, below the path that the user gave."""
    label: str | None
    """What the layout says it shows (a wnid or a folder's name), if it says anything. Whether that
    is a class of the model is for the model to decide."""

    def read(self) -> bytes:
        """The image file; :class:`~tinyserve.errors.ImageError` where it cannot be read."""
        return images.read(self.path)


def find_inputs(paths: Sequence[str]) -> list[Input]:
    """All images below the given files, folders (searched recursively) and glob patterns.

    Order: as given; inside a folder, sorted by path with numbers in numeric order. A file that is
    named is taken whatever its name; in folders and globs only image files count. Raises
    :class:`DataError` for a path that does not exist and where nothing is found at all.
    """
    found: list[Input] = []
    for path in paths:
        before = len(found)
        if os.path.isdir(path):
            found.extend(_with_label(p) for p in walk_images(path))
            if len(found) == before:
                raise DataError(f"no images in {path} (looked for {', '.join(sorted(SUFFIXES))})")
        elif os.path.lexists(path):
            found.append(_with_label(path))
        elif glob.has_magic(path):
            for match in sorted(glob.glob(path, recursive=True), key=_natural_key):
                if os.path.isdir(match):
                    found.extend(_with_label(p) for p in walk_images(match))
                elif _is_image(match):
                    found.append(_with_label(match))
            if len(found) == before:
                raise DataError(f"no image matches {path}")
        else:
            raise DataError(f"no such file or folder: {path}")
    return found


def walk_images(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Paths of the image files below a folder, sorted; links to folders are not followed."""
    for root, folders, files in os.walk(folder):
        folders.sort(key=_natural_key)
        for name in sorted(files, key=_natural_key):
            if _is_image(name):
                yield os.path.join(root, name)


@functools.lru_cache(maxsize=16)
def read_annotations(path: str | os.PathLike[str]) -> dict[str, str]:
    """File name to wnid, from a ``val_annotations.txt`` of Tiny ImageNet."""
    labels = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if not wnid:
            raise DataError(f"{path}: not a line of Tiny ImageNet annotations: {line[:60]!r}")
        labels[name] = wnid
    return labels


def _with_label(path: str) -> Input:
    folder, name = os.path.split(os.path.abspath(path))
    if os.path.basename(folder) == _IMAGES_FOLDER:
        parent = os.path.dirname(folder)
        annotations = _annotations_beside(parent)
        if annotations is not None:
            return Input(path, annotations.get(name))
        return Input(path, os.path.basename(parent))
    return Input(path, os.path.basename(folder))


@functools.lru_cache(maxsize=1024)
def _annotations_beside(folder: str) -> dict[str, str] | None:
    path = os.path.join(folder, ANNOTATIONS)
    return read_annotations(path) if os.path.exists(path) else None


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts ``val_2`` before ``val_10``."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in _NUMBERS.split(name)
    ]
