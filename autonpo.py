"""AutoNPO: NPO that decides by itself when to roll back, and how far (the paper's section on AutoNPO, from notes of it).

npo.py goes ahead once, by hand. Here one GRPO run watches itself, and each time that it has stopped learning, its *current* policy
becomes the guide of its own past:

1. Prompts with a very low pass-rate go to a *mistake pool*, with the step at which they failed.       MistakePool
2. *Warning*: the moving average of the reward stagnates, and that of the entropy has fallen.          Monitor
3. *Confirmation*: the current policy answers some of the pool's prompts. Does it solve them now?      probe
4. *Rollback distance*, over the checkpoints that are still there, all from those same answers:        select_rollback

       Q^(D) = pass-rate on the prompts that failed within the last D steps
       V^(D) = exp(mean per-token KL(pi(t) || pi(t-D)))        (a per-token mean: a sequence's KL would drown Q)
       D*    = argmax Q^(D) / V^(D)

5. *Execution*: the current policy's verified answers to the prompts that failed within D* go to a guide cache; weights (and the
   optimizer, where it was kept) go back to t - D*; the same steps are taken again, with npo.py's slot replacement for those prompts.
   Then plain GRPO goes on, and for some steps nothing can trigger.                                                    intervene

A run that never triggers is GRPO to the bit. Each decision is printed and logged with its reason and its table of D, Q^, V^, S^.

    python autonpo.py                                        # the embedded cards world, on a laptop
    python autonpo.py --model Qwen/Qwen3-VL-8B-Instruct --out runs/8b-auto
    python signal_theory.py --run runs/autonpo               # its measured Q, V and S beside the theory's
"""

import math
import random
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import report
import verifier
from command import command_line, say
from grpo import update
from npo import NPOConfig, build_cache, guide_use, load_cache, pass_rate, replace_slot, without_is_correction
from policy import Group, Policy
from run import (
    Run,
    answer_metrics,
    checkpoint_path,
    checkpoint_state,
    checkpoints,
    derived_seed,
    remove_checkpoint,
    rows_of_step,
)
from signal_theory import signal
from tasks import UsageError


