"""What is logged of a step: numbers out of groups. Keys are TRL's where it has them.

docs/metrics.md explains every key.
"""

import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.rollout import Group, Sample

LOGGED_AS = {"low": "clip_ratio/low_mean", "high": "clip_ratio/high_mean"}  # TRL's names
IS_CAP = 2.0  # upper limit of a token's weight pi_trainer / q_vllm; TRL's default is 3


class UpdateStats:
    """Adds up what an update sees: means over its optimizer steps, and over all of their tokens."""

    def __init__(self):
        self.loss, self.losses, self.grad_norms = 0.0, [], []
        self.tokens = []  # (completion, {"ratio", "low", "high", "weight": (tokens,)})

    def add(self, samples: list[Sample], loss: torch.Tensor, per_token: dict) -> None:
        """One micro-batch: its share of the loss, and per token (B, T) what the loss returned."""
        self.loss += loss.item()
        per_token = {name: values.float().cpu() for name, values in per_token.items()}
        for row, sample in enumerate(samples):
            length = len(sample.completion.token_ids)
            of_row = {name: values[row, :length] for name, values in per_token.items()}
            self.tokens.append((sample.completion, of_row))
            if "ratio" in of_row:
                sample.completion.ratios = of_row["ratio"].tolist()

    def end_step(self, grad_norm: torch.Tensor) -> None:
        """One optimizer step; FloatingPointError before it is taken with a number that is none."""
        if not torch.tensor([self.loss, grad_norm]).isfinite().all():
            found = f"loss is {self.loss}, gradient norm {grad_norm.item()}"
            raise FloatingPointError(
                f"{found}; a lower --lr or --max-grad-norm helps; if grad_norm was calm, an "
                "attention kernel may be at fault: report the GPU and torch's version"
            )
        self.losses.append(self.loss)
        self.grad_norms.append(grad_norm.item())
        self.loss = 0.0

    def metrics(self) -> dict:
        if not self.tokens:  # no group had signal
            return {"loss": 0.0, "grad_norm": 0.0, "ratio": 1.0}
        found = {"loss": statistics.fmean(self.losses)}
        found["grad_norm"] = statistics.fmean(self.grad_norms)
        logged = [name for name in self.tokens[0][1] if name != "weight"]
        for name in logged:  # whatever the loss has returned
            found[LOGGED_AS.get(name, name)] = self._of(name).mean().item()
        if "ratio" in logged and any(c.source != "policy" for c, _ in self.tokens):
            ratio = self._of("ratio", lambda c: c.source != "policy")
            found |= summary("npo/guide_ratio_", ratio, "mean", "min", "max")
        if any(not c.exact for c, _ in self.tokens):
            weight = self._of("weight", lambda c: not c.exact)
            difference, weight = weight.log().abs(), weight.clamp(max=IS_CAP)
            found |= summary("sampling/sampling_logp_difference/", difference, "mean", "max")
            found |= summary("sampling/importance_sampling_ratio/", weight, "min", "mean", "max")
        return found

    def _of(self, name: str, chosen=lambda completion: True) -> torch.Tensor:
        """(tokens,) of the chosen completions."""
        return torch.cat([tokens[name] for c, tokens in self.tokens if chosen(c)])


def summary(key: str, values: torch.Tensor, *names: str) -> dict[str, float]:
    return {key + name: getattr(values, name)().item() for name in names}


def guide_metrics(step: int, mixed: list[Group]) -> dict:
    """How many of the trained groups hold a guide's answer, from how far ahead, and how lucky.

    An answer is lucky if its end is right and its working is not: known where a world knows both.
    """
    others = [[c.source for c in g.completions if c.source != "policy"] for g in mixed]
    found = {"npo/guide_frac": sum(map(bool, others)) / len(mixed)}
    steps = [source.partition("@")[2] for of_group in others for source in of_group]
    if ahead := [int(guide_step) - step for guide_step in steps if guide_step]:
        found["npo/distance"] = statistics.fmean(ahead)
    lucky = [
        not c.text.startswith(group.prompt.working)
        for group in mixed
        for c in group.completions
        if group.prompt.working and c.source != "policy"
    ]
    return found | ({"npo/guide_lucky": statistics.fmean(lucky)} if lucky else {})


