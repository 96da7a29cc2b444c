"""Checkpoints and optimizers. The only place that writes or removes one.

A checkpoint is an ordinary `save_pretrained` folder with `state.json` and `optimizer.pt`. It is
written aside and renamed, so a kill or a power cut leaves all of it or nothing. state.json holds
the hashes of the other files, and what is read is compared with them.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing import UsageError
from plumbing.files import file_hashes, is_locked, is_sealed, on_disk, seal_of, write_aside
from plumbing.model import VIDEO_CONFIG, Policy

NAME = r"step_([0-9]{6}|[1-9][0-9]{6,})"  # of a checkpoint's folder
UNTRAINED = {"step": 0, "sampled_tokens": 0}
BOOKKEEPING = ("files", "seal")  # of state.json
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


def is_checkpoint(path: Path, end: str = "") -> bool:
    """By its name: other folders are the user's own, and left alone."""
    return bool(re.fullmatch(NAME + end, path.name)) and path.is_dir()


def checkpoints(out: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(filter(is_checkpoint, Path(out).glob("checkpoints/*")), key=step_of)


def clear_leftovers(out: Path) -> None:
    """Removes what a kill left of checkpoints that were being written or removed."""
    for path in out.glob("checkpoints/*.tmp"):
        if is_checkpoint(path, ".tmp"):
            shutil.rmtree(path)


def checkpoint_state(path: str | Path) -> dict:
    """{"step", "sampled_tokens", ...} of a run's checkpoint; step 0 for any other model."""
    return {n: value for n, value in stored_state(Path(path)).items() if n not in BOOKKEEPING}


def checkpoint_states(out: Path) -> dict[Path, dict]:
    """The state of each of a run's checkpoints. One without state.json is left out, and told."""
    found = checkpoints(out)
    known = [path for path in found if (path / "state.json").is_file()]
    if found and not known:
        raise damaged(found[-1], "state.json is missing")
    states = {path: checkpoint_state(path) for path in known}
    for path in found:
        if path not in states:
            tqdm.write(f"{path}: has no state.json and is left out")
        elif states[path]["step"] != step_of(path):
            raise damaged(path, f"its state.json is of step {states[path]['step']}")
    return states


def stored_state(path: Path) -> dict:
    """What state.json holds, with {"files": {name: hash}}; UsageError if that was changed."""
    file = path / "state.json"
    if not file.is_file() and is_checkpoint(path):
        raise damaged(path, "state.json is missing")
    try:
        state = json.loads(file.read_bytes()) if file.is_file() else UNTRAINED
        if not is_sealed(state):
            raise ValueError("it was changed")
        if state["step"] < 0 or state["sampled_tokens"] < 0:
            raise ValueError("a number is below 0")
        return state | {"files": dict(state.get("files", {}))}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise damaged(path, f"state.json: {error}") from error


def write_state(path: Path, state: dict, files: dict[str, str]) -> None:
    """Replaces state.json in one act, sealed, with the hashes of the other files."""
    state = state | {"files": files}
    write_aside(path / "state.json", json.dumps(state | {"seal": seal_of(state)}))


def checked(path: str | Path, optimizer: bool = False) -> str | Path:
    """The path itself, if its files are those that were saved; any other model's is not looked at.

    Args:
        optimizer: whether optimizer.pt counts. In a run that is not our own it may be gone.
    """
    folder = Path(path)
    saved = stored_state(folder)["files"]
    if not (optimizer and (is_locked(folder.parent.parent) or (folder / "optimizer.pt").exists())):
        saved.pop("optimizer.pt", None)
    files = [folder / name for name in saved]
    if missing := [file.name for file in files if not file.is_file()]:
        raise damaged(folder, f"{missing[0]} is missing")
    for file, there, here in zip(files, saved.values(), file_hashes(files)):
        if there != here:
            raise damaged(folder, f"{file.name} is not what was saved")
    return path


def damaged(path: Path, reason: str) -> UsageError:
    """What is told of a checkpoint that cannot be used, and what becomes of its run."""
    out, remedy = path.parent.parent, "take another one"
    if is_locked(out):  # the run that is being made, or its scout
        steps = [step_of(other) for other in checkpoints(out) if other != path]
        onwards = f"goes on from step {max(steps)}" if steps else "starts over"
        remedy = f"move it away, and the same command {onwards}"
    return UsageError(f"checkpoint {path} is damaged ({reason}); {remedy}")


def checkpoint_beside(checkpoint: str | Path, step: int) -> Path:
    """The checkpoint of another step of the same run."""
    path = Path(checkpoint).with_name(checkpoint_path("", step).name)
    if not path.is_dir():
        raise UsageError(
            f"--plateau-start {step}: {path} does not exist; --guide must be a checkpoint of a run "
            "that has one of that step"
        )
    return path


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
        write_model(policy, aside)
        torch.save(optimizer.state_dict(), aside / "optimizer.pt")
        files = sorted(aside.iterdir())
        for file in files:
            on_disk(file)
        write_state(aside, state, dict(zip((f.name for f in files), file_hashes(files))))
    shutil.rmtree(path, ignore_errors=True)
    aside.rename(path)


def write_model(policy: Policy, folder: Path) -> None:
    """All that loading it takes, its adapters alone where it has some."""
    policy.model.save_pretrained(folder, max_shard_size=SHARD)
    policy.tokenizer.save_pretrained(folder)
    if policy.image_processor:
        policy.image_processor.save_pretrained(folder)
    policy.stock_generation_config.save_pretrained(folder)
    if policy.video_config:
        (folder / VIDEO_CONFIG).write_text(policy.video_config)


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
