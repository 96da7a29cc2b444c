"""The objective, number by number: advantages, the clip's quadrants, normalisers, gradients."""

import copy
import dataclasses
import math

import pytest
import torch
from conftest import group_of
from transformers.models.qwen3_vl import modeling_qwen3_vl

import grpo
import verifier
from autonpo import AutoNPOConfig
from commands.exgrpo import ExGRPOConfig
from commands.luffy import LUFFYConfig
from commands.rlep import RLEPConfig
from grpo import GRPOConfig, clipped_policy_loss, group_advantages, update
from npo import NPOConfig
from plumbing import UsageError
from plumbing.command import flag_comments, read_flags
from plumbing.metrics import IS_CAP
from plumbing.model import Policy
from plumbing.rollout import batched
from plumbing.settings import BY_WORLD, within
from worlds import cards


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.1, 0.1, 0.4], [0.0, 0.0, 1.0, 1.0]])
    before = rewards.clone()
    got = group_advantages(rewards)
    std = math.sqrt((0.6**2 + 0.3**2 + 0.3**2 + 0.0**2) / 3)  # mean 0.4, ddof 1
    expected = torch.tensor([[0.6 / std, -0.3 / std, -0.3 / std, 0.0], [-0.5, -0.5, 0.5, 0.5]])
    expected[1] /= math.sqrt(4 * 0.25 / 3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(rewards, before)


def test_one_guide_in_eight_failures():
    got = group_advantages(torch.tensor([[0.0] * 7 + [1.0]]))
    assert got[0, 7].item() == pytest.approx(2.475, abs=1e-3)
    assert got[0, :7].tolist() == pytest.approx([-0.354] * 7, abs=1e-3)


def test_groups_all_alike_have_exactly_no_advantage():
    alike = torch.full((3, 7), 0.1)  # the mean of seven 0.1 is not exactly 0.1
    assert not group_advantages(alike).any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [  # the minimum of rho A and clip(rho) A; d/dlogprob of rho A is rho A, of a constant 0
        (1.5, 2.0, 1.4 * 2.0, 0.0),  # good and already likelier: clipped
        (0.5, 2.0, 0.5 * 2.0, 0.5 * 2.0),  # good but less likely: keeps the gradient
        (1.5, -2.0, 1.5 * -2.0, 1.5 * -2.0),  # bad but likelier: keeps the gradient
        (0.5, -2.0, 0.9 * -2.0, 0.0),  # bad and already less likely: clipped
        (1.2, 2.0, 2.4, 2.4),  # inside the range
        (0.95, -2.0, -1.9, -1.9),
    ],
)
def test_the_clips_four_quadrants(ratio, advantage, value, gradient):
    logprobs = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    batch = torch.tensor([[-1.0]]), torch.tensor([advantage]), torch.tensor([[True]])
    loss, per_token = clipped_policy_loss(logprobs, *batch, clip_low=0.1, clip_high=0.4)
    loss.backward()
    assert loss.item() == pytest.approx(-value, rel=1e-5)
    assert logprobs.grad.item() == pytest.approx(-gradient, rel=1e-5)
    assert per_token["ratio"].item() == pytest.approx(ratio, rel=1e-5)
    assert per_token["high"].item() is (ratio > 1.4 and advantage > 0)
    assert per_token["low"].item() is (ratio < 0.9 and advantage < 0)


LENGTHS = [1, 9, 4, 2, 7, 5]


def random_batch():
    """Log-probs, old ones, advantages, mask and weights of six sequences."""
    generator = torch.Generator().manual_seed(3)
    logprobs = -2 * torch.rand(6, 9, generator=generator)
    old = logprobs + 0.5 * torch.randn(6, 9, generator=generator)
    advantages = torch.randn(6, generator=generator)
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    return logprobs, old, advantages, mask, 2 * torch.rand(6, 9, generator=generator)


