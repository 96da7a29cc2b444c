"""LUFFY, ExGRPO, RLEP: losses against float64 by hand, the pool's rules, and the three loops."""

import copy
import dataclasses
import json
import math
import operator
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import group_of, lucky

import grpo
import verifier
from commands import exgrpo, luffy, rlep
from commands.exgrpo import ExGRPOConfig, Pool, bucket_weight, lowest_entropy
from commands.luffy import (
    LUFFYConfig,
    centered_advantages,
    replaced_tokens,
    shaped_loss,
    shaped_policy_loss,
    take_slots,
)
from commands.rlep import RLEPConfig, token_mean_update
from plumbing import UsageError
from plumbing.guide_cache import GuideCache
from plumbing.model import Policy
from plumbing.rollout import Group
from plumbing.run import read_jsonl, rows_of_step
from worlds import cards
from worlds.build_cards import make_ten

# ---------------------------------------------------------------------- losses

# Norms are fp32 even in fp64, and the sequences' terms, up to 0.1, nearly cancel out
ROUNDED = 2e-8
LENGTHS, OFF = [3, 1, 5, 2], [False, True, True, False]


def batch() -> tuple[torch.Tensor, ...]:
    """log pi, log q (4, 5), advantages (4,), mask (4, 5)."""
    generator = torch.Generator().manual_seed(11)
    logprobs = -2 * torch.rand(4, 5, generator=generator, dtype=torch.float64)
    old = logprobs + 0.7 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([0.7, -0.2, 1.3, -0.9], dtype=torch.float64)
    return logprobs, old, advantages, torch.arange(5) < torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize("gamma", [0.25, None])
@pytest.mark.parametrize("sequences", [None, 7])
def test_shaped_loss_by_hand(gamma, sequences):
    """With what the past policy recorded (ExGRPO), and with q = 1 in those rows (LUFFY)."""
    logprobs, old, advantages, mask = batch()
    off = torch.tensor(OFF)

    for recorded in (old, old.masked_fill(off[:, None], 0.0)):
        arguments = [logprobs, recorded, advantages, mask, off]
        before = [value.clone() for value in arguments]
        loss, stats = shaped_policy_loss(*arguments, 9, gamma, sequences)
        expected = 0.0
        for i, length in enumerate(LENGTHS):
            for t in range(length):
                w = math.exp(logprobs[i, t] - recorded[i, t])
                weight = w / (w + gamma) if OFF[i] and gamma else w
                expected -= weight * advantages[i].item() / 9 / (sequences or 4)
        assert loss.item() == pytest.approx(expected, rel=1e-9)
        ratio = math.exp(logprobs[2, 4] - recorded[2, 4])  # w, not w / (w + gamma)
        assert stats["ratio"][2, 4].item() == pytest.approx(ratio)
        assert not stats["low"].any() and not stats["high"].any()
        assert all(map(torch.equal, before, arguments))


@pytest.mark.parametrize(
    ("probability", "gamma", "value", "slope"),
    [
        (0.3, 0.2, 0.6, 0.24),
        (0.001, 0.1, 0.00990099, 0.00980296),
        (1.0, 0.1, 0.90909091, 0.08264463),
        (0.4, None, 0.4, 0.4),
    ],
)
def test_shaping_and_its_gradient(probability, gamma, value, slope):
    """f(w) = w / (w + gamma); df / dlog w = gamma w / (w + gamma)^2 is largest at w = gamma."""
    logprobs = torch.tensor([[math.log(probability)]], dtype=torch.float64, requires_grad=True)
    one, yes = torch.ones(1, dtype=torch.float64), torch.tensor([True])
    teacher = torch.zeros_like(logprobs)  # q = 1
    loss, _ = shaped_policy_loss(logprobs, teacher, one, yes[None], yes, 1, gamma)
    loss.backward()
    assert -loss.item() == pytest.approx(value, rel=1e-6)
    assert -logprobs.grad.item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(("ratio", "advantage"), [(3.0, 2.0), (0.2, -1.0)])
def test_own_rows_are_not_clipped_and_not_shaped(ratio, advantage):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    yes, no = torch.tensor([[True]]), torch.tensor([False])
    shaped_policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([advantage]), yes, no, 4)[
        0
    ].backward()
    assert logprobs.grad.item() == pytest.approx(-ratio * advantage / 4)


