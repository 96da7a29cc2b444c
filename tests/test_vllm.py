"""vLLM for real, on its CPU build in an environment of its own; skipped where it is missing."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("vllm", reason="pip install -r requirements-gpu.txt")

from conftest import QUESTIONS, SMALL, cards_file, in_words, save
from test_benchmarks import load

import verifier
from commands.merge import main as merge
from grpo import GRPOConfig
from plumbing import vllm_sampler
from plumbing.data import load_prompts
from plumbing.encode import encode
from plumbing.guide_cache import line_of
from plumbing.model import Policy
from plumbing.rollout import Completion, Prompt, Sample, log_q_of
from plumbing.run import read_jsonl
from plumbing.settings import RunConfig
from plumbing.vllm_sampler import VLLMSampler
from worlds import cards, staircase


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint whose weights are not the base's."""
    policy, draw = Policy(cards.BASE), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=draw))
    return save(policy, tmp_path_factory.mktemp("vllm") / "step_000007", 7)


@pytest.fixture(scope="module")
def sampler(saved):
    return VLLMSampler(saved, max_new_tokens=40)


@pytest.fixture(scope="module")
def another():
    """Makes further engines; they live on, since the end of one breaks the others."""
    kept = []
    return lambda path: kept.append(VLLMSampler(str(path), max_new_tokens=20)) or kept[-1]


@pytest.fixture(scope="module")
def prompts():
    """Six to eight cards; a text without an image; two images of different sizes."""
    some = [load_prompts(RunConfig())[0][row] for row in (0, 3, 4)]
    image, text = {"type": "image"}, {"type": "text", "text": "Start at 27 and add the cards."}
    two = [image, {"type": "text", "text": " and"}, image]
    five = cards.draw(cards.Hand(1, (4, 5, 6, 7, 8))).resize((96, 64))
    images = [cards.draw(cards.Hand(1, (2, 3))), five]
    asked = ("text", [text], [], "27"), ("two", two, images, "9")
    made = [Prompt(id, [{"role": "user", "content": c}], i, gold) for id, c, i, gold in asked]
    return some + made


def every(groups) -> list[Completion]:
    return [c for group in groups for c in group.completions]


def difference(policy: Policy, groups, temperature: float = 1.3) -> float:
    """Largest one between a token's log-probs as vLLM recorded and as the trainer reads them."""
    rows = [(group.encoded, c.token_ids) for group in groups for c in group.completions]
    with torch.no_grad():
        logprobs, mask = policy.logprobs(rows, temperature)
    theirs = torch.tensor([value for c in every(groups) for value in c.behavior_logprobs])
    return (logprobs[mask] - theirs).abs().max().item()


# ---------------------------------------------------------------------- sampling


def test_logprobs_are_the_trainers(sampler, saved, prompts):
    """At temperature 1.3, token by token, EOS included: sampled from what would be trained."""
    policy, groups = Policy(saved), sampler.sample(prompts, 3, 40, 1.3, seed=5)
    assert difference(policy, groups) < 1e-4
    completions = every(groups)
    assert len(completions) == 15 and len({c.text for c in completions}) > 5
    for c in completions:
        assert c.finished == (c.token_ids[-1] in policy.eos_token_ids) and not c.exact
        assert not set(c.token_ids) & set(policy.never_sampled)
        assert len(c.token_ids) == len(c.behavior_logprobs) <= 40
    first = completions[0]
    assert first.text == policy.tokenizer.decode(first.token_ids, skip_special_tokens=True)
    read = [policy.encode(prompt).token_ids for prompt in prompts]
    assert [group.encoded.token_ids for group in groups] == read


def test_both_sides_see_the_same_pixels(sampler, saved):
    """Of a photo that is resized. PIL resizes otherwise than torchvision, which vLLM brings."""
    from transformers import AutoImageProcessor

    noise = torch.rand(450, 600, 3, generator=torch.Generator().manual_seed(2))
    photo = Image.fromarray((255 * noise).byte().numpy())
    content = [{"type": "image"}, {"type": "text", "text": "Start at 27 and add the cards."}]
    prompt = Prompt("photo", [{"role": "user", "content": content}], [photo], "27")
    policy, groups = Policy(saved), sampler.sample([prompt], 4, 40, 1.3, seed=5)
    patches = groups[0].encoded.image_grid_thw.tolist()
    assert patches == [[1, 28, 38]]  # 448 x 608 pixels
    assert difference(policy, groups) < 1e-4
    pil = AutoImageProcessor.from_pretrained(saved, backend="pil", trust_remote_code=False)
    other = pil(images=[photo], return_tensors="pt").pixel_values
    assert (other - groups[0].encoded.pixel_values).abs().max() > 0.01


