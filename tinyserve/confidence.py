"""Which confidence to ask for, by what a model file knows of its own precision."""

from tinyserve.errors import UsageError
from tinyserve.modelfile import ModelCard, OperatingPoint
from tinyserve.report import wilson_interval


def operating_point(card: ModelCard, target_precision: float) -> OperatingPoint:
    """The lowest threshold whose precision reaches a target, a fraction.

    The precision meant is the lower end of its 95 % interval (Wilson's) on the images held out of
    training: a promise for other images of the same kind must not rest on the luck of a few. Raises
    :class:`~tinyserve.errors.UsageError` where the file has no calibration, and where no threshold
    reaches the target.
    """
    if card.calibration is None:
        raise UsageError(
            "this file has no calibration to choose a confidence from: name one with "
            "--min-confidence, or export a run that was trained with --holdout N"
        )
    points = [point for point in card.calibration.points if point.decided]
    for point in points:
        if _surely(point) >= target_precision:
            return point
    if not points:
        raise UsageError("no held-out image was decided at any confidence")
    best = max(points, key=_surely)
    raise UsageError(
        f"no confidence reaches a precision of {100 * target_precision:g} %: the best, "
        f"{best.threshold:.2f}, was right on {best.correct:,} of {best.decided:,} held-out images, "
        f"at least {100 * _surely(best):.1f} % with 95 % confidence; more of them narrow that"
    )


def in_words(point: OperatingPoint, card: ModelCard) -> str:
    """What a threshold did on the images held out of training, in one line."""
    assert card.calibration is not None
    return (
        f"confidence {point.threshold:.2f} or more: right on {point.correct:,} of "
        f"{point.decided:,} held-out images ({100 * point.correct / point.decided:.1f} %, at least "
        f"{100 * _surely(point):.1f} % with 95 % confidence), "
        f"{100 * point.decided / card.calibration.images:.1f} % of all decided"
    )


def _surely(point: OperatingPoint) -> float:
    return wilson_interval(point.correct, point.decided)[0]
