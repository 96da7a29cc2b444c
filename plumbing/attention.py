"""Causal attention without a mask where all prompts of a batch are equally long.

Completions follow a cached prompt, so the last query sees the last key: `causal_lower_right`. On a
GPU it runs as flash attention, which takes no mask and shares keys and values between the heads of
a group. transformers would build a mask of every query and key, and repeat both for every head.
"""

import torch
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

NAME = "lower_right"


def mask_of(*args, mask_function=causal_mask_function, attention_mask=None, **more):
    """None where plain causal attention has no padding to hide; else transformers' own mask."""
    if attention_mask is None and mask_function is causal_mask_function:
        return None
    return sdpa_mask(*args, mask_function=mask_function, attention_mask=attention_mask, **more)


def attend(module, query, key, value, attention_mask, scaling=None, **more):
    """Attention (B, L, heads, D) of queries (B, heads, L, D) to keys (B, KV heads, S, D)."""
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is not None or not 1 < queries < keys:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **more
        )
    found = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=causal_lower_right(queries, keys),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return found.transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask_of)


def without_masks(model) -> None:
    """Makes a text model, or the text part of a Qwen3-VL, attend so, where it had torch's sdpa."""
    text = model.config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None):  # Gemma 2's, which sdpa leaves out
        model.set_attn_implementation("eager")
    elif model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(
            {"text_config": NAME} if hasattr(model.config, "text_config") else NAME
        )
