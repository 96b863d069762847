"""``tinyserve classify`` beside the session alone, beside its peers, cold, and on many inputs.

::

    python benchmarks/classify.py --data data/tiny-imagenet-200/val/images    # all of it: hours
    python benchmarks/classify.py --data data/tiny-imagenet-200/val/images --parts files \\
        --models resnet20 --limit 2000 --hf-python hf-venv/bin/python --json found.json
    python benchmarks/classify.py --parts cold,memory

Parts: ``files`` are those of ``--data``, ``photos`` are 4000 x 3000 JPEGs made of the samples,
``cold`` is one picture in a fresh process, beside ten lines that do the same, and ``memory`` is the
peak of a process with few inputs and with many. The contenders take turns, every one in a process
of its own, forwards and then backwards; medians are printed, and ratios of them.

``session`` is the model fed from memory, as ``tinyserve bench`` measures it. The peers are in
``peers/``, run the same network with the weights of the model file, and are asked for the five
likeliest classes, in a CSV file, as ours is. ``fastest`` are the settings that were best in one run
of each candidate, the defaults among them, for ours in ``tinyserve bench``. Speeds are without
loading the model and listing the files. The environment of Hugging Face's peer needs transformers
and optimum-onnx; a contender that does not run is left out, aloud.
"""

import argparse
import csv
import itertools
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from tinyserve.classifier import Classifier
from tinyserve.dataset import walk_images
from tinyserve.devices import cuda_problem, openvino_problem, usable_cores

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
SAMPLES = ROOT / "samples"
# As the installed program starts.
START = "import sys; from tinyserve.cli import main; sys.exit(main())"
TINYSERVE = [sys.executable, "-P", "-c", START]
PARTS = ("files", "photos", "cold", "memory")

BATCHES = [("-b", b, "-j", j) for b in ("16", "64", "256") for j in ("1", "2")]
SMALLER = [("-b", b, "-j", j) for b in ("1", "8", "64") for j in ("0", "1")]
SMALLER += [("-b", b, "-j", "2") for b in ("1", "8", "64")]
CANDIDATES: dict[str, list[tuple[str, ...]]] = {
    # In bf16 first, and then in fp32, which is faster on processors that have no bf16.
    "torch": [(*kind, *options) for kind in (["--fast"], []) for options in BATCHES],
    "timm": [
        (*kind, "--channels-last", *options) for kind in (["--amp"], []) for options in BATCHES
    ],
    "huggingface": [("--fast", *options) for options in SMALLER],
}
"""What a peer is tried with beside its defaults, in this order."""
SCRIPTS = {
    "torch": "torch_dataloader.py",
    "timm": "timm_loader.py",
    "huggingface": "hf_pipeline.py",
}


class DoesNotRunError(Exception):
    """A contender's process failed; the message is the last that it said."""


@dataclass(frozen=True)
class Run:
    """One process: images a second without loading the model, seconds from its start to its end,
    its largest memory, and the likeliest class of each image."""

    images: int
    images_per_second: float
    process_seconds: float
    peak_mib: float
    top1: list[int] | None = None


@dataclass
class Contender:
    """Who does a job, with which settings, and what came of it."""

    name: str
    settings: str
    options: Sequence[str]
    run: Callable[[Sequence[str]], Run]
    runs: list[Run] = field(default_factory=list)

    @property
    def speed(self) -> float:
        return statistics.median(run.images_per_second for run in self.runs)


