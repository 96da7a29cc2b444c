"""Slot replacement, the guide's ratio, the interventions, and that nothing else changed."""

import copy
import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import group_of, lucky
from safetensors.torch import load_file

import grpo
import npo
from grpo import GRPOConfig
from npo import GuidedConfig, NPOConfig, replace_slot
from plumbing import UsageError, run
from plumbing.checkpoints import checkpoint_path, checkpoint_state
from plumbing.data import load_prompts
from plumbing.encode import check_start
from plumbing.guide_cache import VERSION, GuideCache, cache_fingerprints, line_of
from plumbing.rollout import Completion, Prompt
from plumbing.run import derived_seed, read_jsonl, rows_of_step
from worlds import cards

LOGPROBS = [-0.1, -0.2, -0.3]
GUIDE = Completion("p", [9, 9, 9], LOGPROBS, "guided", True, "guide@40", accuracy=1.0, reward=1.0)
GUIDED = {"guide_samples": 4, "scout_steps": 2}


@pytest.mark.parametrize(
    ("accuracies", "gate", "replaced"),
    [
        ([0, 0, 0, 0], 0.6, True),
        ([1, 0, 0, 1], 0.5, True),  # at the gate
        ([1, 1, 0, 1], 0.6, False),
        ([1, 1, 0, 1], 0.75, True),
        ([1, 1, 1, 1], 1.0, True),
        ([0, 0, 0, 1], 0.0, False),  # the last slot counts, although it may be replaced
        ([0, 0, 0, 0], 0.0, True),
    ],
)
def test_replace_slot(accuracies, gate, replaced):
    group = group_of([float(a) for a in accuracies])
    before = copy.deepcopy(group)
    mixed = replace_slot(group, GUIDE, gate)
    assert group == before  # never mutates its argument
    assert (mixed is group) is not replaced
    assert mixed.completions[:-1] == group.completions[:-1]
    assert mixed.completions[-1] == (GUIDE if replaced else group.completions[-1])


def test_no_guide_no_replacement_and_the_default_gate_is_the_papers():
    group = group_of([0.0, 0.0, 0.0])
    assert replace_slot(group, None) is group
    at_the_gate = group_of([1.0, 1.0, 1.0, 0.0, 0.0])
    assert replace_slot(at_the_gate, GUIDE).completions[-1] is GUIDE
    assert NPOConfig().gate == 0.6


def test_several_answers_take_the_last_slots_by_one_decision_of_the_gate():
    group, other = group_of([1.0, 0.0, 0.0, 1.0, 0.0]), dataclasses.replace(GUIDE, text="other")
    mixed = replace_slot(group, [GUIDE, other], 0.4)  # 2 of 5 right, and one of them goes
    assert mixed.completions == [*group.completions[:3], GUIDE, other]
    assert mixed.completions[3] is GUIDE and group.completions[3].text == "answer 3"
    assert (
        replace_slot(group, [GUIDE, other], 0.39) is group and replace_slot(group, [], 1) is group
    )
    twice = replace_slot(group, [GUIDE, GUIDE], 0.4)  # equal texts count
    assert twice.completions[3:] == [GUIDE, GUIDE]
    assert replace_slot(group, [GUIDE], 0.4).completions == [*group.completions[:4], GUIDE]


def test_the_gate_sees_accuracy_not_reward():
    group = group_of([0.0, 0.0, 1.0])
    for completion in group.completions:
        completion.reward = 1.0
    assert replace_slot(group, GUIDE, 0.5).completions[-1] is GUIDE


