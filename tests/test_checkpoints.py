"""Checkpoints are whole or not there; what large models need changes no result but rounding."""

import json
import pickle
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import TINY, lucky, save
from safetensors.torch import load_file

import grpo
from commands.merge import main as merge
from grpo import GRPOConfig
from plumbing import UsageError, checkpoints
from plumbing.checkpoints import (
    MOMENT_BYTES,
    checkpoint_beside,
    checkpoint_bytes,
    checkpoint_state,
    load_optimizer,
    make_optimizer,
    remove_checkpoint,
    save_checkpoint,
)
from plumbing.lora import base_model_of, merged_weights
from plumbing.model import Policy
from plumbing.rollout import Prompt
from plumbing.run import Run, read_jsonl
from plumbing.settings import RunConfig
from worlds import cards

STATE = {"step": 3, "sampled_tokens": 41}


@pytest.fixture
def rows(prompts, base):
    """Three rows of one card prompt, one of another, one of a text alone."""
    content = [{"type": "text", "text": "Start at 27 and add the cards."}]
    text = Prompt("text", [{"role": "user", "content": content}], [], "27")
    first, second, third = (base.encode(prompt) for prompt in (prompts[0], prompts[5], text))
    answers = [29, 28, 27], [15], [11, 12, 13, 14], [16, 16], [20, 21]
    return list(zip((first, first, second, first, third), answers))


def stepped(policy: Policy, rows) -> torch.optim.Optimizer:
    """An optimizer that has changed the policy once."""
    optimizer = make_optimizer(policy.parameters(), 1e-3, 0.01)
    policy.logprobs(rows, 1.0)[0].sum().backward()
    optimizer.step()
    return optimizer


@pytest.fixture
def trained(monkeypatch):
    """Runs GRPO to each of the given steps in turn; returns the last checkpoint's weights."""
    monkeypatch.setattr("verifier.is_correct", lucky)

    def run(out: Path, *steps: int, **flags) -> dict[str, torch.Tensor]:
        for until in steps:
            flags = TINY | flags
            grpo.train(GRPOConfig(out=str(out), steps=until, **flags), str(out))
        return load_file(next(out.glob(f"checkpoints/step_{until:06d}/*model.safetensors")))

    return run


def same_weights(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_checkpoints_restore_weights_optimizer_and_state(fresh, rows, tmp_path):
    path, optimizer = tmp_path / "step_000003", stepped(fresh, rows)
    save_checkpoint(fresh, path, STATE, optimizer)
    again = Policy(path)
    assert same_weights(fresh.model.state_dict(), again.model.state_dict())
    assert checkpoint_state(path) == STATE
    assert checkpoint_state(cards.BASE) == {"step": 0, "sampled_tokens": 0}
    other = make_optimizer(again.parameters(), 0.5, 0.25)
    load_optimizer(other, path / "optimizer.pt")
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    for mine, theirs in zip(fresh.parameters(), again.parameters()):
        moments = optimizer.state[mine]["exp_avg_sq"], other.state[theirs]["exp_avg_sq"]
        assert torch.equal(*moments) and moments[0].any()
    save_checkpoint(fresh, path, STATE | {"step": 4}, optimizer)  # in place of the older one
    assert checkpoint_state(path)["step"] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["step_000003"]  # nothing left aside
    size = sum(file.stat().st_size for file in path.iterdir())
    assert checkpoint_bytes(fresh) == pytest.approx(size, rel=0.03)


def test_only_whole_checkpoints_count(tmp_path):
    for name in ("step_000010", "step_000002", "step_000020.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    found = checkpoints.checkpoints(tmp_path)
    assert [path.name for path in found] == ["step_000002", "step_000010"]
    assert checkpoint_beside(found[1], 2) == found[0]
    with pytest.raises(UsageError, match="--plateau-start 7: .*step_000007 does not exist"):
        checkpoint_beside(found[1], 7)
    remove_checkpoint(found[0])
    assert checkpoints.checkpoints(tmp_path) == found[1:]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_not_saved(fresh, tmp_path, value):
    with torch.no_grad():
        fresh.parameters()[0].fill_(value)
    with pytest.raises(FloatingPointError, match="a weight is not finite"):
        save(fresh, tmp_path / "step_000001")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_half_written(base, tmp_path, monkeypatch):
    free = namedtuple("usage", "free")
    need = checkpoint_bytes(base)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free(need - 1))
    with pytest.raises(UsageError, match="a checkpoint takes 0.00.* GB.*the same command resumes"):
        save(base, tmp_path / "step_000001")

    def fails(*words):
        raise RuntimeError("unexpected pos")  # as torch's zip writer says it

    monkeypatch.setattr(torch, "save", fails)
    for left, error in ((need, RuntimeError), (1000, OSError)):
        usages = iter((need, left))  # before writing, and after the failure
        monkeypatch.setattr("shutil.disk_usage", lambda path, usages=usages: free(next(usages)))
        with pytest.raises(error, match="unexpected pos|No space left on device"):
            save(base, tmp_path / "step_000001")
    assert not list(tmp_path.iterdir())


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    torch.save(Evil(), tmp_path / "optimizer.pt")
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(2))], 1e-3, 0.0)
    with pytest.raises(pickle.UnpicklingError, match="(?i)weights.only"):
        load_optimizer(optimizer, tmp_path / "optimizer.pt")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("keep", "keep_back", "steps"),
    [("all", 0, [2, 4, 6, 8]), ("none", 0, [8]), ("2,6", 0, [2, 6, 8]), ("none", 4, [4, 6, 8])],
)
def test_what_is_kept(tmp_path, keep, keep_back, steps):
    config = GRPOConfig(out=str(tmp_path), keep=keep, **TINY)
    with Run(config, tmp_path, keep_back=keep_back) as run:
        for step in (2, 4, 6, 8):
            run.step = step
            run.save()
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(tmp_path)] == steps