def process(command: Sequence[object], cache: Path) -> tuple[str, float, float]:
    """Output, seconds and peak MiB of a process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has its bytecode
    with tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        try:
            child = subprocess.Popen(
                [str(part) for part in command],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        except OSError as error:
            raise DoesNotRunError(str(error)) from error
        assert child.stdout is not None
        with child.stdout:
            output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            said = errors.read().strip().splitlines() or [f"exit code {child.returncode}"]
            raise DoesNotRunError(said[-1])
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return output, seconds, peak


class Job:
    """A model, a folder of images, and links to some of these, for the peers."""

    def __init__(self, model: str, folder: Path, links: Path, scratch: Path) -> None:
        engine = Classifier(model, self_test=False).engine
        self.model, self.file, self.provider = model, engine.path.resolve(), engine.provider
        self.folder, self.links, self.scratch = folder, links, scratch

    def ours(self, options: Sequence[str]) -> Run:
        rows, summary = self.scratch / "rows.csv", self.scratch / "summary.json"
        command = [*TINYSERVE, "classify", self.folder, "-m", self.file, "-o", rows]
        _, seconds, peak = process([*command, "--summary", summary, *options], self.scratch)
        found = json.loads(summary.read_text())
        with rows.open(newline="", encoding="utf-8") as file:
            top1 = [int(row["index_1"] or -1) for row in csv.DictReader(file)]
        return Run(found["inputs"], found["images_per_second"], seconds, peak, top1)

    def bench(self, options: Sequence[str]) -> list[dict[str, Any]]:
        command = [*TINYSERVE, "bench", "-m", self.file, "--json", *options]
        found: list[dict[str, Any]] = json.loads(process(command, self.scratch)[0])
        return found

    def session(self, options: Sequence[str]) -> Run:
        (found,) = self.bench(options)
        return Run(0, found["session"], found["cold_start"], found["peak_bytes"] / 2**20)

    def peer(self, name: str, python: str, model: Path) -> Callable[[Sequence[str]], Run]:
        def run(options: Sequence[str]) -> Run:
            rows = self.scratch / f"{name}.csv"
            command = [python, PEERS / SCRIPTS[name], self.links, "--model", model, "--rows", rows]
            output, seconds, peak = process([*command, *options], self.scratch)
            found = json.loads(output.splitlines()[-1])
            with rows.open(newline="") as file:
                # Links are numbered in the order of the files.
                top1 = [int(best) for _, best, *_ in sorted(csv.reader(file))]
            return Run(found["images"], found["images_per_second"], seconds, peak, top1)

        return run


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def link(files: Iterable[Path], folder: Path) -> Path:
    """A folder with links to files, numbered, all in one folder more as class folders are."""
    inside = folder / "images"
    inside.mkdir(parents=True)
    for number, file in enumerate(files):
        (inside / f"{number:06}{file.suffix}").symlink_to(file.resolve())
    return folder


def make_photos(count: int, folder: Path) -> Path:
    """So many JPEGs of 4000 x 3000: each sample enlarged, with noise, and links to them if more
    are wanted."""
    folder.mkdir()
    noise = np.random.default_rng(0).normal(0, 6, (3000, 4000, 1)).astype(np.int16)
    samples = sorted(SAMPLES.glob("*/*"))
    for number in range(count):
        path = folder / f"{number:04}.jpg"
        if number >= len(samples):
            os.link(folder / f"{number % len(samples):04}.jpg", path)
            continue
        with Image.open(samples[number]) as sample:
            large = sample.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC)
        pixels = np.clip(np.asarray(large) + np.roll(noise, number, axis=1), 0, 255)
        path.write_bytes(simplejpeg.encode_jpeg(pixels.astype(np.uint8), quality=90))
    return folder


def ours_of(job: Job, arguments: argparse.Namespace) -> list[Contender]:
    """Ours and the session alone, each as by default and as fastest."""
    tell(f"{job.model}: looking for the fastest settings, tinyserve")
    found = job.bench(["--seconds", str(arguments.seconds)])
    best = max(found, key=lambda row: float(row["end_to_end"]))["settings"]
    # bench tries as many workers as classify has by default, and fewer.
    workers = max(row["settings"]["workers"] for row in found)
    # Ours finds a batch size while it works; the session has the best that bench tried.
    alone = [row for row in found if row["settings"]["workers"] == workers]
    batch_size = max(alone, key=lambda row: float(row["session"]))["settings"]["batch_size"]
    default = ("-j", str(workers), "-b", str(batch_size))
    fastest = ("-j", str(best["workers"]), "-b", str(best["batch_size"]))
    seconds = ("--seconds", str(arguments.seconds))
    return [
        Contender("session", "default", (*default, *seconds), job.session),
        Contender("tinyserve", "default", (), job.ours),
        Contender("session", "fastest", (*fastest, *seconds), job.session),
        Contender("tinyserve", "fastest", fastest, job.ours),
    ]


def peers_of(job: Job, arguments: argparse.Namespace) -> list[Contender]:
    """The peers that run here, each as by default and as fastest."""
    contenders = []
    for name in arguments.peers:
        python = arguments.hf_python if name == "huggingface" else arguments.peer_python
        try:
            model = job.file
            if name == "huggingface":
                model = job.scratch / f"{job.file.stem}-hf"
                if not model.exists():
                    export = [arguments.peer_python, PEERS / "hf_export.py", job.file, model]
                    process(export, job.scratch)
            run = job.peer(name, python, model)
            tell(f"{job.model}: looking for the fastest settings, {name}")
            speeds = {
                options: run(options).images_per_second
                for options in [(), *CANDIDATES[name][: arguments.candidates]]
            }
        except DoesNotRunError as error:
            tell(f"{job.model}: {name} is left out: {error}")
            continue
        contenders += [
            Contender(name, "default", (), run),
            Contender(name, "fastest", max(speeds, key=speeds.__getitem__), run),
        ]
    return contenders


def take_turns(contenders: Sequence[Contender], rounds: int) -> None:
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            contender.runs.append(contender.run(contender.options))


def speed_table(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """One row for each contender, with its ratios to ours in the same kind of settings."""
    by_key = {(c.name, c.settings): c for c in contenders}
    rows = []
    for contender in contenders:
        ours = by_key["tinyserve", contender.settings]
        session = by_key["session", contender.settings]
        run = contender.runs[-1]
        same = None
        if run.top1 is not None and ours.runs[-1].top1 is not None:
            pairs = list(zip(run.top1, ours.runs[-1].top1, strict=False))
            same = sum(a == b for a, b in pairs) / len(pairs)
        rows.append(
            {
                "name": contender.name,
                "settings": contender.settings,
                "options": " ".join(contender.options),
                "images": run.images,
                "images_per_second": contender.speed,
                "rounds": [run.images_per_second for run in contender.runs],
                "of_session": contender.speed / session.speed if contender is ours else None,
                "ours_is": None if contender in (ours, session) else ours.speed / contender.speed,
                "same_top1_as_ours": None if contender.name == "session" else same,
                "process_seconds": statistics.median(r.process_seconds for r in contender.runs),
                "peak_mib": max(run.peak_mib for run in contender.runs),
            }
        )
    return rows


def cold_starts(arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Whole processes that classify one picture; the last of them is the ten lines."""
    sample = next(SAMPLES.glob("*/*"))
    file = Job(arguments.models[0], SAMPLES, SAMPLES, scratch).file
    commands: dict[str, list[object]] = {
        "tinyserve classify": [*TINYSERVE, "classify", sample, "-m", file],
        "tinyserve classify --device cpu": [
            *TINYSERVE, "classify", sample, "-m", file, "--device", "cpu"
        ],
        "ten lines": [sys.executable, PEERS / "ten_lines.py", file, sample],
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in commands}
    for command in commands.values():
        process(command, scratch)  # the first compiles, and tests the model file
    for number in range(4 * arguments.rounds):  # they are short
        for name in commands if number % 2 == 0 else reversed(commands):
            found[name].append(process(commands[name], scratch)[1])
    least = statistics.median(found["ten lines"])
    return [
        {
            "name": name,
            "seconds": statistics.median(seconds),
            "of_ten_lines": statistics.median(seconds) / least,
            "rounds": seconds,
        }
        for name, seconds in found.items()
    ]


