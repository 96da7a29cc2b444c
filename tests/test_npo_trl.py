"""The slot inside TRL: the same loss as npo.py's, exactly TRL without guides, the same across processes, and resumable."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

pytest.importorskip("trl", reason="pip install -r requirements-trl.txt")

from transformers import AutoImageProcessor, AutoModelForImageTextToText, TrainerCallback  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

import cards  # noqa: E402
import grpo  # noqa: E402
import npo_trl  # noqa: E402
from npo_trl import NPOConfig, NPOTrainer, Processor, rows_of  # noqa: E402
from policy import Completion, Policy, load_tokenizer  # noqa: E402
from tasks import Prompt  # noqa: E402

FLAGS = dict(per_device_train_batch_size=8, num_generations=4, max_completion_length=40, learning_rate=1e-3, use_cpu=True, bf16=False,
             report_to="none", gradient_checkpointing=False, disable_tqdm=True, logging_steps=1, save_steps=2,
             save_total_limit=3, temperature=1.3)  # fmt: skip


def lucky(completions, **_) -> list[float]:
    """Stands in for the verifier where the tiny base must be right sometimes."""
    return [float(zlib.crc32(c[0]["content"].encode()) % 3 == 0) for c in completions]


def asked(prompts, pictured: bool) -> list[Prompt]:
    """Eight prompts, with their cards as a picture or in words."""
    some = [prompts[row] for row in range(8)]
    if pictured:
        return some
    words = [f"{cards.question(hand)[:-1]} {' '.join(map(str, hand.digits))}." for hand in cards.hands("train")[:8]]
    return [Prompt(p.id, [{"role": "user", "content": [{"type": "text", "text": w}]}], [], p.gold) for p, w in zip(some, words)]


def trainer_of(kind, out: Path, prompts: list[Prompt], reward=lucky, callbacks=None, guides=None, **flags):
    tokenizer = load_tokenizer(cards.BASE)
    tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(cards.BASE, dtype=torch.float32)
    model.base_model.visual.requires_grad_(False)
    options = {"guides": guides} if kind is NPOTrainer else {}
    return kind(
        model=model, args=NPOConfig(output_dir=str(out), **FLAGS | flags), reward_funcs=[reward], train_dataset=rows_of(prompts),
        processing_class=Processor(AutoImageProcessor.from_pretrained(cards.BASE, backend="pil"), tokenizer),
        callbacks=callbacks, **options,
    )  # fmt: skip


def guides_for(policy, some: list[Prompt]) -> dict[str, Completion]:
    """One answer to each prompt from another policy, taken for right; longer than what the trainer samples, and shorter."""
    answers = policy.sample(some, 1, 60, 1.6, seed=4)
    found = {group.prompt.id: group.completions[0] for group in answers}
    for guide in found.values():
        guide.source, guide.accuracy, guide.reward = "guide@40", 1.0, 1.0
    return found


@pytest.mark.parametrize("pictured", [True, False])
@pytest.mark.parametrize("is_correction", [True, False])
def test_loss_and_gradient_of_a_mixed_batch_are_npos(fresh, prompts, tmp_path, pictured, is_correction):
    base, some = Policy(cards.BASE, device="cpu"), asked(prompts, pictured)
    base.adjust = lambda logits, temperature: torch.log_softmax(logits / temperature, dim=-1)  # TRL's: over vision tokens too
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.manual_seed(4)))
    guides = guides_for(fresh, some)
    trainer = trainer_of(NPOTrainer, tmp_path, some, guides=guides, is_correction=is_correction, gate=0.4)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [trainer.train_dataset[i // 4] for i in range(8)]  # 2 groups of 4
    torch.manual_seed(1)
    batch = trainer._generate_and_score_completions(rows)
    assert 0 < len(trainer._taken) < 3 and all(row % 4 == 3 for row in trainer._taken)
    trainer._compute_loss(trainer.model, dict(batch)).backward()

    answers = [ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"])]
    for row, guide in trainer._taken.items():
        assert answers[row] == guide.token_ids
    inputs = [base.encode(prompt) for prompt in some[:2]]
    logprobs, mask = base.logprobs([(inputs[i // 4], tokens) for i, tokens in enumerate(answers)], 1.3)
    old = logprobs.detach().clone()
    for row, guide in trainer._taken.items():
        if is_correction:
            old[row, : len(guide.token_ids)] = torch.tensor(guide.behavior_logprobs)
    loss, _ = grpo.clipped_policy_loss(logprobs, old, batch["advantages"], mask)
    gradients = torch.autograd.grad(loss, base.parameters())
    theirs = dict(trainer.model.named_parameters())
    names = [name for name, parameter in base.model.named_parameters() if parameter.requires_grad]
    mine, trls = (torch.cat([g.flatten() for g in grads]) for grads in (gradients, [theirs[name].grad for name in names]))
    assert (mine - trls).norm() <= 1e-5 * mine.norm() and mine.norm() > 1e-3
    torch.manual_seed(1)
    batch = trainer._generate_and_score_completions(rows)
    assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)


def test_rewards_and_advantages_are_the_mixed_groups(fresh, prompts, tmp_path):
    some = asked(prompts, True)
    guides = guides_for(fresh, some)
    texts = {guide.text for guide in guides.values()}
    trainer = trainer_of(NPOTrainer, tmp_path, some, reward=lambda completions, **_: [float(c[0]["content"] in texts) for c in completions],
                         guides={some[1].id: guides[some[1].id]})  # fmt: skip
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    expected = grpo.group_advantages(torch.tensor([[0.0] * 4, [0.0, 0, 0, 1]])).flatten()
    assert batch["advantages"].tolist() == pytest.approx(expected.tolist(), rel=1e-3)  # TRL: std + 1e-4, ours: std + 1e-6
    assert trainer._metrics["train"]["npo/guide_frac"] == [0.5] and trainer._metrics["train"]["npo/accuracy"] == [0.0]
    trainer.args.guided_until, trainer.state.global_step = 6, 5
    trainer._generate_and_score_completions([trainer.train_dataset[1]] * 4)
    assert list(trainer._taken) == [3]
    trainer.state.global_step = 6  # six steps are done: the next one is the seventh
    trainer._generate_and_score_completions([trainer.train_dataset[1]] * 4)
    assert not trainer._taken


@pytest.mark.parametrize("is_correction", [True, False])
def test_several_updates_on_a_batch(fresh, prompts, tmp_path, is_correction):
    """TRL then has old log-probs of its own: the guide's row gets the recorded ones, or with no correction those of the policy."""
    some = asked(prompts, True)
    guides = guides_for(fresh, some)
    trainer = trainer_of(NPOTrainer, tmp_path, some, reward=lambda completions, **_: [0.0] * len(completions), guides=guides,
                         num_iterations=2, gradient_accumulation_steps=1, steps_per_generation=2, is_correction=is_correction)  # fmt: skip
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[1]] * 4)
    guide, old = guides[some[1].id], batch["old_per_token_logps"]
    with torch.no_grad():
        ids, mask = (torch.cat([batch[f"prompt_{what}"], batch[f"completion_{what}"]], dim=1) for what in ("ids", "mask"))
        fields = {key: batch[key] for key in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
        policys = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, old.shape[1], **fields)[0]
    count = len(guide.token_ids)
    recorded = torch.tensor(guide.behavior_logprobs) if is_correction else policys[3, :count]
    assert torch.allclose(old[3, :count], recorded, atol=1e-5) and "guide_logprobs" not in batch
    real = batch["completion_mask"].bool()
    assert torch.allclose(old[:3][real[:3]], policys[:3][real[:3]], atol=1e-5)


