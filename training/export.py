"""Turn a finished run into self-describing ONNX files that have passed the gate.

::

    python -m training.export runs/inception-modern -o exported/
    python -m training.export runs/resnet20-modern --precision fp32,fp16,int8 -o exported/

A file appears under its name only after it has shown on real images that it computes what the
network does in PyTorch; otherwise it is removed and the exit code is 4.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from tinyserve.engine import CPU, Engine, cuda_problem, default_threads, device_name
from tinyserve.errors import CheckpointError, GateError, TinyserveError, UsageError
from tinyserve.modelfile import (
    INPUT_NAME,
    OUTPUT_NAME,
    Evidence,
    Golden,
    ModelCard,
    write_model,
)
from training import data, pretrained, quantize
from training.augment import VIEWS
from training.evaluate import ServedNetwork
from training.models import count_parameters

GATE_IMAGES = 1000
GATE_BATCHES = (1, 3, 64)
GOLDEN_IMAGES = 8
SPEED_ROUNDS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a file must keep to. Agreement and difference are with PyTorch in single precision, the
    loss of accuracy with the fp32 file, in fractions of the validation images."""

    agreement: float = 0.0
    max_difference: float = 1.0
    accuracy_loss: float = 1.0
    faster: bool = False
    """Faster than the fp32 file, on the CPU."""
    golden_tolerance: float
    """How far a golden probability may be off on another machine."""


