"""Going on with a job that was interrupted: which of its rows hold, and what is left to do."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tinyserve.classifier import Classifier, Result
from tinyserve.dataset import Input, version_of, with_label
from tinyserve.errors import DataError, OutputError, UsageError, os_reason
from tinyserve.files import candidate, remove_candidates
from tinyserve.members import is_remote
from tinyserve.output import RESUMABLE, locked, open_rows, read_rows


class Resumed:
    """The rows in a job's output that still hold.

    A row holds if it did not fail and its file has the size, the time and the label that it had, or
    is not there any more; of what is behind a URI these are not known, and nothing holds. Several
    rows of one path hold together or not at all. The others are taken out of the output, which is
    replaced by what is left of it in one step, so that a kill at any moment loses and doubles
    nothing. Rows that are less sure than ``min_confidence`` become unknown, whatever they were.
    """

    others: int = 0
    """Rows that hold and are of none of the inputs; known when :meth:`left` has come to its end."""
    lost: int = 0
    """Rows that were taken out and are of none of the inputs; known at the same time."""

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
        # Rows by hashes of paths and not by paths, of which there may be millions.
        self._done: dict[int, int] = {}
        self._taken_out: dict[int, int] = {}

    def results(self) -> Iterator[Result]:
        """The results of the rows that hold; all must be taken before anything else is done.

        Leaves the output as it was, and raises :class:`~tinyserve.errors.UsageError` where it is of
        no job with this model and as many predictions, and
        :class:`~tinyserve.errors.OutputError` where it cannot be rewritten or another job has it.
        """
        if not os.path.exists(self._output):
            return
        if not os.path.isfile(self._output):
            raise UsageError(f"{self._output} is no file, and no job can go on with it")
        try:
            with locked(self._output):
                remove_candidates(Path(self._output))
                with (
                    candidate(Path(self._output)) as kept,
                    open_rows(
                        str(kept), self._format, k=self._k, model=self._classifier.fingerprint
                    ) as write,
                ):
                    shutil.copymode(self._output, kept)
                    folders: set[str] = set()
                    for row in read_rows(self._output, self._format):
                        folders.add(_top_folder(row["path"]))
                        if not self._holds(row):
                            _count(self._taken_out, row["path"])
                    folders.discard("")
                    if folders and not any(map(os.path.lexists, folders)):
                        raise UsageError(
                            f"the paths in {self._output} lead nowhere from here: go on from the "
                            "folder where the job began"
                        )
                    for row in read_rows(self._output, self._format):
                        if _key(row["path"]) in self._taken_out:
                            continue
                        _count(self._done, row["path"])
                        result = self._result(row).at_least(self._min_confidence)
                        write(result)
                        yield result
        except OSError as error:
            raise OutputError(f"cannot rewrite {self._output}: {os_reason(error)}") from error

    def _holds(self, row: dict[str, Any]) -> bool:
        path, version, predictions = row["path"], row["version"], len(row["predictions"])
        if row["model"] != self._classifier.fingerprint:
            raise UsageError(
                f"{self._output} has rows of another model: go on with that one (-m), or begin "
                "anew, without --resume"
            )
        if row["error"] is not None:
            return False
        if predictions != self._k:
            raise UsageError(
                f"{self._output} has {predictions} predictions a row: go on with -k {predictions}, "
                "or begin anew, without --resume"
            )
        now = version_of(path)
        if not version or now not in (version, ""):
            return False
        if not os.path.isfile(path):  # in an archive, the labels have the archive's time
            return True
        try:
            now_labelled = with_label(path, root=os.path.abspath(os.sep))
        except DataError:  # which is raised again if it is asked for
            return True
        # Below which folder it was found, the row does not say: any that it lies in will do.
        index_of, before = self._classifier.label_index, self._classifier.label_index(row["label"])
        return before in map(index_of, now_labelled.possible_labels)

    def _result(self, row: dict[str, Any]) -> Result:
        index = self._classifier.label_index(row["label"])
        return Result(
            input=Input(row["path"], row["label"]),
            version=row["version"],
            error=None,
            predictions=tuple(row["predictions"]),
            label=None if index is None else self._classifier.card.labels[index],
            rank=row["rank"],
        )

    def left(self, inputs: Iterable[Input]) -> Iterator[Input]:
        """The inputs that have no row yet."""
        for item in inputs:
            key = _key(item.path)
            if rows := self._done.get(key, 0):
                self._done[key] = rows - 1
            else:
                self._taken_out.pop(key, None)
                yield item
        self.others = sum(self._done.values())
        self.lost = sum(self._taken_out.values())


def _top_folder(path: str) -> str:
    """The first folder of a relative path that has one; otherwise nothing."""
    return "" if is_remote(path) else path.rpartition(os.sep)[0].partition(os.sep)[0]


def _count(rows: dict[int, int], path: str) -> None:
    key = _key(path)
    rows[key] = rows.get(key, 0) + 1


def _key(path: str) -> int:
    """The same for ``photos/1.jpg``, ``./photos//1.jpg`` and the absolute path; where ``..`` leads,
    links decide."""
    whole = path if ".." in path.split(os.sep) else os.path.abspath(path)
    # As CSV has names that are not UTF-8.
    return hash(whole.encode(errors="backslashreplace"))
