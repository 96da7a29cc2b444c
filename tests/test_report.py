"""The arithmetic behind summaries and tables."""

import sys

import numpy
import pytest
from conftest import ROOT

import cards
from report import first_reach
from signal_theory import optimal_distance, quality, variance

sys.path.insert(0, str(ROOT / "experiments"))

CURVE = [
    {"step": step, "sampled_tokens": 100 * step + 7, "eval/accuracy": accuracy}
    for step, accuracy in ((0, 0.1), (5, 0.2), (10, 0.15), (15, 0.4), (20, 0.35))
]


@pytest.mark.parametrize(
    ("accuracy", "steps"),
    [(0.05, 0.0), (0.1, 0.0), (0.15, 2.5), (0.2, 5.0), (0.25, 12.0), (0.4, 15.0), (0.41, None)],
)
def test_first_reach_is_linear_between_evaluations(accuracy, steps):
    assert first_reach(CURVE, accuracy) == (pytest.approx(steps) if steps is not None else None)
    tokens = first_reach(CURVE, accuracy, "sampled_tokens")
    assert tokens == (pytest.approx(100 * steps + 7) if steps is not None else None)


def test_interval_is_students():
    from tables import interval

    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.00 [1.04, 4.96]"  # 2.776 * 1.5811 / sqrt(5) = 1.963
    assert interval([0.1, 0.2, 0.6], 3) == "0.300 [-0.357, 0.957]"  # 4.303 * 0.26458 / sqrt(3) = 0.657


def test_equal_tokens_never_gives_the_control_more():
    from tables import Result, equal_tokens

    grpo = Result({"evaluations": [[0, 0, 0.1], [20, 500, 0.2], [40, 1000, 0.3], [60, 1500, 0.4]]})
    for spent, step in ((999, 20), (1000, 40), (1499, 40), (9999, 60)):
        assert equal_tokens(grpo, Result({"evaluations": [[0, 10, 0.0], [30, spent, 0.9]]}))["step"] == step


def test_decisive_tokens_are_what_a_carry_changes():
    from decisive_tokens import decisive

    pieces = cards.build_tokenizer().tokenize(r"97 +8= 105 +1= 106 +9= 115 \boxed{115}")
    marked = [(place, piece) for place, (piece, mark) in enumerate(zip(pieces, decisive(pieces))) if mark]
    assert marked == [(3, "1"), (4, "0"), (11, "1"), (12, "1")]  # 105 and 115 without their last digits; the box is a copy


def test_gradient_variance_is_that_of_a_plain_loop_and_unbiased():
    from signal_curve import gradient_variance

    draw = numpy.random.default_rng(3)
    gradients, count = draw.normal(size=(7, 4)), numpy.array([1, 0, 3, 1, 2, 0, 1])
    drawn = numpy.repeat(gradients, count, axis=0)
    spread, norm = gradient_variance(gradients @ gradients.T, count)
    assert spread == pytest.approx(drawn.var(axis=0, ddof=1).sum())
    assert norm == pytest.approx((drawn.mean(axis=0) ** 2).sum() - spread / 8)
    assert gradient_variance(gradients @ gradients.T, count * 0) == (None, None)
    # mean (1, 0), covariance 2^2 I: over many samples, and over resamples of them, the squared norm averages to 1
    plain, resampled = [], []
    for _ in range(4000):
        sample = draw.normal(size=(10, 2)) * 2 + [1, 0]
        plain.append(gradient_variance(sample @ sample.T, numpy.ones(10)))
        again = numpy.bincount(draw.integers(10, size=10), minlength=10)
        resampled.append(gradient_variance(sample @ sample.T, again, resampled=True))
    assert numpy.mean(plain, axis=0) == pytest.approx([8, 1], rel=0.05)
    assert numpy.mean(resampled, axis=0)[1] == pytest.approx(1, abs=0.15)


def test_fit_finds_the_model_that_made_the_points():
    from signal_curve import fit

    distance = numpy.array([10, 20, 40, 80, 160.0])
    alpha, beta, best = fit(distance, 0.7 * quality(distance, 0.03), variance(distance, 0.008))
    assert (alpha, beta) == (pytest.approx(0.03, rel=0.01), pytest.approx(0.008))
    assert best == pytest.approx(optimal_distance(0.03, 0.008), rel=0.01)  # the constant 0.7 does not move it
    assert numpy.isnan(fit(distance, quality(distance, 0.03), 1 / variance(distance, 0.008))[2])


def test_effective_sample_size():
    from signal_curve import effective

    assert effective([3.0] * 7) == pytest.approx(7)
    assert effective([1e300, 1e-300, 1e-300]) == pytest.approx(1)
    assert effective([2.0, 1.0, 1.0]) == pytest.approx(16 / 6)
    assert effective([]) == 0
