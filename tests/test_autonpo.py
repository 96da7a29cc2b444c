"""When AutoNPO triggers, how far it goes back, what it then does, and its resume after a kill."""

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
import torch
from conftest import group_of, lucky, save

import autonpo
import grpo
from autonpo import AutoNPOConfig, Memory, MistakePool, Monitor, select_rollback
from plumbing import UsageError
from plumbing import run as run_module
from plumbing.checkpoints import checkpoint_path, checkpoints, step_of
from plumbing.command import flag_comments
from plumbing.guide_cache import GuideCache
from plumbing.metrics import answer_metrics
from plumbing.model import Policy
from plumbing.rollout import Group
from plumbing.run import Run, current_lineage, evaluations, read_jsonl, rows_of_step

# Everything is a mistake, nothing is progress, any entropy will do: the first look that the
# cooldown allows triggers. Averages span two steps, and one prompt is enough for a distance.
EAGER = {
    "steps": 9,
    "guide_samples": 3,
    "mistake_pass_rate": 0.9,
    "max_distance": 4,
    "patience": 1,
    "min_gain": 5.0,
    "entropy_drop": -9.0,
    "probe_prompts": 5,
    "probe_samples": 2,
    "confirm_pass_rate": 0.0,
    "cooldown": 3,
    "keep": "none",
    "eval_every": 4,
}
SMALL_CONSTANTS = {"EMA_STEPS": 2, "MIN_SLICE": 1}


# ----------------------------------------------------------------------------------- the pool


def test_pool_admits_releases_ages_and_evicts(monkeypatch):
    monkeypatch.setattr(autonpo, "POOL_SIZE", 3)
    config, pool = AutoNPOConfig(mistake_pass_rate=0.25, max_distance=20), MistakePool()
    pool.observe(1, {70: 0.25, 71: 0.375, 72: 0.0}, config)
    assert pool.failed_at == {70: 1, 72: 1}  # at the threshold, not above it
    pool.observe(5, {72: 0.0, 73: 0.0}, config)
    assert pool.failed_at == {70: 1, 72: 5, 73: 5}  # failed again: as old as its last failure
    pool.observe(9, {73: 0.5}, config)
    assert pool.failed_at == {70: 1, 72: 5}  # solved now: released
    pool.observe(11, {74: 0.0, 75: 0.125}, config)
    assert pool.failed_at == {72: 5, 74: 11, 75: 11}  # full: the oldest goes
    pool.observe(25, {}, config)
    assert pool.failed_at == {74: 11, 75: 11}  # failed 20 steps ago: no distance reaches it
    assert pool.since(10) == [74, 75] and pool.since(11) == []


# ------------------------------------------------------------- the warning, on scripted traces

WATCH = AutoNPOConfig(patience=15, min_gain=0.03, entropy_drop=0.15, cooldown=12)


def warnings(trace, config=WATCH, quiet_until=0) -> list[int]:
    """Steps with a warning in a trace of (reward, entropy)."""
    monitor, found = Monitor(quiet_until=quiet_until), []
    for step, (reward, entropy) in enumerate(trace, 1):
        monitor.observe(step, reward, entropy, config)
        if monitor.warning(step, config):
            found.append(step)
    return found


@pytest.fixture
def short_averages(monkeypatch):
    monkeypatch.setattr(autonpo, "EMA_STEPS", 5)


STEPS = range(1, 201)
CLIMB = [min(0.1 + 0.005 * step, 0.6) for step in STEPS]  # stagnates from step 100
COLLAPSE = [max(1.0 - 0.006 * step, 0.1) for step in STEPS]  # to 0.1 at 150


def test_moving_averages_by_hand(monkeypatch):
    monkeypatch.setattr(autonpo, "EMA_STEPS", 4)
    monitor, trace = Monitor(), [(0.2, 1.0), (0.4, 2.0), (0.0, 0.6), (1.0, 1.2), (0.4, 0.2)]
    for step, (reward, entropy) in enumerate(trace, 1):
        monitor.observe(step, reward, entropy, WATCH)
    # plain means of the first four, then 3/4 old + 1/4 new
    assert monitor.reward == pytest.approx(0.75 * 0.4 + 0.25 * 0.4)
    assert monitor.entropy == pytest.approx(0.75 * 1.2 + 0.25 * 0.2)
    assert monitor.entropies == pytest.approx([1.0, 1.5, 1.2, 1.2, 0.95])
    assert (monitor.best_reward, monitor.best_step) == (pytest.approx(0.4), 4)


