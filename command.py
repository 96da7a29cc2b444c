"""Command lines: reading the flags, opening the run directory, ending in one clear line.  Plumbing; skip it on a first read."""

import dataclasses
import errno
import functools
import json
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

import cards
from policy import image_parts, load_tokenizer, prompt_length
from tasks import PromptSet, UsageError, counts, load_prompts

# a run may go on with other ones
ONLY_FOR_THE_MACHINE = (
    "fresh", "out", "device", "micro_batch_size", "gradient_checkpointing", "vllm_memory", "keep", "save_optimizers",
)  # fmt: skip


def open_directory(config, out: Path) -> None:
    """Makes the directory, or checks that it holds a run of the same configuration (`steps` may have grown)."""
    mine, theirs = json.loads(json.dumps(dataclasses.asdict(config))), stored_config(out)
    try:
        if theirs is None and out.exists() and any(path.name != "config.json.tmp" for path in out.iterdir()):
            raise UsageError(f"--out {out}: holds files but no run; choose another directory")
        out.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError) as error:
        raise UsageError(f"--out {out}: a file stands where the directory should; choose another one") from error
    begun = any(
        (out / name).exists() for name in ("metrics.jsonl", "checkpoints", "scout", "guide.jsonl", "guide.jsonl.partial")
    )
    if theirs is not None and begun:
        differ = [k for k in mine if k not in ONLY_FOR_THE_MACHINE and theirs.get(k, mine[k]) != mine[k]]
        if "steps" in differ and theirs["steps"] < mine["steps"]:
            differ.remove("steps")
        if differ or theirs.keys() != mine.keys():
            there = ", ".join(f"{k} {theirs[k]} there and {mine[k]} here" for k in differ) or "another method"
            raise UsageError(f"--out {out}: holds a run with another configuration ({there}); choose another --out, or "
                             "start over with --fresh")  # fmt: skip
    aside = out / "config.json.tmp"
    aside.write_text(json.dumps(mine, indent=2) + "\n")
    aside.rename(out / "config.json")


def stored_config(out: Path) -> dict | None:
    """The configuration of the run in a directory; None where there is none (a model's config.json is not one)."""
    path = Path(out) / "config.json"
    try:
        stored = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{path}: is no JSON ({error}); mend it, or choose another --out") from error
    return stored if "prompts_per_step" in stored else None


def start_over(config) -> None:
    """--fresh: the run in --out becomes --out.old, in place of one that stands there."""
    out = Path(config.out).resolve()
    if stored_config(out) is None:
        return
    for flag in ("model", "dataset", "guide"):
        path = Path(getattr(config, flag, "").rpartition("=")[2] or ".").resolve()  # as in mmk12=PATH
        if out == path or out in path.parents:
            raise UsageError(f"--fresh: --{flag} {getattr(config, flag)} lies in the run that would be moved away, --out {out}")
    old = out.with_name(out.name + ".old")
    if stored_config(old) is not None:
        shutil.rmtree(old)
    out.rename(old)


def model_path(config) -> str:
    return str(cards.BASE) if config.model == "cards" else config.model


def load_config_prompts(config) -> tuple[PromptSet, PromptSet]:
    """Training and held-out prompts, read once a process; those that are too long for the model are left out."""
    return _prompts(model_path(config), config.dataset, config.columns, config.train_split, config.eval_split, config.eval_prompts,
                    config.max_prompt_tokens)  # fmt: skip


@functools.lru_cache(maxsize=2)
def _prompts(model: str, dataset: str, *rest) -> tuple[PromptSet, PromptSet]:
    if dataset == "cards":
        return load_prompts(dataset, *rest)
    parts = load_tokenizer(model), *image_parts(model)
    train, held_out = load_prompts(dataset, *rest, length_of=lambda messages, sizes: prompt_length(messages, sizes, *parts))
    for name, prompts in (("training", train), ("held-out", held_out)):
        if prompts.dropped:
            say(f"{dataset}: {len(prompts)} {name} prompts; {counts(prompts.dropped)}")
    return train, held_out


def command_line(config_class, entry) -> None:
    """Reads the flags, runs `entry(config)`; what the user can mend ends in one line and a non-zero exit."""
    import tyro

    config = tyro.cli(config_class, description=sys.modules["__main__"].__doc__)
    try:
        config.check()
        if getattr(config, "dry_run", False):
            import memory_plan

            memory_plan.show(config)
            return
        if getattr(config, "fresh", False):
            start_over(config)
        entry(config)
    except (UsageError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        say("interrupted; the same command goes on")
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SystemExit(f"error: no space left on the disk of --out {config.out}; nothing finished is lost: free some, "
                         "then the same command resumes") from None  # fmt: skip


def say(text: str) -> None:
    tqdm.write(text)
