"""``tinyserve models``, ``info`` and ``labels``: what files there are, and what they say."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyserve.classifier import model_file
from tinyserve.cli.arguments import Commands, add_json, add_model
from tinyserve.cli.terminal import print_columns
from tinyserve.devices import device_name
from tinyserve.engine import read_card
from tinyserve.errors import ModelFileError, TinyserveError
from tinyserve.modelfile import (
    DEFAULT_MODEL,
    ModelCard,
    TaughtBy,
    Training,
    installed_models,
    search_folders,
)


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "models",
        help="list the models that are installed",
        description="List the models that are installed, which other commands take by name.",
    )
    command.set_defaults(command=models)
    add_json(command)

    command = commands.add_parser(
        "info",
        help="print what a model file says of itself",
        description="Print what a model file says of itself: its input and output, what it was "
        "trained on, and what was measured before it was kept.",
    )
    command.set_defaults(command=info)
    add_model(command)
    add_json(command)

    command = commands.add_parser(
        "labels",
        help="print the classes of a model, in their order",
        description="Print the classes of a model in the order of its output: index, WordNet id "
        "where there is one, name.",
    )
    command.set_defaults(command=labels)
    add_model(command)
    add_json(command)


def models(arguments: argparse.Namespace) -> int:
    found = installed_models()
    default = _default_file()
    if not found:
        raise ModelFileError(f"no models in {', '.join(map(str, search_folders()))}")
    cards: dict[str, ModelCard] = {}
    for name, path in found.items():
        try:
            cards[name] = read_card(path)
        except TinyserveError as error:
            print(f"tinyserve: {error}", file=sys.stderr)
    if arguments.json:
        documents = [_model_document(name, found[name], card) for name, card in cards.items()]
        print(json.dumps(documents, indent=2))
    else:
        header: tuple[str, ...] = (
            "model",
            "precision",
            "parameters",
            "classes",
            "top-1",
            "size",
            "file",
        )
        rows = [_model_row(name, found[name], cards[name], default) for name in cards]
        print_columns([header, *rows])
        star = "* what classify uses without -m; " if default in found.values() else ""
        print(f"{star}top-1 on the validation images, see tinyserve info")
    return 0 if len(cards) == len(found) else ModelFileError.exit_code


def _default_file() -> Path | None:
    """Of the default model; None where it is not installed."""
    try:
        return model_file(DEFAULT_MODEL)
    except ModelFileError:
        return None


def _model_document(name: str, path: Path, card: ModelCard) -> dict[str, Any]:
    training = card.training
    return {
        "model": name,
        "architecture": card.architecture,
        "precision": card.precision,
        "parameters": card.parameters,
        "classes": len(card.labels),
        "image_size": card.image_size,
        "val_top1": card.accuracy[0] if card.accuracy else None,
        "val_images": training.val_images if training else None,
        "bytes": path.stat().st_size,
        "path": str(path),
    }


def _model_row(
    name: str, path: Path, card: ModelCard, default: Path | None
) -> tuple[str, str, str, str, str, str, str]:
    return (
        name + ("*" if path == default else ""),
        card.precision,
        f"{card.parameters / 1e6:.2f} M",
        str(len(card.labels)),
        f"{100 * card.accuracy[0]:.2f} %" if card.accuracy else "",
        f"{path.stat().st_size / 2**20:.1f} MiB",
        str(path),
    )


def info(arguments: argparse.Namespace) -> int:
    path = model_file(arguments.model)
    card = read_card(path)
    if arguments.json:
        document = dataclasses.asdict(card)
        if card.golden is not None:  # hundreds of kilobytes that nobody reads
            document["golden"] = {
                "count": card.golden.count,
                "tolerance": card.golden.tolerance,
            }
        print(json.dumps({"path": str(path), **document}, indent=2))
    else:
        print_columns(list(_card_lines(path, card)))
    return 0


def _card_lines(path: Path, card: ModelCard) -> Iterator[tuple[str, str]]:
    size, classes = card.image_size, len(card.labels)
    seen = "all" if card.crop == size else f"the centre {card.crop} x {card.crop}"
    if card.network_size != card.crop:
        seen += f", shrunk to {card.network_size} x {card.network_size}"
    if card.views > 1:
        seen += f", in {card.views} views whose answers are averaged"
    yield "file", f"{path} ({path.stat().st_size / 2**20:.1f} MiB, format {card.format})"
    yield "architecture", f"{card.architecture}, {card.parameters:,} parameters, {card.precision}"
    yield (
        "input",
        f"images: uint8 [batch, {size}, {size}, 3], RGB; the network sees {seen}",
    )
    yield "resize", card.resize_rule
    yield "output", f"probabilities: float32 [batch, {classes}]"
    names = ", ".join(label.name for label in card.labels[:4])
    yield "classes", f"{classes}: {names}{', ...' if classes > 4 else ''}"
    if training := card.training:
        yield (
            "trained on",
            f"{training.train_images:,} images of {training.dataset} "
            f"({training.dataset_fingerprint[:12]}), {_how(training)}",
        )
        if training.initial:
            earlier = training.initial
            yield "started from", f"weights trained on {earlier.dataset}, {_how(earlier)}"
        for teacher in training.teachers:
            yield "taught by", _teacher(teacher)
        yield (
            "accuracy",
            f"top-1 {100 * training.val_top1:.2f} %, top-5 {100 * training.val_top5:.2f} % "
            f"of {training.val_images:,} validation images, single centre view",
        )
    for entry in card.evidence:
        accuracy = ""
        if entry.val_images:
            accuracy = f"; right on {entry.correct_top1:,} of {entry.val_images:,} images"
        yield (
            "evidence",
            f"{device_name(entry.provider)}, ONNX Runtime {entry.onnxruntime}: "
            f"{100 * entry.top1_agreement:g} % the same top-1 as {entry.reference} on "
            f"{entry.images:,} images, batches of {', '.join(map(str, entry.batch_sizes))}; "
            f"largest difference of a probability {entry.max_difference:.1e}{accuracy}",
        )
    if calibration := card.calibration:
        yield (
            "calibration",
            f"temperature {calibration.temperature:.3f}, fitted on "
            f"{calibration.fitted_images:,} images of {calibration.source}; expected calibration "
            f"error on {calibration.images:,} others {100 * calibration.ece:.1f} points, "
            f"{100 * calibration.ece_before:.1f} without",
        )
    if golden := card.golden:
        yield (
            "self-test",
            f"{golden.count} golden images; a probability may be off by {golden.tolerance:g}",
        )


def _how(training: Training) -> str:
    return (
        f"recipe {training.recipe}, {training.epochs} epochs, seed {training.seed}, "
        f"{training.precision}, commit {training.commit}"
    )


def _teacher(teacher: TaughtBy) -> str:
    name, _, digest = teacher.name.rpartition(" ")
    words = f"{teacher.architecture}, {name} ({digest[:12]})"
    if teacher.training is None:
        return words
    return f"{words}, trained on {teacher.training.dataset}, {_how(teacher.training)}"


def labels(arguments: argparse.Namespace) -> int:
    found = read_card(model_file(arguments.model)).labels
    if arguments.json:
        print(json.dumps([dataclasses.asdict(label) for label in found], indent=2))
    else:
        print_columns(
            [(str(index), label.wnid or "", label.name) for index, label in enumerate(found)]
        )
    return 0