def answer_metrics(groups: list[Group]) -> dict:
    """What the policy's own answers, before any replacement, say of it."""
    completions = [c for group in groups for c in group.completions]
    lengths = [len(c.token_ids) for c in completions]
    too_dear = sum(c.too_dear for c in completions)
    spread = [statistics.stdev(c.reward for c in group.completions) for group in groups]
    return {
        "accuracy": statistics.fmean(c.accuracy for c in completions),
        "reward": statistics.fmean(c.reward for c in completions),
        "reward_std": statistics.fmean(spread),
        "entropy": -sum(sum(c.behavior_logprobs) for c in completions) / sum(lengths),
        "completions/mean_length": statistics.fmean(lengths),
        "completions/clipped_ratio": statistics.fmean(not c.finished for c in completions),
        "completions/answered_ratio": statistics.fmean(c.answer is not None for c in completions),
    } | ({"verifier/too_dear": too_dear} if too_dear else {})


def batch_arithmetic(config) -> str:
    """What counts as a batch, in one line."""
    sequences = config.prompts_per_step * config.group_size
    micro_batches = -(-sequences // config.micro_batch_size)
    return (
        f"{config.prompts_per_step} prompts x {config.group_size} slots = {sequences} "
        f"completions/step = {micro_batches} micro-batches of {config.micro_batch_size} -> "
        f"{config.updates_per_batch} optimizer step(s)"
    )


def step_line(metrics: dict, steps: int, prompts_per_step: int) -> str:
    """A step in one line of the terminal."""
    parts = [
        f"step {metrics['step']:04d}/{steps:04d}",
        f"acc {metrics['accuracy']:.3f}",
        f"live {1 - metrics['frac_reward_zero_std']:.0%}",
    ]
    usual = 0.9 * metrics["accuracy"] + 0.1 * metrics.get("completions/answered_ratio", 1)
    if abs(metrics["reward"] - usual) > 1e-6:  # a reward of your own
        parts.append(f"rew {metrics['reward']:.3f}")
    if metrics.get("npo/guide_frac"):
        guided = round(metrics["npo/guide_frac"] * prompts_per_step)
        distance = f" D {metrics['npo/distance']:.0f}" if "npo/distance" in metrics else ""
        parts.append(f"guide {guided}/{prompts_per_step}{distance}")
    clipped = metrics.get("clip_ratio/low_mean", 0) + metrics.get("clip_ratio/high_mean", 0)
    length, cut = metrics["completions/mean_length"], metrics["completions/clipped_ratio"]
    parts += [
        f"loss {metrics['loss']:.3f}",
        f"ratio {metrics.get('ratio', 1):.2f} clip {clipped:.1%}",
        f"ent {metrics['entropy']:.2f}",
        f"len {length:.0f} cut {cut:.0%}",
        f"gn {metrics['grad_norm']:.2f}",
        f"gen {metrics['time/generate']:.1f}s train {metrics['time/train']:.1f}s",
    ]
    for key, value in metrics.items():  # the whole, and a world's parts
        if key.startswith("eval/accuracy"):
            parts.append(f"eval{key.removeprefix('eval/accuracy')} {value:.3f}")
    return " | ".join(parts)


def warn_if_nothing_is_right(lines: list[dict], out: Path) -> None:
    """`lines` are those of metrics.jsonl."""
    if not any(line.get("accuracy") for line in lines):
        tqdm.write(
            f"No answer was right in {len(lines) - 1} steps, so the policy learns nothing from "
            f"accuracy. Look at gold and policy side by side in {out / 'samples.jsonl'}: "
            "does the policy put its answer into \\boxed{}? Is it cut off (--max-new-tokens)? "
            "Do the golds have a form that an answer can equal?"
        )


def transcript(step: int, groups: list[Group], mixed: list[Group]) -> dict:
    """One slot of one group, before and after replacement: a replaced one if there is any."""
    group, before, after = groups[0], groups[0].completions[-1], None
    for asked, trained in zip(groups, mixed):
        others = [c for c in trained.completions if c.source != "policy"]
        gone = [c for c in asked.completions if all(c is not kept for kept in trained.completions)]
        if others and gone and after is None:
            group, before, after = asked, gone[0], others[0]
    line = {
        "step": step,
        "prompt_id": group.prompt.id,
        "gold": group.prompt.gold,
        "question": group.prompt.question,
        "pass_rate": group.pass_rate,
        "policy": before.text,
        "reward": before.reward,
    }
    if after:
        line |= {"guide": after.text, "source": after.source}
    return line
