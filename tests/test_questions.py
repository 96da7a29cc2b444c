"""The answers in docs/questions.md, computed by the code that they are about."""

import math
import re
from pathlib import Path

import pytest
import torch

from grpo import clipped_policy_loss, group_advantages
from npo import replace_slot
from plumbing.rollout import Completion, Group

TEXT = (Path(__file__).parent.parent / "docs" / "questions.md").read_text()
ANSWERS = dict(
    zip(range(1, 9), re.findall(r"<summary>Answer</summary>\n(.*?)</details>", TEXT, re.DOTALL))
)


def says(number: int, *values: float) -> None:
    """That the answer to a question holds these numbers, to the digits it gives."""
    found = [
        float(n.replace(",", "")) for n in re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?", ANSWERS[number])
    ]
    for value in values:
        assert any(abs(value - n) <= 0.0005 for n in found), (number, value, found)


def advantages(*rewards: float) -> list[float]:
    return group_advantages(torch.tensor([rewards]))[0].tolist()


def term(ratio: float) -> tuple[float, float]:
    """A guide token's objective at A = +2.475, and its derivative by the log-prob."""
    gain = advantages(*[0.1] * 7, 1.0)[7]
    logprob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, _ = clipped_policy_loss(
        logprob, torch.zeros(1, 1), torch.tensor([gain]), torch.ones(1, 1, dtype=torch.bool)
    )
    loss.backward()
    return -loss.item(), -logprob.grad.item()


def group(*rights: float) -> Group:
    made = [Completion("p", [1], [-1.0], "", True, accuracy=right) for right in rights]
    for completion in made:
        completion.reward = 0.9 * completion.accuracy + 0.1
    return Group(None, None, made)


GUIDE = Completion("p", [2], [-0.5], "", True, "guide@40", accuracy=1.0, reward=1.0)


def test_eight_questions_have_eight_answers():
    assert len(ANSWERS) == 8 and TEXT.count("<summary>") == 8


def test_1_seven_failures_and_a_guide():
    values = advantages(*[0.1] * 7, 1.0)
    says(1, values[0], values[7], values[7] * math.sqrt(8 / 7))
    assert advantages(*[0.1] * 8) == [0.0] * 8


def test_2_the_only_right_answer_is_replaced():
    before = group(*[0.0] * 7, 1.0)
    after = replace_slot(before, GUIDE)
    assert after.completions[7] is GUIDE and before.pass_rate == 0.125
    rewards = [[c.reward for c in g.completions] for g in (before, after)]
    assert rewards[0] == rewards[1]
    says(2, before.pass_rate, *advantages(*rewards[1]))


def test_3_behind_the_guide():
    value, slope = term(0.5)
    says(3, value)
    assert slope == pytest.approx(value)


def test_4_past_the_guide():
    value, slope = term(1.5)
    says(4, value)
    assert slope == 0.0


def test_5_two_slots():
    says(5, *advantages(0.1, 1.0), advantages(*[0.1] * 7, 1.0)[7])
    assert advantages(0.0, 1.0) == pytest.approx(advantages(0.1, 1.0), abs=1e-5)


def test_6_a_sequences_kl():
    says(6, 0.05 * 200, round(math.exp(0.05 * 200)), math.exp(0.05))


def test_7_asked_again():
    says(7, 0.95**8, 0.95**16)


def test_8_all_right():
    solved = group(*[1.0] * 8)
    assert replace_slot(solved, GUIDE) is solved
    assert advantages(*[c.reward for c in solved.completions]) == [0.0] * 8
    says(8, solved.pass_rate)
