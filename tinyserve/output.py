"""The rows that a job writes, one for each input: a table, JSON lines, CSV or Parquet.

JSON lines and CSV can be read back, so that an interrupted job goes on where it stopped.
"""

import codecs
import contextlib
import csv
import dataclasses
import json
import operator
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tinyserve.classifier import Prediction, Result
from tinyserve.errors import OutputError, UsageError, os_reason
from tinyserve.files import candidate, held
from tinyserve.modelfile import Label

FORMATS = ("table", "jsonl", "csv", "parquet", "submission")
RESUMABLE = ("jsonl", "csv")
_OTHERS = {".gz", ".bz2", ".xz", ".zst", ".zip", ".tsv", ".xls", ".xlsx", ".html", ".arrow"}
"""Suffixes that stand for what is not written here."""

Write = Callable[[Result], None]

_FIELDS = ("path", "status", "error", "label", "rank", "correct", "version", "model")
_PREDICTION = tuple(field.name for field in dataclasses.fields(Prediction))
_values = operator.attrgetter(*_PREDICTION)
_PARQUET_ROWS = 10_000  # in memory at a time
_LONGEST_CUT = 8192
"""Characters of a row that is cut off behind the end of a line, which can only be one in a path."""
_NOT_UTF8 = re.compile(r"\\udc([89a-f][0-9a-f])")
"""A byte of a name that is not UTF-8, as ``backslashreplace`` writes what Python has for it."""


def format_of(output: str | None) -> str:
    """By the suffix; JSON lines by most. Raises :class:`~tinyserve.errors.UsageError` where it
    stands for something else."""
    if output is None:
        return "table"
    suffix = Path(output).suffix.lower()
    if suffix in _OTHERS:
        raise UsageError(f"{suffix} is not written ({output}): name another file, or give --format")
    return {".csv": "csv", ".parquet": "parquet"}.get(suffix, "jsonl")


def open_rows(
    output: str | None,
    format_: str,
    *,
    k: int,
    model: str,
    widest: int = 0,
    append: bool = False,
) -> AbstractContextManager[Write]:
    """What writes the rows of a job, to a file or else to stdout.

    ``model`` is the fingerprint that every row carries; a table is laid out for paths of up to
    ``widest`` characters. Raises :class:`~tinyserve.errors.OutputError` where a file cannot be
    written.
    """
    if format_ != "parquet":
        return _Rows(output, _lines(output, format_, k, model, widest, append=append))
    if output is None:
        raise UsageError("Parquet is written to a file: give -o")
    return _Rows(output, _parquet(output, model))


class _Rows(AbstractContextManager[Write]):
    """What opens, writes and closes an output, with its errors as
    :class:`~tinyserve.errors.OutputError`; the body's are none of it."""

    def __init__(self, output: str | None, rows: AbstractContextManager[Write]) -> None:
        self._output, self._rows = output, rows

    def __enter__(self) -> Write:
        with _as_output_error(self._output):
            write = self._rows.__enter__()

        def written(result: Result) -> None:
            with _as_output_error(self._output):
                write(result)

        return written

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        with _as_output_error(self._output):
            return self._rows.__exit__(kind, error, traceback)


@contextlib.contextmanager
def _lines(
    output: str | None, format_: str, k: int, model: str, widest: int, *, append: bool
) -> Iterator[Write]:
    with _opened(output, append=append) as stream:
        if format_ == "jsonl":
            # What another encoding lacks would be written as Python escapes it, which is no JSON.
            ascii_only = codecs.lookup(stream.encoding or "utf-8").name != "utf-8"
            yield lambda result: print(
                json.dumps(document(result, model), ensure_ascii=ascii_only), file=stream
            )
        elif format_ == "csv":
            yield _csv_writer(stream, k, model, header=not append)
        elif format_ == "submission":
            yield _submission_writer(stream)
        else:
            yield _table_writer(stream, widest)
        stream.flush()


def document(result: Result, model: str) -> dict[str, Any]:
    """A result as JSON has it."""
    return {
        **_fields(result, model),
        "predictions": [prediction_document(p) for p in result.predictions],
    }


