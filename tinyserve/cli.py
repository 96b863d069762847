"""The command line, ``tinyserve COMMAND``: every command is a function of its arguments here.

Results go to stdout, everything else to stderr. Exit codes: 0 clean, 1 failure, 2 usage,
3 finished but some inputs failed, 4 a model is not what it was, 5 the device asked for cannot run.

What only one command needs is imported there: of a cold start, most is imports.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyserve import rayjob
from tinyserve.archives import is_archive
from tinyserve.classifier import Classifier
from tinyserve.confidence import in_words, operating_point
from tinyserve.dataset import find_inputs
from tinyserve.devices import DEVICES, default_threads, device_name, preferred_precisions
from tinyserve.engine import read_card
from tinyserve.errors import ModelFileError, OutputError, TinyserveError, UsageError
from tinyserve.modelfile import (
    DEFAULT_MODEL,
    PRECISIONS,
    ModelCard,
    Training,
    find_model,
    installed_models,
    search_folders,
)
from tinyserve.output import FORMATS, format_of, open_rows
from tinyserve.report import Summary, Tally
from tinyserve.resume import Resumed
from tinyserve.server import LOG_FORMATS

if TYPE_CHECKING:
    from tinyserve.bench import Measurement

SOME_FAILED = 3
_BATCH_SIZE = 32

_FIRST = 10_000
"""Inputs that are listed before work begins: a bar and a table are laid out after them."""


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
        return 0
    except KeyboardInterrupt:
        print("tinyserve: interrupted", file=sys.stderr)
        return 130
    finally:
        _let_go_of_stdout()


def _let_go_of_stdout() -> None:
    """What could not be written must not fail once more, and aloud, when Python closes stdout."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def classify(arguments: argparse.Namespace) -> int:
    if arguments.ray is not None:
        return _classify_with_ray(arguments)
    output = arguments.output
    format_ = arguments.format or format_of(output)
    if arguments.resume and output is None:
        raise UsageError("--resume goes on with the file that -o names")
    inputs = find_inputs(arguments.paths)
    settings = _settings(arguments)
    classifier = Classifier(
        arguments.model,
        precision=arguments.precision,
        device=settings.device,
        streams=settings.workers,
        self_test=not arguments.no_self_test,
    )
    k = min(arguments.topk, len(classifier.card.labels))
    threshold = arguments.min_confidence
    if arguments.target_precision is not None:
        point = operating_point(classifier.card, arguments.target_precision)
        threshold = point.threshold
        print(f"tinyserve: {in_words(point, classifier.card)}", file=sys.stderr)
    tally = Tally()
    collectors = [tally.add]
    if arguments.report is not None:
        from tinyserve import htmlreport, statistics  # a single image shall not wait for them

        htmlreport.make_folder(arguments.report)
        figures = statistics.Statistics(classifier.card)
        collectors.append(figures.add)
    if arguments.resume:
        resumed = Resumed(output, format_, classifier, k, threshold)
        for result in resumed.results():
            for collect in collectors:
                collect(result)
        inputs = resumed.left(inputs)
    kept = tally.inputs
    first = list(itertools.islice(inputs, _FIRST))
    start = time.perf_counter()
    with (
        open_rows(
            output,
            format_,
            inputs=first,
            k=k,
            model=classifier.card.fingerprint,
            append=kept > 0,
        ) as write,
        contextlib.closing(
            classifier.classify_many(
                itertools.chain(first, inputs), k=k, batch_size=settings.batch_size
            )
        ) as results,
        _progress(len(first) if len(first) < _FIRST else None, rows=output is None) as advance,
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
        model=_model_name(arguments.model),
        precision=classifier.card.precision,
        provider=classifier.engine.provider,
        seconds=time.perf_counter() - start,
        kept=kept,
        min_confidence=threshold,
    )
    code = _conclude(arguments, summary)
    if arguments.report is not None:
        htmlreport.write_report(arguments.report, figures.report(summary, arguments.paths))
        print(f"report: {arguments.report / htmlreport.PAGE}", file=sys.stderr)
    return code