def test_collapse_and_stagnation_together_trigger(short_averages):
    """While entropy goes on falling, and some steps more; not for good."""
    found = warnings(zip(CLIMB, COLLAPSE))
    assert 100 < found[0] < 130 and 150 < found[-1] < 170
    assert found == list(range(found[0], found[-1] + 1))


def test_only_the_last_patience_steps_count(monkeypatch):
    monkeypatch.setattr(autonpo, "EMA_STEPS", 1)  # no averages
    config = AutoNPOConfig(patience=3, min_gain=0.5, entropy_drop=0.2, cooldown=1)
    entropies = [9.0, 2.0, 1.9, 1.8, 1.61, 1.55, 1.43, 1.4, 1.4, 1.4]
    # Lost in three steps: 80 % at step 4, 19.5 % at 5, 18.4 % at 6, 20.6 % at 7, then less
    assert warnings([(0.3, e) for e in entropies], config) == [4, 7]
    upwards = dataclasses.replace(config, entropy_drop=-0.1)
    rising = [1.0, 1.0, 1.0, 1.0, 1.09, 1.12, 1.12]
    assert warnings([(0.3, e) for e in rising], upwards) == [4, 5]  # +0, +9 %; then +12 %


def test_no_warning_before_the_past_is_known(monkeypatch):
    """A run that starts at step 40, from a checkpoint."""
    monkeypatch.setattr(autonpo, "EMA_STEPS", 1)
    config, monitor = AutoNPOConfig(patience=3, entropy_drop=0.5, min_gain=0.5), Monitor()
    assert monitor.warning(40, config) is None
    for step, entropy in ((41, 1.6), (42, 0.4), (43, 0.3)):
        monitor.observe(step, 0.7, entropy, config)
        assert monitor.warning(step, config) is None
    monitor.observe(44, 0.7, 0.4, config)
    reason = "no gain of 0.5 since step 41; entropy 0.400, -75% since step 41"
    assert reason in monitor.warning(44, config)


@pytest.mark.parametrize(
    ("reward", "entropy"),
    [
        (CLIMB, [1.0] * 200),  # stagnation alone
        (CLIMB, [1.0 + 0.01 * step for step in STEPS]),  # and with entropy that rises
        (CLIMB, [1.0 - 0.003 * step for step in STEPS]),  # that falls, but by 11 % at most
        ([0.1 + 0.004 * step for step in STEPS], COLLAPSE),  # collapse while the reward climbs
        ([0.5] * 200, [1.0] * 200),  # neither
        ([0.0] * 200, [0.0] * 200),  # a policy with no entropy to lose
    ],
)
def test_neither_alone_triggers(reward, entropy, short_averages):
    assert warnings(zip(reward, entropy)) == []


def test_no_warning_in_the_cooldown(short_averages):
    first = warnings(zip(CLIMB, COLLAPSE))[0]
    found = warnings(zip(CLIMB, COLLAPSE))
    assert warnings(zip(CLIMB, COLLAPSE), quiet_until=140) == list(range(141, found[-1] + 1))
    assert warnings(zip(CLIMB, COLLAPSE), quiet_until=first - 1)[0] == first


def test_the_reason_names_its_numbers(short_averages):
    monitor = Monitor()
    for step in range(1, 131):
        monitor.observe(step, CLIMB[step - 1], COLLAPSE[step - 1], WATCH)
    reason = monitor.warning(130, WATCH)
    assert "reward average 0.600, no gain of 0.03 since step" in reason
    # 0.244 of step 130, 0.334 of step 115: each some 4 steps behind
    assert "entropy 0.244, -27% since step 115" in reason


def warned(trace) -> bool:
    """By the defaults, at a step with a checkpoint."""
    config = AutoNPOConfig()
    return any(step % config.save_every == 0 for step in warnings(trace, config))