@pytest.mark.parametrize("total", [None, 11])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_is_the_mean_per_sequence_then_over_sequences(total, weighted):
    logprobs, old, advantages, mask, weights = random_batch()
    weights = weights if weighted else torch.ones_like(weights)
    expected = 0.0  # the formula, written out
    for row, length in enumerate(LENGTHS):
        gain, terms = advantages[row].item(), []
        for t in range(length):
            rho = math.exp(logprobs[row, t] - old[row, t])
            clipped = min(max(rho, 0.85), 1.3)
            terms.append(weights[row, t].item() * min(rho * gain, clipped * gain))
        expected -= sum(terms) / length / (total or 6)
    given = (weights,) if weighted else ()
    got, _ = clipped_policy_loss(logprobs, old, advantages, mask, 0.15, 0.3, total, *given)
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_padding_never_matters_and_inputs_stay_as_they_were():
    *arguments, _ = random_batch()
    logprobs, old, advantages, mask = arguments
    before = [value.clone() for value in arguments]
    loss, _ = clipped_policy_loss(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before))
    spoilt = logprobs.masked_fill(~mask, float("nan")).requires_grad_()
    again, _ = clipped_policy_loss(spoilt, old.masked_fill(~mask, 1e9), advantages, mask)
    again.backward()
    assert again.item() == loss.item()
    assert not spoilt.grad[~mask].any() and spoilt.grad[mask].abs().sum() > 0


def test_on_policy_gradient_is_the_policy_gradient():
    """At ratio 1 the gradient is -A / (|o| B) at every token, whatever the log-probs."""
    logprobs, _, advantages, mask, _ = random_batch()
    logprobs.requires_grad_()
    clipped_policy_loss(logprobs, logprobs.detach(), advantages, mask)[0].backward()
    for row, length in enumerate(LENGTHS):
        expected = [-advantages[row].item() / length / 6] * length
        assert logprobs.grad[row, :length].tolist() == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------- the update


@pytest.fixture(scope="module")
def sampled(base, prompts):
    groups = base.sample([prompts[i] for i in (0, 3, 4, 9)], 5, 30, 1.0, seed=8)
    for number, group in enumerate(groups):
        for slot, completion in enumerate(group.completions):
            completion.accuracy = float(number != 2 and (slot + number) % 3 == 0)
            completion.reward = 0.1 + 0.9 * completion.accuracy
        cut = group.completions[number]
        cut.token_ids = cut.token_ids[: 6 + number]
        cut.behavior_logprobs = cut.behavior_logprobs[: 6 + number]
    return groups


@pytest.fixture
def groups(sampled):
    """Three groups with mixed rewards and one without, of answers that differ in length."""
    return copy.deepcopy(sampled)


def gradients_of(policy, groups, **flags):
    """The gradients that `update` hands to the optimizer, unclipped, and its metrics."""
    taken = []

    class Spy(torch.optim.SGD):
        def step(self):
            taken.append(torch.cat([p.grad.flatten().clone() for p in policy.parameters()]))

    config = GRPOConfig(max_grad_norm=1e9, **flags)
    stats = update(policy, Spy(policy.parameters(), lr=0.0), groups, config)
    return taken, stats


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-6), ("fp32", 1e-5)])
def test_micro_batches_change_memory_only(groups, dtype, tolerance):
    """To 1e-6 of the gradient's norm in fp64; fp32's own rounding is larger here."""
    policy = Policy(cards.BASE, dtype=dtype)
    (whole,), stats = gradients_of(policy, groups, micro_batch_size=20)
    for size in (1, 2, 8):
        (split,), same = gradients_of(policy, groups, micro_batch_size=size)
        assert (split - whole).norm() / whole.norm() < tolerance
        assert same["loss"] == pytest.approx(stats["loss"], rel=1e-4, abs=1e-6)


def norm_in_fp64(self, hidden):
    """Of transformers' RMSNorm, which rounds to fp32 in every model."""
    return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-9), ("fp32", 1e-5)])
def test_sorted_rows_have_the_same_gradient(groups, monkeypatch, dtype, tolerance):
    if dtype == "fp64":
        monkeypatch.setattr(modeling_qwen3_vl.Qwen3VLTextRMSNorm, "forward", norm_in_fp64)
    policy, seen = Policy(cards.BASE, dtype=dtype), []
    logprobs = policy.logprobs
    monkeypatch.setattr(policy, "logprobs", lambda rows, t: seen.append(rows) or logprobs(rows, t))
    for number, completion in enumerate(c for group in groups for c in group.completions):
        length = (3, 9, 29)[number % 3]
        completion.token_ids = completion.token_ids[:length]
        completion.behavior_logprobs = completion.behavior_logprobs[:length]
    (by_length,), stats = gradients_of(policy, groups, micro_batch_size=5)
    lengths = [len(ids) for rows in seen for _, ids in rows]
    assert lengths == sorted(lengths) and {*lengths} >= {3, 9, 29}
    monkeypatch.setattr(grpo, "micro_batches", lambda samples, config: batched(samples, 5))
    (as_they_come,), same = gradients_of(policy, groups, micro_batch_size=5)
    assert [len(rows) for rows in seen] == [5] * 6
    assert (by_length - as_they_come).norm() < tolerance * as_they_come.norm()
    assert stats == pytest.approx(same, rel=1e-4, abs=1e-6)


