"""A report as one HTML page that needs nothing else, and its figures as JSON beside it."""

import base64
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template

from tinyserve import images
from tinyserve.dataset import Input, version_of
from tinyserve.devices import device_name
from tinyserve.errors import ImageError, OutputError, os_reason
from tinyserve.files import candidate
from tinyserve.report import counted
from tinyserve.statistics import (
    PICTURE_SIZE,
    ClassRow,
    Confusion,
    Example,
    HistogramBin,
    ReliabilityBin,
    Report,
)

PAGE = "index.html"
FIGURES = "report.json"
_TEMPLATE = Path(__file__).with_name("report.html")


def make_folder(folder: Path) -> None:
    """Make the folder of a report before the work begins; OutputError where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write into {folder}: no permission")


def write_report(folder: Path, report: Report) -> None:
    """Write :data:`PAGE` and :data:`FIGURES` into a folder, each in one step.

    Reads the pictures on the page once more. Raises :class:`~tinyserve.errors.OutputError` where
    the files cannot be written.
    """
    for name, text in ((FIGURES, report.to_json()), (PAGE, page(report))):
        try:
            with candidate(folder / name) as hidden:
                # File names that are not UTF-8 hold what UTF-8 cannot say.
                hidden.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise _cannot_write(folder / name, error) from error


def page(report: Report) -> str:
    """The HTML document."""
    summary = report.summary
    created = datetime.fromisoformat(report.created)
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{summary.model}: {counted(summary.inputs, 'image')}"),
        created=escape(report.created),
        date=f"{created.day} {created:%B %Y, %H:%M} UTC",
        heading=escape(summary.model),
        lede=_lede(report),
        tiles=_tiles(report),
        sections="\n".join(_sections(report)),
    )


def _sections(report: Report) -> Iterator[str]:
    labelled = report.summary.labelled
    if report.summary.ok + report.summary.unknown:
        yield _confidence(report)
    if report.confusions:
        cards = "".join(map(_confusion, report.confusions))
        yield _section(
            "Worst confusions",
            "What was most often taken for something else, with the first pictures of each.",
            f'<ol class="confusions">{cards}</ol>',
        )
    if report.mistakes:
        yield _section(
            "Most confident mistakes",
            "Wrong, and surest of it: a wrong label, two things in one picture, or something to "
            "learn.",
            _gallery(report.mistakes),
        )
    if labelled:
        yield _section(
            "Classes",
            "Those with labelled images, hardest first. The line on a bar is the 95 % interval.",
            _class_table([row for row in report.classes if row.images]),
        )
    if labelled < report.summary.inputs and any(row.predicted for row in report.classes):
        yield _section(
            "Predicted classes",
            "How many images were called what. The longest bar is the most frequent class.",
            _predicted_table([row for row in report.classes if row.predicted]),
        )
        yield _section(
            "Least certain",
            "Where the first prediction was given least.",
            _gallery(report.least_certain),
        )
    if report.failures:
        yield _failures(report)
    yield _facts(report)


def _lede(report: Report) -> str:
    summary = report.summary
    device = f"{escape(summary.precision)} on {escape(device_name(summary.provider))}"
    named = ", ".join(f"<code>{escape(path)}</code>" for path in report.paths[:3])
    more = f" and {counted(len(report.paths) - 3, 'more path')}" if len(report.paths) > 3 else ""
    return f"{device}, {counted(summary.inputs, 'image')} from {named}{more}."


def _tiles(report: Report) -> str:
    summary = report.summary
    tiles = []
    if summary.top1 is not None and summary.top1_ci95 is not None:
        tiles.append(_accuracy_tile("Top-1 accuracy", summary.top1, summary.top1_ci95))
    if summary.top5 is not None and summary.top5_ci95 is not None:
        tiles.append(_accuracy_tile("Top-5 accuracy", summary.top5, summary.top5_ci95))
    if summary.min_confidence is not None and summary.coverage is not None:
        at = f"first prediction at least {_percent(summary.min_confidence)}"
        bar = _bar(summary.coverage)
        tiles.append(_tile("Decided", _big_percent(summary.coverage), f"{bar}{at}"))
    if summary.decided_top1 is not None and summary.decided_top1_ci95 is not None:
        name = "Top-1 of the decided"
        tiles.append(_accuracy_tile(name, summary.decided_top1, summary.decided_top1_ci95))
    if report.calibration_error is not None:
        value = f"{100 * report.calibration_error:.1f} <small>points</small>"
        note = "expected calibration error: confidence and accuracy differ by so much on average"
        tiles.append(_tile("Miscalibration", value, note))
    counts = [f"{summary.ok + summary.unknown:,} classified"]
    if summary.failed:
        counts.append(f'<strong class="wrong">{summary.failed:,} failed</strong>')
    counts.append(f"{summary.labelled:,} labelled")
    tiles.append(_tile("Inputs", f"{summary.inputs:,}", ", ".join(counts)))
    speed = f"{summary.images_per_second:,.0f} <small>images/s</small>"
    took = f"{summary.seconds:,.1f} s on {escape(device_name(summary.provider))}, reading included"
    tiles.append(_tile("Speed", speed, took))
    width = 165 if len(tiles) <= 5 else 220  # one row, or two that are both full
    return f'<dl class="tiles" style="--tile:{width}px">{"".join(tiles)}</dl>'


def _accuracy_tile(name: str, share: float, interval: tuple[float, float]) -> str:
    low, high = interval
    words = f"95 % interval {100 * low:.2f} to {100 * high:.2f}"
    return _tile(name, _big_percent(share), f"{_bar(share, interval)}{words}")


def _tile(name: str, value: str, note: str) -> str:
    return (
        f'<div class="card"><dt>{name}</dt><dd class="value">{value}</dd>'
        f'<dd class="note">{note}</dd></div>'
    )


# How sure, and how often right


def _confidence(report: Report) -> str:
    figures = []
    if report.calibration_error is not None:
        figures.append(_reliability_figure(report.reliability, report.calibration_error))
    figures.append(_histogram_figure(report.histogram, report.summary.min_confidence))
    about = "The confidence of an answer is the probability of the first prediction."
    return _section("Confidence", about, f'<div class="pair">{"".join(figures)}</div>')


_LEFT, _TOP, _WIDTH, _HEIGHT = 40, 28, 290, 230
"""Of a chart's plot in its view box, which is as wide as a phone shows it."""
_BOX = f"0 0 {_LEFT + _WIDTH + 20} {_TOP + _HEIGHT + 44}"