BOUNDS = {
    "fp32": Bounds(agreement=1.0, max_difference=1e-4, golden_tolerance=1e-3),
    "fp16": Bounds(agreement=0.995, golden_tolerance=2e-2),
    "int8": Bounds(accuracy_loss=0.005, faster=True, golden_tolerance=5e-2),
}


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        precisions = arguments.precision.split(",")
        paths = export(
            arguments.run,
            arguments.output,
            precisions=precisions,
            views=arguments.views,
            data_root=arguments.data,
        )
    except TinyserveError as error:
        print(f"training.export: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("training.export: interrupted", file=sys.stderr)
        return 130
    print(*paths, sep="\n")
    print(f"try it with: tinyserve classify IMAGES -m {paths[0]}", file=sys.stderr)
    return 0


def export(
    run: Path,
    output: Path,
    *,
    precisions: Sequence[str] = ("fp32",),
    views: int = 1,
    data_root: Path | None = None,
) -> list[Path]:
    """Export a run, or a file exported earlier, into the folder ``output``; returns the new files.

    The gate reads images from ``data_root``, by default the data that the run was trained on.
    Raises :class:`GateError`, leaving no file of that precision behind, where one breaks a bound.
    """
    if unknown := set(precisions) - BOUNDS.keys():
        raise UsageError(f"unknown precision {sorted(unknown)[0]!r} (known: {', '.join(BOUNDS)})")
    weights = pretrained.load(run)
    root, holdout = _data_of(run, data_root)
    dataset = data.load(root, image_size=weights.image_size, skip_bad=True, holdout=holdout)
    if dataset.fingerprint != weights.training.dataset_fingerprint:
        print(f"note: {dataset.root} is not the data that the run was trained on", file=sys.stderr)
    served = weights.served(VIEWS[views])
    graph = to_onnx(served, weights.image_size)
    gate = Gate(served, graph, dataset)
    try:
        output.mkdir(parents=True, exist_ok=True)
        paths = []
        # Single precision first, whatever the order asked for: the others are compared with it.
        for precision in [name for name in BOUNDS if name in precisions]:
            converted, how = _converted(graph, precision, dataset)
            if how:
                print(how, file=sys.stderr)
            card = ModelCard(
                architecture=weights.arch,
                precision=precision,
                labels=weights.labels,
                image_size=weights.image_size,
                crop=weights.crop,
                network_size=weights.network_size,
                views=views,
                parameters=count_parameters(served.network),
                training=weights.training,
            )
            suffix = "" if precision == "fp32" else f".{precision}"
            path = output / f"{weights.arch}{suffix}.onnx"
            _write_through(gate, path, converted, card)
            paths.append(path)
    except OSError as error:
        raise UsageError(f"cannot write into {output}: {error.strerror or error}") from error
    return paths


def _converted(
    graph: onnx.ModelProto, precision: str, dataset: data.Dataset
) -> tuple[onnx.ModelProto, str | None]:
    """The graph in a precision, and what there is to say about it."""
    if precision == "fp32":
        return graph, None
    if precision == "fp16":
        copy = onnx.ModelProto()
        copy.CopyFrom(graph)
        return quantize.to_fp16(copy), None
    trained_on = np.setdiff1d(np.arange(len(dataset.train)), dataset.held_out)
    order = np.random.default_rng(0).permutation(trained_on)
    count = min(quantize.CALIBRATION_IMAGES, len(order) // 2)
    calibration = dataset.train.images[np.sort(order[:count])]
    choice = dataset.train.images[np.sort(order[count : count + quantize.CHOICE_IMAGES])]
    result = quantize.to_int8(graph, calibration, choice)
    return result.model, (
        f"int8: {result.method} ranges, {100 * result.agreement:.1f} % the same top-1 as fp32 on "
        f"{len(choice):,} training images"
    )


def _write_through(gate: "Gate", path: Path, graph: onnx.ModelProto, card: ModelCard) -> None:
    """Make a file appear at ``path`` if it passes the gate; otherwise leave what was there."""
    # The gate runs the very file that will be kept, under a name that nobody looks for.
    candidate = path.with_name(f".{path.name}.candidate")
    content = graph.SerializeToString()
    bounds = BOUNDS[card.precision]
    try:
        write_model(candidate, content, card)
        onnx.checker.check_model(candidate, full_check=True)
        evidence = gate.check(candidate, card.precision)
        images = gate.images[_spread(len(gate.images), GOLDEN_IMAGES)]
        answers = Engine(candidate, device="cpu").run(images)
        golden = Golden.of(images, answers, tolerance=bounds.golden_tolerance)
        write_model(candidate, content, replace(card, evidence=evidence, golden=golden))
        Engine(candidate, device="cpu")
        os.replace(candidate, path)
    finally:
        with suppress(OSError):
            candidate.unlink()


class Gate:
    """Compares files with the network that they come from, on validation images."""

    images: NDArray[np.uint8]
    """uint8 ``[n, size, size, 3]``, :data:`GATE_IMAGES` evenly spread over the validation split; a
    smaller split is filled up from the training split."""

    def __init__(
        self, served: ServedNetwork, graph: onnx.ModelProto, dataset: data.Dataset
    ) -> None:
        self.val = dataset.val
        chosen = [self.val.images[_spread(len(self.val), GATE_IMAGES)]]
        missing = GATE_IMAGES - len(chosen[0])
        if missing > 0:
            chosen.append(dataset.train.images[_spread(len(dataset.train), missing)])
        self.images = np.concatenate(chosen)
        with torch.inference_mode():
            self._expected = np.concatenate(
                [
                    served(torch.from_numpy(part)).numpy()
                    for part in _split(self.images, max(GATE_BATCHES))
                ]
            )
        self._fp32 = graph.SerializeToString()
        self._fp32_correct: int | None = None

    def check(self, path: Path, precision: str) -> tuple[Evidence, ...]:
        """What the file shows on every provider of this machine.

        Raises :class:`GateError` where that breaks a bound of its precision.
        """
        bounds = BOUNDS[precision]
        evidence = []
        for device in ("cpu",) if cuda_problem() else ("cpu", "cuda"):
            engine = Engine(path, device=device)
            entry = self._measure(engine, precision)
            evidence.append(entry)
            where = f"{precision} on {device_name(engine.provider)}"
            if entry.top1_agreement < bounds.agreement:
                raise GateError(
                    f"{where}: {100 * entry.top1_agreement:.2f} % have the same top-1 as in "
                    f"PyTorch, {100 * bounds.agreement:g} % is the least allowed"
                )
            if not entry.max_difference <= bounds.max_difference:
                raise GateError(
                    f"{where}: a probability differs by {entry.max_difference:.2e} from "
                    f"PyTorch's, {bounds.max_difference:.0e} is the most allowed"
                )
            if precision == "fp32" and engine.provider == CPU:
                self._fp32_correct = entry.correct_top1
            loss = (self._fp32_accuracy() - entry.correct_top1) / entry.val_images
            if loss > bounds.accuracy_loss:
                raise GateError(
                    f"{where}: top-1 is {100 * loss:.2f} points below fp32, "
                    f"{100 * bounds.accuracy_loss:g} are the most allowed"
                )
            if bounds.faster and engine.provider == CPU:
                self._check_speed(engine, where)
        return tuple(evidence)

    def _measure(self, engine: Engine, precision: str) -> Evidence:
        agreement, difference = 1.0, 0.0
        for batch in GATE_BATCHES:
            found = _run(engine, self.images, batch, f"{precision}, batches of {batch}")
            agreement = min(agreement, float((found.argmax(1) == self._expected.argmax(1)).mean()))
            difference = max(difference, float(np.abs(found - self._expected).max()))
        answers = _run(engine, self.val.images, max(GATE_BATCHES), f"{precision}, accuracy")
        correct = int((answers.argmax(1) == self.val.labels).sum())
        print(
            f"{precision} on {device_name(engine.provider)}: {100 * agreement:g} % the same top-1 "
            f"as in PyTorch, max |dp| {difference:.2e}, {len(self.images):,} images at batch "
            f"{', '.join(map(str, GATE_BATCHES))}; top-1 {100 * correct / len(self.val):.2f} % "
            f"({correct:,} of {len(self.val):,})",
            file=sys.stderr,
        )
        return Evidence(
            provider=engine.provider,
            reference=f"PyTorch {torch.__version__}, fp32",
            images=len(self.images),
            batch_sizes=GATE_BATCHES,
            top1_agreement=agreement,
            max_difference=difference,
            val_images=len(self.val),
            correct_top1=correct,
            onnxruntime=ort.__version__,
        )

    def _fp32_accuracy(self) -> int:
        """Right answers of the graph in single precision, on the CPU."""
        if self._fp32_correct is None:
            session = self._fp32_session()
            correct = 0
            for start in range(0, len(self.val), max(GATE_BATCHES)):
                part = slice(start, start + max(GATE_BATCHES))
                (rows,) = session.run([OUTPUT_NAME], {INPUT_NAME: self.val.images[part]})
                correct += int((np.asarray(rows).argmax(1) == self.val.labels[part]).sum())
            self._fp32_correct = correct
        return self._fp32_correct

    def _fp32_session(self) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = default_threads()
        return ort.InferenceSession(self._fp32, options, providers=[CPU])

    def _check_speed(self, engine: Engine, where: str) -> None:
        """Both by turns, so that what else the machine does slows both."""
        session = self._fp32_session()
        batch = self.images[:32]
        ratios = []
        for _ in range(SPEED_ROUNDS):
            began = time.perf_counter()
            session.run([OUTPUT_NAME], {INPUT_NAME: batch})
            between = time.perf_counter()
            engine.run(batch)
            ratios.append((between - began) / (time.perf_counter() - between))
        ratio = statistics.median(ratios)
        print(f"{where}: {ratio:.2f} times as fast as fp32, batches of 32", file=sys.stderr)
        if ratio <= 1:
            raise GateError(f"{where}: {ratio:.2f} times as fast as fp32, which is not faster")


def to_onnx(served: ServedNetwork, image_size: int) -> onnx.ModelProto:
    """The graph uint8 ``[batch, image_size, image_size, 3]`` to float32 ``[batch, classes]``."""
    # A batch of one would be taken for a constant.
    example = torch.zeros((2, image_size, image_size, 3), dtype=torch.uint8)
    with _quiet_exporter():
        program = torch.onnx.export(
            served,
            (example,),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    # The exporter notes for every node where in which file it was made; none of that is the user's.
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")
    return model


def _spread(count: int, wanted: int) -> NDArray[np.int64]:
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64)


def _split(images: NDArray[np.uint8], batch: int) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(images), batch):
        yield images[start : start + batch]


def _run(engine: Engine, images: NDArray[np.uint8], batch: int, what: str) -> NDArray[np.float32]:
    """Probabilities of all images, ``[n, classes]``."""
    parts = tqdm(list(_split(images, batch)), desc=what, disable=None, leave=False)
    return np.concatenate([engine.run(part) for part in parts])


def _data_of(run: Path, named: Path | None) -> tuple[Path, int]:
    """The folder that was named, or else that a run was trained on, and how many images of it the
    run held out, as its config.json remembers them."""
    if run.is_file():
        if named is None:
            raise UsageError(f"{run} does not say where its data is: name it with --data")
        return named, 0
    try:
        document = json.loads((run / "config.json").read_text())
        return named or Path(document["data"]), document.get("config", {}).get("holdout", 0)
    except (OSError, ValueError, KeyError) as error:
        if named is not None:
            return named, 0
        raise CheckpointError(
            f"{run / 'config.json'} does not say what the run was trained on; name it with --data"
        ) from error


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter warns of operators it does not know and code it will change; neither is ours."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", type=Path, help="folder of a finished run, or its exported fp32 file"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("exported"), help="folder to write to"
    )
    parser.add_argument(
        "--precision", default="fp32", help=f"of {', '.join(BOUNDS)}, separated by commas"
    )
    parser.add_argument(
        "--views",
        type=int,
        choices=sorted(VIEWS),
        default=1,
        help="average this many views of an image: 2 mirrors it, 10 crops the corners, too",
    )
    parser.add_argument("--data", type=Path, help="default: the data that the run was trained on")
    return parser


if __name__ == "__main__":
    sys.exit(main())
