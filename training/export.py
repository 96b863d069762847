"""Turn a finished run into self-describing ONNX files that have passed the gate.

::

    python -m training.export runs/inception-modern -o models/
    python -m training.export runs/resnet20-modern --precision fp32,fp16,int8 -o models/

A file appears under its name only after it has shown on real images that it computes what the
network does in PyTorch; otherwise what was there stays and the exit code is 4.
"""

import argparse
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch

from tinyserve.engine import Engine, read_card
from tinyserve.errors import (
    CheckpointError,
    DataError,
    TinyserveError,
    UsageError,
    describe_os_error,
    os_reason,
)
from tinyserve.files import candidate
from tinyserve.modelfile import (
    INPUT_NAME,
    OUTPUT_NAME,
    Golden,
    ModelCard,
    Training,
    write_model,
)
from training import data, pretrained, quantize
from training.augment import VIEWS
from training.calibrate import Calibrator, were_held_out
from training.checkpoint import Weights
from training.evaluate import ServedNetwork
from training.gate import BOUNDS, Gate
from training.models import count_parameters
from training.records import CONFIG

GOLDEN_IMAGES = 8


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
    except OSError as error:
        print(f"training.export: {describe_os_error(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("training.export: interrupted", file=sys.stderr)
        return 130
    print(*paths, sep="\n")
    print(
        f"try it with: tinyserve classify IMAGES -m {shlex.quote(str(paths[0]))}", file=sys.stderr
    )
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
    Where that run held some out, the probabilities are calibrated with them.
    Raises :class:`GateError`, leaving what was there, where one breaks a bound.
    """
    if unknown := set(precisions) - BOUNDS.keys():
        raise UsageError(f"unknown precision {sorted(unknown)[0]!r} (known: {', '.join(BOUNDS)})")
    if run.is_file() and read_card(run).precision == "int8" and set(precisions) != {"int8"}:
        raise UsageError(f"{run} is int8: only int8 can be made of it")
    weights = pretrained.load(run)
    root, holdout = _data_of(run, data_root)
    dataset = data.load(root, image_size=weights.image_size, skip_bad=True, holdout=holdout)
    if dataset.classes != weights.labels:
        raise UsageError(f"{dataset.root} has other classes than {run}")
    if dataset.fingerprint != weights.training.dataset_fingerprint:
        print(f"note: {dataset.root} is not the data that the run was trained on", file=sys.stderr)
    served = weights.served(VIEWS[views])
    calibrator = _calibrator(served, weights.training, dataset)
    graph = to_onnx(served, weights.image_size)
    origin = f", with the weights of {run.name}" if run.is_file() else ""
    gate = Gate(served, graph, dataset, reference=f"PyTorch {torch.__version__}, fp32{origin}")
    paths: list[Path] = []
    try:
        output.mkdir(parents=True, exist_ok=True)
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
            _write_through(gate, path, converted, card, calibrator)
            paths.append(path)
    except OSError as error:
        raise UsageError(f"cannot write into {output}: {os_reason(error)}") from error
    finally:
        if paths:
            _warn_of_others(weights, views, output, paths)
    return paths


def _warn_of_others(weights: Weights, views: int, folder: Path, new: Sequence[Path]) -> None:
    """Say aloud which other precisions, that a model's name may stand for, answer otherwise."""
    for path in sorted({*folder.glob(f"{weights.arch}.*onnx")} - {*new}):
        try:
            card = read_card(path)
            other = "weights" if card.training != weights.training else "views"
            same = (card.training, card.views) == (weights.training, views)
        except TinyserveError:
            other, same = "weights", False
        if not same:
            print(
                f"note: {path} has other {other}, and `-m {weights.arch}` may stand for it: export "
                "that precision, too, or remove it",
                file=sys.stderr,
            )


def _calibrator(
    served: ServedNetwork, training: Training, dataset: data.Dataset
) -> Calibrator | None:
    """Give the network its temperature; None, and said aloud, where nothing can tell which."""
    if not were_held_out(training, dataset):
        why = "no images were held out of training"
        if len(dataset.held_out) == 1:
            why = "that takes two images held out of training"
        elif len(dataset.held_out):
            why = "the weights may have been trained on the images that are held out"
        print(f"note: not calibrated, as {why}", file=sys.stderr)
        return None
    calibrator = Calibrator.fit(served, dataset)
    served.temperature = calibrator.temperature
    return calibrator


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
    range_images = dataset.train.images[np.sort(order[:count])]
    choice = dataset.train.images[np.sort(order[count : count + quantize.CHOICE_IMAGES])]
    result = quantize.to_int8(graph, range_images, choice)
    return result.model, (
        f"int8: {result.method} ranges, {100 * result.agreement:.1f} % the same top-1 as fp32 on "
        f"{len(choice):,} training images"
    )


def _write_through(
    gate: Gate, path: Path, graph: onnx.ModelProto, card: ModelCard, calibrator: Calibrator | None
) -> None:
    """Make a file appear at ``path`` if it passes the gate; otherwise leave what was there."""
    content = graph.SerializeToString()
    bounds = BOUNDS[card.precision]
    with candidate(path) as hidden:  # the gate runs the very file that will be kept
        write_model(hidden, content, card)
        onnx.checker.check_model(hidden, full_check=True)
        evidence = gate.check(hidden, card.precision)
        engine = Engine(hidden, device="cpu")
        images = gate.steady_images(engine, GOLDEN_IMAGES)
        golden = Golden.of(images, engine.run(images), tolerance=bounds.golden_tolerance)
        card = replace(card, evidence=evidence, golden=golden)
        if calibrator is not None:
            calibration = calibrator.measure(engine)
            card = replace(card, calibration=calibration)
            print(
                f"{card.precision} on {calibration.images:,} held-out images: calibration error "
                f"{100 * calibration.ece:.1f} points, {100 * calibration.ece_before:.1f} without "
                f"the temperature of {calibration.temperature:.3f}",
                file=sys.stderr,
            )
        write_model(hidden, content, card)
        Engine(hidden, device="cpu")


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


def _data_of(run: Path, named: Path | None) -> tuple[Path, int]:
    """The folder that was named, or else that a run was trained on, and how many images of it the
    run held out, as its config.json or the file's calibration remembers them."""
    if run.is_file():
        if named is None:
            raise UsageError(f"{run} does not say where its data is: name it with --data")
        calibration = read_card(run).calibration
        return named, calibration.fitted_images + calibration.images if calibration else 0
    try:
        document = json.loads((run / CONFIG).read_text())
        root, holdout = (
            named or Path(document["data"]),
            document.get("config", {}).get("holdout", 0),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if named is not None:
            return named, 0
        raise CheckpointError(
            f"{run / CONFIG} does not say what the run was trained on; name it with --data"
        ) from error
    if named is None and not root.is_dir():
        raise DataError(f"the data that {run} was trained on is not at {root}: name it with --data")
    return root, holdout


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
        epilog="Exit codes: 0 fine, 1 failed, 2 wrong usage, 4 a gate was not passed, or a file\n"
        "is not what it was, 5 a device cannot run the file, 130 stopped by Ctrl-C.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", type=Path, help="folder of a finished run, or a file exported from it"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("models"),
        metavar="DIR",
        help="folder to write to (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        help=f"of {', '.join(BOUNDS)}, or several with commas (default: %(default)s)",
    )
    parser.add_argument(
        "--views",
        type=int,
        choices=sorted(VIEWS),
        default=1,
        help="test-time augmentation: average this many views of an image: 2 mirrors it, 10 crops "
        "the corners, too (default: %(default)s)",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="default: the data that the run was trained on"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
