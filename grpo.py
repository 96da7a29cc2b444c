"""GRPO with a verifiable reward: the baseline that npo.py adds one thing to.

Each step, the policy answers P prompts G times each; every answer's reward is compared with those of its own group
(Shao et al. 2024, arXiv 2402.03300), and a clipped policy-gradient step follows:

    A_i  = (r_i - mean(r)) / std(r)                                            over the G rewards of the group
    J    = E[ 1/G sum_i 1/|o_i| sum_t min(rho_it A_i, clip(rho_it, 1 - eps_low, 1 + eps_high) A_i) ]
    rho_it = pi_theta(o_it | o_i<t) / q_i(o_it | o_i<t)                        q_i: the policy that sampled o_i

Kept from the paper: the group baseline, token-level ratios, the mean per sequence and then over the batch. As in the NPO
authors' settings: no KL term (the reward is verified, there is no reward model to drift away from), the clip range 0.2 / 0.28.

    python grpo.py                                          # the embedded cards world, on a laptop
    python grpo.py --model Qwen/Qwen3-VL-2B-Instruct --dataset hiyouga/geometry3k --out runs/geometry

Letters: P prompts a step, G slots a group, B = P*G sequences, T completion length.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import report
import verifier
import vllm_sampler
from command import command_line
from policy import Completion, Group, Policy
from run import Run
from tasks import UsageError

IS_CAP = 2.0  # of a token's weight for what vLLM sampled otherwise than the trainer would have; TRL's default is 3


@dataclass
class GRPOConfig:
    # What is trained, on what, and where it goes
    model: str = "cards"  # "cards" (the tiny base in assets/), a hub id, or a save_pretrained folder
    dataset: str = ""  # "cards", a preset (tasks.py; mmk12=PATH is a copy), hub id, file, folder [cards, else geometry3k]
    columns: str = ""  # the data set's names, as in prompt=problem,images=images,answer=answer,choices=options
    train_split: str = "train"  # split that is trained on
    eval_split: str = ""  # held-out split [the last --eval-prompts rows of the training split]
    eval_prompts: int = 256  # held-out prompts of an evaluation
    eval_samples: int = 0  # answers to each of them, sampled as in training [4 for cards, else 1]
    out: str = "runs/grpo"  # run directory; the same command resumes it
    fresh: bool = False  # start over; the run in --out is moved to OUT.old
    # How long
    steps: int = 100  # training steps
    seed: int = 0  # decides prompts, sampling and evaluation
    eval_every: int = 5  # steps between evaluations
    save_every: int = 0  # steps between checkpoints [20, or for a late intervention up to 20; the authors: 10 or 20]
    keep: str = ""  # checkpoints: "all", "needed" (by the method, and the newest), or steps, as in 40,100 [all]
    save_optimizers: str = ""  # beside "all" or the "last"; where none was kept, AdamW starts anew [all for cards, else last]
    dry_run: bool = False  # print the batch arithmetic and the memory plan, and stop
    # A batch
    prompts_per_step: int = 8  # P (the authors: 256)
    group_size: int = 8  # G, the paper's n
    max_prompt_tokens: int = 4096  # longer prompts, images counted, are dropped and counted (as the authors)
    max_new_tokens: int = 0  # T at most [64 for cards, else 4096 as the authors]
    sampler: Literal["auto", "hf", "vllm"] = "auto"  # [vllm on cuda if installed, and to plan for, but not for cards; else hf]
    vllm_memory: float = 0.35  # share of the card for vLLM's weights and cache
    temperature: float = 1.0  # of sampling, and of the log-probs that are trained
    # The update
    lr: float = 0.0  # AdamW learning rate, constant [1e-4 for cards, else 1e-6 as the authors; ten times that with LoRA]
    weight_decay: float = 0.01  # AdamW weight decay
    max_grad_norm: float = 1.0  # gradient clipping
    clip_low: float = 0.2  # the ratio's clip range is 1 - clip_low ...
    clip_high: float = 0.28  # ... to 1 + clip_high
    updates_per_batch: int = 1  # optimizer steps on each batch (GRPO's mu)
    micro_batch_size: int = 0  # sequences in one forward and backward; memory only (and bf16's rounding) [32 for cards, else 4]
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"  # memory only, never results [off for cards, else on]
    train_vision: bool = False  # train the vision tower too; not specified by the paper
    lora: int = 0  # train LoRA adapters of this rank instead of the weights, for small cards; not specified by the paper
    device: str = "auto"  # "cpu", "cuda", "cuda:1" [cuda where there is one]
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of weights and gradients [bf16 on cuda, else fp32]

    def __post_init__(self):
        self.dataset = self.dataset or ("cards" if self.model == "cards" else "hiyouga/geometry3k")
        on_cards = self.dataset == "cards"
        self.eval_samples = self.eval_samples or (4 if on_cards else 1)
        self.max_new_tokens = self.max_new_tokens or (64 if on_cards else 4096)
        self.micro_batch_size = self.micro_batch_size or (32 if on_cards else 4)
        self.lr = self.lr or (1e-4 if on_cards else 1e-6) * (10 if self.lora else 1)
        self.save_every, self.keep = self.save_every or 20, self.keep or "all"
        self.save_optimizers = self.save_optimizers or ("all" if on_cards else "last")
        if self.gradient_checkpointing == "auto":
            self.gradient_checkpointing = "off" if on_cards else "on"
        if self.sampler == "auto":
            here = torch.cuda.is_available() and self.device != "cpu" and vllm_sampler.available()
            self.sampler = "vllm" if (here or self.dry_run) and not on_cards else "hf"

    def check(self) -> None:
        """Raises UsageError for the first value that makes no sense."""
        if self.group_size < 2:
            raise UsageError(f"--group-size {self.group_size}: advantages compare answers to one prompt; it takes 2 at least")
        counts = ("steps", "eval_every", "save_every", "prompts_per_step", "eval_prompts", "eval_samples", "max_new_tokens",
                  "updates_per_batch", "micro_batch_size", "lr", "temperature", "max_grad_norm", "max_prompt_tokens")  # fmt: skip
        for name in counts:
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")
        if not self.weight_decay >= 0:
            raise UsageError(f"--weight-decay {self.weight_decay}: must not be negative")
        if not 0 <= self.clip_low < 1 or self.clip_high < 0:
            raise UsageError(f"--clip-low {self.clip_low} --clip-high {self.clip_high}: take 0 <= low < 1 and high >= 0")
        if not re.fullmatch(r"all|needed|\d+(,\d+)*", self.keep):
            raise UsageError(f"--keep {self.keep}: take all, needed, or steps, as in 40,100")
        if self.save_optimizers not in ("all", "last"):
            raise UsageError(f"--save-optimizers {self.save_optimizers}: take all or last")
        if self.lora < 0 or self.lora and self.train_vision:
            raise UsageError(
                f"--lora {self.lora}: takes a rank above 0, and leaves the vision tower as it is (no --train-vision)"
            )
        if not 0 < self.vllm_memory < 1:
            raise UsageError(f"--vllm-memory {self.vllm_memory}: is a share of the card, between 0 and 1")
        if self.sampler == "vllm" and self.device not in ("auto", "cpu", "cuda", "cuda:0"):
            raise UsageError(
                f"--device {self.device}: vLLM takes the first card that it sees; set CUDA_VISIBLE_DEVICES, and leave --device out"
            )
        if self.sampler == "vllm" and not (vllm_sampler.available() or self.dry_run):
            raise UsageError(
                "--sampler vllm: vllm is not installed; pip install -r requirements-vllm.txt, or take --sampler hf"
            )


# EXPERIMENT HERE: what an answer is worth, relative to the other answers to the same prompt.
def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards (P, G) -> advantages (P, G): (r - mean) / (std + 1e-6), ddof 1 and eps as in the NPO authors' code.

    A group whose rewards are all alike has nothing to compare: exactly 0.
    """
    mean, std = rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, keepdim=True)
    alike = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return ((rewards - mean) / (std + 1e-6)).masked_fill(alike, 0.0)