@pytest.mark.parametrize(("jitter", "found"), [(0.1, 0), (0.15, 1), (0.2, 36), (0.4, 282)])
def test_false_triggers_on_noise_around_a_level(jitter, found):
    """300 runs of 300 steps: reward jitters by 0.1, entropy by a share of itself. docs/metrics.md
    says how much it is in the worlds."""
    runs = 0
    for seed in range(300):
        noise = random.Random(seed)
        runs += warned((noise.gauss(0.5, 0.1), noise.gauss(0.1, 0.1 * jitter)) for _ in range(300))
    assert runs == found


@pytest.mark.parametrize(("step_size", "found"), [(0.01, 0), (0.02, 24)])
def test_false_triggers_on_random_walks(step_size, found):
    """300 runs of 200 steps. Neither driftless walk knows of the other; an entropy that has lost
    15 % in 20 steps by chance does look like a decline."""
    runs = 0
    for seed in range(300):
        noise, reward, entropy, walk = random.Random(seed), 0.5, 0.1, []
        for _ in range(200):
            reward += noise.gauss(0, step_size)
            entropy *= math.exp(noise.gauss(0, step_size))
            walk.append((reward, entropy))
        runs += warned(walk)
    assert runs == found


# ------------------------------------------------------------------------------- how far back


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


def shaken(policy: Policy, by: float, seed: int) -> Policy:
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=torch.manual_seed(seed))
            parameter.add_(by * noise)
    return policy


@torch.no_grad()
def log_ratios(groups, old: Policy, temperature: float) -> list[float]:
    """log pi(t) - log old of every token, one answer at a time."""
    return [
        mine - theirs
        for group in groups
        for c in group.completions
        for mine, theirs in zip(
            c.behavior_logprobs,
            old.logprobs([(group.encoded, c.token_ids)], temperature)[0][0].tolist(),
        )
    ]


def test_drift_by_hand(fresh, base, prompts, tmp_path):
    """On a policy that has moved; answers of different lengths, of which two are verified; any
    micro-batch. The KL is the mean over tokens."""
    save(base, tmp_path / "old")
    save(shaken(fresh, 0.02, seed=4), tmp_path / "same")
    groups = fresh.sample([prompts[3], prompts[8]], 5, 40, 1.3, seed=5)
    assert len({len(c.token_ids) for group in groups for c in group.completions}) > 1
    terms = log_ratios(groups, base, 1.3)
    expected = sum(terms) / len(terms)
    right = groups[0].completions[1], groups[1].completions[4]
    smallest = []
    for group, answer in zip(groups, right):
        answer.accuracy = 1.0
        alone = Group(group.prompt, group.encoded, [answer])
        smallest.append(math.exp(-max(log_ratios([alone], base, 1.3))))
    for size in (3, 100):
        config = AutoNPOConfig(temperature=1.3, micro_batch_size=size)
        kl, weight = autonpo.drift_since(groups, Policy(tmp_path / "old"), config)
        assert kl == pytest.approx(expected, abs=1e-5) and kl > 0.01
        assert weight == pytest.approx(sum(smallest) / 2, rel=1e-4) and weight < 0.9
    kl, weight = autonpo.drift_since(groups, Policy(tmp_path / "same"), config)
    assert (kl, weight) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-3))
    for answer in right:
        answer.accuracy = 0.0
    assert autonpo.drift_since(groups, Policy(tmp_path / "same"), config)[1] == 0


FAILED = {50: 1, 59: 2, 64: 3, 70: 5, 71: 6}  # row: step


class HandmadeRun(Run):
    """At step 6, with checkpoints of steps 2, 4 and 6, each of a different policy."""

    def __init__(self, out: Path, policy: Policy, prompts, config: AutoNPOConfig):
        self.out, self.policy, self.sampler, self.config = out, policy, policy, config
        self.train_prompts, self.step, self.sampled_tokens = prompts, 6, 100
        self.logged, self.rolled_back = [], []
        policy.eos_token_ids = [2, 7, 12]  # as in `tiny`
        for step in (2, 4, 6):
            memory = {"pool": [[50, 1]], "monitor": {"best_step": step}}
            path = checkpoint_path(out, step)
            save(shaken(policy, 0.01, seed=step), path, step, sampled_tokens=50, memory=memory)

    def log(self, line):
        self.logged.append(line)

    def roll_back(self, step, memory):
        self.rolled_back.append((step, memory))


