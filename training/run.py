"""The folder of one training run: what is in it, and that two runs are never mixed in it."""

import csv
import dataclasses
import io
import json
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinyserve.errors import UsageError
from training import checkpoint
from training.data import Dataset
from training.recipes import Recipe

Row = dict[str, Any]
"""One epoch, a row of history.csv."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that the weights depend on, the data aside; kept as ``config.json``.

    ``image_size`` is the side in pixels at which images are stored; ``limit_train`` the number of
    training images used, None for all; ``init`` names the weights that training started from, None
    for random ones.
    """

    arch: str
    recipe: Recipe
    seed: int
    precision: str
    image_size: int
    limit_train: int | None
    init: str | None = None


class Run:
    """A run's folder, opened for training.

    ``saved`` is the checkpoint to go on from, None for a new run. Raises
    :class:`~tinyserve.errors.UsageError` where the folder holds another run, and
    :class:`~tinyserve.errors.CheckpointError` where its checkpoint cannot be read.
    """

    def __init__(self, folder: Path, config: Config, dataset: Dataset, *, resume: bool) -> None:
        self.folder = folder
        self._identity = {
            "config": json.loads(json.dumps(dataclasses.asdict(config))),
            "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint},
        }
        path = folder / checkpoint.CHECKPOINT
        self.saved = checkpoint.load(path) if resume else None
        if self.saved is not None:
            self._check_identity(self.saved)
        elif path.exists():
            raise UsageError(
                f"{folder} holds a run already: --resume goes on with it, --out names another"
            )
        else:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"cannot make the folder {folder}: {error.strerror}") from error
            document = {
                **self._identity,
                "data": str(dataset.root.resolve()),
                "environment": _environment(),
            }
            write_json(folder / "config.json", document)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint, in one step."""
        checkpoint.save(self.folder / checkpoint.CHECKPOINT, {**self._identity, **state})

    def write_history(self, history: list[Row]) -> None:
        """Replace ``history.csv``, in one step: one row an epoch."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        _replace(self.folder / "history.csv", buffer.getvalue())

    def _check_identity(self, saved: dict[str, Any]) -> None:
        for part, now in self._identity.items():
            before = saved.get(part, {})
            differing = [
                f"{name} was {before.get(name)!r}, is {now[name]!r}"
                for name in now
                if before.get(name) != now[name]
            ]
            if differing:
                raise UsageError(
                    f"cannot resume {self.folder} with another {part}: {'; '.join(differing)}"
                )


def commit() -> str | None:
    """The commit of this checkout, followed by "+" if files differ from it; None outside of git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        run = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file, in one step."""
    _replace(path, json.dumps(document, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
