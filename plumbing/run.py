"""The run directory: what a training run reads and writes.

    config.json  metrics.jsonl  samples.jsonl  checkpoints/step_000040/  curves.png  summary.json
    rollouts/step_000001.parquet
    (npo.py: + guide.jsonl, exgrpo.py: + experience.jsonl)

The directory is the truth. Which prompts step k sees, and the seed that it samples with, are pure
functions of (seed, k). So resuming needs no generator state, a rollback replays the same prompts,
and the same command continues a run from its newest checkpoint to the same bits. What was logged
after that checkpoint is dropped and done again.
"""

import functools
import hashlib
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import verifier
from plumbing import UsageError
from plumbing.checkpoints import (
    checked,
    checkpoint_bytes,
    checkpoint_path,
    checkpoint_state,
    checkpoint_states,
    checkpoints,
    clear_leftovers,
    load_optimizer,
    make_optimizer,
    remove_checkpoint,
    save_checkpoint,
    step_of,
    stored_state,
    write_state,
)
from plumbing.command import how_to_resume, open_directory
from plumbing.data import PromptSet, load_prompts
from plumbing.encode import check_start
from plumbing.exact import exact_accuracies, right_texts
from plumbing.files import append, json_lines, read_jsonl, write_aside
from plumbing.memory import in_use, peaks, rehearse
from plumbing.metrics import (
    answer_metrics,
    batch_arithmetic,
    guide_metrics,
    step_line,
    transcript,
    warn_if_nothing_is_right,
)
from plumbing.model import Policy
from plumbing.record import drop_rollouts_after, rollout_rows, rollouts_path, write_rollouts
from plumbing.rollout import Group, batched
from plumbing.track import Curve
from plumbing.vllm_sampler import at_once, sampler_of

LOGS = ("metrics.jsonl", "samples.jsonl", "experience.jsonl")  # lines by step