def peaks(arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """The largest memory of a job, of few inputs and of many."""
    samples = sorted(SAMPLES.glob("*/*"))
    found: dict[int, list[float]] = {}
    for count in arguments.memory_inputs:
        link(itertools.islice(itertools.cycle(samples), count), scratch / str(count))
        found[count] = []
    for number in range(arguments.rounds):
        for count in found if number % 2 == 0 else reversed(found):
            tell(f"memory: {count:,} inputs, round {number + 1} of {arguments.rounds}")
            command = [*TINYSERVE, "classify", scratch / str(count), "-m", "baseline"]
            command += ["--format", "csv", "-o", os.devnull]
            found[count].append(process(command, scratch)[2])
    first = statistics.median(found[arguments.memory_inputs[0]])
    return [
        {
            "inputs": count,
            "peak_mib": statistics.median(mib),
            "more_mib": statistics.median(mib) - first,
            "rounds": mib,
        }
        for count, mib in found.items()
    ]


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join([f"{first.strip():<{widths[0]}}", *others]).rstrip())


def print_speeds(title: str, rows: Sequence[dict[str, Any]]) -> None:
    print(title)
    header = ("", "images", "images/s", "of the session", "ours is", "same top-1", "process")
    table = [
        (
            f"{row['name']}, {row['settings']} {row['options']}".strip(),
            f"{row['images']:,}" if row["images"] else "",
            f"{row['images_per_second']:,.0f}",
            f"{row['of_session']:.2f}" if row["of_session"] else "",
            f"{row['ours_is']:.2f} x" if row["ours_is"] else "",
            f"{row['same_top1_as_ours']:.1%}" if row["same_top1_as_ours"] is not None else "",
            f"{row['process_seconds']:.1f} s",
        )
        for row in rows
    ]
    print_columns([header, *table])
    for settings in ("default", "fastest"):
        peers = [row for row in rows if row["ours_is"] and row["settings"] == settings]
        if peers:
            best = min(peers, key=lambda row: float(row["ours_is"]))
            print(f"ours, {settings}: {best['ours_is']:.2f} x the best peer's, {best['name']}")
    print(flush=True)