@dataclass
class AutoNPOConfig(NPOConfig):
    out: str = "runs/autonpo"  # run directory; the same command resumes it
    steps: int = 300  # training steps of the policy that there is in the end; those taken back come on top
    eval_every: int = 10  # steps between evaluations
    save_every: int = 10  # steps between checkpoints, between looks at the warning, and between distances D
    # Mistake pool
    mistake_pass_rate: float = 0.25  # a prompt enters the pool at a pass-rate of at most this; not specified by the paper
    pool_size: int = 512  # prompts in the pool; beyond it the oldest go; not specified by the paper
    max_distance: int = 100  # largest D; older prompts and checkpoints are dropped; not specified by the paper
    # Warning
    ema_decay: float = 0.9  # of the moving averages of reward and entropy; not specified by the paper
    patience: int = 20  # steps without a gain of --min-gain after which the reward stagnates; not specified by the paper
    min_gain: float = 0.0  # what the average reward has to gain [0.04 for cards, else 0.01]; not specified by the paper
    entropy_drop: float = 0.3  # share of its peak that the average entropy has to have lost; not specified by the paper
    # Confirmation
    probe_prompts: int = 128  # prompts of the pool that the probe asks; not specified by the paper
    probe_samples: int = 4  # answers to each; not specified by the paper
    confirm_pass_rate: float = 0.2  # mean pass-rate from which they count as solved; not specified by the paper
    min_slice: int = 8  # probed prompts without which a distance's Q is unknown; not specified by the paper
    cooldown: int = 30  # steps after a probe, or after a guided segment, without a warning; not specified by the paper
    # What npo.py is told by hand and AutoNPO decides: no flags
    intervention: str = field(init=False, default="auto")
    scout_steps: int = field(init=False, default=NPOConfig.scout_steps)
    plateau_start: int = field(init=False, default=NPOConfig.plateau_start)
    plateau_end: int = field(init=False, default=NPOConfig.plateau_end)
    guide: str = field(init=False, default=NPOConfig.guide)
    guided_until: int = field(init=False, default=NPOConfig.guided_until)
    keep: str = field(init=False, default="all")  # those up to --max-distance back

    def __post_init__(self):
        steps = self.steps  # NPOConfig takes 0 for a default
        super().__post_init__()
        self.steps = steps
        self.min_gain = self.min_gain or (0.04 if self.dataset == "cards" else 0.01)

    def check(self) -> None:
        super().check()
        for name in ("pool_size", "max_distance", "patience", "probe_prompts", "probe_samples", "min_slice", "cooldown"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if not self.min_gain > 0:
            raise UsageError(f"--min-gain {self.min_gain}: must be above 0")
        if self.min_slice > self.probe_prompts:
            raise UsageError(
                f"--min-slice {self.min_slice}: the probe asks fewer prompts than that, --probe-prompts {self.probe_prompts}"
            )
        for name in ("mistake_pass_rate", "ema_decay", "entropy_drop", "confirm_pass_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 0 and below 1")
        if self.max_distance < self.save_every:
            raise UsageError(f"--max-distance {self.max_distance}: no checkpoint lies that near; take at least --save-every "
                             f"{self.save_every}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What is remembered of the run: both are rolled back with it, and travel in its checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class MistakePool:
    """Prompts that the policy failed lately: row in the data set -> step of its last failure, the oldest first."""

    failed_at: dict[int, int] = field(default_factory=dict)

    def observe(self, step: int, pass_rates: dict[int, float], config: AutoNPOConfig) -> None:
        """One step's pass-rates by row: admits failures, releases what is solved now, drops what is too old or too much."""
        for row, solved in pass_rates.items():
            self.failed_at.pop(row, None)
            if solved <= config.mistake_pass_rate:
                self.failed_at[row] = step
        young = [(row, at) for row, at in self.failed_at.items() if at > step - config.max_distance]
        self.failed_at = dict(young[-config.pool_size :])

    def since(self, step: int) -> list[int]:
        """Rows that failed after `step`."""
        return [row for row, at in self.failed_at.items() if at > step]


@dataclass
class Monitor:
    """Moving averages of the run's reward and entropy, and whether they give warning."""

    seen: int = 0
    reward: float = 0.0
    entropy: float = 0.0
    best_reward: float | None = None  # the average at its last gain of `min_gain` ...
    best_step: int = 0  # ... and when that was
    peak_entropy: float = 0.0  # so far
    quiet_until: int = 0

    def observe(self, step: int, reward: float, entropy: float, config: AutoNPOConfig) -> None:
        self.seen += 1
        span = round(1 / (1 - config.ema_decay))  # steps that a moving average averages; before as many, it is their plain mean
        rate = 1 / min(self.seen, span)
        self.reward += rate * (reward - self.reward)
        self.entropy += rate * (entropy - self.entropy)
        if self.seen >= span:
            self.peak_entropy = max(self.peak_entropy, self.entropy)
            if self.best_reward is None or self.reward >= self.best_reward + config.min_gain:
                self.best_reward, self.best_step = self.reward, step

    def warning(self, step: int, config: AutoNPOConfig) -> str | None:
        """Why there is a warning after this step, in words; None: there is none."""
        if step <= self.quiet_until or self.best_reward is None or step - self.best_step < config.patience:
            return None
        fallen = 1 - self.entropy / self.peak_entropy if self.peak_entropy > 0 else 0.0
        if fallen < config.entropy_drop:
            return None
        return (f"reward average {self.reward:.3f}, no gain of {config.min_gain:g} since step {self.best_step}; "
                f"entropy {self.entropy:.3f}, {fallen:.0%} below its peak {self.peak_entropy:.3f}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Confirmation, and how far back
# ---------------------------------------------------------------------------------------------------------------------


def select_rollback(quality: dict[int, float], variance: dict[int, float]) -> int:
    """D* = argmax Q^(D) / V^(D) over the distances in both; of equals the nearest, which takes back least.

    0, stay: there is no candidate, or at none of them is anything solved.
    """
    signals = {distance: signal(quality[distance], variance[distance]) for distance in sorted(quality.keys() & variance.keys())}
    best = max(signals, key=signals.get, default=0)
    return best if best and signals[best] > 0 else 0


@torch.no_grad()
def token_kl(groups: list[Group], path: Path, config: AutoNPOConfig) -> float:
    """Mean per-token KL(pi(t) || old), in nats, from answers that pi(t) sampled: the mean of log pi(t) - log old over their tokens.

    `path` is the old policy's checkpoint.
    """
    old = Policy(path, config.device, config.dtype)
    rows = [(group.inputs, c) for group in groups for c in group.completions]
    total = 0.0
    for first in range(0, len(rows), config.micro_batch_size):
        some = rows[first : first + config.micro_batch_size]
        logprobs, _ = old.logprobs(
            [(inputs, c.token_ids) for inputs, c in some], config.temperature
        )  # (B, T), 0 in the padding
        total += sum(sum(c.behavior_logprobs) for _, c in some) - logprobs.double().sum().item()
    return total / sum(len(c.token_ids) for _, c in rows)


def probe(run: Run, pool: MistakePool, config: AutoNPOConfig) -> tuple[list[int], list[Group]]:
    """The current policy's answers to some of the pool's prompts, drawn at random."""
    known = sorted(pool.failed_at)
    rows = random.Random(derived_seed(config.seed, "probe", run.step)).sample(known, min(config.probe_prompts, len(known)))
    groups, size = [], max(1, config.prompts_per_step * config.group_size // config.probe_samples)  # as many as in a step
    for first in tqdm(range(0, len(rows), size), desc="probe", leave=False, delay=3):
        prompts = [run.train_prompts[row] for row in rows[first : first + size]]
        seed = derived_seed(config.seed, "probe", run.step, first)
        groups += run.sampler.sample(prompts, config.probe_samples, config.max_new_tokens, config.temperature, seed)
    verifier.score(groups)
    run.sampled_tokens += sum(len(c.token_ids) for group in groups for c in group.completions)
    return rows, groups


def decide(run: Run, pool: MistakePool, config: AutoNPOConfig) -> dict:
    """The probe and what follows from it: the decision's log line, but for what it does."""
    rows, groups = probe(run, pool, config)
    pass_rates = {row: pass_rate(group) for row, group in zip(rows, groups)}
    overall = statistics.fmean(pass_rates.values()) if rows else 0.0
    line = {"autonpo/probed": len(rows), "autonpo/pass_rate": overall, "autonpo/distance": 0, "autonpo/table": []}
    if overall < config.confirm_pass_rate or not rows:
        return line | {"autonpo/decision": f"stay: of {len(rows)} mistakes probed the policy solves {overall:.2f}, "
                                           f"below {config.confirm_pass_rate:g}"}  # fmt: skip
    count, quality, variance = {}, {}, {}
    for path in tqdm(checkpoints(run.out), desc="V^ of each checkpoint", leave=False, delay=3):
        distance = run.step - int(path.name.removeprefix("step_"))
        sliced = [pass_rates[row] for row in pool.since(run.step - distance) if row in pass_rates]
        if 0 < distance <= config.max_distance and len(sliced) >= config.min_slice:
            count[distance], quality[distance] = len(sliced), statistics.fmean(sliced)
            variance[distance] = math.exp(token_kl(groups, path, config))
    best = select_rollback(quality, variance)
    line["autonpo/distance"] = best
    for d in sorted(quality):
        row = {"distance": d, "prompts": count[d], "quality": quality[d], "variance": variance[d]}
        line["autonpo/table"].append(row | {"signal": signal(quality[d], variance[d])})
    if not best:
        unknown = f"no checkpoint has {config.min_slice} probed mistakes after it"
        why = "at no distance is anything solved" if quality else unknown
        return line | {"autonpo/decision": f"stay: {why}"}
    return line | {"autonpo/decision": f"back to step {run.step - best}, D* = {best}"}


# ---------------------------------------------------------------------------------------------------------------------
# Execution
# ---------------------------------------------------------------------------------------------------------------------


def cache_path(out: Path, guide_step: int) -> Path:
    return out / f"guide_{guide_step:06d}.jsonl"


def intervene(run: Run, pool: MistakePool, monitor: Monitor, reason: str, config: AutoNPOConfig) -> None:
    """Decides, says so, and rolls back if that is the decision. A kill anywhere in here, and the same is decided again."""
    now, line = run.step, {"step": run.step + 1, "autonpo/step": run.step, "autonpo/reason": reason}
    line |= decide(run, pool, config)
    if distance := line["autonpo/distance"]:
        rows, path = pool.since(now - distance), cache_path(run.out, now)
        build_cache(config, checkpoint_path(run.out, now), now - distance + 1, now, path, rows, run.sampler)
        _, cache, tokens = load_cache(config, path)
        run.sampled_tokens += tokens
        if cache:
            line["autonpo/decision"] += f", guided on {len(cache)} of {len(rows)} mistakes until step {now}"
        else:
            distance = line["autonpo/distance"] = 0
            line["autonpo/decision"] = f"stay: asked for the cache, the policy solves none of {len(rows)} mistakes"
    run.log(line | {"sampled_tokens": run.sampled_tokens})
    say(described(line))
    if not distance:
        monitor.quiet_until = now + config.cooldown
        return
    memory = checkpoint_state(checkpoint_path(run.out, now - distance))["memory"]
    memory["monitor"]["quiet_until"] = now + config.cooldown
    run.roll_back(now - distance, memory | {"guided_until": now})


def described(line: dict) -> str:
    """A decision's log line in words."""
    text = [f"after step {line['autonpo/step']}: warning: {line['autonpo/reason']}",
            f"  probe of {line['autonpo/probed']} mistakes: {line['autonpo/pass_rate']:.2f} solved"]  # fmt: skip
    for row in line["autonpo/table"]:
        text.append(f"  D {row['distance']:4d}   Q^ {row['quality']:.3f} of {row['prompts']:3d} prompts   "
                    f"V^ {row['variance']:.4f}   S^ {row['signal']:.3f}")  # fmt: skip
    return "\n".join([*text, f"  {line['autonpo/decision']}"])


# ---------------------------------------------------------------------------------------------------------------------


def recall(memory: dict) -> tuple[MistakePool, Monitor, int]:
    """Pool, monitor and the last guided step, as a checkpoint holds them; all new where it holds none."""
    pool = MistakePool(dict(memory.get("pool", [])))
    return pool, Monitor(**memory.get("monitor", {})), memory.get("guided_until", 0)


def train(config: AutoNPOConfig, out: Path) -> None:
    with Run(config, out) as run:
        if run.step == 0 and not checkpoints(out):
            run.memory = {"pool": [], "monitor": {}, "guided_until": 0}
            run.save()  # the base, too, can be gone back to
        rollbacks = None
        for step in run.steps():
            if rollbacks != run.rollbacks:
                rollbacks, (pool, monitor, until) = run.rollbacks, recall(run.memory)
                cache = load_cache(config, cache_path(out, until))[1] if until else {}
            if run.step % config.save_every == 0 and (reason := monitor.warning(run.step, config)):
                intervene(run, pool, monitor, reason, config)
                if rollbacks != run.rollbacks:
                    continue  # with the step after the one gone back to
            groups = run.sample(step)  # P groups of G completions
            verifier.score(groups)
            guides = [cache.get(group.prompt.id) if step <= until else None for group in groups]
            mixed = [replace_slot(group, guide, config.gate) for group, guide in zip(groups, guides)]
            if not config.is_correction:
                mixed = without_is_correction(mixed, run.policy, config)
            stats = update(run.policy, run.optimizer, mixed, config)
            rows, own = rows_of_step(len(run.train_prompts), step, config), answer_metrics(groups)
            pool.observe(step, {row: pass_rate(group) for row, group in zip(rows, groups)}, config)
            monitor.observe(step, own["reward"], own["entropy"], config)
            run.memory = {"pool": list(pool.failed_at.items()), "monitor": asdict(monitor), "guided_until": until}
            stats |= {"autonpo/reward": monitor.reward, "autonpo/entropy": monitor.entropy, "autonpo/pool": len(pool.failed_at)}
            stats |= guide_use(step, mixed) if step <= until else {}
            run.end_step(step, groups, stats, mixed)
            for path in checkpoints(out):
                if path < checkpoint_path(out, step - config.max_distance):
                    remove_checkpoint(path)  # it can no longer be chosen


def main(config: AutoNPOConfig) -> None:
    train(config, Path(config.out))
    report.autonpo(Path(config.out))


if __name__ == "__main__":
    command_line(AutoNPOConfig, main)