def test_the_seed_decides(sampler, prompts):
    first, again, other = (sampler.sample(prompts[:2], 2, 40, 1.3, seed) for seed in (1, 1, 2))
    assert every(first) == every(again) != every(other)
    alike = sampler.sample([prompts[0], prompts[0]], 4, 40, 2.0, seed=1)
    one, two = ([c.token_ids for c in group.completions] for group in alike)
    assert one != two and len(set(map(tuple, one))) > 1  # other answers to the same prompt


def test_an_answer_that_is_cut_is_not_finished(sampler, prompts):
    (group,) = sampler.sample(prompts[:1], 2, 5, 1.0, seed=1)
    assert [(len(c.token_ids), c.finished) for c in group.completions] == [(5, False)] * 2


def test_images_that_vllm_reads_otherwise_are_caught(sampler, prompts, monkeypatch):
    """As if the checkpoint's image processor were not the one that vLLM loaded."""
    smaller = [prompts[0].images[0].resize((64, 32))]
    wrong, real = dataclasses.replace(prompts[0], images=smaller), vllm_sampler.encode
    monkeypatch.setattr(vllm_sampler, "encode", lambda prompt, *rest: real(wrong, *rest))
    with pytest.raises(RuntimeError, match="vLLM read .* tokens where the trainer reads"):
        sampler.sample(prompts[:1], 1, 5, 1.0, seed=1)


def test_prompts_that_are_expanded_already_are_caught(sampler, prompts, monkeypatch):
    parts = sampler.tokenizer, sampler.image_processor, sampler.image_token_id
    ids = encode(prompts[0], *parts).token_ids
    monkeypatch.setattr(vllm_sampler, "placeholder_ids", lambda *words: ids)
    with pytest.raises(RuntimeError, match=f"tokens where the trainer reads {len(ids)}"):
        sampler.sample(prompts[:1], 1, 5, 1.0, seed=1)


def test_a_sampled_vision_token_is_caught(sampler, prompts):
    ids = sampler.sample(prompts[:1], 1, 2, 1.0, seed=1)[0].encoded.token_ids
    bad = SimpleNamespace(token_ids=[40, sampler.image_token_id], logprobs=[])
    with pytest.raises(RuntimeError, match=f"the vision token {sampler.image_token_id}"):
        sampler._group(prompts[0], SimpleNamespace(prompt_token_ids=ids, outputs=[bad]))


def test_own_slots_are_weighted_and_the_guides_are_not(sampler, saved, prompts):
    """The policy is another by now. Its own slots: ratio 1, weight pi / q_vllm. The guide's answer,
    as a cache keeps it: ratio pi / q_vllm, weight 1. Without IS correction: 1 and 1."""
    policy, groups = Policy(cards.BASE), sampler.sample(prompts[:1], 3, 40, 1.3, seed=5)
    for c in every(groups):
        c.accuracy = 1.0
    (kept,) = line_of(0, groups[0], 7, keep=1)["answers"] or [None]
    own, guide = groups[0].completions[1], Completion(**kept)
    assert guide.exact and guide.source == "guide@7" and not own.exact
    without = dataclasses.replace(guide, behavior_logprobs=None)
    samples = [Sample(groups[0].encoded, c, 1.0) for c in (own, guide, without)]
    rows = [(sample.encoded, sample.completion.token_ids) for sample in samples]
    with torch.no_grad():
        logprobs, mask = policy.logprobs(rows, 1.3)
    log_q, weights = log_q_of(samples, logprobs, mask)
    ratio = (logprobs - log_q).exp()

    def over_recorded(row: int, completion: Completion) -> torch.Tensor:
        recorded = torch.tensor(completion.behavior_logprobs)
        return (logprobs[row][mask[row]] - recorded).exp()

    assert torch.equal(ratio[0][mask[0]], torch.ones(len(own.token_ids)))
    torch.testing.assert_close(weights[0][mask[0]], over_recorded(0, own))
    torch.testing.assert_close(ratio[1][mask[1]], over_recorded(1, guide))
    assert (ratio[1][mask[1]] - 1).abs().max() > 0.1
    assert torch.equal(ratio[2], torch.ones_like(ratio[2]))
    assert torch.equal(weights[1:], torch.ones_like(weights[1:]))


