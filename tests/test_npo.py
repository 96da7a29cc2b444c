"""Slot replacement, the guide's ratio, the cache, the interventions, and that nothing else changed."""

import copy
import dataclasses
import json
import math
import zlib
from pathlib import Path

import pytest
import torch
from conftest import group_of

import grpo
import npo
from npo import NPOConfig, replace_slot
from policy import Completion, Policy
from run import checkpoint_path, derived_seed, read_jsonl, rows_of_step
from tasks import UsageError

GUIDE = Completion("p", [9, 9, 9], [-0.1, -0.2, -0.3], "guided", True, source="guide@40", accuracy=1.0, reward=1.0)
TINY = dict(prompts_per_step=2, group_size=4, eval_prompts=4, eval_samples=1, eval_every=2, save_every=2, max_new_tokens=40,
            micro_batch_size=8, guide_samples=4, scout_steps=2, temperature=1.7, device="cpu")  # fmt: skip


def lucky(response, gold, choices=None) -> bool:
    """Stands in for the verifier where a few steps of the tiny base must find some right answers, and some wrong."""
    return zlib.crc32(response.encode()) % 3 == 0


@pytest.mark.parametrize(
    ("accuracies", "gate", "replaced"),
    [
        ([0, 0, 0, 0], 0.6, True),
        ([1, 0, 0, 1], 0.5, True),  # at the gate
        ([1, 1, 0, 1], 0.6, False),
        ([1, 1, 0, 1], 0.75, True),
        ([1, 1, 1, 1], 1.0, True),
        ([0, 0, 0, 1], 0.0, False),  # the last slot counts in the pass-rate although it may be replaced
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
    assert replace_slot(group_of([1.0, 1.0, 1.0, 0.0, 0.0]), GUIDE).completions[-1] is GUIDE  # 0.6
    assert NPOConfig().gate == 0.6


def test_the_gate_sees_accuracy_not_reward():
    group = group_of([0.0, 0.0, 1.0])
    for completion in group.completions:
        completion.reward = 1.0
    assert replace_slot(group, GUIDE, 0.5).completions[-1] is GUIDE


@pytest.fixture
def guided(base, prompts):
    """Two failed groups, the first with a guide's answer whose recorded log-probs are not the policy's."""
    groups = base.sample([prompts[1], prompts[2]], 4, 40, 1.0, seed=1)
    for group in groups:
        for completion in group.completions:
            completion.accuracy, completion.reward = 0.0, 0.1
    other = base.sample([prompts[1]], 1, 40, 1.0, seed=2)[0].completions[0]
    ratios = torch.linspace(0.3, 1.6, len(other.token_ids))
    recorded = [lp - math.log(r) for lp, r in zip(other.behavior_logprobs, ratios.tolist())]
    guide = dataclasses.replace(other, behavior_logprobs=recorded, source="guide@7", accuracy=1.0, reward=1.0)
    return groups, guide, ratios


def test_the_guides_ratio_is_policy_over_guide(fresh, guided):
    """rho = pi_theta / q with q the *recorded* log-probs; its gradient against the formula, token by token."""
    groups, guide, ratios = guided
    mixed = [replace_slot(groups[0], guide, 0.6), groups[1]]
    config = NPOConfig(clip_low=0.25, clip_high=0.35, max_grad_norm=1e9)
    captured = []
    original = grpo.clipped_policy_loss

    def spy(*arguments, **options):
        captured.append(arguments)
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "clipped_policy_loss", spy)
        stats = grpo.update(fresh, torch.optim.SGD(fresh.parameters(), lr=0.0), mixed, config)
    assert stats["npo/guide_ratio_mean"] == pytest.approx(ratios.mean().item(), rel=1e-3)
    assert stats["npo/guide_ratio_min"] == pytest.approx(0.3, rel=1e-3)
    assert stats["npo/guide_ratio_max"] == pytest.approx(1.6, rel=1e-3)
    assert stats["frac_reward_zero_std"] == 0.5
    logprobs, old, advantages, mask = captured[0][:4]
    assert advantages.tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5], abs=1e-3)  # over the mixed group of four
    free = logprobs.detach().requires_grad_()
    original(free, old, advantages, mask, 0.25, 0.35, num_sequences=8)[0].backward()
    length = len(guide.token_ids)
    expected = [-(r if r <= 1.35 else 0.0) * 1.5 / length / 8 for r in ratios.tolist()]  # positive: clipped from above only
    assert free.grad[3, :length].tolist() == pytest.approx(expected, rel=2e-3, abs=1e-9)


