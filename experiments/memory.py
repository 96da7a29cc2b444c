"""Peak memory of `Policy.logprobs`, forward and backward, against vocabulary and completion tokens.

    python experiments/memory.py      # prints markdown; draws assets/memory.png; two minutes on one core

For each vocabulary there is a tiny Qwen3-VL with random weights, so that logits are most of what it computes. On the CPU each
case is a fork of this process: after a small step to warm up, the rise of the most memory that was ever resident. On CUDA,
where there is one, it is what the allocator handed out at most. "All at once" is the same function without its chunks and their
checkpoints, as logits are usually computed; cases with more than `LIMIT` bytes of them are left out.
"""

import ctypes
import multiprocessing
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent.parent))
import cards
import policy as module
from policy import VOCABULARY_CHUNK, Inputs, Policy

VOCABULARIES = (2_048, 8_192, 32_768, 151_936)  # the last is Qwen3-VL's
TOKENS = (256, 512, 1_024, 2_048, 4_096)  # in a micro-batch of ROWS completions
ROWS = 32
LIMIT = 3 * 2**29  # 1.5 GiB of fp32 logits, of which some copies live at once
MIB = 2**20


def tiny(vocabulary: int, folder: str) -> None:
    """Saves a random Qwen3-VL with the tiny base's tokenizer, whose ids are the vocabulary's first ones."""
    base = Qwen3VLConfig.from_pretrained(cards.BASE)
    text = base.text_config.to_dict() | {"vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 64,
                                         "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1,
                                         "max_position_embeddings": 4096}  # fmt: skip
    vision = base.vision_config.to_dict() | {"out_hidden_size": 64}
    config = base.to_dict() | {"text_config": text, "vision_config": vision}
    shutil.copytree(cards.BASE, folder, dirs_exist_ok=True)
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config)).save_pretrained(folder)


def step(policy: Policy, tokens: int) -> None:
    """Log-probs of ROWS completions to one prompt, and their gradient."""
    prompt = Inputs([10] * 4)
    logprobs, _ = policy.logprobs([(prompt, [11] * (tokens // ROWS)) for _ in range(ROWS)], 1.0)
    logprobs.mean().backward()


def at_once(policy: Policy, tokens: int) -> None:
    """`step` with the logits of all tokens in one piece, and kept."""
    chunk, checkpoint = module.VOCABULARY_CHUNK, module.checkpoint
    module.VOCABULARY_CHUNK, module.checkpoint = tokens, lambda project, *values, use_reentrant: project(*values)
    step(policy, tokens)
    module.VOCABULARY_CHUNK, module.checkpoint = chunk, checkpoint


def resident() -> int:
    """The most bytes that this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def case(policy: Policy, tokens: int, work, answer) -> None:
    """What a fork does."""
    step(policy, ROWS)  # gradients are allocated, libraries paged in
    before = resident()
    work(policy, tokens)
    answer.put(resident() - before)


def peak(policy: Policy, tokens: int, work) -> float:
    """MiB of `work` at most, beyond the weights and their gradients."""
    if policy.device.type == "cuda":
        step(policy, ROWS)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work(policy, tokens)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    fork = multiprocessing.get_context("fork")
    answer = fork.SimpleQueue()
    process = fork.Process(target=case, args=(policy, tokens, work, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{tokens} tokens: the process ended with {process.exitcode} (-9: out of memory)")
    return answer.get() / MIB


def table(device: str) -> dict[int, list[tuple[int, float, float | None]]]:
    """Prints a markdown table; returns, by vocabulary, (tokens, peak, peak of all logits at once) in MiB."""
    print(f"\n| {device}: vocabulary | tokens | fp32 logits, MiB | peak of `Policy.logprobs`, MiB | all logits at once, MiB |")
    print("|---|---|---|---|---|")
    found = {}
    for vocabulary in VOCABULARIES:
        with tempfile.TemporaryDirectory() as folder:
            tiny(vocabulary, folder)
            policy = Policy(folder, device, "fp32")
        found[vocabulary] = []
        for tokens in TOKENS:
            logits, mine = 4 * vocabulary * tokens, peak(policy, tokens, step)
            theirs = peak(policy, tokens, at_once) if logits <= LIMIT else None
            found[vocabulary].append((tokens, mine, theirs))
            shown = "left out" if theirs is None else f"{theirs:,.0f}"
            print(f"| {vocabulary:,} | {tokens:,} | {logits / MIB:,.0f} | {mine:,.0f} | {shown} |", flush=True)
    return found


def draw(found: dict) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, (vocabulary, points) in enumerate(found.items()):
        tokens, mine, theirs = zip(*points)
        axes.plot(tokens, mine, f"C{number}o-", label=f"V = {vocabulary:,}")
        axes.plot(tokens, [float("nan") if value is None else value for value in theirs], f"C{number}x--")
    axes.axvline(VOCABULARY_CHUNK, color="gray", linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="completion tokens in a micro-batch", ylabel="peak memory, MiB",
             title="log-probs with gradient: in chunks (solid), all logits at once (dashed)")  # fmt: skip
    axes.set_xticks(TOKENS, [f"{number:,}" for number in TOKENS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(cards.BASE.parent / "memory.png", dpi=90)


def main() -> None:
    torch.set_num_threads(1)  # before anything is computed: a fork must find no other threads
    if sys.platform == "linux":  # M_MMAP_THRESHOLD: what is freed leaves no holes in a heap
        ctypes.CDLL(None).mallopt(-3, 1 << 16)
    found = table("cpu")
    if torch.cuda.is_available():  # only now: a process that has used CUDA must not fork
        found = table("cuda")
    draw(found)


if __name__ == "__main__":
    main()
