"""Sampler and trainer are the same distribution, masks are right, broken models are told."""

import contextlib
import io
import json
import shutil
import sys

import jinja2
import pytest
import torch
from conftest import cards_file, save
from PIL import Image
from safetensors.torch import load_file, save_file

import grpo
from commands import evaluate
from plumbing import UsageError, data, model
from plumbing.encode import encode, image_parts, load_tokenizer, prompt_length
from plumbing.model import Policy
from plumbing.rollout import EncodedPrompt, Group, Prompt
from worlds import cards

TEMPERATURE = 0.7


def card_prompt(start: int, digits: tuple[int, ...]) -> Prompt:
    hand = cards.Hand(start, digits)
    return Prompt(f"{start}:{digits}", cards.messages(hand), [cards.draw(hand)], str(hand.total))


def text_prompt(text: str, images: list[Image.Image] = (), marks: int = 0) -> Prompt:
    """A question after `marks` image marks."""
    content = [{"type": "image"}] * marks + [{"type": "text", "text": text}]
    return Prompt("text", [{"role": "user", "content": content}], list(images), "5")


MIXED = [
    card_prompt(7, (1, 2)),
    card_prompt(38, (9, 9, 4, 5, 6, 7)),
    card_prompt(12, (3, 3, 3)),
    text_prompt("Start at 5 and add the cards."),
]


def behavior(groups: list[Group]) -> tuple[list, torch.Tensor]:
    """Rows for `logprobs`, and the recorded log-probs (B, T), padded with zeros."""
    pairs = [(group.encoded, c) for group in groups for c in group.completions]
    recorded = [torch.tensor(c.behavior_logprobs, dtype=torch.float64) for _, c in pairs]
    rows = [(encoded, c.token_ids) for encoded, c in pairs]
    return rows, torch.nn.utils.rnn.pad_sequence(recorded, batch_first=True)


def completions(groups: list[Group]) -> list:
    return [c for group in groups for c in group.completions]


# ---------------------------------------------------------------------- sampler and trainer


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
    """Images of different sizes, text alone, rows that end early or are cut: 1e-5 in fp32."""
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
    exact = Policy(cards.BASE, dtype="fp64")
    rows, recorded = behavior(exact.sample(MIXED, 5, 40, TEMPERATURE, seed=11))
    with torch.no_grad():
        assert (exact.logprobs(rows, TEMPERATURE)[0] - recorded).abs().max() < 1e-7


def test_logprobs_against_the_models_own_logits(base):
    """One row by definition: log softmax of logits / temperature, without vision tokens."""
    group = base.sample(MIXED[1:2], 2, 30, TEMPERATURE, seed=2)[0]
    encoded, tokens = group.encoded, group.completions[1].token_ids
    ids = torch.tensor([encoded.token_ids + tokens])
    with torch.no_grad():
        logits = base.model(
            input_ids=ids,
            mm_token_type_ids=(ids == base.image_token_id).int(),
            pixel_values=encoded.pixel_values,
            image_grid_thw=encoded.image_grid_thw,
        ).logits[0]
        logits = logits.double() / TEMPERATURE
        logits[:, base.never_sampled] = float("-inf")
        expected = torch.log_softmax(logits, -1)[len(encoded.token_ids) - 1 : -1]
        expected = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        got, _ = base.logprobs([(encoded, tokens)], TEMPERATURE)
    torch.testing.assert_close(got[0].double(), expected, atol=1e-5, rtol=0)


def test_vocabulary_chunks_change_nothing(monkeypatch):
    exact = Policy(cards.BASE, dtype="fp64")
    rows, _ = behavior(exact.sample(MIXED, 3, 30, 1.0, seed=4))
    results = []
    for chunk in (1024, 7):
        monkeypatch.setattr(model, "VOCABULARY_CHUNK", chunk)
        exact.model.zero_grad()
        logprobs, _ = exact.logprobs(rows, 1.0)
        (logprobs * torch.linspace(-1, 2, logprobs.shape[1])).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in exact.parameters()])
        results.append((logprobs.detach(), gradient))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-9, rtol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-7, atol=1e-9)


def test_eos_counts_where_pad_is_eos(fresh):
    """There, too, EOS is sampled, recorded and trained."""
    fresh.tokenizer.pad_token = fresh.tokenizer.eos_token
    groups = fresh.sample(MIXED, 4, 40, 1.0, seed=5)
    rows, _ = behavior(groups)
    assert all(c.finished and c.token_ids[-1] in fresh.eos_token_ids for c in completions(groups))
    with torch.no_grad():
        logprobs, mask = fresh.logprobs(rows, 1.0)
    for completion, row, real in zip(completions(groups), logprobs, mask):
        assert real.sum() == len(completion.token_ids)
        eos = completion.behavior_logprobs[-1]
        assert row[real][-1].item() == pytest.approx(eos, abs=1e-5)