@pytest.fixture
def handmade(fresh, prompts, tiny, tmp_path, monkeypatch):
    """The run, and what it remembers."""
    monkeypatch.setattr("verifier.is_correct", lucky)
    monkeypatch.setattr(autonpo, "MIN_SLICE", 2)
    config = AutoNPOConfig(**tiny | EAGER | {"probe_samples": 4, "guide_samples": 6})
    memory = Memory(MistakePool(dict(FAILED)), Monitor(best_step=6), GuideCache())
    return HandmadeRun(tmp_path, fresh, prompts, config), memory


def test_what_a_decision_measures(handmade, monkeypatch):
    run, memory = handmade
    run.config = dataclasses.replace(run.config, kl_scale=2.5)
    decision = autonpo.decide(run, memory.pool, "because", run.config)
    groups = autonpo.probe(run, memory.pool, run.config)  # the same again: its seed is the step's
    assert sorted(groups) == sorted(FAILED)
    rates = {row: group.pass_rate for row, group in groups.items()}
    assert len(set(rates.values())) > 1
    spent = sum(len(c.token_ids) for group in groups.values() for c in group.completions)
    assert run.sampled_tokens == 100 + 2 * spent
    assert (decision.step, decision.reason, decision.probed) == (6, "because", 5)
    assert decision.pass_rate == pytest.approx(sum(rates.values()) / 5)
    slices = {2: [70, 71], 4: [64, 70, 71]}  # failed since then; 6, now itself, is no distance
    assert [row["distance"] for row in decision.table] == [2, 4]
    for row in decision.table:
        mine = slices[row["distance"]]
        assert row["prompts"] == len(mine)
        assert row["quality"] == pytest.approx(sum(rates[one] for one in mine) / len(mine))
        old = Policy(checkpoint_path(run.out, 6 - row["distance"]))
        terms = log_ratios(groups.values(), old, run.config.temperature)
        assert row["variance"] == pytest.approx(math.exp(2.5 * sum(terms) / len(terms)), rel=1e-4)
        assert row["signal"] == pytest.approx(row["quality"] / row["variance"])
        weight = autonpo.drift_since(list(groups.values()), old, run.config)[1]
        assert row["pull"] == pytest.approx(row["quality"] * weight) and 0 < weight < 1
    assert decision.left_out == {}
    alone = dataclasses.replace(run.config, kl_scale=1.0)  # V^ = exp(KL)
    plain = [row["variance"] for row in autonpo.decide(run, memory.pool, "", alone).table]
    assert [v**2.5 for v in plain] == pytest.approx([row["variance"] for row in decision.table])
    huge = dataclasses.replace(run.config, kl_scale=1e9)  # whose exp would overflow
    capped = autonpo.decide(run, memory.pool, "", huge).table
    assert [row["variance"] for row in capped] == [math.exp(700)] * 2
    monkeypatch.setattr(autonpo, "drift_since", lambda *_: (0.0, 1.0))
    near = dataclasses.replace(run.config, max_distance=2)
    assert [row["distance"] for row in autonpo.decide(run, memory.pool, "", near).table] == [2]
    rare = dataclasses.replace(run.config, save_every=4)
    for start, distances in ((0, [2]), (2, [2, 4])):  # where it started it can always go back to
        run.start_step = start
        table = autonpo.decide(run, memory.pool, "", rare).table
        assert [row["distance"] for row in table] == distances
    monkeypatch.setattr(autonpo, "MIN_SLICE", 3)  # two prompts are too few
    decision = autonpo.decide(run, memory.pool, "", run.config)
    assert [row["distance"] for row in decision.table] == [4] and decision.left_out == {2: 2}


