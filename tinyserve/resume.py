"""Going on with a job that was interrupted: which of its rows hold, and what is left to do."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from tinyserve.classifier import Classifier, Result
from tinyserve.dataset import Input, version_of
from tinyserve.errors import OutputError, UsageError
from tinyserve.output import RESUMABLE, open_rows, read_rows


class Resumed:
    """The rows in a job's output that still hold.

    A row holds if it is of this very model and as many predictions, did not fail, and its file has
    the size and the time that it had; of what is behind a URI these are not known. The others are
    taken out of the output, which is replaced by what is left of it in one step, so that a kill at
    any moment loses and doubles nothing. Those that are less sure than ``min_confidence`` become
    unknown, whatever they were.
    """

    others: int = 0
    """Rows that hold and are of none of the inputs; known when :meth:`left` has come to its end."""

    def __init__(
        self,
        output: str,
        format_: str,
        classifier: Classifier,
        k: int,
        min_confidence: float | None = None,
    ) -> None:
        if format_ not in RESUMABLE:
            raise UsageError(f"only {' and '.join(RESUMABLE)} outputs can be resumed")
        # Not a link to it, of which a replacement would make a file.
        self._output = os.path.realpath(output)
        self._format, self._classifier = format_, classifier
        self._k, self._min_confidence = k, min_confidence
        # Hashes of paths and not the paths, of which there may be millions.
        self._done: dict[int, int] = {}

    def results(self) -> Iterator[Result]:
        """The results of the rows that hold; all must be taken before anything else is done.

        Raises :class:`~tinyserve.errors.UsageError` where the output is none of a job, and
        :class:`~tinyserve.errors.OutputError` where it cannot be rewritten.
        """
        if not os.path.exists(self._output):
            return
        kept = f"{self._output}.kept"
        try:
            with open_rows(
                kept, self._format, k=self._k, model=self._classifier.fingerprint
            ) as write:
                for row in read_rows(self._output, self._format):
                    result = self._result(row)
                    if result is not None:
                        key = _key(result.path)
                        self._done[key] = self._done.get(key, 0) + 1
                        write(result)
                        yield result
            os.replace(kept, self._output)
        except OSError as error:
            raise OutputError(f"cannot rewrite {self._output}: {error.strerror}") from error
        finally:
            if os.path.exists(kept):
                os.unlink(kept)

    def _result(self, row: dict[str, Any]) -> Result | None:
        card = self._classifier.card
        path, predictions = row["path"], tuple(row["predictions"])
        if (
            row["model"] != self._classifier.fingerprint
            or row["error"] is not None
            or len(predictions) != self._k
            or not row["version"]
            or row["version"] != version_of(path)
        ):
            return None
        index = self._classifier.label_index(row["label"])
        result = Result(
            input=Input(path, row["label"]),
            version=row["version"],
            error=None,
            predictions=predictions,
            label=None if index is None else card.labels[index],
            rank=row["rank"],
        )
        return result.at_least(self._min_confidence)

    def left(self, inputs: Iterable[Input]) -> Iterator[Input]:
        """The inputs that have no row yet."""
        for item in inputs:
            key = _key(item.path)
            if rows := self._done.get(key, 0):
                self._done[key] = rows - 1
            else:
                yield item
        self.others = sum(self._done.values())


def _key(path: str) -> int:
    """The same for ``photos/1.jpg`` and ``./photos//1.jpg``; where ``..`` leads, links decide."""
    return hash(path if ".." in path else os.path.normpath(path))
