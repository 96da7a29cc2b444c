"""One step, seen closely: its numbers are those of steps that npo.py and grpo.py take."""

import json
import re

import pytest
from conftest import ROOT, group_of

import grpo
import npo
import verifier
from experiments import one_step
from plumbing.checkpoints import checkpoint_path
from plumbing.data import load_prompts
from plumbing.model import Policy
from plumbing.run import rows_of_step
from worlds import cards

SLOT = json.loads(one_step.SLOT.read_text())


def test_the_committed_page_and_the_readme_are_those_of_the_committed_numbers():
    text = one_step.PAGE.read_text()
    assert text == one_step.page(SLOT) and len(text.splitlines()) <= 120
    assert f"at commit {SLOT['commit']};" in text and "dirty" not in SLOT["commit"]
    shown = (ROOT / "README.md").read_text()
    assert one_step.readme(shown, SLOT) == shown
    digits = re.search(r"in a row: ([\d, ]+)", text)[1].split(", ")
    hand = cards.Hand(int(SLOT["question"].split()[2]), tuple(map(int, digits)))
    assert hand.working == SLOT["gold"] == SLOT["guide_boxed"]


def test_a_page_by_hand():
    """G = 3. Rewards 0.1, 0.1 and 1: mean 0.4, std 0.52, advantages -0.577 and +1.155."""
    tokens = ["\\boxed{", "8", " +5= ", "1", "3", " +9= ", "2", "2", "}", "<|im_end|>"]
    p = [1.0, 1.0, 1.0, 0.2, 0.9, 1.0, 0.6, 1.0, 1.0, 0.5]
    q = [1.0, 1.0, 1.0, 0.4, 0.9, 1.0, 0.3, 0.97, 1.0, 0.5]
    after = {"guide": [*p[:-1], 0.75], "own": p, "no_is": [*p[:-1], 1.0]}
    slot = SLOT | {"tokens": tokens, "p": p, "q": q, "after": after, "step": 13, "place": 4}
    slot |= {"gold": "8 +5= 13 +9= 22", "boxed": ["8", "9", "22"], "texts": ["a", "b", "c"]}
    slot |= {"rewards": [0.1, 0.1, 0.1], "policy": "c", "guide": "d", "guide_reward": 1.0}
    text = one_step.page(slot | {"live": {"guide": 3, "own": 2, "no_is": 3}})
    for said in (
        "Prompt 4 of step 13",
        "2 cards in a row: 5, 9.",
        "| 2 | `b` | 0.1 | 0 | -0.577 |\n| 3, sampled | `c` | 0.1 | 0 | discarded |\n"
        "| 3, the guide's | `d` | 1.0 |  | +1.155 |",
        "rewards is 0.4000 and their standard deviation (3 - 1) 0.5196",
        "2 of these 2 are digits that a carry changes",  # 8 + 5 and 13 + 9 carry
        "| `1` after `\\boxed{8 +5=` | 0.2000 | 0.4000 | 0.500 | not stopped | 50.0% |",
        "| 0.6000 | 0.3000 | 2.000 | stopped | 0.0% |",
        "It stops 1 of the 10",
        "| the whole answer | 0.054 | 0.081 | 0.054 | 0.108 |",
        "| 1.00 | 1.50 | 1.00 | 2.00 |",
        "With the guide 3 of the step's 8 groups have",
        "\nwithout it 2. ",
    ):
        assert said in text, said
    assert one_step.OTHERS in text and one_step.SILENT not in text
    text = one_step.page(slot | {"live": {"guide": 1, "own": 0, "no_is": 1}})
    assert one_step.SILENT in text and one_step.OTHERS not in text
    row = "| 1 to 2 | wrong answers in a box | 0.1 each | -0.577 each |"
    shown = one_step.readme((ROOT / "README.md").read_text(), slot)
    assert row in shown and "slot of its step 13, where\nall 3 answers" in shown


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        (r"\boxed{27 +8= 35 +5= 40}", "0 00 0 10 0 10 0"),
        (r"\boxed{42 +3= 45 +9= 44}", "0 00 0 00 0 10 0"),  # of a wrong total, too
        (r"27 +3= 30 +5= 35 \boxed{27 +8= 35}", "00 0 10 0 00 0 0 00 0 10 0"),  # the teacher's
        (r"98 +7= 105 +1= 106", "00 0 110 0 000"),
    ],
)
def test_digits_that_a_carry_changes(base, text, marks):
    pieces = base.tokenizer.tokenize(text)
    assert one_step.carried(pieces) == [mark == "1" for mark in marks.replace(" ", "")]


