"""AutoNPO: NPO that decides by itself when to roll back, and how far (arXiv
2604.20733, from notes on its section on AutoNPO).

npo.py goes ahead once, when told to. Here one GRPO run watches itself. Each
time that it has stopped learning, its *current* policy becomes the guide of
its own past:

1. Prompts with a very low pass-rate enter a *mistake pool*, with the step at
   which they failed.                                               MistakePool
2. *Warning*: the moving average of the reward stagnates, and that of the
   entropy keeps declining.                                         Monitor
3. *Confirmation*: the current policy answers some of the pool's prompts.
   Does it solve them now?                                          probe
4. *Rollback distance*, over the checkpoints still on disk, from the same
   answers:                                                 select_rollback

       Q^(D) = pass-rate on the prompts that failed within the last D steps
       V^(D) = exp(c KL(pi(t) || pi(t-D))), KL a mean per token, c = --kl-scale
       D*    = argmax Q^(D) / V^(D)

   Here "within the last D steps" means all failures after step t - D; another
   reading takes those up to the next checkpoint alone: see `pool.since` in
   `decide`. For small steps this KL equals its reverse, the theory's, to second
   order.

5. *Execution*: the current policy's verified answers to the prompts that
   failed within D* fill a guide cache. Weights and optimizer go back to
   t - D*, and the same steps are taken again with npo.py's slot replacement.
   Then plain GRPO continues; for some steps nothing can trigger.   intervene

A run that never triggers is GRPO to the last bit. Release from the pool,
cadence, ties, and that the optimizer goes back are not in our sources.

    python autonpo.py                                 # the cards world
    python autonpo.py --model Qwen/Qwen3-VL-8B-Instruct --out runs/8b-auto
    python signal_theory.py --run runs/autonpo        # its Q, V, S in a figure
"""

import math
import random
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import verifier
from grpo import update
from npo import GuidedConfig, replace_slot
from plumbing.checkpoints import checkpoint_path, checkpoint_state, checkpoints, step_of
from plumbing.command import command_line
from plumbing.guide_cache import GuideCache, build_guide_cache, load_guide_cache
from plumbing.metrics import answer_metrics
from plumbing.model import Policy
from plumbing.report import report
from plumbing.rollout import Group, batched
from plumbing.run import Run, derived_seed, sampled_tokens
from plumbing.settings import within
from signal_theory import signal

# Not in our sources, like the defaults below
POOL_SIZE = 512  # prompts in the pool; beyond it the oldest are dropped
EMA_STEPS = 10  # that a moving average spans; its decay is 1 - 1/10
MIN_SLICE = 8  # probed prompts without which a distance's Q is unknown


@dataclass
class AutoNPOConfig(GuidedConfig):
    out: str = "runs/autonpo"  # run directory; the same command resumes it
    steps: int = 300  # of the final policy; steps that are rolled back are extra
    eval_every: int = 10  # steps between evaluations
    save_every: int = 10  # steps between checkpoints, warnings and distances D
    # Trigger
    mistake_pass_rate: float = 0.25  # at or below it a prompt enters the pool; not in our sources
    max_distance: int = 100  # largest D that is considered; not in our sources
    patience: int = 20  # steps without a gain, then reward stagnates; not in our sources
    min_gain: float | None = None  # of reward [worlds 0.04, else 0.01]; not in our sources
    entropy_drop: float = 0.15  # share that entropy loses in --patience steps; not in our sources
    probe_prompts: int = 128  # of the pool, asked to confirm; not in our sources
    probe_samples: int = 4  # answers to each; not in our sources
    confirm_pass_rate: float = 0.2  # of the probe, to confirm the warning; not in our sources
    kl_scale: float = 1.0  # c in V^: 1 for a token's drift, 25 for 25 tokens'; not in our sources
    cooldown: int = 30  # steps without a warning after a probe or replay; not in our sources

    def check(self) -> None:
        super().check()
        for name in ("patience", "probe_samples", "cooldown"):
            within(self, name, least=1)
        within(self, "probe_prompts", least=MIN_SLICE)
        within(self, "max_distance", least=self.save_every, of="--save-every")
        for name in ("min_gain", "kl_scale"):
            within(self, name, above=0)
        within(self, "entropy_drop", below=1)  # if negative, entropy may even have risen
        for name in ("mistake_pass_rate", "confirm_pass_rate"):
            within(self, name, least=0, below=1)


