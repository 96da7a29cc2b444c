"""What merging refuses, and its precision; that vLLM gets the same weights is in test_vllm.py."""

import json
from types import SimpleNamespace

import pytest
import torch

from commands import merge
from plumbing import UsageError
from worlds import cards


@pytest.fixture
def adapters(tmp_path, monkeypatch):
    folder = tmp_path / "adapters"
    folder.mkdir()
    stored = {"base_model_name_or_path": str(cards.BASE), "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(stored))
    monkeypatch.setattr(merge, "installed", lambda package: True)
    return folder


class Loaded(Exception):
    pass


@pytest.mark.parametrize(
    ("whole", "text", "dtype"),
    [
        (None, torch.bfloat16, "bf16"),  # as in the public Qwen3-VL
        (torch.bfloat16, None, "bf16"),
        (torch.float32, torch.float32, "fp32"),
    ],
)
def test_the_precision_is_the_bases(adapters, tmp_path, monkeypatch, whole, text, dtype):
    def load(path, device, found):
        raise Loaded(found)

    shape = SimpleNamespace(dtype=whole, get_text_config=lambda: SimpleNamespace(dtype=text))
    monkeypatch.setattr(merge, "config_of", lambda path: shape)
    monkeypatch.setattr(merge, "checked", lambda path: path)
    monkeypatch.setattr(merge, "Policy", load)
    with pytest.raises(Loaded, match=dtype):
        merge.main(adapters, tmp_path / "out")


def test_what_cannot_be_merged(adapters, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="holds no adapters; a whole model needs no merging"):
        merge.main(cards.BASE, tmp_path / "out")
    with pytest.raises(UsageError, match="exists; remove it, or choose another folder"):
        merge.main(adapters, tmp_path)
    monkeypatch.setattr(merge, "installed", lambda package: False)
    with pytest.raises(UsageError, match="adapters need peft; pip install -r requirements-gpu"):
        merge.main(adapters, tmp_path / "out")
