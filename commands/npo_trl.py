"""NPO and AutoNPO inside TRL's GRPOTrainer: the whole method, on many GPUs.

    accelerate launch -m commands.npo_trl --intervention early --scout_steps 40 --max_steps 60 \\
        --output_dir runs/npo_trl --use_cpu True --bf16 False --learning_rate 1e-4 \\
        --per_device_train_batch_size 64 --max_completion_length 80 --save_steps 20   # the cards
    accelerate launch --config_file experiments/accelerate/eight_gpus.yaml -m commands.npo_trl \\
        --model Qwen/Qwen3-VL-8B-Instruct --dataset hiyouga/geometry3k --auto \\
        --output_dir runs/8b --bf16 True --max_steps 300 --save_steps 10

With --intervention it goes ahead, asks the guide, goes back and replays as npo.py does; with
--auto it watches itself as autonpo.py does; TRL takes the steps. The guide is the trainer's own
policy, and the engine that trains samples for it, its prompts shared out over the processes.
--guide names an existing one: a checkpoint, a guide.jsonl, a run, or texts. Without these three
flags it is GRPO.

The directory is npo.py's, without curves, samples and evaluations: checkpoints/step_000040,
metrics.jsonl, guide.jsonl, scout/. A checkpoint is TRL's, with generator states and optimizer,
and complete once it has a state.json. Killed anywhere, the same command goes on. Step k asks the
prompts that npo.py's step k asks, given the same --seed (here 42) and as many prompts per step.

TRL is optional: pip install -r requirements-trl.txt
"""

import argparse
import dataclasses
import gc
import os
import re
import sys
from pathlib import Path
from typing import Literal

import torch
import transformers
from accelerate import PartialState

import autonpo
import grpo
import npo
import verifier
from autonpo import AutoNPOConfig, Memory
from commands.trl_trainer import NPOConfig, NPOTrainer, flag
from plumbing import UsageError
from plumbing.checkpoints import checkpoint_beside, checkpoint_path, checkpoints
from plumbing.command import flag_comments, open_directory, start_over
from plumbing.data import load_prompts
from plumbing.encode import config_of, stop_ids, vision_token_ids
from plumbing.guide_cache import GuideCache
from plumbing.lora import ADAPTED
from plumbing.model import auto_class
from plumbing.own_code import load_function
from plumbing.run import rows_of_step, rows_of_steps
from plumbing.trl_data import Processor, load_processor, rewards_of, rows_of
from plumbing.trl_run import TRLRun, kept_flags, on_main

# The flags of npo.py and autonpo.py that are flags here, too, beside those under two headings
OURS = {"model", "dataset", "columns", "instruction", "reward", "lora", "keep", "guide_samples"}
OURS |= {"eval_prompts", "max_prompt_tokens", "fresh"}
OURS_UNDER = {"intervention", "trigger"}
# Those that TRL has under its own name
NAMES = {
    "out": "output_dir",
    "steps": "max_steps",
    "save_every": "save_steps",
    "group_size": "num_generations",
    "max_new_tokens": "max_completion_length",
    "clip_low": "epsilon",
    "clip_high": "epsilon_high",
    "lr": "learning_rate",
    "micro_batch_size": "per_device_train_batch_size",
    "prompts_per_step": "generation_batch_size",
}
SAME = "gate", "slots", "is_correction", "seed", "temperature", "weight_decay", "max_grad_norm"
NEW = {
    "intervention": (Literal["early", "late", "early+late"] | None, None, "NPO, with a scout [no]"),
    "auto": (bool, False, "AutoNPO: it decides by itself when to roll back, and how far"),
}
# TRL's flags that must stay as they are, and why
FIXED = {
    "a run goes back to whole checkpoints": "save_strategy save_only_model",
    "--keep says it": "save_total_limit",
    "here a step is one update on answers of its own": "num_iterations",
    "a run that goes back has the same rate all along": "lr_scheduler_type",
    "the guide would read other prompts": "chat_template_kwargs",
    "prompts are those of npo.py's steps": "ignore_data_skip",
    "answers are paid by verifier.reward or --reward, which need all columns": "reward_weights "
    "remove_unused_columns",
    "the same command resumes": "resume_from_checkpoint",
    "python -m commands.evaluate does it, with a checkpoint": "eval_strategy",
    "docs/trl.md says what is logged": "log_completions",
}


def arguments_class() -> type:
    found = {name: (type, flag(default, text)) for name, (type, default, text) in NEW.items()}
    for kind in (npo.NPOConfig, AutoNPOConfig):
        for name, (heading, text) in flag_comments(kind).items():
            own = kind.__dataclass_fields__[name]
            if name in OURS or heading in OURS_UNDER:
                help = text.replace("%", "%%")  # argparse formats it
                found.setdefault(name, (own.type, flag(own.default, help)))
    made = dataclasses.make_dataclass("Arguments", [(name, *more) for name, more in found.items()])
    made._argument_group_name = "NPO and AutoNPO, as in npo.py and autonpo.py"
    return made