def test_exactly_the_chosen_slice_is_cached_and_weights_go_back(handmade, monkeypatch):
    """Decided otherwise after a kill, the cache is made anew."""
    run, memory = handmade
    for distance, slice_ in ((4, [64, 70, 71]), (2, [70, 71])):
        monkeypatch.setattr(autonpo, "select_rollback", lambda *_, d=distance: d)
        after = autonpo.intervene(run, memory, "because", run.config)
        lines = read_jsonl(run.out / "guide_000006.jsonl")[1:]
        assert [line["prompt_id"] for line in lines] == [run.train_prompts[r].id for r in slice_]
        monitor = {"best_step": 6 - distance, "quiet_until": 9}
        stored = {"pool": [[50, 1]], "monitor": monitor, "guided_until": 6}
        assert run.rolled_back.pop() == (6 - distance, stored)
        assert (after.pool.failed_at, after.monitor) == ({50: 1}, Monitor(**monitor))
        assert (after.cache.until, after.cache.header["prompts"]) == (6, len(slice_))
        line = run.logged.pop()
        assert (line["step"], line["autonpo/distance"]) == (7, distance)
        assert f"of {len(slice_)} mistakes until step 6" in line["autonpo/decision"]
        assert line["sampled_tokens"] == run.sampled_tokens


def test_a_rollback_keeps_answers_for_all_slots(handmade, monkeypatch):
    run, memory = handmade
    run.config = dataclasses.replace(run.config, slots=2, guide_samples=16)
    monkeypatch.setattr(autonpo, "select_rollback", lambda *_: 4)
    cache = autonpo.intervene(run, memory, "because", run.config).cache
    assert max(len(found[:2]) for found in cache.answers.values()) == 2


def test_no_rollback_without_a_single_answer_to_guide_with(handmade, monkeypatch):
    run, memory = handmade
    monkeypatch.setattr(autonpo, "select_rollback", lambda *_: 4)
    monkeypatch.setattr("verifier.is_correct", lambda *_: False)
    assert autonpo.intervene(run, memory, "because", run.config) is memory
    assert run.rolled_back == [] and memory.monitor.quiet_until == 9
    (line,) = run.logged
    assert line["autonpo/distance"] == 0
    assert "solves 0 of 3 mistakes" in line["autonpo/decision"]


def test_a_decision_on_the_terminal():
    row = {"distance": 20, "prompts": 9, "quality": 0.25, "variance": 1.5, "signal": 1 / 6}
    row["pull"] = 0.125
    made = autonpo.Decision(40, "flat", 12, 0.375, [row], {10: 5}, 20, "back to step 20")
    assert str(made) == (
        "after step 40: warning: flat\n  probe of 12 mistakes: 0.38 solved\n"
        "  D   10   left out: only 5 prompts\n"
        "  D   20   Q^ 0.250 of   9 prompts   V^ 1.5000   S^ 0.167   pull^ 0.125\n"
        "  back to step 20"
    )


def test_memory_survives_a_checkpoint(tmp_path):
    config, memory = AutoNPOConfig(), Memory.of({}, tmp_path, AutoNPOConfig())
    groups = [group_of([0.0, 0.0, 1.0, 0.0]), group_of([1.0, 1.0, 0.0, 1.0])]
    rates = {row: group.pass_rate for row, group in zip([70, 71], groups)}
    logged = memory.observe(3, rates, answer_metrics(groups), config)
    assert memory.pool.failed_at == {70: 3}
    assert logged == {
        "autonpo/reward": pytest.approx(0.1 + 0.9 * 0.5),
        "autonpo/entropy": pytest.approx(0.375),
        "autonpo/pool": 1,
    }
    stored = json.loads(json.dumps(memory.stored()))
    assert Memory.of(stored, tmp_path, config) == memory and stored["guided_until"] == 0


# --------------------------------------------------------------------------------- whole runs


