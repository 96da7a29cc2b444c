"""What makes a model of billions of parameters fit on one card and learn in bf16.  Plumbing; skip it on a first read.

- LoRA: small adapters are trained in place of the weights (peft).
- Gradient checkpointing that goes together with the cache in which rows share their prompt.
- An optimizer whose updates survive bf16 (torchao).
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from tasks import UsageError

ADAPTED = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # by LoRA: every linear layer of the language model


def train_adapters(model, rank: int, path: str | Path) -> None:
    """LoRA (arXiv 2106.09685): freezes the model but for its adapters, which are added if `path` holds none.

    `lora_alpha` = 2 rank, as TRL's default; adapters are fp32, whatever the weights are.
    """
    try:
        from peft import LoraConfig, set_peft_model_state_dict
    except ImportError as error:
        raise UsageError(f"--lora {rank}: needs peft; pip install -r requirements-vllm.txt") from error
    saved = model._hf_peft_config_loaded
    if not saved:
        model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    if saved:  # again, as they were: they came in the weights' dtype
        set_peft_model_state_dict(model, load_file(Path(path) / "adapter_model.safetensors"))


def merged_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight of the whole model, adapters merged in, one at a time: what another engine loads."""
    for name, weight in model.state_dict().items():
        if name.endswith(".base_layer.weight"):
            name = name.removesuffix(".base_layer.weight")
            delta = model.get_submodule(name).get_delta_weight("default")
            name, weight = f"{name}.weight", (weight + delta).to(weight.dtype)
        if "lora_" not in name:
            yield name, weight


def checkpoint_layers(model) -> None:
    """Lets each layer of the language model keep its input alone, and compute the rest again in the backward pass.

    transformers' own gradient checkpointing does without the cache, in which rows share their prompt: here keys and values go
    through the checkpoint as tensors.
    """
    for layer in model.base_model.language_model.layers:
        layer.forward = functools.partial(_checkpointed, layer.forward, layer.self_attn.layer_idx, model.config)


def _checkpointed(forward, index: int, config, hidden, past_key_values=None, **rest):
    if not torch.is_grad_enabled():
        return forward(hidden, past_key_values=past_key_values, **rest)

    def compute(hidden, *before):
        cache = DynamicCache(config=config)
        if before:
            cache.update(*before, index)
        hidden = forward(hidden, past_key_values=cache, **rest)
        return (hidden,) if before else (hidden, cache.layers[index].keys, cache.layers[index].values)

    layer = past_key_values.layers[index]
    before = (layer.keys, layer.values) if past_key_values.get_seq_length(index) else ()
    hidden, *prompt = checkpoint(compute, hidden, *before, use_reentrant=False)
    if prompt:  # the completions come after; what they leave in a cache nobody reads
        past_key_values.update(*prompt, index)
    return hidden


def make_optimizer(parameters: list[torch.nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW. In bf16 torchao's, which rounds each new weight up or down at random, so that on average it keeps its step.

    bf16 numbers lie 0.4 % apart; a step at lr 1e-6 is far less, and rounding to the nearest would undo 99 % of it. Moments have 8 bits.
    """
    if all(parameter.dtype != torch.bfloat16 for parameter in parameters):
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UsageError(
            "bf16 weights are trained with torchao's AdamW: pip install -r requirements-vllm.txt, or take --dtype fp32"
        ) from error
    return AdamW8bit(parameters, lr=lr, weight_decay=weight_decay, bf16_stochastic_round=True)


def stored_bytes(tensor: torch.Tensor) -> int:
    """Also of torchao's, which are some tensors of 8 bits that look like one of 16."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """The moments of a checkpoint; learning rate and weight decay stay this run's."""
    own = [{key: group[key] for key in ("lr", "weight_decay")} for group in optimizer.param_groups]
    optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    for group, mine in zip(optimizer.param_groups, own):
        group.update(mine)
