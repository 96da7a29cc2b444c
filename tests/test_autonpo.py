"""When AutoNPO triggers, how far it goes back, what it then does, and that it is the same run after a kill anywhere."""

import dataclasses
import json
import math
import random
import zlib
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import autonpo
import grpo
import npo
import policy as policy_module
from autonpo import AutoNPOConfig, MistakePool, Monitor, select_rollback
from policy import Policy
from run import checkpoint_path, checkpoint_state, checkpoints, evaluations, read_jsonl, rows_of_step, surviving
from tasks import UsageError


def lucky(response, gold, choices=None) -> bool:
    """Stands in for the verifier where a few steps of the tiny base must find some right answers, and some wrong."""
    return zlib.crc32(response.encode()) % 3 == 0


TINY = dict(prompts_per_step=2, group_size=4, eval_prompts=4, eval_samples=1, eval_every=2, save_every=2, max_new_tokens=40,
            micro_batch_size=8, lr=1e-3, temperature=1.7, device="cpu")  # fmt: skip
# everything is a mistake, nothing is progress, any entropy has fallen: the first look that the cooldown allows triggers
EAGER = dict(TINY, guide_samples=3, mistake_pass_rate=0.9, max_distance=4, ema_decay=0.5, patience=1, min_gain=5.0, entropy_drop=0.0,
             probe_prompts=5, probe_samples=2, confirm_pass_rate=0.0, min_slice=1, cooldown=3, steps=9)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The pool
# ---------------------------------------------------------------------------------------------------------------------


def test_pool_admits_releases_ages_and_evicts():
    config, pool = AutoNPOConfig(mistake_pass_rate=0.25, pool_size=3, max_distance=20, save_every=10), MistakePool()
    pool.observe(1, {70: 0.25, 71: 0.375, 72: 0.0}, config)
    assert pool.failed_at == {70: 1, 72: 1}  # at the threshold, not above it
    pool.observe(5, {72: 0.0, 73: 0.0}, config)
    assert pool.failed_at == {70: 1, 72: 5, 73: 5}  # failed again: as old as its last failure
    pool.observe(9, {73: 0.5}, config)
    assert pool.failed_at == {70: 1, 72: 5}  # solved now: released
    pool.observe(11, {74: 0.0, 75: 0.125}, config)
    assert pool.failed_at == {72: 5, 74: 11, 75: 11}  # full: the oldest goes
    pool.observe(25, {}, config)
    assert pool.failed_at == {74: 11, 75: 11}  # failed at 5: 20 steps ago, no distance reaches it
    assert pool.since(10) == [74, 75] and pool.since(11) == []


# ---------------------------------------------------------------------------------------------------------------------
# The warning, on scripted traces
# ---------------------------------------------------------------------------------------------------------------------

WATCH = AutoNPOConfig(ema_decay=0.8, patience=15, min_gain=0.03, entropy_drop=0.25, cooldown=12)


def warnings(reward, entropy, steps: int = 200, config: AutoNPOConfig = WATCH, quiet_until: int = 0) -> list[int]:
    """Steps with a warning in a trace of reward and entropy, both functions of the step."""
    monitor, found = Monitor(quiet_until=quiet_until), []
    for step in range(1, steps + 1):
        monitor.observe(step, reward(step), entropy(step), config)
        if monitor.warning(step, config):
            found.append(step)
    return found


def climb(step):
    return min(0.1 + 0.005 * step, 0.6)  # stagnates from step 100


def collapse(step):
    return max(1.0 - 0.006 * step, 0.4)  # 25 % down at step 42, to 0.4 at step 100


def test_moving_averages_by_hand():
    config, monitor = dataclasses.replace(WATCH, ema_decay=0.75), Monitor()
    for step, (reward, entropy) in enumerate([(0.2, 1.0), (0.4, 2.0), (0.0, 0.6), (1.0, 1.2), (0.4, 0.2)], 1):
        monitor.observe(step, reward, entropy, config)
    # plain means of the first four, then 3/4 old + 1/4 new
    assert (monitor.reward, monitor.entropy) == (pytest.approx(0.75 * 0.4 + 0.25 * 0.4), pytest.approx(0.75 * 1.2 + 0.25 * 0.2))
    assert monitor.peak_entropy == pytest.approx(1.2)  # from the fourth value on: before, the average is noise
    assert (monitor.best_reward, monitor.best_step) == (pytest.approx(0.4), 4)


