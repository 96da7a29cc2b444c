"""Sampler and trainer are the same distribution, masks are right, checkpoints are whole."""

import json
import shutil

import pytest
import torch
from PIL import Image

import cards
import policy as policy_module
from policy import Inputs, Policy, encode, prompt_length
from tasks import Prompt, UsageError

TEMPERATURE = 0.7


def card_prompt(start: int, digits: tuple[int, ...]) -> Prompt:
    hand = cards.Hand(start, digits)
    return Prompt(f"{start}:{digits}", cards.messages(hand), [cards.draw(hand)], str(hand.total))


MIXED = [card_prompt(7, (1, 2)), card_prompt(38, (9, 9, 4, 5, 6, 7)), card_prompt(12, (3, 3, 3)),
         Prompt("text", [{"role": "user", "content": [{"type": "text", "text": "Start at 5 and add the cards."}]}], [], "5")]  # fmt: skip


def behavior(groups):
    """Recorded log-probs (B, T), padded with zeros, beside the rows for `logprobs`."""
    rows = [(g.inputs, c.token_ids) for g in groups for c in g.completions]
    recorded = [torch.tensor(c.behavior_logprobs) for g in groups for c in g.completions]
    return rows, torch.nn.utils.rnn.pad_sequence(recorded, batch_first=True)


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens"),
    [
        (MIXED, 40),
        (MIXED, 11),  # the longer rows are cut, the shorter ones end early
        (MIXED[1:2], 40),  # one prompt: no padding anywhere
        (MIXED[3:], 40),  # no image anywhere
    ],
)
def test_sampler_and_trainer_agree(base, prompts, max_new_tokens):
    """Images of different sizes, text only, rows that end early or are cut: at most 1e-5 in fp32."""
    groups = base.sample(prompts, 5, max_new_tokens, TEMPERATURE, seed=11)
    rows, recorded = behavior(groups)
    lengths = [len(tokens) for _, tokens in rows]
    assert len(set(lengths)) > 1 or len(prompts) == 1
    with torch.no_grad():
        logprobs, mask = base.logprobs(rows, TEMPERATURE)
    assert mask.sum(1).tolist() == lengths
    assert (logprobs - recorded).abs().max() < 1e-5
    assert not logprobs[~mask].any()


def test_what_is_left_of_the_difference_is_rounding():
    """The same in fp64 (but for the sampler's last logits, which `generate` keeps in fp32)."""
    exact = Policy(cards.BASE, device="cpu", dtype="fp64")
    rows, recorded = behavior(exact.sample(MIXED, 5, 40, TEMPERATURE, seed=11))
    with torch.no_grad():
        assert (exact.logprobs(rows, TEMPERATURE)[0] - recorded).abs().max() < 2e-6


def test_logprobs_against_the_models_own_logits(base):
    """One row, no padding, no chunks, the definition: log softmax(logits / temperature) without vision tokens."""
    group = base.sample(MIXED[1:2], 2, 30, TEMPERATURE, seed=2)[0]
    inputs, tokens = group.inputs, group.completions[1].token_ids
    ids = torch.tensor([inputs.token_ids + tokens])
    with torch.no_grad():
        logits = base.model(input_ids=ids, mm_token_type_ids=(ids == base.image_token_id).int(),
                            pixel_values=inputs.pixel_values, image_grid_thw=inputs.image_grid_thw).logits[0].double()  # fmt: skip
        logits[:, base.never_sampled] = float("-inf")
        expected = torch.log_softmax(logits / TEMPERATURE, -1)[len(inputs.token_ids) - 1 : -1]
        expected = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        got, _ = base.logprobs([(inputs, tokens)], TEMPERATURE)
    torch.testing.assert_close(got[0].double(), expected, atol=1e-5, rtol=0)


def test_vocabulary_chunks_change_nothing(monkeypatch):
    fresh = Policy(cards.BASE, device="cpu", dtype="fp64")
    rows, _ = behavior(fresh.sample(MIXED, 3, 30, 1.0, seed=4))
    results = []
    for chunk in (1024, 7):
        monkeypatch.setattr(policy_module, "VOCABULARY_CHUNK", chunk)
        fresh.model.zero_grad()
        logprobs, _ = fresh.logprobs(rows, 1.0)
        (logprobs * torch.linspace(-1, 2, logprobs.shape[1])).sum().backward()
        results.append((logprobs.detach(), torch.cat([p.grad.flatten() for p in fresh.parameters()])))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-9, rtol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-7, atol=1e-9)


