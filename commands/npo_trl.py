"""NPO and AutoNPO inside TRL's GRPOTrainer: the whole method, on many GPUs.

    accelerate launch -m commands.npo_trl --intervention early --scout_steps 40 --max_steps 60 \\
        --output_dir runs/npo_trl --use_cpu True --bf16 False --learning_rate 1e-4 \\
        --per_device_train_batch_size 64 --max_completion_length 80 --save_steps 20   # the cards
    accelerate launch --config_file experiments/accelerate/eight_gpus.yaml -m commands.npo_trl \\
        --model Qwen/Qwen3-VL-8B-Instruct --dataset hiyouga/geometry3k --auto \\
        --output_dir runs/8b --bf16 True --max_steps 300 --save_steps 10

It goes ahead, asks the guide, goes back and replays as npo.py does, or watches itself as autonpo.py
does, with their own functions; TRL takes the steps. The guide is the trainer's policy: it answers
by the engine that trains, its prompts shared out over the processes. --guide names one that is
there: a checkpoint, a guide.jsonl, a run, or texts. Without any of these flags it is GRPO.

The directory is npo.py's: checkpoints/step_000040, metrics.jsonl, guide.jsonl, scout/. A checkpoint
is TRL's, with generator states and optimizer, and counts once state.json is in it. Killed anywhere,
the same command goes on. Step k asks the prompts that npo.py's step k asks.

TRL is optional: pip install -r requirements-trl.txt
"""

import dataclasses
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Literal

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import autonpo
import grpo
import npo
import verifier
from autonpo import AutoNPOConfig, Memory
from commands.trl_trainer import NPOConfig, NPOTrainer, flag, rows_of
from plumbing import UsageError
from plumbing.checkpoints import (
    UNTRAINED,
    checkpoint_beside,
    checkpoint_path,
    checkpoint_state,
    checkpoint_states,
    checkpoints,
    clear_leftovers,
    write_state,
)
from plumbing.command import flag_comments, open_directory
from plumbing.data import load_prompts
from plumbing.encode import config_of, encode, image_parts, load_tokenizer, vision_token_ids
from plumbing.files import on_disk
from plumbing.guide_cache import GuideCache
from plumbing.lora import ADAPTED
from plumbing.metrics import batch_arithmetic
from plumbing.model import auto_class
from plumbing.rollout import Completion, EncodedPrompt, Group, Prompt, batched
from plumbing.run import Run, lineage_key, rows_of_step, rows_of_steps, sampled_tokens
from plumbing.track import Curve

# Flags that are npo.py's and autonpo.py's own, with their defaults and help
OURS = [
    "model",
    "dataset",
    "columns",
    "lora",
    "keep",
    "guide_samples",
    "scout_steps",
    "plateau_start",
    "plateau_end",
    "guide",
    "guided_until",
    "mistake_pass_rate",
    "max_distance",
    "patience",
    "min_gain",
    "entropy_drop",
    "probe_prompts",
    "probe_samples",
    "confirm_pass_rate",
    "cooldown",
]
NEW = {
    "intervention": (Literal["early", "late", "early+late"] | None, None, "go ahead and back [no]"),
    "auto": (bool, False, "AutoNPO: it decides by itself when to roll back, and how far"),
}


def arguments_class() -> type:
    found = [(name, type, flag(default, text)) for name, (type, default, text) in NEW.items()]
    for name in OURS:
        kind = npo.NPOConfig if name in npo.NPOConfig.__dataclass_fields__ else AutoNPOConfig
        own, (_, text) = kind.__dataclass_fields__[name], flag_comments(kind)[name]
        found.append((name, own.type, flag(own.default, text.replace("%", "%%"))))
    return dataclasses.make_dataclass("Arguments", found)


