"""What one process keeps for the next: JSON objects in ``tinyserve/`` in the cache folder."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def folder() -> Path:
    """``tinyserve/`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; it need not exist, and cannot where
    there is neither."""
    home = os.path.expanduser("~")
    for cache in (os.environ.get("XDG_CACHE_HOME", ""), os.path.join(home, ".cache")):
        if os.path.isabs(cache):
            return Path(cache, "tinyserve")
    return Path(os.devnull, "tinyserve")


def read(name: str) -> dict[str, Any]:
    """Empty where nothing has been kept, or what was is damaged."""
    try:
        known = json.loads((folder() / name).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def add(name: str, entries: dict[str, Any]) -> None:
    """Keep these beside the others; of two processes at once one's may be lost, never the file.

    Raises :class:`OSError` where it cannot be written.
    """
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps({**read(name), **entries}, indent=2) + "\n")
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
