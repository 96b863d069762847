"""``tinyserve classify``: the rows, and the summary of them all."""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyserve.classifier import FIRST_BATCH, LARGEST_BATCH, Classifier, model_file
from tinyserve.cli.arguments import Commands, add_device, count, model_name, number, whole
from tinyserve.cli.terminal import SOME_FAILED, progress
from tinyserve.confidence import in_words, operating_point
from tinyserve.dataset import Input, find_inputs
from tinyserve.devices import default_threads, device_name
from tinyserve.errors import ModelFileError, OutputError, UsageError, os_reason
from tinyserve.images import is_image_name
from tinyserve.members import TARS, is_remote
from tinyserve.modelfile import DEFAULT_MODEL, PRECISIONS, ModelCard
from tinyserve.output import FORMATS, format_of, open_rows
from tinyserve.report import Summary, Tally
from tinyserve.resume import Resumed

if TYPE_CHECKING:
    from tinyserve.statistics import Statistics

_FIRST = 10_000
_FIRST_BYTES = 64 * 2**20
"""Inputs that are listed before work begins, and what they may hold of an archive: a bar and a
table are laid out after them."""


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "classify",
        help="classify image files",
        description="Classify images, one row for each. Labels are found by themselves in class "
        "folders and in Tiny ImageNet's splits, and then the accuracy is part of the summary.",
    )
    command.set_defaults(command=classify)
    add = command.add_argument
    add(
        "paths",
        nargs="+",
        metavar="PATH",
        help="files, folders (searched recursively), globs, .zip, .tar and .parquet archives, or - "
        "for paths on stdin",
    )
    add("-m", "--model", default=DEFAULT_MODEL, help="name or .onnx file (default: %(default)s)")
    add(
        "-k",
        "--topk",
        type=count,
        default=5,
        metavar="N",
        help="predictions an image (default: %(default)s); the table shows as many as fit, -o has "
        "all",
    )
    growing = f"default: {FIRST_BATCH}, growing to {LARGEST_BATCH} for quick models"
    add("-b", "--batch-size", type=count, metavar="N", help=f"images a batch ({growing})")
    add_device(command)
    add(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="of a model that is there in several (default: auto, what suits the device)",
    )
    add(
        "-j",
        "--workers",
        type=count,
        metavar="N",
        help="batches at a time, between which the cores are shared (default: one a core); with "
        "--ray, cores for each classifier (default: 1)",
    )
    add(
        "--tuned",
        action="store_true",
        help="with the device, workers and batch size that `tinyserve bench` found fastest here",
    )
    add(
        "--no-self-test",
        action="store_true",
        help="do not replay a file's golden images when it is used here for the first time",
    )
    add(
        "--format",
        choices=FORMATS,
        help="how the rows are written (default: as a table; to a file, by its suffix, or else as "
        "JSON lines)",
    )
    add(
        "--submission",
        dest="format",
        action="store_const",
        const="submission",
        help="write what Tiny ImageNet's test server takes: file name and WordNet id",
    )
    add(
        "-o",
        "--output",
        type=lambda name: None if name == "-" else name,
        metavar="FILE",
        help="write the rows here (default: to stdout)",
    )
    add(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="on the machines of a Ray cluster (default: one that is started here); -o is a "
        "folder; put paths first, or the first of them is taken for the address",
    )
    add("--resume", action="store_true", help="keep the rows in -o that still hold, add the others")
    add(
        "--max-errors",
        type=_none_or_more,
        metavar="N",
        help="stop when more inputs than N failed (default: never)",
    )
    add("--summary", metavar="FILE", help="write the summary here as well, as JSON")
    add("--report", type=Path, metavar="DIR", help="write a page with all figures into this folder")
    least = command.add_mutually_exclusive_group().add_argument
    least(
        "--min-confidence",
        type=_share,
        metavar="P",
        help="what is less sure, from 0 to 1, becomes unknown",
    )
    least(
        "--target-precision",
        type=_share,
        metavar="P",
        help="the least confidence that was right so often, from 0 to 1, on the images held out of "
        "training",
    )