class Engine:
    """What samples and scores for the trainer's policy, as plumbing.model.Policy does.

    It is the engine that trains, transformers or vLLM. The rows are shared out over the processes,
    and every process gets all results, in one order. Log-probs are those of the training forward.
    """

    def __init__(self, trainer: NPOTrainer, ready=lambda: None):
        """`ready` is called before each use, and sees to the weights."""
        self.trainer, self.processes, self.ready = trainer, trainer.accelerator, ready
        path = trainer.model.config._name_or_path
        self.tokenizer, self.image_parts = load_tokenizer(path), image_parts(path)

    def share(self, items: list) -> list:
        """Those of this process; the last one is repeated, so that all processes have as many."""
        count = -(-len(items) // self.processes.num_processes)
        mine = items[self.processes.process_index * count :][:count]
        return mine + items[-1:] * (count - len(mine))

    @torch.no_grad()
    def sample(
        self, prompts: list[Prompt], group_size: int, max_new_tokens: int, temperature: float, seed
    ) -> list[Group]:
        """P groups of G completions. Length and temperature are those that the trainer has."""
        self.ready()
        encoded = [encode(prompt, self.tokenizer, *self.image_parts) for prompt in prompts]
        slots = [s for s in self.share(list(zip(prompts, encoded))) for _ in range(group_size)]
        images = [prompt.images or None for prompt, _ in slots]
        asked, fields = [one for _, one in slots], {}
        if any(images):
            fields = self.pictures(asked)
            del fields["num_images"]
            types = [[int(id == self.image_parts[1]) for id in one.token_ids] for one in asked]
            fields["mm_token_type_ids"] = types
        ids = [one.token_ids for one in asked]
        with torch.random.fork_rng():  # training draws the same numbers with and without this
            torch.manual_seed(seed + self.processes.process_index)
            found, _ = self.trainer._generate_single_turn(
                ids, images if any(images) else None, fields, group_size
            )
        logprobs, stops = self._score(list(zip(asked, found))), self.trainer.eos_token_ids
        texts = self.tokenizer.batch_decode(found, skip_special_tokens=True)
        answers = [
            Completion(prompt.id, ids, values, text, ids[-1] in stops)
            for (prompt, _), ids, values, text in zip(slots, found, logprobs, texts)
        ]
        groups = gather_object(list(batched(answers, group_size)))
        return [Group(*parts) for parts in zip(prompts, encoded, groups)]

    @torch.no_grad()
    def logprobs(
        self, rows: list[tuple[EncodedPrompt, list[int]]], temperature: float
    ) -> tuple[torch.Tensor, None]:
        """Log-probs (B, T) of completions, 0 beyond a row's length."""
        self.ready()
        found = gather_object(self._score(self.share(rows)))[: len(rows)]
        return pad_sequence([torch.tensor(values) for values in found], batch_first=True), None

    def _score(self, rows: list[tuple[EncodedPrompt, list[int]]]) -> list[list[float]]:
        """Each row's log-probs, of this process's rows."""
        trainer, found = self.trainer, []
        for some in batched(rows, trainer.args.per_device_train_batch_size):
            prompts = [torch.tensor(one.token_ids) for one, _ in some]
            answers = [torch.tensor(ids) for _, ids in some]
            sides, masks = [], []
            for parts, side in ((prompts, "left"), (answers, "right")):
                sides.append(pad_sequence(parts, True, padding_side=side))
                ones = [torch.ones_like(part) for part in parts]
                masks.append(pad_sequence(ones, True, padding_side=side))
            ids, mask = (torch.cat(parts, 1).to(self.processes.device) for parts in (sides, masks))
            fields = self.pictures([one for one, _ in some])
            if fields:
                types = (ids == self.image_parts[1]).long()
                for name in ("pixel_values", "image_grid_thw"):
                    fields[name] = fields[name].to(ids.device)
                fields["mm_token_type_ids"] = types
            width = sides[1].shape[1]
            values, *_ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, width, **fields
            )
            found += [row[: len(part)].tolist() for row, part in zip(values, answers)]
        return found

    def pictures(self, rows: list[EncodedPrompt]) -> dict:
        """TRL's fields of the rows' pictures; none where no row has one."""
        seen = [one for one in rows if one.pixel_values is not None]
        if not seen:
            return {}
        return {
            "pixel_values": torch.cat([one.pixel_values for one in seen]),
            "image_grid_thw": torch.cat([one.image_grid_thw for one in seen]),
            "num_images": [0 if o.pixel_values is None else len(o.image_grid_thw) for o in rows],
        }


