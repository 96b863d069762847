"""The standard streams, which may have been closed before the start, or lose their readers."""

import os
import sys


def prepare() -> None:
    """Open those that are closed, for nothing, and let every name be printed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # It gets the lowest number that is free, which is this one. Otherwise an output would
            # get it, and what C libraries say on stderr would be written in there.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # File names need not be valid in the terminal's encoding, and printing must not fail.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def announce(*lines: str) -> None:
    """Print what a server has to say as it starts; that nobody reads it does not stop it."""
    try:
        print(*lines, sep="\n", flush=True)
    except OSError:
        let_go_of_stdout()


def let_go_of_stdout() -> None:
    """What could not be written must not fail once more, and aloud, when Python closes stdout."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