def derived_seed(*key) -> int:
    """63 bits out of whatever names a random choice, such as (seed, "sample", step)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def rows_of_step(count: int, step: int, config) -> list[int]:
    """Which P of `count` prompts a step (from 1) asks: the next of a shuffle, new every epoch."""
    first, last = (step - 1) * config.prompts_per_step, step * config.prompts_per_step
    orders = {}  # of each epoch that the step touches
    for epoch in range(first // count, (last - 1) // count + 1):
        orders[epoch] = list(range(count))
        random.Random(derived_seed(config.seed, "shuffle", epoch)).shuffle(orders[epoch])
    return [orders[place // count][place % count] for place in range(first, last)]


def rows_of_steps(config, first: int, last: int) -> list[int]:
    """All rows that these steps ask, each once, in the order in which they first come."""
    count = len(load_prompts(config)[0])
    rows = [row for step in range(first, last + 1) for row in rows_of_step(count, step, config)]
    return list(dict.fromkeys(rows))


def lineage_key(line: dict) -> tuple[int, int]:
    """Orders log lines and checkpoints in time: after a rollback (AutoNPO's) steps start lower."""
    return line.get("rollbacks", 0), line["step"]


def current_lineage(lines: list[dict]) -> list[dict]:
    """The log lines that led to the present policy; lines undone by a rollback are dropped."""
    kept = []
    for line in lines:
        undone = lineage_key(line)
        while kept and kept[-1].get("rollbacks", 0) < undone[0] and kept[-1]["step"] >= undone[1]:
            kept.pop()
        kept.append(line)
    return kept


def evaluations(out: str | Path) -> list[dict]:
    """The metrics lines with a held-out accuracy, by step."""
    lines = current_lineage(read_jsonl(Path(out) / "metrics.jsonl"))
    return [line for line in lines if "eval/accuracy" in line]


def sampled_tokens(groups: Iterable[Group]) -> int:
    return sum(len(c.token_ids) for group in groups for c in group.completions)


class Run:
    """Training from a starting checkpoint to `config.steps`, in a directory of its own.

    Args:
        start: the checkpoint that it starts from, optimizer included; None for --start or --model.
        spent_tokens: sampled before by scout and guide, so that `sampled_tokens` counts them; at
            least those up to the start.
        keep_back: checkpoints at most so many steps old stay, whatever --keep says.
    """

    processes = None  # accelerate's, where several processes make a run (commands/npo_trl.py)

    def __init__(self, config, out, start: Path | None = None, spent_tokens=0, keep_back=0):
        self.config, self.out, self.keep_back = config, Path(out), keep_back
        open_directory(config, self.out)
        self.curve = Curve(config, self.out)
        if config.start:
            check_start(config.start, config.model_path, config.lora)
        start = start or config.start
        if start:
            spent_tokens = max(spent_tokens, checkpoint_state(start)["sampled_tokens"])
        clear_leftovers(self.out)
        self.start_step = checkpoint_state(start)["step"] if start else 0
        states = checkpoint_states(self.out)
        newest = max(states, key=lambda path: lineage_key(states[path]), default=None)
        state = states.get(newest, {"step": self.start_step, "sampled_tokens": spent_tokens})
        self.step, self.spent_tokens = state["step"], spent_tokens
        grown = spent_tokens - state.get("spent_tokens", spent_tokens)  # a cache for more steps
        self.sampled_tokens = state["sampled_tokens"] + grown
        self.rollbacks = state.get("rollbacks", 0)
        self.memory = state.get("memory", {})  # what AutoNPO remembers, as plain data
        if self.rollbacks:
            self._forget_after(self.step)  # a kill may have come in the middle of this
        self._drop_lines_after(lineage_key(state) if newest else (0, -1))
        if self.step < config.steps:  # else all is done, and no model needs loading
            self.train_prompts, self.held_out = load_prompts(config)
            self._load(newest or start)

    def _load(self, source: Path | None) -> None:
        config = self.config
        self.policy = self.optimizer = self.sampler = None  # never two of them in memory
        torch.manual_seed(derived_seed(config.seed, "adapters"))  # of new LoRA adapters
        path, recompute = source or config.model_path, not config.in_world
        self.policy = Policy(
            checked(path, optimizer=True), config.device, config.dtype, config.lora, recompute
        )
        self.optimizer = make_optimizer(self.policy.parameters(), config.lr, config.weight_decay)
        if source and (Path(source) / "optimizer.pt").is_file():
            load_optimizer(self.optimizer, Path(source) / "optimizer.pt")
        elif source:
            tqdm.write(f"{source}: has no optimizer.pt; AdamW's moments start at 0")
        self.sync()
        self._hand_over()
        if self.config.on_gpu:
            rehearse(self.policy, config, self.optimizer, getattr(self.sampler, "held", 0))

    def policy_at(self, path: Path) -> Policy:
        """The policy of an earlier checkpoint, beside the present one."""
        return Policy(checked(path), self.config.device, self.config.dtype)

    def sync(self) -> None:
        """The sampler gets the policy's weights; the policy itself has them anyway."""
        self.sampler = sampler_of(self.policy, self.config, self.train_prompts)

    def __enter__(self) -> "Run":
        if self.step < self.config.steps:
            config, trained = self.config, sum(p.numel() for p in self.policy.parameters())
            resumed = f", resumed at step {self.step}" if self.step > self.start_step else ""
            samples = config.eval_samples
            evaluated = f"{samples} answers each" if samples else "evaluated exactly"
            tqdm.write(
                f"{self.out}: steps {self.start_step + 1}-{config.steps}{resumed} | "
                f"{batch_arithmetic(config)} | {len(self.train_prompts)} prompts, "
                f"{len(self.held_out)} held out, {evaluated} | {trained:,} trained parameters | "
                f"lr {config.lr:g} | temperature {config.temperature:g}"
            )
            if self.keep_back:
                reach = config.steps if "all" in self._kept_steps() else self.keep_back
                count = reach // config.save_every + 2
                size = checkpoint_bytes(self.policy) / 1e9
                tqdm.write(
                    f"keeps {count} checkpoints to go back to: {count * size:.3g} GB of disk"
                )
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.curve.close(failed=kind is not None)
        if self.step < self.config.steps:  # else the process would wait for those that are coming
            self.train_prompts.prefetch([])
        done = checkpoints(self.out)
        kept, now = str(done[-1]) if done else "none yet (the run starts over)", self.step + 1
        if kind in (FloatingPointError, UsageError):
            told = f"step {now}: {error}; stopped. The last checkpoint is {kept}"
            raise UsageError(told) from error
        if kind is KeyboardInterrupt:
            again = how_to_resume(self.config)
            tqdm.write(f"\ninterrupted in step {now}; {again} resumes from {kept}")

    # ----------------------------------------------------------------------- parts of the loops

    def steps(self) -> Iterator[int]:
        """The numbers of the steps still to do. Before the first one the start is evaluated."""
        steps = self.config.steps
        if self.step < steps and not (self.out / "metrics.jsonl").is_file():
            start = {"step": self.step, "sampled_tokens": self.sampled_tokens}
            self.log(start | self.evaluate(self.step))
        finished = self.step >= steps
        with tqdm(total=steps, initial=self.step, desc=self.out.name, disable=finished) as bar:
            while self.step < steps:
                yield self.step + 1
                bar.update(self.step - bar.n)

    def rows(self, step: int) -> list[int]:
        """The rows of the training prompts that a step asks."""
        return rows_of_step(len(self.train_prompts), step, self.config)

    def sample(self, step: int, rows: list[int] | None = None, group_size: int = 0) -> list[Group]:
        """A step's prompts (or the given rows), each answered G times by the policy."""
        self.clock = [time.perf_counter()]
        config, seed = self.config, derived_seed(self.config.seed, "sample", step)
        rows = self.rows(step) if rows is None else rows
        prompts = [self.train_prompts[row] for row in rows]
        torch.manual_seed(seed)  # also seeds the optimizer's rounding in bf16
        size = group_size or config.group_size
        groups = self.sampler.sample(prompts, size, config.max_new_tokens, config.temperature, seed)
        self.sampled_tokens += sampled_tokens(groups)
        self._hand_over()
        if step < config.steps:
            self.train_prompts.prefetch(self.rows(step + 1))  # decodes pictures during the update
        self.clock.append(time.perf_counter())
        return groups

    def _hand_over(self) -> None:
        """From sampling to training: vLLM sleeps, and the GPU's memory is measured anew."""
        if self.config.on_gpu:
            self.sampling_gib = in_use()
            torch.cuda.reset_peak_memory_stats()
        if self.config.sampler == "vllm":
            self.sampler.sleep()

    def ask(
        self, prompts: PromptSet, rows: Sequence[int], samples: int, *key, usual: int = 0
    ) -> Iterator[Group]:
        """Scored answers outside of a step, `samples` per prompt. `key` names the occasion.

        transformers samples `usual` of them at a time, by default as many as in a step.
        """
        config = self.config
        usual = usual or config.prompts_per_step * config.group_size
        size = max(1, at_once(config, usual) // samples)
        bar = tqdm(total=len(rows), desc=str(key[0]), leave=False, delay=3)
        for chunk, some in enumerate(batched(rows, size)):
            seed, asked = derived_seed(config.seed, *key, chunk * size), [prompts[r] for r in some]
            groups = self.sampler.sample(
                asked, samples, config.max_new_tokens, config.temperature, seed
            )
            verifier.score(groups)
            bar.update(len(some))
            yield from groups
        bar.close()
        self._hand_over()

    def evaluate(self, step: int) -> dict[str, float]:
        """Mean accuracy of `eval_samples` answers to each held-out prompt, or the exact one."""
        rows, samples = range(len(self.held_out)), self.config.eval_samples
        if samples:
            usual = 512 if self.config.in_world else 0  # a world's answers are short
            groups = self.ask(self.held_out, rows, samples, "evaluate", step, usual=usual)
            accuracies = [group.pass_rate for group in groups]
        else:
            accuracies = exact_accuracies(self.policy, self._right_texts, self.config)
        found, parts = {"eval/accuracy": statistics.fmean(accuracies)}, self.held_out.parts
        for name in sorted({*parts}):
            some = [accuracy for accuracy, part in zip(accuracies, parts) if part == name]
            found[f"eval/accuracy_{name}"] = statistics.fmean(some)
        return found

    @functools.cached_property
    def _right_texts(self) -> list:
        """Of the held-out prompts, encoded once: an evaluation would take twice as long."""
        return right_texts(self.policy, self.held_out)

    def end_step(
        self, step: int, groups: list[Group], stats: dict, mixed: list[Group] | None = None
    ) -> None:
        """Logs the step; evaluates and saves where that is due.

        `mixed` are the groups after slot replacement, in a loop that replaces slots.
        """
        self.clock.append(time.perf_counter())
        start, sampled, trained = self.clock
        metrics = {"step": step, **answer_metrics(groups), **stats}
        metrics |= guide_metrics(step, mixed) if mixed else {}
        metrics["sampled_tokens"] = self.sampled_tokens
        metrics |= {"time/generate": sampled - start, "time/train": trained - sampled}
        if self.config.on_gpu:
            metrics |= peaks(self.sampling_gib, getattr(self.sampler, "held", 0))
        if self.config.sampler == "vllm":
            self.sync()
            metrics["time/sync"] = time.perf_counter() - trained
            metrics["sampling/probe_difference"] = self.sampler.difference
            metrics["sampling/weights_compared"] = self.sampler.compared
        metrics["step_time"] = time.perf_counter() - start
        last = step == self.config.steps
        if last or step % self.config.eval_every == 0:
            metrics |= self.evaluate(step)
        self.log(metrics)
        self.log(transcript(step, groups, mixed or groups), "samples.jsonl")
        if shown := self.config.rollouts:
            rows = rollout_rows(step, groups[:shown], (mixed or groups)[:shown])
            write_rollouts(rollouts_path(self.out, step, self.rollbacks), rows)
        tqdm.write(step_line(metrics, self.config.steps, self.config.prompts_per_step))
        if step == self.start_step + 20:
            warn_if_nothing_is_right(read_jsonl(self.out / "metrics.jsonl"), self.out)
        self.step = step
        if last or step % self.config.save_every == 0 or str(step) in self._kept_steps():
            self.save()

    # ------------------------------------------------------------------------------ what is kept

    def save(self) -> None:
        newest = checkpoint_path(self.out, self.step)
        save_checkpoint(self.policy, newest, self._state(), self.optimizer)
        self._forget_old()

    def _forget_old(self) -> None:
        """Of the older checkpoints, those go that neither --keep nor `keep_back` keeps."""
        for path in checkpoints(self.out):
            near, kept = step_of(path) >= self.step - self.keep_back, self._kept_steps()
            if not (near or "all" in kept or str(step_of(path)) in kept):
                remove_checkpoint(path)

    def save_start(self, memory: dict) -> None:
        """Makes the model that training starts from a checkpoint, too."""
        if self.step == self.start_step and not checkpoints(self.out):
            self.memory = memory
            self.save()

    def _kept_steps(self) -> list[str]:
        return self.config.keep.split(",")

    def _state(self) -> dict:
        state = {"step": self.step, "sampled_tokens": self.sampled_tokens}
        state["spent_tokens"] = self.spent_tokens
        if self.memory:
            state |= {"rollbacks": self.rollbacks, "memory": self.memory}
        return state

    def log(self, line: dict, name: str = "metrics.jsonl") -> None:
        """Appends a line to one of `LOGS`."""
        if self.rollbacks:
            line = line | {"rollbacks": self.rollbacks}
        append(self.out / name, [line])
        if name == "metrics.jsonl":
            self.curve.log(line)

    def roll_back(self, step: int, memory: dict) -> None:
        """Goes back to an earlier checkpoint: weights, optimizer and step; `memory` goes along.

        It has happened once that checkpoint's state.json is replaced, in one act: a kill before
        leaves the run where it was.
        """
        path = checkpoint_path(self.out, step)
        self._load(path)
        self.step, self.rollbacks, self.memory = step, self.rollbacks + 1, memory
        write_state(path, self._state(), stored_state(path)["files"])
        self._forget_after(step)

    def _forget_after(self, step: int) -> None:
        for path in checkpoints(self.out):
            if step_of(path) > step:
                remove_checkpoint(path)

    def _drop_lines_after(self, last: tuple[int, int]) -> None:
        drop_rollouts_after(self.out, last)
        for path in (self.out / name for name in LOGS):
            kept = [line for line in read_jsonl(path, "step") if lineage_key(line) <= last]
            if kept:
                write_aside(path, json_lines(kept))
            else:
                path.unlink(missing_ok=True)
