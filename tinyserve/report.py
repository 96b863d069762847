"""Accuracy and speed of a job, and the accuracy's interval."""

import math
from dataclasses import dataclass

from tinyserve.classifier import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Totals of one job. ``top1`` and ``top5`` are fractions of ``labelled``, in which inputs that
    failed count as wrong; None where nothing is labelled. Of ``inputs``, ``kept`` have their rows
    from an earlier run of the job; ``seconds`` are those of the others, without loading the model.
    """

    model: str
    precision: str
    provider: str
    inputs: int
    kept: int
    ok: int
    failed: int
    labelled: int
    top1: float | None
    top1_ci95: tuple[float, float] | None
    top5: float | None
    seconds: float
    images_per_second: float


class Tally:
    """Adds up results while they stream by."""

    def __init__(self) -> None:
        self.inputs = self.failed = self.labelled = self.correct_top1 = self.correct_top5 = 0

    def add(self, result: Result) -> None:
        self.inputs += 1
        self.failed += result.error is not None
        self.labelled += result.label is not None
        if result.rank is not None:
            self.correct_top1 += result.rank == 0
            self.correct_top5 += result.rank < 5

    def summary(
        self, *, model: str, precision: str, provider: str, seconds: float, kept: int = 0
    ) -> Summary:
        labelled = self.labelled
        return Summary(
            model=model,
            precision=precision,
            provider=provider,
            inputs=self.inputs,
            kept=kept,
            ok=self.inputs - self.failed,
            failed=self.failed,
            labelled=labelled,
            top1=self.correct_top1 / labelled if labelled else None,
            top1_ci95=wilson_interval(self.correct_top1, labelled) if labelled else None,
            top5=self.correct_top5 / labelled if labelled else None,
            seconds=seconds,
            images_per_second=(self.inputs - kept) / seconds,
        )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, 1927), as fractions; ``trials`` >= 1."""
    z = 1.959963984540054
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