def test_collapse_and_stagnation_together_trigger():
    found = warnings(climb, collapse)
    assert 100 < found[0] < 130 and found == list(range(found[0], 201))


@pytest.mark.parametrize(
    ("reward", "entropy"),
    [
        (climb, lambda step: 1.0),  # stagnation alone
        (climb, lambda step: 1.0 + 0.01 * step),  # and with entropy that rises
        (climb, lambda step: 1.0 - 0.0012 * step),  # that falls, but by 24 %
        (lambda step: 0.1 + 0.004 * step, collapse),  # collapse while the reward climbs
        (lambda step: 0.5, lambda step: 1.0),  # neither
        (lambda step: 0.0, lambda step: 0.0),  # a policy with no entropy to lose
    ],
)
def test_neither_alone_triggers(reward, entropy):
    assert warnings(reward, entropy) == []


def test_no_warning_in_the_cooldown():
    first = warnings(climb, collapse)[0]
    assert warnings(climb, collapse, quiet_until=150) == list(range(151, 201))
    assert warnings(climb, collapse, quiet_until=first - 1)[0] == first


def test_the_reason_names_its_numbers():
    monitor = Monitor()
    for step in range(1, 131):
        monitor.observe(step, climb(step), collapse(step), WATCH)
    reason = monitor.warning(130, WATCH)
    assert (
        "reward average 0.600, no gain of 0.03 since step" in reason and "59% below its peak 0.982" in reason
    )  # the mean of steps 1 to 5, 0.982, is the first that counts


def test_noise_around_a_level_never_triggers():
    """A thousand runs whose reward and entropy only jitter, by what a batch of 8 x 8 does in the cards world (0.1 and 15 %)."""
    for seed in range(1000):
        noise = random.Random(seed)
        jitter = AutoNPOConfig()
        assert not warnings(lambda _: noise.gauss(0.5, 0.1), lambda _: noise.gauss(0.1, 0.015), 300, jitter), seed  # noqa: B023


@pytest.mark.parametrize(("step_size", "triggered"), [(0.005, 0), (0.01, 9), (0.02, 146)])
def test_false_triggers_on_a_thousand_random_walks(step_size, triggered):
    """Neither driftless walk knows of the other. One that has lost 30 % by chance does look like a collapse: the rate is measured."""
    found = 0
    for seed in range(1000):
        noise, reward, entropy, walk = random.Random(seed), 0.5, 0.1, []
        for _ in range(200):
            reward, entropy = reward + noise.gauss(0, step_size), entropy * math.exp(noise.gauss(0, step_size))
            walk.append((reward, entropy))
        found += bool(warnings(lambda step: walk[step - 1][0], lambda step: walk[step - 1][1], 200, AutoNPOConfig()))  # noqa: B023
    assert found == triggered


# ---------------------------------------------------------------------------------------------------------------------
# How far back
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quality", "variance", "distance"),
    [
        ({10: 0.2, 20: 0.5, 30: 0.6}, {10: 1.0, 20: 1.25, 30: 2.0}, 20),  # S 0.2, 0.4, 0.3
        ({10: 0.2, 20: 0.5, 30: 0.9}, {10: 1.0, 20: 1.25, 30: 2.0}, 30),  # 0.2, 0.4, 0.45
        ({10: 0.5, 20: 0.5, 30: 0.6}, {10: 1.0, 20: 1.25, 30: 2.0}, 10),
        ({30: 0.6, 20: 0.5}, {30: 1.5, 20: 1.25}, 20),  # 0.4 both: the nearer
        ({40: 0.1}, {40: 3.0}, 40),  # a single candidate
        ({40: 0.0}, {40: 3.0}, 0),  # that solves nothing
        ({10: 0.0, 20: 0.0}, {10: 1.0, 20: 1.0}, 0),
        ({}, {}, 0),  # none
        ({10: 0.9, 20: 0.3}, {20: 1.0}, 20),  # known in one only: no candidate
    ],
)
def test_select_rollback(quality, variance, distance):
    before = dict(quality), dict(variance)
    assert select_rollback(quality, variance) == distance
    assert (quality, variance) == before