# ---- The method: npo.intervene and autonpo.train, with TRL's steps ----------------------


def intervene(config: npo.NPOConfig, out: Path, trainer: NPOTrainer, scouts: bool) -> None:
    """Goes ahead, asks the guide, goes back, replays. Resumes where it was stopped."""
    on_main(trainer.accelerator, open_directory, config, out)
    guide, start = config.guide, None
    if scouts:
        guide = go_ahead(config, out / "scout", trainer)
        start = checkpoint_path(out / "scout", 0)
    if config.late:
        start = checkpoint_beside(guide, config.plateau_start)
    run = TRLRun(config, out, trainer, start)
    asked = config, guide, run.start_step + 1, out / "guide.jsonl"
    if not scouts:  # the guide of another run, or texts: one process asks it
        with torch.random.fork_rng():  # a resumed run does not ask it again
            on_main(run.processes, npo.ask_guide, *asked)
    cache = npo.ask_guide(*asked, run.policy_at(Path(guide)), run.processes)
    if not checkpoints(out):
        run.sampled_tokens = max(run.sampled_tokens, cache.spent_tokens)
    run.go(cache)


def go_ahead(config: npo.NPOConfig, out: Path, trainer: NPOTrainer) -> str:
    """Runs the scout, as npo.go_ahead does, and returns its last checkpoint."""
    steps = config.plateau_end if config.late else config.scout_steps
    changes = {"intervention": "early", "guided_until": None, "steps": steps, "out": str(out)}
    changes["keep"] = f"{config.keep},0,{config.plateau_start if config.late else steps}"
    scout = dataclasses.replace(config, **changes)
    if config.intervention == "early+late":
        intervene(scout, out, trainer, scouts=True)
    else:
        run = TRLRun(scout, out, trainer)
        run.save_start({})
        run.go(GuideCache())
    return str(checkpoint_path(out, steps))


def watch(config: AutoNPOConfig, out: Path, trainer: NPOTrainer) -> None:
    """autonpo.train's loop."""
    run = TRLRun(config, out, trainer)
    memory = Memory.of(run.memory, out, config)
    run.save_start(memory.stored())
    while run.step < config.steps:
        reason = memory.monitor.warning(run.step, config)
        if reason and run.step % config.save_every == 0:
            memory = autonpo.intervene(run, memory, reason, config)
        run.go(memory.cache, memory)


def configuration(arguments, config: NPOConfig) -> grpo.GRPOConfig:
    """The configuration of autonpo.py, npo.py or grpo.py that these flags mean."""
    alone = arguments.intervention is None and arguments.guide is None
    kind, values, flags = npo.NPOConfig, vars(arguments), NPOConfig.__dataclass_fields__
    if arguments.auto or alone:
        kind = AutoNPOConfig if arguments.auto else grpo.GRPOConfig
    told = {n for n, f in type(arguments).__dataclass_fields__.items() if f.default != values[n]}
    unused = told - kind.__dataclass_fields__.keys() - NEW.keys()
    method = kind.__name__.removesuffix("Config")
    wrong = {
        f"--{name}: {reason}; leave it out": getattr(config, name) != flags[name].default
        for reason, names in FIXED.items()
        for name in names.split()
    }
    wrong |= {
        "--auto: chooses its own rollbacks; leave --intervention and --guide out": (
            arguments.auto and not alone
        ),
        f"--{min(unused, default='')}: has no effect in {method}; leave it out, or say which "
        "method you want by --intervention, --guide or --auto": unused,
        "--guide self: works in npo.py only; leave it out": arguments.guide == "self",
        "--max_steps: is required": config.max_steps < 1,
        "--save_steps, --logging_steps: must be whole": config.save_steps % 1
        or config.logging_steps % 1,
        "--logging_steps: with --auto a line a step; leave it out": (
            arguments.auto and config.logging_steps != 1
        ),
        "--steps_per_generation, --generation_batch_size: here a step is one update on answers of "
        "its own; leave them out": config.steps_per_generation
        != config.gradient_accumulation_steps,
    }
    if found := next((text for text, holds in wrong.items() if holds), None):
        raise UsageError(found)
    values |= {name: getattr(config, theirs) for name, theirs in NAMES.items()}
    values |= {name: getattr(config, name) for name in SAME}
    values |= {
        "intervention": arguments.intervention or "early",
        "save_every": int(config.save_steps),
        "prompts_per_step": config.generation_batch_size // config.num_generations,
        "micro_batch_size": config.per_device_train_batch_size * config.world_size,
        "device": "cpu" if config.use_cpu else "auto",
        "sampler": "hf",
    }
    values = {name: values[name] for name in kind.__dataclass_fields__ if name in values}
    kind(**values | {"device": "cpu"}).check()  # whether one card is enough is TRL's matter
    more = "trl", dict, dataclasses.field(default_factory=dict)
    kind = dataclasses.make_dataclass(kind.__name__, [more], bases=(kind,))
    return kind(**values, trl=kept_flags(config))


