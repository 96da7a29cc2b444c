"""The run directory: what a training run reads and writes.  Plumbing; skip it on a first read.

    config.json  metrics.jsonl  samples.jsonl  checkpoints/step_000040/  curves.png  summary.json
    (npo.py: + guide.jsonl, baselines.py exgrpo: + experience.jsonl)

The directory is the truth. Which prompts step k sees, and the seed that it samples with, are pure functions of (seed, k);
so resuming needs no generator state, a rollback replays the same prompts, and the same command continues a run from its
newest checkpoint to the same bits. What was written after that checkpoint is dropped and done again.
"""

import hashlib
import json
import random
import shutil
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

import verifier
import vllm_sampler
from command import load_config_prompts, model_path, open_directory, say
from large import load_optimizer, make_optimizer
from policy import Group, Policy
from tasks import PromptSet, UsageError

LOGS = ("metrics.jsonl", "samples.jsonl", "experience.jsonl")  # lines by step; a resumed run drops those after its checkpoint


def derived_seed(*key) -> int:
    """63 bits out of anything that names a random choice, such as (seed, "sample", step)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def rows_of_step(count: int, step: int, config) -> list[int]:
    """Which P of `count` prompts a step (counted from 1) asks: the next ones of a shuffle that is new every epoch."""
    first, last = (step - 1) * config.prompts_per_step, step * config.prompts_per_step
    order = {}  # of each epoch that the step touches
    for epoch in range(first // count, (last - 1) // count + 1):
        order[epoch] = list(range(count))
        random.Random(derived_seed(config.seed, "shuffle", epoch)).shuffle(order[epoch])
    return [order[place // count][place % count] for place in range(first, last)]


def checkpoint_path(out: Path, step: int) -> Path:
    return Path(out) / "checkpoints" / f"step_{step:06d}"


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; one that is still being written ends in .tmp."""
    return [path for path in sorted(Path(out).glob("checkpoints/step_*")) if path.suffix != ".tmp"]


def checkpoint_state(path: Path) -> dict:
    """{"step", "sampled_tokens", and AutoNPO's "rollbacks" and "memory"} of a checkpoint of a run; step 0 for any other model."""
    state = Path(path) / "state.json"
    return json.loads(state.read_text()) if state.is_file() else {"step": 0, "sampled_tokens": 0}


def written(line: dict) -> tuple[int, int]:
    """When in a run a line or a checkpoint was written: AutoNPO goes back to earlier steps, with one rollback more each time."""
    return line.get("rollbacks", 0), line["step"]