def _reliability_figure(bins: Sequence[ReliabilityBin], error: float) -> str:
    marks = [_axes("confidence", "accuracy", [(k / 4, f"{25 * k} %") for k in range(5)])]
    marks.append(f'<path class="ideal" d="M{_x(0)} {_y(0)}L{_x(1)} {_y(1)}"/>')
    dots, line = [], []
    for part in bins:
        if part.accuracy is None or part.confidence is None or part.accuracy_ci95 is None:
            continue
        x, y = _x(part.confidence), _y(part.accuracy)
        low, high = part.accuracy_ci95
        line.append(f"{x:.1f},{y:.1f}")
        dots.append(
            f"<g><title>{_range(part.low, part.high)}: {counted(part.images, 'image')}, mean "
            f"confidence {_percent(part.confidence)}, accuracy {_percent(part.accuracy)}</title>"
            f'<path class="gap" d="M{x:.1f} {_y(part.confidence):.1f}V{y:.1f}"/>'
            f'<path class="whisker" d="M{x:.1f} {_y(low):.1f}V{_y(high):.1f}"/>'
            f'<circle class="fill-right" cx="{x:.1f}" cy="{y:.1f}" r="4"/></g>'
        )
    marks += [f'<polyline class="trend" points="{" ".join(line)}"/>', *dots]
    described = (
        f"Reliability diagram in {len(bins)} bins. Expected calibration error "
        f"{100 * error:.1f} points."
    )
    rows = [
        (
            _range(part.low, part.high),
            f"{part.images:,}",
            _percent(part.confidence),
            _percent(part.accuracy),
        )
        for part in bins
        if part.images
    ]
    key = _key(
        ("dot", "accuracy"), ("whisker", "its interval"), ("gap", "gap to the mean confidence")
    )
    return _chart(
        "As sure as it is right?",
        f"On the dashed line, confidence is accuracy. On average they are {100 * error:.1f} "
        f"points apart (expected calibration error, {len(bins)} bins).",
        _svg(described, marks) + key,
        _figures_table(("confidence", "images", "mean confidence", "accuracy"), rows),
    )


