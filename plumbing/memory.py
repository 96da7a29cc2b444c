"""What a configuration takes: counted without loading it (--dry-run), rehearsed on a GPU."""

import math
from pathlib import Path
from types import SimpleNamespace

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


def left(need: dict[str, int], size: float, share: float) -> tuple[float, float]:
    """Bytes of `size` on a GPU that are left for activations in the update, and in sampling.

    In the update vLLM sleeps. Its `share`, 0 without it, has to hold the weights, too.
    """
    update = size - need["weights"] - need["gradients"] - need["moments"]
    sampling = size - share - need["weights"] - need["moments"]
    return update, min(sampling, share - need["weights"]) if share else sampling


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
    here = config.device if ":" in config.device else 0
    sizes = [torch.cuda.get_device_properties(here).total_memory / 1e9] if config.on_gpu else GPU_GB
    for size in [config.card_gb] if config.card_gb else sizes:
        update, sampling = left(need, size * 1e9, vllm * config.vllm_memory * size * 1e9)
        verdict = f"{update / GIB:.1f} GiB left for activations"
        if update <= 0:
            verdict = f"cannot fit: the update lacks {-update / GIB:.1f} GiB"
        elif sampling <= 0:
            verdict = f"cannot fit: sampling lacks {-sampling / GIB:.1f} GiB; try --vllm-memory"
        share = f"{config.vllm_memory * size * 1e9 / GIB:.1f} GiB for vLLM, which sleeps meanwhile"
        print(f"GPU of {size:.0f} GB{vllm * f', {share}'}: {verdict}")
    print("Activations are not estimated: on a GPU a run begins by rehearsing its longest batch.")


def check_room(config) -> None:
    """UsageError if the GPU has less free memory than is certain to be taken. Loads no weight."""
    if config.device.startswith("cuda:"):
        torch.cuda.set_device(config.device)  # all that is asked here is of it
    need, vllm = counted(config, DTYPES[config.dtype]), config.sampler == "vllm"
    free, total = torch.cuda.mem_get_info()
    size = min(free, (config.card_gb or math.inf) * 1e9)
    update, sampling = left(need, size, vllm * config.vllm_share * total)
    if min(update, sampling) <= 0:
        parts = (f"{name} {need[name] / GIB:.1f}" for name in ("weights", "gradients", "moments"))
        raise UsageError(
            f"GPU: {size / GIB:.1f} of its {total / GIB:.1f} GiB can be used, and that is too "
            f"little ({', '.join(parts)} GiB{vllm * f', vLLM {config.vllm_memory:g} of all'}); "
            "end what else runs there, use --lora 64 (gradients and moments), another "
            "--vllm-memory (it must hold the weights a second time), or a smaller model"
        )


def limit(config, held: int) -> None:
    """--card-gb: torch takes no more in the update than such a card has.

    The `held` bytes of vLLM come on top: torch counts them also while it sleeps.
    """
    _, total = torch.cuda.mem_get_info()
    share = (config.card_gb or 0) * 1e9 + held
    if config.card_gb and share < total:
        torch.cuda.set_per_process_memory_fraction(share / total)
    elif config.card_gb:
        tqdm.write(f"--card-gb {config.card_gb:g}: not enforced, it is too near to what there is")


def in_use() -> float:
    """GiB of the GPU that are taken now, by whatever process."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def peaks(sampling_gib: float, held: int) -> dict[str, float]:
    """GiB: the trainer's peak since sampling ended, and the whole GPU's.

    Args:
        sampling_gib: what was taken when sampling ended.
        held: bytes of vLLM, which are torch tensors, too.
    """
    trainer = (torch.cuda.max_memory_allocated() - held) / GIB
    return {"memory_gib/trainer": trainer, "memory_gib/all": max(sampling_gib, in_use())}


def longest_prompt(policy: Policy, tokens: int) -> EncodedPrompt:
    """Of a picture, all but the last; of a text model, of text."""
    filler, parts = policy.eos_token_ids[0], policy.image_processor
    visual = tokens - 1 if parts else 0
    if not visual:
        return EncodedPrompt([filler] * tokens)
    merged, values = parts.merge_size, 3 * parts.temporal_patch_size * parts.patch_size**2
    cut = SimpleNamespace(
        pixel_values=torch.zeros(visual * merged**2, values),
        image_grid_thw=torch.tensor([[1, merged, merged * visual]]),
    )
    return EncodedPrompt([policy.image_token_id] * visual + [filler], lambda: cut)


def fits(policy: Policy, config, rows: int, moments: int) -> bool:
    """Whether forward and backward of `rows` of the longest sequences run.

    Beside them lie gradients and `moments` bytes, as in mid-update. Leaves no gradient.
    """
    group, filler = config.group_size, policy.eos_token_ids[0]
    prompts = -(-(rows + group - math.gcd(rows, group)) // group)  # at most, in one micro-batch
    # one is shorter by a token: prompts of several lengths take a mask, and so more memory
    lengths = [config.max_prompt_tokens - (number == 1) for number in range(prompts)]
    longest = [longest_prompt(policy, length) for length in lengths]
    batch = [(longest[row % prompts], [filler] * config.max_new_tokens) for row in range(rows)]
    try:
        later = torch.empty(moments, dtype=torch.uint8, device=policy.device)
        for parameter in policy.parameters():  # as from the second micro-batch on
            parameter.grad = torch.zeros_like(parameter)
        policy.logprobs(batch, config.temperature)[0].sum().backward()
        del later
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        for parameter in policy.parameters():
            parameter.grad = None


def rehearse(policy: Policy, config, optimizer, held: int = 0) -> None:
    """Forward and backward of the longest micro-batch that the flags allow; leaves no trace.

    Args:
        held: bytes of vLLM, which sleeps.
    Raises:
        UsageError: out of memory, with the flags to lower.
    """
    rows = min(config.micro_batch_size, config.prompts_per_step * config.group_size)
    trained = policy.parameters()
    moments = int(sum(p.numel() * MOMENT_BYTES[p.dtype] for p in trained))
    gradients = sum(p.numel() * p.element_size() for p in trained)
    missing = 0 if optimizer.state else moments  # a run that goes on has them already
    if config.on_gpu:
        limit(config, held)
    if not fits(policy, config, rows, missing):
        fewer = (rows >> times for times in range(1, rows.bit_length()))
        some = next((count for count in fewer if fits(policy, config, count, missing)), 0)
        remedy = f"Lower --micro-batch-size to {some}, which fits and changes no result"
        if not some:
            saved = (gradients + moments) / GIB
            remedy = (
                "Not even one of them fits. Lower --max-new-tokens or --max-prompt-tokens "
                "(activations), or use --lora 64, which saves most of the gradients' and moments' "
                f"{saved:.1f} GiB"
            )
        raise UsageError(
            f"out of memory in a rehearsal of {rows} sequences of {config.max_prompt_tokens} + "
            f"{config.max_new_tokens} tokens. {remedy}"
        )
    if config.on_gpu:
        peak = (torch.cuda.max_memory_allocated() - held) / GIB
        tqdm.write(f"rehearsal of the longest micro-batch: {peak:.1f} GiB at its peak")
        torch.cuda.empty_cache()