def test_without_is_correction_the_ratio_starts_at_one(fresh, guided):
    groups, guide, _ = guided
    mixed = [replace_slot(groups[0], guide, 0.6), groups[1]]
    config = NPOConfig(is_correction=False)
    plain = npo.without_is_correction(mixed, fresh, config)
    assert plain[1] is mixed[1] and mixed[0].completions[-1] is guide  # the cache keeps the guide's own log-probs
    stats = grpo.update(fresh, torch.optim.SGD(fresh.parameters(), lr=0.0), plain, config)
    for name in ("mean", "min", "max"):
        assert stats[f"npo/guide_ratio_{name}"] == pytest.approx(1.0, abs=1e-5)


def test_several_updates_without_is_correction_keep_the_first_policys_logprobs(fresh, guided, monkeypatch):
    """At the second update of a batch the ratio is pi_new / pi_before, no longer 1."""
    groups, guide, _ = guided
    config = NPOConfig(is_correction=False, updates_per_batch=2)
    plain = npo.without_is_correction([replace_slot(groups[0], guide, 0.6)], fresh, config)
    original, ratios = grpo.clipped_policy_loss, []

    def spy(*arguments, **options):
        loss, stats = original(*arguments, **options)
        ratios.append(stats["ratio"][3, : len(guide.token_ids)])
        return loss, stats

    monkeypatch.setattr(grpo, "clipped_policy_loss", spy)
    grpo.update(fresh, torch.optim.AdamW(fresh.parameters(), lr=1e-2), plain, config)
    assert (ratios[0] - 1).abs().max() < 1e-5 and (ratios[1] - 1).abs().max() > 1e-2


