"""What a configuration takes: counted without loading it (--dry-run), rehearsed on a GPU."""

import math
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing import UsageError
from plumbing.checkpoints import MOMENT_BYTES
from plumbing.encode import config_of, unloadable
from plumbing.lora import adapter_rank, base_model_of, train_adapters
from plumbing.metrics import batch_arithmetic
from plumbing.model import Policy, auto_class
from plumbing.rollout import EncodedPrompt

GIB = 2**30
GPU_GB = (24, 48, 80, 141)  # sizes to choose from, where there is no GPU
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def counted(config, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of what is certain: weights, gradients, moments and a checkpoint. Loads no weight."""
    path = config.model_path
    try:
        shape = config_of(path)
        with torch.device("meta"):  # tensors with a shape and nothing in them
            model = auto_class(shape).from_config(shape, dtype=dtype, trust_remote_code=False)
        if hasattr(shape, "vision_config"):
            model.base_model.visual.requires_grad_(False)
    except Exception as error:
        raise unloadable(path, error) from error
    if rank := adapter_rank(path) or config.lora:
        train_adapters(model, rank, base_model_of(path))
    every = list(model.parameters())
    trained = [parameter for parameter in every if parameter.requires_grad]
    weights, gradients = (
        sum(p.numel() * p.element_size() for p in chosen) for chosen in (every, trained)
    )
    moments = int(sum(p.numel() * MOMENT_BYTES[p.dtype] for p in trained))
    return {
        "parameters": sum(p.numel() for p in every),
        "trained": sum(p.numel() for p in trained),
        "weights": weights,
        "gradients": gradients,
        "moments": moments,
        "checkpoint": (gradients if rank else weights) + moments,
    }


def show(config) -> None:
    """Prints what the run takes, and on which GPU it cannot fit."""
    elsewhere = not config.in_world and not config.on_gpu  # planned for a GPU somewhere else
    dtype = "bf16" if elsewhere else config.dtype
    vllm = config.sampler == "vllm" or elsewhere
    need = counted(config, DTYPES[dtype])
    print(batch_arithmetic(config))
    print(f"{need['parameters']:,} parameters, {need['trained']:,} of them trained, {dtype}")
    for name in ("weights", "gradients", "moments"):
        print(f"{name:10} {need[name] / GIB:7.1f} GiB")
    print(f"checkpoint {need['checkpoint'] / GIB:7.1f} GiB on the disk of {Path(config.out)}")
    if config.in_world and not config.on_gpu:
        return
    training = need["weights"] + need["gradients"] + need["moments"]
    share = config.vllm_memory if vllm else 0.0
    sizes = [torch.cuda.get_device_properties(0).total_memory / 1e9] if config.on_gpu else GPU_GB
    for size in sizes:
        left = size * 1e9 * (1 - share) - training
        verdict = f"{left / GIB:.1f} GiB left for activations"
        if left <= 0 or share * size * 1e9 < need["weights"] * vllm:
            verdict = "cannot fit: less than training or vLLM's own weights take"
        vllm_gib = f"{share * size * 1e9 / GIB:.1f} GiB for vLLM (none with --sampler hf)"
        print(f"GPU of {size:.0f} GB, {vllm_gib}: {verdict}")
    print("Activations are not estimated: on a GPU a run begins by rehearsing its longest batch.")


def rehearse(policy: Policy, config) -> None:
    """Forward and backward of the longest micro-batch that the flags allow; leaves no gradient.

    Raises:
        UsageError: out of memory, with the flags to lower.
    """
    group, filler = config.group_size, policy.eos_token_ids[0]
    rows = min(config.micro_batch_size, config.prompts_per_step * group)
    prompts = -(-(rows + group - math.gcd(rows, group)) // group)  # at most, in one micro-batch
    longest = [EncodedPrompt([filler] * config.max_prompt_tokens) for _ in range(prompts)]
    batch = [(longest[row % prompts], [filler] * config.max_new_tokens) for row in range(rows)]
    moments = sum(p.numel() * MOMENT_BYTES[p.dtype] for p in policy.parameters())
    try:
        later = torch.empty(int(moments), dtype=torch.uint8, device=policy.device)
        policy.logprobs(batch, config.temperature)[0].sum().backward()
        del later
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"out of memory in a rehearsal of {rows} sequences of {config.max_prompt_tokens} + "
            f"{config.max_new_tokens} tokens. Lower --micro-batch-size (activations), "
            "--max-new-tokens or --max-prompt-tokens (activations), --vllm-memory (vLLM's share), "
            "or use --lora 64 (gradients and moments)"
        ) from error
    finally:
        for parameter in policy.parameters():
            parameter.grad = None
    if policy.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(policy.device) / GIB
        tqdm.write(f"rehearsal of the longest micro-batch: {peak:.1f} GiB at its peak")
        torch.cuda.empty_cache()