def on_main(processes, act, *args) -> None:
    """The main process acts while the others wait. What it raises, all of them raise."""
    error = None
    if processes.is_main_process:
        try:
            act(*args)
        except Exception as problem:
            error = problem
    [error] = broadcast_object_list([error])
    if error:
        raise error


class TRLRun(Run, transformers.TrainerCallback):
    """A run directory whose steps TRL's trainer takes. Each process has one; the main one writes.

    Args:
        start: the checkpoint of TRL's that it starts from, optimizer included; None: the base.
    """

    def __init__(self, config, out: Path, trainer: NPOTrainer, start: Path | None = None):
        self.config, self.out, self.trainer, self.start = config, out, trainer, start
        self.processes, self.keep_back = trainer.accelerator, getattr(config, "max_distance", 0)
        self.curve, self.train_prompts = Curve(config, out), load_prompts(config)[0]
        on_main(self.processes, self._open)
        if start and not (start / "trainer_state.json").is_file():
            raise UsageError(f"{start}: is no checkpoint of TRL's, so TRL cannot go on from it")
        fresh = checkpoint_state(start) if start else UNTRAINED
        state = max(checkpoint_states(out).values(), key=lineage_key, default=fresh)
        self.start_step, self.step, self.spent_tokens = fresh["step"], state["step"], 0
        self.sampled_tokens = state["sampled_tokens"]
        self.rollbacks, self.memory = state.get("rollbacks", 0), state.get("memory", {})
        self.remembered = None  # AutoNPO's, while it trains

    def _open(self) -> None:
        open_directory(self.config, self.out)
        clear_leftovers(self.out)
        for path in self.out.glob("checkpoint-*"):  # that a kill left half written
            shutil.rmtree(path)
        newest = max(map(lineage_key, checkpoint_states(self.out).values()), default=(0, -1))
        if newest[0]:
            self._forget_after(newest[1])
        self._drop_lines_after(newest)

    # ------------------------------------------------------------------------- TRL takes steps

    def go(self, cache: GuideCache, memory: Memory | None = None) -> None:
        """To the last step, or to a warning of the monitor."""
        trainer, args = self.trainer, self.trainer.args
        if self.step == self.config.steps:
            return
        newest = checkpoint_path(self.out, self.step)
        source = newest if newest.is_dir() else self.start
        trainer.guides, self.remembered = cache, memory
        args.output_dir, args.max_steps = str(self.out), self.config.steps
        trainer.add_callback(self)
        trainer.train(resume_from_checkpoint=source and str(source))
        trainer.remove_callback(self)
        trainer.holds = checkpoint_path(self.out, self.step)

    def on_train_begin(self, args, state, control, **_):
        if self.processes.is_main_process:
            tqdm.write(first_line(self))

    def on_step_end(self, args, state, control, **_):
        step, groups = state.global_step, [own for own, _ in self.trainer.groups]
        self.sampled_tokens += sampled_tokens(groups)
        found = {"sampled_tokens": self.sampled_tokens}
        if self.remembered:
            rates = {row: group.pass_rate for row, group in zip(self.rows(step), groups)}
            reward = statistics.fmean(c.reward for group in groups for c in group.completions)
            own = {"reward": reward, "entropy": self.trainer.entropy}
            found |= self.remembered.observe(step, rates, own, self.config)
            self.memory = self.remembered.stored()
        for name, value in found.items():
            self.trainer._metrics["train"][name].append(value)
        control.should_save = control.should_save or str(step) in self._kept_steps()
        return control

    def on_save(self, args, state, control, **_):
        self.step = state.global_step
        self.processes.wait_for_everyone()  # each has written its part
        on_main(self.processes, self._commit)
        regular = self.step % self.config.save_every == 0
        if self.remembered and regular and self.remembered.monitor.warning(self.step, self.config):
            control.should_training_stop = True  # then `autonpo.intervene` decides
        return control

    def on_log(self, args, state, control, logs=None, **_):
        if self.processes.is_main_process and "loss" in logs:
            super().log({"step": state.global_step, **logs})

    def _commit(self) -> None:
        """TRL's checkpoint becomes one of the run's, in one act."""
        aside, path = self.out / f"checkpoint-{self.step}", checkpoint_path(self.out, self.step)
        for file in filter(Path.is_file, aside.rglob("*")):
            on_disk(file)
        write_state(aside, self._state(), {})
        path.parent.mkdir(exist_ok=True)
        aside.rename(path)
        self._forget_old()

    # ------------------------------------------- what npo.py and autonpo.py ask of a run

    def save(self) -> None:
        """A checkpoint of the base, where nothing has been trained yet."""
        self.load(None)
        self.trainer.args.output_dir = str(self.out)
        self.trainer._save_checkpoint(self.trainer.model, None)
        on_main(self.processes, self._commit)

    def load(self, path: Path | None) -> None:
        """The trainer's weights become a checkpoint's, by a `train` that takes no step."""
        trainer, args = self.trainer, self.trainer.args
        if path is None or trainer.holds != path:
            args.max_steps, args.num_train_epochs, trainer.silent = -1, 0, True
            trainer.train(resume_from_checkpoint=path and str(path))
            trainer.holds, trainer.silent, trainer._last_loaded_step = path, False, -1

    def policy_at(self, path: Path) -> Engine:
        return Engine(self.trainer, lambda: self.load(path))

    @property
    def sampler(self) -> Engine:
        return self.policy_at(checkpoint_path(self.out, self.step))

    def ask(self, *args):
        """Run's, judged once: where a verdict takes too long, processes may differ."""
        [groups] = broadcast_object_list([list(super().ask(*args))])
        return groups

    def log(self, line: dict) -> None:
        if self.processes.is_main_process:
            super().log(line)
        numbers = {n: value for n, value in line.items() if isinstance(value, int | float)}
        self.trainer.log(numbers)

    def roll_back(self, step: int, memory: dict) -> None:
        self.step, self.rollbacks, self.memory = step, self.rollbacks + 1, memory
        on_main(self.processes, write_state, checkpoint_path(self.out, step), self._state(), {})
        on_main(self.processes, self._forget_after, step)


