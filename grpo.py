"""GRPO with a verifiable reward: the baseline that npo.py adds one thing to.

The policy answers P prompts, G times each. Every answer's reward is compared
with the rewards of its own group, and one clipped policy-gradient step follows
(Shao et al. 2024, arXiv 2402.03300):

    A_i    = (r_i - mean(r)) / (std(r) + 1e-6)    over the G rewards of a group
    J      = mean over all P*G answers o_i of
             1/|o_i| sum_t min(rho_it A_i, clip(rho_it, 1-eps_low, 1+eps_high) A_i)
    rho_it = pi_theta(o_it | o_i<t) / q_i(o_it | o_i<t)

q_i is the policy that sampled o_i. As in the NPO authors' settings, and unlike
in Shao et al., there is no KL term (a verified reward has no reward model to
drift away from), and the clip range is 0.2 / 0.28. The nouns (Group, Completion,
Sample) and the letters are explained in plumbing/rollout.py: read it first.

    python grpo.py                            # the cards world, on a laptop
    python grpo.py --model Qwen/Qwen3-VL-2B-Instruct --out runs/geometry
"""

from dataclasses import dataclass

import torch

import verifier
from plumbing.command import command_line
from plumbing.metrics import IS_CAP, UpdateStats
from plumbing.model import Policy
from plumbing.report import report
from plumbing.rollout import Group, Sample, log_q_of, micro_batches, samples_with_signal
from plumbing.run import Run
from plumbing.settings import RunConfig, within


@dataclass
class GRPOConfig(RunConfig):
    out: str = "runs/grpo"  # run directory; the same command resumes it
    # Batch
    prompts_per_step: int = 8  # P (the NPO authors: 256)
    group_size: int = 8  # G, the paper's n
    max_new_tokens: int | None = None  # longest answer [worlds 80, else 4096]
    temperature: float = 1.0  # of sampling, and of the log-probs that are trained
    # Update
    updates_per_batch: int = 1  # optimizer steps on each batch
    clip_low: float = 0.2  # the ratio's clip range is 1 - clip_low ...
    clip_high: float = 0.28  # ... to 1 + clip_high
    lr: float | None = None  # of AdamW, constant [worlds 1e-4, else 1e-6; LoRA x 10]
    weight_decay: float = 0.01  # of AdamW
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm

    def check(self) -> None:
        super().check()
        within(self, "group_size", least=2)  # advantages compare answers to one prompt
        for name in ("prompts_per_step", "max_new_tokens", "updates_per_batch"):
            within(self, name, least=1)
        for name in ("temperature", "lr", "max_grad_norm"):
            within(self, name, above=0)
        within(self, "clip_low", least=0, below=1)
        for name in ("clip_high", "weight_decay"):
            within(self, name, least=0)


# EXPERIMENT HERE: what an answer is worth, relative to the others of its group.
def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards (P, G) -> advantages (P, G): (r - mean) / (std + 1e-6).

    The std has ddof 1; it and the 1e-6 are the NPO authors' code. Where all
    rewards are equal there is nothing to compare, and A is exactly 0.
    """
    mean, std = rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, keepdim=True)
    alike = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return ((rewards - mean) / (std + 1e-6)).masked_fill(alike, 0.0)


# EXPERIMENT HERE: the objective.
def clipped_policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    num_sequences: int | None = None,
    weights: torch.Tensor | float = 1.0,
    num_tokens: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-J above, to be minimised.

    Args:
        logprobs, old_logprobs: (B, T), log pi_theta and log q_i.
        advantages: (B,). mask: (B, T), True on the answers' tokens.
        num_sequences: sequences in the whole batch, if this is a
            micro-batch of it, so that the micro-batches' losses add up.
        weights: (B, T), of each token's term; 1 except in vLLM's slots.
        num_tokens: of the answers in the whole batch; for losses that
            average over tokens.
    Returns:
        the loss, and (B, T) of each token: its ratio, and whether the clip
        stopped its gradient at the range's low or high end. What else is
        returned there is logged by its name, as a mean over the tokens.
    """
    ratio = torch.exp((logprobs - old_logprobs).masked_fill(~mask, 0.0))
    gain = advantages[:, None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = weights * torch.minimum(ratio * gain, clipped * gain)  # (B, T)
    per_sequence = objective.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1)
    loss = -per_sequence.sum() / (num_sequences or len(logprobs))
    return loss, {
        "ratio": ratio.detach(),
        "low": mask & (ratio < 1 - clip_low) & (gain < 0),
        "high": mask & (ratio > 1 + clip_high) & (gain > 0),
    }


def policy_loss(
    policy: Policy, samples: list[Sample], config: GRPOConfig, num_sequences: int, num_tokens: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a micro-batch, and what `UpdateStats` logs of its tokens."""
    rows = [(s.encoded, s.completion.token_ids) for s in samples]
    logprobs, mask = policy.logprobs(rows, config.temperature)  # (B, T)
    log_q, weights = log_q_of(samples, logprobs, mask)  # (B, T)
    advantages = logprobs.new_tensor([s.advantage for s in samples])  # (B,)
    clip, weight = (config.clip_low, config.clip_high), weights.clamp(max=IS_CAP)
    loss, per_token = clipped_policy_loss(
        logprobs, log_q, advantages, mask, *clip, num_sequences, weight, num_tokens
    )
    return loss, per_token | {"weight": weights}


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    groups: list[Group],
    config: GRPOConfig,
    advantages_of=None,
    loss_of=None,
) -> dict:
    """`updates_per_batch` optimizer steps on the groups; returns their metrics.

    A group whose advantages are all 0 has no gradient: it is counted, but
    left out of forward and backward. If that leaves none, AdamW still goes
    on by its moments, as in TRL and verl.
    """
    advantages_of, loss_of = advantages_of or group_advantages, loss_of or policy_loss
    rewards = torch.tensor([[c.reward for c in g.completions] for g in groups])  # (P, G)
    advantages = advantages_of(rewards)  # (P, G)
    samples, stats = samples_with_signal(groups, advantages), UpdateStats()
    size = rewards.numel(), sum(len(c.token_ids) for g in groups for c in g.completions)
    for _ in range(config.updates_per_batch):
        for micro_batch in micro_batches(samples, config):
            loss, per_token = loss_of(policy, micro_batch, config, *size)
            loss.backward()
            stats.add(micro_batch, loss, per_token)
        if not samples:
            for parameter in policy.parameters():
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        stats.end_step(norm)  # stops the run if loss or gradient is not finite
        optimizer.step()
        optimizer.zero_grad()
    silent = (advantages == 0).all(dim=1).float().mean().item()
    return {"frac_reward_zero_std": silent} | stats.metrics()


def train(config: GRPOConfig, out: str) -> None:
    with Run(config, out) as run:
        for step in run.steps():
            groups = run.sample(step)  # P groups of G completions
            verifier.score(groups)
            stats = update(run.policy, run.optimizer, groups, config)
            run.end_step(step, groups, stats)


def main(config: GRPOConfig) -> None:
    train(config, config.out)
    report(config.out, "GRPO")


if __name__ == "__main__":
    command_line(GRPOConfig, main)
