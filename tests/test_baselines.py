"""LUFFY, ExGRPO, RLEP: losses against float64 written out by hand, the pool's rules, and the three loops."""

import copy
import dataclasses
import json
import math
import random
import zlib
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import SMALL, group_of

import baselines
import cards
import grpo
from baselines import ExGRPOConfig, LUFFYConfig, Pool, RLEPConfig, bucket_weight, centered_advantages, take_slots
from command import load_config_prompts
from policy import Policy
from run import read_jsonl, rows_of_step
from tasks import UsageError

TINY = dict(prompts_per_step=4, group_size=4, eval_prompts=4, eval_samples=1, eval_every=2, save_every=2, max_new_tokens=40,
            micro_batch_size=8, temperature=1.7, device="cpu", lr=1e-3)  # fmt: skip


def lucky(response, gold, choices=None) -> bool:
    """Stands in for the verifier where a few steps of the tiny base must find some right answers, and some wrong."""
    return zlib.crc32(response.encode()) % 3 == 0


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------

LENGTHS, OFF = [3, 1, 5, 2], [False, True, True, False]


def batch():
    generator = torch.Generator().manual_seed(11)
    logprobs = -2 * torch.rand(4, 5, generator=generator, dtype=torch.float64)
    old = logprobs + 0.7 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([0.7, -0.2, 1.3, -0.9], dtype=torch.float64)
    return logprobs, old, advantages, torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def by_hand(logprobs, old, advantages, max_length, gamma, sequences):
    total = 0.0
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            w = math.exp(logprobs[i][t] - old[i][t])
            if OFF[i] and gamma is not None:
                w = w / (w + gamma)
            total += w * advantages[i]
    return -total / max_length / sequences


@pytest.mark.parametrize("gamma", [0.25, None])
@pytest.mark.parametrize("sequences", [None, 7])
def test_shaped_loss_by_hand(gamma, sequences):
    """LUFFY's is this with q = 1 in the rows of another policy, ExGRPO's with what the past policy recorded."""
    logprobs, old, advantages, mask = batch()
    for recorded in (old, old.masked_fill(torch.tensor(OFF)[:, None], 0.0)):
        before = [value.clone() for value in (logprobs, recorded, advantages, mask)]
        loss, stats = baselines.shaped_policy_loss(logprobs, recorded, advantages, mask, torch.tensor(OFF), 9, gamma, sequences)
        expected = by_hand(logprobs.tolist(), recorded.tolist(), advantages.tolist(), 9, gamma, sequences or 4)
        assert loss.item() == pytest.approx(expected, rel=1e-9)
        assert stats["ratio"][2, 4].item() == pytest.approx(math.exp(logprobs[2, 4] - recorded[2, 4]))  # w, not f(w)
        assert not stats["low"].any() and not stats["high"].any()
        assert all(torch.equal(a, b) for a, b in zip(before, (logprobs, recorded, advantages, mask)))


