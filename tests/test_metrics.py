"""Every logged number by hand, of completions and groups that are made up."""

import dataclasses
import math

import pytest
import torch
from conftest import group_of

from grpo import GRPOConfig
from npo import replace_slot
from plumbing import metrics
from plumbing.rollout import Completion, EncodedPrompt, Sample


def of_row(length: int, source: str = "policy", exact: bool = True) -> Sample:
    completion = Completion("p", [0] * length, [0.0] * length, "", True, source, exact)
    return Sample(EncodedPrompt([1]), completion, 1.0)


def per_token(ratio, low=(0, 0), high=(0, 0), weight=(1, 1)) -> dict[str, torch.Tensor]:
    named = {"ratio": ratio, "low": low, "high": high, "weight": weight}
    return {name: torch.tensor([values], dtype=torch.float32) for name, values in named.items()}


def test_an_updates_numbers_are_means_over_steps_and_over_all_tokens():
    stats, own, guide = metrics.UpdateStats(), of_row(2), of_row(1, "guide@40")
    vllm = of_row(2, exact=False)
    stats.add([own], torch.tensor(0.5), per_token([1.0, 0.75], low=(0, 1)))
    stats.add([guide], torch.tensor(0.25), per_token([0.5, 9.0]))  # the second is padding
    stats.end_step(torch.tensor(3.0))
    stats.add([guide], torch.tensor(-0.25), per_token([1.5, 9.0], high=(1, 1)))
    stats.add([vllm], torch.tensor(0.125), per_token([1.0, 1.25], weight=(0.5, 4.0)))
    stats.end_step(torch.tensor(1.0))
    found = stats.metrics()
    assert found.pop("sampling/sampling_logp_difference/mean") == pytest.approx(1.5 * math.log(2))
    assert found.pop("sampling/sampling_logp_difference/max") == pytest.approx(math.log(4))
    assert found == {
        "loss": (0.75 - 0.125) / 2,  # a step's micro-batches add up
        "grad_norm": 2.0,
        "ratio": (1 + 0.75 + 0.5 + 1.5 + 1 + 1.25) / 6,
        "clip_ratio/low_mean": pytest.approx(1 / 6),
        "clip_ratio/high_mean": pytest.approx(1 / 6),
        "npo/guide_ratio_mean": 1.0,
        "npo/guide_ratio_min": 0.5,
        "npo/guide_ratio_max": 1.5,
        "sampling/importance_sampling_ratio/min": 0.5,
        "sampling/importance_sampling_ratio/mean": 1.25,  # 4 counts as IS_CAP, 2
        "sampling/importance_sampling_ratio/max": 2.0,
    }


def test_no_update_and_a_number_that_is_none():
    stats = metrics.UpdateStats()
    assert stats.metrics() == {"loss": 0.0, "grad_norm": 0.0, "ratio": 1.0}
    stats.add([of_row(2)], torch.tensor(float("inf")), per_token([1.0, 1.0]))
    with pytest.raises(FloatingPointError, match="loss is inf, gradient norm 2.5"):
        stats.end_step(torch.tensor(2.5))
    with pytest.raises(FloatingPointError, match="loss is 0.0, gradient norm nan"):
        metrics.UpdateStats().end_step(torch.tensor(float("nan")))


def test_how_many_slots_are_guided_and_from_how_far_ahead():
    mixed = [group_of([0.0, 1.0]) for _ in range(5)]
    assert metrics.guide_metrics(30, mixed) == {"npo/guide_frac": 0.0}
    mixed[0].completions[1].source = "guide@40"
    mixed[3].completions[0].source = "guide@33"
    mixed[4].completions[0].source = "teacher"  # has no step
    assert metrics.guide_metrics(30, mixed) == {"npo/guide_frac": 0.6, "npo/distance": 6.5}


def test_the_share_of_lucky_answers_where_the_world_knows_the_working():
    mixed = [group_of([0.0, 1.0]) for _ in range(4)]
    for group in mixed[:3]:
        group.prompt = dataclasses.replace(group.prompt, working="27 +8= 35")
        group.completions[1].source, group.completions[1].text = "guide@40", r"27 +8= 35 \boxed{35}"
    mixed[2].completions[1].text = r"27 +7= 35 \boxed{35}"
    mixed[3].completions[1].source = "guide@40"  # a prompt of which no working is known
    assert metrics.guide_metrics(30, mixed)["npo/guide_lucky"] == pytest.approx(1 / 3)