def train(out: Path, tiny: dict, constants=SMALL_CONSTANTS, whole=False, **flags) -> AutoNPOConfig:
    """A run with the lucky verifier; `whole` with its report."""
    config = AutoNPOConfig(out=str(out), **tiny | EAGER | flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verifier.is_correct", lucky)
        for name, value in constants.items():
            patch.setattr(autonpo, name, value)
        autonpo.main(config) if whole else autonpo.train(config, out)
    return config


def contents(out: Path) -> dict:
    """All that a run leaves, but for times."""
    kinds = (".safetensors", ".pt", ".jsonl")
    files = [p for p in out.rglob("*") if p.suffix in kinds or p.name == "state.json"]
    found = {str(path.relative_to(out)): path.read_bytes() for path in files}
    lines = read_jsonl(out / "metrics.jsonl")
    found["metrics.jsonl"] = [
        {key: value for key, value in line.items() if "time" not in key} for line in lines
    ]
    return found


def decisions_of(out: Path) -> list[dict]:
    return [line for line in read_jsonl(out / "metrics.jsonl") if "autonpo/decision" in line]


@pytest.fixture(scope="module")
def eager(tiny, tmp_path_factory) -> tuple[AutoNPOConfig, Path]:
    out = tmp_path_factory.mktemp("auto") / "run"
    return train(out, tiny, whole=True), out


def test_decisions_are_logged_with_reason_and_table(eager):
    config, out = eager
    decisions = decisions_of(out)
    assert any(line["autonpo/distance"] for line in decisions)
    for line in decisions:
        assert line["autonpo/step"] % config.save_every == 0
        assert line["step"] == line["autonpo/step"] + 1
        assert "no gain of 5" in line["autonpo/reason"]
        table = line["autonpo/table"]
        for row in table:
            assert 0 < row["distance"] <= config.max_distance
            assert 0 <= row["quality"] <= 1 and row["variance"] > 0
        q, v = ({row["distance"]: row[key] for row in table} for key in ("quality", "variance"))
        assert line["autonpo/distance"] == select_rollback(q, v)
    assert json.loads((out / "summary.json").read_text())["decisions"] == decisions
    assert (out / "curves.png").stat().st_size > 20_000
    steps = [line["autonpo/step"] for line in decisions]
    assert len(steps) >= 2 and all(b - a > config.cooldown for a, b in zip(steps, steps[1:]))


def test_a_rollback_replays_the_same_prompts_with_the_chosen_slice_guided(eager):
    config, out = eager
    lines = read_jsonl(out / "metrics.jsonl")
    first = next(line for line in lines if line.get("autonpo/distance"))
    now, back = first["autonpo/step"], first["autonpo/step"] - first["autonpo/distance"]
    replay = [line for line in lines if line.get("rollbacks") == 1 and "loss" in line]
    assert [line["step"] for line in replay][: now - back] == list(range(back + 1, now + 1))
    header, *cache = read_jsonl(out / f"guide_{now:06d}.jsonl")
    assert (header["guide_step"], header["until"]) == (now, now)  # the guide is the policy itself
    asked = {row for step in range(back + 1, now + 1) for row in rows_of_step(2048, step, config)}
    assert {int(line["prompt_id"].rsplit(":", 1)[-1]) for line in cache} <= asked and cache
    guided = [line for line in replay if line.get("npo/guide_frac")]
    assert guided and all(line["npo/distance"] == now - line["step"] >= 0 for line in guided)
    assert all("npo/guide_frac" not in line for line in replay if line["step"] > now)
    # until its first update the replay is the first pass: same prompts, same seed, same answers
    before = next(line for line in lines if line["step"] == back + 1 and "loss" in line)
    for key in ("accuracy", "entropy"):
        assert replay[0][key] == before[key]


def test_every_token_is_counted_and_none_comes_back(eager):
    _, out = eager
    lines = read_jsonl(out / "metrics.jsonl")
    tokens = [line["sampled_tokens"] for line in lines]
    assert tokens == sorted(tokens)
    decision = next(line for line in lines if line.get("autonpo/distance"))
    place, now = lines.index(decision), decision["autonpo/step"]
    _, *cache = read_jsonl(out / f"guide_{now:06d}.jsonl")
    cached = sum(line["sampled_tokens"] for line in cache)
    assert tokens[place] - tokens[place - 1] > cached > 0  # the probe's tokens on top
    assert lines[place + 1]["step"] == now - decision["autonpo/distance"] + 1


def test_the_present_lineage_has_one_line_a_step(eager):
    config, out = eager
    lines = current_lineage(read_jsonl(out / "metrics.jsonl"))
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, config.steps + 1))
    for before, after in zip(steps, steps[1:]):  # of two steps, of the policy's own answers
        for key in ("reward", "entropy"):
            mean = (before[f"autonpo/{key}"] + after[key]) / 2
            assert after[f"autonpo/{key}"] == pytest.approx(mean)
    evals = [line["step"] for line in evaluations(out)]
    assert evals == sorted(set(evals)) and evals[-1] == config.steps


