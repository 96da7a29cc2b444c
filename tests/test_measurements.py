"""What experiments/ measures beside its runs, against enumeration and other ways to compute it."""

import json
import math
import re
import shlex
import shutil
import zlib

import numpy
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

import grpo
import verifier
from experiments import decisive_tokens, random_model, runs, signal_curve, speed
from npo import NPOConfig, replace_slot
from plumbing.checkpoints import checkpoint_path
from plumbing.command import read_flags
from plumbing.model import Policy
from plumbing.rollout import Completion, Group
from plumbing.run import derived_seed, read_jsonl, rows_of_step
from worlds import cards


@pytest.fixture(scope="module")
def teacher() -> Policy:
    return Policy(cards.TEACHER, "cpu")


def teacher_as_checkpoint(run, step: int):
    """A run whose checkpoint of that step is the teacher, which is nearly always right."""
    folder = checkpoint_path(run, step)
    shutil.copytree(cards.TEACHER, folder)
    (folder / "state.json").write_text(json.dumps({"step": step, "sampled_tokens": 0}))


# ---- signal_curve.py -----------------------------------------------------------------------------


@torch.no_grad()
def test_tilted_sampling_against_a_sum_over_all_answers(fresh, prompts):
    torch.manual_seed(1)
    guide = Policy(cards.BASE, "cpu")
    for weight, theirs in zip(fresh.model.parameters(), guide.model.parameters()):
        weight += 0.1 * torch.randn_like(weight)  # many tokens are likely, of two policies
        theirs.copy_(weight + 0.01 * torch.randn_like(weight))
    encoded = fresh.encode(prompts[5])
    every = [id for id in range(41) if id not in fresh.never_sampled]
    first = [(encoded, [id]) for id in every]
    stop = every[int(fresh.logprobs(first, 1.0)[0].argmax())]  # so many paths end with one token
    fresh.eos_token_ids = [stop]
    answers = [[a, b] for a in every if a != stop for b in every] + [[stop]]
    rows = [(encoded, answer) for answer in answers]
    log_p, log_q = (policy.logprobs(rows, 1.0)[0].double().sum(dim=1) for policy in (fresh, guide))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)  # so these are all of them
    two = (2 * log_p - log_q).exp().sum().item()
    p, q = (policy.logprobs(first, 1.0)[0].exp().double() for policy in (fresh, guide))
    one = (p**2 / q).sum().item()

    groups = [Group(prompts[5], encoded, []) for _ in range(64)]
    exact = numpy.exp(signal_curve.tilted(fresh, guide, groups[:1], 1, seed=0))
    assert exact == pytest.approx(numpy.full((1, 4), one), rel=1e-4)
    paths = numpy.exp(signal_curve.tilted(fresh, guide, groups, 2, seed=0)).ravel()  # (256,)
    error = paths.std(ddof=1) / len(paths) ** 0.5
    assert paths.min() >= 1 and error < 0.1 * (two - 1)
    assert abs(paths.mean() - two) < 3 * error
    assert abs(one - two) > 6 * error  # so the second token counts


def test_gradient_variance_counts_gradients_and_is_unbiased():
    draw = numpy.random.default_rng(3)
    flat, count = draw.normal(size=(4, 6)) + 2, numpy.array([2, 0, 1, 3])
    counted = numpy.repeat(flat, count, axis=0)
    spread, norm = signal_curve.gradient_variance(flat @ flat.T, count)
    expected = counted.var(axis=0, ddof=1).sum()
    mean = (counted.mean(axis=0) ** 2).sum()
    assert spread == pytest.approx(expected)
    assert norm == pytest.approx(mean - expected / 6)
    again = signal_curve.gradient_variance(flat @ flat.T, count, resampled=True)
    assert again == pytest.approx((expected, mean - 2 * expected / 6))
    assert signal_curve.gradient_variance(flat @ flat.T, numpy.array([1, 0, 1, 0])) == (None, None)


