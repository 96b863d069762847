"""Turn a finished run into one self-describing ONNX file that has passed the parity gate.

::

    python -m training.export runs/inception-modern -o exported/

The file appears under its name only after it has given the same answers as the network in PyTorch
on real images; otherwise it is removed and the exit code is 4.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from tinyserve.engine import Engine
from tinyserve.errors import CheckpointError, GateError, TinyserveError, UsageError
from tinyserve.modelfile import INPUT_NAME, METADATA_KEY, OUTPUT_NAME, ModelCard, Parity
from training import checkpoint, data
from training.evaluate import ServedNetwork
from training.models import count_parameters

GATE_IMAGES = 1000
GATE_BATCHES = (1, 2, 32)
MAX_DIFFERENCE = 1e-4
"""Largest absolute difference of any probability that the fp32 gate lets pass."""


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        path = export(arguments.run, arguments.output, data_root=arguments.data)
    except TinyserveError as error:
        print(f"training.export: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("training.export: interrupted", file=sys.stderr)
        return 130
    print(path)
    print(f"try it with: tinyserve classify IMAGES -m {path}", file=sys.stderr)
    return 0


def export(run: Path, output: Path, *, data_root: Path | None) -> Path:
    """Export the weights of ``run`` into the folder ``output``; returns the new file's path.

    The gate reads images from ``data_root``, by default the data that the run was trained on.
    Raises :class:`GateError`, leaving no file behind, if the answers differ from PyTorch's.
    """
    weights = checkpoint.load_weights(run)
    run_data, holdout = _data_of(run, data_root)
    images = gate_images(run_data, weights, holdout)
    served = weights.served()
    card = ModelCard(
        architecture=weights.arch,
        precision="fp32",
        labels=weights.labels,
        image_size=weights.image_size,
        crop=weights.crop,
        network_size=weights.network_size,
        parameters=count_parameters(served.network),
        training=weights.training,
        parity=None,
    )
    graph = to_onnx(served, weights.image_size)
    path = output / f"{weights.arch}.onnx"
    # The gate runs the very file that will be kept, under a name that nobody looks for.
    candidate = output / f".{weights.arch}.onnx.candidate"
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_model(candidate, graph, card)
        parity = check_parity(candidate, served, images)
        write_model(candidate, graph, replace(card, parity=parity))
        Engine(candidate, device="cpu").run(images[:1])
        os.replace(candidate, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            candidate.unlink()
    return path


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


def write_model(path: Path, model: onnx.ModelProto, card: ModelCard) -> None:
    """Write a model file: the graph with the card as the last thing added, fully checked."""
    model.ClearField("metadata_props")
    onnx.helper.set_model_props(model, {METADATA_KEY: card.to_json()})
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, path)


def check_parity(path: Path, served: ServedNetwork, images: NDArray[np.uint8]) -> Parity:
    """Compare a file with the network it came from; raises :class:`GateError`.

    ``images`` is uint8 ``[n, size, size, 3]``. Every image must have the same top-1 at every batch
    size, and no probability may differ by more than :data:`MAX_DIFFERENCE`.
    """
    with torch.inference_mode():
        expected = np.concatenate(
            [served(torch.from_numpy(part)).numpy() for part in _split(images, max(GATE_BATCHES))]
        )
    engine = Engine(path, device="cpu")
    agreement, difference = 1.0, 0.0
    for batch in GATE_BATCHES:
        parts = tqdm(
            list(_split(images, batch)), desc=f"parity, batch {batch}", disable=None, leave=False
        )
        found = np.concatenate([engine.run(part) for part in parts])
        agreement = min(agreement, float((found.argmax(1) == expected.argmax(1)).mean()))
        difference = max(difference, float(np.abs(found - expected).max()))
    print(
        f"parity: {100 * agreement:g} % the same top-1, max |dp| {difference:.2e}, "
        f"{len(images)} images at batch {', '.join(map(str, GATE_BATCHES))}",
        file=sys.stderr,
    )
    if agreement < 1:
        raise GateError(f"parity: only {100 * agreement:.2f} % have the same top-1 as in PyTorch")
    if not difference <= MAX_DIFFERENCE:
        raise GateError(
            f"parity: a probability differs by {difference:.2e} from PyTorch's, "
            f"more than {MAX_DIFFERENCE:.0e}"
        )
    return Parity(
        images=len(images),
        batch_sizes=GATE_BATCHES,
        provider=engine.provider,
        top1_agreement=agreement,
        max_difference=difference,
        torch=torch.__version__,
        onnxruntime=ort.__version__,
    )


def gate_images(root: Path, weights: checkpoint.Weights, holdout: int = 0) -> NDArray[np.uint8]:
    """:data:`GATE_IMAGES` images, evenly spread over the validation split.

    uint8 ``[n, size, size, 3]``. A validation split of fewer is filled up from the training split.
    """
    dataset = data.load(root, image_size=weights.image_size, skip_bad=True, holdout=holdout)
    if dataset.fingerprint != weights.training.dataset_fingerprint:
        print(f"note: {root} is not the data that the run was trained on", file=sys.stderr)
    chosen = [dataset.val.images[_spread(len(dataset.val), GATE_IMAGES)]]
    missing = GATE_IMAGES - len(chosen[0])
    if missing > 0:
        chosen.append(dataset.train.images[_spread(len(dataset.train), missing)])
    return np.concatenate(chosen)


def _spread(count: int, wanted: int) -> NDArray[np.int64]:
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64)


def _split(images: NDArray[np.uint8], batch: int) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(images), batch):
        yield images[start : start + batch]


def _data_of(run: Path, named: Path | None) -> tuple[Path, int]:
    """The folder that was named, or else that a run was trained on, and how many images of it the
    run held out, as its config.json remembers them."""
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
    parser.add_argument("run", type=Path, help="folder of a finished training run")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("exported"), help="folder to write to"
    )
    parser.add_argument("--data", type=Path, help="default: the data that the run was trained on")
    return parser


if __name__ == "__main__":
    sys.exit(main())
