"""--dry-run counts what the model itself says; the rehearsal leaves no trace."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3VLConfig, T5Config

from grpo import GRPOConfig
from plumbing import UsageError, memory
from plumbing.model import Policy
from worlds import cards

SMALL_TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24}
SMALL_TOWER |= {"deepstack_visual_indexes": (5, 11, 17)}
LARGE_TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27}
LARGE_TOWER |= {"deepstack_visual_indexes": (8, 16, 24)}
# hidden size, MLP, layers, query heads, tied embeddings, vision tower
EIGHT = (4096, 12288, 36, 32, False, LARGE_TOWER)
FOUR = (2560, 9728, 36, 32, True, SMALL_TOWER)
TWO = (2048, 6144, 28, 16, True, SMALL_TOWER)


def public(path, shape: tuple, **flags) -> GRPOConfig:
    """A run of a folder that holds nothing but the config.json of a Qwen3-VL of that shape."""
    hidden, mlp, layers, heads, tied, tower = shape
    text = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128}
    tower = tower | {"out_hidden_size": hidden}
    config = Qwen3VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=tied)
    config.save_pretrained(path)
    return GRPOConfig(model=str(path), dataset="x.jsonl", out="runs/8b", **flags)


@pytest.mark.parametrize(
    ("shape", "parameters"), [(EIGHT, 8767123696), (FOUR, 4437815808), (TWO, 2127532032)]
)
def test_public_sizes_have_as_many_parameters_as_their_checkpoints(tmp_path, shape, parameters):
    found = memory.counted(public(tmp_path, shape), torch.bfloat16)
    trained = found["trained"]  # all but the vision tower
    assert (found["parameters"], found["weights"]) == (parameters, 2 * parameters)
    assert 0.8 * parameters < trained < parameters and found["gradients"] == 2 * trained
    assert found["moments"] == int(2.03125 * trained)  # 8 bits each, a fp32 scale per 256
    assert found["checkpoint"] == found["weights"] + found["moments"]


def test_adapters_are_counted(tmp_path):
    pytest.importorskip("peft")
    found = memory.counted(public(tmp_path, TWO, lora=16), torch.bfloat16)
    both = 4 * 2048 + 2 * (2048 + 1024) + 3 * (2048 + 6144)  # q and o, k and v, the MLP
    assert found["trained"] == 28 * 16 * both and found["gradients"] == 4 * found["trained"]
    assert found["checkpoint"] == 12 * found["trained"]
    assert found["parameters"] == 2127532032 + found["trained"]


def test_what_a_dry_run_prints(tmp_path, capsys):
    """8B: 2 + 2 + 2.03 bytes per weight. In the update vLLM sleeps; while it samples, its share has
    to hold the weights, too."""
    memory.show(public(tmp_path, EIGHT, micro_batch_size=6))
    batch, parameters, weights, _, _, checkpoint, *gpus, _ = capsys.readouterr().out.splitlines()
    assert batch.startswith("8 prompts x 8 slots = 64 completions/step = 11 micro-batches of 6")
    assert parameters == "8,767,123,696 parameters, 8,190,735,360 of them trained, bf16"
    assert weights.split() == ["weights", "16.3", "GiB"]
    assert checkpoint == "checkpoint    31.8 GiB on the disk of runs/8b"
    shares = [line.partition(" GiB for vLLM, which sleeps meanwhile: ")[::2] for line in gpus]
    assert [share for share, _ in shares] == [
        "GPU of 24 GB, 7.8",
        "GPU of 48 GB, 15.6",
        "GPU of 80 GB, 26.1",
        "GPU of 141 GB, 46.0",
    ]
    assert all(words.startswith("cannot fit") for _, words in shares[:2])
    left = ["27.4 GiB left for activations", "84.2 GiB left for activations"]
    assert [words for _, words in shares[2:]] == left
    memory.show(public(tmp_path, EIGHT, vllm_memory=0.2))  # 14.9 GiB for 16.3 of weights
    assert (
        "GPU of 80 GB, 14.9 GiB for vLLM, which sleeps meanwhile: cannot" in capsys.readouterr().out
    )
    memory.show(public(tmp_path, TWO, card_gb=23))
    assert capsys.readouterr().out.splitlines()[-2].startswith("GPU of 23 GB, 7.5 GiB for vLLM")
    memory.show(GRPOConfig())
    assert "482,112 parameters, 364,224 of them trained, fp32" in capsys.readouterr().out


def test_models_that_cannot_be_counted(tmp_path):
    T5Config(num_layers=1).save_pretrained(tmp_path)
    for path in ("nobody/knows", str(tmp_path)):
        with pytest.raises(UsageError, match=f"^model {path}: cannot be loaded") as error:
            memory.counted(GRPOConfig(model=path), torch.bfloat16)
        assert "\n" not in str(error.value)


NEW = SimpleNamespace(state={})  # an optimizer before its first step


def test_the_rehearsal_leaves_no_trace(fresh, prompts, monkeypatch):
    """It asks for the longest rows: 12 of them touch two groups of 8. Gradients are there already,
    as from the second micro-batch on, and room for the moments."""
    before = [weight.clone() for weight in fresh.model.state_dict().values()]
    sampled = fresh.sample([prompts[0]], 3, 20, 1.0, seed=5)[0].completions
    real, asked, reserved = fresh.logprobs, [], []

    def logprobs(*words):
        asked.extend(words)
        assert all(parameter.grad is not None for parameter in fresh.parameters())
        return real(*words)

    def empty(*size, empty=torch.empty, **options):
        reserved.append(size) if options.get("dtype") == torch.uint8 else None
        return empty(*size, **options)

    monkeypatch.setattr(fresh, "logprobs", logprobs)
    monkeypatch.setattr(torch, "empty", empty)
    sizes = {"micro_batch_size": 12, "max_prompt_tokens": 50, "max_new_tokens": 30}
    config, state = GRPOConfig(temperature=1.5, **sizes), torch.get_rng_state()
    memory.rehearse(fresh, config, NEW)
    rows, temperature = asked
    assert {(len(encoded.token_ids), len(tokens)) for encoded, tokens in rows} == {
        (50, 30),
        (49, 30),  # so that the prompts take a mask
    }
    assert rows[0][0].image_grid_thw.tolist() == [[1, 2, 98]]  # a picture of 49 tokens
    assert (len(rows), len({id(encoded) for encoded, _ in rows}), temperature) == (12, 2, 1.5)
    assert reserved == [(8 * 364224,)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in fresh.model.parameters())
    assert all(map(torch.equal, before, fresh.model.state_dict().values()))
    assert fresh.sample([prompts[0]], 3, 20, 1.0, seed=5)[0].completions == sampled
    memory.rehearse(fresh, config, SimpleNamespace(state={"a": "moment"}))
    assert reserved[1:] == [(0,)]  # a run that goes on has them


@pytest.mark.parametrize(
    ("fitting", "message"),
    [
        (5, r"12 sequences of 50 \+ 30 tokens. Lower --micro-batch-size to 3, which fits and"),
        (1, "Lower --micro-batch-size to 1, which"),
        (0, r"Not even one of them fits. Lower --max-new-tokens .* and moments' 0.0 GiB"),
    ],
)
def test_out_of_memory_names_the_flag_to_lower(fresh, monkeypatch, fitting, message):
    real = fresh.logprobs

    def logprobs(rows, temperature):
        found = real(rows, temperature)
        if len(rows) > fitting:
            found[0].sum().backward()
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(fresh, "logprobs", logprobs)
    config = GRPOConfig(micro_batch_size=12, max_prompt_tokens=50, max_new_tokens=30)
    with pytest.raises(UsageError, match=message):
        memory.rehearse(fresh, config, NEW)
    assert all(parameter.grad is None for parameter in fresh.model.parameters())


@pytest.mark.parametrize("lora", [0, 5])
def test_what_is_counted_is_what_is_loaded(lora, dtype=torch.bfloat16):
    """Bytes of the tensors themselves, after a backward pass."""
    if lora:
        pytest.importorskip("peft")
    policy = Policy(cards.BASE, dtype="bf16", lora=lora)
    found = memory.counted(GRPOConfig(lora=lora), dtype)
    weights = {id(p): p for p in policy.model.parameters()}.values()
    assert found["weights"] == sum(p.nbytes for p in weights)
    encoded = memory.longest_prompt(policy, 9)
    policy.logprobs([(encoded, [3, 4, 5])], 1.0)[0].sum().backward()
    assert found["gradients"] == sum(p.grad.nbytes for p in weights if p.grad is not None) > 0


def test_a_model_without_a_vision_tower_is_refused_in_one_line(tmp_path):
    from transformers import LlavaConfig

    LlavaConfig().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"model {tmp_path}: cannot be loaded"):
        memory.counted(GRPOConfig(model=str(tmp_path)), torch.float32)


@pytest.mark.parametrize(("rows", "group", "prompts"), [(7, 4, 3), (8, 4, 2), (4, 8, 1), (6, 4, 2)])
def test_the_rehearsal_has_as_many_prompts_as_a_micro_batch_can(base, rows, group, prompts):
    """By moving a window of `rows` slots over groups of `group`, in steps of `rows`."""
    config = GRPOConfig(micro_batch_size=rows, group_size=group, prompts_per_step=40)
    config.max_prompt_tokens = config.max_new_tokens = 2
    seen = [
        len({slot // group for slot in range(first, first + rows)})
        for first in range(0, 40 * group - rows, rows)
    ]
    assert max(seen) == prompts
    asked = []
    recorder = SimpleNamespace(
        eos_token_ids=[1],
        image_processor=None,
        device=torch.device("cpu"),
        parameters=lambda: [],
        logprobs=lambda batch, _: asked.extend(batch) or [torch.zeros(1, requires_grad=True)],
    )
    memory.rehearse(recorder, config, NEW)
    assert len(asked) == rows and len({id(encoded) for encoded, _ in asked}) == prompts