def _classify_with_ray(arguments: argparse.Namespace) -> int:
    if arguments.output is None:
        raise UsageError("--ray wants -o, a folder")
    for option in ("resume", "tuned", "report", "min_confidence", "target_precision"):
        if getattr(arguments, option) not in (None, False):
            raise UsageError(f"--ray goes without --{option.replace('_', '-')}")
    if archives := [path for path in arguments.paths if is_archive(path)]:
        raise UsageError(f"--ray takes files, folders and URIs; unpack {archives[0]} first")
    job = rayjob.Job(
        model=arguments.model,
        precision=arguments.precision,
        device=arguments.device or os.environ.get("TINYSERVE_DEVICE") or "auto",
        format=arguments.format or "jsonl",
        k=arguments.topk,
        batch_size=arguments.batch_size or _BATCH_SIZE,
        workers=arguments.workers or 1,
        self_test=not arguments.no_self_test,
    )
    inputs = list(find_inputs(arguments.paths))
    tally = Tally()
    precision, providers = "", set()
    start = time.perf_counter()
    with (
        contextlib.closing(
            rayjob.classify(job, inputs, arguments.output, address=arguments.ray)
        ) as parts,
        _progress(len(inputs)) as advance,
    ):
        for part in parts:
            tally.merge(part.tally)
            precision = part.precision
            providers.add(part.provider)
            advance(part.tally.inputs)
            if arguments.max_errors is not None and tally.failed > arguments.max_errors:
                break
    summary = tally.summary(
        model=_model_name(arguments.model),
        precision=precision,
        provider=", ".join(sorted(providers)),
        seconds=time.perf_counter() - start,
    )
    return _conclude(arguments, summary)


def _conclude(arguments: argparse.Namespace, summary: Summary) -> int:
    if arguments.max_errors is not None and summary.failed > arguments.max_errors:
        print(
            f"tinyserve: stopped: more than {arguments.max_errors:,} inputs failed",
            file=sys.stderr,
        )
    for line in _summary_lines(summary):
        print(line, file=sys.stderr)
    if arguments.summary:
        document = json.dumps(dataclasses.asdict(summary), indent=2) + "\n"
        try:
            Path(arguments.summary).write_text(document)
        except OSError as error:
            raise OutputError(f"cannot write {arguments.summary}: {error.strerror}") from error
    return SOME_FAILED if summary.failed else 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Settings:
    device: str | None
    workers: int
    batch_size: int


def _settings(arguments: argparse.Namespace) -> _Settings:
    """What the arguments say, then with --tuned what was measured, then the defaults."""
    tuned = None
    device = arguments.device
    if arguments.tuned:
        from tinyserve import bench as bench_module

        precision = arguments.precision
        precisions = preferred_precisions(device) if precision == "auto" else (precision,)
        tuned = bench_module.tuned(find_model(arguments.model, precisions))
    return _Settings(
        device=device or (tuned.device if tuned else None),
        workers=arguments.workers or (tuned.workers if tuned else default_threads()),
        batch_size=arguments.batch_size or (tuned.batch_size if tuned else _BATCH_SIZE),
    )


@contextlib.contextmanager
def _progress(total: int | None, *, rows: bool = False) -> Iterator[Callable[..., object]]:
    """What to call with how many images are done, by default one, for the bar on stderr, if that is
    a terminal. Where rows are printed on a terminal, they show the progress themselves, and a bar
    would run through them."""
    if not sys.stderr.isatty() or (rows and sys.stdout.isatty()):
        yield lambda _=1: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="image", leave=False) as bar:
        yield bar.update