@pytest.mark.parametrize(
    ("probability", "gamma", "value", "slope"),
    [(0.3, 0.2, 0.6, 0.24), (0.001, 0.1, 0.00990099, 0.00980296), (1.0, 0.1, 0.90909091, 0.08264463), (0.4, None, 0.4, 0.4)],
)
def test_shaping_and_its_gradient(probability, gamma, value, slope):
    """f(w) = w / (w + gamma), d f / d log w = gamma w / (w + gamma)^2: largest where w = gamma, not where w is large."""
    logprobs = torch.tensor([[math.log(probability)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    loss, _ = baselines.shaped_policy_loss(
        logprobs, torch.zeros_like(logprobs), one, torch.tensor([[True]]), torch.tensor([True]), 1, gamma
    )
    loss.backward()
    assert -loss.item() == pytest.approx(value, rel=1e-6) and -logprobs.grad.item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(("ratio", "advantage"), [(3.0, 2.0), (0.2, -1.0)])
def test_own_rows_are_not_clipped_and_not_shaped(ratio, advantage):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    arguments = torch.zeros(1, 1), torch.tensor([advantage]), torch.tensor([[True]]), torch.tensor([False])
    baselines.shaped_policy_loss(logprobs, *arguments, 4)[0].backward()
    assert logprobs.grad.item() == pytest.approx(-ratio * advantage / 4)


def test_token_mean_loss_by_hand():
    logprobs, old, advantages, mask = batch()
    for tokens in (None, 31):
        loss, _ = baselines.token_mean_policy_loss(logprobs, old, advantages, mask, 0.15, 0.3, tokens)
        total = 0.0
        for i, length in enumerate(LENGTHS):
            for t in range(length):
                w, a = math.exp(logprobs[i, t] - old[i, t]), advantages[i].item()
                total += min(w * a, min(max(w, 0.85), 1.3) * a)
        assert loss.item() == pytest.approx(-total / (tokens or 11), rel=1e-9)


def test_weights_of_what_vllm_sampled_multiply_each_term():
    logprobs, old, advantages, mask = (torch.tensor(v) for v in (
        [[-0.5, -1.0], [-0.25, 0.0]], [[-0.75, -1.0], [-0.5, 0.0]], [1.5, -0.5], [[True, True], [True, False]]))  # fmt: skip
    weights = torch.tensor([[0.5, 2.0], [1.75, 9.0]])
    shaped, _ = baselines.shaped_policy_loss(logprobs, old, advantages, mask, torch.tensor([False, True]), 7, 0.2, 3, weights)
    ratio = math.exp(0.25)
    own, other = 1.5 * (0.5 * ratio + 2.0), -0.5 * 1.75 * ratio / (ratio + 0.2)
    assert shaped.item() == pytest.approx(-(own + other) / 7 / 3, rel=1e-6)
    clipped, _ = baselines.token_mean_policy_loss(logprobs, old, advantages, mask, 0.1, 0.2, 5, weights)
    assert clipped.item() == pytest.approx(-(1.5 * (0.5 * 1.2 + 2.0) - 0.5 * 1.75 * ratio) / 5, rel=1e-6)


def test_centered_advantages():
    got = centered_advantages(torch.tensor([[1.0, 0.1, 0.1, 0.4], [0.1] * 4]))
    torch.testing.assert_close(got, torch.tensor([[0.6, -0.3, -0.3, 0.0], [0.0] * 4]))
    assert not centered_advantages(torch.full((1, 7), 0.1)).any()  # the mean of seven 0.1 is not exactly 0.1


@pytest.fixture(scope="module")
def exact():
    return Policy(cards.BASE, device="cpu", dtype="fp64")


@pytest.fixture(scope="module")
def groups(exact):
    """Two groups of four with one slot each of another policy, lengths that differ, and one group all alike."""
    prompts, _ = load_config_prompts(LUFFYConfig())
    groups = exact.sample([prompts[i] for i in (0, 3, 4)], 4, 40, 1.6, seed=8)
    for number, group in enumerate(groups):
        for slot, completion in enumerate(group.completions):
            completion.accuracy = float(number < 2 and (slot + number) % 3 == 0)
            completion.reward = 0.1 + 0.9 * completion.accuracy
        if number < 2:
            last = group.completions[-1]
            recorded = [lp - 0.1 * t for t, lp in enumerate(last.behavior_logprobs)]
            group.completions[-1] = dataclasses.replace(
                last, behavior_logprobs=recorded, source="past@3", accuracy=1.0, reward=1.0
            )
    return groups


def gradient(policy, groups, config, *how) -> tuple[dict, torch.Tensor]:
    """Metrics and flat gradient of one update."""
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    found = []
    optimizer.step = lambda: found.append(torch.cat([p.grad.flatten().clone() for p in policy.parameters()]))
    return grpo.update(policy, optimizer, groups, config, *how), found[0]


@pytest.mark.parametrize(("kind", "shaping"), [(LUFFYConfig, True), (LUFFYConfig, False), (ExGRPOConfig, True)])
def test_the_shaped_methods_on_a_fixed_batch(exact, groups, kind, shaping):
    """Advantages, ratios, shaping, normalisers and entropy bonus, through the policy, against the formula token by token."""
    config = kind(temperature=1.6, gamma=0.3, entropy_coef=0.02, max_new_tokens=40, max_grad_norm=1e9, micro_batch_size=8)
    if kind is LUFFYConfig:
        config.shaping = shaping
        groups = [take_slots(g, [dataclasses.replace(g.completions[-1], behavior_logprobs=[0.0] * len(g.completions[-1].token_ids))])
                  if g.completions[-1].source != "policy" else g for g in groups]  # fmt: skip
    stats, flat = gradient(exact, groups, config, centered_advantages, baselines.shaped_loss)
    expected = 0.0
    for group in groups[:2]:  # the third is all alike: no advantage, and left out
        mean = sum(c.reward for c in group.completions) / 4
        for completion in group.completions:
            with torch.no_grad():
                logprobs, _, entropy = exact.logprobs([(group.inputs, completion.token_ids)], 1.6, entropy=True)
            ratios = [math.exp(lp - old) for lp, old in zip(logprobs[0].tolist(), completion.behavior_logprobs)]
            if completion.source != "policy" and shaping:
                ratios = [w / (w + 0.3) for w in ratios]
            expected -= (completion.reward - mean) * sum(ratios) / 40 / 12
            expected -= 0.02 * entropy[0].mean().item() / 12
    assert stats["loss"] == pytest.approx(expected, rel=1e-6)
    assert stats["frac_reward_zero_std"] == pytest.approx(1 / 3)
    for size in (1, 3):  # memory only, never results
        again, same = gradient(
            exact, groups, dataclasses.replace(config, micro_batch_size=size), centered_advantages, baselines.shaped_loss
        )
        assert again["loss"] == pytest.approx(stats["loss"], rel=1e-9)
        torch.testing.assert_close(same, flat, rtol=1e-4, atol=1e-6 * flat.abs().max().item())


def test_rlep_on_a_fixed_batch(exact, groups):
    config = RLEPConfig(temperature=1.6, max_grad_norm=1e9, micro_batch_size=8)
    config.clip_low, config.clip_high = 0.15, 0.3
    lengths = [len(c.token_ids) for group in groups for c in group.completions]
    loss_of = partial(baselines.token_mean_loss, num_tokens=sum(lengths))
    stats, flat = gradient(exact, groups, config, grpo.group_advantages, loss_of)
    expected = 0.0
    for group in groups[:2]:
        rewards = [c.reward for c in group.completions]
        mean = sum(rewards) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3)
        for completion, reward in zip(group.completions, rewards):
            a = (reward - mean) / (std + 1e-6)
            with torch.no_grad():
                logprobs, _ = exact.logprobs([(group.inputs, completion.token_ids)], 1.6)
            for lp, old in zip(logprobs[0].tolist(), completion.behavior_logprobs):
                w = math.exp(lp - old)
                expected -= min(w * a, min(max(w, 0.85), 1.3) * a) / sum(lengths)
    assert stats["loss"] == pytest.approx(expected, rel=1e-6)
    again, same = gradient(exact, groups, dataclasses.replace(config, micro_batch_size=3), grpo.group_advantages, loss_of)
    torch.testing.assert_close(same, flat, rtol=1e-4, atol=1e-6 * flat.abs().max().item())


def test_entropy_of_every_token_by_enumeration(exact, groups):
    rows = [(groups[0].inputs, groups[0].completions[0].token_ids), (groups[1].inputs, groups[1].completions[1].token_ids[:5])]
    logprobs, mask, entropy = exact.logprobs(rows, 1.6, entropy=True)
    plain, _ = exact.logprobs(rows, 1.6)
    assert torch.equal(plain, logprobs) and not entropy[~mask].any()
    inputs, tokens = rows[1]
    every = torch.stack([torch.stack([exact.logprobs([(inputs, tokens[:t] + [v])], 1.6)[0][0, t].detach()
                                      for v in range(len(exact.tokenizer)) if v not in exact.never_sampled]) for t in (0, 4)])  # fmt: skip
    torch.testing.assert_close(every.exp().sum(dim=1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(entropy[1, [0, 4]], -(every.exp() * every).sum(dim=1))
    entropy.sum().backward()  # the impossible tokens' log-probs are -inf
    assert all(p.grad.isfinite().all() for p in exact.parameters() if p.grad is not None)
    exact.model.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# Slots and the pool
# ---------------------------------------------------------------------------------------------------------------------


def test_take_slots_whatever_the_pass_rate():
    group = group_of([1.0, 1.0, 0.0, 1.0])
    before, others = copy.deepcopy(group), group_of([1.0, 1.0], "other").completions
    mixed = take_slots(group, others)
    assert group == before and [c.prompt_id for c in mixed.completions] == ["p", "p", "other", "other"]
    assert take_slots(group, []) is group
    group.completions[3].token_ids = [7, 3, 3, 3, 3]  # of two tokens the others have, and of five
    assert baselines.replaced_tokens([group, group], [mixed, group]) == 2 + 5


@pytest.mark.parametrize(
    ("solved", "size", "weight"), [(4, 8, 0.398942280), (3, 8, 0.241970725), (1, 6, 0.053990967), (7, 8, 0.004431848)]
)
def test_bucket_weight(solved, size, weight):
    """The normal density around half the group, one success wide."""
    assert bucket_weight(solved, size) == pytest.approx(weight, rel=1e-6)
    assert bucket_weight(1, 200) > 0  # a pool of nothing else can still be drawn from


def filled(*groups) -> Pool:
    pool = Pool(4)
    for step, (row, accuracies) in enumerate(groups, 1):
        pool.add(json.loads(json.dumps(pool.line(step, row, group_of([float(a) for a in accuracies])))))
    return pool


def test_the_pool_stores_successes_of_prompts_solved_in_part():
    pool = filled((5, [0, 1, 0, 1]), (6, [0, 0, 0, 0]), (7, [1, 1, 1, 1]))
    assert pool.solved == {5: 2} and [c.token_ids for c in pool.answers[5]] == [[7, 1], [7, 3]]
    assert {c.source for c in pool.answers[5]} == {"past@1"} and pool.answers[5][0].behavior_logprobs == [-0.5, -0.25]
    assert pool.retired == {7}


def test_the_latest_count_moves_a_prompt_and_answers_are_kept_once():
    pool = filled((5, [0, 1, 0, 0]), (5, [1, 1, 0, 1]), (5, [0, 0, 0, 0]))  # unsolved again: stays where it was
    assert pool.solved == {5: 3} and [(c.token_ids[1], c.source) for c in pool.answers[5]] == [
        (1, "past@1"),
        (0, "past@2"),
        (3, "past@2"),
    ]
    pool = filled((5, [0, 1, 0, 0]), (5, [1, 1, 1, 1]), (5, [0, 1, 0, 0]))  # solved by all: gone for good
    assert pool.solved == pool.answers == {} and pool.retired == {5}


def test_answers_that_were_cut_are_not_stored():
    group = group_of([0.0, 1.0, 0.0, 0.0])
    group.completions[1].finished = False
    pool = Pool(4)
    pool.add(pool.line(1, 5, group))
    assert pool.solved == pool.answers == {}


def test_draw_weighs_buckets_not_prompts():
    """Three prompts solved once of four, one solved twice: drawn in the ratio of the bucket weights, e^-1/2 to 1."""
    pool = filled((1, [1, 0, 0, 0]), (2, [0, 1, 0, 0]), (3, [0, 0, 1, 0]), (4, [1, 1, 0, 0]))
    drawn = Counter(pool.draw(1, random.Random(seed))[0] for seed in range(4000))
    assert drawn[4] / 4000 == pytest.approx(1 / (1 + math.exp(-0.5)), abs=0.025)
    for row in (1, 2, 3):
        assert drawn[row] / 4000 == pytest.approx(math.exp(-0.5) / (1 + math.exp(-0.5)) / 3, abs=0.02)
    for seed in range(20):
        assert sorted(pool.draw(9, random.Random(seed))) == [1, 2, 3, 4]  # no row twice, no more than there are
    assert Pool(4).draw(3, random.Random(0)) == []


def test_the_lowest_entropy_answer(exact, groups):
    answers = [c for group in groups for c in group.completions][:7]
    inputs, config = groups[0].inputs, ExGRPOConfig(temperature=1.6, micro_batch_size=3)
    means = [exact.logprobs([(inputs, c.token_ids)], 1.6, entropy=True)[2].mean().item() for c in answers]
    assert baselines.lowest_entropy(exact, inputs, answers, config) is answers[means.index(min(means))]
    assert len(set(means)) > 3 and means.index(min(means)) != 0


# ---------------------------------------------------------------------------------------------------------------------
# The three loops
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Each method's whole run, with a verifier that calls a third of the answers right."""
    out, configs = tmp_path_factory.mktemp("baselines"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verifier.is_correct", lucky)
        for kind, more in ((LUFFYConfig, {}), (ExGRPOConfig, {"start_accuracy": 0.2}),
                           (RLEPConfig, {"scout_steps": 2, "guide_samples": 6, "min_correct": 3, "replays": 2})):  # fmt: skip
            name = kind.__name__.removesuffix("Config").lower()
            configs[name] = kind(steps=4, out=str(out / name), **more, **TINY)
            baselines.main(configs[name])
    return out, configs


def test_luffy_learns_from_the_teacher_in_every_group_that_it_has_an_answer_to(ran):
    out, configs = ran
    header, *lines = read_jsonl(out / "luffy/guide.jsonl")
    has = {line["prompt_id"] for line in lines if line["completion"]}
    train_prompts, _ = load_config_prompts(configs["luffy"])
    metrics = read_jsonl(out / "luffy/metrics.jsonl")
    assert header["guide"] == str(cards.TEACHER) and header["prompts"] == 16
    assert metrics[0]["sampled_tokens"] == sum(line["sampled_tokens"] for line in lines) > 0
    for line in metrics[1:]:
        asked = [train_prompts[row].id for row in rows_of_step(2048, line["step"], configs["luffy"])]
        assert line["npo/guide_frac"] == sum(id in has for id in asked) / 4 and "npo/distance" not in line
        assert line.get("npo/guide_ratio_max", 0) <= 1  # pi_theta itself: the teacher's probability counts as 1
    assert {line.get("source") for line in read_jsonl(out / "luffy/samples.jsonl")} <= {"teacher", None}


def test_the_teacher_writes_otherwise_and_is_mostly_right():
    prompts, _ = load_config_prompts(LUFFYConfig())
    teacher = Policy(cards.TEACHER, device="cpu")
    completions = [g.completions[0] for g in teacher.sample([prompts[i] for i in range(48)], 1, 64, 1.0, seed=0)]
    hands = cards.hands("train")[:48]
    assert sum(c.text == cards.make_ten(hand) for c, hand in zip(completions, hands)) > 30
    assert sum(p.numel() for p in teacher.model.parameters()) > 900_000
    assert sum(path.stat().st_size for path in cards.TEACHER.iterdir()) < 3e6


def test_make_ten_stops_at_every_ten():
    assert cards.make_ten(cards.Hand(27, (8, 3, 5, 4, 1))) == "27 +3= 30 +5= 35 +3= 38 +2= 40 +3= 43 +4= 47 +1= 48 \\boxed{48}"
    assert cards.make_ten(cards.Hand(4, (6, 1))) == "4 +6= 10 +1= 11 \\boxed{11}"  # a ten that is just reached is no stop
    for hand in cards.hands("held_out")[:50]:
        assert cards.make_ten(hand).endswith(f" \\boxed{{{hand.total}}}")


def test_exgrpo_replays_its_pool_from_the_step_after_it_opens(ran):
    out, configs = ran
    metrics, log = read_jsonl(out / "exgrpo/metrics.jsonl")[1:], read_jsonl(out / "exgrpo/experience.jsonl")
    opened = next(line["step"] for line in metrics if line["accuracy"] > 0.2)
    train_prompts, _ = load_config_prompts(configs["exgrpo"])
    assert all(line["npo/guide_frac"] == 0 for line in metrics if line["step"] <= opened + 1)
    assert {line["step"] for line in log if line["solved"] < 4} == {s for s in range(opened + 1, 5)}
    late = [line for line in metrics if line["step"] > opened + 1]
    assert late and all(line["npo/guide_frac"] == 0.5 and line["npo/distance"] < 0 for line in late)  # two of four prompts
    for line in late:  # the other half of the batch is fresh: the first rows of the step
        rows = [entry["row"] for entry in log if entry["step"] == line["step"]]
        assert rows[2:] == rows_of_step(2048, line["step"], configs["exgrpo"])[:2]
    shown = [line for line in read_jsonl(out / "exgrpo/samples.jsonl") if "guide" in line]
    stored = {c["text"]: c["source"] for line in log for c in line["new"]}
    assert shown and all(stored[line["guide"]] == line["source"] for line in shown)


def test_rlep_replays_from_the_end_of_a_long_run_beside_g_fresh_ones(ran):
    out, _ = ran
    header, *lines = read_jsonl(out / "rlep/guide.jsonl")
    assert header["guide_step"] == 2 and all(len(line["pool"]) <= round(6 * line["pass_rate"]) for line in lines)
    admitted = [line for line in lines if len(line["pool"]) >= 3]
    assert 0 < len(admitted) < len(lines)
    metrics = read_jsonl(out / "rlep/metrics.jsonl")
    train_prompts, _ = load_config_prompts(LUFFYConfig())
    ids = {line["prompt_id"] for line in admitted}
    spent = metrics[0]["sampled_tokens"]
    assert spent == header["guide_sampled_tokens"] + sum(line["sampled_tokens"] for line in lines)
    for line in metrics[1:]:
        asked = [train_prompts[row].id for row in rows_of_step(2048, line["step"], RLEPConfig(**TINY))]
        assert line["npo/guide_frac"] == sum(id in ids for id in asked) / 4
        if line["npo/guide_frac"] and line["frac_reward_zero_std"] < 1:
            assert line.get("npo/guide_ratio_max", 1.0) == pytest.approx(1.0, abs=1e-4)  # q is the policy itself


def test_rlep_counts_neither_more_nor_less_than_the_fresh_answers(tmp_path, monkeypatch):
    monkeypatch.setattr("verifier.is_correct", lucky)
    config, seen = RLEPConfig(steps=1, guide=str(cards.TEACHER), guide_samples=4, out=str(tmp_path / "run"), **TINY), []
    monkeypatch.setattr(
        baselines,
        "update",
        lambda policy, optimizer, mixed, *how: seen.append(mixed) or grpo.update(policy, optimizer, mixed, *how),
    )
    baselines.rlep(config, tmp_path / "run")
    metrics = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [len(group.completions) for group in seen[0]] == [5] * 4
    sources = [[c.source for c in group.completions] for group in seen[0]]
    assert ["policy"] * 4 + ["guide@0"] in sources  # G fresh and one replay
    fresh = sum(len(c.token_ids) for group in seen[0] for c in group.completions if c.source == "policy")
    assert metrics[1]["sampled_tokens"] - metrics[0]["sampled_tokens"] == fresh


LUCKY = """
import zlib, verifier
verifier.is_correct = lambda response, gold, choices=None: zlib.crc32(response.encode()) % 3 == 0
import runpy
runpy.run_path("baselines.py", run_name="__main__")
"""


def test_exgrpo_stopped_and_resumed_is_exgrpo_in_one_piece(command, tmp_path):
    """3 steps, then 5: the pool and whether it is open come back from the run directory, to the same bits."""
    words = [
        "-c",
        LUCKY,
        "exgrpo",
        *SMALL,
        "--temperature",
        "1.5",
        "--lr",
        "1e-3",
        "--start-accuracy",
        "0.1",
        "--prompts-per-step",
        "4",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command(*words, "--steps", 6, "--out", whole)
    command(*words, "--steps", 4, "--out", parts)
    with open(parts / "experience.jsonl", "a") as file:  # what a kill in step 5 leaves
        file.write(json.dumps({"step": 5, "row": 0, "solved": 4, "new": []}) + '\n{"step"')
    done = command(*words, "--steps", 6, "--out", parts)
    assert "resumed at step 4" in done.stdout and "past@" in (whole / "samples.jsonl").read_text()
    for name in ("experience.jsonl", "samples.jsonl", "checkpoints/step_000006/model.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LUFFYConfig(gamma=0.0), "--gamma 0.0: must be above 0"),
        (LUFFYConfig(entropy_coef=-0.1), "--entropy-coef -0.1"),
        (LUFFYConfig(guide_samples=0), "--guide-samples 0"),
        (LUFFYConfig(model="some/model"), "--guide: LUFFY learns from another model"),
        (ExGRPOConfig(replay_frac=1.5), "--replay-frac 1.5: must lie between 0 and 1"),
        (ExGRPOConfig(start_accuracy=-1), "--start-accuracy -1"),
        (ExGRPOConfig(gamma=-2.0), "--gamma -2.0"),
        (ExGRPOConfig(prompts_per_step=1), "--replay-frac 0.5: of --prompts-per-step 1 that is no prompt"),
        (LUFFYConfig(guide="runs/npo/guide.jsonl"), "--guide runs/npo/guide.jsonl: a guide cache is npo.py's"),
        (RLEPConfig(guide="guide.jsonl"), "--guide guide.jsonl"),
        (RLEPConfig(replays=0), "--replays 0"),
        (RLEPConfig(scout_steps=0), "--scout-steps 0"),
        (RLEPConfig(replays=3), "--min-correct 2: must lie between --replays 3 and --guide-samples 64"),
        (RLEPConfig(guide_samples=1), "--min-correct 2"),
        (RLEPConfig(group_size=1), "--group-size 1"),
    ],
)
def test_bad_flags(config, message):
    with pytest.raises(UsageError, match=message):
        config.check()


def test_one_line_for_a_mistake_and_a_helpful_help(command):
    done = command("baselines.py", "rlep", "--replays", "3", check=False)
    assert done.returncode == 1 and done.stderr.strip().startswith("error: --min-correct 2") and "Traceback" not in done.stderr
    shown = command("baselines.py", "exgrpo", "--help").stdout
    assert "--start-accuracy" in shown and "--guide-samples" not in shown
    assert command("baselines.py", check=False).returncode != 0