def remove_checkpoint(path: Path) -> None:
    """Renamed first: what a kill leaves of it is no checkpoint."""
    aside = path.with_name(path.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


def steps_in(kept: str) -> set[int]:
    """Of --keep: "needed" is the newest alone, which is always kept."""
    return {int(step) for step in kept.split(",")} if kept != "needed" else set()


def read_jsonl(path: Path) -> list[dict]:
    """All whole lines; a last line that a kill cut short does not count."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def surviving(lines: list[dict]) -> list[dict]:
    """The lines that led to the policy that there is: without what a rollback took back (nothing, but in AutoNPO)."""
    kept = []
    for line in lines:
        while kept and kept[-1].get("rollbacks", 0) < line.get("rollbacks", 0) and kept[-1]["step"] >= line["step"]:
            kept.pop()
        kept.append(line)
    return kept


def evaluations(out: Path) -> list[dict]:
    """The metrics lines with a held-out accuracy, by step."""
    return [line for line in surviving(read_jsonl(Path(out) / "metrics.jsonl")) if "eval/accuracy" in line]


def sampler_of(policy: Policy, config, prompts: PromptSet) -> Policy | vllm_sampler.VLLMSampler:
    """What samples for a policy: itself, or vLLM, given its weights; either has `sample`."""
    if config.sampler == "hf":
        return policy
    engine = vllm_sampler.engine_of(policy, config)
    engine.sync(policy, [prompts[row] for row in range(min(2, len(prompts)))], config.temperature)
    return engine


class Run:
    """One stretch of training, from a starting checkpoint to `config.steps`, in its own directory.

    Args:
        start: the checkpoint it starts from, optimizer included; None for the model that the configuration names.
        spent_tokens: tokens sampled before (scout, guide cache), so that `sampled_tokens` counts all of them.
    """

    def __init__(self, config, out: str | Path, start: Path | None = None, spent_tokens: int = 0):
        self.config, self.out = config, Path(out)
        open_directory(config, self.out)
        self.start_step = checkpoint_state(start)["step"] if start else 0
        for leftover in self.out.glob("checkpoints/*.tmp"):  # of a kill while one was written or removed
            shutil.rmtree(leftover)
        done = checkpoints(self.out)
        newest = max(done, key=lambda path: written(checkpoint_state(path)), default=None)
        source = newest or start
        state = checkpoint_state(newest) if newest else {"step": self.start_step, "sampled_tokens": spent_tokens}
        self.step, self.sampled_tokens = state["step"], state["sampled_tokens"]
        self.rollbacks, self.memory = state.get("rollbacks", 0), state.get("memory", {})  # AutoNPO's
        if self.rollbacks:
            self._forget_after(self.step)  # where a kill came between the rollback and this
        self._keep_until(written(state) if newest else (0, -1))
        if self.step >= config.steps:
            return  # all done: no model needs loading
        self.train_prompts, self.held_out = load_config_prompts(config)
        self._load(source)

    def _load(self, source: Path | None) -> None:
        config = self.config
        self.policy = self.optimizer = self.sampler = None  # no two of them in memory
        torch.manual_seed(derived_seed(config.seed, "adapters"))  # where LoRA's are new
        self.policy = Policy(source or model_path(config), config.device, config.dtype, config.train_vision, config.lora,
                             config.gradient_checkpointing == "on")  # fmt: skip
        self.optimizer = make_optimizer(self.policy.parameters(), config.lr, config.weight_decay)
        if source and (Path(source) / "optimizer.pt").is_file():
            load_optimizer(self.optimizer, Path(source) / "optimizer.pt")
        elif source:
            say(f"{source}: holds no optimizer (--save-optimizers all would keep it); AdamW's moments start anew")
        self.sync()

    def sync(self) -> None:
        """What samples gets the policy's weights: the policy itself has them, vLLM does not."""
        self.sampler = sampler_of(self.policy, self.config, self.train_prompts)

    def __enter__(self) -> "Run":
        sequences = self.config.prompts_per_step * self.config.group_size
        if self.step < self.config.steps:
            resumed = f", resumed at step {self.step}" if self.step > self.start_step else ""
            say(f"{self.out}: steps {self.start_step + 1}-{self.config.steps}{resumed} | {self.config.prompts_per_step} "
                f"prompts x {self.config.group_size} slots = {sequences} completions/step = "
                f"{-(-sequences // self.config.micro_batch_size)} micro-batches of {self.config.micro_batch_size} -> "
                f"{self.config.updates_per_batch} optimizer step(s) | {len(self.train_prompts)} prompts, "
                f"{len(self.held_out)} held out | {sum(p.numel() for p in self.policy.parameters()):,} trained parameters")  # fmt: skip
        return self

    def __exit__(self, kind, error, traceback) -> None:
        done = checkpoints(self.out)
        kept = str(done[-1]) if done else "none yet (the run starts over)"
        if kind is FloatingPointError:
            raise UsageError(f"step {self.step + 1}: {error}; stopped. The last checkpoint is {kept}; a lower --lr or "
                             "--max-grad-norm may help") from error  # fmt: skip
        if kind is KeyboardInterrupt:
            say(f"\ninterrupted in step {self.step + 1}; the same command resumes from {kept}")

    # ------------------------------------------------------------------------------------------------ the loop's parts

    def steps(self):
        """The steps still to do, with a progress bar; before the first one the start is evaluated."""
        if self.step < self.config.steps and not (self.out / "metrics.jsonl").is_file():
            self._write("metrics.jsonl", {"step": self.step, "sampled_tokens": self.sampled_tokens,
                                          "eval/accuracy": self.evaluate(self.step)})  # fmt: skip
        with tqdm(total=self.config.steps, initial=self.step, desc=self.out.name, unit="step",
                  disable=self.step >= self.config.steps) as bar:  # fmt: skip
            while self.step < self.config.steps:
                yield self.step + 1
                bar.update(self.step - bar.n)

    def sample(self, step: int, rows: list[int] | None = None, group_size: int = 0) -> list[Group]:
        """The groups of a step: its prompts (or these rows of the data set), each answered G times by the policy."""
        self.clock = [time.perf_counter()]
        rows = rows_of_step(len(self.train_prompts), step, self.config) if rows is None else rows
        prompts = [self.train_prompts[row] for row in rows]
        seed = derived_seed(self.config.seed, "sample", step)
        size, config = group_size or self.config.group_size, self.config
        torch.manual_seed(seed)  # also of the optimizer's rounding in bf16
        groups = self.sampler.sample(prompts, size, config.max_new_tokens, config.temperature, seed)
        self.sampled_tokens += sum(len(c.token_ids) for group in groups for c in group.completions)
        self.clock.append(time.perf_counter())
        return groups

    def evaluate(self, step: int) -> float:
        """Mean accuracy of `eval_samples` answers to each held-out prompt, sampled as in training."""
        config, right = self.config, 0.0
        size = max(1, config.prompts_per_step * config.group_size // config.eval_samples)  # as many sequences as in a step
        for first in tqdm(range(0, len(self.held_out), size), desc="evaluate", leave=False, delay=3):
            prompts = [self.held_out[i] for i in range(first, min(first + size, len(self.held_out)))]
            seed = derived_seed(config.seed, "evaluate", step, first)
            groups = self.sampler.sample(prompts, config.eval_samples, config.max_new_tokens, config.temperature, seed)
            verifier.score(groups)
            right += sum(completion.accuracy for group in groups for completion in group.completions)
        return right / (len(self.held_out) * config.eval_samples)

    def end_step(self, step: int, groups: list[Group], stats: dict, trained: list[Group] | None = None) -> None:
        """Logs the step, evaluates and saves where it is due. `trained`: the groups after slot replacement, if any."""
        self.clock.append(time.perf_counter())
        generate, train = self.clock[1] - self.clock[0], self.clock[2] - self.clock[1]
        metrics = {
            "step": step,
            **answer_metrics(groups),
            **stats,
            "sampled_tokens": self.sampled_tokens,
            "step_time": generate + train, "time/generate": generate, "time/train": train,
        }  # fmt: skip
        if self.config.sampler == "vllm":
            self.sync()
            sync = time.perf_counter() - self.clock[2]
            metrics |= {
                "step_time": generate + train + sync,
                "time/sync": sync,
                "sampling/probe_difference": self.sampler.difference,
            }
        last = step == self.config.steps
        if last or step % self.config.eval_every == 0:
            metrics["eval/accuracy"] = self.evaluate(step)
        self._write("metrics.jsonl", metrics)
        self._write("samples.jsonl", transcript(step, groups, trained or groups))
        tqdm.write(step_line(metrics, self.config))
        self.step = step
        if last or step % self.config.save_every == 0:
            self.save()

    def save(self) -> None:
        """A checkpoint; what --keep and --save-optimizers do not name of the older ones goes."""
        newest, kept = checkpoint_path(self.out, self.step), self.config.keep
        self.policy.save(newest, self._state(), self.optimizer)
        for path in checkpoints(self.out):
            if path != newest and self.config.save_optimizers == "last":
                (path / "optimizer.pt").unlink(missing_ok=True)
            if path != newest and kept != "all" and int(path.name.removeprefix("step_")) not in steps_in(kept):
                remove_checkpoint(path)

    def _state(self) -> dict:
        state = {"step": self.step, "sampled_tokens": self.sampled_tokens}
        return state | ({"rollbacks": self.rollbacks, "memory": self.memory} if self.memory else {})

    def log(self, line: dict, name: str = "metrics.jsonl") -> None:
        """A line that is not the step's own, in one of `LOGS`."""
        self._write(name, line)

    def roll_back(self, step: int, memory: dict) -> None:
        """Goes back to the checkpoint of an earlier step: weights, step, and optimizer where it was kept; `memory` is what goes on from there.

        It has happened once that checkpoint's state.json is replaced, which is atomic: a kill before leaves the run where it was.
        """
        path = checkpoint_path(self.out, step)
        self._load(path)
        self.step, self.rollbacks, self.memory = step, self.rollbacks + 1, memory
        aside = path / "state.json.tmp"
        aside.write_text(json.dumps(self._state()))
        aside.rename(path / "state.json")
        self._forget_after(step)

    def _forget_after(self, step: int) -> None:
        for path in checkpoints(self.out):
            if path > checkpoint_path(self.out, step):
                remove_checkpoint(path)

    def _write(self, name: str, line: dict) -> None:
        if self.rollbacks:
            line = line | {"rollbacks": self.rollbacks}
        with open(self.out / name, "a") as file:
            file.write(json.dumps(line) + "\n")

    def _keep_until(self, last: tuple[int, int]) -> None:
        for name in LOGS:
            path, aside = self.out / name, self.out / f"{name}.tmp"
            if path.is_file():
                kept = [line for line in read_jsonl(path) if written(line) <= last]
                aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
                aside.rename(path) if kept else (aside.unlink(), path.unlink())


# ---------------------------------------------------------------------------------------------------------------------
# What is logged of a step
# ---------------------------------------------------------------------------------------------------------------------


def answer_metrics(groups: list[Group]) -> dict:
    """What the policy's own answers say of it."""
    completions = [c for group in groups for c in group.completions]
    lengths = [len(c.token_ids) for c in completions]
    return {
        "accuracy": statistics.fmean(c.accuracy for c in completions),
        "reward": statistics.fmean(c.reward for c in completions),
        "reward_std": statistics.fmean(statistics.stdev(c.reward for c in g.completions) for g in groups),
        "entropy": -sum(sum(c.behavior_logprobs) for c in completions) / sum(lengths),
        "completions/mean_length": statistics.fmean(lengths),
        "completions/clipped_ratio": statistics.fmean(not c.finished for c in completions),
    }


def step_line(metrics: dict, config) -> str:
    parts = [f"step {metrics['step']:04d}/{config.steps:04d}", f"acc {metrics['accuracy']:.3f}",
             f"live {1 - metrics['frac_reward_zero_std']:.0%}"]  # fmt: skip
    if metrics.get("npo/guide_frac"):
        distance = f" D {metrics['npo/distance']:.0f}" if "npo/distance" in metrics else ""
        parts.append(f"guide {round(metrics['npo/guide_frac'] * config.prompts_per_step)}/{config.prompts_per_step}{distance}")
    clipped = metrics.get("clip_ratio/low_mean", 0) + metrics.get("clip_ratio/high_mean", 0)
    parts += [f"loss {metrics['loss']:.3f}", f"ratio {metrics['ratio']:.2f} clip {clipped:.1%}",
              f"ent {metrics['entropy']:.2f}",
              f"len {metrics['completions/mean_length']:.0f} cut {metrics['completions/clipped_ratio']:.0%}",
              f"gn {metrics['grad_norm']:.2f}", f"gen {metrics['time/generate']:.1f}s train {metrics['time/train']:.1f}s"]  # fmt: skip
    if "eval/accuracy" in metrics:
        parts.append(f"eval {metrics['eval/accuracy']:.3f}")
    return " | ".join(parts)


def transcript(step: int, groups: list[Group], trained: list[Group]) -> dict:
    """One group of the step, the first with a replaced slot if there is one: the last slot before and after."""
    shown = next((i for i, group in enumerate(trained) if group.completions[-1].source != "policy"), 0)
    group, slot = groups[shown], groups[shown].completions[-1]
    line = {
        "step": step, "prompt_id": group.prompt.id, "gold": group.prompt.gold,
        "question": "".join(part.get("text", "<image>") for part in group.prompt.messages[-1]["content"]),
        "pass_rate": statistics.fmean(c.accuracy for c in group.completions),
        "policy": slot.text, "reward": slot.reward,
    }  # fmt: skip
    if (guide := trained[shown].completions[-1]).source != "policy":
        line |= {"guide": guide.text, "source": guide.source}
    return line