def _fields(result: Result, model: str) -> dict[str, Any]:
    return {
        "path": result.path,
        "status": result.status,
        "error": result.error,
        "label": None if result.label is None else _label_id(result.label),
        "rank": result.rank,
        "correct": result.correct,
        "version": result.version,
        "model": model,
    }


def prediction_document(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON has it."""
    # Not dataclasses.asdict, which copies deeply: of each image there are as many as are asked for.
    return dict(zip(_PREDICTION, _values(prediction), strict=True))


def read_rows(output: str, format_: str) -> Iterator[dict[str, Any]]:
    """The rows in a file, as :func:`document` makes them, as far as they are whole: of a job that
    was killed, the last one need not be.

    Raises :class:`~tinyserve.errors.UsageError` where the file is no output of this format.
    """
    # Ends of lines are ours alone: a file's name may hold the others.
    with open(output, encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
        yield from (_read_jsonl if format_ == "jsonl" else _read_csv)(stream, output)


def _read_jsonl(stream: TextIO, output: str) -> Iterator[dict[str, Any]]:
    for line in stream:
        if not line.endswith("\n"):
            return
        try:
            row = json.loads(line)
            predictions = [Prediction(**p) for p in row["predictions"]]
            yield {**{name: row[name] for name in _FIELDS}, "predictions": predictions}
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{output} has lines that are no rows of classify") from error


def _read_csv(stream: TextIO, output: str) -> Iterator[dict[str, Any]]:
    def whole_lines() -> Iterator[str]:
        return (line for line in stream if line.endswith("\n"))

    rows = csv.reader(whole_lines())
    try:
        header = next(rows, None)
    except csv.Error:  # a field longer than any row of ours has
        header = []
    if header is None:
        return
    if tuple(header[: len(_FIELDS)]) != _FIELDS:
        raise UsageError(f"{output} does not begin with the columns of classify")
    try:
        for cells in rows:
            if len(cells) == len(header):
                yield _from_cells(cells)
            elif next(rows, None) is not None or sum(map(len, cells)) > _LONGEST_CUT:
                raise ValueError(f"{len(cells)} cells in line {rows.line_num}")
    except (csv.Error, ValueError) as error:
        raise UsageError(f"{output} has lines that are no rows of classify ({error})") from error


def _from_cells(cells: list[str]) -> dict[str, Any]:
    values = [cell or None for cell in cells]
    row: dict[str, Any] = dict(zip(_FIELDS, values, strict=False))
    row["path"] = path = row["path"] or ""
    if not os.path.lexists(path):  # which it may be called in truth
        row["path"] = _NOT_UTF8.sub(lambda byte: chr(0xDC00 + int(byte[1], 16)), path)
    row["version"] = row["version"] or ""
    row["rank"] = None if row["rank"] is None else int(row["rank"])
    width = len(_PREDICTION)
    numbered = [values[i : i + width] for i in range(len(_FIELDS), len(values), width)]
    row["predictions"] = [
        Prediction(int(index), wnid, name or "", float(probability))
        for index, wnid, name, probability in numbered
        if index is not None and probability is not None
    ]
    return row


@contextlib.contextmanager
def _as_output_error(output: str | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, BrokenPipeError) and output is None:
            raise  # of stdout, which is nobody's fault
        raise OutputError(f"cannot write {output or 'to stdout'}: {os_reason(error)}") from error


@contextlib.contextmanager
def _opened(output: str | None, *, append: bool) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    if not os.path.exists(output):
        open(output, "a").close()  # what is not there cannot be locked
    with (
        locked(output),
        open(output, "a", encoding="utf-8", errors="backslashreplace", newline="") as stream,
    ):
        if not append and os.path.isfile(output):
            stream.truncate(0)
        yield stream


@contextlib.contextmanager
def locked(output: str) -> Iterator[None]:
    """A file of rows is this job's alone.

    Raises :class:`~tinyserve.errors.OutputError` where it is another's.
    """
    # Of a device or a pipe, many may make use at a time.
    if not os.path.isfile(output):
        yield
        return
    before = os.stat(output)
    with held(output) as alone:
        # A job that goes on replaces the file, and its rows are in the other one.
        if not alone or not os.path.samestat(before, os.stat(output)):
            raise OutputError(f"cannot write {output}: another job is writing it")
        yield


def _csv_writer(stream: TextIO, k: int, model: str, *, header: bool) -> Write:
    rows = csv.writer(stream, lineterminator="\n")
    # Python before 3.13 quotes no carriage return by itself, at which others end a row.
    quoted = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL)
    numbered = [f"{field}_{place}" for place in range(1, k + 1) for field in _PREDICTION]
    width = len(_FIELDS) + len(numbered)
    if header:
        rows.writerow([*_FIELDS, *numbered])

    def write(result: Result) -> None:
        fields = _fields(result, model)
        values = [fields[name] for name in _FIELDS]
        for prediction in result.predictions:
            values += _values(prediction)
        values += [None] * (width - len(values))
        (quoted if "\r" in f"{fields['path']}{fields['error']}" else rows).writerow(values)

    return write


def _submission_writer(stream: TextIO) -> Write:
    """File name and WordNet id, as Tiny ImageNet's test server takes them; without the inputs that
    failed, for which it has no words. The model's classes must have WordNet ids."""

    def write(result: Result) -> None:
        if result.predictions:
            print(f"{os.path.basename(result.path)} {result.predictions[0].wnid}", file=stream)

    return write


@contextlib.contextmanager
def _parquet(output: str, model: str) -> Iterator[Write]:
    """The columns of CSV, in row groups.

    A table without its end cannot be read, and one that ends early cannot be told from a whole one:
    so it is there when it is done.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ModuleNotFoundError as error:
        raise UsageError("Parquet needs: pip install 'tinyserve[parquet]'") from error
    of_predictions = {
        "index": pa.int32(),
        "wnid": pa.string(),
        "name": pa.string(),
        "probability": pa.float32(),
    }
    schema = pa.schema(
        {
            **dict.fromkeys(_FIELDS, pa.string()),
            "rank": pa.int32(),
            "correct": pa.bool_(),
            "predictions": pa.list_(pa.struct(of_predictions)),
        }
    )
    rows: list[dict[str, Any]] = []
    with _appearing_whole(output) as path, parquet.ParquetWriter(path, schema) as table:

        def flush() -> None:
            table.write_table(pa.Table.from_pylist(rows, schema))
            rows.clear()

        def write(result: Result) -> None:
            row = document(result, model)
            row["path"] = row["path"].encode(errors="backslashreplace").decode()
            rows.append(row)
            if len(rows) == _PARQUET_ROWS:
                flush()

        yield write
        flush()


@contextlib.contextmanager
def _appearing_whole(output: str) -> Iterator[str]:
    if os.path.exists(output) and not os.path.isfile(output):  # a device or a pipe
        yield output
        return
    with candidate(Path(os.path.realpath(output))) as hidden:
        yield str(hidden)


def _table_writer(stream: TextIO, widest: int) -> Write:
    """Rows of path, mark, and as many predictions as the width holds."""
    columns = shutil.get_terminal_size((100, 24)).columns if stream.isatty() else 120
    path_width = min(widest, columns // 2)

    def write(result: Result) -> None:
        path = _printable(result.path)
        if len(path) > path_width:
            path = "…" + path[1 - path_width :]
        mark = "?" if result.unknown else {None: " ", True: "✓", False: "✗"}[result.correct]
        line = f"{path:<{path_width}}  {mark} "
        if result.error is not None:
            print(f"{line} error: {_printable(result.error)}", file=stream)
            return
        if result.unknown:
            line += " unknown:"
        for place, prediction in enumerate(result.predictions):
            name = _printable(prediction.name)
            cell = f" {100 * prediction.probability:5.1f} % {name:<18}"
            if place and len(line) + len(cell.rstrip()) > columns:
                break
            line += cell
        print(line.rstrip(), file=stream)

    return write


def _printable(text: str) -> str:
    """A name from a foreign archive or model shall not talk to the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _label_id(label: Label) -> str:
    return label.name if label.wnid is None else label.wnid
