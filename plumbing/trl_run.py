"""A run directory whose steps TRL's trainer takes, and the trainer's policy outside of training.

What npo.py's and autonpo.py's functions ask of plumbing.run's `Run` and of a sampler, on as many
processes as accelerate has. A checkpoint is TRL's, with generator states and optimizer; it becomes
one of the run's, by its name and state.json, when all of it is on the disk. All processes must see
the directory.
"""

import math
import os
import shutil
import statistics
from pathlib import Path

import torch
import transformers
import trl
from accelerate.utils import broadcast_object_list, gather_object
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from plumbing import UsageError
from plumbing.checkpoints import (
    UNTRAINED,
    checked,
    checkpoint_path,
    checkpoint_state,
    checkpoint_states,
    clear_leftovers,
    stored_state,
    write_state,
)
from plumbing.command import open_directory
from plumbing.data import load_prompts
from plumbing.encode import encode, image_parts, load_tokenizer
from plumbing.files import file_hashes, on_disk
from plumbing.guide_cache import GuideCache
from plumbing.metrics import batch_arithmetic
from plumbing.rollout import Completion, EncodedPrompt, Group, Prompt, batched
from plumbing.run import Run, lineage_key, sampled_tokens
from plumbing.track import Curve

# All that TRL adds to transformers' flags a run keeps, but for FREE; of transformers' it keeps KEPT
FREE = {"generation_batch_size", "steps_per_generation", "pad_to_multiple_of"}
KEPT = {"optim", "bf16", "fp16", "adam_beta1", "adam_beta2", "adam_epsilon"}


def kept_flags(config) -> dict[str, str]:
    """TRL's flags that change results, where they are not the default: a run keeps them."""
    theirs, found = trl.GRPOConfig.__dataclass_fields__.keys() - FREE, {}
    theirs -= transformers.TrainingArguments.__dataclass_fields__.keys()
    for name in sorted(theirs | KEPT):
        value, default = getattr(config, name), config.__dataclass_fields__[name].default
        if value != default and not name.startswith(("vllm_", "log_")):
            found[name] = str(value)
    return found


