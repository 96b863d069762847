"""Figures of training runs."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tinyserve.files import candidate
from training.records import Record, rate_of

COLOURS = {
    "baseline": "tab:gray",
    "alexnet": "tab:orange",
    "inception": "tab:green",
    "resnet20": "tab:blue",
    "plain20": "tab:red",
}
"""An architecture has the same colour in every figure."""

OTHER_COLOUR = "tab:purple"

STYLES = ("-", "--", ":", "-.", (0, (12, 3)), (0, (1, 4)))
MARKERS = "os^Dv*"
"""For lines that would otherwise look the same, in this order; of short ones hardly more than the
markers is seen."""

SAMPLES = 200
"""Points of an epoch at which the learning rate is drawn."""

Points = tuple[list[float], list[float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes: a quantity with its unit over the epochs, and where its points are."""

    quantity: str
    points: Callable[[Record], Points]
    from_zero: bool = False


def _rates(run: Record) -> Points:
    """Through all epochs; each is drawn from its first step on, so that no restart is missed."""
    size = round(run.history[0]["step"] / run.history[0]["epoch"])
    steps = [
        epoch * size + step
        for epoch in range(run.recipe["epochs"])
        for step in range(0, size, max(1, size // SAMPLES))
    ]
    return [step / size for step in steps], [rate_of(run.recipe, s, size) for s in steps]


def _column(name: str, scale: float = 1) -> Callable[[Record], Points]:
    def points(run: Record) -> Points:
        rows = run.history
        return [row["epoch"] for row in rows], [scale * row[name] for row in rows]

    return points


RATE = Panel("learning rate", _rates, from_zero=True)
ACCURACY = Panel("validation top-1 accuracy, %", _column("val_top1", 100), from_zero=True)
LOSS = Panel("training loss, nats", _column("train_loss"))


class Album:
    """Draws figures into ``folder`` for the Markdown file at ``document``."""

    def __init__(self, folder: Path, document: Path) -> None:
        self.folder, self.document = folder, document
        self.paths: list[Path] = []

    def add(self, name: str, title: str, runs: Sequence[Record], *panels: Panel) -> str:
        """Draw one figure; returns the Markdown that shows it."""
        path = self.folder / f"{name}.png"
        _draw(path, title, runs, panels)
        self.paths.append(path)
        return f"![{title}]({Path(os.path.relpath(path, self.document.parent)).as_posix()})"


def _draw(path: Path, title: str, runs: Sequence[Record], panels: Sequence[Panel]) -> None:
    """Write a PNG with the panels side by side, under one title and with one legend."""
    archs = [run.arch for run in runs]
    figure = Figure(figsize=(2.4 + 5.6 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        drawn: list[tuple[str, Points]] = []
        for run in runs:
            points = panel.points(run)
            alike = sum(arch == run.arch or other == points for arch, other in drawn)
            drawn.append((run.arch, points))
            axes.plot(
                *points,
                color=COLOURS.get(run.arch, OTHER_COLOUR),
                linestyle=STYLES[alike % len(STYLES)],
                marker=MARKERS[alike % len(MARKERS)] if len(points[0]) < 20 else None,
                markersize=4,
                label=run.arch if archs.count(run.arch) == 1 else run.name,
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel(panel.quantity)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.from_zero:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside right upper")
    figure.suptitle(title)
    with candidate(path) as hidden:
        figure.savefig(hidden, format="png", dpi=120)