def speeds(part: str, arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """The part ``files`` or ``photos``, model for model."""
    folder = arguments.data
    if part == "photos":
        tell(f"making {arguments.photos} photos")
        folder = make_photos(arguments.photos, scratch / "photos")
    files = [Path(path) for path in walk_images(folder)]
    links = link(files[: arguments.limit], scratch / f"{part}-links")
    found = []
    for model in arguments.models:
        job = Job(model, folder, links, scratch)
        contenders = [*ours_of(job, arguments), *peers_of(job, arguments)]
        take_turns(contenders, arguments.rounds)
        rows = speed_table(contenders)
        print_speeds(
            f"{part}: {job.file.name}, {job.provider}, medians of {arguments.rounds}", rows
        )
        found.append(
            {"part": part, "model": job.file.name, "provider": job.provider, "contenders": rows}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument

    def names(known: Iterable[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            found = [name for name in text.split(",") if name]
            if unknown := set(found) - set(known):
                raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
            return found

        return parse

    add("--data", type=Path, default=SAMPLES, help="folder of images (default: samples/)")
    add("--parts", type=names(PARTS), default=PARTS, help=f"default: {','.join(PARTS)}")
    add(
        "--models",
        type=lambda text: text.split(","),
        default=["resnet20", "inception", "alexnet", "baseline"],
        help="default: resnet20,inception,alexnet,baseline; the first is started cold",
    )
    add("--peers", type=names(SCRIPTS), default=list(SCRIPTS), help=f"default: {','.join(SCRIPTS)}")
    add("--limit", type=int, help="files for the peers; ours takes all")
    add("--photos", type=int, default=200, help="default: %(default)s")
    add("--rounds", type=int, default=5, help="default: %(default)s; four times as many cold")
    add("--candidates", type=int, help="of a peer's settings to try, beside its own (default: all)")
    add("--seconds", type=float, default=2.0, help="for each figure of bench (default: 2)")
    add("--memory-inputs", type=int, nargs="+", default=[1_000, 100_000], metavar="N")
    add("--peer-python", default=sys.executable, help="with PyTorch and timm (default: this one)")
    add("--hf-python", default=sys.executable, help="with transformers and optimum-onnx")
    add("--json", type=Path, metavar="FILE", help="write all figures of all rounds here")
    arguments = parser.parse_args()
    if cuda_problem() is None:  # the peers run on the CPU
        os.environ.setdefault("TINYSERVE_DEVICE", "cpu" if openvino_problem() else "openvino")
    # On which device a model runs is in the tables.
    logging.getLogger("tinyserve").setLevel(logging.ERROR)

    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cores": usable_cores(),
        "rounds": arguments.rounds,
        "limit": arguments.limit,
        "speeds": [],
    }
    with tempfile.TemporaryDirectory(prefix="tinyserve-classify-") as temporary:
        scratch = Path(temporary)
        for part in arguments.parts:
            if part in ("files", "photos"):
                found["speeds"] += speeds(part, arguments, scratch)
            elif part == "cold":
                found[part] = cold_starts(arguments, scratch)
                print(f"cold start: one picture, medians of {4 * arguments.rounds}")
                rows = [
                    (row["name"], f"{row['seconds']:.3f} s", f"{row['of_ten_lines']:.2f} x")
                    for row in found[part]
                ]
                print_columns(rows)
                print(flush=True)
            else:
                found[part] = peaks(arguments, scratch)
                print(f"peak memory: baseline, medians of {arguments.rounds}")
                rows = [
                    (
                        f"{row['inputs']:,} inputs",
                        f"{row['peak_mib']:.1f} MiB",
                        f"{row['more_mib']:+.1f} MiB",
                    )
                    for row in found[part]
                ]
                print_columns(rows)
                print(flush=True)
            if arguments.json:  # as far as it has come
                arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