@pytest.fixture
def guided(base, prompts):
    """Two failed groups, an answer of a guide for the first, and the ratios that it must have."""
    groups = base.sample([prompts[1], prompts[2]], 4, 40, 1.0, seed=1)
    for group in groups:
        for completion in group.completions:
            completion.accuracy, completion.reward = 0.0, 0.1
    other = base.sample([prompts[1]], 1, 40, 1.0, seed=2)[0].completions[0]
    ratios = torch.linspace(0.3, 1.6, len(other.token_ids)).tolist()
    recorded = [lp - math.log(r) for lp, r in zip(other.behavior_logprobs, ratios)]
    facts = {"source": "guide@7", "accuracy": 1.0, "reward": 1.0}
    return groups, dataclasses.replace(other, behavior_logprobs=recorded, **facts), ratios


def spy(monkeypatch) -> list[tuple]:
    """(arguments, per-token results) of every call of the objective."""
    calls, original = [], grpo.clipped_policy_loss

    def watched(*arguments):
        loss, per_token = original(*arguments)
        calls.append((arguments, per_token))
        return loss, per_token

    monkeypatch.setattr(grpo, "clipped_policy_loss", watched)
    return calls


def test_the_guides_ratio_is_policy_over_guide(base, guided, monkeypatch):
    """q are the recorded log-probs; the gradient against the formula, token by token."""
    groups, guide, ratios = guided
    mixed, calls = [replace_slot(groups[0], guide, 0.6), groups[1]], spy(monkeypatch)
    config = NPOConfig(clip_low=0.25, clip_high=0.35)
    stats = grpo.update(base, torch.optim.SGD(base.parameters(), lr=0.0), mixed, config)
    monkeypatch.undo()
    assert stats["npo/guide_ratio_mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-3)
    assert stats["npo/guide_ratio_min"] == pytest.approx(0.3, rel=1e-3)
    assert stats["npo/guide_ratio_max"] == pytest.approx(1.6, rel=1e-3)
    assert stats["frac_reward_zero_std"] == 0.5
    logprobs, old, advantages, mask = calls[0][0][:4]
    assert advantages.tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5], abs=1e-3)  # of all four
    free, length = logprobs.detach().requires_grad_(), len(guide.token_ids)
    grpo.clipped_policy_loss(free, old, advantages, mask, 0.25, 0.35, 8)[0].backward()
    kept = [r if r <= 1.35 else 0.0 for r in ratios]  # A > 0: clipped from above only
    expected = [-r * 1.5 / length / 8 for r in kept]
    assert free.grad[3, :length].tolist() == pytest.approx(expected, rel=2e-3, abs=1e-9)


def test_without_is_correction_the_ratio_starts_at_one(fresh, guided, monkeypatch):
    """And at the second update of the batch it is pi_new / pi_before, no longer 1."""
    groups, guide, _ = guided
    plain = dataclasses.replace(guide, behavior_logprobs=None)
    mixed, calls = [replace_slot(groups[0], plain, 0.6), groups[1]], spy(monkeypatch)
    config = NPOConfig(updates_per_batch=2)
    grpo.update(fresh, torch.optim.AdamW(fresh.parameters(), lr=1e-2), mixed, config)
    length = len(guide.token_ids)
    first, second = (per_token["ratio"][3, :length] for _, per_token in calls)
    assert (first == 1).all() and (second - 1).abs().max() > 1e-2
    before, denominator = calls[0][0][0][3].detach(), calls[1][0][1][3]
    assert torch.equal(before, denominator)


def digest(path: Path) -> str:
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()