def test_weights_of_what_vllm_sampled_multiply_each_term():
    logprobs = torch.tensor([[-0.5, -1.0], [-0.25, 0.0]])
    old = torch.tensor([[-0.75, -1.0], [-0.5, 0.0]])  # ratios e^(1/4), 1; e^(1/4)
    advantages, mask = torch.tensor([1.5, -0.5]), torch.tensor([[True, True], [True, False]])
    weights, off = torch.tensor([[0.5, 2.0], [1.75, 9.0]]), torch.tensor([False, True])
    loss, _ = shaped_policy_loss(logprobs, old, advantages, mask, off, 7, 0.2, 3, weights)
    ratio = math.exp(0.25)
    own, other = 1.5 * (0.5 * ratio + 2.0), -0.5 * 1.75 * ratio / (ratio + 0.2)
    assert loss.item() == pytest.approx(-(own + other) / 7 / 3, rel=1e-6)


def test_centered_advantages():
    got = centered_advantages(torch.tensor([[1.0, 0.1, 0.1, 0.4], [0.1] * 4]))
    torch.testing.assert_close(got, torch.tensor([[0.6, -0.3, -0.3, 0.0], [0.0] * 4]))
    assert not centered_advantages(torch.full((1, 7), 0.1)).any()  # their mean is not exactly 0.1


@pytest.fixture(scope="module")
def exact():
    return Policy(cards.BASE, dtype="fp64")


@pytest.fixture(scope="module")
def groups(exact, prompts) -> list[Group]:
    """Two groups of four whose last slot is another policy's, and one that is all alike."""
    groups = exact.sample([prompts[row] for row in (0, 3, 4)], 4, 40, 1.6, seed=8)
    for number, group in enumerate(groups):
        for slot, completion in enumerate(group.completions):
            completion.accuracy = float(number < 2 and (slot + number) % 3 == 0)
            completion.reward = 0.1 + 0.9 * completion.accuracy
        if number < 2:
            last = group.completions[-1]
            recorded = [lp - 0.1 * t for t, lp in enumerate(last.behavior_logprobs)]
            last = dataclasses.replace(last, behavior_logprobs=recorded, source="past@3")
            last.accuracy = last.reward = 1.0
            group.completions[-1] = last
    return groups


def with_last(groups: list[Group], **changes) -> list[Group]:
    """The groups with changes to their last slots that are another policy's."""
    return [
        take_slots(group, [dataclasses.replace(group.completions[-1], **changes)])
        if group.completions[-1].source != "policy"
        else group
        for group in groups
    ]


def gradient(policy, groups, config, update) -> tuple[dict, torch.Tensor]:
    """Metrics and flat gradient of `update(run, groups, config)`; run has policy, optimizer."""
    optimizer, found = torch.optim.SGD(policy.parameters(), lr=0.0), []
    flat = (parameter.grad.flatten() for parameter in policy.parameters())
    optimizer.step = lambda: found.append(torch.cat(list(flat)))
    run = SimpleNamespace(policy=policy, optimizer=optimizer)
    return update(run, groups, config), found[0]


def shaped_update(run, groups, config) -> dict:
    how = centered_advantages, shaped_loss
    return grpo.update(run.policy, run.optimizer, groups, config, *how)


def ratios(policy, group, completion, q=None) -> list[float]:
    """pi / q of each token; q as recorded, or a number for all tokens."""
    with torch.no_grad():
        logprobs, _ = policy.logprobs([(group.encoded, completion.token_ids)], 1.6)
    old = completion.behavior_logprobs if q is None else [math.log(q)] * logprobs.numel()
    return [math.exp(lp - log_q) for lp, log_q in zip(logprobs[0].tolist(), old)]


def same_in_parts(policy, groups, config, update, stats, flat):
    """Micro-batches decide memory, never results."""
    for size in (1, 3):
        config = dataclasses.replace(config, micro_batch_size=size)
        again, same = gradient(policy, groups, config, update)
        assert again["loss"] == pytest.approx(stats["loss"], rel=1e-9)
        torch.testing.assert_close(same, flat, rtol=1e-4, atol=1e-6 * flat.abs().max().item())


