"""The arithmetic behind summaries and tables."""

import sys

import pytest
from conftest import ROOT

import cards
from report import first_reach

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
