"""vLLM for real, on its CPU build: .ci/run runs this in an environment of its own; elsewhere it is skipped."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="pip install -r requirements-vllm.txt")

from conftest import SMALL, cards_file
from test_benchmarks import load

import cards
import vllm_sampler
from grpo import GRPOConfig
from policy import Policy, encode
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


# ---------------------------------------------------------------------------------------------------------------------
# Weight sync
# ---------------------------------------------------------------------------------------------------------------------


def parity(engine, policy: Policy, prompts) -> float:
    """Largest difference of a token's log-prob on freshly sampled answers at temperature 1.3."""
    groups = engine.sample(prompts, 2, 40, 1.3, seed=8)
    rows = [(group.inputs, c) for group in groups for c in group.completions]
    with torch.no_grad():
        logprobs, mask = policy.logprobs([(inputs, c.token_ids) for inputs, c in rows], 1.3)
    return (logprobs[mask] - torch.tensor([lp for _, c in rows for lp in c.behavior_logprobs])).abs().max().item()


def perturb(policy: Policy, seed: int) -> None:
    with torch.no_grad():
        for parameter in policy.model.parameters():  # the frozen vision tower's, too
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.add_(noise * (0.05 * parameter.abs().mean() + 0.003))


@pytest.mark.parametrize("lora", [0, 4])
def test_three_syncs(sampler, saved, prompts, lora):
    """Also the vision tower's weights, whose features vLLM would keep for images that it has seen."""
    policy = Policy(saved, "cpu", lora=lora)
    sampler.sync(policy, prompts[:2], 1.3)
    assert parity(sampler, policy, prompts) < 1e-4
    for seed in range(3):
        perturb(policy, seed)
        assert parity(sampler, policy, prompts) > 1e-2  # it has the old ones
        sampler.sync(policy, prompts[:2], 1.3)
        assert parity(sampler, policy, prompts) < 1e-4 and sampler.difference < 1e-4


@pytest.mark.parametrize(
    ("part", "size", "message"),
    [  # a step that no log-prob shows, and one in weights that vLLM lays out in its own way
        ("embed_tokens", 1e-7, r"embed_tokens.weight holds -?\d\.\d+ there and -?\d\.\d+ here. The sync failed"),
        ("o_proj", 1.0, r"its log-prob is -\d+\.\d+, the trainer's -\d+\.\d+\. The sync failed"),
    ],
)
def test_a_broken_sync_is_caught(sampler, saved, prompts, monkeypatch, part, size, message):
    policy = Policy(saved, "cpu")
    sampler.sync(policy, prompts[:2], 1.0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if part in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    with monkeypatch.context() as broken:
        broken.setattr(sampler.llm, "collective_rpc", lambda *words, **options: [{}])
        broken.setattr(
            sampler.llm, "apply_model", lambda read: [read(sampler.llm.llm_engine.model_executor.driver_worker.get_model())]
        )
        with pytest.raises(RuntimeError, match=message):
            sampler.sync(policy, prompts[:2], 1.0)
    sampler.sync(policy, prompts[:2], 1.0)


def test_a_sampled_vision_token_is_caught(sampler, prompts):
    inputs = sampler.sample(prompts[:1], 1, 2, 1.0, seed=1)[0].inputs
    bad = SimpleNamespace(token_ids=[40, sampler.image_token_id], logprobs=[])
    with pytest.raises(RuntimeError, match=f"vLLM sampled the vision token {sampler.image_token_id}"):
        sampler._group(prompts[0], SimpleNamespace(prompt_token_ids=inputs.token_ids, outputs=[bad]))


def test_one_engine_a_process(saved, monkeypatch):
    """Other weights of the same shapes go into the one that there is; other shapes take another, in its place."""
    built = []
    monkeypatch.setattr(vllm_sampler, "VLLMSampler", lambda path, *words: built.append((path, *words)) or object())
    monkeypatch.setattr(vllm_sampler, "ENGINE", {})
    config = GRPOConfig(sampler="vllm", vllm_memory=0.2, max_prompt_tokens=300)
    first = vllm_sampler.engine_of(Policy(cards.BASE, "cpu"), config)
    assert vllm_sampler.engine_of(Policy(saved, "cpu"), config) is first
    other = vllm_sampler.engine_of(Policy(cards.TEACHER, "cpu"), config)
    assert other is not first and list(vllm_sampler.ENGINE.values()) == [other]
    assert built == [(str(cards.BASE), 64, "fp32", 300, 0.2), (str(cards.TEACHER), 64, "fp32", 300, 0.2)]


def test_npo_through_vllm(command, tmp_path):
    """Scout, cache and replay, killed and resumed; a tiny checkpoint on disk, and a data set in geometry3k's schema."""
    cards_file(tmp_path / "geometry.parquet", 40)
    words = ["npo.py", "--model", cards.TEACHER, "--dataset", tmp_path / "geometry.parquet", "--sampler", "vllm", "--out", tmp_path / "out",
             "--scout-steps", "3", "--lr", "1e-4", *SMALL]  # fmt: skip
    command(*words, "--steps", "3")
    done = command(*words, "--steps", "5")
    lines = [line for line in read_jsonl(tmp_path / "out/metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5] and "resumed at step 3" in done.stderr + done.stdout
    assert any(line.get("npo/guide_frac") for line in lines) and all(line["sampling/probe_difference"] < 1e-4 for line in lines)
    trained = [line for line in lines if line["grad_norm"] > 0]
    assert trained and all(line["sampling/sampling_logp_difference/max"] < 1e-4 for line in trained)
    assert all(line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4) for line in trained)
    assert all(line["ratio"] == pytest.approx(1, abs=0.3) and "time/sync" in line for line in trained)


def test_prompts_that_are_expanded_already_are_caught(sampler, prompts, monkeypatch):
    inputs = encode(prompts[0], sampler.tokenizer, sampler.image_processor, sampler.image_token_id)
    monkeypatch.setattr(vllm_sampler, "placeholder_ids", lambda *words: inputs.token_ids)
    with pytest.raises(RuntimeError, match=f"vLLM read .* tokens where the trainer reads {len(inputs.token_ids)}"):
        sampler.sample(prompts[:1], 1, 5, 1.0, seed=1)


def test_evaluate_a_checkpoint_of_adapters(command, saved, tmp_path):
    policy = Policy(saved, "cpu", lora=4)
    perturb(policy, 2)
    policy.save(tmp_path / "adapters", {"step": 2})
    for name in ("hf", "vllm"):
        command("evaluate.py", "--model", tmp_path / "adapters", "--sampler", name, "--benchmarks", "cards", "--limit", "2", "--samples", "4",
                "--temperature", "0.01", "--max-new-tokens", "40", "--out", tmp_path / name)  # fmt: skip
    first, second = (
        [line["responses"] for line in read_jsonl(tmp_path / name / "predictions.jsonl") if "responses" in line]
        for name in ("hf", "vllm")
    )
    assert first == second and len(first) == 2  # as good as greedy, so that both say the same


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
