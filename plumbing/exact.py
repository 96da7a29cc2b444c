"""Accuracy without sampling, where one text alone is right, `\\boxed{gold}`, as in the worlds.

A prompt's accuracy is the probability of that text, by teacher forcing. It is what the mean
accuracy of ever more sampled answers tends to, without their noise and for one forward pass, if the
policy writes nothing else that is right. A teacher's way to the box is another text.
"""

import torch

from plumbing.data import PromptSet
from plumbing.model import Policy
from plumbing.rollout import EncodedPrompt, batched


def right_texts(policy: Policy, prompts: PromptSet) -> list[tuple[EncodedPrompt, list[int]]]:
    """Each prompt, encoded, and the token ids of its right text, EOS included."""
    rows = []
    for prompt in prompts:
        ids = policy.tokenizer(f"\\boxed{{{prompt.gold}}}").input_ids
        rows.append((policy.encode(prompt), [*ids, policy.eos_token_ids[0]]))
    return rows


@torch.no_grad()
def exact_accuracies(
    policy: Policy, rows: list[tuple[EncodedPrompt, list[int]]], config
) -> list[float]:
    """The probability of each of the `right_texts`; 0 for one longer than an answer may be."""
    found = []
    for some in batched(rows, config.prompts_per_step * config.group_size):
        logprobs, _ = policy.logprobs(some, config.temperature)  # (B, T)
        chances = logprobs.double().sum(dim=1).exp().tolist()
        fits = (len(ids) <= config.max_new_tokens for _, ids in some)
        found += [chance if all_of_it else 0.0 for chance, all_of_it in zip(chances, fits)]
    return found
