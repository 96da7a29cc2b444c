"""ExGRPO (Zhan et al., arXiv 2510.02245): npo.py's loop, but the slot is the policy's own past.

Against luffy.py (see its table): the answer is one of the policy's own, of an earlier step, with
the log-probs recorded then. Half of a batch's prompts come from a pool of those that were solved k
of n times, 0 < k < n, when last asked, the replayed slot included. A bucket k is drawn with weight
N(k; n/2, 1), then a prompt of it. Of its stored answers the one is replayed over whose tokens the
present policy's mean entropy is lowest. Prompts solved n of n retire for good. Replay starts after
the first batch that is solved beyond 0.35.

Code: ElliottYan/LUFFY, ExGRPO/. The paper's entropy is followed, since the code averages it over
padding; and the code's loss, from the first step on (the code clips until the pool opens). Unlike
in both, a prompt that left the pool is asked again when the next epoch comes to it.

    python -m commands.exgrpo
"""

import dataclasses
import math
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import verifier
from commands.luffy import centered_advantages, replaced_tokens, shaped_loss, take_slots
from grpo import GRPOConfig, update
from plumbing import UsageError
from plumbing.command import command_line
from plumbing.files import read_jsonl
from plumbing.metrics import answer_metrics
from plumbing.model import Policy
from plumbing.report import report
from plumbing.rollout import Completion, EncodedPrompt, Group, batched
from plumbing.run import Run, derived_seed
from plumbing.settings import within


@dataclass
class ExGRPOConfig(GRPOConfig):
    out: str = "runs/exgrpo"  # run directory; the same command resumes it
    # Replay
    replay_frac: float = 0.5  # share of a batch's prompts that comes from the pool
    start_accuracy: float = 0.35  # the pool opens after the first batch solved beyond this
    gamma: float = 0.1  # of the weight w / (w + gamma)
    entropy_coef: float = 0.001  # weight of the entropy bonus

    def check(self) -> None:
        super().check()
        within(self, "gamma", above=0)
        within(self, "entropy_coef", least=0)
        for name in ("replay_frac", "start_accuracy"):
            within(self, name, least=0, most=1)
        if int(self.replay_frac * self.prompts_per_step) < 1:
            raise UsageError(
                f"--replay-frac {self.replay_frac}: of --prompts-per-step {self.prompts_per_step} "
                "that is no prompt; raise either"
            )


def bucket_weight(successes: int, group_size: int) -> float:
    """Weight of the prompts solved `successes` of n times: N(k; n/2, 1), but never quite 0."""
    density = math.exp(-((successes - group_size / 2) ** 2) / 2) / math.sqrt(2 * math.pi)
    return max(density, 1e-300)  # it underflows 39 successes from the middle


@dataclass
class Pool:
    """Past successes by row of the data set, as the lines of experience.jsonl leave them."""

    group_size: int
    solved: dict[int, int] = field(default_factory=dict)  # row -> k, when last solved
    answers: dict[int, list[Completion]] = field(default_factory=dict)
    retired: set[int] = field(default_factory=set)

    def line(self, step: int, row: int, group: Group) -> dict:
        """What a group, with its replayed slot if it has one, teaches the pool."""
        right = [c for c in group.completions if c.accuracy == 1]
        known = [c.token_ids for c in self.answers.get(row, [])]
        new = {tuple(c.token_ids): c for c in right if c.token_ids not in known}
        new = [
            asdict(dataclasses.replace(c, source=f"past@{step}", exact=True, ratios=None))
            for c in new.values()
        ]
        solved = len(right)
        return {
            "step": step,
            "row": row,
            "solved": solved,
            "new": new if solved < self.group_size else [],
        }

    def add(self, line: dict) -> None:
        row, solved = line["row"], line["solved"]
        if solved == self.group_size:  # nothing left to learn
            self.retired.add(row)
            self.solved.pop(row, None)
            self.answers.pop(row, None)
        elif solved and row not in self.retired and (line["new"] or row in self.answers):
            self.solved[row] = solved
            new = [Completion(**completion) for completion in line["new"]]
            self.answers.setdefault(row, []).extend(new)

    def draw(self, count: int, rng: random.Random) -> list[int]:
        """Up to `count` different rows: a bucket by its weight, then any row of it."""
        buckets, rows = {}, []
        for row, solved in sorted(self.solved.items()):
            buckets.setdefault(solved, []).append(row)
        while buckets and len(rows) < count:
            weights = [bucket_weight(solved, self.group_size) for solved in buckets]
            (chosen,) = rng.choices(list(buckets), weights)
            rows.append(buckets[chosen].pop(rng.randrange(len(buckets[chosen]))))
            if not buckets[chosen]:
                del buckets[chosen]
        return rows


@torch.no_grad()
def lowest_entropy(
    policy: Policy, encoded: EncodedPrompt, answers: list[Completion], config: ExGRPOConfig
) -> Completion:
    """The answer over whose tokens the present policy's mean entropy is lowest."""
    found = []
    for some in batched(answers, config.micro_batch_size):
        rows = [(encoded, completion.token_ids) for completion in some]
        _, mask, entropy = policy.logprobs(rows, config.temperature, entropy=True)  # (B, T)
        found += (entropy.sum(dim=1) / mask.sum(dim=1)).tolist()
    return answers[found.index(min(found))]


def train(config: ExGRPOConfig, out: Path) -> None:
    with Run(config, out) as run:
        pool, replays = Pool(config.group_size), int(config.replay_frac * config.prompts_per_step)
        for line in read_jsonl(out / "experience.jsonl"):
            pool.add(line)
        past_steps = read_jsonl(out / "metrics.jsonl")
        last, sizes = (past_steps or [{}])[-1], (len(pool.solved), len(pool.retired))
        logged = last.get("exgrpo/pool", 0), last.get("exgrpo/retired", 0)
        if run.step > run.start_step and (last.get("step"), logged) != (run.step, sizes):
            raise UsageError(
                f"--out {out}: metrics.jsonl and experience.jsonl, out of which it replays, are "
                f"not those of step {run.step}; bring them back, or start over with --fresh"
            )
        begun = any(line.get("accuracy", 0) > config.start_accuracy for line in past_steps)
        for step in run.steps():
            rng = random.Random(derived_seed(config.seed, "replay", step))
            past = pool.draw(replays, rng) if begun else []
            rows = past + run.rows(step)[: config.prompts_per_step - len(past)]
            groups = run.sample(step, rows)  # P groups of G completions
            verifier.score(groups)
            mixed = list(groups)
            for place, row in enumerate(past):
                group = groups[place]
                replay = lowest_entropy(run.policy, group.encoded, pool.answers[row], config)
                mixed[place] = take_slots(group, [replay])
            run.sampled_tokens -= replaced_tokens(groups, mixed)
            stats = update(
                run.policy, run.optimizer, mixed, config, centered_advantages, shaped_loss
            )
            for row, group in zip(rows, mixed):
                line = pool.line(step, row, group)
                if begun or line["solved"] == config.group_size:  # some retire before it opens
                    pool.add(line)
                    run.log(line, "experience.jsonl")
            stats |= {"exgrpo/pool": len(pool.solved), "exgrpo/retired": len(pool.retired)}
            run.end_step(step, groups, stats, mixed)
            begun = begun or answer_metrics(groups)["accuracy"] > config.start_accuracy


def main(config: ExGRPOConfig) -> None:
    train(config, Path(config.out))
    report(config.out, "ExGRPO")


if __name__ == "__main__":
    command_line(ExGRPOConfig, main)