def test_what_the_policys_own_answers_say():
    groups = [group_of([1.0, 0.0, 0.0]), group_of([0.0, 0.0, 0.0])]
    groups[1].completions[0].token_ids, groups[1].completions[0].behavior_logprobs = [7], [-3.0]
    groups[1].completions[2].finished = False
    assert "verifier/too_dear" not in metrics.answer_metrics(groups)
    groups[0].completions[2].too_dear = groups[1].completions[1].too_dear = True
    found = metrics.answer_metrics(groups)
    assert found["verifier/too_dear"] == 2
    assert found["accuracy"] == pytest.approx(1 / 6) and found["reward"] == pytest.approx(0.25)
    assert found["reward_std"] == pytest.approx(0.9 / math.sqrt(3) / 2)  # ddof 1, mean of groups
    assert found["entropy"] == pytest.approx((5 * 0.75 + 3.0) / 11)  # per token
    assert found["completions/mean_length"] == pytest.approx(11 / 6)
    assert found["completions/clipped_ratio"] == pytest.approx(1 / 6)


def test_the_lines_of_the_terminal():
    config = GRPOConfig(prompts_per_step=5, group_size=3, micro_batch_size=4, updates_per_batch=2)
    assert metrics.batch_arithmetic(config) == (
        "5 prompts x 3 slots = 15 completions/step = 4 micro-batches of 4 -> 2 optimizer step(s)"
    )
    group = group_of([1.0, 0.0])
    for completion in group.completions:
        completion.answer = "7"
    line = metrics.answer_metrics([group])
    line |= {"step": 7, "frac_reward_zero_std": 0.25, "loss": 0.125, "grad_norm": 0.5, "ratio": 1.5}
    line |= {"npo/guide_frac": 0.4, "npo/distance": 33.0, "eval/accuracy": 0.875}
    line |= {"clip_ratio/low_mean": 0.01, "clip_ratio/high_mean": 0.002}
    line |= {"time/generate": 1.25, "time/train": 2.5}
    assert metrics.step_line(line, 40, 5) == (
        "step 0007/0040 | acc 0.500 | live 75% | guide 2/5 D 33 | loss 0.125 | ratio 1.50 clip "
        "1.2% | ent 0.38 | len 2 cut 0% | gn 0.50 | gen 1.2s train 2.5s | eval 0.875"
    )
    line["reward"] -= 0.03  # of one's own: it is shown
    assert "| live 75% | rew 0.520 | guide" in metrics.step_line(line, 40, 5)


def test_the_transcript_shows_a_replaced_slot_beside_what_it_replaced():
    groups = [group_of([0.0, 1.0], "a"), group_of([0.0, 0.0], "b")]
    content = [{"type": "image"}, {"type": "text", "text": "Which?"}]
    for group in groups:
        group.prompt.messages.append({"role": "user", "content": content})
    guide = Completion("b", [1], [-0.5], "guided", True, "guide@9", accuracy=1.0, reward=1.0)
    plain = metrics.transcript(3, groups, groups)
    assert (plain["prompt_id"], plain["policy"], plain["pass_rate"]) == ("a", "answer 1", 0.5)
    assert plain["question"] == "<image>Which?" and "guide" not in plain
    mixed = [groups[0], replace_slot(groups[1], guide)]
    line = metrics.transcript(3, groups, mixed)
    shown = ("prompt_id", "policy", "reward", "guide", "source", "gold", "step")
    expected = ("b", "answer 1", 0.1, "guided", "guide@9", "0", 3)
    assert tuple(line[name] for name in shown) == expected


def test_the_transcript_of_another_slot_shows_the_answer_that_went():
    """An edited `replace_slot` may drop any slot and keep the others in another order."""
    group = group_of([0.0, 1.0, 0.0])
    group.prompt.messages.append({"role": "user", "content": [{"type": "text", "text": "?"}]})
    for slot, completion in enumerate(group.completions):
        completion.text, completion.reward = f"slot {slot}", float(slot)
    guide = Completion("p", [1], [-1.0], "guide's", True, "guide@9", accuracy=1.0, reward=1.0)
    kept = [group.completions[2], guide, group.completions[1]]
    line = metrics.transcript(4, [group], [dataclasses.replace(group, completions=kept)])
    assert (line["policy"], line["reward"], line["guide"]) == ("slot 0", 0.0, "guide's")