def test_npo_with_an_empty_cache_is_grpo_bit_by_bit(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("verifier.is_correct", lucky)
    grpo.train(GRPOConfig(steps=3, **tiny), tmp_path / "grpo")
    npo.train(NPOConfig(steps=3, **tiny), tmp_path / "npo", GuideCache(), None)
    mine, theirs = (digest(checkpoint_path(tmp_path / name, 3)) for name in ("npo", "grpo"))
    assert mine == theirs != digest(cards.BASE)
    mine, theirs = (read_jsonl(tmp_path / name / "samples.jsonl") for name in ("npo", "grpo"))
    assert mine == theirs and len(mine) == 3


def test_prompts_of_a_step_depend_on_seed_and_step_alone():
    config = NPOConfig(seed=5, prompts_per_step=300)
    first = rows_of_step(2048, 1, config)
    assert first == rows_of_step(2048, 1, config)
    epoch = [row for step in range(1, 8) for row in rows_of_step(2048, step, config)]
    assert len(set(epoch[:2048])) == 2048  # each once an epoch, also where a step spans two
    assert set(epoch[2048:]) <= set(epoch[:2048]) and epoch[2048:] != epoch[:52]
    assert first != rows_of_step(2048, 1, NPOConfig(seed=6, prompts_per_step=300))
    assert derived_seed(0, "sample", 1) != derived_seed(0, "sample", 2)


# ------------------------------------------------------------- every flag of the method acts

FLAGS = {
    "prompts_per_step": 3,
    "group_size": 4,
    "max_new_tokens": 9,
    "temperature": 1.2,
    "updates_per_batch": 3,
    "clip_low": 0.9,
    "clip_high": 5.0,
    "lr": 5e-3,
    "weight_decay": 0.5,
    "max_grad_norm": 0.01,
    "gate": 0.0,
    "slots": 2,
    "is_correction": False,
}
# Two updates per batch, so that the policy's own ratios leave the clip range, too
ACTIVE = {"lr": 1e-2, "updates_per_batch": 2, "group_size": 3, "eval_prompts": 1, "steps": 1}


@pytest.fixture(scope="module")
def after_one_step(base, tiny, tmp_path_factory):
    """Trains one step, guided on every prompt, and returns the parameters after it."""
    out, config = tmp_path_factory.mktemp("flags"), NPOConfig(**tiny)
    train_prompts, _ = load_prompts(config)
    prompts = [train_prompts[row] for row in rows_of_step(2048, 1, NPOConfig(prompts_per_step=3))]
    header = {"version": VERSION, **cache_fingerprints(config), "guide_step": 9, "until": 9}
    header |= {"prompts": 3, "samples": 1, "guide_sampled_tokens": 0}
    lines = [header]
    for group in base.sample(prompts, 2, 9, 1.7, seed=4):
        for answer in group.completions:
            answer.accuracy, answer.reward, answer.finished = 1.0, 1.0, True
            ratios = [(0.5, 1.1, 2.5)[place % 3] for place in range(len(answer.token_ids))]
            answer.behavior_logprobs = [
                min(logprob - math.log(ratio), 0.0)
                for logprob, ratio in zip(answer.behavior_logprobs, ratios)
            ]
        lines.append(line_of(len(lines), group, 9, 2))
    (out / "guide.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def train(**flags) -> torch.Tensor:
        path = out / f"run{len(list(out.iterdir()))}"
        guide = {"guide": str(out / "guide.jsonl"), "out": str(path)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("verifier.is_correct", lucky)
            npo.intervene(NPOConfig(**tiny | ACTIVE | guide | flags), path)
        step = read_jsonl(path / "metrics.jsonl")[1]
        assert step["grad_norm"] > 0 and step["npo/guide_frac"] > 0
        weights = load_file(checkpoint_path(path, 1) / "model.safetensors")
        return torch.cat([weights[name].flatten() for name in sorted(weights)])

    return train


@pytest.fixture(scope="module")
def by_default(after_one_step):
    return after_one_step()


def test_every_flag_of_the_method_is_tried(by_default, after_one_step):
    named = GRPOConfig.__annotations__.keys() | GuidedConfig.__annotations__.keys()
    # guide_samples acts when a cache is made: tests/test_guide_cache.py
    assert FLAGS.keys() == named - {"out", "guide_samples"}, "give each flag another value here"
    assert torch.equal(after_one_step(), by_default)  # so a difference is the flag's


@pytest.mark.parametrize(("flag", "value"), FLAGS.items())
def test_every_flag_of_the_method_changes_the_parameters(after_one_step, by_default, flag, value):
    assert (after_one_step(**{flag: value}) - by_default).abs().max() > 1e-4


# ---------------------------------------------------------------------------- interventions


@pytest.fixture(scope="module")
def early(tiny, tmp_path_factory):
    """A whole early run, 2 + 3 steps."""
    out = tmp_path_factory.mktemp("early") / "run"
    config = NPOConfig(steps=3, out=str(out), **tiny, **GUIDED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verifier.is_correct", lucky)
        npo.main(config)
    return config, out


def ids_of_steps(config, steps) -> list[str]:
    prompts, _ = load_prompts(config)
    return [prompts[row].id for step in steps for row in rows_of_step(2048, step, config)]


def test_early_writes_the_whole_run_directory(early):
    config, out = early
    written = ("metrics.jsonl", "samples.jsonl", "guide.jsonl", "curves.png")
    for name in (*written, "scout/metrics.jsonl"):
        assert (out / name).is_file(), name
    for path in (
        checkpoint_path(out, 2),
        checkpoint_path(out, 3),
        checkpoint_path(out / "scout", 2),
    ):
        inside = {file.name for file in path.iterdir()}
        assert inside > {"model.safetensors", "optimizer.pt", "state.json"}
    assert not list(out.rglob("*tmp*"))
    stored = json.loads((out / "config.json").read_text())
    assert stored == json.loads(json.dumps(dataclasses.asdict(config)))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["scout"]["steps"] == 2


def test_costs_of_scout_and_cache_are_counted(early):
    _, out = early
    scout = checkpoint_state(checkpoint_path(out / "scout", 2))["sampled_tokens"]
    header, *lines = read_jsonl(out / "guide.jsonl")
    cache = sum(line["sampled_tokens"] for line in lines)
    metrics = read_jsonl(out / "metrics.jsonl")
    assert header["guide_sampled_tokens"] == scout > 0 and cache > 0
    assert metrics[0]["sampled_tokens"] == scout + cache
    assert metrics[-1]["sampled_tokens"] > metrics[1]["sampled_tokens"] > scout + cache


def test_the_cache_holds_the_guided_steps_prompts_once_each(early):
    config, out = early
    header, *lines = read_jsonl(out / "guide.jsonl")
    assert [line["prompt_id"] for line in lines] == ids_of_steps(config, (1, 2))  # not step 3
    assert (header["guide_step"], header["until"], header["prompts"]) == (2, 2, 4)


def test_metrics_of_guidance(early):
    _, out = early
    metrics = read_jsonl(out / "metrics.jsonl")
    used = [line for line in metrics if line.get("npo/guide_frac")]
    assert used and all(line["npo/distance"] == 2 - line["step"] for line in used)
    assert metrics[-1]["npo/guide_frac"] == 0 and "npo/distance" not in metrics[-1]
    shown = [line for line in read_jsonl(out / "samples.jsonl") if "guide" in line]
    assert [line["step"] for line in shown] == [line["step"] for line in used]
    assert shown[0]["source"] == "guide@2" and shown[0]["policy"] != shown[0]["guide"]


@pytest.mark.parametrize("intervention", ["late", "early+late"])
def test_late_rolls_back_weights_and_optimizer(tiny, tmp_path, monkeypatch, intervention):
    monkeypatch.setattr("verifier.is_correct", lucky)
    out, when = tmp_path / "run", {"intervention": intervention, "plateau_end": 4, "steps": 5}
    config = NPOConfig(out=str(out), plateau_start=2, **when, **tiny, **GUIDED)
    npo.intervene(config, out)
    scout = out / "scout"
    assert (scout / "scout").is_dir() is (intervention == "early+late")
    steps = [line["step"] for line in read_jsonl(out / "metrics.jsonl")]
    assert steps == [2, 3, 4, 5]  # from the plateau's start, evaluated, to the end
    header, *lines = read_jsonl(out / "guide.jsonl")
    assert header["guide_step"] == 4
    assert [line["prompt_id"] for line in lines] == ids_of_steps(config, (3, 4))
    if intervention == "late":  # without a guide the replay is the scout, Adam's moments included
        again = tmp_path / "again"
        config = dataclasses.replace(config, steps=4)
        npo.train(config, again, GuideCache(), checkpoint_path(scout, 2))
        mine, theirs = checkpoint_path(again, 4), checkpoint_path(scout, 4)
        assert digest(mine) == digest(theirs) != digest(checkpoint_path(scout, 2))


def test_late_needs_no_step_that_is_saved_anyway(tiny, tmp_path, monkeypatch):
    """The scout saves at --plateau-start, wherever it lies, and keeps it."""
    monkeypatch.setattr(run.Run, "evaluate", lambda *_: {"eval/accuracy": 0.0})
    late = {"intervention": "late", "plateau_start": 1, "plateau_end": 2, "keep": "none"}
    config = NPOConfig(steps=2, out=str(tmp_path), **tiny, **GUIDED, **late)
    assert npo.go_ahead(config, tmp_path / "scout") == str(checkpoint_path(tmp_path / "scout", 2))
    assert checkpoint_state(checkpoint_path(tmp_path / "scout", 1))["step"] == 1


def test_a_guide_that_comes_too_late_or_has_no_checkpoint_beside_it(early, tmp_path):
    config, out = early
    late = {
        "intervention": "late",
        "plateau_end": 3,
        "guide": str(checkpoint_path(out / "scout", 2)),
    }
    config = dataclasses.replace(config, out=str(tmp_path / "run"), **late, plateau_start=2)
    with pytest.raises(UsageError, match="no step to guide, from step 3 until step 2"):
        npo.intervene(config, tmp_path / "run")
    config = dataclasses.replace(config, plateau_start=1)
    with pytest.raises(UsageError, match="--plateau-start 1: .*step_000001 does not exist"):
        npo.intervene(config, tmp_path / "other")


def test_a_cache_is_a_guide_too_and_until_can_be_given(early, tmp_path):
    config, out = early
    given = {"guide": str(out / "guide.jsonl"), "guided_until": 1, "out": str(tmp_path / "run")}
    config = dataclasses.replace(config, **given)
    cache = npo.ask_guide(config, config.guide, 1, tmp_path / "unused.jsonl")
    assert (cache.until, cache.header["until"], cache.header["guide_step"]) == (1, 2, 2)
    assert not (tmp_path / "unused.jsonl").exists()


# ------------------------------------------------------- no future at all, and another start


def test_a_policy_is_its_own_guide(tiny, tmp_path, monkeypatch):
    """D = 0: only failed prompts are asked again, live; the answers fill slots and are counted."""
    monkeypatch.setattr("verifier.is_correct", lucky)
    more = {"guide": "self", "guide_samples": 24, "slots": 2, "gate": 0.3, "guided_until": 2}
    config = NPOConfig(steps=3, out=str(tmp_path / "run"), **tiny | more)
    config.check()
    asked, mixes, original = [], [], npo.answers_for

    def watched(groups, step, cache, run):
        before = run.sampled_tokens
        found = original(groups, step, cache, run)
        asked.append((step, groups, found, run.sampled_tokens - before))
        return found

    def updated(policy, optimizer, mixed, config):
        mixes.append(mixed)
        return grpo.update(policy, optimizer, mixed, config)

    monkeypatch.setattr(npo, "answers_for", watched)
    monkeypatch.setattr(npo, "update", updated)
    npo.main(config)
    seen = set()
    for (step, groups, found, tokens), mixed in zip(asked, mixes):
        opened = [step <= 2 and group.pass_rate <= 0.3 for group in groups]
        assert (tokens > 0) is any(opened)
        for group, answers, again, trained in zip(groups, found, opened, mixed):
            assert len(answers) <= 2 if again else answers == []
            assert all(a.accuracy == 1 and a.prompt_id == group.prompt.id for a in answers)
            assert all(a.source == f"guide@{step}" and a.behavior_logprobs for a in answers)
            own = group.completions[: 4 - len(answers)]
            assert trained.completions == [*own, *answers]
            seen.add((step, len(answers)))
    assert {count for _, count in seen} >= {0, 2} and {step for step, _ in seen} == {1, 2, 3}
    lines = read_jsonl(tmp_path / "run/metrics.jsonl")
    used = [line for line in lines if line.get("npo/guide_frac")]
    assert used and all(line["npo/distance"] == 0 for line in used)
    own = sum(len(c.token_ids) for _, groups, _, _ in asked for g in groups for c in g.completions)
    assert lines[-1]["sampled_tokens"] == own + sum(tokens for *_, tokens in asked)
    assert not (tmp_path / "run/scout").exists() and not (tmp_path / "run/guide.jsonl").exists()


def test_the_cache_keeps_as_many_answers_as_there_are_slots(early, tmp_path, monkeypatch):
    monkeypatch.setattr("verifier.is_correct", lucky)
    config, out = early
    config = dataclasses.replace(config, slots=2, out=str(tmp_path / "run"))
    guide = str(checkpoint_path(out / "scout", 2))
    cache = npo.ask_guide(config, guide, 1, tmp_path / "guide.jsonl")
    assert max(len(found) for found in cache.answers.values()) == 2
    prompts = [Prompt(id, [], [], "7") for id in cache.answers]
    assert {len(cache.answers_to(prompt, 2)) for prompt in prompts} == {1}


def test_a_run_goes_on_from_another_runs_checkpoint(tiny, tmp_path, monkeypatch):
    """--start: step, weights, AdamW and prompts, in a new directory, with other flags if wanted."""
    monkeypatch.setattr("verifier.is_correct", lucky)
    whole, start = tmp_path / "whole", str(checkpoint_path(tmp_path / "whole", 2))
    grpo.train(GRPOConfig(steps=4, **tiny), whole)
    config = GRPOConfig(steps=4, start=start, out=str(tmp_path / "rest"), **tiny)
    config.check()
    grpo.train(config, tmp_path / "rest")
    assert digest(checkpoint_path(tmp_path / "rest", 4)) == digest(checkpoint_path(whole, 4))
    lines, all_lines = (read_jsonl(path / "metrics.jsonl") for path in (tmp_path / "rest", whole))
    assert [line["step"] for line in lines] == [2, 3, 4]
    for name in ("sampled_tokens", "eval/accuracy"):
        assert lines[0][name] == all_lines[2][name] and lines[-1][name] == all_lines[-1][name]
    other = dataclasses.replace(config, lr=0.5, out=str(tmp_path / "other"))
    grpo.train(other, tmp_path / "other")
    assert digest(checkpoint_path(tmp_path / "other", 4)) != digest(checkpoint_path(whole, 4))


def test_a_guided_run_may_start_in_another_run_than_its_guides(early, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("verifier.is_correct", lucky)
    _, out = early
    grpo.train(GRPOConfig(steps=1, **tiny | {"seed": 7}), tmp_path / "sibling")
    start = checkpoint_path(tmp_path / "sibling", 1)
    more = {"start": str(start), "guide": str(checkpoint_path(out / "scout", 2))}
    config = NPOConfig(steps=3, out=str(tmp_path / "run"), **tiny, **GUIDED, **more)
    config.check()
    npo.intervene(config, tmp_path / "run")
    header, *lines = read_jsonl(tmp_path / "run/guide.jsonl")
    assert [line["prompt_id"] for line in lines] == ids_of_steps(config, (2,))
    logged = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in logged] == [1, 2, 3]
    spent = checkpoint_state(start)["sampled_tokens"] + header["guide_sampled_tokens"]
    assert logged[0]["sampled_tokens"] == spent + sum(line["sampled_tokens"] for line in lines)
    late = dataclasses.replace(config, guide=str(tmp_path / "run/guide.jsonl"), guided_until=None)
    with pytest.raises(UsageError, match="guide.jsonl: has no step to guide, from step 3 until"):
        npo.ask_guide(late, late.guide, 3, tmp_path / "unused.jsonl")
    alone = dataclasses.replace(config, guide=None, out=str(tmp_path / "scouted"))
    assert npo.go_ahead(alone, tmp_path / "scout") == str(checkpoint_path(tmp_path / "scout", 3))
    assert [line["step"] for line in read_jsonl(tmp_path / "scout/metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(("first", "second"), [(1, 3), (3, 1)])
def test_one_runs_later_step_includes_the_tokens_of_its_earlier_one(
    tiny, tmp_path, monkeypatch, first, second
):
    monkeypatch.setattr("verifier.is_correct", lucky)
    grpo.train(GRPOConfig(steps=3, **tiny | {"save_every": 1}), tmp_path / "scout")
    start, guide = (str(checkpoint_path(tmp_path / "scout", step)) for step in (first, second))
    config = NPOConfig(steps=4, **tiny, **GUIDED | {"guided_until": 4}, start=start, guide=guide)
    npo.intervene(config, tmp_path / "run")
    _, *lines = read_jsonl(tmp_path / "run/guide.jsonl")
    cache = sum(line["sampled_tokens"] for line in lines)
    found = read_jsonl(tmp_path / "run/metrics.jsonl")[0]["sampled_tokens"]
    later = checkpoint_path(tmp_path / "scout", 3)
    assert cache and found == checkpoint_state(later)["sampled_tokens"] + cache


def test_a_start_of_another_model_is_refused(tiny, tmp_path):
    lax = tmp_path / "lax"
    shutil.copytree(cards.LAX, lax)
    (lax / "state.json").write_text('{"step": 3, "sampled_tokens": 5}')
    config = GRPOConfig(steps=4, start=str(lax), **tiny)
    config.check()
    with pytest.raises(
        UsageError, match="--start .*lax: is no checkpoint of --model .*stops_early"
    ):
        grpo.train(config, tmp_path / "run")
    shallow = json.loads((lax / "config.json").read_text())
    shallow["text_config"]["num_hidden_layers"] = 2
    (lax / "config.json").write_text(json.dumps(shallow))
    with pytest.raises(UsageError, match="is no checkpoint of"):
        check_start(lax, cards.LAX)
    check_start(cards.LAX, cards.LAX)
    with pytest.raises(UsageError, match="is no checkpoint of .* --lora 8"):
        check_start(cards.LAX, cards.LAX, lora=8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"guide": "self", "intervention": "late"}, "--guide self: a late replay"),
        ({"start": str(cards.BASE)}, "--start .*cards_base: is no checkpoint of a run"),
        ({"slots": 8}, r"--slots 8: must be at least 1 and below 8 \(--group-size\)"),
        ({"slots": 0}, "--slots 0"),
        ({"dataset": "cards_lax"}, "--dataset cards_lax: .* its own world's prompts"),
        ({"model": "cards_lax", "eval_samples": 0}, "--eval-samples 0: .* one right text"),
        ({"gate": 1.5}, "--gate 1.5"),
        ({"gate": -0.1}, "--gate -0.1"),
        ({"guide_samples": 0}, "--guide-samples 0"),
        ({"scout_steps": 0}, "--scout-steps 0"),
        ({"guided_until": -5}, "--guided-until -5"),
        ({"intervention": "late", "plateau_start": 320}, "--plateau-start 320: .* below 320"),
        ({"intervention": "late", "steps": 200}, "--plateau-start 240: .* below 200"),
        ({"group_size": 1}, "--group-size 1"),
    ],
)
def test_bad_flags(flags, message):
    NPOConfig(intervention="late").check()
    with pytest.raises(UsageError, match=message):
        NPOConfig(**flags).check()
