"""A model repository for NVIDIA Triton Inference Server."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from tinyserve.engine import read_card
from tinyserve.errors import OutputError, UsageError, os_reason
from tinyserve.modelfile import INPUT_NAME, OUTPUT_NAME, Label, ModelCard, check_graph

MAX_BATCH_SIZE = 64
MAX_QUEUE_DELAY_US = 2000
"""Microseconds for which Triton may hold a request back to fill a batch."""


def write_repository(folder: Path, models: Mapping[str, Path]) -> list[Path]:
    """Write ``<name>/1/model.onnx``, ``config.pbtxt`` and ``labels.txt`` for every model.

    ``models`` maps names to model files. Returns the folders of the models. Raises
    :class:`~tinyserve.errors.UsageError` for one that is there already and
    :class:`~tinyserve.errors.GateError` for a file that was changed, both before anything is
    written, and :class:`~tinyserve.errors.OutputError` for what cannot be written.
    """
    cards = {name: read_card(path) for name, path in models.items()}
    for name, path in models.items():
        # Triton does not look: this is the last time that anything does.
        check_graph(path, cards[name])
        if (target := folder / name).exists():
            raise UsageError(f"{target} is there already: remove it, or name another folder")
    written = []
    for name, card in cards.items():
        target = folder / name
        # Triton may be watching: a model appears complete or not at all.
        partial = folder / f".{name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "1").mkdir(parents=True)
            shutil.copyfile(models[name], partial / "1" / "model.onnx")
            (partial / "config.pbtxt").write_text(config(name, card), encoding="utf-8")
            labels = "".join(f"{label_line(label)}\n" for label in card.labels)
            (partial / "labels.txt").write_text(labels, encoding="utf-8")
            os.replace(partial, target)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OutputError(f"cannot write {target}: {os_reason(error)}") from error
        written.append(target)
    return written


def config(name: str, card: ModelCard) -> str:
    """Triton's ``config.pbtxt``, a ModelConfig in protocol buffer text format."""
    size = card.image_size
    name = name.replace("\\", r"\\").replace('"', r"\"")
    return f"""\
# {card.architecture}, {card.precision}; written by "tinyserve triton".
name: "{name}"
backend: "onnxruntime"
max_batch_size: {MAX_BATCH_SIZE}
input [
  {{
    name: "{INPUT_NAME}"  # RGB, rows from the top; see "tinyserve info" for how to resize
    data_type: TYPE_UINT8
    dims: [ {size}, {size}, 3 ]
  }}
]
output [
  {{
    name: "{OUTPUT_NAME}"
    data_type: TYPE_FP32
    dims: [ {len(card.labels)} ]
    label_filename: "labels.txt"
  }}
]
dynamic_batching {{
  max_queue_delay_microseconds: {MAX_QUEUE_DELAY_US}
}}
instance_group [
  {{
    kind: KIND_AUTO
    count: 1
  }}
]
"""


def label_line(label: Label) -> str:
    """One class on one line: its WordNet id, where it has one, and its name."""
    name = " ".join(label.name.split())
    return name if label.wnid is None else f"{label.wnid} {name}"