class Engine:
    """What samples and scores for the trainer's policy, as plumbing.model.Policy does.

    It is the engine that trains, transformers or vLLM. The rows are shared out over the processes,
    and every process gets all results, in one order. Log-probs are those of the training forward.
    """

    def __init__(self, trainer, ready=lambda: None):
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
            values = values.clamp(max=0.0)  # TRL's kernel rounds above it
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
    """A run whose steps TRL's trainer takes. Each process has one; the main one alone writes.

    Of `Run` it has what needs no policy of the plain loops: sampling outside of steps, the log, and
    which checkpoints stay.

    Args:
        start: the checkpoint of TRL's that it starts from, optimizer included; None: the base.
    """

    def __init__(self, config, out: Path, trainer, start: Path | None = None):
        self.config, self.out, self.trainer, self.start = config, out, trainer, start
        self.processes, self.keep_back = trainer.accelerator, getattr(config, "max_distance", 0)
        self.curve, self.train_prompts = Curve(config, out), load_prompts(config)[0]
        on_main(self.processes, self._open)
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

    def go(self, cache: GuideCache, memory=None) -> None:
        """To the last step, or to a warning of the monitor."""
        trainer, args = self.trainer, self.trainer.args
        if self.step == self.config.steps:
            return
        newest = checkpoint_path(self.out, self.step)
        source = newest if newest.is_dir() else self.start
        if source and not (source / "trainer_state.json").is_file():
            raise UsageError(f"{source}: is no checkpoint of TRL's, so TRL cannot go on from it")
        if source:
            on_main(self.processes, checked, source, True)
        trainer.guides, self.remembered = cache, memory
        args.output_dir, args.max_steps = str(self.out), self.config.steps
        trainer.add_callback(self)
        try:
            trainer.train(resume_from_checkpoint=source and str(source))
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            step = trainer.state.global_step + 1
            problem = "the policy's probabilities are no numbers; try a lower --learning_rate"
            raise FloatingPointError(f"step {step}: {problem}") from error
        trainer.remove_callback(self)
        trainer.holds = checkpoint_path(self.out, self.step)

    def on_train_begin(self, args, state, control, **_):
        if self.processes.is_main_process:
            tqdm.write(self.first_line())

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
            self.trainer._metrics["train"][name] = [value]  # the last, no mean over logging_steps
        control.should_save = control.should_save or str(step) in self._kept_steps()
        return control

    def on_save(self, args, state, control, **_):
        self.step = state.global_step
        self._commit()
        regular = self.step % self.config.save_every == 0
        if self.remembered and regular and self.remembered.monitor.warning(self.step, self.config):
            control.should_training_stop = True  # then `autonpo.intervene` decides
        return control

    def on_log(self, args, state, control, logs=None, **_):
        if self.processes.is_main_process and "loss" in logs:
            super().log({"step": state.global_step, **logs})
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            raise FloatingPointError(
                f"step {state.global_step}: the gradient's norm is {logs['grad_norm']}; try a "
                "lower --learning_rate"
            )

    def _commit(self) -> None:
        """TRL's checkpoint becomes one of the run's, in one act."""
        self.processes.wait_for_everyone()  # each has written its part
        on_main(self.processes, self._rename)

    def _rename(self) -> None:
        aside, path = self.out / f"checkpoint-{self.step}", checkpoint_path(self.out, self.step)
        files = [file for file in aside.rglob("*") if file.is_file()]
        for file in files:
            on_disk(file)
        names = [str(file.relative_to(aside)) for file in files]
        write_state(aside, self._state(), dict(zip(names, file_hashes(files))))
        path.parent.mkdir(exist_ok=True)
        aside.rename(path)
        self._forget_old()

    # ------------------------------------------- what npo.py and autonpo.py ask of a run

    def save(self) -> None:
        """A checkpoint of the base, where nothing has been trained yet."""
        self.load(None)
        self.trainer.args.output_dir = str(self.out)
        self.trainer._save_checkpoint(self.trainer.model, None)
        self._commit()

    def load(self, path: Path | None) -> None:
        """The trainer's weights become a checkpoint's; without one the trainer is made ready.

        By a `train` that takes no step: it alone loads what accelerate has wrapped or sharded.
        """
        trainer, args = self.trainer, self.trainer.args
        if path is None or trainer.holds != path:
            handler, args.max_steps, args.num_train_epochs = trainer.callback_handler, -1, 0
            callbacks, handler.callbacks, trainer.silent = handler.callbacks, [], True
            if path:
                on_main(self.processes, checked, path, True)
            trainer.train(resume_from_checkpoint=path and str(path))
            handler.callbacks, trainer.silent, trainer.holds = callbacks, False, path
            trainer._last_loaded_step = -1  # vLLM has other weights

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
        numbers.pop("step")  # TRL's is the step that was taken last
        self.trainer.log(numbers)

    def roll_back(self, step: int, memory: dict) -> None:
        self.step, self.rollbacks, self.memory = step, self.rollbacks + 1, memory
        path = checkpoint_path(self.out, step)
        files = stored_state(path)["files"]
        on_main(self.processes, write_state, path, self._state(), files)
        on_main(self.processes, self._forget_after, step)

    def first_line(self) -> str:
        state, wrapped = self.processes.state, type(self.trainer.model_wrapped).__name__
        kind, wish, guides = state.distributed_type.value, "", self.trainer.guides
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and kind != "FSDP":
            wish = " (not the FSDP of the configuration: on CPUs accelerate makes DDP of it)"
        until = f"guided until {guides.until}" if guides.answers else "no guide: GRPO"
        return (
            f"{self.out}: {kind} x {state.num_processes}, {wrapped}{wish} | to step "
            f"{self.config.steps}, {until} | {batch_arithmetic(self.config)} | "
            f"{len(self.train_prompts)} prompts"
        )