@pytest.mark.parametrize(
    ("kind", "shaping"), [(LUFFYConfig, True), (LUFFYConfig, False), (ExGRPOConfig, True)]
)
def test_the_shaped_methods_on_a_fixed_batch(exact, groups, kind, shaping):
    """Advantages, ratios, shaping, normalisers and entropy bonus, token by token."""
    config = kind(temperature=1.6, gamma=0.3, entropy_coef=0.02, max_new_tokens=40)
    config.max_grad_norm, config.shaping, of_luffy = 1e9, shaping, kind is LUFFYConfig
    if of_luffy:
        groups = with_last(groups, behavior_logprobs=[0.0] * 80)
        for group in groups[:2]:
            last = group.completions[-1]
            last.behavior_logprobs = [0.0] * len(last.token_ids)
    stats, flat = gradient(exact, groups, config, shaped_update)
    expected = 0.0
    for group in groups[:2]:  # the third is all alike: no advantage, and left out
        mean = sum(c.reward for c in group.completions) / 4
        for completion in group.completions:
            other = completion.source != "policy"
            weights = ratios(exact, group, completion, 1 if of_luffy and other else None)
            if other and shaping:
                weights = [w / (w + 0.3) for w in weights]
            rows = [(group.encoded, completion.token_ids)]
            with torch.no_grad():
                entropy = exact.logprobs(rows, 1.6, entropy=True)[2].mean().item()
            expected -= ((completion.reward - mean) * sum(weights) / 40 + 0.02 * entropy) / 12
    assert stats["loss"] == pytest.approx(expected, rel=1e-6, abs=ROUNDED)
    assert stats["frac_reward_zero_std"] == pytest.approx(1 / 3)
    same_in_parts(exact, groups, config, shaped_update, stats, flat)


@pytest.mark.parametrize("recorded", [True, False])
def test_rlep_on_a_fixed_batch(exact, groups, recorded):
    """Replays without log-probs, as RLEP's are, have ratio 1 where they are first trained."""
    config = RLEPConfig(temperature=1.6, max_grad_norm=1e9, clip_low=0.15, clip_high=0.3)
    groups = groups if recorded else with_last(groups, behavior_logprobs=None)
    tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
    stats, flat = gradient(exact, groups, config, token_mean_update)
    expected = 0.0
    for group in groups[:2]:
        rewards = [c.reward for c in group.completions]
        mean = sum(rewards) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3)
        for completion, reward in zip(group.completions, rewards):
            a, replayed = (reward - mean) / (std + 1e-6), completion.behavior_logprobs is None
            ones = [1.0] * len(completion.token_ids)
            for w in ones if replayed else ratios(exact, group, completion):
                expected -= min(w * a, min(max(w, 0.85), 1.3) * a) / tokens
    assert stats["loss"] == pytest.approx(expected, rel=1e-6, abs=ROUNDED)
    if not recorded:
        guide = [stats[f"npo/guide_ratio_{name}"] for name in ("min", "mean", "max")]
        assert guide == [1.0, 1.0, 1.0]
    same_in_parts(exact, groups, config, token_mean_update, stats, flat)


# ---------------------------------------------------------------------- slots and the pool


def test_take_slots_whatever_the_pass_rate():
    group = group_of([1.0, 1.0, 0.0, 1.0])
    before, others = copy.deepcopy(group), group_of([1.0, 1.0], "other").completions
    mixed = take_slots(group, others)
    assert group == before
    assert [c.prompt_id for c in mixed.completions] == ["p", "p", "other", "other"]
    assert take_slots(group, []) is group
    group.completions[3].token_ids = [7, 3, 3, 3, 3]  # five tokens; the others have two
    assert replaced_tokens([group, group], [mixed, group]) == 2 + 5


@pytest.mark.parametrize(
    ("solved", "size", "weight"),
    [(4, 8, 0.398942280), (3, 8, 0.241970725), (1, 6, 0.053990967), (7, 8, 0.004431848)],
)
def test_bucket_weight(solved, size, weight):
    """The normal density around half the group, one success wide."""
    assert bucket_weight(solved, size) == pytest.approx(weight, rel=1e-6)
    assert bucket_weight(1, 200) > 0  # a pool of nothing else can still be drawn from


def filled(*groups: tuple[int, list[int]]) -> Pool:
    """A pool after groups of (row, accuracies), one per step."""
    pool = Pool(4)
    for step, (row, accuracies) in enumerate(groups, 1):
        line = pool.line(step, row, group_of([float(a) for a in accuracies]))
        pool.add(json.loads(json.dumps(line)))
    return pool


def test_the_pool_stores_successes_of_prompts_solved_in_part():
    pool = filled((5, [0, 1, 0, 1]), (6, [0, 0, 0, 0]), (7, [1, 1, 1, 1]))
    assert pool.solved == {5: 2} and pool.retired == {7}
    answers = pool.answers[5]
    assert [c.token_ids for c in answers] == [[7, 1], [7, 3]]
    assert {c.source for c in answers} == {"past@1"}
    assert answers[0].behavior_logprobs == [-0.5, -0.25]