def test_the_decisive_tokens_by_hand():
    assert one_step.decisive([1.0, 0.96, 1.04, 0.94, 1.06]) == [3, 4]
    # by the logarithm 0.5 is farther than 1.9: of six the four farthest, in their order
    assert one_step.decisive([0.9, 1.9, 1.0, 3.0, 0.94, 0.5, 0.1]) == [1, 3, 5, 6]


@pytest.mark.parametrize(
    ("advantage", "ratios", "left"),
    [
        (2.0, [0.3, 1.0, 1.27, 1.29], [0.3, 1.0, 1.27, 0.0]),
        (-0.5, [0.3, 0.69, 0.71, 1.5], [0.0, 0.0, 0.71, 1.5]),
    ],
)
def test_what_ratio_and_clip_leave_by_hand(advantage, ratios, left):
    config = npo.NPOConfig(clip_low=0.3)
    assert one_step.gradient_left(ratios, advantage, config) == pytest.approx(left)


def test_a_telling_group_by_the_rule():
    asked, trained = group_of([0, 0, 0]), group_of([0, 0, 1])
    assert not one_step.telling(asked, trained)  # no answer is in a box
    for completion in asked.completions:
        completion.answer = "12"
    assert one_step.telling(asked, trained)
    assert not one_step.telling(asked, asked)  # nothing was replaced
    asked.completions[1].accuracy = 1.0
    assert not one_step.telling(asked, trained)


def test_the_three_updates_are_the_steps_that_npo_and_grpo_take(tmp_path, monkeypatch):
    """Of step 2, so that AdamW has moments; the teacher guides. The run's own weights stay.

    The reward tells wrong answers apart, so that there is a gradient without the guide, too.
    """
    file = tmp_path / "uneven.py"
    file.write_text("def uneven(prompt, it): return it.accuracy + sum(it.token_ids) % 7 / 100")
    monkeypatch.setattr(verifier, "reward", verifier.reward)  # put back at the end
    shape = {"prompts_per_step": 2, "group_size": 3, "eval_prompts": 4, "eval_samples": 0}
    shape |= {"steps": 2, "save_every": 1, "lr": 1e-3, "seed": 5, "temperature": 1.25}
    shape["reward"] = f"{file}:uneven"
    teacher = {"guide": str(cards.TEACHER), "guide_samples": 2}
    config, out = npo.NPOConfig(**shape, **teacher), tmp_path / "replay"
    prompts, rule = load_prompts(config)[0], one_step.telling
    early = {prompts.id_of(row) for row in rows_of_step(len(prompts), 1, config)}
    monkeypatch.setattr(one_step, "telling", lambda a, b: a.prompt.id not in early and rule(a, b))
    run, step, groups, mixed, place = one_step.replayed(config, out)
    weights = {name: value.clone() for name, value in run.policy.model.state_dict().items()}
    moments = [state["exp_avg"].clone() for state in run.optimizer.state.values()]
    found = one_step.three_updates(run, groups, mixed, place)

    assert step == 2 and moments
    for name, value in run.policy.model.state_dict().items():
        assert value.equal(weights[name]), name
    for state, before in zip(run.optimizer.state.values(), moments):
        assert state["exp_avg"].equal(before)
    answer = mixed[place].completions[-1]
    assert answer.source == "guide" and answer.behavior_logprobs  # without_is made a copy

    first = str(checkpoint_path(out, 1))
    npo.intervene(config, tmp_path / "guide")
    grpo.train(grpo.GRPOConfig(**shape, start=first), tmp_path / "own")
    cache = {"guide": str(out / "guide.jsonl"), "is_correction": False}
    npo.intervene(npo.NPOConfig(**shape, **cache, start=first), tmp_path / "no_is")
    for name, after in found["after"].items():
        policy = Policy(checkpoint_path(tmp_path / name, 2), "cpu")
        assert after == one_step.probabilities(policy, mixed[place], 1.25), name
    assert len({tuple(values) for values in (found["p"], *found["after"].values())}) == 4
    again = one_step.replayed(config, out)[2][place].completions  # resumed at step 1
    assert [c.token_ids for c in again] == [c.token_ids for c in groups[place].completions]