@dataclass
class MistakePool:
    """Prompts that the policy failed lately: {row: step of its last failure}, oldest first."""

    failed_at: dict[int, int] = field(default_factory=dict)

    def observe(self, step: int, pass_rates: dict[int, float], config: AutoNPOConfig) -> None:
        """Admits a step's failures, releases what is solved now, drops what is too old."""
        for row, solved in pass_rates.items():
            self.failed_at.pop(row, None)
            if solved <= config.mistake_pass_rate:
                self.failed_at[row] = step
        young = self.since(step - config.max_distance)[-POOL_SIZE:]
        self.failed_at = {row: self.failed_at[row] for row in young}

    def since(self, step: int) -> list[int]:
        """Rows that failed after `step`."""
        return [row for row, at in self.failed_at.items() if at > step]


@dataclass
class Monitor:
    """Moving averages of reward and entropy, and whether they give warning."""

    seen: int = 0  # steps
    reward: float = 0.0
    entropy: float = 0.0
    best_reward: float = 0.0  # the average at its last gain of `min_gain` ...
    best_step: int = 0  # ... and when that was; until an average is full, each step gains
    entropies: list[float] = field(default_factory=list)  # its average, the last --patience + 1
    quiet_until: int = 0

    def observe(self, step: int, reward: float, entropy: float, config: AutoNPOConfig) -> None:
        self.seen += 1
        rate = 1 / min(self.seen, EMA_STEPS)  # at first a plain mean
        self.reward += rate * (reward - self.reward)
        self.entropy += rate * (entropy - self.entropy)
        self.entropies = [*self.entropies, self.entropy][-config.patience - 1 :]
        if self.seen <= EMA_STEPS or self.reward >= self.best_reward + config.min_gain:
            self.best_reward, self.best_step = self.reward, step

    # EXPERIMENT HERE: the trigger.
    def warning(self, step: int, config: AutoNPOConfig) -> str | None:
        """Why there is a warning after this step, in words; None if there is none."""
        if step <= self.quiet_until or len(self.entropies) <= config.patience:
            return None
        before = self.entropies[0]
        fallen = 1 - self.entropy / before if before > 0 else 0.0
        if step - self.best_step < config.patience or fallen < config.entropy_drop:
            return None
        gain = f"no gain of {config.min_gain:g} since step {self.best_step}"
        entropy = f"entropy {self.entropy:.3f}, {-fallen:+.0%} since step {step - config.patience}"
        return f"reward average {self.reward:.3f}, {gain}; {entropy}"


@dataclass
class Memory:
    """Pool, monitor and the cache in use: one value, which is rolled back with the run."""

    pool: MistakePool
    monitor: Monitor
    cache: GuideCache

    @classmethod
    def of(cls, stored: dict, out: Path, config: AutoNPOConfig) -> "Memory":
        """As a checkpoint holds it; all new where it holds none."""
        pool, cache = MistakePool(dict(stored.get("pool", []))), GuideCache()
        if until := stored.get("guided_until"):
            path = cache_path(out, until)
            cache = load_guide_cache(path, config, with_logprobs=config.is_correction)
        return cls(pool, Monitor(**stored.get("monitor", {})), cache)

    def stored(self) -> dict:
        pool, monitor = list(self.pool.failed_at.items()), asdict(self.monitor)
        return {"pool": pool, "monitor": monitor, "guided_until": self.cache.until}

    def observe(self, step: int, rates: dict[int, float], own: dict, config) -> dict:
        """Takes in a step's {row: pass-rate}; returns what is logged of it.

        `own` has "reward" and "entropy", means over the policy's own answers.
        """
        self.pool.observe(step, rates, config)
        self.monitor.observe(step, own["reward"], own["entropy"], config)
        return {
            "autonpo/reward": self.monitor.reward,
            "autonpo/entropy": self.monitor.entropy,
            "autonpo/pool": len(self.pool.failed_at),
        }