def test_without_guides_it_is_trl_bit_by_bit(fresh, prompts, tmp_path):
    some = asked(prompts, True)
    nobodys = {"another prompt": next(iter(guides_for(fresh, some).values()))}
    runs = {"trl": (GRPOTrainer, None), "empty": (NPOTrainer, {}), "none fits": (NPOTrainer, nobodys)}
    found = {}
    for name, (kind, guides) in runs.items():
        trainer = trainer_of(kind, tmp_path / name, some, guides=guides, max_steps=3)
        trainer.train()
        found[name] = trainer.model.state_dict()
    start = load_file(cards.BASE / "model.safetensors")
    assert any(not torch.equal(found["trl"][name], start[name]) for name in start if name in found["trl"])
    for name in ("empty", "none fits"):
        assert all(torch.equal(found[name][key], value) for key, value in found["trl"].items())


TWO = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
import test_npo_trl as t
from policy import Policy
import cards, tasks
torch.set_num_threads(1)
some = t.asked(tasks.load_prompts("cards")[0], True)
other = Policy(cards.BASE, device="cpu")
with torch.no_grad():
    for parameter in other.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.manual_seed(4)))
groups = {{g.prompt.id: g for g in other.sample(some, 4, 40, 1.6, seed=9)}}

class Scripted(t.NPOTrainer):
    def _generate_single_turn(self, prompt_ids, *_):
        first = self.accelerator.process_index * len(prompt_ids)
        rows = [groups[row["prompt_id"]].completions[(first + i) % 4] for i, row in enumerate(self._asked)]
        return [c.token_ids for c in rows], None

