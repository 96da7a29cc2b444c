"""The objective, number by number: advantages, the clip's four quadrants, normalisers, gradients, masks."""

import copy
import dataclasses
import math

import pytest
import torch
from conftest import group_of

import cards
import grpo
import verifier
from grpo import GRPOConfig, clipped_policy_loss, group_advantages, update
from policy import Completion, Policy
from tasks import UsageError


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
    """The paper's case: n = 8, all wrong but the guide: +2.475 and -0.354."""
    got = group_advantages(torch.tensor([[0.0] * 7 + [1.0]]))
    assert got[0, 7].item() == pytest.approx(2.475, abs=1e-3) and got[0, 0].item() == pytest.approx(-0.354, abs=1e-3)


def test_groups_all_alike_have_exactly_no_advantage():
    assert not group_advantages(torch.full((3, 7), 0.1)).any()  # the mean of seven 0.1 is not exactly 0.1


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [  # the minimum of rho A and clip(rho) A; d/dlogprob of rho A is rho A, of a clipped constant 0
        (1.5, 2.0, 1.4 * 2.0, 0.0),  # good and already likelier: clipped
        (0.5, 2.0, 0.5 * 2.0, 0.5 * 2.0),  # good but less likely: the pessimistic side keeps the gradient
        (1.5, -2.0, 1.5 * -2.0, 1.5 * -2.0),  # bad but likelier: keeps the gradient
        (0.5, -2.0, 0.9 * -2.0, 0.0),  # bad and already less likely: clipped
        (1.2, 2.0, 2.4, 2.4),  # inside the range
        (0.95, -2.0, -1.9, -1.9),
    ],
)
def test_the_clips_four_quadrants(ratio, advantage, value, gradient):
    logprobs = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    loss, stats = clipped_policy_loss(
        logprobs, torch.tensor([[-1.0]]), torch.tensor([advantage]), torch.tensor([[True]]), clip_low=0.1, clip_high=0.4
    )
    loss.backward()
    assert loss.item() == pytest.approx(-value, rel=1e-5)
    assert logprobs.grad.item() == pytest.approx(-gradient, rel=1e-5)
    assert stats["ratio"].item() == pytest.approx(ratio, rel=1e-5)
    assert stats["high"].item() is (ratio > 1.4 and advantage > 0) and stats["low"].item() is (ratio < 0.9 and advantage < 0)


def reference_loss(logprobs, old, advantages, lengths, low, high, total):
    """The formula, written out in float64 Python."""
    loss = 0.0
    for row, length in enumerate(lengths):
        terms = []
        for t in range(length):
            rho = math.exp(logprobs[row][t] - old[row][t])
            clipped = min(max(rho, 1 - low), 1 + high)
            terms.append(min(rho * advantages[row], clipped * advantages[row]))
        loss -= sum(terms) / length / total
    return loss


def random_batch(rows=6, width=9):
    generator = torch.Generator().manual_seed(3)
    logprobs = -2 * torch.rand(rows, width, generator=generator)
    old = logprobs + 0.5 * torch.randn(rows, width, generator=generator)
    advantages = torch.randn(rows, generator=generator)
    lengths = [1, 9, 4, 2, 7, 5]
    return logprobs, old, advantages, lengths, torch.arange(width) < torch.tensor(lengths)[:, None]


def test_loss_is_the_mean_per_sequence_then_over_sequences():
    logprobs, old, advantages, lengths, mask = random_batch()
    for total in (None, 11):
        got, _ = clipped_policy_loss(logprobs, old, advantages, mask, 0.15, 0.3, total)
        expected = reference_loss(logprobs.tolist(), old.tolist(), advantages.tolist(), lengths, 0.15, 0.3, total or 6)
        assert got.item() == pytest.approx(expected, rel=1e-5)


def test_padding_never_matters_and_inputs_stay_as_they_were():
    logprobs, old, advantages, lengths, mask = random_batch()
    arguments = [logprobs, old, advantages, mask]
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
    logprobs, _, advantages, lengths, mask = random_batch()
    logprobs.requires_grad_()
    clipped_policy_loss(logprobs, logprobs.detach(), advantages, mask)[0].backward()
    for row, length in enumerate(lengths):
        assert logprobs.grad[row, :length].tolist() == pytest.approx([-advantages[row].item() / length / 6] * length, rel=1e-5)


@pytest.fixture
def groups(base, prompts):
    """Three groups with mixed rewards and one with none, lengths that differ."""
    groups = base.sample([prompts[i] for i in (0, 3, 4, 9)], 5, 30, 1.0, seed=8)
    for number, group in enumerate(groups):
        for slot, completion in enumerate(group.completions):
            completion.accuracy = float(number != 2 and (slot + number) % 3 == 0)
            completion.reward = 0.1 + 0.9 * completion.accuracy
        group.completions[number].token_ids = group.completions[number].token_ids[: 6 + number]
        group.completions[number].behavior_logprobs = group.completions[number].behavior_logprobs[: 6 + number]
    return groups


