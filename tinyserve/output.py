"""The rows that a job writes, one for each input: a table, JSON lines or CSV."""

import contextlib
import csv
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from tinyserve.classifier import Prediction, Result
from tinyserve.dataset import Input
from tinyserve.errors import UsageError
from tinyserve.modelfile import Label

FORMATS = ("table", "jsonl", "csv")

Writer = Callable[[Result], None]


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    try:
        with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
            yield stream
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def format_of(output: str | None) -> str:
    if output is None:
        return "table"
    return "csv" if output.endswith(".csv") else "jsonl"


def writer(format_: str, stream: TextIO, inputs: Sequence[Input], k: int) -> Writer:
    if format_ == "jsonl":
        return lambda result: print(json.dumps(_document(result), ensure_ascii=False), file=stream)
    if format_ == "csv":
        return _csv_writer(stream, k)
    return _table_writer(stream, inputs)


def _document(result: Result) -> dict[str, Any]:
    return {
        "path": result.path,
        "status": result.status,
        "error": result.error,
        "predictions": [dataclasses.asdict(prediction) for prediction in result.predictions],
        "label": None if result.label is None else _label_id(result.label),
        "correct": result.correct,
    }


def _csv_writer(stream: TextIO, k: int) -> Writer:
    rows = csv.writer(stream, lineterminator="\n")
    fields = [field.name for field in dataclasses.fields(Prediction)]
    numbered = [f"{field}_{place}" for place in range(1, k + 1) for field in fields]
    rows.writerow(["path", "status", "error", "label", "correct", *numbered])

    def write(result: Result) -> None:
        document = _document(result)
        values = [
            value for prediction in result.predictions for value in dataclasses.astuple(prediction)
        ]
        values += [None] * (len(numbered) - len(values))
        rows.writerow(
            [document[name] for name in ("path", "status", "error", "label", "correct")] + values
        )

    return write


def _table_writer(stream: TextIO, inputs: Sequence[Input]) -> Writer:
    """Rows of path, mark, and as many predictions as the width holds."""
    columns = shutil.get_terminal_size((100, 24)).columns if stream.isatty() else 120
    path_width = min(max(len(item.path) for item in inputs), columns // 2)

    def write(result: Result) -> None:
        path = result.path
        if len(path) > path_width:
            path = "…" + path[1 - path_width :]
        mark = "?" if result.unknown else {None: " ", True: "✓", False: "✗"}[result.correct]
        line = f"{path:<{path_width}}  {mark} "
        if result.error is not None:
            print(f"{line} error: {result.error}", file=stream)
            return
        if result.unknown:
            line += " unknown:"
        for place, prediction in enumerate(result.predictions):
            cell = f" {100 * prediction.probability:5.1f} % {prediction.name:<18}"
            if place and len(line) + len(cell.rstrip()) > columns:
                break
            line += cell
        print(line.rstrip(), file=stream)

    return write


def _label_id(label: Label) -> str:
    return label.name if label.wnid is None else label.wnid