# EXPERIMENT HERE: the objective.
def clipped_policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
    clip_low: float = 0.2, clip_high: float = 0.28, num_sequences: int | None = None, weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """-J above, to be minimised.

    Args:
        logprobs, old_logprobs: (B, T), under pi_theta and under q_i.
        advantages: (B,). mask: (B, T), True on completion tokens.
        num_sequences: sequences in the whole batch, where this is one micro-batch of it (default: B), so that the
            micro-batches' losses add up to the batch's.
        weights: (B, T), of each token's term, where a sampler of its own was not quite q_i (`sampler_weights`).
    Returns:
        loss, and per token: "ratio" (B, T), and "low" and "high" (B, T), True where the clip stopped the gradient.
    """
    ratio = torch.exp((logprobs - old_logprobs).masked_fill(~mask, 0.0))  # (B, T)
    gain = advantages[:, None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * gain, clipped * gain).masked_fill(~mask, 0.0)  # (B, T)
    if weights is not None:
        objective = weights * objective
    per_sequence = objective.sum(dim=1) / mask.sum(dim=1)  # (B,)
    loss = -per_sequence.sum() / (num_sequences or len(logprobs))
    stats = {
        "ratio": ratio.detach(),
        "low": mask & (ratio < 1 - clip_low) & (gain < 0),
        "high": mask & (ratio > 1 + clip_high) & (gain > 0),
    }
    return loss, stats


