"""The tab that says what is known of every model that is installed or served."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tinyserve.classifier import Classifier
from tinyserve.demo.render import problem, seen_words, share_bar
from tinyserve.devices import device_name
from tinyserve.engine import read_card
from tinyserve.errors import TinyserveError
from tinyserve.modelfile import Evidence, ModelCard, TaughtBy, Training, installed_models
from tinyserve.report import counted

if TYPE_CHECKING:
    import gradio as gr


def build(tab: "gr.Tab", served: Sequence[str], load: Callable[[str], Classifier]) -> None:
    """Add the tab's content, which is read from the files whenever the tab is opened.

    ``served`` and ``load`` are :func:`~tinyserve.demo.page.build_page`'s.
    """
    import gradio as gr

    cards = gr.HTML("Reading the files …")
    tab.select(lambda: _cards(_files(served, load)), None, cards, api_visibility="private")


def _files(served: Sequence[str], load: Callable[[str], Classifier]) -> dict[str, Path]:
    """Every installed file by its name, and those that are served from elsewhere by theirs."""
    files = installed_models()
    installed = {path.absolute() for path in files.values()}
    for name in served:
        with contextlib.suppress(TinyserveError):  # the other tabs say why it cannot be loaded
            path = load(name).engine.path
            if path.absolute() not in installed:
                files[name] = path
    return files


def _cards(files: Mapping[str, Path]) -> str:
    """An article for each file."""
    articles = "".join(_card(*file) for file in files.items())
    return f'<div class="cards">{articles}</div>'


def _card(name: str, path: Path) -> str:
    try:
        card = read_card(path)
    except TinyserveError as error:
        return f"<article><h3>{escape(name)}</h3>{problem(error, 'read this file')}</article>"
    facts = {
        "parameters": f"{card.parameters:,}",
        "file": f"{path.stat().st_size / 2**20:.1f} MiB, {card.precision}",
        "sees": seen_words(card),
    }
    if card.training:
        facts["trained on"] = _training(card.training)
        if card.training.initial:
            facts["started from"] = f"weights from {_training(card.training.initial)}"
        if card.training.teachers:
            facts["taught by"] = "; ".join(map(_teacher, card.training.teachers))
    if card.golden:
        facts["self-test"] = f"{card.golden.count} pictures whenever it is loaded"
    rows = "".join(f"<dt>{name}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    evidence = "".join(f"<li>{_evidence(entry)}</li>" for entry in card.evidence)
    classes = ", ".join(label.name for label in card.labels)
    return (
        f"<article><h3>{escape(name)}</h3>{_accuracy(card)}"
        f'<dl class="facts">{rows}</dl>'
        f"<details><summary>Evidence</summary><ul>{evidence}</ul></details>"
        f"<details><summary>{len(card.labels)} classes</summary><p>{escape(classes)}</p></details>"
        "</article>"
    )


def _accuracy(card: ModelCard) -> str:
    if card.accuracy is None:
        return "<p>Its accuracy was not measured.</p>"
    shares = zip(("top-1", "top-5"), card.accuracy, strict=True)
    rows = "".join(f"<li><span>{name}</span>{share_bar(share)}</li>" for name, share in shares)
    return f'<ol class="bars">{rows}</ol>'


def _training(training: Training) -> str:
    return (
        f"{training.train_images:,} images of {training.dataset}, recipe {training.recipe}, "
        f"{counted(training.epochs, 'epoch')}"
    )


def _evidence(entry: Evidence) -> str:
    words = (
        f"{device_name(entry.provider)}, ONNX Runtime {entry.onnxruntime}: the same first guess as "
        f"{entry.reference} on {100 * entry.top1_agreement:g} % of {entry.images:,} images"
    )
    if entry.val_images:
        words += f"; right on {entry.correct_top1:,} of {entry.val_images:,} validation images"
    return escape(words)


def _teacher(teacher: TaughtBy) -> str:
    if teacher.training is None:
        return teacher.architecture
    return f"{teacher.architecture}, {_training(teacher.training)}"
