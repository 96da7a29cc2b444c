"""LUFFY, ExGRPO and RLEP: the same loop as npo.py, other answers to the question of *whose* trajectory to learn from.

Letters as in grpo.py; a slot's trajectory o of another policy has token ratios w_t = pi_theta(o_t) / q(o_t).

              trajectory         prompts                      q, of the other's slot      weight, for npo.py's min(w A, clip(w) A)
    npo.py    near future        pass-rate <= tau, of P       the guide                   w, clipped
    luffy     external teacher   every one                    1                           f(w) = w / (w + 0.1), never clipped
    exgrpo    own past           half a batch, its own pool   the past policy             f(w) = w / (w + 0.1), never clipped
    rlep      own far future     every one                    pi_old, the policy itself   w, clipped

LUFFY (Yan et al., arXiv 2504.14945; code ElliottYan/LUFFY, exp_scripts/train.sh), against npo.py: another model's right answer, one
a prompt, takes the last slot whatever the pass-rate (prompts without one keep their own slots). Its probabilities are unknown: q = 1. The
script is followed: A_i = r_i - mean(r), not divided by the std; token terms are summed over a sequence and divided by the
constant longest length; own slots are not clipped; plus 0.001 times the entropy (the paper: 0.01). Ours: the mean over sequences, where the
script sums, so its entropy weighs less; and groups that are all alike are left out, the bonus included, as in grpo.update.

ExGRPO (Zhan et al., arXiv 2510.02245; code in ElliottYan/LUFFY, ExGRPO/), against LUFFY: the trajectory is the policy's own, of an earlier step,
with the log-probs recorded then. Half the prompts of a batch come from a pool of those solved k of n times, 0 < k < n,
when last asked, replayed slot included. A bucket k is drawn with weight N(k; n/2, 1), then a prompt of it; of its stored answers the one with
the lowest mean token entropy under the present policy is replayed. A prompt solved n of n leaves for good. All this starts after the first
batch solved beyond 0.35. The paper's entropy is followed, as the code takes it over padding; and the code's loss, from the
first step on (the code clips until the pool opens). Unlike both, a prompt that left the pool is asked again when the next epoch comes to it.

RLEP (Zhang et al., arXiv 2507.07451; code Kwai-Klear/RLEP, recipe/rlep/rlep_training.sh), against npo.py: the guide is a fully trained
policy of the same kind of run. A pool keeps all its right answers to each prompt that it solved twice at least; M of them join the G fresh ones
(16 + 2 in the paper, 8 + 1 here), whatever the pass-rate. Ratios start at 1: q is the policy that is being trained. The loss is
averaged over all tokens of the batch (DAPO), not within sequences first. Ours: the pool is sampled at the training temperature (the paper: 0.7,
top-p 0.95); a prompt outside of the pool gets G + M fresh answers (the code: M empty ones). Overlong penalty, warm-up and dual clip are left out.

What all of them share with npo.py stays npo.py's: verifier, rewards, optimizer, guide cache. With one update a batch, as here by default,
every ratio of the policy's own slots is 1 and their clip idle; the originals make two (LUFFY, ExGRPO) or eight (RLEP). The slots that are replaced
are sampled here, but not counted in `sampled_tokens`: none of the three pays for them (npo.py's gate needs them, and pays).

    python baselines.py luffy           # the teacher of the cards world, assets/teacher; else --guide MODEL
    python baselines.py exgrpo
    python baselines.py rlep            # goes ahead by itself; or --guide runs/grpo/checkpoints/step_000400
"""

import dataclasses
import math
import random
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import torch

import cards
import report
import verifier
from command import command_line, open_directory
from grpo import GRPOConfig, clipped_policy_loss, group_advantages, old_logprobs, update
from grpo import train as train_grpo
from npo import build_cache, cache_line, guide_use, load_cache, without_is_correction
from policy import Completion, Group, Inputs, Policy
from run import Run, answer_metrics, checkpoint_path, derived_seed, read_jsonl, rows_of_step
from tasks import UsageError