def policy_loss(policy: Policy, rows: list[tuple], config: GRPOConfig, num_sequences: int) -> tuple[torch.Tensor, dict]:
    """The loss of a micro-batch of B rows (inputs, completion, advantage), and its stats per token."""
    inputs, completions, advantages = zip(*rows)
    logprobs, mask = policy.logprobs(list(zip(inputs, [c.token_ids for c in completions])), config.temperature)  # (B, T)
    old, weights, mismatch = old_logprobs(completions, logprobs, mask, config)
    loss, stats = clipped_policy_loss(
        logprobs, old, logprobs.new_tensor(advantages), mask, config.clip_low, config.clip_high, num_sequences, weights
    )
    return loss, stats | mismatch


def old_logprobs(completions: list[Completion], logprobs: torch.Tensor, mask: torch.Tensor, config: GRPOConfig) -> tuple:
    """The ratio's denominator, log q_i (B, T); the weights (B, T) of the terms, if there are any; and what is logged of these."""
    recorded = behavior_logprobs(completions, logprobs, mask)
    if config.sampler == "hf":
        return recorded, None, {}
    old, mismatch = trainer_logprobs(completions, logprobs, recorded, mask)
    return old, mismatch.clamp(max=IS_CAP), {"mismatch": mismatch}


def trainer_logprobs(
    completions: list[Completion], logprobs: torch.Tensor, recorded: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands in for `recorded` (B, T) where vLLM sampled, whose log-probs are not quite the trainer's for the same weights.

    A slot of the policy has pi_old, the trainer's own at the first update on it, and is off by the ratio pi_old / q_vllm, by which its
    terms are weighed, truncated ("Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", Yao et al. 2025; TRL). A
    guide's slot has what the guide recorded, and no such ratio: its own is pi_theta / pi_guide as it is.

    Returns:
        old log-probs (B, T), and the ratio pi_old / q_vllm before truncation (B, T), 1 in guide slots and padding.
    """
    for completion, values, real in zip(completions, logprobs.detach(), mask):
        if completion.trainer_logprobs is None:
            completion.trainer_logprobs = values[real].tolist()
    flat = [lp for c in completions for lp in (c.trainer_logprobs if c.source == "policy" else c.behavior_logprobs)]
    old = torch.zeros_like(logprobs).masked_scatter(mask, logprobs.new_tensor(flat))
    return old, torch.exp(old - recorded)


def behavior_logprobs(completions: list[Completion], logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Those recorded with the completions, laid out as `logprobs` (B, T); 0 outside of the mask."""
    recorded = logprobs.new_tensor([lp for c in completions for lp in c.behavior_logprobs])
    return torch.zeros_like(logprobs).masked_scatter(mask, recorded)


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, groups: list[Group], config: GRPOConfig,
    advantages_of=group_advantages, loss_of=policy_loss,
) -> dict:  # fmt: skip
    """`updates_per_batch` optimizer steps on the groups; returns their metrics (of the first step, where they differ).

    A group whose rewards are all alike has zero advantages and no policy gradient: it is counted, but left out of forward
    and backward. With no other group in the batch there is no optimizer step. baselines.py has other advantages and losses.
    """
    rewards = torch.tensor([[c.reward for c in group.completions] for group in groups])  # (P, G)
    if not rewards.isfinite().all():
        raise FloatingPointError(f"a reward is {rewards[~rewards.isfinite()][0].item()}")
    advantages = advantages_of(rewards)  # (P, G)
    live = advantages.abs().amax(dim=1) > 0  # (P,)
    rows = [(group.inputs, completion, advantage)
            for group, of_group, use in zip(groups, advantages.tolist(), live) if use
            for completion, advantage in zip(group.completions, of_group)]  # fmt: skip
    metrics = {"frac_reward_zero_std": 1 - live.float().mean().item(), "loss": 0.0, "grad_norm": 0.0}
    seen = []  # (completion, {what: its tokens' ratios, low, high}), in the first optimizer step
    for repeat in range(config.updates_per_batch if rows else 0):
        total = 0.0
        for first in range(0, len(rows), config.micro_batch_size):
            some = rows[first : first + config.micro_batch_size]
            loss, stats = loss_of(policy, some, config, num_sequences=rewards.numel())
            loss.backward()
            total += loss.item()
            if repeat == 0:
                stats = {name: values.float().cpu() for name, values in stats.items()}  # each (B, T)
                seen += [(c, {name: values[row, : len(c.token_ids)] for name, values in stats.items()})
                         for row, (_, c, _) in enumerate(some)]  # fmt: skip
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
        if not torch.tensor([total, norm]).isfinite().all():
            raise FloatingPointError(f"loss is {total}, gradient norm {norm}")
        optimizer.step()
        optimizer.zero_grad()
        if repeat == 0:
            metrics |= {"loss": total, "grad_norm": norm}
    return metrics | ratio_metrics(seen)


