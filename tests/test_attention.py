"""Attention without a mask is attention with one, where no prompt is padded."""

import pytest
import torch
from conftest import TEXT_MODELS

from plumbing import attention
from plumbing.model import Policy, checkpoint_layers
from plumbing.rollout import EncodedPrompt
from worlds import cards

EVEN = [EncodedPrompt([7, 9, 11, 13, 8]), EncodedPrompt([10, 12, 9, 9, 14])]
UNEVEN = [EVEN[0], EncodedPrompt([9, 14])]
ANSWERS = [[12, 7, 9], [8], [11, 10, 9, 7, 12, 2], [13, 2]]


def rows_of(prompts: list[EncodedPrompt]) -> list[tuple]:
    return [(prompts[row // 2], ids) for row, ids in enumerate(ANSWERS)]


def result_of(policy: Policy, prompts: list[EncodedPrompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (B, T) and all gradients of a weighted sum of them."""
    policy.model.zero_grad()
    logprobs, _ = policy.logprobs(rows_of(prompts), 1.3)
    (logprobs * torch.linspace(-1, 2, logprobs.shape[1])).sum().backward()
    return logprobs.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ["cards", "qwen3"])  # the second shares keys between heads
def test_log_probs_and_gradients_are_those_with_masks(folder, monkeypatch, name, recomputed):
    path = cards.BASE if name == "cards" else folder(name)
    plain, masked = (Policy(path, dtype="fp64") for _ in range(2))
    masked.model.set_attn_implementation("sdpa")
    if recomputed:
        for policy in (plain, masked):
            checkpoint_layers(policy.model)
    for prompts in (EVEN, EVEN[:1] * 2, UNEVEN):
        (logprobs, gradient), (theirs, expected) = (result_of(p, prompts) for p in (plain, masked))
        torch.testing.assert_close(logprobs, theirs, rtol=0, atol=1e-12)
        assert (gradient - expected).norm() <= 1e-9 * expected.norm() > 0


def test_only_padded_prompts_have_masks(monkeypatch):
    policy, masks, biases = Policy(cards.BASE), [], []
    bias, mask = attention.causal_lower_right, attention.sdpa_mask
    monkeypatch.setattr(attention, "sdpa_mask", lambda *a, **k: masks.append(k) or mask(*a, **k))
    monkeypatch.setattr(attention, "causal_lower_right", lambda *s: biases.append(s) or bias(*s))
    policy.logprobs(rows_of(EVEN), 1.0)
    assert not masks and biases == [(6, 10)] * 3  # 6 queries after 4 cached keys, in three layers
    biases.clear()
    policy.logprobs(rows_of(UNEVEN), 1.0)
    assert not biases and len(masks) == 2


def test_a_sliding_window_keeps_its_mask(folder):
    policy = Policy(folder("gemma3"), dtype="fp64")
    kinds = policy.model.config.layer_types
    assert {*kinds} == {"sliding_attention", "full_attention"} and "gemma3" in TEXT_MODELS
    long = [EncodedPrompt([7, 9, 11, 13, 8, 12, 10, 9, 14, 11])]
    with torch.no_grad():
        got, mask = policy.logprobs([(long[0], ANSWERS[2])], 1.0)
        ids = torch.tensor([long[0].token_ids + ANSWERS[2]])
        plain = policy.model(input_ids=ids, use_cache=False).logits[0, 9:-1]
    expected = policy.sampling_logprobs(plain, 1.0).gather(1, torch.tensor(ANSWERS[2])[:, None])
    torch.testing.assert_close(got[0], expected[:, 0], rtol=0, atol=1e-6)
