"""Which policy an answer is measured against: the ratio's denominator and the weight beside it."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import group_of

from plumbing.rollout import (
    Completion,
    EncodedPrompt,
    Sample,
    batched,
    log_q_of,
    micro_batches,
    samples_with_signal,
)


def sample(recorded: list[float] | None, length: int, source="policy", exact=True) -> Sample:
    ids = list(range(length))
    completion = Completion("p", ids, recorded, "", True, source=source, exact=exact)
    return Sample(EncodedPrompt([1]), completion, 0.75)


def micro_batch() -> tuple[list[Sample], torch.Tensor, torch.Tensor]:
    """The four kinds of slots, with 3, 2, 4 and 1 tokens; log-probs (4, 4) and their mask."""
    samples = [
        sample([-1.0, -2.0, -0.5], 3),  # sampled by transformers: recorded exactly
        sample(None, 2, source="guide@40"),  # a guide without IS correction
        sample([-0.25, -3.0, -1.0, -2.0], 4, exact=False),  # the policy's own, sampled by vLLM
        sample([-6.0], 1, source="guide@9"),  # out of a cache, whoever sampled it
    ]
    mask = torch.arange(4) < torch.tensor([3, 2, 4, 1])[:, None]
    logprobs = torch.tensor(
        [
            [-0.9, -2.5, -0.5, 0.0],
            [-1.5, -0.125, 0.0, 0.0],
            [-0.75, -3.0, -0.5, -2.25],
            [-0.5, 0.0, 0.0, 0.0],
        ]
    )
    return samples, logprobs.masked_fill(~mask, 0.0).requires_grad_(), mask


def test_each_slot_has_the_denominator_of_who_sampled_it():
    samples, logprobs, mask = micro_batch()
    log_q, weights = log_q_of(samples, logprobs, mask)
    assert log_q.tolist() == [
        [-1.0, -2.0, -0.5, 0.0],  # recorded
        [-1.5, -0.125, 0.0, 0.0],  # the policy's own
        [-0.75, -3.0, -0.5, -2.25],  # the policy's own
        [-6.0, 0.0, 0.0, 0.0],  # recorded
    ]
    expected = torch.ones(4, 4)
    expected[2] = torch.tensor([-0.5, 0.0, 0.5, -0.25]).exp()  # the policy over what vLLM recorded
    torch.testing.assert_close(weights, expected)
    assert not log_q.requires_grad and not weights.requires_grad
    ratio = torch.exp(logprobs - log_q)
    assert (ratio[1:3] == 1).all()  # to the last bit
    assert ratio[3, 0].item() == pytest.approx(math.exp(5.5))


def test_later_passes_keep_the_first_ones_denominator():
    samples, logprobs, mask = micro_batch()
    first = log_q_of(samples, logprobs, mask)
    moved = (logprobs.detach() - 0.375) * mask
    for again, before in zip(log_q_of(samples, moved, mask), first):
        assert torch.equal(again, before)


def test_a_samples_denominator_does_not_depend_on_its_micro_batch():
    samples, logprobs, mask = micro_batch()
    whole = log_q_of(samples, logprobs, mask)
    samples, *_ = micro_batch()
    for rows in ([2, 0], [3], [1]):
        some = log_q_of([samples[row] for row in rows], logprobs[rows], mask[rows])
        assert all(torch.equal(part, of_all[rows]) for part, of_all in zip(some, whole))


def test_the_denominator_has_the_policys_precision():
    samples, logprobs, mask = micro_batch()
    samples[0].completion.behavior_logprobs[0] = -1 / 3
    log_q, weights = log_q_of(samples, logprobs.double(), mask)
    assert log_q.dtype == weights.dtype == torch.float64 and log_q[0, 0].item() == -1 / 3


def test_groups_without_signal_are_left_out():
    groups = [group_of([1.0, 0.0, 0.0], "a"), group_of([1.0] * 3, "b"), group_of([0.0] * 3, "c")]
    advantages = torch.tensor([[1.25, -0.75, -0.5], [0.0, 0.0, 0.0], [0.0, 0.5, -0.5]])
    samples = samples_with_signal(groups, advantages)
    assert [s.completion for s in samples] == groups[0].completions + groups[2].completions
    assert [s.advantage for s in samples] == [1.25, -0.75, -0.5, 0.0, 0.5, -0.5]
    assert all(s.encoded is groups[i].encoded for s, i in zip(samples, (0, 0, 0, 2, 2, 2)))
    assert all(s.log_q is None for s in samples)


def lengths_of(prompts: list[int], answers: list[list[int]], **flags) -> list[list[tuple]]:
    """(group, tokens of the answer) of each sample, as `micro_batches` puts them together."""
    samples, names = [], {}
    for group, (prompt, of_group) in enumerate(zip(prompts, answers)):
        encoded = EncodedPrompt([5] * prompt)
        names[id(encoded)] = group
        samples += [Sample(encoded, sample(None, n).completion, 0.5) for n in of_group]
    flags = {"micro_batch_size": 2, "max_new_tokens": 9, "max_prompt_tokens": 40} | flags
    found = micro_batches(samples, SimpleNamespace(**flags))
    return [[(names[id(s.encoded)], len(s.completion.token_ids)) for s in some] for some in found]


def test_rows_are_sorted_by_length_over_all_groups_where_prompts_are_short():
    """2 * (1 + 5 + 9) + 2 * (3 + 3 + 3) = 48 tokens; within groups 10 + 2, 18 + 6, 12 + 3: 51."""
    found = lengths_of([2, 3], [[9, 1, 5], [6, 2, 1]])
    assert found == [[(0, 1), (1, 1)], [(1, 2), (0, 5)], [(1, 6), (0, 9)]]


def test_rows_share_their_prompt_where_that_costs_less():
    found = lengths_of([20, 30], [[9, 1, 5, 4], [6, 2, 1, 8]])
    assert found == [[(0, 1), (0, 4)], [(0, 5), (0, 9)], [(1, 1), (1, 2)], [(1, 6), (1, 8)]]


def test_no_micro_batch_is_longer_than_the_flags_longest():
    """Sorted by length the last one has 2 * 9 tokens and two prompts of 3, within 18 + 6."""
    asked = [2, 3], [[9, 1, 5], [6, 2, 1]]
    assert lengths_of(*asked, max_prompt_tokens=6)[-1] == [(1, 6), (0, 9)]
    assert lengths_of(*asked, max_prompt_tokens=5) == [
        [(0, 1), (0, 5)],
        [(0, 9), (1, 1)],
        [(1, 2), (1, 6)],
    ]


def test_batches_cover_everything_once_in_order():
    assert [list(part) for part in batched(range(5), 2)] == [[0, 1], [2, 3], [4]]
    assert list(batched([], 3)) == []
