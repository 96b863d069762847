"""Inference speed of model files beside each other, and where the time of one goes.

::

    python benchmarks/inference_speed.py exported/*.onnx                 # images/s, ratios
    python benchmarks/inference_speed.py resnet20.onnx resnet20.int8.onnx --batch-size 1
    python benchmarks/inference_speed.py exported/resnet20.int8.onnx --profile

The files take turns in one process, several rounds; medians are printed, and ratios to the first
file of the same architecture. ``--profile`` adds up the time of each kind of node instead.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime as ort

from tinyserve.engine import CPU, CUDA, Engine, default_threads, device_name, session_options
from tinyserve.modelfile import INPUT_NAME


def pixels(batch: int, size: int) -> np.ndarray:
    """Noise, uint8 ``[batch, size, size, 3]``: what a picture shows takes no time."""
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


def compare(paths: list[Path], device: str, batch: int, rounds: int) -> None:
    engines = {path: Engine(path, device=device) for path in paths}
    images = {path: pixels(batch, engine.card.image_size) for path, engine in engines.items()}
    times: dict[Path, list[float]] = {path: [] for path in paths}
    for path, engine in engines.items():
        engine.run(images[path])
    for _ in range(rounds):
        for path, engine in engines.items():
            began = time.perf_counter()
            engine.run(images[path])
            times[path].append(time.perf_counter() - began)
    print(f"batches of {batch}, {default_threads()} threads, medians of {rounds} rounds")
    first: dict[str, float] = {}
    for path, engine in engines.items():
        card, speed = engine.card, batch / statistics.median(times[path])
        ratio = speed / first.setdefault(card.architecture, speed)
        print(
            f"{path.name:24} {card.precision:5} {device_name(engine.provider):5} "
            f"{speed:9,.0f} images/s  {ratio:5.2f}"
        )


def profile(path: Path, device: str, batch: int, rounds: int) -> None:
    card = Engine(path, device=device).card
    options = session_options(default_threads())
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        providers = [CUDA, CPU] if device == "cuda" else [CPU]
        session = ort.InferenceSession(path, options, providers=providers)
        images = pixels(batch, card.image_size)
        for _ in range(rounds):
            session.run(None, {INPUT_NAME: images})
        events = json.loads(Path(session.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind = event["args"]["op_name"]
            spent[kind] += event["dur"]
            count[kind] += 1
    total = sum(spent.values())
    print(f"{path.name}: {total / rounds / 1000:.2f} ms a batch of {batch}, {rounds} rounds")
    for kind, microseconds in spent.most_common():
        print(
            f"{kind:24} {count[kind] // rounds:4} nodes {microseconds / rounds / 1000:9.2f} ms "
            f"{microseconds / total:6.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-b", "--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="of the first model")
    arguments = parser.parse_args()
    if arguments.profile:
        profile(arguments.models[0], arguments.device, arguments.batch_size, arguments.rounds)
    else:
        compare(arguments.models, arguments.device, arguments.batch_size, arguments.rounds)


if __name__ == "__main__":
    main()