def models(arguments: argparse.Namespace) -> int:
    found = installed_models()
    default = _default_file()
    if not found:
        raise ModelFileError(f"no models in {', '.join(map(str, search_folders()))}")
    cards: dict[str, ModelCard] = {}
    for name, path in found.items():
        try:
            cards[name] = read_card(path)
        except TinyserveError as error:
            print(f"tinyserve: {error}", file=sys.stderr)
    if arguments.json:
        documents = [_model_document(name, found[name], card) for name, card in cards.items()]
        print(json.dumps(documents, indent=2))
    else:
        header: tuple[str, ...] = (
            "model",
            "precision",
            "parameters",
            "classes",
            "top-1",
            "size",
            "file",
        )
        rows = [_model_row(name, found[name], cards[name], default) for name in cards]
        _print_columns([header, *rows])
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
        "val_top1": card.accuracy[0] if card.accuracy else None,
        "val_images": training.val_images if training else None,
        "bytes": path.stat().st_size,
        "path": str(path),
    }


def _model_row(
    name: str, path: Path, card: ModelCard, default: Path | None
) -> tuple[str, str, str, str, str, str, str]:
    return (
        name + ("*" if path == default else ""),
        card.precision,
        f"{card.parameters / 1e6:.2f} M",
        str(len(card.labels)),
        f"{100 * card.accuracy[0]:.2f} %" if card.accuracy else "",
        f"{path.stat().st_size / 2**20:.1f} MiB",
        str(path),
    )


def info(arguments: argparse.Namespace) -> int:
    path = _file_of(arguments.model)
    card = read_card(path)
    if arguments.json:
        document = dataclasses.asdict(card)
        if card.golden is not None:  # hundreds of kilobytes that nobody reads
            document["golden"] = {
                "count": card.golden.count,
                "tolerance": card.golden.tolerance,
            }
        print(json.dumps({"path": str(path), **document}, indent=2))
    else:
        _print_columns(list(_card_lines(path, card)))
    return 0


def labels(arguments: argparse.Namespace) -> int:
    found = read_card(_file_of(arguments.model)).labels
    if arguments.json:
        print(json.dumps([dataclasses.asdict(label) for label in found], indent=2))
    else:
        _print_columns(
            [(str(index), label.wnid or "", label.name) for index, label in enumerate(found)]
        )
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from tinyserve import verify as verification

    classifier = Classifier(arguments.model, device=arguments.device, self_test=False)
    name = classifier.engine.path.stem
    test = verification.self_test(classifier)
    document: dict[str, Any] = {"model": name, "self_test": dataclasses.asdict(test)}
    device = device_name(test.provider)
    lines = [f"{name}: graph and metadata are as they were exported"]
    if test.max_difference is None:
        lines.append("it carries no golden images")
    else:
        lines.append(
            f"{test.golden_images} golden images on {device}: largest difference of a probability "
            f"{test.max_difference:.1e}, {test.tolerance:g} allowed"
        )
    if arguments.data is not None:
        inputs = list(find_inputs([_validation_folder(arguments.data)]))
        with _progress(len(inputs)) as advance:
            found = verification.replay(classifier, inputs, lambda _: advance())
        document["replay"] = {**dataclasses.asdict(found), "difference": found.difference}
        relation = "as many as"
        if found.difference:
            relation = f"{abs(found.difference)} {'more' if found.difference > 0 else 'fewer'} than"
        lines.append(
            f"top-1 {100 * found.correct_top1 / found.images:.2f} % "
            f"({found.correct_top1:,} of {found.images:,}) on {device}, {relation} on "
            f"{device_name(found.expected_provider)} when it was exported"
        )
    print(json.dumps(document, indent=2) if arguments.json else "\n".join(lines))
    return 0