def test_effective_sample_size_and_ratio_by_hand():
    assert signal_curve.effective([3.0, 3.0, 3.0]) == pytest.approx(3)
    assert signal_curve.effective([1e200, 2e200]) == pytest.approx(9 / 5)
    assert signal_curve.effective([]) == 0
    count, total, number = numpy.array([2, 0, 1]), numpy.array([5, 9, 1]), numpy.array([3, 4, 2])
    assert signal_curve.ratio(count, total, number) == pytest.approx(11 / 8)
    assert signal_curve.ratio(count, total, numpy.array([0, 4, 0])) is None


def test_measured_lines_against_the_same_answers(tmp_path, monkeypatch, base, teacher, prompts):
    teacher_as_checkpoint(tmp_path / "grpo-9", 10)
    for name, value in {"RUNS": str(tmp_path), "DISTANCES": (10,), "PROMPTS": 8}.items():
        monkeypatch.setattr(signal_curve, name, value)
    monkeypatch.setattr(signal_curve, "RESAMPLED", 3)
    judged = verifier.is_correct

    def or_by_chance(text: str, *asked) -> bool:  # of the base's own answers almost none is right
        return judged(text, *asked) or zlib.crc32(text.encode()) % 16 == 0

    monkeypatch.setattr(verifier, "is_correct", or_by_chance)
    again, line = signal_curve.measure(9, 0)
    assert (again["distance"], line["distance"], line["t"], line["seed"]) == (0, 10, 0, 9)
    assert (again["whole"], again["right"] or 1.0, again["kl"]) == pytest.approx((1, 1, 1))
    assert again["ess"]["whole"] == pytest.approx(4 * again["failed"])

    config = NPOConfig(seed=9)
    asked = [prompts[row] for row in rows_of_step(len(prompts), 1, config)]
    own = base.sample(asked, 8, 80, 1.0, derived_seed(9, "signal policy", 0, 0))
    theirs = teacher.sample(asked, 8, 80, 1.0, derived_seed(9, "signal guide", 0, 10, 0))
    verifier.score(own + theirs)
    failed = [i for i in range(8) if own[i].pass_rate == 0]
    right = {i: [c for c in theirs[i].completions if c.accuracy and c.finished] for i in failed}
    solved = [i for i in failed if right[i]]
    assert line["failed"] == len(failed) < 8 and line["guided_groups"] == len(solved) > 3
    assert line["quality"] == pytest.approx(len(solved) / len(failed), rel=1e-4)

    pairs = [(own[i].encoded, c) for i in failed for c in right[i]]
    with torch.no_grad():
        log_p, mask = base.logprobs([(encoded, c.token_ids) for encoded, c in pairs], 1.0)
    log_q = [sum(c.behavior_logprobs) for _, c in pairs]
    squares = (2 * ((log_p * mask).sum(dim=1).double() - torch.tensor(log_q))).exp()
    assert line["right_answers"] == len(squares)
    assert line["right"] == pytest.approx(squares.mean().item(), rel=1e-3)

    every = [(group.encoded, c.token_ids) for group in theirs for c in group.completions]
    pairs = zip(*(signal_curve.distributions(policy, every) for policy in (base, teacher)))
    can = [id for id in range(41) if id not in base.never_sampled]
    kl = [
        torch.nn.functional.kl_div(p[:, can], q[:, can], reduction="sum", log_target=True)
        for p, q in pairs
    ]
    tokens = sum(len(ids) for _, ids in every)
    assert line["kl"] == pytest.approx(math.exp(sum(kl) / tokens), rel=1e-3)

    gradients = []
    for i in solved:  # a step of SGD at rate 1 is the gradient
        policy = Policy(cards.BASE, "cpu")
        before = torch.cat([w.detach().clone().flatten() for w in policy.parameters()])
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        mixed = replace_slot(own[i], right[i][0])
        grpo.update(policy, optimizer, [mixed], NPOConfig(max_grad_norm=1e9))
        after = torch.cat([w.detach().flatten() for w in policy.parameters()])
        gradients.append((before - after).double())
    spread = torch.stack(gradients).var(dim=0).sum().item()
    assert line["gradient"] == pytest.approx(spread, rel=1e-3)
    assert {len(values) for values in line["bootstrap"].values()} == {3}