def test_eos_counts_and_pad_and_prompt_do_not(fresh):
    """Where the pad token is EOS, EOS is still sampled, recorded and trained."""
    fresh.tokenizer.pad_token = fresh.tokenizer.eos_token
    groups = fresh.sample(MIXED, 4, 40, 1.0, seed=5)
    rows, _ = behavior(groups)
    assert all(tokens[-1] in fresh.eos_token_ids for _, tokens in rows) and all(
        c.finished for g in groups for c in g.completions
    )
    with torch.no_grad():
        logprobs, mask = fresh.logprobs(rows, 1.0)
    for completion, row, real in zip((c for g in groups for c in g.completions), logprobs, mask):
        assert real.sum() == len(completion.token_ids)
        assert row[real][-1].item() == pytest.approx(completion.behavior_logprobs[-1], abs=1e-5)  # EOS's own


def test_only_completions_are_projected(fresh):
    """The vocabulary is applied to the completions' tokens, EOS included, and to nothing else."""
    group = fresh.sample(MIXED[:1], 2, 40, 1.0, seed=6)[0]
    tokens, seen = group.completions[0].token_ids, []
    fresh.model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    fresh.logprobs([(group.inputs, tokens), (group.inputs, tokens[:3])], 1.0)
    assert sum(seen) == len(tokens) + 3


def test_the_gradient_flows_through_the_shared_prompt():
    """Gradients of `logprobs`, which runs a prompt once for its group, against one plain forward pass a row, in fp64."""
    exact = Policy(cards.BASE, device="cpu", dtype="fp64", train_vision=True)
    rows, _ = behavior(exact.sample(MIXED, 2, 40, 1.0, seed=3))
    weights = torch.linspace(-1, 2, 80, dtype=torch.float64)
    logprobs, _ = exact.logprobs(rows, 1.0)
    (logprobs * weights[: logprobs.shape[1]]).sum().backward()
    got = {name: p.grad.clone() for name, p in exact.model.named_parameters() if p.grad is not None}
    exact.model.zero_grad()
    for inputs, tokens in rows:
        ids = torch.tensor([inputs.token_ids + tokens])
        images = (
            {"pixel_values": inputs.pixel_values.double(), "image_grid_thw": inputs.image_grid_thw}
            if inputs.pixel_values is not None
            else {}
        )
        hidden = exact.model.base_model(
            input_ids=ids, mm_token_type_ids=(ids == exact.image_token_id).int(), use_cache=False, **images
        )
        logits = exact.model.get_output_embeddings()(hidden.last_hidden_state[0, len(inputs.token_ids) - 1 : -1])
        plain = exact.adjust(logits, 1.0).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        (plain * weights[: len(tokens)]).sum().backward()
    assert any("visual" in name for name in got)
    for name, parameter in exact.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_vision_tokens_are_never_sampled(base):
    logits = torch.zeros(2, len(base.tokenizer))
    logits[:, base.never_sampled] = 50.0
    probabilities = base.adjust(logits, 1.0).exp()
    assert len(base.never_sampled) == 4 and not probabilities[:, base.never_sampled].any()
    assert probabilities.sum(-1) == pytest.approx([1.0, 1.0], abs=1e-5)


def test_sampling_depends_on_the_seed_alone(base):
    torch.manual_seed(1)
    one = base.sample(MIXED, 3, 20, 1.0, seed=9)
    torch.manual_seed(2)
    two = base.sample(MIXED, 3, 20, 1.0, seed=9)
    other = base.sample(MIXED, 3, 20, 1.0, seed=10)
    assert [g.completions for g in one] == [g.completions for g in two]
    assert [g.completions for g in one] != [g.completions for g in other]


def test_a_models_own_sampling_settings_do_not_bias_the_ratio(fresh, tmp_path):
    """Qwen3-VL ships temperature 0.7, top_k 20, top_p 0.8: they must not reach the sampler."""
    plain = fresh.sample(MIXED, 3, 20, 1.0, seed=9)
    own = dict(temperature=0.1, top_k=1, top_p=0.5, min_p=0.3, repetition_penalty=1.5, no_repeat_ngram_size=1, do_sample=True)
    fresh.stock_generation_config.update(**own)
    fresh.save(tmp_path / "qwen", {"step": 0, "sampled_tokens": 0})
    other = Policy(tmp_path / "qwen", device="cpu")
    assert other.stock_generation_config.top_k == 1  # kept in checkpoints
    assert [g.completions for g in other.sample(MIXED, 3, 20, 1.0, seed=9)] == [g.completions for g in plain]