def ratio_metrics(seen: list[tuple]) -> dict:
    """Importance ratios and clipping over all trained tokens, and over those of completions that the policy did not sample."""
    if not seen:
        return {"ratio": 1.0}
    per_token = {name: torch.cat([stats[name] for _, stats in seen]) for name in seen[0][1]}
    metrics = {
        "ratio": per_token["ratio"].mean().item(),
        "clip_ratio/low_mean": per_token["low"].mean().item(),
        "clip_ratio/high_mean": per_token["high"].mean().item(),
    }
    if guided := [stats["ratio"] for completion, stats in seen if completion.source != "policy"]:
        ratio = torch.cat(guided)
        metrics |= {f"npo/guide_ratio_{name}": getattr(ratio, name)().item() for name in ("mean", "min", "max")}
    if own := [stats["mismatch"] for completion, stats in seen if completion.source == "policy" and "mismatch" in stats]:
        ratio = torch.cat(own)
        difference, weight = ratio.log().abs(), ratio.clamp(max=IS_CAP)
        metrics |= {f"sampling/sampling_logp_difference/{name}": getattr(difference, name)().item() for name in ("mean", "max")}
        metrics |= {
            f"sampling/importance_sampling_ratio/{name}": getattr(weight, name)().item() for name in ("min", "mean", "max")
        }
    return metrics


def train(config: GRPOConfig, out: str | Path) -> None:
    with Run(config, out) as run:
        for step in run.steps():
            groups = run.sample(step)  # P groups of G completions
            verifier.score(groups)
            stats = update(run.policy, run.optimizer, groups, config)
            run.end_step(step, groups, stats)


def main(config: GRPOConfig) -> None:
    train(config, config.out)
    report.grpo(Path(config.out))


if __name__ == "__main__":
    command_line(GRPOConfig, main)