def test_distributions_hold_the_logprobs_that_are_trained(base, prompts):
    answers = [[7, 8, 30, 2], [31, 2], [9] * 6]
    rows = [(base.encode(prompts[i]), ids) for i, ids in enumerate(answers)]
    with torch.no_grad():
        logprobs, mask = base.logprobs(rows, 1.0)
    for found, (_, ids), own, real in zip(
        signal_curve.distributions(base, rows), rows, logprobs, mask
    ):
        torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(len(ids)))
        torch.testing.assert_close(found.gather(-1, torch.tensor(ids)[:, None])[:, 0], own[real])


def test_what_is_left_to_do_and_its_commands(monkeypatch):
    for name, value in {"SEEDS": (0, 1), "STARTS": (0, 60), "DISTANCES": (10, 30)}.items():
        monkeypatch.setattr(signal_curve, name, value)
    Job, made = signal_curve.Job, []
    plain, later = signal_curve.stages(set())
    assert plain == [Job("grpo", 0), Job("grpo", 1)] and len(later) == 4 + 8
    done = {Job("grpo", 0), Job("grpo", 1), *later} - {Job("trained", 1, 60, 30)}
    assert signal_curve.stages(done) == [[Job("grpo", 1)], [Job("trained", 1, 60, 30)]]
    assert signal_curve.stages(done | {*later}) == [[], []]
    # a measurement that a kill cut short, of which only the first line is there, is done again
    lines = [{"kind": "measured", "seed": 0, "t": 60, "distance": d} for d in (0, 10)]
    assert (
        Job("measured", 0, 60, 30) in signal_curve.stages(set(map(signal_curve.job_of, lines)))[1]
    )

    def make(run):
        made.append(run)
        evals = [[60, 0.25, 7], [90, 0.5, 9]]
        return {"command": run.command, "commit": "abc", "evals": evals}

    monkeypatch.setattr(runs, "make", make)
    (line,) = signal_curve.do(Job("trained", 1, 60, 30))
    assert line["eval/accuracy"] == 0.5 and signal_curve.job_of(line) == ("trained", 1, 60, 30)
    config = read_flags(NPOConfig, None, shlex.split(made[0].command)[2:])
    config.check()
    assert (config.intervention, config.plateau_start, config.seed) == ("late", 60, 1)
    assert config.steps == config.guided_until == 90
    (line,) = signal_curve.do(Job("grpo", 1))
    assert line["evaluations"] == [[60, 0.25], [90, 0.5]]
    plain = read_flags(grpo.GRPOConfig, None, shlex.split(made[1].command)[2:])
    assert config.guide == str(checkpoint_path(plain.out, 90)) and 90 % plain.save_every == 0
    monkeypatch.setattr(runs, "make", lambda run: None)
    assert signal_curve.do(Job("grpo", 1)) == []