def test_dead_groups_are_skipped_and_counted_but_stay_in_the_normaliser(base, groups):
    (with_dead,), stats = gradients_of(base, groups, micro_batch_size=8)
    assert stats["frac_reward_zero_std"] == 0.25
    alive = [group for number, group in enumerate(groups) if number != 2]
    (without,), _ = gradients_of(base, alive, micro_batch_size=8)
    torch.testing.assert_close(with_dead * 4, without * 3, rtol=1e-3, atol=1e-6)
    taken, stats = gradients_of(base, groups[2:3])
    assert not torch.stack(taken).any() and len(taken) == 1
    assert stats == {"frac_reward_zero_std": 1, "loss": 0, "grad_norm": 0, "ratio": 1}


def test_without_signal_adamw_goes_on_by_its_moments(groups):
    """Its textbook step with a gradient of 0: the second one, by hand from the first."""
    policy, config = Policy(cards.BASE), GRPOConfig(max_grad_norm=1e9, updates_per_batch=2)
    rate, decay, (b1, b2) = 0.01, 0.3, (0.9, 0.999)
    adamw = torch.optim.AdamW(policy.parameters(), lr=rate, weight_decay=decay, eps=0)
    update(policy, adamw, groups, GRPOConfig(max_grad_norm=1e9))
    parameter = policy.model.model.language_model.norm.weight
    before, state = parameter.detach().clone(), adamw.state[parameter]
    m, v = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    update(policy, adamw, groups[2:3], config)  # group 2 is all alike
    for step in (2, 3):
        m, v = b1 * m, b2 * v
        gain = (m / (1 - b1**step)) / (v / (1 - b2**step)).sqrt()
        before = before * (1 - rate * decay) - rate * gain
    torch.testing.assert_close(parameter.detach(), before, rtol=1e-5, atol=1e-6)
    assert state["step"] == 3


def test_update_equals_the_objective_in_one_piece(base, groups):
    """The whole update against autograd through the formula, one sequence at a time."""
    before = [copy.deepcopy(group.completions) for group in groups]
    flags = {"micro_batch_size": 3, "clip_low": 0.05, "clip_high": 0.1, "temperature": 1.25}
    (got,), stats = gradients_of(base, groups, **flags)
    for completion in (c for group in groups for c in group.completions):
        completion.advantage = completion.ratios = None  # these alone are set
    assert [group.completions for group in groups] == before
    base.model.zero_grad()
    rewards = torch.tensor([[c.reward for c in g.completions] for g in groups])
    gains = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    total = 0.0
    for group, of_group in zip(groups, gains):
        for completion, gain in zip(group.completions, of_group):
            logprobs, _ = base.logprobs([(group.encoded, completion.token_ids)], 1.25)
            rho = (logprobs[0] - torch.tensor(completion.behavior_logprobs)).exp()
            total -= torch.minimum(rho * gain, rho.clamp(0.95, 1.1) * gain).mean() / 20
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in base.parameters()])
    base.model.zero_grad()
    assert (got - expected).norm() / expected.norm() < 1e-4
    assert stats["loss"] == pytest.approx(total.item(), abs=1e-5)
    assert stats["clip_ratio/low_mean"] > 0 and stats["clip_ratio/high_mean"] > 0


def test_weights_of_vllms_slots_are_truncated_and_logged(groups):
    """vLLM recorded e^1 less than the trainer finds on one token, e^-0.5 more on the others of
    that slot; the guide's slot, out of a cache, is as with transformers."""
    policy = Policy(cards.BASE, dtype="fp64")
    for group in groups:
        with torch.no_grad():
            rows = [(group.encoded, c.token_ids) for c in group.completions]
            logprobs, mask = policy.logprobs(rows, 1.0)
        for completion, values, real in zip(group.completions, logprobs, mask):
            completion.behavior_logprobs = values[real].tolist()
        guide = group.completions[-1]
        guide.source = "guide@9"
        guide.behavior_logprobs = [value - 0.75 for value in guide.behavior_logprobs]
    _, hf = gradients_of(policy, groups)
    for group in groups:
        for completion in group.completions[:-1]:
            completion.exact = False
        first = group.completions[0]
        head, *rest = first.behavior_logprobs
        first.behavior_logprobs = [head - 1, *(value + 0.5 for value in rest)]
    _, vllm = gradients_of(policy, groups)
    assert hf["npo/guide_ratio_mean"] == pytest.approx(math.exp(0.75))
    assert vllm["npo/guide_ratio_mean"] == pytest.approx(math.exp(0.75))
    assert not any(key.startswith("sampling/") for key in hf)
    assert vllm["sampling/sampling_logp_difference/max"] == pytest.approx(1.0)
    assert vllm["sampling/importance_sampling_ratio/max"] == IS_CAP == 2.0  # e^1, truncated
    assert vllm["sampling/importance_sampling_ratio/min"] == pytest.approx(math.exp(-0.5))
    rewards = torch.tensor([[c.reward for c in group.completions] for group in groups])
    shift = 0.0  # the slot's ratio is 1, so a term is its weight times A
    for group, gain in zip(groups, group_advantages(rewards)[:, 0].tolist()):
        length = len(group.completions[0].token_ids)
        shift += gain * ((2 + (length - 1) * math.exp(-0.5)) / length - 1)
    assert vllm["loss"] - hf["loss"] == pytest.approx(-shift / 20, rel=1e-6)