def make_trainer(ours: grpo.GRPOConfig, config: NPOConfig, last: int) -> NPOTrainer:
    """A trainer whose data set is the rows of the steps to `last`, in the order of npo.py."""
    prompts, rows = load_prompts(ours)[0], rows_of_steps(ours, 1, last)
    processor = load_processor(ours.model_path)
    tokenizer = getattr(processor, "tokenizer", processor)
    stops = [tokenizer.eos_token_id, *stop_ids(ours.model_path, tokenizer)]  # as TRL has them
    model = auto_class(config_of(ours.model_path)).from_pretrained(
        ours.model_path,
        # AdamW's small steps are lost in bf16 weights; --bf16 computes in it with fp32 ones
        dtype=torch.bfloat16 if config.bf16 and ours.lora else torch.float32,
        trust_remote_code=False,
    )
    adapters = None
    if ours.lora:
        from peft import LoraConfig

        adapters = LoraConfig(r=ours.lora, lora_alpha=2 * ours.lora, target_modules=ADAPTED)
    sees = isinstance(processor, Processor)
    if sees:
        model.base_model.visual.requires_grad_(False)
        # a sampled image token breaks the training forward
        vision, never = vision_token_ids(model.config), "suppress_tokens"
        if config.use_vllm:
            vision, never = dict.fromkeys(vision, -100.0), "logit_bias"
        config.generation_kwargs = (config.generation_kwargs or {}) | {never: vision}
    asked = [prompts[row] for row in rows]
    table, row_of = rows_of(asked, for_text_model=not sees), {p.id: r for p, r in zip(asked, rows)}
    place = {row: number for number, row in enumerate(rows)}
    order = (row for step in range(1, last + 1) for row in rows_of_step(len(prompts), step, ours))
    config.shuffle_dataset = False  # `rows_of_step` has
    return NPOTrainer(
        model=model,
        args=config,
        reward_funcs=rewards_of(lambda id: prompts[row_of[id]], stops),
        train_dataset=table.select([place[row] for row in order]),
        processing_class=processor,
        peft_config=adapters,
        watch=True,
    )


def run_method(arguments, config: NPOConfig) -> None:
    ours = configuration(arguments, config)
    last = [ours.steps]
    if isinstance(ours, npo.NPOConfig) and not ours.guide:
        last += [ours.plateau_end] if ours.late else []
        last += [ours.scout_steps] if "early" in ours.intervention else []
    config.reward_weights = [0.0, 1.0]  # of `rewards_of`
    if ours.reward:
        verifier.reward = load_function("--reward", ours.reward, "prompt", "completion")
    out = Path(ours.out)
    if ours.fresh:
        on_main(PartialState(), start_over, ours)
    on_main(PartialState(), open_directory, ours, out)
    trainer = make_trainer(ours, config, max(last))
    if arguments.auto:
        watch(ours, out, trainer)
    elif isinstance(ours, npo.NPOConfig):
        intervene(ours, out, trainer, scouts=not ours.guide)
    else:
        TRLRun(ours, out, trainer).go(GuideCache())
    PartialState().wait_for_everyone()
    # First DDP lets go of the process group: as its last holder it would wait, without releasing
    # Python's lock, for gloo's thread, which may need that lock
    del trainer
    gc.collect()
    PartialState().destroy_process_group()  # else a process that leaves takes the others down


def in_trls_words(error: Exception) -> str:
    """A message that names our flags, with TRL's names and underscores."""

    def renamed(flag: re.Match) -> str:
        name = flag[1].replace("-", "_")
        return f"--{NAMES.get(name, name)}"

    return re.sub(r"--([a-z][a-z_-]*)", renamed, str(error))


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the docstring, and shows defaults."""


def main() -> None:
    kinds = arguments_class(), NPOConfig
    usage = "python -m commands.npo_trl --output_dir DIR --max_steps N [more, of ours and of TRL's]"
    parser = transformers.HfArgumentParser(
        kinds, usage=usage, description=__doc__, formatter_class=Help
    )
    try:
        try:
            arguments, config = parser.parse_args_into_dataclasses()
        except ValueError as error:  # TRL's and accelerate's, of flags that do not fit together
            raise UsageError(str(error)) from error
        if not PartialState().is_main_process:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, the main one speaks for all
        run_method(arguments, config)
    except (UsageError, OSError, FloatingPointError, ImportError) as error:  # last: another TRL
        told = f"error: {in_trls_words(error)}" if PartialState().is_main_process else 1
        raise SystemExit(told) from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command resumes") from None


if __name__ == "__main__":
    main()
