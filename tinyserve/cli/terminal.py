"""What commands show in the same way: columns, progress, and that some inputs failed."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

SOME_FAILED = 3
"""The exit code of a command that finished although some inputs failed."""


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


@contextlib.contextmanager
def progress(total: int | None, *, rows: bool = False) -> Iterator[Callable[..., object]]:
    """What to call with how many images are done, by default one, for the bar on stderr, if that is
    a terminal. Where rows are printed on a terminal, they show the progress themselves, and a bar
    would run through them."""
    if not sys.stderr.isatty() or (rows and sys.stdout.isatty()):
        yield lambda _=1: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="image", leave=False) as bar:
        yield bar.update
