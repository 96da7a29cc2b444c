"""What experiments/ measures beside its runs, against enumeration and other ways to compute it."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

import grpo
from experiments import random_model, signal_curve, speed
from experiments.plan import Run
from npo import NPOConfig
from plumbing.checkpoints import checkpoint_path
from plumbing.command import read_flags
from plumbing.model import Policy
from plumbing.rollout import Completion, Group
from plumbing.run import read_jsonl, rows_of_step
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


def test_signal_of_a_guide_by_hand(base, prompts):
    """Two prompts: a right answer with two unlikely tokens and a cut one; two wrong ones."""
    ids = base.tokenizer(r"\boxed{27 +8= 35}").input_ids
    with torch.no_grad():
        logprobs, _ = base.logprobs([(base.encode(prompts[0]), ids)], 1.0)

    def answer(ratios: dict[int, float], accuracy=0.0, finished=True) -> Completion:
        logratios = [math.log(ratios.get(place, 1.0)) for place in range(len(ids))]
        guides = [a - b for a, b in zip(logprobs[0].tolist(), logratios)]
        return Completion(prompts[0].id, ids, guides, "", finished, accuracy=accuracy)

    right, cut = answer({1: 0.5, 4: 0.2}, 1.0), answer({2: 4.0}, finished=False)
    groups = [[right, cut], [answer({}), answer({3: 2.0})]]
    encoded = base.encode(prompts[0])
    found = signal_curve.signal_of(base, [Group(prompts[0], encoded, of) for of in groups])
    kl = -math.log(0.5 * 0.2 * 4.0 * 2.0)  # over four answers
    assert found["quality"] == 0.5
    assert found["answer_kl"] == pytest.approx(kl / 4, abs=1e-5)
    assert found["kl"] == pytest.approx(kl / (4 * len(ids)), abs=1e-5)
    assert found["right"] == pytest.approx(0.1**2, rel=1e-4)
    assert found["weight"] == pytest.approx(0.2, rel=1e-4)
    wrong = signal_curve.signal_of(base, [Group(prompts[0], encoded, groups[1])])
    assert (wrong["quality"], wrong["right"], wrong["weight"]) == (0, None, None)


def test_signal_curve_of_a_run(tmp_path, monkeypatch, base, teacher, prompts):
    teacher_as_checkpoint(tmp_path / "cards" / "grpo-9", 10)
    monkeypatch.setattr(signal_curve, "ROOT", tmp_path)
    run = Run("cards/grpo", "", out="cards/grpo-9")
    monkeypatch.setattr(signal_curve, "with_seed", lambda *_: run)
    monkeypatch.setattr(signal_curve, "make", lambda run: {})
    for name, value in {"DISTANCES": (0, 10), "PROMPTS": 16, "CHUNK": 8}.items():
        monkeypatch.setattr(signal_curve, name, value)
    again, line = signal_curve.measure(9, 0)
    assert (again["distance"], line["distance"], line["t"], line["seed"]) == (0, 10, 0, 9)
    assert (again["kl"], again["weight"] or 1.0) == pytest.approx((0, 1), abs=1e-4)
    config = NPOConfig(seed=9)
    rows = [row for step in (1, 2) for row in rows_of_step(len(prompts), step, config)]
    own = signal_curve.ask(base, [prompts[row] for row in rows], config, 0)
    failed = [group.prompt for group in own if not any(c.accuracy for c in group.completions)]
    assert line["failed"] == again["failed"] == len(failed)
    assert line["quality"] > 0.8 and again["quality"] < 0.5  # the teacher is nearly always right
    assert 0 < line["weight"] < 0.5 and line["answer_kl"] > 10 * line["kl"] > 0


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
