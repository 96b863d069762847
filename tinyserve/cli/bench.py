"""``tinyserve bench``: how fast the models are on this machine."""

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from tinyserve.classifier import model_file
from tinyserve.cli.arguments import Commands, add_json, add_models, count, model_name, positive
from tinyserve.cli.terminal import print_columns
from tinyserve.devices import DEVICES, default_threads, device_name, wanted_device
from tinyserve.errors import ModelFileError
from tinyserve.modelfile import installed_models

if TYPE_CHECKING:
    from tinyserve.bench import Measurement


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "bench",
        help="measure the models on this machine",
        description="Measure speed, latency, cold start and memory of models on this machine, and "
        "keep the fastest settings for `classify --tuned`.",
    )
    command.set_defaults(command=bench)
    add_models(command, " (default: every file that is installed)")
    add = command.add_argument
    add(
        "--device",
        action="append",
        choices=DEVICES,
        help="may be repeated (default: $TINYSERVE_DEVICE or auto)",
    )
    add(
        "-j",
        "--workers",
        action="append",
        type=count,
        metavar="N",
        help="batches at a time; may be repeated (default: 1, and one a core)",
    )
    add(
        "-b",
        "--batch-size",
        nargs="+",
        type=count,
        default=[1, 16, 32, 64],
        metavar="N",
        help="images computed at a time (default: 1 16 32 64)",
    )
    add("--seconds", type=positive, default=1.0, help="for each figure (default: %(default)g)")
    add_json(command)


def bench(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from tinyserve import bench as bench_module

    # Of a model in several precisions, each device gets the file that classify would take there.
    files = [
        (model_file(name, device=device), device)
        for name in arguments.model or installed_models().values()
        for device in arguments.device or [wanted_device(None)]
    ]
    if not files:
        raise ModelFileError("no model files are installed: name one with -m")
    workers = arguments.workers or sorted({1, default_threads()})
    found = []
    measured = bench_module.measure(files, workers, arguments.batch_size, seconds=arguments.seconds)
    total = len(files) * len(workers) * len(arguments.batch_size)
    try:
        with tqdm(total=total, disable=None, leave=False) as bar:
            for entry in measured:
                found.append(entry)
                bar.update()
    finally:  # a later file may be a bad one, or the user tired of waiting
        if found:
            _report(found, as_json=arguments.json)
    return 0


def _report(found: "list[Measurement]", *, as_json: bool) -> None:
    from tinyserve import bench as bench_module

    fastest = bench_module.best(found)
    saved = bench_module.save(fastest)
    if as_json:
        print(json.dumps([dataclasses.asdict(entry) for entry in found], indent=2))
    else:
        print_columns([_BENCH_HEADER, *(_bench_row(entry, fastest) for entry in found)])
        print("images/s; * the fastest of each file from image files to rows")
    print(f"kept for classify --tuned: {saved}", file=sys.stderr)


_BENCH_HEADER = (
    *("model", "device", "workers", "batch", "session", "end to end", "ratio"),
    *("one image p50", "p99", "cold start", "memory"),
)


def _bench_row(entry: "Measurement", fastest: dict[str, "Measurement"]) -> tuple[str, ...]:
    settings = entry.settings
    memory = "" if entry.peak_bytes is None else f"{entry.peak_bytes / 2**20:.0f} MiB"
    return (
        model_name(entry.file),
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