def classify(arguments: argparse.Namespace) -> int:
    _check_outputs(arguments)
    if arguments.ray is not None:
        return _classify_with_ray(arguments)
    output = arguments.output
    format_ = arguments.format or format_of(output)
    if arguments.resume and output is None:
        raise UsageError("--resume goes on with the file that -o names")
    limits = (arguments.min_confidence, arguments.target_precision)
    if format_ == "submission" and limits != (None, None):
        raise UsageError("a submission has a class for every image: no least confidence applies")
    inputs = find_inputs(arguments.paths)
    first, all_of_them = _first(inputs)
    # What is listed stays for long: not to be looked through for garbage, over and over.
    gc.freeze()
    widest = max((len(item.path) for item in first), default=0)
    settings = _settings(arguments)
    classifier = _classifier(arguments, settings, len(first) if all_of_them else None)
    k = min(arguments.topk, len(classifier.card.labels))
    threshold = _threshold(arguments, classifier)
    if format_ == "submission" and None in [label.wnid for label in classifier.card.labels]:
        raise ModelFileError("a submission needs a model whose classes have WordNet ids")
    tally = Tally()
    collectors = [tally.add]
    figures = None
    if arguments.report is not None:
        figures = _figures(arguments.report, classifier.card)
        collectors.append(figures.add)
    resumed = None
    if arguments.resume:
        resumed = Resumed(output, format_, classifier, k, threshold)
        for result in resumed.results():
            for collect in collectors:
                collect(result)
        inputs = resumed.left(itertools.chain(_given_away(first), inputs))
        first, all_of_them = _first(inputs)
    kept = tally.inputs
    total = len(first) if all_of_them else None
    inputs = itertools.chain(_given_away(first), inputs)
    start = time.perf_counter()
    with (
        _wanting_readers(arguments),
        open_rows(
            output, format_, k=k, model=classifier.fingerprint, widest=widest, append=kept > 0
        ) as write,
        contextlib.closing(
            classifier.classify_many(inputs, k=k, batch_size=settings.batch_size)
        ) as results,
        progress(total, rows=output is None) as advance,
    ):
        for result in results:
            result = result.at_least(threshold)
            for collect in collectors:
                collect(result)
            write(result)
            advance()
            if arguments.max_errors is not None and tally.failed > arguments.max_errors:
                break
    summary = tally.summary(
        model=model_name(arguments.model),
        precision=classifier.card.precision,
        provider=classifier.engine.provider,
        seconds=time.perf_counter() - start,
        kept=kept,
        min_confidence=threshold,
    )
    return _conclude(arguments, summary, figures, resumed)


def _figures(folder: Path, card: ModelCard) -> "Statistics":
    """Those of a report, for which there is a folder then."""
    from tinyserve import htmlreport, statistics  # a single image shall not wait for them

    htmlreport.make_folder(folder)
    return statistics.Statistics(card)


@contextlib.contextmanager
def _wanting_readers(arguments: argparse.Namespace) -> Iterator[None]:
    """A job whose rows nobody reads any more ends quietly, unless more was asked of it."""
    try:
        yield
    except BrokenPipeError as error:
        if not (arguments.summary or arguments.report):
            raise
        raise OutputError(
            "stdout was closed before the end, so there is no summary and no report: write the "
            "rows to a file (-o)"
        ) from error


def _classifier(
    arguments: argparse.Namespace, settings: "_Settings", inputs: int | None
) -> Classifier:
    streams = settings.workers
    if inputs is not None:
        # A few images get all the cores for each batch, one after the other.
        batches = math.ceil(inputs / (settings.batch_size or FIRST_BATCH))
        streams = max(1, min(streams, batches))
    return Classifier(
        arguments.model,
        precision=arguments.precision,
        device=settings.device,
        streams=streams,
        self_test=False if arguments.no_self_test else "once",
    )


