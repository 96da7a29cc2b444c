"""What a GPU changes, with one said to be there: no test here needs it."""

import os
import re

import pytest
import torch
from conftest import TINY

from commands.evaluate import EvaluateConfig
from grpo import GRPOConfig
from npo import NPOConfig
from plumbing import UsageError
from plumbing.settings import RunConfig


@pytest.fixture
def card(monkeypatch):
    """Says that CUDA is there, and which packages are."""

    def there(*packages: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"H100 ({device})")
        monkeypatch.setattr("plumbing.settings.installed", lambda name: name in packages)

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
