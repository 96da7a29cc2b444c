"""A checkpoint of LoRA adapters as the folder of an ordinary model, to serve or to train on.

    python -m commands.merge runs/lora/checkpoints/step_000100 runs/merged

The weights are those that vLLM samples with in training: the base's plus the adapters', rounded
once to the base's dtype. It runs on the CPU and takes twice the weights' memory.
"""

from pathlib import Path

import torch
import tyro

from plumbing import UsageError
from plumbing.checkpoints import checked, full_disk_is_told, write_model
from plumbing.encode import config_of
from plumbing.lora import adapter_rank, base_model_of, merged_weights
from plumbing.model import Policy
from plumbing.settings import installed


def main(checkpoint: Path, out: Path, /) -> None:
    """Merges adapters into their base model.

    Args:
        checkpoint: A folder of adapters.
        out: The folder to write; it must not exist yet.
    """
    if not adapter_rank(checkpoint):
        raise UsageError(f"{checkpoint}: holds no adapters; a whole model needs no merging")
    if not installed("peft"):
        raise UsageError("adapters need peft; pip install -r requirements-gpu.txt")
    if out.exists():
        raise UsageError(f"{out}: exists; remove it, or choose another folder")
    shape = config_of(checkpoint)
    stored = {shape.dtype, shape.get_text_config().dtype}  # public ones tell it in the latter
    dtype = "bf16" if torch.bfloat16 in stored else "fp32"
    adapted = Policy(checked(checkpoint), "cpu", dtype)
    whole = Policy(base_model_of(checkpoint), "cpu", dtype)
    whole.model.load_state_dict(dict(merged_weights(adapted.model)))
    out.mkdir(parents=True)
    with full_disk_is_told(out, out):
        write_model(whole, out)


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (UsageError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