# ---------------------------------------------------------------------- weight sync


def perturb(policy: Policy, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():  # the frozen vision tower's, too
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.add_(noise * (0.05 * parameter.abs().mean() + 0.003))


@pytest.mark.parametrize("lora", [0, 4])
def test_three_syncs(sampler, saved, prompts, lora):
    """Also of the vision tower, whose features vLLM would keep for images that it has seen."""
    policy = Policy(saved, lora=lora)

    def now() -> float:
        return difference(policy, sampler.sample(prompts, 2, 40, 1.3, seed=8))

    sampler.sync(policy, prompts[:2], 1.3)
    assert now() < 1e-4
    for seed in range(3):
        perturb(policy, seed)
        assert now() > 1e-2  # it has the old ones
        sampler.sync(policy, prompts[:2], 1.3)
        assert now() < 1e-4 and sampler.difference < 1e-4


@pytest.mark.parametrize(
    ("part", "size", "message"),
    [  # a step that no log-prob shows; one in weights that vLLM lays out in its own way
        ("embed_tokens", 1e-7, r"embed_tokens.weight holds -?\d.* there and -?\d.* here. The sync"),
        ("o_proj", 1.0, r"its log-prob is -\d+\.\d+, the trainer's .*, and the mean .* failed"),
    ],
)
def test_a_broken_sync_is_caught(sampler, saved, prompts, monkeypatch, part, size, message):
    policy, draw = Policy(saved), torch.Generator().manual_seed(1)
    sampler.sync(policy, prompts[:2], 1.0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if part in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=draw))
    executor = sampler.llm.llm_engine.model_executor
    with monkeypatch.context() as broken:
        broken.setattr(sampler.llm, "collective_rpc", lambda *words, **options: [{}])
        read = executor.driver_worker.get_model  # apply_model would call collective_rpc
        broken.setattr(sampler.llm, "apply_model", lambda function: [function(read())])
        with pytest.raises(RuntimeError, match=message):
            sampler.sync(policy, prompts[:2], 1.0)
    sampler.sync(policy, prompts[:2], 1.0)


def test_every_weight_is_compared(another, monkeypatch):
    """Of a model with a head of its own, in the layout of a GPU: linear layers are not packed, and
    q, k, v and gate, up are fused."""

    def unpacked(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr("vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", unpacked)
    policy, draw = Policy(staircase.base_at(0.5)), torch.Generator().manual_seed(7)
    engine = another(policy.base_path)
    engine._compare_weights(policy)
    found = []
    for name, weight in policy.model.state_dict().items():
        place = tuple(int(torch.randint(n, (), generator=draw)) for n in weight.shape)
        before, weight[place] = weight[place].clone(), weight[place] + 1e-3
        with pytest.raises(RuntimeError, match=f"weights: {name} holds .* there and .* here"):
            engine._compare_weights(policy)
        weight[place] = before
        found.append(name)
    layers = policy.model.config.text_config.num_hidden_layers
    assert sum("language_model.layers" in name for name in found) == 11 * layers
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} < {*found}
    engine._compare_weights(policy)


def test_it_wakes_to_sample_and_to_sync(sampler, saved, prompts, monkeypatch):
    """Calls alone: only a GPU can sleep."""
    noted = []
    monkeypatch.setattr(sampler.llm, "sleep", lambda level: noted.append(level))
    monkeypatch.setattr(sampler.llm, "wake_up", lambda: noted.append("wake"))
    sampler.sleep()
    assert noted == []  # on a CPU it stays awake
    monkeypatch.setattr(sampler, "on_gpu", True)
    for act in (
        lambda: sampler.sample(prompts[:1], 1, 2, 1.0, seed=1),
        lambda: sampler.sync(Policy(saved), prompts[:2], 1.0),
    ):
        sampler.sleep()
        sampler.sleep()
        act()
        assert noted == [1, "wake"]  # level 1
        noted.clear()


