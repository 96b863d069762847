"""Files that appear whole, and files and folders that one process at a time may have."""

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def candidate(path: Path) -> Iterator[Path]:
    """A file to write and to test under a name that nobody looks for and that is this process's
    own: it takes the place of ``path`` if nothing is raised, and is removed otherwise."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}.candidate")
    try:
        yield hidden
        os.replace(hidden, path)
    finally:
        with contextlib.suppress(OSError):
            hidden.unlink()


def remove_candidates(path: Path) -> None:
    """Remove what killed processes have left of candidates for ``path``, which nobody writes now.

    Raises :class:`OSError` where that cannot be done.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.candidate"):
        left.unlink()


@contextlib.contextmanager
def held(path: Path | str) -> Iterator[bool]:
    """Whether an existing file or folder is this process's alone inside of the body.

    True, too, where the system or the file system has no locks. Raises :class:`OSError` where it
    cannot be opened.
    """
    if fcntl is None:
        yield True
        return
    # A file to write: over NFS, others cannot be locked.
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_WRONLY | os.O_APPEND)
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have none
        pass
    return True