@dataclass
class LUFFYConfig(GRPOConfig):
    out: str = "runs/luffy"  # run directory; the same command resumes it
    guide: str = ""  # the teacher, a model folder or hub id with the policy's tokenizer [assets/teacher for cards]
    guide_samples: int = 2  # its answers to a prompt, of which one correct is kept (OpenR1, LUFFY's data: two or more)
    shaping: bool = True  # the teacher's slot weighs f(w) = w / (w + gamma); False: w, the paper's ablation
    gamma: float = 0.1  # of f
    entropy_coef: float = 0.001  # weight of the entropy bonus

    def check(self) -> None:
        super().check()
        check_shaping(self)
        check_guide(self)
        if not self.guide and self.model != "cards":
            raise UsageError(f"--guide: LUFFY learns from another model; give one with the tokenizer of {self.model}")
        if self.guide_samples < 1:
            raise UsageError(f"--guide-samples {self.guide_samples}: must be at least 1")


@dataclass
class ExGRPOConfig(GRPOConfig):
    out: str = "runs/exgrpo"  # run directory; the same command resumes it
    replay_frac: float = 0.5  # share of a batch's prompts that comes from the pool
    start_accuracy: float = 0.35  # the pool opens after the first batch solved beyond this
    gamma: float = 0.1  # of f(w) = w / (w + gamma)
    entropy_coef: float = 0.001  # weight of the entropy bonus

    def check(self) -> None:
        super().check()
        check_shaping(self)
        for name in ("replay_frac", "start_accuracy"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must lie between 0 and 1")
        if int(self.replay_frac * self.prompts_per_step) < 1:
            raise UsageError(f"--replay-frac {self.replay_frac}: of --prompts-per-step {self.prompts_per_step} that is no prompt; "
                             "take more of either")  # fmt: skip


@dataclass
class RLEPConfig(GRPOConfig):
    out: str = "runs/rlep"  # run directory (of the long run, if any, scout/ in it); the same command resumes it
    guide: str = ""  # the fully trained checkpoint [the end of a GRPO run of --scout-steps]
    scout_steps: int = 400  # its length, where it is trained first (RLEP's own: 400)
    guide_samples: int = 64  # its answers to a prompt
    min_correct: int = 2  # right answers among them that let a prompt into the pool
    replays: int = 1  # M, replayed answers beside the G fresh ones (the paper: 2 beside 16)

    def check(self) -> None:
        super().check()
        check_guide(self)
        for name in ("scout_steps", "guide_samples", "replays"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if not self.replays <= self.min_correct <= self.guide_samples:
            raise UsageError(f"--min-correct {self.min_correct}: must lie between --replays {self.replays} and --guide-samples "
                             f"{self.guide_samples}")  # fmt: skip


def check_shaping(config) -> None:
    if not config.gamma > 0:
        raise UsageError(f"--gamma {config.gamma}: must be above 0; f(w) = w / (w + 0) is 1 and has no gradient")
    if not config.entropy_coef >= 0:
        raise UsageError(f"--entropy-coef {config.entropy_coef}: must not be negative")


def check_guide(config) -> None:
    if config.guide.endswith(".jsonl"):
        raise UsageError(f"--guide {config.guide}: a guide cache is npo.py's; here give the model or checkpoint folder itself")


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


def centered_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards (P, G) -> advantages (P, G): r - mean, not divided by the std (`grpo_use_std=False` in both scripts)."""
    alike = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(alike, 0.0)


def shaped_policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, off_policy: torch.Tensor,
    max_length: int, gamma: float | None = 0.1, num_sequences: int | None = None, weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """-1/B sum_i 1/L sum_t weight_it A_i, to be minimised: LUFFY's and ExGRPO's.

    weight_it = f(w_it) = w_it / (w_it + gamma) in rows of another policy, w_it in the policy's own; nothing is clipped.

    Args:
        logprobs, old_logprobs: (B, T), under pi_theta and under q_i. advantages: (B,). mask: (B, T).
        off_policy: (B,), True where the policy did not sample the row.
        max_length: L, the same for all sequences.
        gamma: of f; None for f(w) = w.
        num_sequences: sequences in the whole batch, where this is one micro-batch of it (default: B).
        weights: as in `clipped_policy_loss`.
    Returns:
        loss, and per token what `clipped_policy_loss` returns; "ratio" is w.
    """
    ratio = torch.exp((logprobs - old_logprobs).masked_fill(~mask, 0.0))  # (B, T)
    shaped = ratio if gamma is None else ratio / (ratio + gamma)
    weight = torch.where(off_policy[:, None], shaped, ratio)
    weight = weight if weights is None else weights * weight
    objective = (weight * advantages[:, None]).masked_fill(~mask, 0.0)  # (B, T)
    loss = -objective.sum() / max_length / (num_sequences or len(logprobs))
    return loss, {"ratio": ratio.detach(), "low": torch.zeros_like(mask), "high": torch.zeros_like(mask)}


def token_mean_policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    clip_low: float = 0.2, clip_high: float = 0.28, num_tokens: int | None = None, weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """GRPO's clipped objective averaged over all tokens of the batch, RLEP's. Arguments as `clipped_policy_loss`.

    It is linear in the size of the advantage: times |o_i|, the mean of a sequence is its sum.
    """
    lengths = mask.sum(dim=1)
    return clipped_policy_loss(
        logprobs, old_logprobs, advantages * lengths, mask, clip_low, clip_high, num_tokens or int(lengths.sum()), weights
    )


def shaped_loss(policy: Policy, rows: list[tuple], config: LUFFYConfig | ExGRPOConfig, num_sequences: int):
    """As `grpo.policy_loss`: the shaped loss of a micro-batch less the entropy bonus, a mean over sequences of their tokens' mean."""
    inputs, completions, advantages = zip(*rows)
    tokens = [completion.token_ids for completion in completions]
    logprobs, mask, entropy = policy.logprobs(list(zip(inputs, tokens)), config.temperature, entropy=True)  # (B, T)
    old, weights, mismatch = old_logprobs(completions, logprobs, mask, config)
    loss, stats = shaped_policy_loss(
        logprobs, old, logprobs.new_tensor(advantages), mask,
        torch.tensor([c.source != "policy" for c in completions], device=mask.device),
        config.max_new_tokens, config.gamma if getattr(config, "shaping", True) else None, num_sequences, weights,
    )  # fmt: skip
    bonus = (entropy.sum(dim=1) / mask.sum(dim=1)).sum() / num_sequences
    return loss - config.entropy_coef * bonus, stats | mismatch


def token_mean_loss(policy: Policy, rows: list[tuple], config: RLEPConfig, num_sequences: int, num_tokens: int):
    """As `grpo.policy_loss`, with the mean over the batch's `num_tokens` tokens."""
    inputs, completions, advantages = zip(*rows)
    tokens = [completion.token_ids for completion in completions]
    logprobs, mask = policy.logprobs(list(zip(inputs, tokens)), config.temperature)  # (B, T)
    old, weights, mismatch = old_logprobs(completions, logprobs, mask, config)
    loss, stats = token_mean_policy_loss(
        logprobs, old, logprobs.new_tensor(advantages), mask, config.clip_low, config.clip_high, num_tokens, weights
    )
    return loss, stats | mismatch


# ---------------------------------------------------------------------------------------------------------------------
# Whose trajectories
# ---------------------------------------------------------------------------------------------------------------------


def take_slots(group: Group, others: list[Completion]) -> Group:
    """The group with its last slots given to `others`, whatever its pass-rate; the argument is never changed."""
    kept = len(group.completions) - len(others)
    return dataclasses.replace(group, completions=[*group.completions[:kept], *others]) if others else group


def replaced_tokens(groups: list[Group], mixed: list[Group]) -> int:
    """Tokens of the sampled slots that others took."""
    return sum(len(before.token_ids) for group, after in zip(groups, mixed)
               for before, now in zip(group.completions, after.completions) if now is not before)  # fmt: skip


def bucket_weight(successes: int, group_size: int) -> float:
    """ExGRPO's weight of the bucket of prompts solved `successes` of n times: N(k; n/2, 1), but never quite 0."""
    density = math.exp(-((successes - group_size / 2) ** 2) / 2) / math.sqrt(2 * math.pi)
    return max(density, 1e-300)  # it underflows 39 successes from the middle


@dataclass
class Pool:
    """ExGRPO's past successes by row of the data set, as the lines of experience.jsonl, added in order, leave them."""

    group_size: int
    solved: dict[int, int] = field(default_factory=dict)  # row -> k, when last solved
    answers: dict[int, list[Completion]] = field(default_factory=dict)
    retired: set[int] = field(default_factory=set)

    def line(self, step: int, row: int, group: Group) -> dict:
        """What a group (with its replayed slot, if any) teaches the pool."""
        right = [c for c in group.completions if c.accuracy == 1]
        known = [c.token_ids for c in self.answers.get(row, [])]
        new = {tuple(c.token_ids): c for c in right if c.finished and c.token_ids not in known}  # once each
        new = [asdict(dataclasses.replace(c, source=f"past@{step}")) for c in new.values()]
        return {"step": step, "row": row, "solved": len(right), "new": new if len(right) < self.group_size else []}

    def add(self, line: dict) -> None:
        row, solved = line["row"], line["solved"]
        if solved == self.group_size:  # nothing left to learn: it leaves, for good
            self.retired.add(row)
            self.solved.pop(row, None)
            self.answers.pop(row, None)
        elif solved and row not in self.retired and (line["new"] or row in self.answers):
            self.solved[row] = solved
            self.answers.setdefault(row, []).extend(Completion(**completion) for completion in line["new"])

    def draw(self, count: int, rng: random.Random) -> list[int]:
        """Up to `count` different rows: a bucket by its weight, then any row of it."""
        buckets, rows = {}, []
        for row, solved in sorted(self.solved.items()):
            buckets.setdefault(solved, []).append(row)
        while buckets and len(rows) < count:
            (chosen,) = rng.choices(list(buckets), [bucket_weight(solved, self.group_size) for solved in buckets])
            rows.append(buckets[chosen].pop(rng.randrange(len(buckets[chosen]))))
            buckets = {solved: left for solved, left in buckets.items() if left}
        return rows


@torch.no_grad()
def lowest_entropy(policy: Policy, inputs: Inputs, answers: list[Completion], config: ExGRPOConfig) -> Completion:
    """The answer over whose tokens the present policy's mean entropy is lowest."""
    found = []
    for first in range(0, len(answers), config.micro_batch_size):
        rows = [(inputs, completion.token_ids) for completion in answers[first : first + config.micro_batch_size]]
        _, mask, entropy = policy.logprobs(rows, config.temperature, entropy=True)  # (B, T)
        found += (entropy.sum(dim=1) / mask.sum(dim=1)).tolist()
    return answers[found.index(min(found))]


def pool_line(group: Group, guide_step: int) -> dict:
    """RLEP's line of the guide cache: every right answer, not only the first."""
    right = [c for c in group.completions if c.accuracy == 1 and c.finished]
    return cache_line(group, guide_step) | {
        "pool": [asdict(dataclasses.replace(c, source=f"guide@{guide_step}")) for c in right]
    }


# ---------------------------------------------------------------------------------------------------------------------
# The three loops
# ---------------------------------------------------------------------------------------------------------------------


def luffy(config: LUFFYConfig, out: Path) -> None:
    open_directory(config, out)
    header, cache, tokens = cached(config, config.guide or cards.TEACHER, out / "guide.jsonl", cache_line)
    answers = {id: [dataclasses.replace(c, source="teacher", behavior_logprobs=[0.0] * len(c.token_ids))]  # q = 1
               for id, c in cache.items()}  # fmt: skip
    with Run(config, out, spent_tokens=header["guide_sampled_tokens"] + tokens) as run:
        for step in run.steps():
            groups = run.sample(step)  # P groups of G completions
            verifier.score(groups)
            mixed = [take_slots(group, answers.get(group.prompt.id, [])) for group in groups]
            run.sampled_tokens -= replaced_tokens(groups, mixed)
            stats = update(run.policy, run.optimizer, mixed, config, centered_advantages, shaped_loss)
            run.end_step(step, groups, stats | guide_use(step, mixed), mixed)


def exgrpo(config: ExGRPOConfig, out: Path) -> None:
    with Run(config, out) as run:
        pool = Pool(config.group_size)
        for line in read_jsonl(out / "experience.jsonl"):
            pool.add(line)
        begun = any(line.get("accuracy", 0) > config.start_accuracy for line in read_jsonl(out / "metrics.jsonl"))
        for step in run.steps():
            rng = random.Random(derived_seed(config.seed, "replay", step))
            past = pool.draw(int(config.replay_frac * config.prompts_per_step), rng) if begun else []
            rows = past + rows_of_step(len(run.train_prompts), step, config)[: config.prompts_per_step - len(past)]
            groups = run.sample(step, rows)  # P groups of G completions
            verifier.score(groups)
            replays = [lowest_entropy(run.policy, group.inputs, pool.answers[row], config) for row, group in zip(past, groups)]
            mixed = [take_slots(group, [replay]) for group, replay in zip(groups, replays)] + groups[len(past) :]
            run.sampled_tokens -= replaced_tokens(groups, mixed)
            stats = update(run.policy, run.optimizer, mixed, config, centered_advantages, shaped_loss)
            for row, group in zip(rows, mixed):
                line = pool.line(step, row, group)
                if begun or line["solved"] == config.group_size:  # a prompt may retire before the pool opens
                    pool.add(line)
                    run.log(line, "experience.jsonl")
            stats |= guide_use(step, mixed) | {"exgrpo/pool": len(pool.solved), "exgrpo/retired": len(pool.retired)}
            run.end_step(step, groups, stats, mixed)
            begun = begun or answer_metrics(groups)["accuracy"] > config.start_accuracy


def rlep(config: RLEPConfig, out: Path) -> None:
    open_directory(config, out)
    guide = config.guide
    if not guide:
        shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(GRPOConfig)}
        train_grpo(GRPOConfig(**shared | {"steps": config.scout_steps, "out": str(out / "scout")}), out / "scout")
        guide = checkpoint_path(out / "scout", config.scout_steps)
    header, _, tokens = cached(config, guide, out / "guide.jsonl", pool_line)
    pool = {line["prompt_id"]: [Completion(**c) for c in line["pool"]]
            for line in read_jsonl(out / "guide.jsonl")[1:] if len(line["pool"]) >= config.min_correct}  # fmt: skip
    with Run(config, out, spent_tokens=header["guide_sampled_tokens"] + tokens) as run:
        for step in run.steps():
            groups = run.sample(step, group_size=config.group_size + config.replays)  # P groups of G + M completions
            verifier.score(groups)
            rng = random.Random(derived_seed(config.seed, "replay", step))
            replays = [rng.sample(pool[g.prompt.id], config.replays) if g.prompt.id in pool else [] for g in groups]
            mixed = [take_slots(group, some) for group, some in zip(groups, replays)]
            run.sampled_tokens -= replaced_tokens(groups, mixed)
            mixed = without_is_correction(mixed, run.policy, config)  # q is pi_old, for the replays too
            loss_of = partial(token_mean_loss, num_tokens=sum(len(c.token_ids) for group in mixed for c in group.completions))
            stats = update(run.policy, run.optimizer, mixed, config, group_advantages, loss_of)
            run.end_step(step, groups, stats | guide_use(step, mixed), mixed)


def cached(config, guide: str | Path, path: Path, line_of) -> tuple[dict, dict[str, Completion], int]:
    """npo.py's guide cache for all prompts of the run, made where it is not there yet."""
    if not path.is_file() or load_cache(config, path)[0]["until"] < config.steps:
        build_cache(config, guide, 1, config.steps, path, line_of=line_of)
    return load_cache(config, path)


def main(config: LUFFYConfig | ExGRPOConfig | RLEPConfig) -> None:
    loop, name = {LUFFYConfig: (luffy, "LUFFY"), ExGRPOConfig: (exgrpo, "ExGRPO"), RLEPConfig: (rlep, "RLEP")}[type(config)]
    loop(config, Path(config.out))
    report.grpo(Path(config.out), name)
    report.show_transcript(Path(config.out))


if __name__ == "__main__":
    from tyro.conf import subcommand

    command_line(
        Annotated[LUFFYConfig, subcommand("luffy", description="An external teacher's answer in every group.")]
        | Annotated[ExGRPOConfig, subcommand("exgrpo", description="The policy's own past successes, replayed.")]
        | Annotated[RLEPConfig, subcommand("rlep", description="Successes of a fully trained policy beside the fresh ones.")],
        main,
    )