def test_disk_use_is_bounded(eager):
    config, out = eager
    kept = [step_of(path) for path in checkpoints(out)]
    assert kept == [6, 8, 9]  # what lies within --max-distance 4 of step 9
    assert not list(out.glob("checkpoints/*.tmp"))


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory) -> Path:
    """Six steps of GRPO."""
    out = tmp_path_factory.mktemp("grpo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verifier.is_correct", lucky)
        grpo.train(grpo.GRPOConfig(steps=6, keep="none", **tiny | {"eval_every": 4}), out)
    return out


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ({"entropy_drop": 0.99}, False),  # stagnant, but its entropy is there
        ({"confirm_pass_rate": 0.99}, True),  # a warning that the probe does not confirm
    ],
)
def test_a_run_without_a_rollback_is_grpo_bit_by_bit(plain, tiny, tmp_path, flags, warned):
    train(tmp_path / "auto", tiny, steps=6, **flags)
    mine, theirs = (checkpoint_path(out, 6) for out in (tmp_path / "auto", plain))
    for name in ("model.safetensors", "optimizer.pt"):
        assert (mine / name).read_bytes() == (theirs / name).read_bytes()
    decisions = decisions_of(tmp_path / "auto")
    assert bool(decisions) is warned
    assert all(line["autonpo/decision"].startswith("stay: fewer than 99%") for line in decisions)
    own = [line for line in read_jsonl(tmp_path / "auto/metrics.jsonl") if line not in decisions]
    differ = {"time/generate", "time/train", "step_time"}
    differ |= {"sampled_tokens"} if warned else set()  # the probe's count, too
    for mine, theirs in zip(own, read_jsonl(plain / "metrics.jsonl"), strict=True):
        assert all(mine[key] == theirs[key] for key in theirs.keys() - differ)


def test_no_candidate_and_an_empty_pool_are_said(tiny, tmp_path):
    train(tmp_path / "few", tiny, {"EMA_STEPS": 2, "MIN_SLICE": 50}, steps=5)
    words = [line["autonpo/decision"] for line in decisions_of(tmp_path / "few")]
    assert words == ["stay: no checkpoint has 50 probed mistakes after it"]
    constants = {"EMA_STEPS": 2, "MIN_SLICE": 2, "POOL_SIZE": 1}
    train(tmp_path / "none", tiny, constants, steps=5, mistake_pass_rate=0.0, max_distance=2)
    words = [line["autonpo/decision"] for line in decisions_of(tmp_path / "none")]
    assert words and all(line.startswith("stay") for line in words)


def test_without_is_correction_guided_ratios_start_at_one(tiny, tmp_path):
    train(tmp_path, tiny, is_correction=False, steps=5)
    lines = [line for line in read_jsonl(tmp_path / "metrics.jsonl") if line.get("npo/guide_frac")]
    ratios = [line[f"npo/guide_ratio_{name}"] for line in lines for name in ("min", "max")]
    assert ratios and set(ratios) == {1.0}


# -------------------------------------------------------------------------------------- kills


class Killed(BaseException):
    """No `except Exception` sees it."""


def die_at(patch, module, name: str, call: int, after: bool = False) -> None:
    """The process dies at that call of a function, or just after it."""
    real, calls = getattr(module, name), []

    def mortal(*args, **options):
        calls.append(1)
        if len(calls) == call and not after:
            raise Killed
        found = real(*args, **options)
        if len(calls) == call:
            raise Killed
        return found

    patch.setattr(module, name, mortal)