def test_temperature_is_part_of_the_distribution(base):
    logits = torch.tensor([[0.0] * len(base.tokenizer)])
    logits[0, 20] = 3.0
    cold, hot = base.adjust(logits, 0.5)[0], base.adjust(logits, 2.0)[0]
    assert (cold[20] - cold[21]).item() == pytest.approx(6.0) and (hot[20] - hot[21]).item() == pytest.approx(1.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_neither_sample_nor_are_saved(fresh, tmp_path, value):
    with torch.no_grad():
        fresh.parameters()[0].fill_(value)
    with pytest.raises(FloatingPointError, match="logits are nan or infinite"):
        fresh.sample(MIXED, 2, 5, 1.0, seed=0)
    with pytest.raises(FloatingPointError, match="weight is not finite"):
        fresh.save(tmp_path / "step_000001", {"step": 1, "sampled_tokens": 0})
    assert not list(tmp_path.iterdir())


def test_placeholders_must_match_images(base):
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Start at 1 and add the cards."}]
    prompt = Prompt("two marks", [{"role": "user", "content": content}], MIXED[0].images, "1")
    with pytest.raises(UsageError, match="2 image placeholders in its text, but 1 images"):
        base.encode(prompt)


def test_two_images_in_one_prompt(base):
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Start at 1 and add the cards."}]
    images = [MIXED[0].images[0], MIXED[1].images[0]]  # two and six cards
    inputs = base.encode(Prompt("two", [{"role": "user", "content": content}], images, "1"))
    assert inputs.token_ids.count(base.image_token_id) == 8
    groups = base.sample([Prompt("two", [{"role": "user", "content": content}], images, "1"), MIXED[0]], 3, 20, 1.0, seed=1)
    rows, recorded = behavior(groups)
    with torch.no_grad():
        assert (base.logprobs(rows, 1.0)[0] - recorded).abs().max() < 1e-5


def test_the_vision_tower_is_frozen_unless_asked():
    count = sum(p.numel() for p in Policy(cards.BASE, device="cpu").parameters())
    assert count < sum(p.numel() for p in Policy(cards.BASE, device="cpu", train_vision=True).parameters())


def test_checkpoints_restore_weights_optimizer_and_state(fresh, tmp_path):
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-3)
    group = fresh.sample(MIXED[:1], 2, 20, 1.0, seed=0)[0]
    fresh.logprobs([(group.inputs, group.completions[0].token_ids)], 1.0)[0].sum().backward()
    optimizer.step()
    path = tmp_path / "step_000003"
    fresh.save(path, {"step": 3, "sampled_tokens": 41}, optimizer)
    again = Policy(path, device="cpu")
    for (name, mine), (_, theirs) in zip(fresh.model.state_dict().items(), again.model.state_dict().items()):
        assert torch.equal(mine, theirs), name
    assert json.loads((path / "state.json").read_text()) == {"step": 3, "sampled_tokens": 41}
    assert len(torch.load(path / "optimizer.pt")["state"]) == len(fresh.parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["step_000003"]  # nothing left aside
    fresh.save(path, {"step": 3, "sampled_tokens": 42})  # over an older one
    assert not (path / "optimizer.pt").exists()


def test_bf16(tmp_path):
    half = Policy(cards.BASE, device="cpu", dtype="bf16")
    groups = half.sample(MIXED, 2, 20, 1.0, seed=0)
    rows, recorded = behavior(groups)
    logprobs, mask = half.logprobs(rows, 1.0)
    logprobs.sum().backward()
    assert half.parameters()[0].dtype == torch.bfloat16 and logprobs.dtype == torch.float32
    assert (logprobs - recorded)[mask].abs().mean() < 0.1


@pytest.mark.parametrize("path", ["no/such/model", "assets"])
def test_unknown_model(path):
    with pytest.raises(UsageError, match=f"model {path}: no tokenizer can be loaded"):
        Policy(path)


def test_damaged_weights_and_missing_devices(tmp_path):
    shutil.copytree(cards.BASE, tmp_path / "cut")
    whole = (cards.BASE / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(UsageError, match="cannot be loaded"):
        Policy(tmp_path / "cut", device="cpu")
    from safetensors.torch import load_file, save_file

    some = load_file(cards.BASE / "model.safetensors")
    some.pop("model.language_model.norm.weight")
    save_file(some, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="1 weights are missing, as model.language_model.norm.weight"):
        Policy(tmp_path / "cut", device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--device cuda"):
            Policy(cards.BASE, device="cuda")


def test_inputs_without_images(base):
    inputs = base.encode(MIXED[3])
    assert isinstance(inputs, Inputs) and inputs.pixel_values is None and base.image_token_id not in inputs.token_ids


@pytest.mark.parametrize("sizes", [[], [(40, 36)], [(1, 1)], [(31, 33), (1000, 7)], [(3000, 2100)], [(199, 1)]])
def test_prompt_length_needs_no_pixels(base, sizes):
    content = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": "Start at 3"}]
    prompt = Prompt("p", [{"role": "user", "content": content}], [Image.new("RGB", size) for size in sizes], "1")
    parts = base.tokenizer, base.image_processor, base.image_token_id
    assert prompt_length(prompt.messages, sizes, *parts) == len(encode(prompt, *parts).token_ids)