def test_merged_adapters_in_vllm(saved, sampler, another, prompts, tmp_path):
    """The folder of `commands.merge` holds what vLLM gets in a sync, and loads as any model."""
    policy, draw = Policy(saved, lora=4), torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in policy.parameters():  # the adapters
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    merge(save(policy, tmp_path / "step_000002", 2), tmp_path / "whole")
    sampler.sync(policy, prompts[:2], 1.3)
    whole = Policy(tmp_path / "whole")
    sampler._compare_weights(whole)
    engine = another(tmp_path / "whole")
    engine._compare_weights(policy)
    assert difference(whole, engine.sample(prompts, 2, 20, 1.3, seed=8)) < 1e-4


def test_one_engine_per_process(saved, monkeypatch):
    """Other weights of the same shapes go into it; other shapes take another in its place."""
    built, closed = [], []

    def build(*words):
        built.append(words)
        return SimpleNamespace(close=lambda: closed.append(words[0]))

    monkeypatch.setattr(vllm_sampler, "VLLMSampler", build)
    monkeypatch.setattr(vllm_sampler, "ENGINE", {})
    config = GRPOConfig(sampler="vllm", vllm_memory=0.2, max_prompt_tokens=300)
    first = vllm_sampler.engine_of(Policy(cards.BASE), config)
    assert vllm_sampler.engine_of(Policy(saved), config) is first
    other_order = Policy(cards.BASE)
    config_of = other_order.model.config
    reordered = dict(reversed(config_of.to_diff_dict().items()))  # as a hub's config.json
    monkeypatch.setattr(config_of, "to_diff_dict", lambda: reordered)
    assert vllm_sampler.engine_of(other_order, config) is first and not closed
    stairs = staircase.base_at(0.5)  # with other tokens
    other = vllm_sampler.engine_of(Policy(stairs), config)
    assert closed == [str(cards.BASE)]
    assert other is not first and list(vllm_sampler.ENGINE.values()) == [other]
    sizes = (80, "fp32", 300, 0.2)
    assert built == [(str(cards.BASE), *sizes), (str(stairs), *sizes)]


# ---------------------------------------------------------------------- the commands


