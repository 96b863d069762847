"""The folder of one training run: what is in it, and that two runs are never mixed in it."""

import csv
import dataclasses
import io
import json
import math
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinyserve.devices import usable_cores
from tinyserve.errors import UsageError, os_reason
from tinyserve.files import held
from training import checkpoint, hardware
from training.data import Dataset
from training.distributed import ALONE, Workers
from training.recipes import Recipe
from training.records import CONFIG, HISTORY

DRAWN_EVERY = 20.0
"""Seconds; a short epoch on a GPU does not take much longer than to draw its curves."""

Row = dict[str, Any]
"""One epoch, a row of history.csv."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that the weights depend on, the data aside; kept as ``config.json``.

    ``image_size`` is the side in pixels at which images are stored; ``limit_train`` the number of
    training images used, None for all; ``holdout`` the number held out for validation; ``init`` and
    ``teachers`` name weights, as :func:`training.pretrained.identify` does.
    """

    arch: str
    recipe: Recipe
    seed: int
    precision: str
    image_size: int
    limit_train: int | None
    holdout: int = 0
    init: str | None = None
    teachers: tuple[str, ...] = ()
    compile: bool = False


class Run:
    """A run's folder, opened for training; see :func:`opened`.

    ``saved`` is the checkpoint to go on from, None for a new run; ``commit`` the commit of this
    checkout when the run was new, None where it is not known.

    Of several processes the first writes; in the others the methods that write do nothing.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        dataset: Dataset,
        *,
        resume: bool,
        workers: Workers,
    ) -> None:
        self.folder = folder
        self._writes = workers.first
        self._drawn = -math.inf
        self._identity = {
            "config": json.loads(json.dumps(dataclasses.asdict(config))),
            "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint},
        }
        path = folder / checkpoint.CHECKPOINT
        killed_early = (folder / CONFIG).exists() and not path.exists()
        self.saved = checkpoint.load(path) if resume and not killed_early else None
        if self.saved is not None:
            self._check_identity(self.saved)
            self.commit: str | None = self.saved.get("commit")
            return
        if workers.first and path.exists():
            raise UsageError(
                f"{folder} holds a run already: --resume goes on with it, --out names another"
            )
        if workers.first and (folder / checkpoint.WEIGHTS).exists():
            raise UsageError(f"{folder} holds a finished run: --out names another")
        environment = _environment()
        # Asked for once: the checkout may be another one by the time the run ends.
        self.commit = environment["commit"]
        self.write_json(
            CONFIG,
            {
                **self._identity,
                "data": str(dataset.root.resolve()),
                "environment": {**environment, "processes": workers.count},
            },
        )

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint, in one step."""
        if self._writes:
            checkpoint.save(
                self.folder / checkpoint.CHECKPOINT,
                {**self._identity, "commit": self.commit, **state},
            )

    def save_weights(self, weights: checkpoint.Weights) -> None:
        if self._writes:
            checkpoint.save_weights(self.folder, weights)

    def write_history(self, history: list[Row], title: str, recipe: Recipe) -> None:
        """Replace ``history.csv``, one row an epoch, and now and then the curves drawn from it."""
        if not self._writes:
            return
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        with checkpoint.replacing(self.folder / HISTORY) as partial:
            partial.write_text(buffer.getvalue(), encoding="utf-8")
        now = time.monotonic()
        if now - self._drawn > DRAWN_EVERY or len(history) == recipe.epochs:
            from training.plots import draw_curves  # matplotlib takes half a second to start

            self._drawn = now
            with checkpoint.replacing(self.folder / "curves.png") as partial:
                draw_curves(partial, title, history, recipe)

    def write_json(self, name: str, document: Any) -> None:
        """Replace a JSON file, in one step."""
        if self._writes:
            with checkpoint.replacing(self.folder / name) as partial:
                partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    def _check_identity(self, saved: dict[str, Any]) -> None:
        config, dataset = (
            _differences(saved.get(part, {}), now) for part, now in self._identity.items()
        )
        if dataset:  # of few images, a batch has all that there are
            config = [words for words in config if not words.startswith(_OF_THE_DATA)]
        for part, differing in (("config", config), ("dataset", dataset)):
            if not differing:
                continue
            if [words.partition(" ")[0] for words in differing] == ["fingerprint"]:
                raise UsageError(
                    f"cannot resume {self.folder}: the images in "
                    f"{self._identity['dataset']['name']} are not those that it began with: some "
                    "were added, removed, renamed or changed"
                )
            raise UsageError(
                f"cannot resume {self.folder} with another {part}: {'; '.join(differing)}"
            )


_OF_THE_DATA = ("recipe.batch_size ", "recipe.lr ")
"""How the differences between two configs begin that may come from the number of images."""


@contextmanager
def opened(
    folder: Path, config: Config, dataset: Dataset, *, resume: bool, workers: Workers = ALONE
) -> Iterator[Run]:
    """A run in ``folder``, which is made if need be and belongs to this run alone for the time.

    Raises :class:`~tinyserve.errors.UsageError` where the folder cannot be made, holds another run
    or one that is being trained, and :class:`~tinyserve.errors.CheckpointError` where its
    checkpoint cannot be read.
    """
    try:
        if not resume:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {os_reason(error)}") from error
    with held(folder) if workers.first and folder.is_dir() else nullcontext(True) as alone:
        if not alone:
            raise UsageError(f"another process is training in {folder}: --out names another folder")
        yield Run(folder, config, dataset, resume=resume, workers=workers)


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in before.keys() | now.keys():
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {old!r}, is {new!r}")
    return sorted(found)


def _commit() -> str | None:
    """The commit of this checkout, followed by "+" if files differ from it; None outside of git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        run = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "machine": platform.machine(),
        "cpu": hardware.cpu_model(),
        "cpus": usable_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
