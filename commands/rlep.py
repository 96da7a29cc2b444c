"""RLEP (Zhang et al., arXiv 2507.07451): npo.py's loop, but the guide is a fully trained policy.

Against npo.py (see luffy.py's table): the guide is the end of a long run of the same kind. A pool
keeps all its right answers to each prompt that it solved at least twice. M of them join the G fresh
ones (16 + 2 in the paper, 8 + 1 here), whatever the pass-rate. Their ratios start at 1: q is the
policy that is being trained. The loss is averaged over all tokens of the batch (DAPO), not within
sequences first.

Code: Kwai-Klear/RLEP, recipe/rlep/rlep_training.sh. Ours are: the pool is sampled at the training
temperature (the paper: 0.7, top-p 0.95); a prompt outside of the pool gets G + M fresh answers (the
code: M empty ones). Overlong penalty, warm-up and dual clip are left out.

    python -m commands.rlep                  # trains its guide first
    python -m commands.rlep --guide runs/grpo/checkpoints/step_000400
"""

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path

import torch

import grpo
import verifier
from commands.luffy import ask_about_all, replaced_tokens, take_slots
from grpo import GRPOConfig, group_advantages, policy_loss, update
from plumbing.checkpoints import checkpoint_path
from plumbing.command import command_line, open_directory
from plumbing.report import report
from plumbing.rollout import Group
from plumbing.run import Run, derived_seed
from plumbing.settings import within


@dataclass
class RLEPConfig(GRPOConfig):
    out: str = "runs/rlep"  # run directory, the long run's is scout/ in it
    # Replay
    guide: str | None = None  # the fully trained checkpoint [the end of a run of --scout-steps]
    scout_steps: int = 400  # its length, if it is trained first (RLEP's own: 400)
    guide_samples: int = 64  # its answers to a prompt
    min_correct: int = 2  # right answers among them that let a prompt into the pool
    replays: int = 1  # M, replayed answers beside the G fresh ones (the paper: 2 beside 16)

    def check(self) -> None:
        super().check()
        for name in ("scout_steps", "guide_samples", "replays"):
            within(self, name, least=1)
        of = "--replays, --guide-samples"
        within(self, "min_correct", least=self.replays, most=self.guide_samples, of=of)


def token_mean_update(run: Run, groups: list[Group], config: RLEPConfig) -> dict:
    """grpo.update, with the loss averaged over all tokens of the batch.

    The clipped loss is linear in the size of the advantage: times |o_i|, the mean over a sequence's
    tokens becomes its sum.
    """
    lengths = torch.tensor([[len(c.token_ids) for c in g.completions] for g in groups])  # (P, G)

    def advantages(rewards: torch.Tensor) -> torch.Tensor:
        return group_advantages(rewards) * lengths

    def loss(policy, samples, config, _, num_tokens: int) -> tuple[torch.Tensor, dict]:
        return policy_loss(policy, samples, config, num_tokens, num_tokens)

    stats = update(run.policy, run.optimizer, groups, config, advantages, loss)
    for completion in (c for group in groups for c in group.completions):
        completion.advantage /= len(completion.token_ids)  # as it is recorded
    return stats


def train(config: RLEPConfig, out: Path) -> None:
    open_directory(config, out)
    guide = config.guide
    if not guide:
        steps = config.start_step + config.scout_steps
        scout = dataclasses.replace(config, steps=steps, out=str(out / "scout"))
        grpo.train(scout, out / "scout")
        guide = checkpoint_path(out / "scout", steps)
    cache = ask_about_all(config, guide, out / "guide.jsonl", keep=config.guide_samples)
    for answer in (answer for found in cache.answers.values() for answer in found):
        answer.behavior_logprobs = None  # q is the policy itself
    with Run(config, out, spent_tokens=cache.spent_tokens) as run:
        for step in run.steps():
            groups = run.sample(step, group_size=config.group_size + config.replays)
            verifier.score(groups)
            rng = random.Random(derived_seed(config.seed, "replay", step))
            right = [cache.answers_to(g.prompt, step, config.guide_samples) for g in groups]
            mixed = [
                take_slots(g, rng.sample(found, config.replays))
                if len(found) >= config.min_correct
                else g
                for g, found in zip(groups, right)
            ]
            run.sampled_tokens -= replaced_tokens(groups, mixed)
            stats = token_mean_update(run, mixed, config)
            run.end_step(step, groups, stats, mixed)


def main(config: RLEPConfig) -> None:
    train(config, Path(config.out))
    report(config.out, "RLEP")


if __name__ == "__main__":
    command_line(RLEPConfig, main)