def cache_path(out: Path, guide_step: int) -> Path:
    return out / f"guide_{guide_step:06d}.jsonl"


# EXPERIMENT HERE: the criterion.
def select_rollback(quality: dict[int, float], variance: dict[int, float]) -> int:
    """D* = argmax Q^(D) / V^(D) over the distances in both; of equals the nearest.

    0 means stay: there is no candidate, or nothing is solved at any of them. The log's pull^ weighs
    Q^ as the law of signal_theory.py does: not over V^, but times the weight of `drift_since`.
    """
    both = sorted(quality.keys() & variance.keys())
    signals = {d: signal(quality[d], variance[d]) for d in both}
    best = max(signals, key=signals.get, default=0)
    return best if best and quality[best] > 0 else 0


@torch.no_grad()
def drift_since(groups: list[Group], old: Policy, config: AutoNPOConfig) -> tuple[float, float]:
    """How far pi(t), whose answers these are, has gone from an older policy.

    Returns: the mean per-token KL(pi(t) || old) in nats; and the mean over the verified answers of
    an answer's smallest token ratio old / pi(t): its decisive token's weight in the old policy's
    loss, 0 if no answer is verified.
    """
    rows = [(group.encoded, c) for group in groups for c in group.completions]
    total, smallest = 0.0, []
    for some in batched(rows, config.micro_batch_size):
        logprobs, _ = old.logprobs([(e, c.token_ids) for e, c in some], config.temperature)
        for (_, c), then in zip(some, logprobs.double().tolist()):  # (B, T), padded
            logratios = [a - b for a, b in zip(then, c.behavior_logprobs)]
            total -= sum(logratios)
            smallest += [math.exp(min(logratios))] if c.accuracy else []
    return total / sampled_tokens(groups), statistics.fmean(smallest or [0.0])


def probe(run: Run, pool: MistakePool, config: AutoNPOConfig) -> dict[int, Group]:
    """The current policy's scored answers to some of the pool's prompts, by row."""
    known, chance = sorted(pool.failed_at), derived_seed(config.seed, "probe", run.step)
    rows = random.Random(chance).sample(known, min(config.probe_prompts, len(known)))
    asked = run.ask(run.train_prompts, rows, config.probe_samples, "probe", run.step)
    groups = {row: group for group, row in zip(asked, rows)}  # `asked` to its end
    run.sampled_tokens += sampled_tokens(groups.values())
    return groups


@dataclass
class Decision:
    """What was decided after a step, and why."""

    step: int
    reason: str  # of the warning
    probed: int  # mistakes asked
    pass_rate: float  # of them
    table: list[dict] = field(default_factory=list)  # distance, prompts, Q^, V^, S^, pull^
    left_out: dict[int, int] = field(default_factory=dict)  # {distance: prompts, too few}
    distance: int = 0  # D*; 0 means stay
    decision: str = ""  # in words

    def __str__(self) -> str:
        lines = [f"after step {self.step}: warning: {self.reason}"]
        lines += [f"  probe of {self.probed} mistakes: {self.pass_rate:.2f} solved"]
        lines += [f"  D {d:4d}   left out: only {n} prompts" for d, n in self.left_out.items()]
        lines += [
            f"  D {row['distance']:4d}   Q^ {row['quality']:.3f} of {row['prompts']:3d} prompts   "
            f"V^ {row['variance']:.4f}   S^ {row['signal']:.3f}   pull^ {row['pull']:.3f}"
            for row in self.table
        ]
        return "\n".join([*lines, f"  {self.decision}"])