def weights(path: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def test_npo_with_an_empty_cache_is_grpo_bit_by_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("verifier.is_correct", lucky)
    settings = {name: value for name, value in TINY.items() if name not in ("guide_samples", "scout_steps")}
    grpo.train(grpo.GRPOConfig(steps=5, lr=1e-3, **settings), tmp_path / "grpo")
    npo.train(NPOConfig(steps=5, lr=1e-3, **TINY), tmp_path / "npo", {}, until=5, start=None, spent_tokens=0)
    mine, theirs = (weights(checkpoint_path(tmp_path / name, 5)) for name in ("grpo", "npo"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    start = weights(Path(npo.model_path(NPOConfig())))
    assert any(not torch.equal(mine[name], start[name]) for name in mine)


def test_prompts_of_a_step_depend_on_seed_and_step_alone():
    config = NPOConfig(seed=5, prompts_per_step=300)
    first = rows_of_step(2048, 1, config)
    assert first == rows_of_step(2048, 1, config)
    epoch = [row for step in range(1, 8) for row in rows_of_step(2048, step, config)]
    assert len(set(epoch[:2048])) == 2048  # each prompt once an epoch, also where a step spans two epochs
    assert set(epoch[2048:]) <= set(epoch[:2048]) and epoch[2048:] != epoch[:52]
    assert first != rows_of_step(2048, 1, NPOConfig(seed=6, prompts_per_step=300))
    assert derived_seed(0, "sample", 1) != derived_seed(0, "sample", 2)


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    """A whole early run, 2 + 3 steps, whose tiny scout counts as having solved what it answers."""
    out = tmp_path_factory.mktemp("early") / "run"
    config = NPOConfig(steps=3, lr=1e-3, out=str(out), **TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verifier.is_correct", lucky)
        npo.main(config)
    return config, out


def test_early_writes_the_whole_run_directory(early):
    config, out = early
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "guide.jsonl", "curves.png", "summary.json",
                 "checkpoints/step_000002/optimizer.pt", "checkpoints/step_000003/model.safetensors",
                 "scout/metrics.jsonl", "scout/checkpoints/step_000002/state.json"):  # fmt: skip
        assert name in names
    assert not [name for name in names if "tmp" in name or "partial" in name]
    assert json.loads((out / "config.json").read_text()) == json.loads(json.dumps(dataclasses.asdict(config)))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["scout"]["steps"] == 2


def test_costs_of_scout_and_cache_are_counted(early):
    _, out = early
    scout = json.loads((out / "scout/checkpoints/step_000002/state.json").read_text())["sampled_tokens"]
    header, *lines = read_jsonl(out / "guide.jsonl")
    cache = sum(line["sampled_tokens"] for line in lines)
    metrics = read_jsonl(out / "metrics.jsonl")
    assert header["guide_sampled_tokens"] == scout > 0 and cache > 0
    assert metrics[0]["sampled_tokens"] == scout + cache
    assert metrics[-1]["sampled_tokens"] > metrics[1]["sampled_tokens"] > scout + cache


def test_the_cache_holds_the_segments_prompts_once_each(early):
    config, out = early
    header, *lines = read_jsonl(out / "guide.jsonl")
    train_prompts, _ = npo.load_config_prompts(config)
    expected = [
        train_prompts[row].id for step in (1, 2) for row in rows_of_step(2048, step, config)
    ]  # step 3 is beyond the guide
    assert [line["prompt_id"] for line in lines] == expected and header["prompts"] == 4
    assert header["guide_step"] == 2
    for line in lines:
        if line["completion"]:  # one that was right but cut is not kept
            done = line["completion"]
            assert line["pass_rate"] > 0 and done["accuracy"] == 1 and done["finished"] and done["source"] == "guide@2"
            assert len(done["token_ids"]) == len(done["behavior_logprobs"]) > 0


def test_recorded_logprobs_are_the_guides_own(early):
    config, out = early
    _, cache, _ = npo.load_cache(config, out / "guide.jsonl")
    guide = Policy(checkpoint_path(out / "scout", 2), device="cpu")
    prompts = {p.id: p for p in npo.load_config_prompts(config)[0]}
    for prompt_id, completion in cache.items():
        with torch.no_grad():
            logprobs, _ = guide.logprobs([(guide.encode(prompts[prompt_id]), completion.token_ids)], config.temperature)
        assert (logprobs[0] - torch.tensor(completion.behavior_logprobs)).abs().max() < 1e-4  # the base is 1e-2 away
    assert cache


def test_metrics_of_guidance(early):
    _, out = early
    metrics = read_jsonl(out / "metrics.jsonl")
    used = [line for line in metrics if line.get("npo/guide_frac")]
    assert used and all(line["npo/distance"] == 2 - line["step"] for line in used)
    assert metrics[-1]["npo/guide_frac"] == 0 and "npo/distance" not in metrics[-1]
    shown = [line for line in read_jsonl(out / "samples.jsonl") if "guide" in line]
    assert [line["step"] for line in shown] == [line["step"] for line in used]
    assert shown[0]["source"] == "guide@2" and shown[0]["policy"] != shown[0]["guide"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-40], "cut short, damaged"),
        (lambda text: text[: text.rstrip().rindex("\n") + 1], "cut short, damaged"),  # at the end of a line
        (lambda text: text.replace('"dataset": "cards', '"dataset": "other'), "made for another dataset"),
        (lambda text: text.replace('"tokenizer": "', '"tokenizer": "0'), "made for another tokenizer"),
        (lambda text: "", "cut short, damaged"),
        (lambda text: "[1]\n", "no guide cache"),
        (lambda text: '{"step": 0}\n', "no guide cache"),
    ],
)
def test_damaged_or_foreign_caches(early, tmp_path, damage, message):
    config, out = early
    path = tmp_path / "guide.jsonl"
    path.write_text(damage((out / "guide.jsonl").read_text()))
    with pytest.raises(UsageError, match=message):
        npo.intervene(dataclasses.replace(config, guide=str(path), out=str(tmp_path / "run")), tmp_path / "run")