def test_steps_to_keep_are_saved_when_they_come(trained, tmp_path):
    trained(tmp_path, 5, keep="none,3", save_every=2)
    assert [path.name[-1] for path in checkpoints.checkpoints(tmp_path)] == ["3", "5"]


# ---------------------------------------------------------------------- layers computed again


def measured(policy: Policy, rows) -> tuple[torch.Tensor, dict, int]:
    """Log-probs, gradients of a weighted sum of them, and how many numbers backward kept."""
    kept = []

    def count(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        logprobs, _ = policy.logprobs(rows, 1.3)
    (logprobs * torch.arange(logprobs.numel()).view_as(logprobs)).sum().backward()
    named = policy.model.named_parameters()
    return logprobs.detach(), {n: p.grad for n, p in named if p.grad is not None}, sum(kept)


def test_recomputed_layers_change_memory_alone(rows, prompts):
    plain, recomputed = (
        Policy(cards.BASE, dtype="fp64", recompute_layers=on) for on in (False, True)
    )
    logprobs, grads, kept = measured(plain, rows)
    again, same, less = measured(recomputed, rows)
    assert torch.equal(logprobs, again) and grads.keys() == same.keys() and len(grads) > 30
    assert max((grads[name] - same[name]).abs().max() for name in grads) < 1e-12
    assert less < kept / 3
    one, two = (policy.sample([prompts[0]], 3, 40, 1.0, seed=2) for policy in (plain, recomputed))
    assert one[0].completions == two[0].completions


# ---------------------------------------------------------------------- bf16 weights


def change(make, dtype: torch.dtype, steps: int = 50) -> torch.Tensor:
    """Of 131,328 weights of a usual size, by noisy gradients with a mean, at lr 1e-6."""
    generator = torch.Generator().manual_seed(0)
    start = [0.02 * torch.randn(256, 512, generator=generator)]
    start.append(1 + 0.1 * torch.randn(256, generator=generator))
    start = [weight.bfloat16().float() for weight in start]
    means = [0.3 * torch.randn(weight.shape, generator=generator) for weight in start]
    parameters = [torch.nn.Parameter(weight.to(dtype, copy=True)) for weight in start]
    optimizer = make(parameters, lr=1e-6, weight_decay=0.01)
    torch.manual_seed(1)
    for _ in range(steps):
        for parameter, mean in zip(parameters, means):
            noise = torch.randn(mean.shape, generator=generator)
            parameter.grad = (1e-3 * (mean + noise)).to(dtype)
        optimizer.step()
    pairs = zip(parameters, start)
    return torch.cat([(p.detach().float() - weight).flatten() for p, weight in pairs])


def test_updates_survive_bf16():
    """Ours go as far as fp32's within 10 %; rounded to the nearest they go 1 % of the way."""
    pytest.importorskip("torchao")
    exact = change(torch.optim.AdamW, torch.float32)
    assert torch.equal(change(make_optimizer, torch.float32), exact)
    ours, plain = (change(m, torch.bfloat16) for m in (make_optimizer, torch.optim.AdamW))
    assert (ours @ exact / (exact @ exact)).item() == pytest.approx(1, abs=0.1)
    assert (plain @ exact / (exact @ exact)).item() < 0.1


def test_moments_of_8_bits(tmp_path):
    """They come back with this run's learning rate, and take the room that is counted."""
    pytest.importorskip("torchao")
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(512, 512, generator=draw).bfloat16()
    made = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    first, second = (make_optimizer([p], lr, 0.01) for p, lr in zip(made, (1e-3, 2e-3)))
    made[0].grad = torch.randn(512, 512, generator=draw).bfloat16()
    first.step()
    path = tmp_path / "optimizer.pt"
    torch.save(first.state_dict(), path)
    load_optimizer(second, path)
    assert second.param_groups[0]["lr"].item() == pytest.approx(2e-3)
    pairs = zip((first, second), made)
    moments = [optimizer.state[p]["exp_avg"].dequantize() for optimizer, p in pairs]
    assert torch.equal(*moments) and moments[0].abs().max() > 0
    counted = MOMENT_BYTES[torch.bfloat16] * start.numel()
    assert path.stat().st_size == pytest.approx(counted, rel=0.02)


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UsageError, match="bf16 .* requirements-gpu.txt"):
        make_optimizer([torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))], 1e-6, 0.01)