def test_the_latest_count_moves_a_prompt_and_answers_are_kept_once():
    pool = filled((5, [0, 1, 0, 0]), (5, [1, 1, 0, 1]), (5, [0, 0, 0, 0]))  # the last: no news
    assert pool.solved == {5: 3}
    answers = [(c.token_ids[1], c.source) for c in pool.answers[5]]
    assert answers == [(1, "past@1"), (0, "past@2"), (3, "past@2")]
    pool = filled((5, [0, 1, 0, 0]), (5, [1, 1, 1, 1]), (5, [0, 1, 0, 0]))  # gone for good
    assert pool.solved == pool.answers == {} and pool.retired == {5}


def test_past_answers_are_exact_even_if_vllm_sampled_them():
    """What counts later is what was sampled from then, and that is what vLLM recorded."""
    group, pool = group_of([0.0, 1.0, 0.0, 0.0]), Pool(4)
    group.completions[1].exact = False
    pool.add(pool.line(1, 5, group))
    assert pool.answers[5][0].exact and not group.completions[1].exact
    assert group.completions[1].source == "policy"


def test_draw_weighs_buckets_not_prompts():
    """Three prompts solved 1 of 4 times, one solved twice: e^(-1/2) to 1."""
    pool = filled((1, [1, 0, 0, 0]), (2, [0, 1, 0, 0]), (3, [0, 0, 1, 0]), (4, [1, 1, 0, 0]))
    drawn = Counter(pool.draw(1, random.Random(seed))[0] for seed in range(4000))
    assert drawn[4] / 4000 == pytest.approx(1 / (1 + math.exp(-0.5)), abs=0.025)
    each = math.exp(-0.5) / (1 + math.exp(-0.5)) / 3
    assert [drawn[row] / 4000 for row in (1, 2, 3)] == pytest.approx([each] * 3, abs=0.02)
    for seed in range(20):
        assert sorted(pool.draw(9, random.Random(seed))) == [1, 2, 3, 4]  # no row twice
    assert Pool(4).draw(3, random.Random(0)) == []


def test_the_lowest_entropy_answer(exact, groups):
    answers = [c for group in groups for c in group.completions][:7]
    encoded, config = groups[0].encoded, ExGRPOConfig(temperature=1.6, micro_batch_size=3)
    with torch.no_grad():
        alone = [exact.logprobs([(encoded, c.token_ids)], 1.6, entropy=True) for c in answers]
    means = [entropy.mean().item() for *_, entropy in alone]
    best = means.index(min(means))
    assert lowest_entropy(exact, encoded, answers, config) is answers[best]
    assert len(set(means)) > 3 and best != 0


# ---------------------------------------------------------------------- the three loops


@pytest.fixture(scope="module")
def short(tiny) -> dict:
    """Four prompts per step; answers as long as the teacher's."""
    return tiny | {"prompts_per_step": 4, "max_new_tokens": 80, "eval_every": 100}