def test_only_completions_are_projected(fresh):
    """The vocabulary is applied to the completions' tokens, EOS included, and to nothing else."""
    group = fresh.sample(MIXED[:1], 2, 40, 1.0, seed=6)[0]
    tokens, seen = group.completions[0].token_ids, []
    head = fresh.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    fresh.logprobs([(group.encoded, tokens), (group.encoded, tokens[:3])], 1.0)
    assert sum(seen) == len(tokens) + 3


def test_the_gradient_flows_through_the_shared_prompt():
    """A prompt is run once for its group: gradients as of one plain forward per row, in fp64."""
    exact = Policy(cards.BASE, dtype="fp64")
    exact.model.base_model.visual.requires_grad_(True)
    rows, _ = behavior(exact.sample(MIXED, 2, 40, 1.0, seed=3))
    weights = torch.linspace(-1, 2, 80, dtype=torch.float64)
    logprobs, _ = exact.logprobs(rows, 1.0)
    (logprobs * weights[: logprobs.shape[1]]).sum().backward()
    named = dict(exact.model.named_parameters())
    got = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    exact.model.zero_grad()
    for encoded, tokens in rows:
        ids, images = torch.tensor([encoded.token_ids + tokens]), {}
        if encoded.pixel_values is not None:
            images["pixel_values"] = encoded.pixel_values.double()
            images["image_grid_thw"] = encoded.image_grid_thw
        types = (ids == exact.image_token_id).int()
        hidden = exact.model.base_model(
            input_ids=ids, mm_token_type_ids=types, use_cache=False, **images
        ).last_hidden_state[0, len(encoded.token_ids) - 1 : -1]
        logits = exact.model.get_output_embeddings()(hidden)
        plain = exact.sampling_logprobs(logits, 1.0).gather(1, torch.tensor(tokens)[:, None])
        (plain[:, 0] * weights[: len(tokens)]).sum().backward()
    assert any("visual" in name for name in got)
    for name, gradient in ((name, p.grad) for name, p in named.items() if p.grad is not None):
        # the norms are fp32 even here, and round at 1e-7
        assert (got[name] - gradient).norm() <= 5e-7 * gradient.norm() and gradient.any(), name


def test_entropy_of_every_token_by_enumeration():
    exact = Policy(cards.BASE, dtype="fp64")
    rows, _ = behavior(exact.sample(MIXED[:2], 2, 40, 1.6, seed=8))
    rows = [rows[0], (rows[2][0], rows[2][1][:5])]
    logprobs, mask, entropy = exact.logprobs(rows, 1.6, entropy=True)
    assert torch.equal(exact.logprobs(rows, 1.6)[0], logprobs) and not entropy[~mask].any()
    encoded, tokens = rows[1]
    every = [id for id in range(len(exact.tokenizer)) if id not in exact.never_sampled]
    for t in (0, 4):
        with torch.no_grad():
            instead = [(encoded, [*tokens[:t], id]) for id in every]
            each = exact.logprobs(instead, 1.6)[0][:, t]  # (V,)
        assert each.exp().sum().item() == pytest.approx(1)
        assert entropy[1, t].item() == pytest.approx(-(each.exp() * each).sum().item())
    entropy.sum().backward()  # the log-probs of impossible tokens are -inf
    assert all(p.grad.isfinite().all() for p in exact.parameters() if p.grad is not None)


# ---------------------------------------------------------------------- what is sampled


def test_vision_tokens_are_never_sampled(base):
    logits = torch.zeros(2, len(base.tokenizer))
    logits[:, base.never_sampled] = 50.0
    probabilities = base.sampling_logprobs(logits, 1.0).exp()
    assert len(base.never_sampled) == 4 and not probabilities[:, base.never_sampled].any()
    assert probabilities.sum(-1) == pytest.approx([1.0, 1.0], abs=1e-5)


def test_sampling_depends_on_the_seed_alone(base):
    torch.manual_seed(1)
    one = base.sample(MIXED, 3, 20, 1.0, seed=9)
    torch.manual_seed(2)
    two = base.sample(MIXED, 3, 20, 1.0, seed=9)
    other = base.sample(MIXED, 3, 20, 1.0, seed=10)
    assert completions(one) == completions(two) != completions(other)