trainer = t.trainer_of(Scripted, {out!r}, some, max_steps=3, per_device_train_batch_size={size}, save_strategy="no", lr_scheduler_type="constant")
trainer.guides = t.guides_for(other, some)
trainer.train()
if trainer.accelerator.is_main_process:
    model = trainer.accelerator.unwrap_model(trainer.model)
    torch.save([model.state_dict(), [line["loss"] for line in trainer.state.log_history if "loss" in line],
                [line["npo/guide_frac"] for line in trainer.state.log_history if "npo/guide_frac" in line]], {out!r} + ".pt")
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()  # a process that leaves while the other still talks to it takes it down
"""


def test_two_processes_are_one(tmp_path):
    """The same global batches: one group of 4 on one process, or half of it on each of two (gloo)."""
    two = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
           "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    results = []
    for number, (size, launch) in enumerate([(4, []), (2, two)]):
        out = tmp_path / str(number)
        script = tmp_path / f"script{number}.py"
        script.write_text(TWO.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(out), size=size))
        done = subprocess.run([sys.executable, *launch, str(script)], cwd=ROOT, capture_output=True, text=True,
                              env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(str(out) + ".pt"))
    (one, losses, shares), (two, other_losses, other_shares) = results
    assert other_losses == pytest.approx(losses, rel=1e-5, abs=1e-7) and other_shares == shares and max(shares) > 0
    start = load_file(cards.BASE / "model.safetensors")
    moved = torch.cat([(one[key] - start[key]).flatten() for key in start if key in one])
    apart = torch.cat([(one[key] - two[key]).flatten() for key in start if key in one])
    weights = torch.cat([one[key].flatten() for key in one])
    assert moved.norm() > 1e-2 and apart.norm() <= 1e-5 * weights.norm()


def test_resumed_through_trl_is_the_same_run(base, prompts, tmp_path):
    some = asked(prompts, True)
    guides = guides_for(base, some)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    whole = trainer_of(NPOTrainer, tmp_path / "whole", some, guides=guides, max_steps=4)
    whole.train()
    trainer_of(NPOTrainer, tmp_path / "parts", some, guides=guides, max_steps=4, callbacks=[Stop()]).train()
    resumed = trainer_of(NPOTrainer, tmp_path / "parts", some, guides=guides, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    mine, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_command_line_builds_the_cache_and_trains(command, tmp_path):
    words = [
        "npo_trl.py",
        "--guide",
        cards.BASE,
        "--guide_prompts",
        "8",
        "--guide_samples",
        "2",
        "--output_dir",
        tmp_path / "run",
    ]
    for flag, value in (FLAGS | {"max_steps": 2}).items():
        words += [f"--{flag}", value]
    done = command(*words)
    assert "'loss'" in done.stdout and len((tmp_path / "run/guide.jsonl").read_text().splitlines()) == 1 + 8
    assert (tmp_path / "run/checkpoint-2/model.safetensors").is_file()
    Policy(tmp_path / "run/checkpoint-2", device="cpu")  # can be a guide, or be evaluated


def test_mistakes_end_in_one_line_and_help_explains(command, tmp_path):
    done = command("npo_trl.py", "--model", "cards", "--dataset", "nowhere.parquet", "--output_dir", tmp_path, "--use_cpu", "True",
                   "--bf16", "False", check=False)  # fmt: skip
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: --dataset nowhere.parquet")
    text = " ".join(command("npo_trl.py", "--help").stdout.split())
    assert "a slot is replaced where the pass-rate is at most this" in text and "not specified by the paper" in text


def test_a_trl_that_moved_its_private_names_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(npo_trl, "PRIVATE", ("_generate", "_gone"))
    with pytest.raises(ImportError, match=r"GRPOTrainer\._gone: npo_trl.py was written for TRL 1\.16"):
        NPOTrainer()
