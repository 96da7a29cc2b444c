"""What a GPU changes, with one said to be there: no test here needs it."""

import os
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, group_of

import grpo
from autonpo import AutoNPOConfig, MistakePool, probe
from commands.evaluate import EvaluateConfig
from grpo import GRPOConfig
from npo import NPOConfig
from plumbing import UsageError, memory
from plumbing.files import read_jsonl
from plumbing.model import Policy
from plumbing.settings import RunConfig
from plumbing.vllm_sampler import TOLERANCE, VLLMSampler

GB = 10**9
NEED = {"weights": 16 * GB, "gradients": 15 * GB, "moments": 14 * GB}


@pytest.fixture
def card(monkeypatch):
    """Says that CUDA is there, and which packages are."""

    def there(*packages: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"H100 ({device})")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * GB, 80 * GB))
        monkeypatch.setattr("plumbing.settings.installed", lambda name: name in packages)
        monkeypatch.setattr(memory, "counted", lambda config, dtype: dict(NEED))

    return there


@pytest.mark.parametrize(
    ("flags", "dtype", "sampler"),
    [
        ({}, "fp32", "hf"),  # the cards world, as on a CPU
        ({"model": "staircase"}, "fp32", "hf"),
        ({"model": "some/model"}, "bf16", "vllm"),
        ({"model": "some/model", "sampler": "hf"}, "bf16", "hf"),
        ({"model": "some/model", "device": "cpu"}, "fp32", "hf"),
        ({"model": "some/model", "dataset": "cards"}, "fp32", "hf"),
        ({"dataset": "some.jsonl"}, "bf16", "vllm"),
    ],
)
def test_dtype_and_sampler_where_there_is_a_gpu(card, flags, dtype, sampler):
    card("vllm", "torchao")
    config = NPOConfig(**flags)
    assert (config.dtype, config.sampler) == (dtype, sampler)
    config.check()


def test_the_first_line_names_device_dtype_sampler_and_why(card):
    finds = re.escape(f"torch {torch.__version__} finds no CUDA")
    assert re.fullmatch(rf"device cpu \({finds}\) \| fp32 \| sampler hf", RunConfig().where)
    assert RunConfig(device="cpu").where == "device cpu | fp32 | sampler hf"
    card("vllm", "torchao")
    assert RunConfig(device="cpu").where == "device cpu | fp32 | sampler hf"
    assert RunConfig().where == "device H100 (None) | fp32 | sampler hf"
    assert RunConfig(model="a/b").where == "device H100 (None) | bf16 | sampler vllm"
    card("torchao")
    slow = "hf, many times slower than vllm, which is not installed: pip install -r requirements"
    where = EvaluateConfig(model="a/b", device="cuda:1").where
    assert where == f"device H100 (cuda:1) | bf16 | sampler {slow}-gpu.txt"


def test_what_is_missing_is_said_by_check(card):
    """That is before a model is loaded. Adapters are fp32 and need no torchao."""
    card("vllm")
    with pytest.raises(UsageError, match="bf16 .* torchao's AdamW: pip install .*-gpu.txt, or use"):
        GRPOConfig(model="some/model").check()
    EvaluateConfig(model="some/model").check()
    card("vllm", "peft")
    GRPOConfig(model="some/model", lora=4).check()
    GRPOConfig(**TINY).check()
    card("torchao")
    with pytest.raises(UsageError, match="--sampler vllm: vllm is not installed; pip install"):
        GRPOConfig(model="some/model", sampler="vllm").check()


def test_cudnn_attention_is_off_and_segments_may_grow():
    import plumbing.model  # noqa: F401, does both where it is imported

    assert not torch.backends.cuda.cudnn_sdp_enabled()
    # torch reads it when it first allocates, also where it was imported before
    assert "expandable_segments:True" in torch._C._accelerator_getAllocatorSettings()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, ""),  # 45 of 70 in the update; 0.35 * 80 + 30 while vLLM samples
        ({"vllm_memory": 0.19}, r"weights 14.9, gradients 14.0, moments 13.0 GiB, vLLM 0.19 of"),
        ({"vllm_memory": 0.51}, "--lora 64"),  # 0.51 * 80 + 30: vLLM's share is of all 80
        ({"vllm_memory": 0.51, "sampler": "hf"}, ""),
        ({"device": "cuda:7"}, "--device cuda:7: there are 2 GPUs"),
        ({"card_gb": 46}, "42.8 of its 74.5 GiB can be used, and that is too little"),
        ({"card_gb": 47}, ""),  # vLLM: 16.45 for 16
        ({"card_gb": 44, "sampler": "hf"}, r"moments 13.0 GiB\)"),
        ({"card_gb": 44, "dry_run": True}, ""),
        ({"card_gb": 0.0}, "--card-gb 0.0: must be above 0"),
    ],
)
def test_too_little_memory_is_said_before_a_model_is_loaded(card, flags, message):
    card("vllm", "torchao")
    config = GRPOConfig(model="some/model", **flags)
    if message:
        with pytest.raises(UsageError, match=message):
            config.check()
    else:
        config.check()


