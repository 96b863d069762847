"""Images that are no files of their own but inside archives or behind URIs.

What reads archives, :mod:`tinyserve.archives`, takes a while to import: that is done when one is
met.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

from tinyserve.errors import ImageError

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
SUFFIXES_OF_ARCHIVES = (".zip", *TARS, ".parquet")


@dataclass(frozen=True, slots=True)
class Member:
    """One image inside an archive, or behind a URI."""

    name: str
    """Inside the archive, with ``/``; of a table's row its number, from 0."""
    label: str | None
    """The table's own label; None in archives of files, where folders may tell."""
    read: Callable[[], bytes] = field(compare=False, repr=False)
    """The image file, or :class:`~tinyserve.errors.ImageError`."""
    in_memory: int = 0
    """Bytes that it holds already."""


def is_archive(path: str) -> bool:
    return path.lower().endswith(SUFFIXES_OF_ARCHIVES) and os.path.isfile(path)


def is_remote(path: str) -> bool:
    return "://" in path


def failed(name: str, reason: str, label: str | None = None) -> Member:
    """A member that cannot be read; it can be pickled."""
    return Member(name, label, partial(_fail, reason))


def _fail(reason: str) -> NoReturn:
    raise ImageError(reason)