def test_npo_through_vllm(command, tmp_path):
    """Scout, cache and replay, resumed; a checkpoint, and a data set in geometry3k's schema."""
    path = tmp_path / "geometry.parquet"
    cards_file(path, 40)
    config = RunConfig(model=str(cards.BASE), dataset=str(path), eval_prompts=4)
    asked = [load_prompts(config)[0][row] for row in range(36)]
    said = Policy(cards.BASE).sample(asked, 1, 40, 0.01, seed=1)
    boxed = [verifier.extract_answer(group.completions[0].text) for group in said]
    good = [(hand, gold) for hand, gold in zip(cards.hands("train"), boxed) if gold]
    # what the base says as good as greedily, so that it is right and wrong at a temperature of 0.5
    changes = {}
    for row in range(40):
        hand, gold = good[row % len(good)]
        changes[row] = {"images": [cards.draw(hand)], "answer": gold}
        changes[row]["problem"] = f"<image>{cards.question(hand)}"
    cards_file(path, 40, changes)
    words = ["npo.py", "--model", cards.BASE, "--dataset", path, "--temperature", "0.5"]
    words += ["--sampler", "vllm", "--scout-steps", "3", "--lr", "1e-4", *SMALL]
    out = tmp_path / "out"
    command(*words, "--steps", "3", "--out", out)
    done = command(*words, "--steps", "5", "--out", out)
    assert "resumed at step 3" in done.stdout
    lines = [line for line in read_jsonl(out / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line["sampling/probe_difference"] < 1e-4 and "time/sync" in line for line in lines)
    trained = [line for line in lines if line["grad_norm"] > 0]
    assert trained and any(line.get("npo/guide_frac") for line in lines)
    for line in trained:
        assert line["sampling/sampling_logp_difference/mean"] < 1e-5
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
        weights = [line[f"sampling/importance_sampling_ratio/{n}"] for n in ("min", "mean", "max")]
        assert weights == pytest.approx([1, 1, 1], abs=1e-4)
        assert line["ratio"] == pytest.approx(1, abs=0.3)
    answers = [answer for line in read_jsonl(out / "guide.jsonl")[1:] for answer in line["answers"]]
    assert answers and all(answer["exact"] and answer["source"] == "guide@3" for answer in answers)
    corrected = [line["npo/guide_ratio_max"] for line in lines if "npo/guide_ratio_max" in line]
    assert corrected and max(abs(ratio - 1) for ratio in corrected) > 1e-3
    words += ["--guide", out / "guide.jsonl", "--no-is-correction", "--gate", "1"]
    command(*words, "--steps", "2", "--out", tmp_path / "without")
    lines = read_jsonl(tmp_path / "without/metrics.jsonl")
    ratios = [line["npo/guide_ratio_max"] for line in lines if "npo/guide_ratio_max" in line]
    assert ratios and set(ratios) == {1.0}


def said_by_both(command, words, out) -> list[list[list[str]]]:
    """The responses of one evaluation through transformers and through vLLM."""
    found = []
    for name in ("hf", "vllm"):
        command(*words, "--sampler", name, "--out", out / name)
        lines = read_jsonl(out / name / "predictions.jsonl")
        found.append([line["responses"] for line in lines if "responses" in line])
    return found


def test_evaluate_a_checkpoint_of_adapters(command, saved, tmp_path):
    policy = Policy(saved, lora=4)
    perturb(policy, 2)
    words = ["-m", "commands.evaluate", "--model", save(policy, tmp_path / "adapters", 2)]
    words += ["--benchmarks", "cards", "--limit", "2", "--samples", "4"]
    words += ["--temperature", "0.01", "--max-new-tokens", "40"]  # as good as greedy
    found = said_by_both(command, words, tmp_path)
    assert found[0] == found[1] and len(found[0]) == 2


def test_the_staircase_in_both_samplers(command, tmp_path):
    """Its output head is no copy of the embedding, and one row of it is edited."""
    words = ["-m", "commands.evaluate", "--model", "staircase", "--borrow-rate", "0.9"]
    words += ["--limit", "4", "--temperature", "0.01"]  # as good as greedy
    found = said_by_both(command, words, tmp_path)
    assert found[0] == found[1] and "borrow" in str(found[0]) and "carry" not in str(found[0])


def test_evaluate_through_vllm(command, saved, tmp_path):
    """The cards world and a benchmark; that both samplers agree is tested above."""
    load(tmp_path / "data", "mmmu_pro", [{}, {"answer": "A"}, {"options": "none"}])
    words = ["-m", "commands.evaluate", "--model", saved, "--sampler", "vllm"]
    words += ["--benchmarks", "cards,mmmu_pro", "--data-dir", tmp_path / "data"]
    words += ["--limit", "6", "--samples", "2", "--max-new-tokens", "40", "--out", tmp_path / "out"]
    done = command(*words)
    _, *lines = read_jsonl(tmp_path / "out/predictions.jsonl")
    names = sorted(line["benchmark"] for line in lines)
    assert names == ["cards"] * 6 + ["mmmu_pro"] * 3
    assert all(len(line["responses"]) == 2 for line in lines if "responses" in line)
    assert "Here 1 of 3 items could not be asked" in done.stdout
    scores = json.loads((tmp_path / "out/scores.json").read_text())["benchmarks"]
    assert {name: one["items"] for name, one in scores.items()} == {"cards": 6, "mmmu_pro": 3}


@pytest.mark.parametrize(("name", "lora"), [("qwen3", 4), ("llama", 0), ("gemma3", 0)])
def test_text_models(folder, name, lora):
    """Uneven prompts; before and after a sync. At the end: vLLM's older engines do not survive."""
    policy, some = Policy(folder(name), lora=lora), [in_words(text) for text in QUESTIONS]
    sampler = VLLMSampler(folder(name), max_new_tokens=20)
    assert difference(policy, sampler.sample(some, 3, 20, 1.3, seed=5)) < 1e-5
    perturb(policy, 2)
    assert difference(policy, sampler.sample(some, 3, 20, 1.3, seed=5)) > 1e-2
    sampler.sync(policy, some[:2], 1.3)
    assert difference(policy, sampler.sample(some, 3, 20, 1.3, seed=5)) < 1e-5