def test_several_updates_per_batch_move_the_ratio(fresh, groups):
    taken, _ = gradients_of(fresh, groups, updates_per_batch=2)
    assert len(taken) == 2 and torch.equal(*taken)  # the spy's optimizer does not move
    optimizer = torch.optim.SGD(fresh.parameters(), lr=1.0)
    stats = update(fresh, optimizer, groups, GRPOConfig(updates_per_batch=3))
    assert abs(stats["ratio"] - 1) > 1e-3  # on-policy it is 1 up to 1e-5
    assert not any(parameter.grad is not None for parameter in fresh.parameters())


@pytest.mark.parametrize(
    "edit",
    [
        lambda group: setattr(group.completions[0], "reward", float("nan")),
        lambda group: setattr(group.completions[0], "reward", float("inf")),
        lambda group: group.completions[0].behavior_logprobs.__setitem__(0, -float("inf")),
    ],
)
def test_a_loss_that_is_no_number_stops_before_the_update(fresh, groups, edit):
    edit(groups[1])
    before = copy.deepcopy(fresh.model.state_dict())
    with pytest.raises(FloatingPointError, match="loss is"):
        update(fresh, torch.optim.AdamW(fresh.parameters()), groups, GRPOConfig())
    assert all(torch.equal(v, before[name]) for name, v in fresh.model.state_dict().items())


def test_blanking_the_picture_changes_the_loss(base, groups):
    (seen,), with_picture = gradients_of(base, groups)
    row = [(groups[0].encoded, groups[0].completions[0].token_ids)]
    with torch.no_grad():
        before, _ = base.logprobs(row, 1.0)
    for group in groups:
        group.encoded.pixel_values = torch.zeros_like(group.encoded.pixel_values)
    with torch.no_grad():
        after, _ = base.logprobs(row, 1.0)
    (blank,), without = gradients_of(base, groups)
    assert (before - after).abs().max() > 0.1
    assert abs(with_picture["loss"] - without["loss"]) > 1e-3
    assert (seen - blank).norm() > 0.1 * seen.norm()


def test_functions_that_are_assigned_from_outside_are_used(base, groups, monkeypatch):
    """The edit points, as a notebook or a script would replace them."""
    (plain,), stats = gradients_of(base, groups)
    monkeypatch.setattr(grpo, "group_advantages", lambda rewards: 3 * group_advantages(rewards))
    (tripled,), _ = gradients_of(base, groups)
    torch.testing.assert_close(tripled, 3 * plain, rtol=1e-3, atol=1e-6)
    monkeypatch.setattr(grpo, "group_advantages", torch.zeros_like)
    assert not torch.stack(gradients_of(base, groups)[0]).any()
    monkeypatch.undo()

    def doubled(*arguments):
        loss, per_token = clipped_policy_loss(*arguments)
        return 2 * loss, per_token

    monkeypatch.setattr(grpo, "clipped_policy_loss", doubled)
    (again,), twice = gradients_of(base, groups)
    torch.testing.assert_close(again, 2 * plain, rtol=1e-3, atol=1e-6)
    assert twice["loss"] == pytest.approx(2 * stats["loss"], rel=1e-4)


def test_an_edited_reward_is_what_advantages_are_made_of(monkeypatch):
    def reward(prompt, completion):
        return 5 * completion.accuracy - len(completion.text)

    monkeypatch.setattr(verifier, "reward", reward)
    group = group_of([0.0, 0.0])
    group.completions[0].text, group.completions[1].text = r"\boxed{0}", r"\boxed{12}"
    verifier.score([group])
    assert [c.reward for c in group.completions] == [-4.0, -10.0]