def _histogram_figure(bins: Sequence[HistogramBin], threshold: float | None) -> str:
    kinds = [
        kind for kind in ("right", "wrong", "unlabelled") if any(getattr(b, kind) for b in bins)
    ]
    totals = [part.right + part.wrong + part.unlabelled for part in bins]
    step = _tick_step(max(totals))
    top = step * -(-max(totals) // step)
    ticks = [(value / top, f"{value:,}") for value in range(0, top + 1, step)]
    marks = [_axes("confidence", "images", ticks)]
    for part, total in zip(bins, totals, strict=True):
        x, width = _x(part.low) + 1, _x(part.high) - _x(part.low) - 2
        stacked, rectangles = 0, []
        for kind in kinds:
            count = getattr(part, kind)
            colour = f"fill-{'none' if kind == 'unlabelled' else kind}"
            rectangles.append(_rectangle(x, width, stacked / top, (stacked + count) / top, colour))
            stacked += count
        title = f"{_range(part.low, part.high)}: {counted(total, 'image')}"
        marks.append(f"<g><title>{title}</title>{''.join(rectangles)}</g>")
    words = "How many images were answered with which confidence."
    if threshold is not None:
        at = _x(threshold)
        marks.append(f'<path class="threshold" d="M{at:.1f} {_y(0)}V{_y(1)}"/>')
        words += f" What is left of the dotted line, {_percent(threshold)}, is unknown."
    rows = [
        (_range(part.low, part.high), *(f"{getattr(part, kind):,}" for kind in kinds))
        for part in bins
    ]
    key = _key(*(("none" if kind == "unlabelled" else kind, kind) for kind in kinds))
    return _chart(
        "How sure it is",
        words,
        _svg(f"Histogram of confidence in {len(bins)} bins.", marks) + key,
        _figures_table(("confidence", *kinds), rows),
    )


def _chart(heading: str, about: str, drawing: str, table: str) -> str:
    return (
        f'<figure class="card"><h3>{heading}</h3><figcaption>{about}</figcaption>{drawing}'
        f"<details><summary>The figures</summary>{table}</details></figure>"
    )


def _svg(described: str, marks: Iterable[str]) -> str:
    label = escape(described)
    return f'<svg viewBox="{_BOX}" role="img" aria-label="{label}">{"".join(marks)}</svg>'


def _axes(across: str, up: str, ticks: Iterable[tuple[float, str]]) -> str:
    """Grid lines at heights, with their words; below, the percent of the confidence."""
    parts = []
    for height, words in ticks:
        y = _y(height)
        parts.append(
            f'<path class="grid" d="M{_LEFT} {y:.1f}h{_WIDTH}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{words}</text>'
        )
    for k in range(5):
        below = _TOP + _HEIGHT + 17
        parts.append(f'<text x="{_x(k / 4)}" y="{below}" text-anchor="middle">{25 * k} %</text>')
    parts.append(
        f'<text x="{_x(0.5)}" y="{_TOP + _HEIGHT + 37}" text-anchor="middle">{across}</text>'
        f'<text x="0" y="12">{up}</text>'
    )
    return "".join(parts)


def _rectangle(x: float, width: float, bottom: float, top: float, colour: str) -> str:
    return (
        f'<rect class="{colour}" x="{x:.1f}" y="{_y(top):.1f}" width="{width:.1f}" '
        f'height="{(top - bottom) * _HEIGHT:.1f}"/>'
    )


def _x(share: float) -> float:
    return _LEFT + share * _WIDTH


def _y(share: float) -> float:
    return _TOP + (1 - share) * _HEIGHT


def _tick_step(largest: int) -> int:
    """The distance of three to five round numbers from 0 to ``largest``."""
    size = 1
    while True:
        for factor in (1, 2, 5):
            if factor * size * 4 >= largest:
                return factor * size
        size *= 10


def _key(*entries: tuple[str, str]) -> str:
    items = "".join(f'<li><i class="key-{name}"></i>{words}</li>' for name, words in entries)
    return f'<ul class="key">{items}</ul>'


# Pictures


def _confusion(confusion: Confusion) -> str:
    label, predicted = escape(confusion.label), escape(confusion.predicted)
    pictures = "".join(
        _picture(item, f"{confusion.label} taken for {confusion.predicted}")
        for item in confusion.examples
    )
    share = confusion.images / confusion.of
    return (
        f'<li class="card"><div class="pictures">{pictures}</div><div class="words">'
        f"<b>{label}</b> taken for <b>{predicted}</b>{_bar(share, wrong=True)}"
        f'<p class="note">{confusion.images:,} of {confusion.of:,}, {100 * share:.0f} %</p>'
        f"</div></li>"
    )


def _gallery(examples: Iterable[Example]) -> str:
    return f'<div class="gallery">{"".join(map(_example, examples))}</div>'


def _example(example: Example) -> str:
    words = f"called {example.predicted}"
    truth = ""
    if example.label is not None:
        words += f", labelled {example.label}"
        truth = f"labelled {escape(example.label)}"
    colour = ' class="wrong"' if example.correct is False else ""
    return (
        f"<figure>{_picture(example.input, words)}<figcaption>"
        f"<span{colour}>{_percent(example.probability)}</span>"
        f"<b>{escape(example.predicted)}</b>{truth}</figcaption></figure>"
    )


def _picture(item: Input, described: str) -> str:
    """The picture in the page itself; where it cannot be read any more, a place that says so."""
    path = escape(item.path)
    try:
        picture = images.thumbnail(item.read(), PICTURE_SIZE)
    except ImageError:
        # Of an archive or a URI, an earlier run's row has the name alone.
        why = "in an archive" if version_of(item.path) else "not at hand any more"
        if os.path.exists(item.path):
            why = "cannot be read"
        return f'<span class="gone" title="{path}">{why}</span>'
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="data:image/jpeg;base64,{data}" alt="{escape(described)}" title="{path}" '
        f'width="{picture.width}" height="{picture.height}">'
    )