def test_a_models_own_sampling_settings_do_not_bias_the_ratio(fresh, tmp_path):
    """Qwen3-VL ships temperature 0.7, top_k 20, top_p 0.8: they must not reach the sampler."""
    plain = fresh.sample(MIXED, 3, 20, 1.0, seed=9)
    fresh.stock_generation_config.update(
        temperature=0.1,
        top_k=1,
        top_p=0.5,
        min_p=0.3,
        repetition_penalty=1.5,
        no_repeat_ngram_size=1,
        do_sample=True,
    )
    other = Policy(save(fresh, tmp_path / "qwen"))
    assert other.stock_generation_config.top_k == 1  # kept in checkpoints
    again = other.sample(MIXED, 3, 20, 1.0, seed=9)
    assert completions(again) == completions(plain)


def test_temperature_is_part_of_the_distribution(base):
    logits = torch.zeros(1, len(base.tokenizer))
    logits[0, 20] = 3.0
    cold, hot = (base.sampling_logprobs(logits, temperature)[0] for temperature in (0.5, 2.0))
    assert (cold[20] - cold[21]).item() == pytest.approx(6.0)
    assert (hot[20] - hot[21]).item() == pytest.approx(1.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_do_not_sample(fresh, value):
    with torch.no_grad():
        fresh.parameters()[0].fill_(value)
    with pytest.raises(FloatingPointError, match="logits are nan or infinite"):
        fresh.sample(MIXED, 2, 5, 1.0, seed=0)


def test_bf16():
    half = Policy(cards.BASE, dtype="bf16")
    rows, recorded = behavior(half.sample(MIXED, 2, 20, 1.0, seed=0))
    logprobs, mask = half.logprobs(rows, 1.0)
    logprobs.sum().backward()
    assert half.parameters()[0].dtype == torch.bfloat16 and logprobs.dtype == torch.float32
    assert (logprobs - recorded)[mask].abs().mean() < 0.1


# ---------------------------------------------------------------------- prompts as they are read


def test_placeholders_must_match_images(base):
    prompt = text_prompt("Start at 1.", MIXED[0].images, marks=2)
    with pytest.raises(UsageError, match="2 image placeholders in its text, but 1 images"):
        base.encode(prompt)


def test_two_images_in_one_prompt(base):
    images = [MIXED[0].images[0], MIXED[1].images[0]]  # two and six cards
    two = text_prompt("Start at 1 and add the cards.", images, marks=2)
    assert base.encode(two).token_ids.count(base.image_token_id) == 8
    rows, recorded = behavior(base.sample([two, MIXED[0]], 3, 20, 1.0, seed=1))
    with torch.no_grad():
        assert (base.logprobs(rows, 1.0)[0] - recorded).abs().max() < 3e-5


def test_a_prompt_without_images(base):
    encoded = base.encode(MIXED[3])
    assert isinstance(encoded, EncodedPrompt) and encoded.pixel_values is None
    assert base.image_token_id not in encoded.token_ids


@pytest.mark.parametrize(
    "sizes", [[], [(40, 36)], [(1, 1)], [(31, 33), (1000, 7)], [(3000, 2100)], [(199, 1)]]
)
def test_prompt_length_needs_no_pixels(base, sizes):
    images = [Image.new("RGB", size) for size in sizes]
    prompt = text_prompt("Start at 3", images, marks=len(sizes))
    parts = base.tokenizer, base.image_processor, base.image_token_id
    length = prompt_length(prompt.messages, sizes, *parts)
    encoded = encode(prompt, *parts)
    assert length == len(encoded.token_ids)
    if sizes:  # the processor's own grid counts 4 patches to a token
        counted = encoded.token_ids.count(base.image_token_id)
        assert 4 * counted == encoded.image_grid_thw.prod(-1).sum() == len(encoded.pixel_values)


def test_pictures_are_cut_into_patches_once_and_when_they_are_asked_for(base):
    calls, real = [], base.image_processor

    class Recorder:
        merge_size, get_number_of_image_patches = 2, real.get_number_of_image_patches

        def __call__(self, **words):
            calls.append(words)
            return real(**words)

    encoded = encode(MIXED[1], base.tokenizer, Recorder(), base.image_token_id)
    assert encoded.token_ids == base.encode(MIXED[1]).token_ids and not calls
    patches, grid = encoded.pixel_values, encoded.image_grid_thw
    assert encoded.pixel_values is patches and len(patches) == grid.prod() and len(calls) == 1
    expected = real(images=MIXED[1].images, return_tensors="pt")
    assert torch.equal(patches, expected.pixel_values)


def test_a_chat_template_runs_in_a_sandbox():
    tokenizer = load_tokenizer(cards.BASE)
    tokenizer.chat_template = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(jinja2.exceptions.SecurityError):
        tokenizer.apply_chat_template(MIXED[0].messages, tokenize=False)


# ---------------------------------------------------------------------- loading


def test_the_vision_tower_is_frozen(base):
    every = sum(p.numel() for p in base.model.parameters())
    vision = sum(p.numel() for p in base.model.base_model.visual.parameters())
    assert vision > 0 and sum(p.numel() for p in base.parameters()) == every - vision


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no/such/model", "there is no such folder"),
        ("docs", "no tokenizer; copy tokenizer_config.json"),
    ],
)
def test_unknown_model(path, reason):
    with pytest.raises(UsageError, match=f"model {path}: {reason}.* give a hub id or") as error:
        Policy(path)
    assert "\n" not in str(error.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", None, "no chat template; put a chat_template.jinja into"),
        ("chat_template.jinja", "", "no chat template; put a chat_template.jinja into"),
        ("tokenizer.json", None, "no tokenizer; copy tokenizer_config.json and tokenizer.json"),
        ("tokenizer_config.json", None, "no tokenizer; copy tokenizer_config.json and"),
        ("tokenizer.json", "{}", "its tokenizer cannot be loaded ('added_tokens')"),
        ("tokenizer.json", "", "its tokenizer cannot be loaded (Expecting value"),
        ("tokenizer.json", POINTER, "tokenizer.json is a Git LFS pointer; git lfs pull"),
        ("chat_template.jinja", POINTER, "chat_template.jinja is a Git LFS pointer"),
        ("model.safetensors", POINTER, "model.safetensors is a Git LFS pointer"),
        ("preprocessor_config.json", None, "cannot be loaded (Can't load image processor"),
    ],
)
def test_model_folders_with_a_part_missing(tmp_path, name, content, message):
    """The same line for training and evaluation."""
    folder = shutil.copytree(cards.BASE, tmp_path / "model")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    flags = {"model": str(folder), "out": str(tmp_path / "run")}
    data._load_prompts.cache_clear()
    for main, config in (
        (grpo.main, grpo.GRPOConfig(dataset="cards", eval_prompts=4, **flags)),
        (evaluate.main, evaluate.EvaluateConfig(benchmarks="cards", **flags)),
    ):
        with pytest.raises(UsageError) as error:
            main(config)
        assert str(error.value).startswith(f"model {folder}: {message}")
        assert "\n" not in str(error.value)