def test_a_bf16_run_resumes_to_the_same_bits(trained, tmp_path, monkeypatch):
    """(seed, step) also decide which way weights are rounded."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(RunConfig, "dtype", "bf16")
    whole, parts = trained(tmp_path / "a", 4), trained(tmp_path / "b", 2, 4)
    assert same_weights(whole, parts) and {w.dtype for w in whole.values()} == {torch.bfloat16}
    lines = read_jsonl(tmp_path / "a/metrics.jsonl")
    assert sum(line.get("grad_norm", 0) > 0 for line in lines) > 1


# ---------------------------------------------------------------------- LoRA


def with_adapters(dtype: str = "fp32", **more) -> Policy:
    """Adapters of rank 3 that change something."""
    pytest.importorskip("peft")
    policy, draw = Policy(cards.BASE, dtype=dtype, lora=3, **more), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return policy


def test_adapters_start_as_nothing_and_are_all_that_is_trained(rows):
    pytest.importorskip("peft")
    policy = Policy(cards.BASE, dtype="fp64", lora=5, recompute_layers=True)
    plain, _, _ = measured(Policy(cards.BASE, dtype="fp64"), rows)
    logprobs, grads, _ = measured(policy, rows)
    assert torch.equal(logprobs, plain)
    text = policy.model.config.text_config
    hidden, mlp, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    q, kv = (n * text.head_dim for n in (text.num_attention_heads, text.num_key_value_heads))
    both = (hidden + q) + 2 * (hidden + kv) + (q + hidden) + 3 * (hidden + mlp)  # in and out
    assert sum(p.numel() for p in policy.parameters()) == layers * 5 * both
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert all("lora_" in name for name in grads) and len(grads) == layers * 7 * 2


def test_adapters_come_back_and_merge(rows, tmp_path):
    policy = with_adapters()
    path = save(policy, tmp_path / "step_000002", 2)
    again, merged = Policy(path), Policy(cards.BASE)
    assert again.base_path == base_model_of(path) == str(cards.BASE)
    with torch.no_grad():
        mine, _ = policy.logprobs(rows, 1.0)
        assert torch.equal(again.logprobs(rows, 1.0)[0], mine)
        before, _ = merged.logprobs(rows, 1.0)
        merged.model.load_state_dict(dict(merged_weights(policy.model)))
        after, _ = merged.logprobs(rows, 1.0)
    assert (after - mine).abs().max() < 1e-4 and (before - mine).abs().max() > 0.1
    assert [file.name for file in path.glob("*.safetensors")] == ["adapter_model.safetensors"]


def test_adapters_become_an_ordinary_model(command, rows, tmp_path):
    """In the base's dtype, with all that a folder needs; its log-probs are the adapters'."""
    policy = with_adapters()
    path, out = save(policy, tmp_path / "step_000002", 2), tmp_path / "deep/whole"
    command("-m", "commands.merge", path, out)
    whole, expected = Policy(out), dict(merged_weights(policy.model))
    assert not whole.has_adapters and whole.base_path == str(out)
    stored = whole.model.state_dict()
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], weight) for name, weight in expected.items())
    with torch.no_grad():
        differ = (whole.logprobs(rows, 1.0)[0] - policy.logprobs(rows, 1.0)[0]).abs().max()
    assert differ < 1e-4
    named = {file.name for file in Path(cards.BASE).iterdir()} - {"README.md"}
    assert named <= {file.name for file in out.iterdir()}
    for words, message in (((path, out), "exists"), ((out, tmp_path / "b"), "holds no adapters")):
        with pytest.raises(UsageError, match=message):
            merge(*words)


def test_adapters_stay_fp32_beside_bf16_weights(tmp_path):
    policy = with_adapters("bf16")
    again = Policy(save(policy, tmp_path / "step_000002"), dtype="bf16")
    pairs = list(zip(policy.parameters(), again.parameters()))
    assert pairs and all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert again.model.lm_head.weight.dtype == torch.bfloat16


def test_a_lora_run_resumes_to_the_same_bits(trained, tmp_path):
    pytest.importorskip("peft")
    flags = {"lora": 4, "lr": None}
    whole, parts = trained(tmp_path / "a", 4, **flags), trained(tmp_path / "b", 2, 4, **flags)
    assert same_weights(whole, parts)
    assert any(weight.any() for name, weight in whole.items() if "lora_B" in name)
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["lr"] == pytest.approx(1e-3)  # ten times that of the weights


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="--lora 3: needs peft; .* requirements-gpu.txt"):
        Policy(cards.BASE, lora=3)