def compare(arguments: argparse.Namespace) -> int:
    from tinyserve import compare as comparison

    names = (arguments.a, arguments.b)
    a, b = (Classifier(name, device=arguments.device) for name in names)
    inputs = list(find_inputs([_validation_folder(arguments.data)]))
    with _progress(len(inputs)) as advance:
        found = comparison.compare(a, b, inputs, batch_size=arguments.batch_size, watch=advance)
    if found.unreadable:
        print(f"tinyserve: {found.unreadable:,} images cannot be read", file=sys.stderr)
    code = SOME_FAILED if found.unreadable else 0
    if arguments.json:
        print(json.dumps({"models": names, **dataclasses.asdict(found)}, indent=2))
        return code
    sides = (found.a, found.b)
    _print_columns(
        [
            ("", *(f"{letter}: {_model_name(n)}" for letter, n in zip("AB", names, strict=True))),
            ("top-1", *(f"{100 * side.top1:.2f} %" for side in sides)),
            ("right", *(f"{side.correct:,} of {found.images:,}" for side in sides)),
            ("only this one right", f"{found.only_a_right:,}", f"{found.only_b_right:,}"),
            ("images/s", *(f"{side.images_per_second:,.0f}" for side in sides)),
            ("device", *(device_name(side.provider) for side in sides)),
        ]
    )
    print(
        f"the same top-1 on {100 * found.agreement:.2f} %; p = {found.p_value:.2g} "
        f"(McNemar, exact); B is {found.speed_ratio:.2f} times as fast as A"
    )
    return code


def adopt(arguments: argparse.Namespace) -> int:
    from tinyserve.adopt import adopt as adopt_model
    from tinyserve.adopt import read_labels

    output = Path(arguments.output)
    card = adopt_model(
        Path(arguments.source),
        output,
        labels=read_labels(Path(arguments.labels)),
        mean=arguments.mean,
        std=arguments.std,
        size=arguments.size,
    )
    print(output)
    (entry,) = card.evidence
    print(
        f"largest difference of a probability from {entry.reference}: {entry.max_difference:.1e}, "
        f"batches of {', '.join(map(str, entry.batch_sizes))}",
        file=sys.stderr,
    )
    return 0


def triton(arguments: argparse.Namespace) -> int:
    from tinyserve.triton import write_repository

    models = {_model_name(name): _file_of(name) for name in arguments.model.split(",")}
    for folder in write_repository(Path(arguments.output), models):
        print(folder)
    print(
        f"serve it with: tritonserver --model-repository={os.path.abspath(arguments.output)}",
        file=sys.stderr,
    )
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    from tinyserve import doctor as diagnosis

    # What a model falls back from is in its row.
    logging.getLogger("tinyserve").setLevel(logging.ERROR)
    found = diagnosis.diagnose()
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return found.exit_code
    version = found.tinyserve or "(not installed)"
    print(f"tinyserve {version}, Python {found.python}, {found.platform}")
    marks = {"ok": "ok", "absent": "-", "problem": "PROBLEM"}
    _print_columns([(marks[check.status], check.name, check.found) for check in found.checks])
    if found.default_device:
        print(f"models run on {found.default_device} by default")
    else:
        print("models do not run by default")
    return found.exit_code


def bench(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from tinyserve import bench as bench_module

    files = [_file_of(name) for name in arguments.model or installed_models()]
    workers = arguments.workers or sorted({1, default_threads()})
    found = []
    seconds = arguments.seconds
    measured = bench_module.measure(
        files, arguments.device or ["auto"], workers, arguments.batch_size, seconds=seconds
    )
    total = len(files) * len(arguments.device or ["auto"]) * len(workers)
    with tqdm(total=total * len(arguments.batch_size), disable=None, leave=False) as bar:
        for entry in measured:
            found.append(entry)
            bar.update()
    fastest = bench_module.best(found)
    saved = bench_module.save(fastest)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in found], indent=2))
    else:
        _print_columns([_BENCH_HEADER, *(_bench_row(entry, fastest) for entry in found)])
        print("images/s; * the fastest of each file from image files to rows")
    print(f"kept for classify --tuned: {saved}", file=sys.stderr)
    return 0


_BENCH_HEADER = (
    *("model", "device", "workers", "batch", "session", "end to end", "ratio"),
    *("one image p50", "p99", "cold start", "memory"),
)


