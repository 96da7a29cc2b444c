"""Checkpoints and optimizers. The only place that writes or removes one.

A checkpoint is an ordinary `save_pretrained` folder with `state.json` and `optimizer.pt`. It is
written aside and renamed, so a kill leaves all of it or nothing.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from plumbing import UsageError
from plumbing.model import VIDEO_CONFIG, Policy

SHARD = "5GB"  # of a checkpoint's safetensors
MOMENT_BYTES = {  # of both of AdamW's moments of a weight
    torch.float64: 16,
    torch.float32: 8,
    torch.bfloat16: 2 + 2 * 4 / 256,  # torchao's: 8 bits each, and a fp32 scale per 256 of them
}


def checkpoint_path(out: str | Path, step: int) -> Path:
    return Path(out) / "checkpoints" / f"step_{step:06d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def checkpoints(out: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; one that is being written ends in .tmp."""
    return [p for p in sorted(Path(out).glob("checkpoints/step_*")) if p.suffix != ".tmp"]


def checkpoint_state(path: str | Path) -> dict:
    """{"step", "sampled_tokens", ...} of a run's checkpoint; step 0 for any other model."""
    state = Path(path) / "state.json"
    return json.loads(state.read_text()) if state.is_file() else {"step": 0, "sampled_tokens": 0}


def checkpoint_beside(checkpoint: str | Path, step: int) -> Path:
    """The checkpoint of another step of the same run."""
    path = Path(checkpoint).with_name(checkpoint_path("", step).name)
    if not path.is_dir():
        raise UsageError(
            f"--plateau-start {step}: {path} does not exist; --guide must be a checkpoint of a run "
            "that has one of that step"
        )
    return path


def write_aside(path: Path, text: str) -> None:
    """Replaces a text file in one act: a kill leaves the old one or the new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    aside.rename(path)


def remove_checkpoint(path: Path) -> None:
    """Renamed first: what a kill leaves of it is no checkpoint."""
    aside = path.with_name(path.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


def save_checkpoint(
    policy: Policy, path: Path, state: dict, optimizer: torch.optim.Optimizer
) -> None:
    if not all(parameter.isfinite().all() for parameter in policy.parameters()):
        raise FloatingPointError("a weight is not finite")
    path.parent.mkdir(parents=True, exist_ok=True)
    need, free = checkpoint_bytes(policy), shutil.disk_usage(path.parent).free
    if need > free:
        raise UsageError(
            f"{path}: a checkpoint takes {need / 1e9:.3g} GB, and {free / 1e9:.3g} are left; "
            "free some, then the same command resumes (--keep says which old ones stay)"
        )
    aside = path.with_name(path.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    with full_disk_is_told(aside, path):
        policy.model.save_pretrained(aside, max_shard_size=SHARD)
        policy.tokenizer.save_pretrained(aside)
        if policy.image_processor:
            policy.image_processor.save_pretrained(aside)
        policy.stock_generation_config.save_pretrained(aside)
        (aside / "state.json").write_text(json.dumps(state))
        if policy.video_config:
            (aside / VIDEO_CONFIG).write_text(policy.video_config)
        torch.save(optimizer.state_dict(), aside / "optimizer.pt")
    shutil.rmtree(path, ignore_errors=True)
    aside.rename(path)


@contextlib.contextmanager
def full_disk_is_told(aside: Path, path: Path) -> Iterator[None]:
    """Removes what was half written. Each library has its own error for a full disk: one here."""
    try:
        yield
    except Exception as error:
        full = shutil.disk_usage(aside).free < 1 << 20
        shutil.rmtree(aside)
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def checkpoint_bytes(policy: Policy) -> int:
    """What a checkpoint takes on disk: adapters or all weights, and the optimizer's moments."""
    trained = policy.parameters()
    kept = trained if policy.has_adapters else policy.model.parameters()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in kept)
    return weights + int(sum(p.numel() * MOMENT_BYTES[p.dtype] for p in trained))


def make_optimizer(
    parameters: list[torch.nn.Parameter], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW; for bf16 weights torchao's, which rounds each new weight up or down at random.

    bf16 numbers lie 0.4 % apart. A step at lr 1e-6 is far smaller, and rounding to the nearest
    would undo 99 % of it; random rounding keeps it on average. torchao's moments have 8 bits.
    """
    if all(parameter.dtype != torch.bfloat16 for parameter in parameters):
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UsageError(
            "bf16 weights are trained with torchao's AdamW: pip install -r requirements-gpu.txt, "
            "or use --device cpu"
        ) from error
    return AdamW8bit(parameters, lr=lr, weight_decay=weight_decay, bf16_stochastic_round=True)


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """The moments of a checkpoint; learning rate and weight decay stay this run's."""
    own = [{key: group[key] for key in ("lr", "weight_decay")} for group in optimizer.param_groups]
    optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    for group, mine in zip(optimizer.param_groups, own):
        group.update(mine)
