"""What large models need: gradient checkpointing through the shared cache, LoRA, and an optimizer whose updates survive bf16."""

import json

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file

import cards
from large import load_optimizer, make_optimizer, merged_weights, stored_bytes
from policy import Policy
from run import read_jsonl
from tasks import Prompt, UsageError

TEACHER = ["--model", cards.TEACHER, "--dataset", "cards", *SMALL]  # it is right and wrong in turn, so there are gradients


def measured(policy: Policy, rows) -> tuple[torch.Tensor, dict, int]:
    """Log-probs, gradients of a weighted sum of them, and how many numbers were kept for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        logprobs, _ = policy.logprobs(rows, 1.3)
    (logprobs * torch.arange(logprobs.numel()).view_as(logprobs)).sum().backward()
    return logprobs.detach(), {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}, sum(kept)


@pytest.fixture
def rows(prompts):
    """Three rows of one card prompt and one of another, one of text alone."""
    text = Prompt("text", [{"role": "user", "content": [{"type": "text", "text": "Start at 27 and add the cards."}]}], [], "27")
    policy = Policy(cards.BASE, "cpu", "fp64")
    first, second, third = (policy.encode(prompt) for prompt in (prompts[0], prompts[5], text))
    return [(first, [29, 28, 27]), (first, [15]), (second, [11, 12, 13, 14]), (first, [16, 16]), (third, [20, 21])]


def test_gradient_checkpointing_changes_memory_alone(rows):
    plain, grads, kept = measured(Policy(cards.BASE, "cpu", "fp64"), rows)
    again, same, less = measured(Policy(cards.BASE, "cpu", "fp64", gradient_checkpointing=True), rows)
    assert torch.equal(plain, again) and grads.keys() == same.keys() and len(grads) > 30
    assert max((grads[name] - same[name]).abs().max() for name in grads) < 1e-12
    assert less < kept / 3


def test_checkpointed_model_samples_the_same(prompts):
    texts = [[c.text for c in Policy(cards.BASE, "cpu", gradient_checkpointing=on).sample([prompts[0]], 3, 40, 1.0, seed=2)[0].completions]
             for on in (False, True)]  # fmt: skip
    assert texts[0] == texts[1]


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer
# ---------------------------------------------------------------------------------------------------------------------


def trained(make, dtype: torch.dtype, steps: int = 50) -> torch.Tensor:
    """The change of 131,328 weights, of the size that real ones have, by noisy gradients with a mean, at lr 1e-6."""
    generator = torch.Generator().manual_seed(0)
    start = [0.02 * torch.randn(256, 512, generator=generator), 1 + 0.1 * torch.randn(256, generator=generator)]
    start = [weight.bfloat16().float() for weight in start]
    mean = [0.3 * torch.randn(weight.shape, generator=generator) for weight in start]
    parameters = [torch.nn.Parameter(weight.to(dtype, copy=True)) for weight in start]
    optimizer = make(parameters)
    torch.manual_seed(1)
    for _ in range(steps):
        for parameter, center in zip(parameters, mean):
            parameter.grad = (1e-3 * (center + torch.randn(center.shape, generator=generator))).to(dtype)
        optimizer.step()
    return torch.cat([(parameter.detach().float() - weight).flatten() for parameter, weight in zip(parameters, start)])


def ours(parameters):
    return make_optimizer(parameters, lr=1e-6, weight_decay=0.01)


def plain_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.01)


def test_updates_survive_bf16():
    """Along the change that fp32 AdamW makes, ours goes as far within 10 %; rounding to the nearest goes 1 % of the way."""
    pytest.importorskip("torchao")
    exact = trained(plain_adamw, torch.float32)
    assert torch.equal(trained(ours, torch.float32), exact)
    share = {
        name: (trained(make, torch.bfloat16) @ exact / (exact @ exact)).item()
        for name, make in (("ours", ours), ("plain", plain_adamw))
    }
    assert abs(share["ours"] - 1) < 0.1
    assert abs(share["plain"] - 1) > 0.9


def test_moments_come_back(tmp_path):
    pytest.importorskip("torchao")
    made = [
        torch.nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()) for seed in (0, 0)
    ]
    first, second = (make_optimizer([parameter], lr, 0.01) for parameter, lr in zip(made, (1e-3, 2e-3)))
    made[0].grad = torch.randn(64, 64).bfloat16()
    first.step()
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    load_optimizer(second, tmp_path / "optimizer.pt")
    assert second.param_groups[0]["lr"].item() == pytest.approx(2e-3)  # this run's
    moments = [optimizer.state[parameter]["exp_avg"].dequantize() for optimizer, parameter in zip((first, second), made)]
    assert torch.equal(*moments) and moments[0].abs().max() > 0


def test_room_for_moments_of_8_bits(tmp_path):
    pytest.importorskip("torchao")
    parameter = torch.nn.Parameter(torch.randn(512, 512).bfloat16())
    optimizer = make_optimizer([parameter], 1e-3, 0.01)
    parameter.grad = torch.randn(512, 512).bfloat16()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    counted = sum(stored_bytes(value) for value in optimizer.state[parameter].values())
    assert counted == pytest.approx((tmp_path / "optimizer.pt").stat().st_size, rel=0.02)


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    with pytest.raises(UsageError, match="bf16 .* requirements-vllm.txt"):
        ours([torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))])


# ---------------------------------------------------------------------------------------------------------------------
# LoRA
# ---------------------------------------------------------------------------------------------------------------------


def test_adapters_start_as_nothing_and_are_all_that_is_trained(rows):
    pytest.importorskip("peft")
    policy = Policy(cards.BASE, "cpu", "fp64", lora=5, gradient_checkpointing=True)
    plain, _, _ = measured(Policy(cards.BASE, "cpu", "fp64"), rows)
    logprobs, grads, _ = measured(policy, rows)
    assert torch.equal(logprobs, plain)
    text = policy.model.config.text_config
    q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    sizes = [(text.hidden_size, q), *[(text.hidden_size, kv)] * 2, (q, text.hidden_size),
             *[(text.hidden_size, text.intermediate_size)] * 2, (text.intermediate_size, text.hidden_size)]  # fmt: skip
    assert sum(p.numel() for p in policy.parameters()) == text.num_hidden_layers * 5 * sum(a + b for a, b in sizes)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert all("lora_" in name for name in grads) and len(grads) == text.num_hidden_layers * 7 * 2


def test_adapters_come_back_and_merge(rows, tmp_path):
    pytest.importorskip("peft")
    policy = Policy(cards.BASE, "cpu", lora=3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
        policy.save(tmp_path / "step_000002", {"step": 2})
        mine, _ = policy.logprobs(rows, 1.0)
        again = Policy(tmp_path / "step_000002", "cpu")
        assert torch.equal(again.logprobs(rows, 1.0)[0], mine) and again.base_path == str(cards.BASE)
        merged = Policy(cards.BASE, "cpu")
        before = merged.logprobs(rows, 1.0)[0]
        merged.model.load_state_dict(dict(merged_weights(policy.model)))
        after = merged.logprobs(rows, 1.0)[0]
    assert (after - mine).abs().max() < 1e-4 and (before - mine).abs().max() > 0.1
    assert {path.name for path in (tmp_path / "step_000002").glob("*.safetensors")} == {"adapter_model.safetensors"}


def test_adapters_stay_fp32_beside_bf16_weights(tmp_path):
    pytest.importorskip("peft")
    policy = Policy(cards.BASE, "cpu", "bf16", lora=3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    policy.save(tmp_path / "step_000002", {"step": 2})
    again = Policy(tmp_path / "step_000002", "cpu", "bf16")
    assert all(torch.equal(*pair) for pair in zip(policy.parameters(), again.parameters()))
    assert {p.dtype for p in again.parameters()} == {torch.float32} and again.model.lm_head.weight.dtype == torch.bfloat16


def test_a_lora_run_resumes_to_the_same_bits(command, tmp_path):
    pytest.importorskip("peft")
    for out, steps in (("a", 4), ("b", 2), ("b", 4)):
        command("grpo.py", "--out", tmp_path / out, "--steps", steps, "--lora", "4", *TEACHER)
    a, b = (load_file(tmp_path / out / "checkpoints/step_000004/adapter_model.safetensors") for out in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert any((value != 0).any() for name, value in a.items() if "lora_B" in name)
    assert json.loads((tmp_path / "a/config.json").read_text())["lr"] == pytest.approx(1e-3)  # ten times that of the weights


def test_a_bf16_run_resumes_to_the_same_bits(command, tmp_path):
    """The rounding's dice are thrown by (seed, step), too."""
    pytest.importorskip("torchao")
    for out, steps in (("a", 4), ("b", 2), ("b", 4)):
        command("grpo.py", "--out", tmp_path / out, "--steps", steps, "--dtype", "bf16", *TEACHER)
    a, b = (load_file(tmp_path / out / "checkpoints/step_000004/model.safetensors") for out in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a) and {value.dtype for value in a.values()} == {torch.bfloat16}
    assert sum(line["grad_norm"] > 0 for line in read_jsonl(tmp_path / "a/metrics.jsonl") if "grad_norm" in line) > 1
