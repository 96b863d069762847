import pytest

from tinyserve.report import wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Values of R's prop.test(..., correct = FALSE).
        (5540, 10_000, 0.54424, 0.56372),
        (1, 10, 0.01788, 0.40415),
        (0, 40, 0.0, 0.08762),
        (40, 40, 0.91238, 1.0),
    ],
)
def test_wilson_interval(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=2e-5)