def test_a_cache_cut_short_while_it_is_built_is_completed(early, tmp_path):
    config, out = early
    whole = (out / "guide.jsonl").read_text()
    partial = tmp_path / "guide.jsonl.partial"
    partial.write_text(whole[: whole.rindex('"prompt_id"') + 5])  # three lines and a piece: one step's prompts are whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verifier.is_correct", lucky)
        npo.build_cache(config, checkpoint_path(out / "scout", 2), 1, 2, tmp_path / "guide.jsonl")
    assert (tmp_path / "guide.jsonl").read_text() == whole and not partial.exists()


def test_a_cache_that_covers_too_little_is_made_anew(early, tmp_path):
    """--guided-until may reach beyond a cache that stands; what it held before stays as it was."""
    config, out = early
    guide, run = str(checkpoint_path(out / "scout", 2)), tmp_path / "run"
    npo.build_cache(config, guide, 1, 1, run / "guide.jsonl")
    few = read_jsonl(run / "guide.jsonl")
    config = dataclasses.replace(config, guide=guide, steps=1, guided_until=3, out=str(run))
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    npo.intervene(config, run)
    more = read_jsonl(run / "guide.jsonl")
    assert (few[0]["until"], more[0]["until"], len(few), len(more)) == (1, 3, 3, 7)
    assert few[1:] == more[1:3]


def test_a_guide_that_comes_too_late_or_never(early, tmp_path):
    config, out = early
    guide = checkpoint_path(out / "scout", 2)
    with pytest.raises(UsageError, match="no step to help with: guided from step 3 until step 2"):
        npo.build_cache(config, guide, 3, 2, tmp_path / "guide.jsonl")


def test_a_guide_with_another_tokenizer(early, tmp_path, fresh):
    config, _ = early
    fresh.tokenizer.add_tokens(["new"])
    fresh.save(tmp_path / "other", {"step": 9, "sampled_tokens": 0})
    with pytest.raises(UsageError, match="its tokenizer .* is not that of the policy cards"):
        npo.intervene(dataclasses.replace(config, guide=str(tmp_path / "other")), tmp_path / "run")


@pytest.mark.parametrize("intervention", ["late", "early+late"])
def test_late_rolls_back_weights_and_optimizer(tmp_path, monkeypatch, intervention):
    monkeypatch.setattr("verifier.is_correct", lucky)
    config = NPOConfig(
        intervention=intervention, plateau_start=2, plateau_end=4, steps=5, lr=1e-3, out=str(tmp_path / "run"), **TINY
    )
    npo.main(config)
    scout, out = tmp_path / "run" / "scout", tmp_path / "run"
    assert (scout / "scout").is_dir() is (intervention == "early+late")
    steps = [line["step"] for line in read_jsonl(out / "metrics.jsonl")]
    assert steps == [2, 3, 4, 5]  # from the plateau's start, evaluated, to the end
    header, *lines = read_jsonl(out / "guide.jsonl")
    train_prompts, _ = npo.load_config_prompts(config)
    expected = [train_prompts[row].id for step in (3, 4) for row in rows_of_step(2048, step, config)]
    assert header["guide_step"] == 4 and [line["prompt_id"] for line in lines] == expected
    if intervention == "late":  # without a guide the replay repeats the scout, bit by bit, Adam's moments included
        empty = tmp_path / "again"
        npo.train(dataclasses.replace(config, steps=4), empty, {}, 0, checkpoint_path(scout, 2), 0)
        mine, theirs = weights(checkpoint_path(empty, 4)), weights(checkpoint_path(scout, 4))
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"gate": 1.5}, "--gate 1.5"),
        ({"gate": -0.1}, "--gate -0.1"),
        ({"guide_samples": 0}, "--guide-samples 0"),
        ({"scout_steps": 0}, "--scout-steps 0"),
        ({"guided_until": -5}, "--guided-until -5"),
        (
            {"intervention": "late", "plateau_start": 30, "save_every": 20},
            "--plateau-start 30: must be a multiple of --save-every 20",
        ),
        ({"intervention": "late", "plateau_start": 320}, "--plateau-start 320"),
        ({"group_size": 1}, "--group-size 1"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(UsageError, match=message):
        NPOConfig(**flags).check()
