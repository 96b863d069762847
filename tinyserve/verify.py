"""Does a model file, here and now, do what was measured when it was made?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinyserve.classifier import Classifier, Result
from tinyserve.dataset import Input
from tinyserve.devices import device_name
from tinyserve.errors import GateError, UsageError
from tinyserve.modelfile import HELD_OUT, Evidence
from tinyserve.report import Tally

SLACK = 0.002
"""Share of the validation images by which the accuracy may differ from the file's evidence:
another processor rounds differently."""

OTHER_PROVIDER_SLACK = 0.005
"""The same where the evidence is another provider's. In 8 bits OpenVINO has another top-1 than ONNX
Runtime on up to 4 % of the images, as often for the better as for the worse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """``max_difference`` is the largest of any golden probability, None without golden images."""

    provider: str
    golden_images: int
    max_difference: float | None
    tolerance: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The evidence of accuracy measured again."""

    provider: str
    images: int
    correct_top1: int
    expected_correct_top1: int
    expected_provider: str

    @property
    def difference(self) -> int:
        return self.correct_top1 - self.expected_correct_top1


def self_test(classifier: Classifier) -> SelfTest:
    """Replay the golden images; raises :class:`~tinyserve.errors.GateError` where they differ."""
    golden = classifier.card.golden
    return SelfTest(
        provider=classifier.engine.provider,
        golden_images=0 if golden is None else golden.count,
        max_difference=classifier.engine.self_test(),
        tolerance=None if golden is None else golden.tolerance,
    )


def replay(
    classifier: Classifier,
    inputs: Sequence[Input],
    watch: Callable[[Result], object] = lambda _: None,
) -> Replay:
    """Measure the accuracy again on the images that the evidence is about.

    ``watch`` sees every result. Raises :class:`~tinyserve.errors.GateError` where the accuracy is
    not the one in the file, give or take :data:`SLACK` or :data:`OTHER_PROVIDER_SLACK`, and
    :class:`~tinyserve.errors.UsageError` where these cannot be the same images.
    """
    card, provider = classifier.card, classifier.engine.provider
    evidence = _evidence_for(card.evidence, provider)
    if evidence is None:
        raise UsageError("the file carries no accuracy to verify; leave out --data")
    labelled = sum(classifier.class_of(item) is not None for item in inputs)
    if labelled != evidence.val_images:
        rest = ": name the validation split that it was measured on"
        if card.training is not None and card.training.dataset.endswith(HELD_OUT):
            rest = (
                " that training held out of its data: leave out --data, or measure another "
                "accuracy with tinyserve classify"
            )
        raise UsageError(
            f"{labelled:,} labelled images here, but the accuracy in the file is of "
            f"{evidence.val_images:,}{rest}"
        )
    tally = Tally()
    for result in classifier.classify_many(inputs):
        watch(result)
        if result.label is not None:  # what else lies in the folder has no part in it
            tally.add(result)
    found = Replay(
        provider=provider,
        images=tally.labelled,
        correct_top1=tally.correct_top1,
        expected_correct_top1=evidence.correct_top1,
        expected_provider=evidence.provider,
    )
    slack = SLACK if evidence.provider == provider else OTHER_PROVIDER_SLACK
    if tally.failed or abs(found.difference) > slack * found.images:
        raise GateError(
            f"top-1 is {found.correct_top1:,} of {found.images:,} on {device_name(provider)}, "
            f"{tally.failed:,} unreadable; the file says {found.expected_correct_top1:,}"
        )
    return found


def _evidence_for(entries: Sequence[Evidence], provider: str) -> Evidence | None:
    """That of the same provider if there is any, or else of another; None without accuracies."""
    measured = [entry for entry in entries if entry.val_images]
    same = [entry for entry in measured if entry.provider == provider]
    return next(iter(same + measured), None)
