"""The nouns. Everything that passes between sampling, verifier, slot replacement and update.

Letters, here and everywhere: P prompts in a step, G slots in a group (the paper's n), B = P*G
sequences, T the longest completion's tokens. With P = 8 and G = 8 a step has B = 64 sequences.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image


@dataclass(frozen=True)
class Prompt:
    """A question. Its `id`, the data set's hash and the row, means the same in every run."""

    id: str
    messages: list[dict]  # chat messages; an {"type": "image"} part stands for the next of `images`
    images: list[Image.Image]
    gold: str
    choices: list[str] | None = None
    working: str | None = None  # how a right answer begins, if the verifier sees only its end
    row: dict | None = None  # of the data set, with all of its columns: for rewards of your own

    @property
    def question(self) -> str:
        """The last message as text, with <image> for each picture."""
        return "".join(part.get("text", "<image>") for part in self.messages[-1]["content"])


@dataclass
class EncodedPrompt:
    """A prompt as the model reads it: one `<|image_pad|>` per visual token, and the patches.

    Pictures are cut into patches when those are first asked for: vLLM cuts its own, and a group
    without signal is not trained on.
    """

    token_ids: list[int]
    cut: Callable | None = None  # makes the patches; None without pictures

    @functools.cached_property
    def _patches(self):
        return self.cut()

    @functools.cached_property
    def pixel_values(self) -> torch.Tensor | None:
        """(patches, patch values)"""
        return self.cut and self._patches.pixel_values

    @property
    def image_grid_thw(self) -> torch.Tensor | None:
        """(images, 3)"""
        return self.cut and self._patches.image_grid_thw


@dataclass
class Completion:
    """One sampled answer. `token_ids` include EOS if the model stopped by itself (`finished`)."""

    prompt_id: str
    token_ids: list[int]
    behavior_logprobs: list[float] | None  # of each token; None: take the policy's own for them
    text: str
    finished: bool
    source: str = "policy"  # or "guide@40": the guide's step
    exact: bool = True  # False: vLLM's own log-probs, which are not quite the trainer's
    accuracy: float | None = None  # from here on filled in by the verifier
    reward: float | None = None
    answer: str | None = None  # None: it says none, or was cut off
    too_dear: bool = False  # so hard to judge that it counts as wrong
    advantage: float | None = None  # from here on by the update: the last one that trained on it
    ratios: list[float] | None = None


@dataclass
class Group:
    """A prompt and its G completions."""

    prompt: Prompt
    encoded: EncodedPrompt
    completions: list[Completion]

    @property
    def pass_rate(self) -> float:
        """Mean accuracy (not reward) over all G completions."""
        return sum(completion.accuracy for completion in self.completions) / len(self.completions)

    @property
    def verified(self) -> list[Completion]:
        """The right ones."""
        return [c for c in self.completions if c.accuracy == 1]


@dataclass
class Sample:
    """A completion in training: one row of a micro-batch. It lives for one update."""

    encoded: EncodedPrompt
    completion: Completion
    advantage: float
    log_q: torch.Tensor | None = None  # (tokens,) denominator of its ratios, set by `log_q_of`


def samples_with_signal(groups: list[Group], advantages: torch.Tensor) -> list[Sample]:
    """The groups' completions with their advantages (P, G), without groups where all are 0."""
    for group, row in zip(groups, advantages.tolist()):
        for completion, advantage in zip(group.completions, row):
            completion.advantage, completion.ratios = advantage, None
    return [
        Sample(group.encoded, completion, advantage)
        for group, row in zip(groups, advantages.tolist())
        if any(row)
        for completion, advantage in zip(group.completions, row)
    ]


def micro_batches(samples: list[Sample], config) -> list[list[Sample]]:
    """The samples in micro-batches of about equal lengths, as padding is computed, too.

    Each micro-batch computes its prompts once. So two orders compete: by length within each group,
    where prompts stay shared, and by length over all groups, where answers are padded least. The
    one with fewer tokens wins, but none may have a micro-batch longer than the flags' longest.
    """

    def length(sample: Sample) -> int:
        return len(sample.completion.token_ids)

    def tokens(some: list[Sample]) -> int:
        prompts = {id(sample.encoded): len(sample.encoded.token_ids) for sample in some}
        return len(some) * max(map(length, some)) + len(prompts) * max(prompts.values())

    size, places = config.micro_batch_size, {id(s.encoded): n for n, s in enumerate(samples)}
    in_groups = sorted(samples, key=lambda s: (places[id(s.encoded)], length(s)))
    shared, by_length = (
        list(batched(order, size)) for order in (in_groups, sorted(samples, key=length))
    )
    longest = size * config.max_new_tokens + config.max_prompt_tokens
    fewer = sum(map(tokens, by_length)) < sum(map(tokens, shared))
    return by_length if fewer and max(map(tokens, by_length)) <= longest else shared


def log_q_of(
    samples: list[Sample], logprobs: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ratio's denominator: log q of every token, and the weight of every token's term.

    q is the policy that really sampled the completion, through the log-probs it recorded then.
    If none were recorded (a guide without IS correction), or vLLM recorded them for the policy's
    own slots, q is the policy itself at its first forward of this update: the ratio starts at 1.
    What vLLM sampled slightly differently is then corrected by the weight q / q_vllm ("Your
    Efficient RL Framework Secretly Brings You Off-Policy RL Training", Yao et al. 2025; TRL).
    A guide's slot always has the guide's recorded log-probs, whoever sampled it.

    Args:
        logprobs: (B, T) of these samples under the policy. mask: (B, T), True on their tokens.
    Returns:
        log q (B, T), without gradient, and weights (B, T): 1 but in slots that vLLM sampled.
    """
    recorded = []
    for sample, own, real in zip(samples, logprobs.detach(), mask):
        behavior = sample.completion.behavior_logprobs
        if sample.log_q is None:
            from_policy = behavior is None or not sample.completion.exact
            sample.log_q = own[real] if from_policy else own.new_tensor(behavior)
        inexact = behavior is not None and not sample.completion.exact
        recorded.append(own.new_tensor(behavior) if inexact else sample.log_q)
    log_q = torch.zeros_like(logprobs).masked_scatter(mask, torch.cat([s.log_q for s in samples]))
    behavior = torch.zeros_like(logprobs).masked_scatter(mask, torch.cat(recorded))
    return log_q, torch.exp(log_q - behavior)


def batched(items: Sequence, size: int) -> Iterator[Sequence]:
    """Chunks of `size` items; the last one may be shorter."""
    for first in range(0, len(items), size):
        yield items[first : first + size]