def decide(run: Run, pool: MistakePool, reason: str, config: AutoNPOConfig) -> Decision:
    """Steps 3 and 4 of the docstring."""
    groups = probe(run, pool, config)
    rates = {row: group.pass_rate for row, group in groups.items()}
    solved = statistics.fmean(rates.values()) if rates else 0.0
    made = Decision(run.step, reason, len(rates), solved)
    if solved < config.confirm_pass_rate:
        made.decision = f"stay: fewer than {config.confirm_pass_rate:.0%} of them are solved"
        return made
    quality, variance = {}, {}
    for path in tqdm(checkpoints(run.out)[::-1], desc="V^", leave=False, delay=3):
        back, distance = step_of(path), run.step - step_of(path)
        regular = back % config.save_every == 0 or back == run.start_step  # not a former last step
        if not regular or not 0 < distance <= config.max_distance:
            continue
        of_slice = [rates[row] for row in pool.since(back) if row in rates]
        if len(of_slice) < MIN_SLICE:
            made.left_out[distance] = len(of_slice)
            continue
        quality[distance] = q = statistics.fmean(of_slice)
        kl, weight = drift_since(list(groups.values()), run.policy_at(path), config)
        variance[distance] = v = math.exp(min(config.kl_scale * kl, 700.0))  # beyond it overflows
        row = {"distance": distance, "prompts": len(of_slice), "quality": q, "variance": v}
        made.table.append(row | {"signal": signal(q, v), "pull": q * weight})
    made.distance = select_rollback(quality, variance)
    if made.distance:
        made.decision = f"back to step {run.step - made.distance}, D* = {made.distance}"
    elif made.table:
        made.decision = "stay: at no distance is anything solved"
    else:
        made.decision = f"stay: no checkpoint has {MIN_SLICE} probed mistakes after it"
    return made


def intervene(run: Run, memory: Memory, reason: str, config: AutoNPOConfig) -> Memory:
    """Decides, says so, and rolls back if that is the decision; returns what to go on with.

    Deterministic: after a kill anywhere in here the same decision is made again.
    """
    now, made = run.step, decide(run, memory.pool, reason, config)
    start = checkpoint_path(run.out, now - made.distance)
    if made.distance:
        rows, guide = memory.pool.since(step_of(start)), checkpoint_path(run.out, now)
        path = cache_path(run.out, now)
        build_guide_cache(path, config, guide, rows, now, config.slots, run.sampler, run.processes)
        cache = load_guide_cache(path, config)
        run.sampled_tokens += cache.sampled_tokens
        answered = f"{len(cache.answers)} of {len(rows)} mistakes"
        made.decision += f", guided on {answered} until step {now}"
        if not cache.answers:
            made.distance = 0
            made.decision = f"stay: asked again, the policy solves {answered}"
    logged = {f"autonpo/{name}": value for name, value in asdict(made).items()}
    run.log({"step": now + 1, **logged, "sampled_tokens": run.sampled_tokens})
    tqdm.write(str(made))
    if not made.distance:
        memory.monitor.quiet_until = now + config.cooldown
        return memory
    stored = checkpoint_state(start)["memory"] | {"guided_until": now}
    stored["monitor"]["quiet_until"] = now + config.cooldown
    run.roll_back(step_of(start), stored)
    return Memory.of(stored, run.out, config)


def train(config: AutoNPOConfig, out: Path) -> None:
    with Run(config, out, keep_back=config.max_distance) as run:
        memory = Memory.of(run.memory, out, config)
        run.save_start(memory.stored())  # the base, too, can be gone back to
        for _ in run.steps():
            reason = memory.monitor.warning(run.step, config)
            if reason and run.step % config.save_every == 0:
                memory = intervene(run, memory, reason, config)  # may take run.step back
            step = run.step + 1
            groups = run.sample(step)  # P groups of G completions
            verifier.score(groups)
            cache, slots = memory.cache, config.slots
            guides = [cache.answers_to(group.prompt, step, slots) for group in groups]
            mixed = [replace_slot(g, guide, config.gate) for g, guide in zip(groups, guides)]
            stats = update(run.policy, run.optimizer, mixed, config)
            rates = {row: group.pass_rate for row, group in zip(run.rows(step), groups)}
            stats |= memory.observe(step, rates, answer_metrics(groups), config)
            run.memory = memory.stored()
            run.end_step(step, groups, stats, mixed if step <= memory.cache.until else None)


def main(config: AutoNPOConfig) -> None:
    train(config, Path(config.out))
    report(config.out, "AutoNPO")


if __name__ == "__main__":
    command_line(AutoNPOConfig, main)
