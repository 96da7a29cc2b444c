"""The arithmetic of `--dry-run`: against transformers' own models, against autograd, and by hand."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import cards
import memory_plan
from autonpo import AutoNPOConfig
from grpo import GRPOConfig
from memory_plan import (
    GIB,
    PUBLIC,
    RESERVE,
    activation_bytes,
    disk_bytes,
    model_config,
    parameters,
    plan,
    public_config,
    stretches,
)
from npo import NPOConfig
from policy import Inputs, Policy
from tasks import UsageError

EIGHT, FOUR, TWO = (f"Qwen/Qwen3-VL-{size}-Instruct" for size in ("8B", "4B", "2B"))
TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}


def tiny(tied: bool = False, deepstack: tuple = (0, 2), bias: bool = False, **text) -> Qwen3VLConfig:
    """Asymmetric in all that can be, with 3 vision blocks."""
    text = {"hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 5, "num_attention_heads": 4, "head_dim": 32,
            "num_key_value_heads": 2, "vocab_size": 300, "attention_bias": bias,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}} | text  # fmt: skip
    vision = {"hidden_size": 64, "intermediate_size": 160, "depth": 3, "num_heads": 2, "out_hidden_size": text["hidden_size"],
              "num_position_embeddings": 49, "deepstack_visual_indexes": deepstack}  # fmt: skip
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **TOKENS)


def settings(**changes) -> SimpleNamespace:
    """What the plan reads of GRPO's flags, on nobody's defaults."""
    flags = {
        "model": EIGHT, "dtype": "auto", "lora": 0, "train_vision": False, "gradient_checkpointing": "on", "sampler": "vllm",
        "vllm_memory": 0.35, "prompts_per_step": 8, "group_size": 8, "micro_batch_size": 4, "max_new_tokens": 4096,
        "max_prompt_tokens": 2048, "updates_per_batch": 1, "steps": 100, "eval_every": 5, "eval_prompts": 256,
        "eval_samples": 1, "save_every": 20, "keep": "all", "save_optimizers": "last", "out": "runs/x", "device": "auto",
    }  # fmt: skip
    return SimpleNamespace(**flags | changes)


# ------------------------------------------------------------------------------------------------------- parameters


CONFIGS = {name: public_config(name) for name in PUBLIC} | {
    "untied": tiny(), "tied": tiny(tied=True), "no deepstack": tiny(deepstack=()), "three deepstack": tiny(deepstack=(0, 1, 2)),
    "biased": tiny(bias=True), "as many keys as queries": tiny(num_key_value_heads=4, head_dim=16, vocab_size=77),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model(name):
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(CONFIGS[name])
    count = parameters(CONFIGS[name])
    vision = sum(p.numel() for p in model.model.visual.parameters())
    assert count["vision"] == vision
    assert count["language"] == sum(p.numel() for p in model.parameters()) - vision
    linear = [m for m in model.model.language_model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert count["adapters"] == sum(m.in_features + m.out_features for m in linear)
    for part, module in (("embeddings", model.model.language_model.embed_tokens), ("blocks", model.model.visual.blocks),
                         ("merger", model.model.visual.merger), ("deepstack", model.model.visual.deepstack_merger_list),
                         ("patches", model.model.visual.patch_embed),
                         ("layers", model.model.language_model.layers)):  # fmt: skip
        assert count[part] == sum(p.numel() for p in module.parameters()), part


def test_public_sizes_have_as_many_parameters_as_their_checkpoints():
    assert [parameters(public_config(name))["total"] for name in (EIGHT, FOUR, TWO)] == [8767123696, 4437815808, 2127532032]


def test_the_cards_model():
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(model_config("cards"))
    assert parameters(model_config("cards"))["total"] == sum(p.numel() for p in model.parameters())


def test_configurations_of_other_models(tmp_path):
    assert public_config("Qwen/Qwen3-VL-8B-Thinking") is None
    tiny().save_pretrained(tmp_path / "vl")
    assert parameters(model_config(str(tmp_path / "vl"))) == parameters(tiny())
    Qwen3Config(num_hidden_layers=1).save_pretrained(tmp_path / "text")
    with pytest.raises(UsageError, match="is a qwen3; the plan is for a Qwen3-VL"):
        model_config(str(tmp_path / "text"))
    with pytest.raises(
        UsageError, match="^--model nobody/knows: no configuration can be loaded .*, or one known here: Qwen"
    ) as it:
        model_config("nobody/knows")
    assert "\n" not in str(it.value)


# ----------------------------------------------------------------------------------------------------------- memory


SMALLEST = Qwen3VLConfig(
    text_config={"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 4,
                 "num_key_value_heads": 1, "vocab_size": 10},
    vision_config={"hidden_size": 4, "intermediate_size": 6, "depth": 1, "num_heads": 1, "patch_size": 2, "out_hidden_size": 8,
                   "temporal_patch_size": 1, "num_position_embeddings": 9, "deepstack_visual_indexes": (0,)},
)  # fmt: skip
FEW = {"dtype": "fp32", "sampler": "hf", "prompts_per_step": 2, "group_size": 3, "micro_batch_size": 2, "max_prompt_tokens": 5,
       "max_new_tokens": 7, "guide_samples": 5}  # fmt: skip


def test_a_plan_by_hand():
    """Seven linear maps of 480 weights, with norms 504 a layer; two layers, two tables of 80, a norm: 1,176. Vision: 1,098."""
    assert parameters(SMALLEST) == {
        "embeddings": 80, "layers": 1008, "last norm": 8, "head": 80, "patches": 52, "positions": 36, "blocks": 154,
        "merger": 416, "deepstack": 440, "language": 1176, "vision": 1098, "total": 2274, "adapters": 232,
    }  # fmt: skip
    found = plan(settings(**FEW), 10**10, SMALLEST)
    assert found["rows"] == [
        ("weights", 4 * 2274, 4 * 2274),
        ("gradients", 4 * 1176, 0),
        ("optimizer", 8 * 1176, 8 * 1176),
        # 2 prompts x 5 answers x 12 tokens, of 2 x 2 layers x 4 numbers; 40 patches of 448 bytes are more than decoding needs
        ("generate: keys and values *", 0, 120 * 64),
        ("generate: activations, logits *", 0, 40 * 448),
        # rows 3 and 4 of groups of three have two prompts: 10 + 14 tokens of 592 bytes, 34 keys of 64, a mask of 218 pairs
        ("activations, checkpointed *", 2 * (24 * 592 + 34 * 64 + 218 * 4) + 5 * 24 * 32, 0),
        ("logits of a chunk, head's gradient *", 14 * 10 * 20 + 4 * 80, 0),
        ("keys and values of prompts *", 2 * 10 * 64, 0),
        ("CUDA's own, and holes *", RESERVE, RESERVE),
    ]
    assert found["total"] == 65960 + RESERVE and found["missing"] == 0 and found["sequences"] is None
    assert plan(settings(**FEW), 65959 + RESERVE, SMALLEST)["missing"] == 1
    rows = plan(settings(**FEW | {"gradient_checkpointing": "off"}), 10**10, SMALLEST)["rows"]
    assert rows[5] == ("activations, not checkpointed *", 3 * (24 * 592 + 34 * 64 + 218 * 4) + 5 * 24 * 32, 0)
    assert rows[7] == ("keys and values of prompts *", 2 * 17 * 64, 0)


def test_a_plan_by_hand_with_adapters():
    """Rank 3: 3 x 232 = 696 parameters, in fp32 beside bf16 weights; no gradient of the head."""
    rows = plan(settings(**FEW | {"dtype": "bf16", "lora": 3}), 10**10, SMALLEST)["rows"]
    assert rows[:3] == [("weights", 2 * 2274 + 4 * 696, 2 * 2274 + 4 * 696), ("gradients", 4 * 696, 0),
                        ("optimizer", 8 * 696, 8 * 696)]  # fmt: skip
    assert rows[6][1] == 14 * 10 * (16 + 2)
    assert disk_bytes(settings(**FEW | {"lora": 3, "steps": 41}), SMALLEST) == {"kept": 3, "total": 3 * 4 * 696 + 2 * 8 * 696}


def test_vllm_takes_its_share_and_has_room_for_its_own_weights_first():
    model, card = public_config(TWO), 40 * GIB
    token = 2 * 28 * 8 * 128 * 2
    found = plan(settings(model=TWO, vllm_memory=0.25), card)
    assert ("vLLM, 0.25 of the card", 10 * GIB, 10 * GIB) in found["rows"]
    assert found["sequences"] == (8 * GIB - 2 * parameters(model)["total"]) // (6144 * token)
    starved = settings(model=TWO, vllm_memory=0.1)
    assert plan(starved, card)["sequences"] == 0 and plan(starved, card)["missing"] > 0
    assert memory_plan.remedies(settings(model=TWO, vllm_memory=0.1, lora=8), card, model)[0][0] == "--vllm-memory 0.3"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("train_vision", [False, True])
def test_the_estimate_covers_what_autograd_keeps(tmp_path, dtype, train_vision):
    """And is at most half as much again; two prompts with images, four completions each."""
    shutil.copytree(cards.BASE, tmp_path, dirs_exist_ok=True)
    Qwen3VLForConditionalGeneration(tiny(tied=True)).save_pretrained(tmp_path)
    policy = Policy(tmp_path, "cpu", dtype, train_vision)
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    prompts = [Inputs([7, 7, 3, *[5] * 36, 4, 8], torch.randn(144, 1536), torch.tensor([[1, 12, 12]])) for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _ = policy.logprobs([(prompt, [9] * 40) for prompt in prompts for _ in range(4)], 1.0)
    config = settings(dtype=dtype, train_vision=train_vision, group_size=4, micro_batch_size=8, max_new_tokens=40,
                      max_prompt_tokens=41)  # fmt: skip
    assert sum(kept.values()) < activation_bytes(tiny(), config, checkpointing=False) < 1.5 * sum(kept.values())


# --------------------------------------------------------------------------------------------------- what to lower


def test_what_does_not_fit_names_the_flags_the_most_effective_first():
    config = settings(gradient_checkpointing="off", micro_batch_size=8)
    before = copy.deepcopy(config)
    found = memory_plan.remedies(config, int(125e9), public_config(EIGHT))
    assert [switch for switch, _ in found] == ["--gradient-checkpointing on", "--micro-batch-size 1"]
    assert found[0][1]["missing"] > 0 and found[1][1]["missing"] == 0
    assert config == before
    assert memory_plan.remedies(settings(), int(141e9), public_config(EIGHT)) == []


def test_the_order_is_that_of_the_effect_and_smaller_models_come_last():
    found = memory_plan.remedies(settings(), int(24e9), public_config(EIGHT))
    names = [switch.split()[0] for switch, _ in found]
    assert names[:2] == ["--lora", "--micro-batch-size"]
    assert found[-1][0] == f"--model {TWO}" and found[-1][1]["missing"] == 0
    missing = [plan(settings(), int(24e9))["missing"], *(then["missing"] for _, then in found)]
    assert missing == sorted(missing, reverse=True)


# ------------------------------------------------------------------------------------------ completions, checkpoints


def test_the_runs_of_each_method():
    shared = {"model": EIGHT, "prompts_per_step": 4, "group_size": 8, "guide_samples": 3, "scout_steps": 30}
    late = shared | {"plateau_start": 60, "plateau_end": 90}
    assert stretches(GRPOConfig(model=EIGHT, steps=70)) == [("training", 70, 0)]
    assert stretches(NPOConfig(**shared, steps=70)) == [("scout", 30, 0), ("training", 70, 30 * 12)]
    assert stretches(NPOConfig(**late, intervention="late")) == [("scout", 90, 0), ("replay", 30, 30 * 12)]
    assert stretches(NPOConfig(**late, intervention="early+late", steps=100)) == [
        ("scout", 30, 0), ("training", 90, 30 * 12), ("replay", 40, 30 * 12)]  # fmt: skip
    assert stretches(NPOConfig(**shared, steps=70, guided_until=50))[1] == ("training", 70, 50 * 12)
    assert stretches(NPOConfig(**shared, steps=70, guide="runs/a/checkpoints/step_000040")) == [("training", 70, 70 * 12)]
    assert stretches(NPOConfig(**shared, steps=70, guide="a.jsonl")) == [("training", 70, 0)]
    assert stretches(AutoNPOConfig(model=EIGHT)) == [("training", 300, 0)]


def test_completions_in_all():
    config = NPOConfig(model=EIGHT, prompts_per_step=4, group_size=8, guide_samples=3, scout_steps=30, steps=70, eval_every=20,
                       eval_prompts=50, eval_samples=2)  # fmt: skip
    assert memory_plan.completions(config) == [
        ("scout, 30 steps", 960), ("its guide cache", 360), ("training, 70 steps", 2240), ("8 evaluations", 800)]  # fmt: skip
    config = AutoNPOConfig(model=EIGHT, prompts_per_step=4, group_size=8, guide_samples=3, pool_size=20, max_distance=50,
                           save_every=10, probe_prompts=16, probe_samples=5)  # fmt: skip
    assert memory_plan.completions(config)[-1] == ("each rollback", 16 * 5 + 20 * 3 + 50 * 32)


@pytest.mark.parametrize("keep, optimizers, kept, states", [
    ("all", "all", 5, 5), ("all", "last", 5, 3), ("needed", "last", 3, 3), ("40", "all", 5, 5), ("7,40,60", "last", 6, 3),
])  # fmt: skip
def test_checkpoints_on_disk(keep, optimizers, kept, states):
    """A scout of 30 steps has 2 checkpoints, the run of 41 has 3; in bf16, with two moments of 8 bits and their scales."""
    config = settings(**FEW | {"dtype": "bf16"}, intervention="early", guide="", scout_steps=30, steps=41, keep=keep,
                      save_optimizers=optimizers)  # fmt: skip
    assert disk_bytes(config, SMALLEST) == {"kept": kept, "total": kept * 2 * 2274 + states * int(1176 * 2.03125)}


def test_a_late_run_keeps_the_step_that_it_goes_back_to():
    config = NPOConfig(model=EIGHT, sampler="hf", intervention="late", plateau_start=60, plateau_end=90)
    assert disk_bytes(config, public_config(EIGHT))["kept"] == 4  # it, the newest of scout and replay, one being written


def test_autonpo_keeps_what_it_can_go_back_to_and_loads_an_older_policy():
    config = AutoNPOConfig(model=EIGHT, max_distance=50, save_every=10, steps=300, sampler="hf")
    assert disk_bytes(config, public_config(EIGHT))["kept"] == 7
    assert ("AutoNPO: an older checkpoint", 0, 2 * 8767123696) in plan(config, 10**12)["rows"]


# -------------------------------------------------------------------------------------------------------------- show


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_show(no_gpu, capsys, tmp_path):
    memory_plan.show(NPOConfig(model=EIGHT, sampler="hf", out=str(tmp_path / "not" / "there")))
    shown = capsys.readouterr().out
    assert "8,767,123,696 parameters (8,190,735,360 language, 576,388,336 vision), 8,190,735,360 trained" in shown
    assert "8 prompts x 8 slots = 64 completions/step = 16 micro-batches of 4 -> 1 optimizer step(s)" in shown
    assert "at most 262,144 tokens/step, and 32,768 of prompts" in shown
    assert "estimated from above, not measured" in shown
    assert not (tmp_path / "not").exists()


def test_show_says_what_does_not_fit(no_gpu, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    memory_plan.show(settings(gradient_checkpointing="off", out=str(tmp_path)))
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown and "--gradient-checkpointing on" in shown
    assert "it fits on: none" in shown
    assert "DISK TOO SMALL" in shown and "--keep needed" in shown


def test_show_takes_the_card_that_is_here(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = SimpleNamespace(name="NVIDIA Somewhat", total_memory=48 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    memory_plan.show(settings(model=TWO, lora=16))
    assert f"{'card (NVIDIA Somewhat)':50}{48:10.1f}" in capsys.readouterr().out