def test_token_kl_is_the_mean_over_tokens(fresh, base, prompts, tmp_path):
    """Against the definition, on a policy that has moved; answers of different lengths; any micro-batch."""
    base.save(tmp_path / "old", {})
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.manual_seed(4)))
    groups = fresh.sample([prompts[3], prompts[8]], 5, 40, 1.3, seed=5)
    terms = []
    for group in groups:
        for c in group.completions:
            old = base.logprobs([(group.inputs, c.token_ids)], 1.3)[0][0].tolist()
            terms += [mine - theirs for mine, theirs in zip(c.behavior_logprobs, old)]
    assert len({len(c.token_ids) for group in groups for c in group.completions}) > 1
    for size in (3, 100):
        config = AutoNPOConfig(temperature=1.3, micro_batch_size=size)
        assert autonpo.token_kl(groups, tmp_path / "old", config) == pytest.approx(sum(terms) / len(terms), abs=1e-5)
    assert sum(terms) / len(terms) > 0.01
    fresh.save(tmp_path / "same", {})
    assert autonpo.token_kl(groups, tmp_path / "same", config) == pytest.approx(0, abs=1e-5)


class HandmadeRun:
    """At step 6, with checkpoints of steps 2, 4 and 6, each a different policy, and five mistakes of known age."""

    step, sampled_tokens = 6, 100

    def __init__(self, out: Path, policy: Policy, prompts):
        self.out, self.policy, self.sampler = out, policy, policy
        self.train_prompts, self.logged, self.rolled_back = prompts, [], []
        for step in (2, 4, 6):
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.manual_seed(step)))
            policy.save(
                checkpoint_path(out, step), {"step": step, "sampled_tokens": 50, "memory": {"monitor": {"best_step": step}}}
            )

    def log(self, line):
        self.logged.append(line)

    def roll_back(self, step, memory):
        self.rolled_back.append((step, memory))


HANDMADE = AutoNPOConfig(**dict(EAGER, max_distance=4, probe_prompts=5, probe_samples=6, guide_samples=6, min_slice=2))
FAILED = {50: 1, 59: 2, 64: 3, 70: 5, 71: 6}  # row: step


