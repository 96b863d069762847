"""Answers as the page shows them: HTML and pictures. Whatever is not ours to word is escaped."""

import base64
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tinyserve.classifier import Prediction
from tinyserve.demo.answers import Answer
from tinyserve.modelfile import ModelCard
from tinyserve.occlusion import Occlusion
from tinyserve.report import Summary, counted

SHOWN_SIDE = 512
"""Side in pixels up to which :func:`enlarged` and :func:`overlay` enlarge."""

GUESSES_HERE = "<h2>Likeliest classes</h2><p>Choose a picture, or take a sample.</p>"
MODELS_HERE = "<h2>All models</h2><p>What each of them says of the picture.</p>"
"""What stands where the answers will."""

_HEAT = np.array([(40, 10, 90), (140, 30, 120), (230, 75, 60), (255, 175, 40), (255, 250, 190)])
"""Colours from no heat to the most, RGB."""


def names(predictions: Sequence[Prediction]) -> list[str]:
    """Their names; classes that share one are told apart by their wnid, or by their place."""
    plain = [prediction.name for prediction in predictions]
    return [
        p.name if plain.count(p.name) == 1 else f"{p.name} ({p.wnid or f'class {p.index}'})"
        for p in predictions
    ]


def bars(answer: Answer) -> str:
    """The guesses with their probabilities; each ``<data>`` has the exact number as its value."""
    rows = "".join(
        f"<li><span>{escape(name)}</span>{share_bar(p.probability)}</li>"
        for name, p in zip(names(answer.predictions), answer.predictions, strict=True)
    )
    best = escape(answer.predictions[0].name)
    return (
        f'<h2>Likeliest classes</h2><p class="best">{best}</p><ol class="bars">{rows}</ol>'
        f'<p class="note">{answer.milliseconds:.1f} ms on {escape(answer.device)}</p>'
    )


def comparison(answers: Sequence[Answer]) -> str:
    """A table of what every model says, under a line that says how far they agree."""
    # Models need not have the same classes in the same order, so their names are compared.
    guesses = Counter(a.predictions[0].name for a in answers if a.predictions)
    common, votes = guesses.most_common(1)[0] if guesses else ("", 0)
    rows = []
    for answer in answers:
        size = f"{answer.parameters / 1e6:.2f} M" if answer.parameters else ""
        model = f'<th scope="row">{escape(answer.model)}<small>{size}</small></th>'
        if not answer.predictions:
            rows.append(f'<tr>{model}<td colspan="4">⚠️ {escape(answer.error or "")}</td></tr>')
            continue
        best = answer.predictions[0]
        agrees = votes > 1 and best.name == common
        rows.append(
            f"<tr>{model}<td>{escape(best.name)}</td><td>{share_bar(best.probability)}</td>"
            f"<td>{'✓' if agrees else '–'}</td><td>{answer.milliseconds:.1f}</td></tr>"
        )
    return (
        f"<h2>All models</h2><p>{_agreement(common, votes, guesses.total())}</p>"
        '<table class="models"><thead><tr><th scope="col">model<small>parameters</small></th>'
        '<th scope="col">guess</th><th scope="col">probability</th>'
        '<th scope="col"><abbr title="with most models">agrees</abbr></th>'
        '<th scope="col"><abbr title="milliseconds, decoding included">ms</abbr></th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _agreement(common: str, votes: int, models: int) -> str:
    if models < 2:
        return ""
    if votes == 1:
        return "No two models agree."
    all_or_some = f"All {votes}" if votes == models else f"{votes} of {models}"
    return f"{all_or_some} models say <strong>{escape(common)}</strong>."


def seen_words(card: ModelCard) -> str:
    """What of the pixels in the picture the network itself gets."""
    size = card.image_size
    words = f"{size} × {size} pixels"
    if card.crop != size:
        words += f"; the network gets the {card.crop} × {card.crop} in the middle"
    if card.network_size != card.crop:
        words += f"; the network gets them as {card.network_size} × {card.network_size}"
    return words


def enlarged(image: NDArray[np.uint8]) -> Image.Image:
    """A picture with every pixel a crisp square."""
    side = len(image) * max(1, SHOWN_SIDE // len(image))
    return Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)


def overlay(image: NDArray[np.uint8], heat: NDArray[np.float32]) -> Image.Image:
    """The heat over the picture, whose own colours are subdued; the hottest place is brightest."""
    strength = np.clip(heat, 0, None)
    strength /= max(float(strength.max()), 1e-9)
    large = enlarged(image)
    smooth = Image.fromarray(strength).resize(large.size, Image.Resampling.BICUBIC)
    level = np.clip(np.asarray(smooth), 0, 1)
    steps = np.linspace(0, 1, len(_HEAT))
    colour = np.stack([np.interp(level, steps, _HEAT[:, channel]) for channel in range(3)], axis=2)
    pixels = np.asarray(large, dtype=np.float32)
    subdued = 0.25 * pixels + 0.75 * pixels.mean(axis=2, keepdims=True)
    opacity = (0.3 + 0.35 * level)[:, :, None]
    return Image.fromarray(((1 - opacity) * subdued + opacity * colour).astype(np.uint8))


def totals(summary: Summary) -> str:
    """A job in a line or two, accuracy with its interval."""
    words = (
        f"<strong>{counted(summary.inputs, 'picture')}</strong> in {summary.seconds:.1f} s, "
        f"{summary.images_per_second:.0f} a second"
    )
    if summary.failed:
        words += f"; {summary.failed} could not be read"
    if summary.top1 is None or summary.top1_ci95 is None or summary.top5 is None:
        return f"<p>{words}.</p>"
    low, high = summary.top1_ci95
    return (
        f"<p>{words}.</p><dl><div><dt>top-1</dt><dd>{percent(summary.top1)}</dd></div>"
        f"<div><dt>top-5</dt><dd>{percent(summary.top5)}</dd></div></dl>"
        f'<p class="note">Of {counted(summary.labelled, "labelled picture")}; 95 % interval of '
        f"top-1 {100 * low:.1f} to {percent(high)}. What cannot be read counts as wrong.</p>"
    )


def heat_words(model: str, best: Prediction, occlusion: Occlusion) -> str:
    """What the place that matters most is worth."""
    model, name = escape(model), escape(best.name)
    if occlusion.lowest >= occlusion.probability:
        return (
            f"<p>{model}: covering any one place makes <strong>{name}</strong> no less likely.</p>"
        )
    return (
        f"<p>{model}: covering the place that matters most takes <strong>{name}</strong> from "
        f"{percent(occlusion.probability)} to {percent(occlusion.lowest)}.</p>"
    )


def mark(correct: bool | None) -> str:
    return {None: "", True: "✓", False: "✗"}[correct]


def download(file: Path) -> str:
    """A link that saves a CSV file. Its content is in the link: the file need not stay."""
    content = base64.b64encode(file.read_bytes()).decode()
    return (
        f'<a class="csv-link" download="{file.name}" href="data:text/csv;charset=utf-8;base64,'
        f'{content}">Download {file.name}</a>'
    )


def problem(error: Exception, doing: str) -> str:
    words = f"⚠️ <strong>Cannot {doing}:</strong> {escape(str(error))}"
    return f'<p class="problem" role="alert">{words}</p>'


def share_bar(fraction: float) -> str:
    """A fraction as a percentage, with a bar of that length beneath."""
    return (
        f'<data value="{fraction!r}">{percent(fraction)}</data>'
        f'<i style="--share: {fraction:.4f}" aria-hidden="true"></i>'
    )


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}\N{NO-BREAK SPACE}%"