def test_another_base_is_not_mixed_in(tmp_path, monkeypatch):
    monkeypatch.setattr(signal_curve, "RESULTS", tmp_path / "lines.jsonl")
    line = {"kind": "grpo", "seed": 0, "base": "another", "evaluations": []}
    (tmp_path / "lines.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(SystemExit, match="another base; remove it"):
        signal_curve.main()


def test_tables_of_the_committed_lines(capsys):
    signal_curve.print_tables()
    shown = capsys.readouterr().out
    lines = read_jsonl(runs.HERE / "signal_curve.jsonl")
    mine = {
        (line["kind"], line["seed"]): line
        for line in lines
        if line["kind"] == "grpo" or (line["t"], line["distance"]) == (60, 40)
    }
    quality = sum(mine["measured", seed]["quality"] for seed in range(5)) / 5
    kl = math.exp(sum(math.log(mine["measured", seed]["kl"]) for seed in range(5)) / 5)
    row = shown.split("t = 60")[1].split("\n 40 ")[1].split("\n")[0]
    assert row.split()[0] == f"{quality:.2f}" and f" {kl:.3g} " in row
    plain = [dict(mine["grpo", seed]["evaluations"])[90] for seed in range(5)]
    gains = [mine["trained", seed]["eval/accuracy"] - plain[seed] for seed in range(5)]
    assert f" {sum(gains) / 5:.3f} [" in row
    assert shown.count("rank correlation") == 3 * 6


# ---- decisive_tokens.py --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        (r"\boxed{27 +8= 35 +5= 40}", "0 00 0 10 0 10 0"),
        (r"\boxed{42 +3= 45 +9= 44}", "0 00 0 00 0 10 0"),  # of a wrong total, too
        (r"27 +3= 30 +5= 35 \boxed{27 +8= 35}", "00 0 10 0 00 0 0 00 0 10 0"),  # the teacher's
        (r"98 +7= 105 +1= 106", "00 0 110 0 000"),
    ],
)
def test_decisive_tokens_by_hand(base, text, marks):
    pieces = base.tokenizer.tokenize(text)
    assert decisive_tokens.decisive(pieces) == [mark == "1" for mark in marks.replace(" ", "")]


def test_ratios_of_decisive_tokens(base, prompts):
    ids = base.tokenizer(r"\boxed{27 +8= 35}").input_ids
    with torch.no_grad():
        logprobs, _ = base.logprobs([(base.encode(prompts[0]), ids)], 1.0)
    recorded = [lp - math.log(1.5) for lp in logprobs[0].tolist()]  # so ratios are 1.5,
    recorded[4] += math.log(3)  # and 0.5 for the 3 of 35
    answer = Completion(prompts[0].id, ids, recorded, "", True)
    found = decisive_tokens.measure(base, {prompts[0].id: prompts[0]}, [answer] * 3)
    shares = {"below 0.8": 1, "above 1.28": 0}
    assert found["decisive"] == {"tokens": 3, "mean": 0.5, "median": 0.5} | shares
    shares = {"below 0.8": 0, "above 1.28": 1}
    assert found["other"] == {"tokens": 3 * len(ids) - 3, "mean": 1.5, "median": 1.5} | shares


def test_decisive_tokens_of_a_guide_cache(tmp_path, monkeypatch, capsys):
    teacher_as_checkpoint(tmp_path / "cards" / "grpo-4", 10)
    changes = {"RUNS": str(tmp_path), "HERE": tmp_path, "WINDOW": 1, "SEEDS": (4,)}
    for name, value in (changes | {"GUIDES": (10,), "POLICIES": (0, 10)}).items():
        monkeypatch.setattr(decisive_tokens, name, value)
    decisive_tokens.main()
    first, second = json.loads((tmp_path / "decisive_tokens.json").read_text())
    assert (first["seed"], first["guide"], first["policy"], second["policy"]) == (4, 10, 0, 10)
    _, *kept = read_jsonl(tmp_path / "cards" / "decisive-10-4.jsonl")
    tokens = sum(len(answer["token_ids"]) for line in kept for answer in line["answers"])
    for line in (first, second):
        assert line["decisive"]["tokens"] + line["other"]["tokens"] == tokens > 0
    assert second["decisive"]["median"] == second["other"]["mean"] == 1  # the guide itself
    assert first["decisive"]["median"] < first["other"]["median"]
    assert (
        "guide of step 10, policy of step 10: median decisive ratio 1.00" in capsys.readouterr().out
    )
    committed = json.loads((runs.HERE / "decisive_tokens.json").read_text())
    assert committed[0].keys() == first.keys()
    assert committed[0]["other"].keys() == first["other"].keys()


# ---- random_model.py -----------------------------------------------------------------------------


