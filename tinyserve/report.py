"""Accuracy and speed of a job, and the accuracy's interval."""

import math
from dataclasses import dataclass

from tinyserve.classifier import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Totals of one job: ``ok``, ``unknown`` and ``failed`` are all the ``inputs``.

    ``top1`` and ``top5`` are fractions of ``labelled``, in which inputs that failed count as wrong
    and unknown ones by their first prediction; None where nothing is labelled. With a
    ``min_confidence``, ``coverage`` is the share of ``ok`` inputs and ``decided_top1`` the accuracy
    on those of them that are labelled. Of ``inputs``, ``kept`` have their rows from an earlier run
    of the job; ``seconds`` are those of the others, without loading the model but with starting
    Ray.
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
    top5_ci95: tuple[float, float] | None
    seconds: float
    images_per_second: float
    unknown: int = 0
    min_confidence: float | None = None
    coverage: float | None = None
    decided_labelled: int | None = None
    decided_top1: float | None = None
    decided_top1_ci95: tuple[float, float] | None = None


class Tally:
    """Adds up results while they stream by."""

    def __init__(self) -> None:
        self.inputs = self.failed = self.labelled = self.correct_top1 = self.correct_top5 = 0
        self.unknown = self.decided_labelled = self.decided_correct = 0

    def add(self, result: Result) -> None:
        self.inputs += 1
        self.failed += result.error is not None
        self.unknown += result.unknown
        self.labelled += result.label is not None
        if result.rank is not None:
            self.correct_top1 += result.rank == 0
            self.correct_top5 += result.rank < 5
            if not result.unknown:
                self.decided_labelled += 1
                self.decided_correct += result.rank == 0

    def merge(self, other: "Tally") -> None:
        """Adds what another has added up."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)

    def summary(
        self,
        *,
        model: str,
        precision: str,
        provider: str,
        seconds: float,
        kept: int = 0,
        min_confidence: float | None = None,
    ) -> Summary:
        labelled = self.labelled
        ok = self.inputs - self.failed - self.unknown
        decided = self.decided_labelled if min_confidence is not None else 0
        return Summary(
            model=model,
            precision=precision,
            provider=provider,
            inputs=self.inputs,
            kept=kept,
            ok=ok,
            failed=self.failed,
            labelled=labelled,
            top1=self.correct_top1 / labelled if labelled else None,
            top1_ci95=wilson_interval(self.correct_top1, labelled) if labelled else None,
            top5=self.correct_top5 / labelled if labelled else None,
            top5_ci95=wilson_interval(self.correct_top5, labelled) if labelled else None,
            seconds=seconds,
            images_per_second=(self.inputs - kept) / seconds if seconds else 0.0,
            unknown=self.unknown,
            min_confidence=min_confidence,
            coverage=ok / self.inputs if min_confidence is not None and self.inputs else None,
            decided_labelled=decided if min_confidence is not None else None,
            decided_top1=self.decided_correct / decided if decided else None,
            decided_top1_ci95=wilson_interval(self.decided_correct, decided) if decided else None,
        )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, 1927), as fractions; ``trials`` >= 1."""
    z = 1.959963984540054
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def counted(number: int, noun: str) -> str:
    """So many of something, in words."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