def first_line(run: TRLRun) -> str:
    state, wrapped = run.processes.state, type(run.trainer.model_wrapped).__name__
    asked = os.environ.get("ACCELERATE_USE_FSDP") == "true" and "FSDP" not in state.distributed_type
    return (
        f"{run.out}: {state.distributed_type.value} x {state.num_processes}, {wrapped}"
        f"{' (the configuration says FSDP: on CPUs accelerate makes DDP of it)' if asked else ''}"
        f" | to step {run.config.steps} | {batch_arithmetic(run.config)} | "
        f"{len(run.train_prompts)} prompts"
    )


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


# ---- What TRL needs of a model and a data set -------------------------------------------


class Processor(transformers.Qwen3VLProcessor):
    """Qwen3-VL's own, without the video part. It encodes exactly as `encode.encode` does.

    The video part needs torchvision, and PyPI's does not import beside a CPU build of torch.
    """

    def __init__(self, image_processor, tokenizer, chat_template=None):
        template = chat_template or tokenizer.chat_template
        super().__init__(image_processor, tokenizer, chat_template=template)

    def __call__(self, images=None, text=None, **options):
        """`images` are TRL's: a list for each prompt, or None where a prompt has no image."""
        flat = [image for of_prompt in images or [] for image in of_prompt or []]
        return super().__call__(images=flat or None, text=text, **options)


def load_processor(path: str | Path):
    """A text model's is its tokenizer."""
    tokenizer, image_processor = load_tokenizer(path), image_parts(path)[0]
    tokenizer.padding_side = "left"
    return Processor(image_processor, tokenizer) if image_processor else tokenizer


def accuracy(completions, gold, choices, **_) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [float(verifier.is_correct(*answer)) for answer in zip(texts, gold, choices)]


def answered(completions, **_) -> list[float]:
    """The format reward: there is an answer to extract."""
    return [float(verifier.extract_answer(c[0]["content"]) is not None) for c in completions]