def gradient_of(policy, groups, **flags):
    """The gradient that `update` hands to the optimizer, unclipped."""
    taken = []

    class Spy(torch.optim.SGD):
        def step(self):
            taken.append(torch.cat([p.grad.flatten().clone() for p in policy.parameters()]))

    config = GRPOConfig(max_grad_norm=1e9, **flags)
    stats = update(policy, Spy(policy.parameters(), lr=0.0), groups, config)
    return taken, stats


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-6), ("fp32", 1e-5)])
def test_micro_batches_change_memory_only(groups, dtype, tolerance):
    """To 1e-6 of the gradient's norm in fp64; fp32's own rounding on this model is about as large."""
    policy = Policy(cards.BASE, device="cpu", dtype=dtype)
    (whole,), stats = gradient_of(policy, groups, micro_batch_size=20)
    for size in (1, 2, 8):
        (split,), same = gradient_of(policy, groups, micro_batch_size=size)
        assert (split - whole).norm() / whole.norm() < tolerance
        assert same["loss"] == pytest.approx(stats["loss"], rel=1e-4, abs=1e-6)


def test_dead_groups_are_skipped_and_counted_but_stay_in_the_normaliser(fresh, groups):
    (with_dead,), stats = gradient_of(fresh, groups, micro_batch_size=8)
    assert stats["frac_reward_zero_std"] == 0.25
    (without,), _ = gradient_of(fresh, [g for i, g in enumerate(groups) if i != 2], micro_batch_size=8)
    torch.testing.assert_close(with_dead * 4, without * 3, rtol=1e-3, atol=1e-6)
    taken, stats = gradient_of(fresh, groups[2:3])
    assert taken == [] and stats["frac_reward_zero_std"] == 1 and stats["loss"] == 0