def _threshold(arguments: argparse.Namespace, classifier: Classifier) -> float | None:
    """The least confidence of what is not unknown."""
    least: float | None = arguments.min_confidence
    if arguments.target_precision is not None:
        point = operating_point(classifier.card, arguments.target_precision)
        print(f"tinyserve: {in_words(point, classifier.card)}", file=sys.stderr)
        least = point.threshold
    return least


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Before the work, not after it."""
    output, summary = arguments.output, arguments.summary
    if summary == "-":
        raise UsageError("--summary wants a file: the rows go to stdout")
    if summary:
        folder = os.path.dirname(summary) or "."
        if not os.path.isdir(folder):
            raise OutputError(f"cannot write {summary}: there is no such folder")
        if os.path.isdir(summary):
            raise OutputError(f"cannot write {summary}: it is a folder")
        if not os.access(summary if os.path.exists(summary) else folder, os.W_OK):
            raise OutputError(f"cannot write {summary}: no permission")
    for path in filter(None, (output, summary)):
        # Without its own value, -o takes the first picture that a shell finds for *.jpg.
        if is_image_name(path) or path.lower().endswith((".zip", ".onnx", *TARS)):
            raise UsageError(f"{path} is no name for what is written: name another output")
        if os.path.isfile(path) and any(
            os.path.isfile(given) and os.path.samefile(given, path) for given in arguments.paths
        ):
            raise UsageError(f"{path} is one of the inputs: name another output")
    same = output and summary and os.path.realpath(output) == os.path.realpath(summary)
    if same and (os.path.isfile(output) or not os.path.exists(output)):  # but /dev/null takes both
        raise UsageError(f"{summary} is to hold the rows: name another --summary")


def _first(inputs: Iterator[Input]) -> tuple[deque[Input], bool]:
    """The first inputs, taken from all, and whether they are all."""
    first: deque[Input] = deque()
    held = 0
    for item in inputs:
        first.append(item)
        held += item.in_memory
        if len(first) == _FIRST or held > _FIRST_BYTES:
            return first, False
    return first, True


def _given_away(inputs: deque[Input]) -> Iterator[Input]:
    """One after the other, none kept: some hold the whole image."""
    while inputs:
        yield inputs.popleft()


def _classify_with_ray(arguments: argparse.Namespace) -> int:
    from tinyserve import rayjob

    if arguments.output is None:
        raise UsageError("--ray wants -o, a folder")
    for option in ("resume", "tuned", "report", "min_confidence", "target_precision"):
        value = getattr(arguments, option)
        if value is not None and value is not False:  # a confidence of 0 is one
            raise UsageError(f"--ray goes without --{option.replace('_', '-')}")
    job = rayjob.Job(
        model=arguments.model,
        precision=arguments.precision,
        device=arguments.device or os.environ.get("TINYSERVE_DEVICE") or "auto",
        format=arguments.format or format_of(arguments.output),
        k=arguments.topk,
        batch_size=arguments.batch_size,
        workers=arguments.workers or 1,
        self_test=not arguments.no_self_test,
    )
    inputs = list(_to_be_shared(arguments.paths))
    tally = Tally()
    precision, providers = "", set()
    start = time.perf_counter()
    with (
        contextlib.closing(
            rayjob.classify(job, inputs, arguments.output, address=arguments.ray)
        ) as parts,
        progress(len(inputs)) as advance,
    ):
        for part in parts:
            tally.merge(part.tally)
            precision = part.precision
            providers.add(part.provider)
            advance(part.tally.inputs)
            if arguments.max_errors is not None and tally.failed > arguments.max_errors:
                break
    summary = tally.summary(
        model=model_name(arguments.model),
        precision=precision,
        provider=", ".join(sorted(providers)),
        seconds=time.perf_counter() - start,
    )
    return _conclude(arguments, summary)


def _to_be_shared(paths: Sequence[str]) -> Iterator[Input]:
    """The inputs that other machines can read."""
    for item in find_inputs(paths):
        if item.member is not None and not is_remote(item.path):
            raise UsageError(
                f"--ray takes files, folders and URIs; unpack the archive of {item.path} first"
            )
        yield item


def _conclude(
    arguments: argparse.Namespace,
    summary: Summary,
    figures: "Statistics | None" = None,
    resumed: Resumed | None = None,
) -> int:
    """The end of a job: what can be written is written, and only then what cannot be is raised."""
    lines = list(_summary_lines(summary))
    if arguments.max_errors is not None and summary.failed > arguments.max_errors:
        lines.insert(0, f"tinyserve: stopped: more than {arguments.max_errors:,} inputs failed")
    if resumed is not None:
        lines += _notices(resumed, arguments.output)
    failures = []
    # First what is kept: whoever reads along may have left.
    if arguments.summary:
        document = json.dumps(dataclasses.asdict(summary), indent=2) + "\n"
        try:
            Path(arguments.summary).write_text(document)
        except OSError as error:
            failures.append(f"cannot write {arguments.summary}: {os_reason(error)}")
    if figures is not None:
        from tinyserve import htmlreport

        try:
            htmlreport.write_report(arguments.report, figures.report(summary, arguments.paths))
            lines.append(f"report: {arguments.report / htmlreport.PAGE}")
        except OutputError as error:
            failures.append(str(error))
    for line in lines:
        print(line, file=sys.stderr)
    if failures:
        raise OutputError("; ".join(failures))
    return SOME_FAILED if summary.failed else 0


def _notices(resumed: Resumed, output: str) -> Iterator[str]:
    if resumed.others:
        yield (
            f"tinyserve: {resumed.others:,} of the rows are of inputs that were not asked for now; "
            f"{output} keeps them, and they are counted"
        )
    if resumed.lost:
        yield (
            f"tinyserve: {resumed.lost:,} rows that failed, or no longer hold, were of inputs that "
            f"were not asked for now; they are no longer in {output}"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Settings:
    device: str | None
    workers: int
    batch_size: int | None


def _settings(arguments: argparse.Namespace) -> _Settings:
    """What the arguments say, then with --tuned what was measured, then the defaults."""
    tuned = None
    device = arguments.device
    if arguments.tuned:
        from tinyserve import bench as bench_module

        device = device or os.environ.get("TINYSERVE_DEVICE")
        tuned = bench_module.tuned(model_file(arguments.model, arguments.precision, device))
    return _Settings(
        device=device or (tuned.device if tuned else None),
        workers=arguments.workers or (tuned.workers if tuned else default_threads()),
        batch_size=arguments.batch_size or (tuned.batch_size if tuned else None),
    )


def _summary_lines(summary: Summary) -> Iterator[str]:
    images = "image" if summary.inputs == 1 else "images"
    devices = ", ".join(map(device_name, summary.provider.split(", ")))  # of many machines
    kept = f", {summary.kept:,} of them done before" if summary.kept else ""
    yield (
        f"{summary.inputs:,} {images}{kept}, {summary.failed:,} failed; {summary.model} "
        f"({summary.precision}) on {devices}, "
        f"{summary.seconds:.1f} s, {summary.images_per_second:,.0f} images/s"
    )
    if summary.top1 is not None and summary.top1_ci95 is not None and summary.top5 is not None:
        low, high = summary.top1_ci95
        yield (
            f"top-1 {100 * summary.top1:.2f} % ({round(summary.top1 * summary.labelled):,} of "
            f"{summary.labelled:,} labelled; 95 % {100 * low:.2f} to {100 * high:.2f}), "
            f"top-5 {100 * summary.top5:.2f} %"
        )
    if summary.min_confidence is not None and summary.coverage is not None:
        line = (
            f"decided at {summary.min_confidence:g} or more: {summary.ok:,}, "
            f"{100 * summary.coverage:.2f} %; {summary.unknown:,} unknown"
        )
        if summary.decided_top1 is not None and summary.decided_top1_ci95 is not None:
            low, high = summary.decided_top1_ci95
            line += (
                f"; top-1 of the decided {100 * summary.decided_top1:.2f} % "
                f"(of {summary.decided_labelled:,} labelled; "
                f"95 % {100 * low:.2f} to {100 * high:.2f})"
            )
        yield line


def _share(text: str) -> float:
    share = number(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError("must be from 0 to 1")
    return share


def _none_or_more(text: str) -> int:
    most = whole(text)
    if most < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return most
