"""What training runs left behind, read from their folders.

A record is a folder with a run's ``config.json``, ``history.csv`` and, once it has finished,
``result.json``. Records are read as they are, whatever has become of recipes since.
"""

import csv
import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyserve.errors import CheckpointError, UsageError, os_reason
from training.data import DEFAULT_ROOT
from training.recipes import Recipe, learning_rate, paper

CONFIG, HISTORY, RESULT = "config.json", "history.csv", "result.json"

READ = ("epoch", "step", "train_loss", "train_top1", "val_top1", "images_per_second", "seconds")
"""The columns of ``history.csv`` that are read."""

SINGLE, TEN = "single centre view", "ten crops"

ORDER = ("baseline", "alexnet", "inception", "resnet20", "plain20")
"""Of architectures, in tables and legends; others come last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Accuracy of the final weights; ``top5`` is a fraction of ``images``."""

    images: int
    correct_top1: int
    top5: float

    @property
    def top1(self) -> float:
        return self.correct_top1 / self.images


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a run left; ``scores``, by views, is empty for a run that has not finished.

    ``config`` and its ``recipe`` lack, in older records, what did not exist then; ``history`` has
    the rows of ``history.csv``, one an epoch.
    """

    name: str
    arch: str
    config: dict[str, Any]
    recipe: dict[str, Any]
    data: str
    """The name of the data set."""
    fingerprint: str
    """Of the data, the first twelve digits."""
    hardware: str
    python: str
    torch: str
    commit: str | None
    history: list[dict[str, float]]
    scores: dict[str, Score]
    seconds: float
    """Training, without validation."""
    parameters: int = 0
    """Of the network; 0 where that was not recorded, as for the next."""
    peak_memory: int = 0
    """Bytes."""
    limit: int | None = None
    """Images trained on, where not all were to be."""
    held_out: int = 0
    """Of the training images, for validation."""

    @property
    def images_per_second(self) -> float:
        """Without validation, and after the first epoch, in which kernels are chosen and loaded."""
        rows = self.history[1:] or self.history
        images = sum(row["images_per_second"] * row["seconds"] for row in rows)
        return images / sum(row["seconds"] for row in rows)

    @property
    def length(self) -> str:
        """Epochs, and after which weights."""
        init, epochs = self.config.get("init"), str(self.recipe["epochs"])
        return f"{epochs} after {in_words(init)}" if init else epochs

    @property
    def train_images(self) -> str:
        if self.limit:
            return f"{self.limit:,}"
        return f"all but {self.held_out:,}" if self.held_out else "all"

    @property
    def validated_on(self) -> str:
        held_out = f"{self.held_out:,} images held out of train"
        return held_out if self.held_out else "validation split"

    @property
    def has_own_section(self) -> bool:
        """Whether it was made for one question alone."""
        return self.name.startswith(("precision-", "ablation-")) or self.arch == "plain20"

    @property
    def repeats_paper(self) -> bool:
        """Whether it is the paper's recipe as it is now, unchanged, from scratch, on all of Tiny
        ImageNet's training images."""
        changed = any(self.config.get(k) for k in ("limit_train", "holdout", "init", "teachers"))
        now = dataclasses.asdict(paper(self.arch))
        now["sizes"] = list(now["sizes"])  # as a record has them
        same = all(now.get(field) == value for field, value in self.recipe.items())
        on_theirs = self.data == DEFAULT_ROOT.name
        return same and on_theirs and not changed and not self.has_own_section

    def first_at(self, top1: float) -> tuple[float, float] | None:
        """Seconds of training until an epoch's end with that validation accuracy, and the epoch."""
        seconds = 0.0
        for row in self.history:
            seconds += row["seconds"]
            if row["val_top1"] >= top1:
                return seconds, row["epoch"]
        return None

    def changes_from(self, base: "Record") -> list[str]:
        """The settings in which it differs from another run, in words.

        What an older record lacks did not exist then: that is as good as what it is by default.
        """
        defaults = {
            field.name: None if field.default is dataclasses.MISSING else field.default
            for field in dataclasses.fields(Recipe)
        }
        before, after = {**base.config, **base.recipe}, {**self.config, **self.recipe}
        keys = {**before, **after}
        before, after = {**defaults, **before}, {**defaults, **after}
        return [
            f"{key} {in_words(before.get(key))} → {in_words(after.get(key))}"
            for key in keys
            if key not in ("recipe", "name")
            and before.get(key) != after.get(key)
            # Of what only one of them has, and which is no recipe's.
            and (key in defaults or before.get(key) or after.get(key))
        ]


def in_words(setting: Any) -> str:
    """Weights without their digest, image sizes with where they begin, the rest as it is."""
    if isinstance(setting, bool):
        return "yes" if setting else "no"
    if isinstance(setting, list):
        return ", ".join(map(in_words, setting)) or "none"
    if isinstance(setting, tuple):
        start, size = setting
        return f"{size} from {100 * start:g} %" if start else str(size)
    if isinstance(setting, float):
        return f"{setting:g}"
    return "none" if setting is None else re.sub(r" [0-9a-f]{8,}$", "", str(setting))