def test_update_equals_the_objective_in_one_piece(fresh, groups):
    """The whole update against autograd through the formula, one sequence at a time."""
    (got,), stats = gradient_of(fresh, groups, micro_batch_size=3, clip_low=0.05, clip_high=0.1)
    fresh.model.zero_grad()
    rewards = torch.tensor([[c.reward for c in g.completions] for g in groups])
    gains = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    total = 0.0
    for group, of_group in zip(groups, gains):
        for completion, gain in zip(group.completions, of_group):
            logprobs, _ = fresh.logprobs([(group.inputs, completion.token_ids)], 1.0)
            rho = (logprobs[0] - torch.tensor(completion.behavior_logprobs)).exp()
            total = total - torch.minimum(rho * gain, rho.clamp(0.95, 1.1) * gain).mean() / 20
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in fresh.parameters()])
    fresh.model.zero_grad()
    assert (got - expected).norm() / expected.norm() < 1e-4
    assert stats["loss"] == pytest.approx(total.item(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What vLLM samples is not quite what the trainer would have sampled
# ---------------------------------------------------------------------------------------------------------------------


def test_weights_multiply_each_tokens_term():
    logprobs, old, advantages, lengths, mask = random_batch()
    weights = 2 * torch.rand(logprobs.shape, generator=torch.Generator().manual_seed(5))
    got, _ = clipped_policy_loss(logprobs, old, advantages, mask, 0.15, 0.3, 11, weights)
    expected = 0.0
    for row, length in enumerate(lengths):
        for t in range(length):
            ratio, gain = math.exp(logprobs[row, t] - old[row, t]), advantages[row].item()
            expected -= weights[row, t].item() * min(ratio * gain, min(max(ratio, 0.85), 1.3) * gain) / length / 11
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_the_trainers_log_probs_stand_in_for_vllms():
    """A slot of the policy: the trainer's own of the first update, and the ratio to what was recorded. A guide's: what it recorded."""
    own = Completion("p", [7, 8, 9], [-1.0, -2.0, -0.5], "", True)
    guide = Completion("p", [7, 8], [-3.0, -0.25], "", True, source="guide@40")
    mask = torch.tensor([[True, True, True], [True, True, False]])
    now = torch.tensor([[-0.2, -2.5, -0.5], [-6.0, -6.0, 0.0]], requires_grad=True)
    recorded = grpo.behavior_logprobs([own, guide], now, mask)
    old, mismatch = grpo.trainer_logprobs([own, guide], now, recorded, mask)
    assert old.tolist() == [pytest.approx([-0.2, -2.5, -0.5]), [-3.0, -0.25, 0.0]] and not old.requires_grad
    assert mismatch.tolist() == [pytest.approx([math.exp(0.8), math.exp(-0.5), 1.0]), [1.0, 1.0, 1.0]]
    later = now.detach() - 0.125  # after an update, old is what it was
    assert torch.equal(grpo.trainer_logprobs([own, guide], later, recorded, mask)[0], old)


def test_update_truncates_the_mismatch_and_logs_it(groups):
    """vLLM recorded e^1 less than the trainer finds on one token, e^-0.5 more on all others of that slot; the guide's slot is as with hf."""
    policies, exact, recorded = [Policy(cards.BASE, "cpu", "fp64") for _ in range(2)], [], []
    for group in groups:
        with torch.no_grad():
            logprobs, mask = policies[0].logprobs([(group.inputs, c.token_ids) for c in group.completions], 1.0)
        own = [values[real].tolist() for values, real in zip(logprobs, mask)]
        slots = [dataclasses.replace(c, behavior_logprobs=values) for c, values in zip(group.completions, own)]
        slots[-1] = dataclasses.replace(slots[-1], source="guide@9", behavior_logprobs=[lp - 0.75 for lp in own[-1]])
        first = dataclasses.replace(slots[0], behavior_logprobs=[own[0][0] - 1, *(lp + 0.5 for lp in own[0][1:])])
        exact.append(dataclasses.replace(group, completions=slots))
        recorded.append(dataclasses.replace(group, completions=[first, *slots[1:]]))
    hf, vllm = (update(policy, torch.optim.SGD(policy.parameters(), 0.0), some, GRPOConfig(sampler=sampler))
                for policy, some, sampler in zip(policies, (exact, recorded), ("hf", "vllm")))  # fmt: skip
    assert hf["npo/guide_ratio_mean"] == pytest.approx(math.exp(0.75)) == vllm["npo/guide_ratio_mean"]
    assert vllm["sampling/sampling_logp_difference/max"] == pytest.approx(1.0)
    assert vllm["sampling/importance_sampling_ratio/max"] == grpo.IS_CAP == 2.0  # e^1, truncated
    assert vllm["sampling/importance_sampling_ratio/min"] == pytest.approx(math.exp(-0.5))
    shift, advantages = 0.0, group_advantages(torch.tensor([[c.reward for c in group.completions] for group in groups]))
    for group, advantage in zip(groups, advantages[:, 0].tolist()):  # the slot's ratio is 1: a term is its weight times A
        length = len(group.completions[0].token_ids)
        shift += advantage * ((2 + (length - 1) * math.exp(-0.5)) / length - 1)
    assert vllm["loss"] - hf["loss"] == pytest.approx(-shift / (len(groups) * 5), rel=1e-6)


def test_several_updates_per_batch_move_the_ratio(fresh, groups):
    config = GRPOConfig(updates_per_batch=3, lr=1e-3)
    before = [p.clone() for p in fresh.parameters()]
    stats = update(fresh, torch.optim.AdamW(fresh.parameters(), lr=1e-3), groups, config)
    assert any(not torch.equal(a, b) for a, b in zip(before, fresh.parameters()))
    assert stats["ratio"] == pytest.approx(1.0, abs=1e-4)  # reported at the first update, where the batch is on-policy
    taken, _ = gradient_of(fresh, groups, updates_per_batch=2)
    assert len(taken) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_stops_before_the_update(fresh, groups, bad):
    groups[1].completions[0].reward = bad
    before = copy.deepcopy(fresh.model.state_dict())
    with pytest.raises(FloatingPointError, match="a reward is"):
        update(fresh, torch.optim.AdamW(fresh.parameters()), groups, GRPOConfig())
    assert all(torch.equal(value, before[name]) for name, value in fresh.model.state_dict().items())


def test_a_loss_that_is_no_number_stops_before_the_update(fresh, groups):
    groups[0].completions[0].behavior_logprobs[0] = float("-inf")
    before = copy.deepcopy(fresh.model.state_dict())
    with pytest.raises(FloatingPointError, match="loss is"):
        update(fresh, torch.optim.AdamW(fresh.parameters()), groups, GRPOConfig())
    assert all(torch.equal(value, before[name]) for name, value in fresh.model.state_dict().items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"group_size": 1}, "--group-size 1: advantages compare"),
        ({"steps": -3}, "--steps -3: must be above 0"),
        ({"micro_batch_size": -1}, "--micro-batch-size -1"),
        ({"temperature": 0.0}, "--temperature 0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"clip_low": 1.0}, "--clip-low 1.0"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(UsageError, match=message):
        GRPOConfig(**flags).check()


def test_defaults_depend_on_the_world():
    cards, other = GRPOConfig(), GRPOConfig(model="Qwen/Qwen3-VL-8B-Instruct")
    assert (cards.dataset, cards.lr, cards.max_new_tokens) == ("cards", 1e-4, 64)
    assert (other.dataset, other.lr, other.max_new_tokens) == ("hiyouga/geometry3k", 1e-6, 4096)
    assert GRPOConfig(lr=3e-4).lr == 3e-4


def test_reward_edit_reaches_the_loss(monkeypatch):
    """The reward is one of the four edit points: what it returns is what advantages are made of."""
    monkeypatch.setattr(verifier, "reward", lambda accuracy, format: 5 * accuracy - 2 * format)
    group = group_of([0.0, 0.0])
    group.completions[0].text, group.completions[1].text = r"\boxed{0}", r"\boxed{1}"
    verifier.score([group])
    assert [c.reward for c in group.completions] == [3.0, -2.0]