def test_what_a_decision_measures(fresh, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("verifier.is_correct", lucky)
    made, pool = HandmadeRun(tmp_path, fresh, prompts), MistakePool(dict(FAILED))
    line = autonpo.decide(made, pool, HANDMADE)
    rows, groups = autonpo.probe(made, pool, HANDMADE)  # the same again: its seed is the step's
    assert sorted(rows) == sorted(FAILED)
    right = {row: [c.accuracy for c in group.completions] for row, group in zip(rows, groups)}
    assert len({sum(values) for values in right.values()}) > 1
    spent = sum(len(c.token_ids) for group in groups for c in group.completions)
    assert made.sampled_tokens == 100 + 2 * spent
    assert line["autonpo/pass_rate"] == pytest.approx(sum(map(sum, right.values())) / 30)
    slices = {2: [70, 71], 4: [64, 70, 71]}  # failed in the last 2 and 4 steps; 6, now itself, is no distance
    assert [row["distance"] for row in line["autonpo/table"]] == [2, 4]
    for row in line["autonpo/table"]:
        mine = slices[row["distance"]]
        assert row["prompts"] == len(mine)
        assert row["quality"] == pytest.approx(sum(sum(right[one]) for one in mine) / (6 * len(mine)))
        old = Policy(checkpoint_path(tmp_path, 6 - row["distance"]), device="cpu")
        terms = [mine - theirs for group in groups for c in group.completions
                 for mine, theirs in zip(c.behavior_logprobs, old.logprobs([(group.inputs, c.token_ids)], 1.7)[0][0].tolist())]  # fmt: skip
        assert row["variance"] == pytest.approx(math.exp(sum(terms) / len(terms)), rel=1e-4)
    far = autonpo.decide(made, pool, dataclasses.replace(HANDMADE, min_slice=3))
    assert [row["distance"] for row in far["autonpo/table"]] == [4]  # two prompts are too few
    near = autonpo.decide(made, pool, dataclasses.replace(HANDMADE, max_distance=2))
    assert [row["distance"] for row in near["autonpo/table"]] == [2]


def test_exactly_the_chosen_slice_is_cached_and_weights_go_back(fresh, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("verifier.is_correct", lucky)
    made, pool, monitor = HandmadeRun(tmp_path, fresh, prompts), MistakePool(dict(FAILED)), Monitor(best_step=6)
    monkeypatch.setattr(autonpo, "select_rollback", lambda quality, variance: 4)
    autonpo.intervene(made, pool, monitor, "because", HANDMADE)
    asked = [int(line["prompt_id"].rsplit(":", 1)[-1]) for line in read_jsonl(tmp_path / "guide_000006.jsonl")[1:]]
    assert asked == [64, 70, 71]
    assert made.rolled_back == [(2, {"monitor": {"best_step": 2, "quiet_until": 9}, "guided_until": 6})]
    assert made.logged[0]["autonpo/distance"] == 4 and "of 3 mistakes until step 6" in made.logged[0]["autonpo/decision"]
    monkeypatch.setattr(autonpo, "select_rollback", lambda quality, variance: 2)
    autonpo.intervene(made, pool, monitor, "because", HANDMADE)  # decided otherwise after a kill: the cache is made anew
    asked = [int(line["prompt_id"].rsplit(":", 1)[-1]) for line in read_jsonl(tmp_path / "guide_000006.jsonl")[1:]]
    assert asked == [70, 71] and made.rolled_back[-1][0] == 4


def test_no_rollback_without_a_single_answer_to_guide_with(fresh, prompts, tmp_path, monkeypatch):
    made, pool, monitor = HandmadeRun(tmp_path, fresh, prompts), MistakePool(dict(FAILED)), Monitor(best_step=6)
    monkeypatch.setattr(autonpo, "select_rollback", lambda quality, variance: 4)
    monkeypatch.setattr("verifier.is_correct", lambda *_: False)
    autonpo.intervene(made, pool, monitor, "because", HANDMADE)
    assert made.rolled_back == [] and monitor.quiet_until == 9
    assert made.logged[0]["autonpo/distance"] == 0 and "solves none of 3 mistakes" in made.logged[0]["autonpo/decision"]


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------


def weights(path: Path) -> dict:
    return Policy(path, device="cpu").model.state_dict()


def run(out: Path, **settings) -> AutoNPOConfig:
    config = AutoNPOConfig(out=str(out), **EAGER | settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verifier.is_correct", lucky)
        autonpo.main(config)
    return config


def contents(out: Path) -> dict:
    lines = [
        {k: v for k, v in line.items() if not k.startswith(("time/", "step_time"))}
        for line in read_jsonl(out / "metrics.jsonl")
    ]
    found = {"metrics": lines, "samples": read_jsonl(out / "samples.jsonl")}
    for path in sorted(out.rglob("*")):
        if path.name in ("model.safetensors", "state.json") or path.match("guide_*.jsonl"):
            found[str(path.relative_to(out))] = path.read_bytes().replace(str(out).encode(), b"OUT")
    return found


@pytest.fixture(scope="module")
def eager(tmp_path_factory) -> tuple[AutoNPOConfig, Path]:
    out = tmp_path_factory.mktemp("auto") / "run"
    return run(out), out


def test_decisions_are_logged_with_reason_and_table(eager):
    config, out = eager
    decisions = [line for line in read_jsonl(out / "metrics.jsonl") if "autonpo/decision" in line]
    assert decisions and any(line["autonpo/distance"] for line in decisions)
    for line in decisions:
        assert line["autonpo/step"] % config.save_every == 0 and line["step"] == line["autonpo/step"] + 1
        assert "no gain of 5" in line["autonpo/reason"]
        for row in line["autonpo/table"]:
            assert 0 < row["distance"] <= config.max_distance and 0 <= row["quality"] <= 1 and row["variance"] > 0
            assert row["signal"] == pytest.approx(row["quality"] / row["variance"])
        best = select_rollback(
            *({row["distance"]: row[key] for row in line["autonpo/table"]} for key in ("quality", "variance"))
        )
        assert line["autonpo/distance"] == best
    assert json.loads((out / "summary.json").read_text())["decisions"] == decisions
    assert (out / "curves.png").stat().st_size > 20_000


def test_a_rollback_replays_the_same_prompts_with_the_chosen_slice_guided(eager):
    config, out = eager
    lines = read_jsonl(out / "metrics.jsonl")
    first = next(line for line in lines if line.get("autonpo/distance"))
    now, back = first["autonpo/step"], first["autonpo/step"] - first["autonpo/distance"]
    replay = [line for line in lines if line.get("rollbacks") == 1 and "loss" in line]
    assert [line["step"] for line in replay][: now - back] == list(range(back + 1, now + 1))
    header, *cache = read_jsonl(out / f"guide_{now:06d}.jsonl")
    assert (header["guide_step"], header["first_step"], header["until"]) == (
        now,
        back + 1,
        now,
    )  # the current policy is the guide
    asked = {row for step in range(back + 1, now + 1) for row in rows_of_step(2048, step, config)}
    assert 0 < len(cache) <= len(asked)
    assert {int(line["prompt_id"].rsplit(":", 1)[-1]) for line in cache} <= asked
    guided = [line for line in replay if line.get("npo/guide_frac")]
    assert guided and all(
        line["step"] <= now and 0 < line["npo/distance"] == now - line["step"] or line["step"] == now for line in guided
    )
    beyond = [line for line in replay if line["step"] > now]
    assert all("npo/guide_frac" not in line for line in beyond)
    # until its first update the replay is the first pass: same prompts, same seed, same answers
    before = next(line for line in lines if line["step"] == back + 1 and "loss" in line)
    assert (replay[0]["accuracy"], replay[0]["entropy"]) == (before["accuracy"], before["entropy"])


def test_cooldown_keeps_decisions_apart(eager):
    config, out = eager
    steps = [line["autonpo/step"] for line in read_jsonl(out / "metrics.jsonl") if "autonpo/decision" in line]
    assert len(steps) >= 2 and all(b - a > config.cooldown for a, b in zip(steps, steps[1:]))


def test_every_token_is_counted_and_none_comes_back(eager):
    config, out = eager
    lines = read_jsonl(out / "metrics.jsonl")
    tokens = [line["sampled_tokens"] for line in lines]
    assert tokens == sorted(tokens)
    decision = next(line for line in lines if line.get("autonpo/distance"))
    place = lines.index(decision)
    cached = sum(line["sampled_tokens"] for line in read_jsonl(out / f"guide_{decision['autonpo/step']:06d}.jsonl")[1:])
    assert tokens[place] - tokens[place - 1] > cached > 0  # the probe's tokens on top
    assert lines[place + 1]["step"] == decision["autonpo/step"] - decision["autonpo/distance"] + 1


def test_what_survives_is_one_line_a_step(eager):
    config, out = eager
    lines = surviving(read_jsonl(out / "metrics.jsonl"))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, config.steps + 1))
    evals = [line["step"] for line in evaluations(out)]
    assert evals == sorted(set(evals)) and evals[-1] == config.steps


def test_disk_use_is_bounded(eager):
    config, out = eager
    steps = [checkpoint_state(path)["step"] for path in checkpoints(out)]
    assert min(steps) >= config.steps - config.max_distance - config.save_every
    assert len(steps) <= config.max_distance // config.save_every + 2
    assert not list(out.glob("checkpoints/*.tmp"))


def test_a_run_that_never_triggers_is_grpo_bit_by_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("verifier.is_correct", lucky)
    watching = dict(
        ema_decay=0.5, patience=1, min_gain=5.0, entropy_drop=0.9, max_distance=4
    )  # stagnant, but its entropy is there
    autonpo.main(AutoNPOConfig(steps=5, out=str(tmp_path / "auto"), **TINY, **watching))
    grpo.train(grpo.GRPOConfig(steps=5, **TINY), tmp_path / "grpo")
    mine, theirs = (weights(checkpoint_path(tmp_path / name, 5)) for name in ("auto", "grpo"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for a, b in zip(*(read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("auto", "grpo")), strict=True):
        assert {k: a[k] for k in b if "time" not in k} == {k: v for k, v in b.items() if "time" not in k}
    mine, theirs = (torch.load(checkpoint_path(tmp_path / name, 5) / "optimizer.pt")["state"] for name in ("auto", "grpo"))
    assert all(torch.equal(mine[i][key], theirs[i][key]) for i in theirs for key in theirs[i])
    mine = weights(checkpoint_path(tmp_path / "auto", 5))
    start = weights(Path(npo.model_path(AutoNPOConfig())))
    assert any(not torch.equal(mine[name], start[name]) for name in mine)


def test_an_unconfirmed_warning_changes_nothing_but_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr("verifier.is_correct", lucky)
    config = run(tmp_path / "auto", confirm_pass_rate=0.99, steps=6)
    decisions = [line for line in read_jsonl(tmp_path / "auto/metrics.jsonl") if "autonpo/decision" in line]
    assert decisions and all(line["autonpo/decision"].startswith("stay: of 5 mistakes") for line in decisions)
    grpo.train(grpo.GRPOConfig(steps=config.steps, **TINY), tmp_path / "grpo")
    mine, theirs = (weights(checkpoint_path(tmp_path / name, 6)) for name in ("auto", "grpo"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_no_candidate_and_an_empty_pool_are_said(tmp_path):
    run(tmp_path / "few", min_slice=50, steps=5)
    run(tmp_path / "none", mistake_pass_rate=0.0, pool_size=1, steps=5, max_distance=2, min_slice=2)
    said = [[line["autonpo/decision"] for line in read_jsonl(tmp_path / name / "metrics.jsonl") if "autonpo/decision" in line]
            for name in ("few", "none")]  # fmt: skip
    assert "stay: no checkpoint has 50 probed mistakes after it" in said[0]
    assert all(line.startswith("stay") for line in said[1]) and said[1]


class Killed(BaseException):
    """No `except Exception` sees it."""


def die_at(monkeypatch, module, name: str, call: int, after: bool = False) -> None:
    """The process dies at that call of a function (or just after it)."""
    real, calls = getattr(module, name), []

    def mortal(*args, **options):
        calls.append(1)
        if len(calls) == call and not after:
            raise Killed
        found = real(*args, **options)
        if len(calls) == call:
            raise Killed
        return found

    monkeypatch.setattr(module, name, mortal)


@pytest.mark.parametrize(
    ("module", "name", "call", "after"),
    [
        (Policy, "save", 1, False),  # before the base is saved
        (Policy, "save", 1, True),  # and after, before anything is logged
        (autonpo, "update", 3, False),  # in an ordinary step
        (autonpo, "probe", 1, False),  # at the warning
        (autonpo.verifier, "score", 8, False),  # somewhere in probe or steps
        (autonpo, "token_kl", 1, True),  # in the middle of the table
        (autonpo, "build_cache", 1, False),
        (autonpo, "build_cache", 1, True),  # the cache is there, nothing else has happened
        (autonpo.Run, "log", 1, True),  # the decision is logged, and not carried out
        (autonpo.Run, "roll_back", 1, False),
        (autonpo.Run, "_load", 2, True),  # weights are back, the checkpoint does not say so yet
        (autonpo.Run, "roll_back", 2, False),  # in a second intervention
        (autonpo.Run, "roll_back", 2, True),
        (autonpo.Run, "_forget_after", 1, False),  # it has happened, and the later checkpoints are still there
        (autonpo.Run, "_forget_after", 1, True),
        (autonpo, "guide_use", 1, True),  # in the guided segment
        (autonpo, "remove_checkpoint", 1, False),
    ],
)
def test_killed_anywhere_and_resumed_is_the_same_run(eager, tmp_path, module, name, call, after):
    config, whole = eager
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, module, name, call, after)
        with pytest.raises(Killed):
            run(out)
    run(out)
    assert contents(out) == contents(whole)


def test_what_a_kill_left_of_a_checkpoint_is_cleared(eager, tmp_path):
    config, whole = eager
    out = tmp_path / "run"
    run(out, steps=4)
    for name in ("step_000002.tmp", "step_000008.tmp"):  # half removed, half written
        (out / "checkpoints" / name).mkdir()
    run(out)  # --steps may grow
    assert contents(out)["metrics"][-1]["eval/accuracy"] >= 0 and not list(out.glob("checkpoints/*.tmp"))


def test_a_directory_with_nothing_but_a_base_is_not_another_models(tmp_path):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, autonpo.Run, "evaluate", 1)
        with pytest.raises(Killed):
            run(out)
    assert not (out / "metrics.jsonl").exists()
    with pytest.raises(UsageError, match="seed 0 there and 7 here"):
        run(out, seed=7)


def test_without_is_correction_guided_ratios_start_at_one(tmp_path):
    run(tmp_path, is_correction=False, steps=5)
    guided = [line for line in read_jsonl(tmp_path / "metrics.jsonl") if line.get("npo/guide_frac") and line["loss"]]
    ratios = [line[f"npo/guide_ratio_{name}"] for line in guided for name in ("min", "max") if "npo/guide_ratio_min" in line]
    assert ratios and ratios == pytest.approx([1.0] * len(ratios), abs=1e-4)


def test_killed_in_the_middle_of_the_cache(eager, tmp_path):
    _, whole = eager
    out, sampled = tmp_path / "run", policy_module.Policy.sample

    def mortal(self, prompts, group_size, *rest):
        if (
            group_size == EAGER["guide_samples"]
            and list(out.glob("guide_*.partial"))
            and len(read_jsonl(next(out.glob("guide_*.partial")))) > 1
        ):
            raise Killed
        return sampled(self, prompts, group_size, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "sample", mortal)
        with pytest.raises(Killed):
            run(out)
    assert list(out.glob("guide_*.partial"))
    run(out)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(patience=0), "--patience 0"),
        (dict(cooldown=0), "--cooldown 0"),
        (dict(ema_decay=1.0), "--ema-decay 1.0"),
        (dict(mistake_pass_rate=-0.1), "--mistake-pass-rate -0.1"),
        (dict(max_distance=5), "--max-distance 5"),
        (dict(min_gain=-1.0), "--min-gain -1.0"),
        (dict(min_slice=200), "--min-slice 200"),
        (dict(steps=0), "--steps 0"),
        (dict(gate=1.5), "--gate 1.5"),
        (dict(group_size=1), "--group-size 1"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(UsageError, match=message.replace("--", "").replace("-", ".")):
        AutoNPOConfig(**flags).check()


def test_every_parameter_of_autonpo_has_a_flag_that_says_who_chose_it(command):
    lines = (ROOT / "autonpo.py").read_text().split("# Mistake pool")[1].split("# What npo.py")[0].splitlines()
    flags = [line for line in lines if ": " in line and " = " in line]
    assert len(flags) >= 12 and all("#" in line for line in flags)
    text = " ".join(command("autonpo.py", "--help").stdout.replace("│", " ").split())
    for line in flags:
        assert "--" + line.split(":")[0].strip().replace("_", "-") in text
    assert text.count("not specified by the paper") >= len(flags)
    assert "--scout-steps" not in text and "--intervention" not in text and "--guide " not in text  # no dead flags
