"""Inference speed of model files beside each other, and where the time of one goes.

::

    python benchmarks/inference_speed.py exported/*.onnx                 # images/s, ratios
    python benchmarks/inference_speed.py resnet20.onnx resnet20.int8.onnx --batch-size 1
    python benchmarks/inference_speed.py exported/*.int8.onnx --with-fp32 --profile
    python benchmarks/inference_speed.py resnet20.fp16.onnx --device cuda -b 512 --with-pytorch

The files take turns in one process, several rounds; medians are printed, and ratios to the first
file of the same architecture. ``--profile`` then shows where the time of each goes: by operator,
and the nodes that take the most. ``--with-fp32`` puts before each file the same weights in single
precision, for which no file is needed but the training extra is. ``--with-pytorch`` puts the same
network in PyTorch behind it, eager and compiled, from and to the host's memory as ours: in half
precision on CUDA if the file is, otherwise in single.

What the profiles of the 8-bit files led to, in the time of a batch of 32 on one core of an AMD EPYC
with VNNI:

- inception spent two fifths in its first pooling: behind a convolution in single precision channels
  come first, and there ONNX Runtime pools 8 bits without vector instructions. The first convolution
  is in 8 bits now, too.
- Subtracting a mean colour, three numbers, was a third of baseline; now it is that of a whole row.
- Joining branches of different ranges was a tenth of inception; now they share one.

Left is mostly arithmetic: convolutions take 86 % of the time of inception in 8 bits, pooling 7 %.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

from tinyserve.devices import default_threads, device_name
from tinyserve.engine import Engine
from tinyserve.errors import first_line
from tinyserve.modelfile import INPUT_NAME, ModelCard, write_model
from tinyserve.onnxruntime_session import execution_providers, session_options

SLOWEST = 6
"""How many nodes are shown by name."""


def pixels(batch: int, size: int) -> np.ndarray:
    """Noise, uint8 ``[batch, size, size, 3]``: what a picture shows takes no time."""
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


Run = Callable[[np.ndarray], np.ndarray]
"""Images, uint8 ``[batch, size, size, 3]``, to probabilities."""


@dataclass
class Contender:
    """One way to run the network of a model file."""

    name: str
    architecture: str
    what: str
    """Precision and device."""
    run: Run
    images: np.ndarray
    times: list[float] = field(default_factory=list)


def compare(paths: list[Path], device: str, batch: int, rounds: int, *, pytorch: bool) -> None:
    contenders = []
    for path in paths:
        engine = Engine(path, device=device)
        card, where = engine.card, device_name(engine.provider)
        what, images = f"{card.precision:5} {where}", pixels(batch, card.image_size)
        contenders.append(Contender(path.name, card.architecture, what, engine.run, images))
        if pytorch:
            contenders += in_pytorch(path, card, images, on_cuda=where == "CUDA")
    contenders = [contender for contender in contenders if runs(contender)]
    for _ in range(rounds):
        for contender in contenders:
            began = time.perf_counter()
            contender.run(contender.images)
            contender.times.append(time.perf_counter() - began)
    print(f"batches of {batch}, {default_threads()} threads, medians of {rounds} rounds")
    first: dict[str, float] = {}
    for contender in contenders:
        speed = batch / statistics.median(contender.times)
        ratio = speed / first.setdefault(contender.architecture, speed)
        print(f"{contender.name:24} {contender.what:11} {speed:9,.0f} images/s  {ratio:5.2f}")


def runs(contender: Contender) -> bool:
    """Whether it does, warmed up; without a C++ compiler, PyTorch compiles nothing."""
    try:
        for _ in range(3):
            contender.run(contender.images)
    except Exception as error:
        print(f"{contender.name.strip()} is left out: {first_line(error)}", file=sys.stderr)
        return False
    return True


def in_pytorch(
    path: Path, card: ModelCard, images: np.ndarray, *, on_cuda: bool
) -> list[Contender]:
    import torch

    from training import pretrained
    from training.augment import VIEWS

    device = torch.device("cuda" if on_cuda else "cpu")
    torch.backends.cudnn.benchmark = True
    served = pretrained.load(path).served(VIEWS[card.views]).eval().to(device)
    served = served.to(memory_format=torch.channels_last)
    half = on_cuda and card.precision == "fp16"
    if half:
        served.network.half().register_forward_pre_hook(lambda _, inputs: inputs[0].half())

    def runner(network: Callable[[torch.Tensor], torch.Tensor]) -> Run:
        def run(images: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return network(torch.from_numpy(images).to(device)).cpu().numpy()

        return run

    what = f"{'fp16' if half else 'fp32':5} {device.type.upper()}"
    ways = {"eager": served, "compiled": torch.compile(served, dynamic=False)}
    return [
        Contender(f"  PyTorch, {way}", card.architecture, what, runner(network), images)
        for way, network in ways.items()
    ]


def profile(path: Path, device: str, batch: int, rounds: int) -> None:
    card = Engine(path, device=device).card
    options = session_options(default_threads())
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        providers = execution_providers(device, card.precision)
        session = ort.InferenceSession(path, options, providers=providers)
        images = pixels(batch, card.image_size)
        for _ in range(rounds):
            session.run(None, {INPUT_NAME: images})
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[int]] = defaultdict(list)
    about = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            times[name].append(event["dur"])
            about[name] = event["args"]
    spent = {name: statistics.median(durations) / 1000 for name, durations in times.items()}
    by_kind: Counter[str] = Counter()
    for name, milliseconds in spent.items():
        by_kind[about[name]["op_name"]] += milliseconds
    count = Counter(node["op_name"] for node in about.values())
    total = sum(spent.values())
    print(f"\n{path.name}: {total:.2f} ms a batch of {batch}, medians of {rounds} rounds")
    for kind, milliseconds in by_kind.most_common():
        print(f"{kind:24} {count[kind]:4} nodes {milliseconds:9.2f} ms {milliseconds / total:6.1%}")
    print("of these:")
    for name in sorted(spent, key=spent.__getitem__, reverse=True)[:SLOWEST]:
        sides = [about[name][f"{side}_type_shape"][0] for side in ("input", "output")]
        shapes = " -> ".join(f"{dtype} {dims}" for side in sides for dtype, dims in side.items())
        share = spent[name] / total
        print(f"{about[name]['op_name']:35} {spent[name]:9.2f} ms {share:6.1%}  {shapes}")


def in_fp32(path: Path, folder: Path) -> Path:
    """A file in ``folder`` with the weights of another in single precision."""
    from training import export, pretrained
    from training.augment import VIEWS

    card = Engine(path, device="cpu").card
    graph = export.to_onnx(pretrained.load(path).served(VIEWS[card.views]), card.image_size)
    made = folder / f"{card.architecture}.onnx"
    card = replace(card, precision="fp32", evidence=(), golden=None)
    write_model(made, graph.SerializeToString(), card)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-b", "--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--with-fp32", action="store_true")
    parser.add_argument("--with-pytorch", action="store_true")
    arguments = parser.parse_args()
    device, batch, rounds = arguments.device, arguments.batch_size, arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for path in arguments.models:
            paths += [in_fp32(path, Path(folder)), path] if arguments.with_fp32 else [path]
        compare(paths, device, batch, rounds, pytorch=arguments.with_pytorch)
        if arguments.profile:
            for path in paths:
                profile(path, device, batch, rounds)


if __name__ == "__main__":
    main()
