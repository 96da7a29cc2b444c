"""LoRA (arXiv 2106.09685): small adapters are trained in place of the weights. Uses peft."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from plumbing import UsageError

ADAPTED = r".*\.layers\..*\.(q|k|v|o|gate|up|down)_proj"  # the language model's linear layers


def base_model_of(path: str | Path) -> str:
    """The model that a folder of adapters belongs to; any other path is itself."""
    adapter = Path(path) / "adapter_config.json"
    if adapter.is_file():
        return json.loads(adapter.read_text())["base_model_name_or_path"]
    return str(path)


def adapter_rank(path: str | Path) -> int:
    """Of a folder of adapters; 0 for any other path."""
    adapter = Path(path) / "adapter_config.json"
    return json.loads(adapter.read_text())["r"] if adapter.is_file() else 0


def train_adapters(model, rank: int, path: str | Path) -> None:
    """Freezes all but the adapters, which are added where `path` holds none.

    `lora_alpha` is 2 * rank, TRL's default. Adapters are fp32 whatever the weights are.
    """
    try:
        from peft import LoraConfig, set_peft_model_state_dict
    except ImportError as error:
        raise UsageError(
            f"--lora {rank}: needs peft; pip install -r requirements-gpu.txt "
            "(for a --dry-run peft alone will do)"
        ) from error
    saved = model._hf_peft_config_loaded
    if not saved:
        model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    if saved:  # read again in fp32: they were loaded in the weights' dtype
        set_peft_model_state_dict(model, load_file(Path(path) / "adapter_model.safetensors"))


def merged_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight, adapters merged in, one at a time: what vLLM loads."""
    for name, weight in model.state_dict().items():
        if name.endswith(".base_layer.weight"):
            name = name.removesuffix(".base_layer.weight")
            delta = model.get_submodule(name).get_delta_weight("default")
            name, weight = f"{name}.weight", (weight + delta).to(weight.dtype)
        if "lora_" not in name:
            yield name, weight