# Tables


def _class_table(rows: list[ClassRow]) -> str:
    rows.sort(key=lambda row: (row.accuracy or 0, row.name))
    cells = [
        (
            f"{row.correct:,} of {row.images:,}",
            f'{_percent(row.accuracy)} <span class="note">{_ci(row)}</span>'
            + _bar(row.accuracy or 0, row.accuracy_ci95),
            f"{escape(row.confused_with)}, {row.confused:,}" if row.confused_with else "",
        )
        for row in rows
    ]
    head = (
        '<th scope="col">class</th><th scope="col" class="number">right</th>'
        '<th scope="col">accuracy</th><th scope="col">most often taken for</th>'
    )
    kinds = ("number", "bars", "")
    return _scrolled("Accuracy by class", head, zip(rows, cells, strict=True), kinds)


def _predicted_table(rows: list[ClassRow]) -> str:
    rows.sort(key=lambda row: (-row.predicted, row.name))
    most, total = rows[0].predicted, sum(row.predicted for row in rows)
    cells = [
        (f"{row.predicted:,}", _percent(row.predicted / total) + _bar(row.predicted / most))
        for row in rows
    ]
    head = (
        '<th scope="col">class</th><th scope="col" class="number">images</th>'
        '<th scope="col">share</th>'
    )
    kinds = ("number", "bars")
    return _scrolled("Predicted classes", head, zip(rows, cells, strict=True), kinds)


def _scrolled(
    name: str, head: str, rows: Iterable[tuple[ClassRow, tuple[str, ...]]], kinds: tuple[str, ...]
) -> str:
    body = []
    for row, cells in rows:
        columns = zip(kinds, cells, strict=True)
        body.append(
            f'<tr><th scope="row">{escape(row.name)}</th>'
            + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in columns)
            + "</tr>"
        )
    return (
        f'<div class="card scroll" role="region" aria-label="{name}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _figures_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col" class="number">{heading}</th>' for heading in headings)
    body = "".join(
        "<tr>" + "".join(f'<td class="number">{cell}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _failures(report: Report) -> str:
    shown, failed = len(report.failures), report.summary.failed
    about = f"{counted(failed, 'input')} could not be used"
    about += "." if shown == failed else f"; these are the first {shown:,}."
    if report.summary.labelled:
        about += " Those with a label count as wrong."
    body = "".join(
        f'<tr><td class="path"><code>{escape(failure.input.path)}</code></td>'
        f'<td class="reason">{escape(failure.reason)}</td></tr>'
        for failure in report.failures
    )
    table = (
        '<div class="card scroll" role="region" aria-label="Failed inputs" tabindex="0"><table>'
        '<thead><tr><th scope="col">input</th><th scope="col">reason</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
    return _section("Failed", about, table)


def _facts(report: Report) -> str:
    model, summary = report.model, report.summary
    facts = {
        "architecture": f"{model.architecture}, {model.parameters / 1e6:.2f} M parameters",
        "precision": summary.precision,
        "device": device_name(summary.provider),
        "input": f"{model.image_size} x {model.image_size} pixels"
        + (f", {model.views} views" if model.views > 1 else ""),
        "classes": f"{model.classes:,}",
        "trained on": model.trained_on or "not known",
    }
    if model.top1 is not None and model.top5 is not None:
        facts["accuracy in the file"] = (
            f"top-1 {100 * model.top1:.2f} %, top-5 {100 * model.top5:.2f} %"
        )
    if model.temperature is not None:
        facts["calibrated"] = f"with a temperature of {model.temperature:.3f}"
    entries = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    entries += f"<div><dt>fingerprint</dt><dd><code>{escape(model.fingerprint)}</code></dd></div>"
    return _section("The model", "What its file says.", f'<dl class="card facts">{entries}</dl>')


def _section(heading: str, about: str, content: str) -> str:
    return f'<section><h2>{heading}</h2><p class="about">{about}</p>{content}</section>'


def _bar(share: float, interval: tuple[float, float] | None = None, *, wrong: bool = False) -> str:
    style = f"--value:{100 * share:.2f}%"
    if interval is not None:
        style += f";--low:{100 * interval[0]:.2f}%;--high:{100 * interval[1]:.2f}%"
    kinds = "bar" + (" interval" if interval else "") + (" wrong" if wrong else "")
    return f'<span class="{kinds}" style="{style}" aria-hidden="true"></span>'


def _big_percent(share: float) -> str:
    return f"{100 * share:.2f} <small>%</small>"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _range(low: float, high: float) -> str:
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def _ci(row: ClassRow) -> str:
    low, high = row.accuracy_ci95 or (0, 1)
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {os_reason(error)}")
