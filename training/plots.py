"""Curves of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.recipes import Recipe


def draw_curves(path: Path, title: str, history: Sequence[dict[str, Any]], recipe: Recipe) -> None:
    """Write a PNG with loss, accuracy and learning rate over the epochs.

    ``history`` has the rows of ``history.csv``.
    """
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(1, 3)
    marker = "o" if len(epochs) < 20 else None
    for axes, key, scale in ((loss, "loss", 1), (accuracy, "top1", 100)):
        for split, name in (("train", "train (augmented)"), ("val", "validation")):
            values = [scale * row[f"{split}_{key}"] for row in history]
            axes.plot(epochs, values, marker=marker, markersize=4, label=name)
        axes.legend(frameon=False)
    loss.set_ylabel("loss, nats; on train with all its terms")
    accuracy.set_ylabel("top-1 accuracy, %")
    accuracy.set_ylim(bottom=0)
    done = history[-1]["step"]
    steps_per_epoch = done // epochs[-1]
    steps = range(0, done, max(1, done // 2000))
    rate.plot(
        [step / steps_per_epoch for step in steps],
        [recipe.learning_rate(step, steps_per_epoch) for step in steps],
        color="tab:green",
    )
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.set_xlim(0, epochs[-1] + 0.2)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120, format="png")
