"""experiments/gpu_check.py, at its tiny size on a CPU; what only a GPU can tell is not tested."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import gpu_check

from policy import Completion, Inputs

PHASES = ["the card", "random weights", "load", "sampling, transformers", "forward, backward", "optimizer",
          "NPO step, transformers", "the paper's sizes, extrapolated"]  # fmt: skip


@pytest.fixture
def check(tmp_path):
    """A tiny check that has done nothing yet."""
    return gpu_check.Check(gpu_check.Flags(model="tiny", out=str(tmp_path)), "hf", first=False)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "gpu_check.jsonl").read_text().splitlines()]


def test_every_phase_runs_on_a_cpu(command, tmp_path):
    done = command("experiments/gpu_check.py", "--model", "tiny", "--out", tmp_path)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| tiny")]
    assert [row[1] for row in rows] == PHASES
    assert all(row[4] == "n/a" and row[5] == "n/a |" for row in rows)  # memory: a GPU's alone
    found = {line["phase"]: line for line in lines(tmp_path)}
    assert list(found) == PHASES and not any("failed" in line["result"] for line in found.values())
    step, optimizer = found["NPO step, transformers"], found["optimizer"]["seconds"]
    assert step["tokens"] == found["sampling, transformers"]["tokens"] == 2 * 4 * 8  # no EOS: one of 151,936 tokens
    assert step["seconds"] == pytest.approx(step["sampling"] + step["update"] + step["sync"])
    per_token = (step["sampling"] + max(0, step["update"] - optimizer)) / 64
    hours = 100 * (256 * 8 * 4096 * per_token + optimizer + step["sync"]) / 3600
    assert found["the paper's sizes, extrapolated"]["hours"] == pytest.approx(hours)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_check.jsonl"]  # the random weights are gone


def test_vllm_too(command, tmp_path):
    pytest.importorskip("vllm", reason="pip install -r requirements-vllm.txt")
    command("experiments/gpu_check.py", "--model", "tiny", "--sampler", "both", "--lora", "2", "--out", tmp_path)
    found = lines(tmp_path)
    assert not any("failed" in line["result"] or "not run" in line["result"] for line in found)
    assert [line["phase"] for line in found[:8]] == PHASES and len(found) == 8 + 9
    assert found[-2]["phase"] == "NPO step, vLLM" and found[-2]["tokens"] == 64 and found[-2]["sync"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(command, tmp_path):
    done = command("experiments/gpu_check.py", "--out", tmp_path / "out", check=False)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    last = done.stderr.splitlines()[-1]  # libraries may have warned before
    assert last.startswith("error: ") and "--model tiny" in last and "Traceback" not in done.stderr


def test_what_does_not_fit_is_a_row_and_the_rest_goes_on(check, tmp_path, capsys):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.32 GiB. GPU 0 has a total capacity of 23.6 GiB")

    def refused():  # in vLLM's words
        raise ValueError(
            "Free memory on device cuda:0 (20.1/80.0 GiB) on startup is less than desired GPU memory utilization (0.35)"
        )

    check.phase("load", full)
    check.phase("engine", refused)
    check.phase("sampling", pytest.fail, "policy")  # what `load` would have left
    assert not check.failed  # not to fit is an answer
    check.phase("optimizer", lambda: 1 / 0)
    check.phase("step", lambda: {"result": "fine", "seconds": 1.5})
    assert check.failed
    assert [line["result"] for line in lines(tmp_path)] == [
        "does not fit: needs more. Tried to allocate 2.32 GiB",
        "does not fit: needs more. Free memory on device cuda:0 (20.1/80.0 GiB) on startup is less than desired GPU memory "
        "utilization (0.35)",
        "not run: it needs what failed above",
        "failed: ZeroDivisionError('division by zero')",
        "fine",
    ]
    printed = capsys.readouterr()
    assert "| tiny | step | fine | 1.5 | n/a | n/a |" in printed.out and "ZeroDivisionError" in printed.err


def test_memory_is_each_phase_s_own(check, tmp_path, monkeypatch):
    called = []
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: called.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 6 * 2**30))  # free, total
    check.cuda = True
    check.phase("load", lambda: {"result": "fine", "seconds": check.timed(lambda: called.append("work"))[0]})
    assert called == ["empty_cache", "reset_peak_memory_stats", "synchronize", "work", "synchronize"]
    assert (lines(tmp_path)[0]["peak_gib"], lines(tmp_path)[0]["used_gib"]) == (3, 5)


def test_useful_flops(check, base):
    check.policy = SimpleNamespace(model=base.model)
    first, second = (Inputs([1] * length, torch.zeros(patches, 1)) for length, patches in ((5, 8), (3, 4)))
    answer = Completion("", [7, 8], [-1.0, -1.0], "", False)
    rows = [(first, answer, 1.0), (first, answer, 1.0), (second, answer, 1.0)]  # 6 answer tokens, 8 of prompts, 12 patches
    model = base.model.model
    layers = sum(parameter.numel() for parameter in model.language_model.layers.parameters())
    blocks = sum(
        parameter.numel() for part in (model.visual.patch_embed, model.visual.blocks) for parameter in part.parameters()
    )
    mergers = [model.visual.merger, model.visual.deepstack_merger_list]
    merged = sum(parameter.numel() for part in mergers for parameter in part.parameters())
    head = base.model.lm_head.weight.numel()
    assert check.useful_flops(rows) == 6 * 14 * layers + 6 * 6 * head + 2 * 12 * blocks + 2 * 3 * merged
    check.flags.lora = 3
    adapters = sum(3 * sum(part.weight.shape) for name, part in model.language_model.named_modules() if name.endswith("_proj"))
    expected = 14 * (4 * layers + 6 * adapters) + 4 * 6 * head + 2 * 12 * blocks + 2 * 3 * merged
    assert check.useful_flops(rows) == expected


def test_random_weights_are_sane_and_of_the_public_shapes(check):
    check.build()
    check.load()
    config = check.policy.model.config
    assert (config.text_config.vocab_size, config.text_config.max_position_embeddings) == (151_936, 262_144)
    assert check.policy.model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.01)
    inputs = check.policy.encode(check.prompts[0])
    assert inputs.token_ids.count(config.image_token_id) == (448 // 32) ** 2
    assert check.policy.image_processor.size == {"shortest_edge": 2**16, "longest_edge": 2**24}
    assert check.policy.eos_token_ids == [check.policy.tokenizer.eos_token_id]