def _bench_row(entry: "Measurement", fastest: dict[str, "Measurement"]) -> tuple[str, ...]:
    settings = entry.settings
    memory = "" if entry.peak_bytes is None else f"{entry.peak_bytes / 2**20:.0f} MiB"
    return (
        _model_name(entry.file),
        device_name(entry.provider),
        str(settings.workers),
        str(settings.batch_size),
        f"{entry.session:,.0f}",
        f"{entry.end_to_end:,.0f}{' *' if fastest[entry.file] is entry else ''}",
        f"{entry.end_to_end / entry.session:.2f}",
        f"{entry.p50_ms:.2f} ms",
        f"{entry.p99_ms:.2f} ms",
        f"{entry.cold_start:.2f} s",
        memory,
    )


def serve(arguments: argparse.Namespace) -> int:
    from tinyserve.server import Settings
    from tinyserve.server import serve as serve_http

    serve_http(
        Settings(
            models=tuple(arguments.model or [DEFAULT_MODEL]),
            host=arguments.host,
            port=arguments.port,
            device=arguments.device,
            max_batch_size=arguments.max_batch_size,
            max_delay_ms=arguments.max_delay_ms,
            max_queue=arguments.max_queue,
            api_key_file=Path(arguments.api_key_file) if arguments.api_key_file else None,
            log_format=arguments.log_format,
        )
    )
    return 0


def _validation_folder(data: str) -> str:
    """``val/`` of a data set, or the folder itself."""
    inside = os.path.join(data, "val")
    return inside if os.path.isdir(inside) else data


def _card_lines(path: Path, card: ModelCard) -> Iterator[tuple[str, str]]:
    size, classes = card.image_size, len(card.labels)
    seen = "all" if card.crop == size else f"the centre {card.crop} x {card.crop}"
    if card.network_size != card.crop:
        seen += f", shrunk to {card.network_size} x {card.network_size}"
    if card.views > 1:
        seen += f", in {card.views} views whose answers are averaged"
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
    for entry in card.evidence:
        accuracy = ""
        if entry.val_images:
            accuracy = f"; right on {entry.correct_top1:,} of {entry.val_images:,} images"
        yield (
            "evidence",
            f"{device_name(entry.provider)}, ONNX Runtime {entry.onnxruntime}: "
            f"{100 * entry.top1_agreement:g} % the same top-1 as {entry.reference} on "
            f"{entry.images:,} images, batches of {', '.join(map(str, entry.batch_sizes))}; "
            f"largest difference of a probability {entry.max_difference:.1e}{accuracy}",
        )
    if calibration := card.calibration:
        yield (
            "calibration",
            f"temperature {calibration.temperature:.3f}, fitted on "
            f"{calibration.fitted_images:,} images of {calibration.source}; expected calibration "
            f"error on {calibration.images:,} others {100 * calibration.ece:.1f} points, "
            f"{100 * calibration.ece_before:.1f} without",
        )
    if golden := card.golden:
        yield (
            "self-test",
            f"{golden.count} golden images; a probability may be off by {golden.tolerance:g}",
        )


def _how(training: Training) -> str:
    return (
        f"recipe {training.recipe}, {training.epochs} epochs, seed {training.seed}, "
        f"{training.precision}, commit {training.commit}"
    )


