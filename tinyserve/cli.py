"""The command line: ``tinyserve classify``, ``models`` and ``info``.

Results go to stdout, everything else to stderr. Exit codes: 0 clean, 1 failure, 2 usage,
3 finished but some inputs failed, 5 the device asked for cannot run.
"""

import argparse
import contextlib
import csv
import dataclasses
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from tinyserve.classifier import Classifier, Prediction, Result
from tinyserve.dataset import Input, find_inputs
from tinyserve.engine import DEVICES, device_name, read_card
from tinyserve.errors import ModelFileError, TinyserveError, UsageError
from tinyserve.modelfile import (
    DEFAULT_MODEL,
    Label,
    ModelCard,
    Training,
    find_model,
    installed_models,
    search_folders,
)
from tinyserve.report import Summary, Tally

SOME_FAILED = 3
FORMATS = ("table", "jsonl", "csv")

Writer = Callable[[Result], None]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="tinyserve: %(message)s", level=logging.WARNING, force=True)
    for stream in (sys.stdout, sys.stderr):
        # File names need not be valid in the terminal's encoding, and printing must not fail.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code: int = arguments.command(arguments)
        sys.stdout.flush()
        return code
    except TinyserveError as error:
        print(f"tinyserve: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("tinyserve: interrupted", file=sys.stderr)
        return 130


def classify(arguments: argparse.Namespace) -> int:
    inputs = find_inputs(arguments.paths)
    format_ = arguments.format or _format_of(arguments.output)
    classifier = Classifier(arguments.model, device=arguments.device)
    tally = Tally()
    start = time.perf_counter()
    with _open_output(arguments.output) as stream:
        write = _writer(format_, stream, inputs, arguments.topk)
        results = classifier.classify_many(
            inputs, k=arguments.topk, batch_size=arguments.batch_size
        )
        # On a terminal the rows themselves show the progress; a bar would run through them.
        quiet = True if stream.isatty() else None
        for result in tqdm(results, total=len(inputs), unit="image", disable=quiet, leave=False):
            tally.add(result)
            write(result)
        stream.flush()
    summary = tally.summary(
        model=_model_name(arguments.model),
        precision=classifier.card.precision,
        provider=classifier.engine.provider,
        seconds=time.perf_counter() - start,
    )
    for line in _summary_lines(summary):
        print(line, file=sys.stderr)
    if arguments.summary:
        document = json.dumps(dataclasses.asdict(summary), indent=2) + "\n"
        try:
            Path(arguments.summary).write_text(document)
        except OSError as error:
            raise UsageError(f"cannot write {arguments.summary}: {error.strerror}") from error
    return SOME_FAILED if summary.failed else 0


def models(arguments: argparse.Namespace) -> int:
    found = installed_models()
    if not found:
        raise ModelFileError(f"no models in {', '.join(map(str, search_folders()))}")
    cards: dict[str, ModelCard] = {}
    for name, path in found.items():
        try:
            cards[name] = read_card(path)
        except ModelFileError as error:
            print(f"tinyserve: {error}", file=sys.stderr)
    if arguments.json:
        rows = [_model_document(name, found[name], card) for name, card in cards.items()]
        print(json.dumps(rows, indent=2))
    else:
        header = ("model", "precision", "parameters", "classes", "top-1", "size", "file")
        _print_columns([header, *(_model_row(name, found[name], cards[name]) for name in cards)])
        print("* what classify uses without -m; top-1 on the validation images, see tinyserve info")
    return 0 if len(cards) == len(found) else ModelFileError.exit_code


def _model_document(name: str, path: Path, card: ModelCard) -> dict[str, Any]:
    training = card.training
    return {
        "model": name,
        "architecture": card.architecture,
        "precision": card.precision,
        "parameters": card.parameters,
        "classes": len(card.labels),
        "image_size": card.image_size,
        "val_top1": training.val_top1 if training else None,
        "val_images": training.val_images if training else None,
        "bytes": path.stat().st_size,
        "path": str(path),
    }


def _model_row(name: str, path: Path, card: ModelCard) -> tuple[str, ...]:
    return (
        name + ("*" if name == DEFAULT_MODEL else ""),
        card.precision,
        f"{card.parameters / 1e6:.2f} M",
        str(len(card.labels)),
        f"{100 * card.training.val_top1:.2f} %" if card.training else "",
        f"{path.stat().st_size / 2**20:.1f} MiB",
        str(path),
    )


def info(arguments: argparse.Namespace) -> int:
    path = find_model(arguments.model)
    card = read_card(path)
    if arguments.json:
        print(json.dumps({"path": str(path), **dataclasses.asdict(card)}, indent=2))
    else:
        _print_columns(list(_card_lines(path, card)))
    return 0


def _card_lines(path: Path, card: ModelCard) -> Iterator[tuple[str, str]]:
    size, classes = card.image_size, len(card.labels)
    seen = "all" if card.crop == size else f"the centre {card.crop} x {card.crop}"
    if card.network_size != card.crop:
        seen += f", shrunk to {card.network_size} x {card.network_size}"
    yield "file", f"{path} ({path.stat().st_size / 2**20:.1f} MiB, format {card.format})"
    yield "architecture", f"{card.architecture}, {card.parameters:,} parameters, {card.precision}"
    yield (
        "input",
        f"images: uint8 [batch, {size}, {size}, 3], RGB; the network sees {seen}",
    )
    yield "resize", card.resize_rule
    yield "output", f"probabilities: float32 [batch, {classes}]"
    names = ", ".join(label.name for label in card.labels[:4])
    yield "classes", f"{classes}: {names}{', ...' if classes > 4 else ''}"
    if training := card.training:
        yield (
            "trained on",
            f"{training.train_images:,} images of {training.dataset} "
            f"({training.dataset_fingerprint[:12]}), {_how(training)}",
        )
        if training.initial:
            earlier = training.initial
            yield "started from", f"weights trained on {earlier.dataset}, {_how(earlier)}"
        yield (
            "accuracy",
            f"top-1 {100 * training.val_top1:.2f} %, top-5 {100 * training.val_top5:.2f} % "
            f"of {training.val_images:,} validation images, single centre view",
        )
    if parity := card.parity:
        yield (
            "parity",
            f"{100 * parity.top1_agreement:g} % the same top-1 as PyTorch {parity.torch} on "
            f"{parity.images:,} images, batches of {', '.join(map(str, parity.batch_sizes))}; "
            f"largest difference of a probability {parity.max_difference:.1e} "
            f"({device_name(parity.provider)}, ONNX Runtime {parity.onnxruntime})",
        )


def _how(training: Training) -> str:
    return (
        f"recipe {training.recipe}, {training.epochs} epochs, seed {training.seed}, "
        f"{training.precision}, commit {training.commit}"
    )


def _summary_lines(summary: Summary) -> Iterator[str]:
    yield (
        f"{summary.inputs:,} images, {summary.failed:,} failed; {summary.model} "
        f"({summary.precision}) on {device_name(summary.provider)}, "
        f"{summary.seconds:.1f} s, {summary.images_per_second:,.0f} images/s"
    )
    if summary.top1 is not None and summary.top1_ci95 is not None and summary.top5 is not None:
        low, high = summary.top1_ci95
        yield (
            f"top-1 {100 * summary.top1:.2f} % ({round(summary.top1 * summary.labelled):,} of "
            f"{summary.labelled:,} labelled; 95 % {100 * low:.2f} to {100 * high:.2f}), "
            f"top-5 {100 * summary.top5:.2f} %"
        )


def _writer(format_: str, stream: TextIO, inputs: Sequence[Input], k: int) -> Writer:
    if format_ == "jsonl":
        return lambda result: print(json.dumps(_document(result), ensure_ascii=False), file=stream)
    if format_ == "csv":
        return _csv_writer(stream, k)
    return _table_writer(stream, inputs)


def _document(result: Result) -> dict[str, Any]:
    return {
        "path": result.path,
        "status": "ok" if result.error is None else "error",
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
        mark = {None: " ", True: "✓", False: "✗"}[result.correct]
        line = f"{path:<{path_width}}  {mark} "
        if result.error is not None:
            print(f"{line} error: {result.error}", file=stream)
            return
        for place, prediction in enumerate(result.predictions):
            cell = f" {100 * prediction.probability:5.1f} % {prediction.name:<18}"
            if place and len(line) + len(cell.rstrip()) > columns:
                break
            line += cell
        print(line.rstrip(), file=stream)

    return write


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


@contextlib.contextmanager
def _open_output(path: str | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    try:
        with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
            yield stream
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _format_of(output: str | None) -> str:
    if output is None:
        return "table"
    return "csv" if output.endswith(".csv") else "jsonl"


def _model_name(model: str) -> str:
    return Path(model).name.removesuffix(".onnx")


def _label_id(label: Label) -> str:
    return label.name if label.wnid is None else label.wnid


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinyserve", description="Classify images with small, self-describing ONNX models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "classify",
        help="classify image files",
        description="Classify images, one row for each. Labels are found by themselves in class "
        "folders and in Tiny ImageNet's splits, and then the accuracy is part of the summary.",
    )
    command.set_defaults(command=classify)
    add = command.add_argument
    add("paths", nargs="+", metavar="PATH", help="files, folders (searched recursively) or globs")
    add("-m", "--model", default=DEFAULT_MODEL, help="name or .onnx file (default: %(default)s)")
    add("-k", "--topk", type=_at_least_one, default=5, help="predictions an image (default: 5)")
    add("-b", "--batch-size", type=_at_least_one, default=32, help="default: %(default)s")
    add("--device", choices=DEVICES, help="default: $TINYSERVE_DEVICE or auto")
    add("--format", choices=FORMATS, help="default: table, or by the suffix of -o")
    add("-o", "--output", metavar="FILE", help="write the rows here instead of to stdout")
    add("--summary", metavar="FILE", help="write the summary here, too, as JSON")

    command = commands.add_parser("models", help="list the models that are installed")
    command.set_defaults(command=models)
    command.add_argument("--json", action="store_true")

    command = commands.add_parser("info", help="print what a model file says of itself")
    command.set_defaults(command=info)
    command.add_argument("model", metavar="MODEL", help="name or .onnx file")
    command.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