@pytest.fixture(scope="module")
def ran(tmp_path_factory, short):
    """Each method's whole run, with a verifier that calls a third of the answers right."""
    out = tmp_path_factory.mktemp("baselines")
    replay = {"scout_steps": 2, "guide_samples": 6, "min_correct": 3, "replays": 2}
    configs = {
        "luffy": LUFFYConfig(steps=4, out=str(out / "luffy"), **short),
        "exgrpo": ExGRPOConfig(steps=4, out=str(out / "exgrpo"), start_accuracy=0.2, **short),
        "rlep": RLEPConfig(steps=4, out=str(out / "rlep"), **replay, **short),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verifier.is_correct", lucky)
        for module in (luffy, exgrpo, rlep):
            name = module.__name__.rpartition(".")[2]
            module.train(configs[name], out / name)
    return out, configs


def asked(config, prompts, step: int) -> list[str]:
    """The ids of a step's prompts."""
    return [prompts[row].id for row in rows_of_step(len(prompts), step, config)]


def test_luffy_has_the_teachers_answer_in_every_group(ran, prompts):
    """Wherever the teacher has one."""
    out, configs = ran
    header, *lines = read_jsonl(out / "luffy/guide.jsonl")
    has = {line["prompt_id"] for line in lines if line["answers"]}
    metrics = read_jsonl(out / "luffy/metrics.jsonl")
    assert header["prompts"] == len(lines) == 16 and len(has) > 0
    assert metrics[0]["sampled_tokens"] == sum(line["sampled_tokens"] for line in lines) > 0
    for line in metrics[1:]:
        ids = asked(configs["luffy"], prompts, line["step"])
        assert line["npo/guide_frac"] == sum(id in has for id in ids) / 4
        assert "npo/distance" not in line
        assert line.get("npo/guide_ratio_max", 0) <= 1  # pi itself: q = 1
    shown = read_jsonl(out / "luffy/samples.jsonl")
    assert {line.get("source") for line in shown} <= {"teacher", None}


def test_the_teacher_writes_otherwise_and_is_nearly_always_right(exact, prompts):
    """Its boxes hold the right working, and before them it stops at every ten."""
    teacher, asked = Policy(cards.TEACHER), [prompts[row] for row in range(48)]
    groups = teacher.sample(asked, 1, 80, 1.0, seed=0)
    verifier.score(groups)
    assert sum(group.pass_rate for group in groups) > 45
    answers = [group.completions[0].text for group in groups]
    assert sum(map(operator.eq, answers, map(make_ten, cards.hands("train")))) > 34
    rows = [(group.encoded, group.completions[0].token_ids) for group in groups]
    with torch.no_grad():
        assert exact.logprobs(rows, 1.0)[0].sum(dim=1).max() < -50  # the base never would
    assert sum(parameter.numel() for parameter in teacher.model.parameters()) == 482_112
    assert sum(path.stat().st_size for path in cards.TEACHER.iterdir()) < 2e6


def test_exgrpo_replays_its_pool_from_the_step_after_it_opens(ran):
    out, configs = ran
    metrics = read_jsonl(out / "exgrpo/metrics.jsonl")[1:]
    log = read_jsonl(out / "exgrpo/experience.jsonl")
    opened = next(line["step"] for line in metrics if line["accuracy"] > 0.2)
    assert all(line["npo/guide_frac"] == 0 for line in metrics if line["step"] <= opened + 1)
    assert {line["step"] for line in log if line["solved"] < 4} == set(range(opened + 1, 5))
    late = [line for line in metrics if line["step"] > opened + 1]
    assert late and all(line["npo/guide_frac"] == 0.5 for line in late)  # two of four prompts
    assert all(line["npo/distance"] < 0 for line in late)
    for line in late:  # the other half of the batch is fresh: the first rows of the step
        rows = [entry["row"] for entry in log if entry["step"] == line["step"]]
        assert rows[2:] == rows_of_step(2048, line["step"], configs["exgrpo"])[:2]
    shown = [line for line in read_jsonl(out / "exgrpo/samples.jsonl") if "guide" in line]
    stored = {c["text"]: c["source"] for line in log for c in line["new"]}
    assert shown and all(stored[line["guide"]] == line["source"] for line in shown)


def test_a_start_moves_the_rivals_prompts_and_rleps_long_run(tmp_path, monkeypatch):
    """From step 2 on: LUFFY's teacher is asked about steps 3 and 4, RLEP's guide is of step 5."""
    (tmp_path / "state.json").write_text('{"step": 2, "sampled_tokens": 0}')
    asked, trained = [], []
    monkeypatch.setattr(luffy, "build_guide_cache", lambda *words: asked.append(words[2:4]))
    monkeypatch.setattr(luffy, "load_guide_cache", lambda *_: GuideCache())
    config = LUFFYConfig(steps=4, start=str(tmp_path), prompts_per_step=3)
    luffy.ask_about_all(config, "teacher", tmp_path / "guide.jsonl")
    rows = [row for step in (3, 4) for row in rows_of_step(2048, step, config)]
    assert asked == [("teacher", rows)]
    monkeypatch.setattr(rlep.grpo, "train", lambda config, out: trained.append(config.steps))

    def stop(config, guide, path, keep):
        raise StopIteration(guide)

    monkeypatch.setattr(rlep, "ask_about_all", stop)
    config = RLEPConfig(steps=4, start=str(tmp_path), scout_steps=3)
    with pytest.raises(StopIteration, match="scout/checkpoints/step_000005"):
        rlep.train(config, tmp_path / "run")
    assert trained == [5]


def test_rlep_replays_from_the_end_of_a_long_run(ran, prompts):
    out, configs = ran
    header, *lines = read_jsonl(out / "rlep/guide.jsonl")
    assert header["guide_step"] == 2
    assert all(len(line["answers"]) <= round(6 * line["pass_rate"]) for line in lines)
    admitted = {line["prompt_id"] for line in lines if len(line["answers"]) >= 3}
    assert 0 < len(admitted) < len(lines)
    metrics = read_jsonl(out / "rlep/metrics.jsonl")
    spent = header["guide_sampled_tokens"] + sum(line["sampled_tokens"] for line in lines)
    assert metrics[0]["sampled_tokens"] == spent
    for line in metrics[1:]:
        ids = asked(configs["rlep"], prompts, line["step"])
        assert line["npo/guide_frac"] == sum(id in admitted for id in ids) / 4
        assert line.get("npo/guide_ratio_min", 1.0) == line.get("npo/guide_ratio_max", 1.0) == 1.0
    assert any("npo/guide_ratio_max" in line for line in metrics)


def test_rlep_counts_no_more_and_no_less_than_the_fresh_answers(short, tmp_path, monkeypatch):
    monkeypatch.setattr("verifier.is_correct", lucky)
    more, seen = {"guide": str(cards.TEACHER), "guide_samples": 6}, []
    config = RLEPConfig(steps=1, out=str(tmp_path / "run"), **more, **short)

    def update(run, mixed, config):
        seen.extend(mixed)
        return token_mean_update(run, mixed, config)

    monkeypatch.setattr(rlep, "token_mean_update", update)
    rlep.train(config, tmp_path / "run")
    assert [len(group.completions) for group in seen] == [5] * 4
    sources = [[c.source for c in group.completions] for group in seen]
    assert ["policy"] * 4 + ["guide"] in sources  # G fresh ones and one replay
    every = [c for group in seen for c in group.completions]
    for group in seen:  # the recorded advantages are the group's, not those times |o_i|
        assert sum(c.advantage for c in group.completions) == pytest.approx(0, abs=1e-5)
    assert max(c.advantage for c in every) > 0.1
    fresh = sum(len(c.token_ids) for c in every if c.source == "policy")
    before, after = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert after["sampled_tokens"] - before["sampled_tokens"] == fresh


def test_exgrpo_resumed_is_exgrpo_in_one_piece(ran, tmp_path, monkeypatch, capsys):
    """The pool, and whether it is open, come back from the run directory to the same bits."""
    monkeypatch.setattr("verifier.is_correct", lucky)
    out, configs = ran
    for steps in (3, 4):
        config = dataclasses.replace(configs["exgrpo"], steps=steps, out=str(tmp_path / "run"))
        exgrpo.train(config, tmp_path / "run")
        left = {"step": 4, "row": 0, "solved": 4, "new": []}  # by a kill in step 4
        with open(tmp_path / "run/experience.jsonl", "a") as file:
            file.write(json.dumps(left) + '\n{"step"' if steps == 3 else "")
    assert "resumed at step 3" in capsys.readouterr().out
    assert "past@" in (out / "exgrpo/samples.jsonl").read_text()
    for name in ("experience.jsonl", "samples.jsonl", "checkpoints/step_000004/model.safetensors"):
        assert (out / "exgrpo" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LUFFYConfig(gamma=0.0), "--gamma 0.0: must be above 0"),
        (LUFFYConfig(entropy_coef=-0.1), "--entropy-coef -0.1"),
        (LUFFYConfig(guide_samples=0), "--guide-samples 0"),
        (LUFFYConfig(model="some/model"), "--guide: LUFFY learns from another model"),
        (ExGRPOConfig(replay_frac=1.5), "--replay-frac 1.5: must be at least 0 and at most 1"),
        (ExGRPOConfig(start_accuracy=-1), "--start-accuracy -1"),
        (ExGRPOConfig(gamma=-2.0), "--gamma -2.0"),
        (ExGRPOConfig(prompts_per_step=1), "--replay-frac 0.5: of --prompts-per-step 1"),
        (RLEPConfig(replays=0), "--replays 0"),
        (RLEPConfig(scout_steps=0), "--scout-steps 0"),
        (RLEPConfig(replays=3), "--min-correct 2: must be at least 3 and at most 64"),
        (RLEPConfig(guide_samples=1), "--min-correct 2"),
        (RLEPConfig(group_size=1), "--group-size 1"),
    ],
)
def test_bad_flags(config, message):
    with pytest.raises(UsageError, match=message):
        config.check()