def test_a_smaller_card_is_emulated(card, monkeypatch, capsys):
    """vLLM's 8 GB go on being counted by torch while it sleeps."""
    card("vllm", "torchao")
    shares = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    small, large = GRPOConfig(model="a/b", card_gb=24), GRPOConfig(model="a/b")
    assert small.vllm_share == pytest.approx(0.35 * 24 / 80) and large.vllm_share == 0.35
    memory.limit(small, 8 * GB)
    memory.limit(large, 8 * GB)
    assert shares == [pytest.approx(32 / 80)] and capsys.readouterr().out == ""
    memory.limit(small, 57 * GB)
    assert len(shares) == 1 and "--card-gb 24: not enforced" in capsys.readouterr().out


def test_a_card_to_emulate_needs_one():
    with pytest.raises(UsageError, match="--card-gb 24: there is no GPU; use --dry-run"):
        GRPOConfig(card_gb=24.0).check()


def test_a_probe_is_asked_to_its_end():
    """There vLLM goes to sleep: Q and V need the GPU's memory."""
    ended = []

    def ask(prompts, rows, samples, *key):
        yield from (group_of([1.0, 0.0]) for _ in rows)
        ended.append(rows)

    run = SimpleNamespace(ask=ask, step=8, train_prompts=None, sampled_tokens=0)
    groups = probe(run, MistakePool({3: 1, 5: 2, 7: 2}), AutoNPOConfig(probe_prompts=2))
    assert [list(groups)] == ended and len(groups) == 2 and run.sampled_tokens == 8


def test_peaks(monkeypatch, card):
    """The trainer's own: vLLM's 20 GiB are torch tensors, too."""
    card()
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 60 * memory.GIB)
    found = {"memory_gib/trainer": 40, "memory_gib/all": pytest.approx(10 * GB / memory.GIB)}
    assert memory.peaks(3.0, 20 * memory.GIB) == found
    assert memory.peaks(70.5, 0) == {"memory_gib/trainer": 60, "memory_gib/all": 70.5}


class Engine:
    """Stands in for vLLM: the policy samples, and what is asked of the engine is noted."""

    held, difference, compared = 20 * memory.GIB, 0.25, 1.0

    def __init__(self, policy, noted):
        self.policy, self.noted = policy, noted

    def sample(self, prompts, *words):
        self.noted.append("sample")
        return self.policy.sample(prompts, *words)

    def sleep(self):
        self.noted.append("sleep")


def test_vllm_sleeps_in_every_update_and_in_the_rehearsal(card, tmp_path, tiny, monkeypatch):
    """A run on a GPU that is only said to be there, by the order of what happens on it."""
    card("vllm")
    noted, policy_of, update = [], Policy, grpo.update
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: noted.append(name.split("_")[0]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 60 * memory.GIB)
    monkeypatch.setattr("plumbing.run.Policy", lambda path, _, *more: policy_of(path, "cpu", *more))
    monkeypatch.setattr(
        "plumbing.run.sampler_of", lambda policy, *_: noted.append("sync") or Engine(policy, noted)
    )
    monkeypatch.setattr(memory, "fits", lambda *words: noted.append("rehearse") or True)
    monkeypatch.setattr(grpo, "update", lambda *words: noted.append("update") or update(*words))
    flags = tiny | {"eval_every": 2, "eval_prompts": 2, "eval_samples": 1}
    config = GRPOConfig(out=str(tmp_path), steps=3, sampler="vllm", **flags)
    config.check()
    grpo.train(config, tmp_path)
    step, evaluation = "sample sleep update sync", "sample sleep"  # reset is before each sleep
    expected = f"sync sleep rehearse empty {evaluation} {step} {step} {evaluation} {step}"
    assert " ".join(word for word in noted if word != "reset") == f"{expected} {evaluation}"
    assert all(noted[place - 1] == "reset" for place, w in enumerate(noted) if w == "sleep")
    _, *lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["memory_gib/trainer"] for line in lines] == [40, 40, 40]
    assert lines[0]["memory_gib/all"] == pytest.approx(10 * GB / memory.GIB)


@pytest.mark.parametrize(("tokens", "stops"), [(1, False), (16, True)])
def test_the_probe_stops_a_run_by_its_mean(base, prompts, monkeypatch, tokens, stops):
    """0.7 nats of one token in 16 are 0.04 on average; 0.3 is allowed in bf16."""
    groups = base.sample([prompts[0]], 1, 16, 1.0, seed=3)
    (completion,) = groups[0].completions
    assert len(completion.token_ids) == 16
    shifted = [value - 0.7 * (t < tokens) for t, value in enumerate(completion.behavior_logprobs)]
    completion.behavior_logprobs = shifted
    nothing, engine = (lambda *words, **options: True), object.__new__(VLLMSampler)
    caches = SimpleNamespace(reset_mm_cache=nothing, reset_encoder_cache=nothing)
    engine.llm = SimpleNamespace(
        collective_rpc=nothing, reset_prefix_cache=nothing, llm_engine=caches
    )
    engine.llm.apply_model = lambda function: [{}]
    engine.asleep, engine.image_processor = False, None
    monkeypatch.setattr(engine, "sample", lambda *words, **options: groups)
    monkeypatch.setitem(TOLERANCE, torch.float32, TOLERANCE[torch.bfloat16])
    if stops:
        with pytest.raises(RuntimeError, match="and the mean difference is 0.7000. The sync"):
            engine.sync(base, [], 1.0)
    else:
        engine.sync(base, [], 1.0)
    assert engine.difference == pytest.approx(0.7, abs=1e-3)