def read_records(folder: Path) -> list[Record]:
    """All runs in ``folder``, by architecture and name.

    Raises :class:`UsageError` if there is none, and :class:`CheckpointError` for a damaged file.
    """
    found = {path.parent for name in (CONFIG, HISTORY, RESULT) for path in folder.glob(f"*/{name}")}
    if not found:
        raise UsageError(f"{folder} holds no runs: no folder with a {CONFIG} in it")
    runs = [_read_record(path) for path in sorted(found)]
    return sorted(runs, key=lambda run: (*ORDER, run.arch).index(run.arch))


def keep_record(run: Path, folder: Path) -> Path:
    """Copy a finished run's record into ``folder``, without the path of its data; returns where.

    Raises :class:`CheckpointError` for a run that has not finished.
    """
    target = folder / run.resolve().name
    documents = {}
    for name in (CONFIG, HISTORY, RESULT):
        with _reading(run / name) as text:
            documents[name] = text
    with _reading(run / CONFIG):
        config = json.loads(documents[CONFIG])
        config.pop("data", None)
        documents[CONFIG] = json.dumps(config, indent=2) + "\n"
    target.mkdir(parents=True, exist_ok=True)
    for name, text in documents.items():
        (target / name).write_text(text, encoding="utf-8")
    return target


def _read_record(folder: Path) -> Record:
    facts: dict[str, Any] = {"name": folder.name, "history": [], "scores": {}, "seconds": 0.0}
    with _reading(folder / CONFIG) as text:
        document = json.loads(text)
        config, dataset, environment = (document[k] for k in ("config", "dataset", "environment"))
        recipe = {**config["recipe"], "name": str(config["recipe"]["name"])}
        recipe["epochs"] = int(recipe["epochs"])
        recipe["sizes"] = [(float(start), int(size)) for start, size in recipe["sizes"]]
        rate_of(recipe, 0, 1)  # raises for what could not be drawn
        facts |= {
            "arch": str(config["arch"]),
            "config": {**config, "seed": config["seed"], "precision": str(config["precision"])},
            "recipe": recipe,
            "limit": config.get("limit_train"),
            "held_out": int(config.get("holdout") or 0),
            "data": str(dataset["name"]),
            "fingerprint": dataset["fingerprint"][:12],
            "hardware": _hardware(environment),
            "python": str(environment["python"]),
            "torch": str(environment["torch"]),
            "commit": environment["commit"],
        }
    finished = (folder / RESULT).exists()
    if finished or (folder / HISTORY).exists():
        with _reading(folder / HISTORY) as text:
            for row in csv.DictReader(text.splitlines()):
                facts["history"].append({name: float(row[name]) for name in READ})
                if min(facts["history"][-1][name] for name in ("epoch", "step", "seconds")) <= 0:
                    raise ValueError(f"epoch {row['epoch']} without steps or seconds")
            if not facts["history"]:
                raise ValueError("it has no epochs")
    if finished:
        with _reading(folder / RESULT) as text:
            result = json.loads(text)
            facts |= {
                "seconds": float(result["training_seconds"]),
                "parameters": int(result.get("parameters") or 0),
                "peak_memory": int(result.get("peak_memory_bytes") or 0),
                # Fewer than asked for, where there are no more; some for want of a val/.
                "held_out": int(result.get("held_out", facts["held_out"])),
            }
            if facts["limit"]:
                facts["limit"] = int(result.get("train_images", facts["limit"]))
            for views in (SINGLE, TEN) if TEN in result else (SINGLE,):
                images, correct, top5 = (
                    result[views][name] for name in ("images", "correct_top1", "top5")
                )
                if not 0 <= correct <= images or images < 1:
                    raise ValueError(f"{correct} right of {images}")
                facts["scores"][views] = Score(
                    images=int(images), correct_top1=int(correct), top5=float(top5)
                )
    return Record(**facts)


def rate_of(recipe: dict[str, Any], step: int, steps_per_epoch: int) -> float:
    """The learning rate at a step, counted from 0, of a recipe as it was recorded."""
    return learning_rate(
        step,
        steps_per_epoch,
        schedule=recipe["schedule"],
        peak=float(recipe["lr"]),
        warmup=float(recipe.get("warmup", 0.0)),
        epochs=int(recipe["epochs"]),
        restart_epochs=int(recipe.get("restart_epochs", 1)),
    )


@contextmanager
def _reading(path: Path) -> Iterator[str]:
    """Gives a file's text, and turns whatever is wrong with it into an error that names it."""
    try:
        yield path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {os_reason(error)}") from error
    except KeyError as error:
        raise CheckpointError(f"{path} is damaged: it has no {error}") from error
    except (ArithmeticError, AttributeError, TypeError, ValueError, csv.Error) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _hardware(environment: dict[str, Any]) -> str:
    cpu = environment.get("cpu") or environment["machine"]
    hardware = environment["gpu"] or f"{cpu}, {environment['cpus']} CPUs"
    processes = environment.get("processes") or 1
    return f"{hardware}, {processes} processes" if processes > 1 else str(hardware)
