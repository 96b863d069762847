"""What is worth knowing of a run or its data, said once on every machine."""

import os
import sys


def speaks() -> bool:
    """Whether this is the first process of its machine. It says what is wrong, too, for that may be
    wrong on one machine alone."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def note(words: str) -> None:
    """Say something on stderr that stops nothing."""
    if speaks():
        print(f"note: {words}", file=sys.stderr)
