"""LUFFY (Yan et al., arXiv 2504.14945): npo.py's loop, but the slot is an external teacher's.

Letters as in grpo.py. Where the rivals' answers come from, and how a token of theirs is weighted,
with w = pi_theta / q:

              trajectory         prompts                    q in that slot    weight
    npo.py    near future        pass-rate <= tau           the guide         w, clipped
    luffy     external teacher   every one                  1                 w / (w + 0.1)
    exgrpo    own past           half a batch, from a pool  the past policy   w / (w + 0.1)
    rlep      own far future     every one                  the policy        w, clipped

Against npo.py: another model's right answer to each prompt takes the last slot, whatever the
pass-rate; prompts without one keep their own slots. The teacher's probabilities are unknown: q = 1.
The code (ElliottYan/LUFFY, exp_scripts/train.sh) is followed: A_i = r_i - mean(r), not divided by
the std; token terms are summed over a sequence and divided by the constant longest length; own
slots are not clipped; plus 0.001 times the entropy (the paper: 0.01). Ours are: the mean over
sequences where the script sums, so its entropy counts for less; and groups that are all alike are
left out, entropy included, as in grpo.update.

All three rivals share npo.py's verifier, rewards, optimizer and guide cache. With one update per
batch, the default, every ratio of the policy's own slots is 1 and their clip does nothing; the
originals make two updates (LUFFY, ExGRPO) or eight (RLEP). Replaced slots are sampled here but not
counted in `sampled_tokens`: none of the three pays for them. (npo.py's gate needs them, and pays.)

    python -m commands.luffy                 # the cards world's teacher, or --guide MODEL
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

import verifier
from grpo import GRPOConfig, update
from plumbing import UsageError
from plumbing.command import command_line, open_directory
from plumbing.guide_cache import build_guide_cache, load_guide_cache
from plumbing.metrics import IS_CAP
from plumbing.model import Policy
from plumbing.report import report
from plumbing.rollout import Completion, Group, Sample, log_q_of
from plumbing.run import Run, rows_of_steps
from plumbing.settings import within
from worlds import cards


@dataclass
class LUFFYConfig(GRPOConfig):
    out: str = "runs/luffy"  # run directory; the same command resumes it
    # Teacher
    guide: str | None = None  # a model with the policy's tokenizer [cards: worlds/cards_teacher]
    guide_samples: int = 2  # its answers to a prompt (OpenR1, LUFFY's data: two or more)
    shaping: bool = True  # weight w / (w + gamma); without it w, as in the paper's ablation
    gamma: float = 0.1  # of the weight
    entropy_coef: float = 0.001  # weight of the entropy bonus

    keeps_its_manner = False  # the teacher comes to right answers in another way

    def check(self) -> None:
        super().check()
        within(self, "gamma", above=0)  # w / (w + 0) is 1 and has no gradient
        within(self, "entropy_coef", least=0)
        within(self, "guide_samples", least=1)
        if not self.guide and self.model != "cards":
            raise UsageError(
                "--guide: LUFFY learns from another model; give one with the tokenizer of "
                f"{self.model}"
            )


def centered_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards (P, G) -> r - mean (P, G): `grpo_use_std=False` in LUFFY's and ExGRPO's scripts."""
    alike = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(alike, 0.0)


def shaped_policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    off_policy: torch.Tensor,
    max_length: int,
    gamma: float | None = 0.1,
    num_sequences: int | None = None,
    weights: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-1/B sum_i 1/L sum_t weight_it A_i, to be minimised: LUFFY's and ExGRPO's loss.

    weight_it = w_it / (w_it + gamma) in rows of another policy, w_it in the policy's own; nothing
    is clipped.

    Args:
        logprobs, old_logprobs: (B, T), log pi_theta and log q_i. advantages: (B,). mask: (B, T).
        off_policy: (B,), True where the policy did not sample the row.
        max_length: L, the same for all sequences.
        gamma: None for the weight w.
        num_sequences, weights: as in `grpo.clipped_policy_loss`.
    Returns:
        what `grpo.clipped_policy_loss` returns; "ratio" is w.
    """
    ratio = torch.exp((logprobs - old_logprobs).masked_fill(~mask, 0.0))  # (B, T)
    shaped = ratio if gamma is None else ratio / (ratio + gamma)
    weight = weights * torch.where(off_policy[:, None], shaped, ratio)
    objective = (weight * advantages[:, None]).masked_fill(~mask, 0.0)  # (B, T)
    loss = -objective.sum() / max_length / (num_sequences or len(logprobs))
    never = torch.zeros_like(mask)
    return loss, {"ratio": ratio.detach(), "low": never, "high": never}


def shaped_loss(policy: Policy, samples: list[Sample], config, num_sequences: int, _):
    """As `grpo.policy_loss`: the shaped loss of a micro-batch less the entropy bonus."""
    rows = [(s.encoded, s.completion.token_ids) for s in samples]
    logprobs, mask, entropy = policy.logprobs(rows, config.temperature, entropy=True)  # (B, T)
    log_q, weights = log_q_of(samples, logprobs, mask)  # (B, T)
    loss, per_token = shaped_policy_loss(
        logprobs,
        log_q,
        logprobs.new_tensor([s.advantage for s in samples]),
        mask,
        torch.tensor([s.completion.source != "policy" for s in samples], device=mask.device),
        config.max_new_tokens,
        config.gamma if getattr(config, "shaping", True) else None,
        num_sequences,
        weights.clamp(max=IS_CAP),
    )
    bonus = (entropy.sum(dim=1) / mask.sum(dim=1)).sum() / num_sequences
    return loss - config.entropy_coef * bonus, per_token | {"weight": weights}


def take_slots(group: Group, others: list[Completion]) -> Group:
    """Gives the last slots to `others`, whatever the pass-rate; the argument is not changed."""
    if not others:
        return group
    own = group.completions[: len(group.completions) - len(others)]
    return dataclasses.replace(group, completions=[*own, *others])


def replaced_tokens(groups: list[Group], mixed: list[Group]) -> int:
    """Tokens of the sampled slots that others took."""
    pairs = [
        (before, after)
        for group, of_mixed in zip(groups, mixed)
        for before, after in zip(group.completions, of_mixed.completions)
    ]
    return sum(len(before.token_ids) for before, after in pairs if after is not before)


def ask_about_all(config, guide: str | Path, path: Path, keep: int = 1):
    """The guide cache for the prompts of all the run's steps."""
    rows = rows_of_steps(config, config.start_step + 1, config.steps)
    build_guide_cache(path, config, guide, rows, config.steps, keep)
    return load_guide_cache(path, config)


def train(config: LUFFYConfig, out: Path) -> None:
    open_directory(config, out)
    cache = ask_about_all(config, config.guide or cards.TEACHER, out / "guide.jsonl")
    for (answer,) in cache.answers.values():
        answer.source, answer.behavior_logprobs = "teacher", [0.0] * len(answer.token_ids)  # q = 1
    with Run(config, out, spent_tokens=cache.spent_tokens) as run:
        for step in run.steps():
            groups = run.sample(step)  # P groups of G completions
            verifier.score(groups)
            mixed = [take_slots(g, cache.answers_to(g.prompt, step)) for g in groups]
            run.sampled_tokens -= replaced_tokens(groups, mixed)
            stats = update(
                run.policy, run.optimizer, mixed, config, centered_advantages, shaped_loss
            )
            run.end_step(step, groups, stats, mixed)


def main(config: LUFFYConfig) -> None:
    train(config, Path(config.out))
    report(config.out, "LUFFY")


if __name__ == "__main__":
    command_line(LUFFYConfig, main)