def test_public_sizes_have_their_number_of_parameters():
    counts = {
        "8b": 8_767_123_696,
        "4b": 4_437_815_808,
        "2b": 2_127_532_032,
    }  # of the public weights
    for size, count in counts.items():
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(random_model.config_of(size))
        assert sum(weight.numel() for weight in model.parameters()) == count


def test_the_ordinary_command_trains_on_a_random_model(tmp_path, capsys):
    out = tmp_path / "tiny"
    random_model.main("tiny", out, length=12)
    with safe_open(out / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
        table = weights.get_slice("model.language_model.embed_tokens.weight")
        assert table.get_shape() == [151_936, 64] and "lm_head.weight" in names
    assert len(read_jsonl(out / "questions.jsonl")) == 64
    printed = capsys.readouterr().out.replace("\\\n", " ")
    words = re.search(r"python npo.py (.+)", printed)[1]
    config = read_flags(NPOConfig, None, words.split())
    config.check()
    assert config.prompts_per_step == 8 and config.dataset == f"{out}/questions.jsonl"
    small = {"prompts_per_step": 2, "eval_prompts": 12, "max_new_tokens": 20, "steps": 1}
    small |= {"eval_samples": 2, "micro_batch_size": 8, "model": config.model}
    grpo.train(grpo.GRPOConfig(dataset=config.dataset, **small), str(tmp_path / "run"))
    start, line = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert 0.1 < start["eval/accuracy"] < 0.8  # half of the boxes are right, and some are cut off
    assert line["frac_reward_zero_std"] == 0 and line["grad_norm"] > 0
    assert line["entropy"] == pytest.approx(math.log(151_936), abs=0.1)
    assert 5 < line["completions/mean_length"] < 18
    with pytest.raises(SystemExit, match="exists; remove it"):
        random_model.main("tiny", out)


# ---- speed.py ------------------------------------------------------------------------------------


def test_a_timed_step_is_a_training_step(fresh, prompts):
    config = grpo.GRPOConfig(max_new_tokens=9, group_size=4)
    optimizer = torch.optim.AdamW(fresh.parameters(), 1e-3)
    before = [weight.detach().clone() for weight in fresh.parameters()]
    asked = [prompts[3], prompts[4]]
    guides = {p.id: Completion(p.id, [7, 2], [-0.5, -0.5], "", True, "guide@40") for p in asked}
    for guide in guides.values():
        guide.accuracy = guide.reward = 1.0
    seconds, groups = speed.our_step(fresh, optimizer, asked, config, 5, guides)
    assert seconds > 0 and [len(group.completions) for group in groups] == [4, 4]
    assert [group.completions[-1].source for group in groups] == ["guide@40"] * 2
    assert [c.reward for c in groups[1].completions] == [1, 0, 0, 1]
    assert any((a != b).any() for a, b in zip(before, fresh.parameters()))


def test_ratios_are_of_medians(monkeypatch):
    said = speed.compared("mine", [1.0, 3.0, 20.0], "theirs", [4.0, 1.0, 4.0])
    assert said == "mine 3.000 s, theirs 4.000 s, ratio 0.75"
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "STEPS", 3)
    seconds, other, ratio = map(float, re.findall(r"[\d.]+\d", speed.guided()))
    assert seconds > 0 and ratio == pytest.approx(seconds / other, rel=0.1)


def test_a_step_beside_trls(monkeypatch, capsys):
    pytest.importorskip("trl")
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "STEPS", 2)
    said = speed.step()
    assert re.fullmatch(r"ours [\d.]+ s, TRL [\d.]+ s, ratio [\d.]+", said)
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    assert "TRL is not installed" in speed.step()


def test_a_guide_in_every_group_of_trl(monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "STEPS", 2)
    assert re.fullmatch(r"guided [\d.]+ s, TRL's own [\d.]+ s, ratio [\d.]+", speed.in_trl())
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    assert "TRL is not installed" in speed.in_trl()