def _summary_lines(summary: Summary) -> Iterator[str]:
    kept = f", {summary.kept:,} of them done before" if summary.kept else ""
    yield (
        f"{summary.inputs:,} images{kept}, {summary.failed:,} failed; {summary.model} "
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
    if summary.min_confidence is not None and summary.coverage is not None:
        line = (
            f"decided at {summary.min_confidence:.2f} or more: {summary.ok:,}, "
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


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _file_of(model: str) -> Path:
    """The file that ``classify`` would use."""
    return find_model(model, preferred_precisions())


def _default_file() -> Path | None:
    """Of the default model; None where it is not installed."""
    try:
        return _file_of(DEFAULT_MODEL)
    except ModelFileError:
        return None


def _model_name(model: str) -> str:
    return Path(model).name.removesuffix(".onnx")


def _three_numbers(text: str) -> list[float]:
    numbers = [float(part) for part in text.split(",")]
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError("must be three numbers, separated by commas")
    return numbers


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError("must be from 0 to 1")
    return number


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _none_or_more(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return number


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError("must be a number from 0")
    return number


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65_535:
        raise argparse.ArgumentTypeError("must be from 0 to 65535")
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
    add(
        "paths",
        nargs="+",
        metavar="PATH",
        help="files, folders (searched recursively), globs, .zip, .tar and .parquet archives, or - "
        "for paths on stdin",
    )
    add("-m", "--model", default=DEFAULT_MODEL, help="name or .onnx file (default: %(default)s)")
    add("-k", "--topk", type=_at_least_one, default=5, help="predictions an image (default: 5)")
    add("-b", "--batch-size", type=_at_least_one, help=f"default: {_BATCH_SIZE}")
    add("--device", choices=DEVICES, help="default: $TINYSERVE_DEVICE or auto")
    add(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="of a model that is there in several (default: auto, what suits the device)",
    )
    add(
        "-j",
        "--workers",
        type=_at_least_one,
        metavar="N",
        help="batches at a time, between which the cores are shared (default: one a core)",
    )
    add(
        "--tuned",
        action="store_true",
        help="with the device, workers and batch size that `tinyserve bench` found fastest here",
    )
    add("--no-self-test", action="store_true", help="do not replay the file's golden images first")
    add("--format", choices=FORMATS, help="default: table, or by the suffix of -o")
    add(
        "--submission",
        dest="format",
        action="store_const",
        const="submission",
        help="write what Tiny ImageNet's test server takes: file name and WordNet id",
    )
    add("-o", "--output", metavar="FILE", help="write the rows here instead of to stdout")
    add(
        "--ray",
        nargs="?",
        const=rayjob.LOCAL,
        metavar="ADDRESS",
        help="on the machines of a Ray cluster (default: one that is started here); -o is a folder",
    )
    add("--resume", action="store_true", help="keep the rows in -o that still hold, add the others")
    add("--max-errors", type=_none_or_more, metavar="N", help="stop when more inputs than N failed")
    add("--summary", metavar="FILE", help="write the summary here, too, as JSON")
    add("--report", type=Path, metavar="DIR", help="write a page with all figures into this folder")
    least = command.add_mutually_exclusive_group().add_argument
    least("--min-confidence", type=_share, metavar="P", help="what is less sure becomes unknown")
    least(
        "--target-precision",
        type=_share,
        metavar="P",
        help="the least confidence that was right so often on the images held out of training",
    )

    command = commands.add_parser("models", help="list the models that are installed")
    command.set_defaults(command=models)
    command.add_argument("--json", action="store_true")

    command = commands.add_parser("info", help="print what a model file says of itself")
    command.set_defaults(command=info)
    command.add_argument("model", metavar="MODEL", help="name or .onnx file")
    command.add_argument("--json", action="store_true")

    command = commands.add_parser("labels", help="print the classes of a model, in their order")
    command.set_defaults(command=labels)
    command.add_argument("model", metavar="MODEL", help="name or .onnx file")
    command.add_argument("--json", action="store_true")

    command = commands.add_parser(
        "verify",
        help="check that a model file does here what was measured when it was made",
        description="Check that a model file is unchanged and answers as it should: its golden "
        "images always, and with --data its accuracy. Exit code 4 where it does not.",
    )
    command.set_defaults(command=verify)
    add = command.add_argument
    add("model", metavar="MODEL", help="name or .onnx file")
    add("--data", metavar="DIR", help="the validation images that its accuracy was measured on")
    add("--device", choices=DEVICES, help="default: $TINYSERVE_DEVICE or auto")
    add("--json", action="store_true")

    command = commands.add_parser(
        "compare", help="compare two models on the same images: accuracy, agreement, speed"
    )
    command.set_defaults(command=compare)
    add = command.add_argument
    add("a", metavar="A", help="name or .onnx file")
    add("b", metavar="B", help="name or .onnx file")
    add("--data", metavar="DIR", required=True, help="labelled images, or a data set with val/")
    add("-b", "--batch-size", type=_at_least_one, default=32, help="default: %(default)s")
    add("--device", choices=DEVICES, help="default: $TINYSERVE_DEVICE or auto")
    add("--json", action="store_true")

    command = commands.add_parser(
        "bench",
        help="measure the models on this machine",
        description="Measure speed, latency, cold start and memory of models on this machine, and "
        "keep the fastest settings for `classify --tuned`.",
    )
    command.set_defaults(command=bench)
    add = command.add_argument
    add(
        "-m",
        "--model",
        action="append",
        help="name or .onnx file, repeatable (default: every file that is installed)",
    )
    add("--device", action="append", choices=DEVICES, help="repeatable (default: auto)")
    add(
        "-j",
        "--workers",
        action="append",
        type=_at_least_one,
        metavar="N",
        help="repeatable (default: 1 and one a core)",
    )
    add(
        "-b",
        "--batch-size",
        nargs="+",
        type=_at_least_one,
        default=[1, 8, 32, 64],
        metavar="N",
        help="default: 1 8 32 64",
    )
    add("--seconds", type=float, default=1.0, help="for each figure (default: %(default)s)")
    add("--json", action="store_true")

    command = commands.add_parser(
        "adopt",
        help="make a model file of any image classifier in ONNX",
        description="Wrap an ONNX classifier that takes normalised images, float [batch, 3, N, N], "
        "so that everything here can serve it: preprocessing and softmax go into its graph.",
    )
    command.set_defaults(command=adopt)
    add = command.add_argument
    add("source", metavar="MODEL.onnx")
    add("--labels", metavar="FILE", required=True, help="a class a line, in the output's order")
    add("--mean", type=_three_numbers, required=True, help="R,G,B in units of 0..1")
    add("--std", type=_three_numbers, required=True, help="R,G,B in units of 0..1")
    add("--size", type=_at_least_one, required=True, help="side of the images, in pixels")
    add("-o", "--output", metavar="OUT.onnx", required=True)

    command = commands.add_parser(
        "doctor",
        help="say what runs models on this machine, and what to do about the rest",
        description="Try every device, and every installed model on the default one. Exit code 5 "
        "where a device or ONNX Runtime has a problem, 4 where only a model has.",
    )
    command.set_defaults(command=doctor)
    command.add_argument("--json", action="store_true")

    command = commands.add_parser("triton", help="write a model repository for NVIDIA Triton")
    command.set_defaults(command=triton)
    add = command.add_argument
    add("output", metavar="OUT", help="folder of the repository")
    add("-m", "--model", required=True, help="names or .onnx files, separated by commas")

    command = commands.add_parser(
        "serve",
        help="serve models over HTTP",
        description="Serve models over HTTP: the Open Inference Protocol V2 under /v2, /classify "
        "for files as they are, /metrics for Prometheus; /docs lists it all. A model file that is "
        "replaced takes over without a restart.",
    )
    command.set_defaults(command=serve)
    add = command.add_argument
    add(
        "-m",
        "--model",
        action="append",
        help=f"name or .onnx file; may be repeated, the first is the default of /classify "
        f"(default: {DEFAULT_MODEL})",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=_port, default=8000, help="default: %(default)s; 0 for any")
    add("--device", choices=DEVICES, help="default: $TINYSERVE_DEVICE or auto")
    add("--max-batch-size", type=_at_least_one, default=32, help="default: %(default)s")
    add(
        "--max-delay-ms",
        type=_not_negative,
        default=0.0,
        help="for which an image waits for others while nothing is computed (default: 0)",
    )
    add(
        "--max-queue",
        type=_at_least_one,
        default=256,
        help="images on their way at a time; more are told to come back (default: %(default)s)",
    )
    add("--api-key-file", metavar="FILE", help="ask for one of the keys in it, one a line")
    add("--log-format", choices=LOG_FORMATS, default="text", help="of requests, on stderr")
    return parser


if __name__ == "__main__":
    sys.exit(main())