def configuration(arguments, config: NPOConfig) -> grpo.GRPOConfig:
    """The configuration of autonpo.py, npo.py or grpo.py that these flags mean."""
    alone = arguments.intervention is None and arguments.guide is None
    kind = npo.NPOConfig
    if arguments.auto or alone:
        kind = AutoNPOConfig if arguments.auto else grpo.GRPOConfig
    wrong = {
        "--auto: decides by itself; leave --intervention and --guide out": (
            arguments.auto and not alone
        ),
        "--guide self: is of npo.py; leave it out": arguments.guide == "self",
        "--max_steps: say how many": config.max_steps < 1,
        "--save_strategy, --save_only_model, --save_steps: a run goes back to whole checkpoints, "
        "saved every so many steps": config.save_strategy != "steps"
        or config.save_only_model
        or config.save_steps != int(config.save_steps),
        "--save_total_limit: say --keep": config.save_total_limit is not None,
        "--num_iterations, --steps_per_generation, --generation_batch_size: here a step is one "
        "update on answers of its own; leave them out": config.num_iterations > 1
        or config.steps_per_generation != config.gradient_accumulation_steps,
    }
    if found := next((text for text, holds in wrong.items() if holds), None):
        raise UsageError(found)
    values = vars(arguments) | {
        "intervention": arguments.intervention or "early",
        "gate": config.gate,
        "slots": config.slots,
        "is_correction": config.is_correction,
        "out": config.output_dir,
        "steps": config.max_steps,
        "save_every": int(config.save_steps),
        "seed": config.seed,
        "prompts_per_step": config.generation_batch_size // config.num_generations,
        "group_size": config.num_generations,
        "micro_batch_size": config.per_device_train_batch_size * config.world_size,
        "max_new_tokens": config.max_completion_length,
        "temperature": config.temperature,
        "clip_low": config.epsilon,
        "clip_high": config.epsilon_high,
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "device": "cpu" if config.use_cpu else "auto",
        "sampler": "hf",
    }
    ours = kind(**{name: values[name] for name in kind.__dataclass_fields__ if name in values})
    ours.check()
    return ours


def make_trainer(ours: grpo.GRPOConfig, config: NPOConfig, last: int) -> NPOTrainer:
    """A trainer whose data set is the rows of the steps to `last`, in the order of npo.py."""
    prompts, rows = load_prompts(ours)[0], rows_of_steps(ours, 1, last)
    processor = load_processor(ours.model_path)
    model = auto_class(config_of(ours.model_path)).from_pretrained(
        ours.model_path,
        dtype=torch.bfloat16 if config.bf16 else torch.float32,
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
        never = {"suppress_tokens": vision_token_ids(model.config)}
        config.generation_kwargs = never | (config.generation_kwargs or {})
    table = rows_of([prompts[row] for row in rows], for_text_model=not sees)
    place = {row: number for number, row in enumerate(rows)}
    asked = (row for step in range(1, last + 1) for row in rows_of_step(len(prompts), step, ours))
    config.shuffle_dataset = False  # `rows_of_step` has
    return NPOTrainer(
        model=model,
        args=config,
        reward_funcs=[accuracy, answered],
        train_dataset=table.select([place[row] for row in asked]),
        processing_class=processor,
        peft_config=adapters,
        watch=True,
    )


def run_method(arguments, config: NPOConfig) -> None:
    ours = configuration(arguments, config)
    last = [ours.steps]
    if isinstance(ours, npo.NPOConfig) and not ours.guide:
        last.append(ours.plateau_end if ours.late else ours.scout_steps)
    config.reward_weights = [verifier.ACCURACY_WEIGHT, verifier.FORMAT_WEIGHT]
    trainer, out = make_trainer(ours, config, max(last)), Path(ours.out)
    trainer.holds = None  # which checkpoint its weights are
    if arguments.auto:
        watch(ours, out, trainer)
    elif isinstance(ours, npo.NPOConfig):
        intervene(ours, out, trainer, scouts=not ours.guide)
    else:
        TRLRun(ours, out, trainer).go(GuideCache())
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # else a process that leaves takes the others down


def main() -> None:
    parser = transformers.HfArgumentParser((arguments_class(), NPOConfig), description=__doc__)
    try:
        try:
            arguments, config = parser.parse_args_into_dataclasses()
        except ValueError as error:  # TRL's and accelerate's, of flags that do not fit together
            raise UsageError(str(error)) from error
        if not PartialState().is_main_process:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, the main one speaks for all
        run_method(arguments, config)
    except (UsageError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}" if PartialState().is_main_process else 1) from None


if __name__ == "__main__":
    main()