# ---------------------------------------------------------------------------------- the flags

CONFIGS = [GRPOConfig, NPOConfig, AutoNPOConfig, LUFFYConfig, ExGRPOConfig, RLEPConfig]


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_flag_has_a_help_text_under_a_heading(config_class):
    found = flag_comments(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    assert not [name for name in names if name not in found], "write it beside the field, after #"
    headings = list(dict.fromkeys(found[name][0] for name in names))
    assert headings[:6] == ["model", "run", "length", "memory", "batch", "update"]
    assert len(headings) == 6 + {GRPOConfig: 0, NPOConfig: 2, AutoNPOConfig: 2}.get(config_class, 1)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_the_command_line_is_the_configuration(config_class):
    words = "--group-size 5 --lr 3e-4 --temperature 0.5 --fresh --eval-samples 3 --dataset x.csv"
    given = {"group_size": 5, "lr": 3e-4, "temperature": 0.5, "eval_samples": 3}
    given |= {"fresh": True, "dataset": "x.csv"}
    assert read_flags(config_class, None, words.split()) == config_class(**given)
    assert read_flags(config_class, None, []) == config_class()
    unresolved = [name for name in BY_WORLD if getattr(config_class(), name, 0) is None]
    assert unresolved == []
    with pytest.raises(SystemExit):
        read_flags(config_class, None, ["--grup-size", "5"])


def test_defaults_depend_on_the_world():
    chosen = ("dataset", "lr", "max_new_tokens", "eval_samples", "micro_batch_size", "keep")
    for config, expected in (
        (GRPOConfig(), ("cards", 1e-4, 80, 0, 32, "all")),
        (GRPOConfig(model="some/hub-id"), ("hiyouga/geometry3k", 1e-6, 4096, 1, 4, "none")),
        (GRPOConfig(model="some/hub-id", lora=8), ("hiyouga/geometry3k", 1e-5, 4096, 1, 4, "none")),
        (GRPOConfig(lr=3e-4, keep="40"), ("cards", 3e-4, 80, 0, 32, "40")),
        (GRPOConfig(lr=3e-4, lora=8), ("cards", 3e-4, 80, 0, 32, "all")),  # as it was given
    ):
        assert tuple(getattr(config, name) for name in chosen) == pytest.approx(expected)
    assert (AutoNPOConfig().min_gain, AutoNPOConfig(model="some/hub-id").min_gain) == (0.04, 0.01)
    assert [NPOConfig(intervention=kind).steps for kind in ("early", "late")] == [100, 320]


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (2, {"least": 2}, None),
        (1, {"least": 2}, "--clip-low 1: must be at least 2"),
        (0.5, {"most": 0.5}, None),
        (0.51, {"most": 0.5}, "--clip-low 0.51: must be at most 0.5"),
        (1e-9, {"above": 0}, None),
        (0, {"above": 0}, "--clip-low 0: must be above 0"),
        (0.999, {"below": 1}, None),
        (1.0, {"below": 1}, "--clip-low 1.0: must be below 1"),
        (-0.1, {"least": 0, "below": 1}, "--clip-low -0.1: must be at least 0 and below 1"),
        (3, {"above": 0, "most": 2}, "--clip-low 3: must be above 0 and at most 2"),
        (math.nan, {"least": 0}, "--clip-low nan: must be at least 0"),
        (math.nan, {"below": 1e6}, "--clip-low nan: must be below 1e+06"),
    ],
)
def test_within_names_flag_value_and_limits(value, limits, message):
    config = GRPOConfig(clip_low=value)
    if message is None:
        return within(config, "clip_low", **limits)
    with pytest.raises(UsageError) as caught:
        within(config, "clip_low", **limits)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"group_size": 1}, "--group-size 1: must be at least 2"),
        ({"steps": -3}, "--steps -3: must be at least 1"),
        ({"prompts_per_step": 0}, "--prompts-per-step 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"updates_per_batch": 0}, "--updates-per-batch 0"),
        ({"micro_batch_size": -1}, "--micro-batch-size -1"),
        ({"temperature": 0.0}, "--temperature 0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm 0.0"),
        ({"clip_low": 1.0}, "--clip-low 1.0"),
        ({"clip_high": -0.1}, "--clip-high -0.1"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1"),
    ],
)
def test_bad_flags(flags, message):
    GRPOConfig().check()
    with pytest.raises(UsageError, match=message):
        GRPOConfig(**flags).check()