KILLS = [
    (run_module, "save_checkpoint", 1, False),  # before the base is saved
    (run_module, "save_checkpoint", 1, True),  # before anything is logged
    (autonpo, "update", 3, False),  # in an ordinary step
    (Run, "log", 4, True),  # a step's metrics are logged, its sample is not
    (autonpo, "probe", 1, False),  # at the warning
    (autonpo.verifier, "score", 8, False),  # somewhere in probe or steps
    (autonpo, "drift_since", 1, True),  # in the middle of the table
    (autonpo, "build_guide_cache", 1, False),
    (autonpo, "build_guide_cache", 1, True),  # nothing but the cache is there
    (Run, "roll_back", 1, False),  # the decision is logged, and not carried out
    (Run, "_load", 2, True),  # weights are back, the checkpoint does not say so yet
    (Run, "_forget_after", 1, False),  # gone back, and the later checkpoints are still there
    (Run, "roll_back", 2, False),  # in a second intervention
    (Run, "roll_back", 2, True),
    (run_module, "guide_metrics", 1, True),  # in the guided segment
    (run_module, "remove_checkpoint", 1, False),
]


@pytest.mark.parametrize(
    ("module", "name", "call", "after"),
    [
        (Run, "_forget_after", 1, True),  # gone back, and nothing but state.json says so
        *(pytest.param(*kill, marks=pytest.mark.slow) for kill in KILLS),
    ],
)
def test_killed_anywhere_and_resumed_is_the_same_run(
    eager, tiny, tmp_path, module, name, call, after
):
    _, whole = eager
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, module, name, call, after)
        with pytest.raises(Killed):
            train(tmp_path / "run", tiny)
    train(tmp_path / "run", tiny)
    assert contents(tmp_path / "run") == contents(whole)


@pytest.mark.slow
def test_killed_in_the_middle_of_the_cache(eager, tiny, tmp_path):
    _, whole = eager
    out, sampled = tmp_path / "run", Policy.sample

    def mortal(self, prompts, group_size, *rest):
        files = list(out.glob("guide_*.jsonl"))
        if group_size == EAGER["guide_samples"] and files and len(read_jsonl(files[0])) > 1:
            raise Killed
        return sampled(self, prompts, group_size, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "sample", mortal)
        with pytest.raises(Killed):
            train(out, tiny)
    train(out, tiny)
    assert contents(out) == contents(whole)


def test_what_a_kill_left_of_a_checkpoint_is_cleared(tiny, tmp_path):
    train(tmp_path, tiny, steps=2)
    for name in ("step_000002.tmp", "step_000008.tmp"):  # half removed, half written
        (tmp_path / "checkpoints" / name).mkdir()
    train(tmp_path, tiny, steps=3)  # a run may go on for longer
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.suffix] == []
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["step"] == 3


def test_a_directory_with_nothing_but_a_base_is_not_another_runs(tiny, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, Run, "evaluate", 1)
        with pytest.raises(Killed):
            train(tmp_path, tiny)
    assert not (tmp_path / "metrics.jsonl").exists()
    with pytest.raises(UsageError, match="seed 0 there and 7 here"):
        train(tmp_path, tiny, seed=7)


# ---------------------------------------------------------------------------------- the flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"patience": 0}, "--patience 0"),
        ({"cooldown": 0}, "--cooldown 0"),
        ({"probe_samples": 0}, "--probe-samples 0"),
        ({"probe_prompts": 7}, "--probe-prompts 7: must be at least 8"),
        ({"mistake_pass_rate": -0.1}, "--mistake-pass-rate -0.1"),
        ({"entropy_drop": 1.0}, "--entropy-drop 1.0"),
        ({"kl_scale": 0.0}, "--kl-scale 0.0"),
        ({"confirm_pass_rate": 1.0}, "--confirm-pass-rate 1.0"),
        ({"max_distance": 5}, "--max-distance 5: must be at least 10"),
        ({"min_gain": -1.0}, "--min-gain -1.0"),
        ({"gate": 1.5}, "--gate 1.5"),
    ],
)
def test_bad_flags(flags, message):
    AutoNPOConfig().check()
    with pytest.raises(UsageError, match=message):
        AutoNPOConfig(**flags).check()


def test_every_flag_of_the_trigger_says_who_chose_it():
    found = flag_comments(AutoNPOConfig)
    trigger = {name: text for name, (heading, text) in found.items() if heading == "trigger"}
    assert len(trigger) == 10
    assert all(text.endswith("not in our sources") for text in trigger.values())
    assert not {"intervention", "scout_steps", "guide"} & found.keys()  # flags without an effect