def test_a_folders_own_code_does_not_run(tmp_path, monkeypatch):
    """Not even where somebody answers yes."""
    folder = shutil.copytree(cards.BASE, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    for name in ("tokenizer_config.json", "preprocessor_config.json", "config.json"):
        kept = json.loads((folder / name).read_text())
        mine = {key: "evil.Mine" for key in ("AutoConfig", "AutoImageProcessor")}
        kept["auto_map"] = mine | {"AutoTokenizer": ["evil.Mine", "evil.Mine"]}
        (folder / name).write_text(json.dumps(kept))
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with contextlib.suppress(UsageError):
        load_tokenizer(folder)
        image_parts(folder)
    assert not (tmp_path / "ran").exists()


def test_a_chat_template_without_pictures(tmp_path):
    """Every prompt with one is left out; the message says why."""
    folder = shutil.copytree(cards.BASE, tmp_path / "model")
    text = (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(text)
    cards_file(tmp_path / "cards.parquet", 6)
    path = str(tmp_path / "cards.parquet")
    config = grpo.GRPOConfig(model=str(folder), dataset=path, eval_prompts=2)
    with pytest.raises(UsageError, match="4 dropped: a chat template that does not show all"):
        data.load_prompts(config)


def test_damaged_weights_and_missing_devices(tmp_path):
    shutil.copytree(cards.BASE, tmp_path / "cut")
    whole = (cards.BASE / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(UsageError, match="cut: cannot be loaded"):
        Policy(tmp_path / "cut")
    some = load_file(cards.BASE / "model.safetensors")
    some.pop("model.language_model.norm.weight")
    save_file(some, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    message = "1 weights are missing, such as model.language_model.norm.weight"
    with pytest.raises(UsageError, match=message):
        Policy(tmp_path / "cut")
    with pytest.raises(UsageError, match="--device cuda: torch .* finds no CUDA here; use cpu"):
        Policy(cards.BASE, device="cuda")
