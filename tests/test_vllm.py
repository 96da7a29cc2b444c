"""vLLM for real, on its CPU build: .ci/run runs this in an environment of its own; elsewhere it is skipped."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("vllm", reason="pip install -r requirements-vllm.txt")

from test_benchmarks import load

import cards
import vllm_sampler
from policy import Policy
from run import read_jsonl
from tasks import Prompt, load_prompts
from vllm_sampler import VLLMSampler


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint as training writes it, with weights that are not the base's."""
    policy, path = Policy(cards.BASE, device="cpu"), tmp_path_factory.mktemp("vllm") / "step_000007"
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    policy.save(path, {"step": 7, "sampled_tokens": 0})
    return path


@pytest.fixture(scope="module")
def sampler(saved):
    return VLLMSampler(saved, max_new_tokens=40)


@pytest.fixture(scope="module")
def prompts():
    """Rows of six to eight cards, one text without an image, one with two images of different sizes."""
    some = [load_prompts("cards")[0][row] for row in (0, 3, 4)]
    text = [{"role": "user", "content": [{"type": "text", "text": "Start at 27 and add the cards."}]}]
    two = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " and"}, {"type": "image"}]}]
    images = [cards.draw(cards.Hand(1, (2, 3))), cards.draw(cards.Hand(1, (4, 5, 6, 7, 8))).resize((96, 64))]
    return [*some, Prompt("text", text, [], "27"), Prompt("two", two, images, "9")]


def test_log_probs_are_the_trainers(sampler, saved, prompts):
    """At temperature 1.3, token by token, EOS included: what vLLM says it sampled from is what would be trained."""
    policy = Policy(saved, device="cpu")
    groups = sampler.sample(prompts, 3, 40, 1.3, seed=5)
    rows = [(policy.encode(prompt), c.token_ids) for prompt, group in zip(prompts, groups) for c in group.completions]
    with torch.no_grad():
        logprobs, mask = policy.logprobs(rows, 1.3)
    theirs = torch.tensor([lp for group in groups for c in group.completions for lp in c.behavior_logprobs])
    assert (logprobs[mask] - theirs).abs().max() < 1e-4
    completions = [c for group in groups for c in group.completions]
    assert len(completions) == 15 and len({c.text for c in completions}) > 5
    assert {c.finished for c in completions} == {c.token_ids[-1] in policy.eos_token_ids for c in completions}
    assert not {id for c in completions for id in c.token_ids} & set(policy.never_sampled)
    assert all(len(c.token_ids) == len(c.behavior_logprobs) <= 40 for c in completions)
    assert completions[0].text == policy.tokenizer.decode(completions[0].token_ids, skip_special_tokens=True)
    assert [g.inputs.token_ids for g in groups] == [policy.encode(prompt).token_ids for prompt in prompts]


def test_the_seed_decides(sampler, prompts):
    first, again, other = (sampler.sample(prompts[:2], 2, 40, 1.3, seed) for seed in (1, 1, 2))
    ids = [[c.token_ids for group in groups for c in group.completions] for groups in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]
    alike = sampler.sample([prompts[0], prompts[0]], 2, 40, 1.3, seed=1)  # the same prompt twice has other answers
    assert len({tuple(c.token_ids) for group in alike for c in group.completions}) > 2


def test_an_answer_that_is_cut_is_not_finished(sampler, prompts):
    (group,) = sampler.sample(prompts[:1], 2, 5, 1.0, seed=1)
    assert [(len(c.token_ids), c.finished) for c in group.completions] == [(5, False)] * 2


def test_images_that_vllm_reads_otherwise_are_caught(sampler, prompts, monkeypatch):
    """As where the checkpoint's image processor is not the one that vLLM loaded: the ids differ, and nothing is trained on them."""
    wrong = dataclasses.replace(prompts[0], images=[prompts[0].images[0].resize((64, 32))])
    real = vllm_sampler.encode
    monkeypatch.setattr(vllm_sampler, "encode", lambda prompt, *rest: real(wrong, *rest))
    with pytest.raises(RuntimeError, match="vLLM read .* tokens where the trainer reads"):
        sampler.sample(prompts[:1], 1, 5, 1.0, seed=1)


def test_evaluate_through_vllm(command, saved, tmp_path):
    """The cards world and a benchmark, through the command line; the two samplers agree within their noise by construction above."""
    load(tmp_path / "data", "mmmu_pro", [{}, {"answer": "A"}, {"options": "none"}])
    words = ["evaluate.py", "--model", saved, "--sampler", "vllm", "--benchmarks", "cards,mmmu_pro", "--data-dir", tmp_path / "data",
             "--limit", "6", "--samples", "2", "--max-new-tokens", "40", "--out", tmp_path / "out"]  # fmt: skip
    done = command(*words)
    lines = read_jsonl(tmp_path / "out/predictions.jsonl")
    assert lines[0]["sampler"] == "vllm" and len([line for line in lines if "id" in line]) == 6 + 3
    assert all(len(line["responses"]) == 2 for line in lines[1:] if "responses" in line)
    assert "2 scored, 1 malformed" in done.stdout and "of 6 hands" in done.stdout
    assert sum(line.get("benchmark") == "cards" and "id" in line for line in lines) == 6
    assert set(json.loads((tmp_path / "out/scores.json").read_text())["benchmarks"]) == {"cards", "mmmu_pro"}
