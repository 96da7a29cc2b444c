"""What a GPU makes of it: memory, sampling, training and whole NPO steps at Qwen3-VL's real shapes. Nothing is downloaded.

    python experiments/gpu_check.py                      # the 8B, bf16, on the GPU that is here
    python experiments/gpu_check.py --all                # and the 4B and the 2B
    python experiments/gpu_check.py --lora 64 --sampler hf
    python experiments/gpu_check.py --model tiny         # the same code at a tiny size, on a CPU

The model has the public configuration and random weights (normal, std 0.02): times and memory are those of the real one, answers
are noise. Any token is about as likely as any other, so that EOS hardly ever comes and answers have the length that is asked
for. Rewards are drawn at random too, and one answer of each group plays the guide. It prints one markdown table, and appends
a JSON line for each row to OUT/gpu_check.jsonl. What it is compared with comes from the same run, never from a table of cards:

- The card's peak is that of a large matmul in the weights' dtype, its bandwidth that of a large copy, reads and writes counted.
- Decoding is bounded by what it must read: once a step all weights of the language model (without the embedding table, of which
  it looks up single rows), and every sequence's keys and values, of which half an answer is there on average. Time for
  the prompts counts as the sampler's, so that its share of the bound is a little too low.
- Useful FLOPs: a parameter costs 2 a token forward, 2 for the gradient of the layer's input and 2 for its own: 6 where it is trained,
  4 in the frozen language model under LoRA, 2 in the frozen vision tower (there a token is a patch, or four of them merged).
  Prompts count as often as they are computed, the head for answers alone. What checkpointing computes again does not
  count, nor do attention's own products, for which the share is a little too low.

Memory is the most that PyTorch handed out during a phase, and what is in use on the whole card at its end: what PyTorch keeps in
reserve, CUDA's context, and other processes, too. vLLM lives in this process, its weights and cache count as PyTorch's.
"""

import datetime
import gc
import importlib.metadata
import json
import multiprocessing
import random
import re
import shutil
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy
import torch
import tyro
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessorPil, Qwen3VLConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
import cards
import vllm_sampler
from grpo import policy_loss, update
from large import make_optimizer
from memory_plan import GIB, PUBLIC, cache_bytes, parameters, public_config
from npo import NPOConfig, guide_use, replace_slot
from policy import SHARD, VIDEO_CONFIG, Completion, Group, Policy, load_tokenizer
from run import sampler_of
from tasks import Prompt, UsageError

PIXELS = 448  # an image's width and height: 28 x 28 patches, 196 tokens
TIMED = 8  # micro-batches of forward and backward, after one to warm up
PAPER = {"prompts": 256, "slots": 8, "tokens": 4096, "steps": 100}  # tokens: at most
TINY_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 32}  # fmt: skip
TINY_VISION = {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 1, "deepstack_visual_indexes": [0, 1],
               "out_hidden_size": 64}  # fmt: skip


@dataclass
class Flags:
    model: str = next(iter(PUBLIC))  # whose shapes; the 8B, 4B or 2B by its hub id, or "tiny"
    all: bool = False  # all three of them
    sampler: Literal["auto", "hf", "vllm", "both"] = "auto"  # each in a process of its own [both on cuda with vllm, else hf]
    prompts: int = 0  # P, with an image each [16; tiny 2]
    group_size: int = 0  # G [8; tiny 4]
    new_tokens: int = 0  # T [512; tiny 8]
    micro_batch_size: int = 4  # sequences in one forward and backward
    lora: int = 0  # rank of LoRA adapters, trained instead of the weights
    vllm_memory: float = 0.35  # share of the card for vLLM's weights and cache
    device: Literal["auto", "cuda", "cpu"] = "auto"  # cpu means tiny [cpu for tiny, else cuda]
    out: str = "runs/gpu_check"  # gpu_check.jsonl, and while it is needed the folder of random weights (17.5 GB for the 8B)
    keep: bool = False  # leave the random weights there, for the next time

    def __post_init__(self):
        self.model = "tiny" if self.device == "cpu" else self.model
        tiny = self.model == "tiny"
        self.device = self.device if self.device != "auto" else "cpu" if tiny else "cuda"
        self.prompts = self.prompts or (2 if tiny else 16)
        self.group_size = self.group_size or (4 if tiny else 8)
        self.new_tokens = self.new_tokens or (8 if tiny else 512)

    def config(self, sampler: str) -> NPOConfig:
        return NPOConfig(
            model=str(self.folder()), dataset="random", sampler=sampler, prompts_per_step=self.prompts, lora=self.lora,
            group_size=self.group_size, max_new_tokens=self.new_tokens, micro_batch_size=self.micro_batch_size,
            vllm_memory=self.vllm_memory, device=self.device, dtype="bf16" if self.device == "cuda" else "fp32",
        )  # fmt: skip

    def folder(self) -> Path:
        return Path(self.out) / f"random-{self.model.rpartition('/')[2]}-{self.device}"


# ------------------------------------------------------------------------------------------------------------- the table


class Table:
    """Runs phases one after another; each is a row, printed as soon as it is there, and a line of a file."""

    columns = ("model", "phase", "result", "seconds", "most of PyTorch, GiB", "card in use, GiB")

    def __init__(self, flags: Flags, sampler: str, first: bool):
        self.device, self.path, self.failed = torch.device(flags.device), Path(flags.out) / "gpu_check.jsonl", False
        versions = {name: version_of(name) for name in ("torch", "transformers", "vllm")}
        card = f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / GIB:.1f} GiB" if self.cuda else "no GPU: CPU"
        about = {"date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", "card": card, **versions}
        self.facts = about | asdict(flags) | {"sampler": sampler}
        if first:
            print(f"\n{about['date']}, {card}, " + ", ".join(f"{name} {number}" for name, number in versions.items()), end="")
            print(f"; {flags.prompts} prompts x {flags.group_size} x {flags.new_tokens} tokens, {flags.lora or 'no'} LoRA\n")
            print(f"| {' | '.join(self.columns)} |\n|{'---|' * len(self.columns)}", flush=True)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def phase(self, name: str, work, *needed) -> dict | None:
        """What `work()` finds: {"result": text, "seconds": of what was timed, ...}; None if it, or what it needs, failed."""
        if any(value is None for value in needed):
            return self.row(name, {"result": "not run: what it needs did not"}, done=False)
        self.clean()
        found = None
        try:
            found = work()
            self.synchronize()
        except torch.OutOfMemoryError as error:
            more = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
            failure = f"does not fit: needs {more[1] if more else first_line(error)} beside what is in use"
        except Exception as error:
            if re.search(r"memory[ _]utilization", str(error)):  # vLLM's own checks, each with the numbers
                failure = f"does not fit: {first_line(error)}"
            else:
                self.failed, failure = True, f"failed: {type(error).__name__}: {first_line(error)}"
                traceback.print_exc()
        return self.row(name, {"result": failure} if found is None else found, done=found is not None)

    def row(self, name: str, found: dict, done: bool = True) -> dict | None:
        memory = {"peak_gib": None, "used_gib": None}
        if self.cuda and "not run" not in found["result"]:
            free, total = torch.cuda.mem_get_info()
            memory = {"peak_gib": torch.cuda.max_memory_allocated() / GIB, "used_gib": (total - free) / GIB}
        line = {"phase": name, **found, **memory}
        cells = [f"{line[key]:.3g}" if key == "seconds" else f"{line[key]:.1f}" if line.get(key) is not None else "n/a"
                 for key in ("seconds" if "seconds" in line else "", *memory)]  # fmt: skip
        result = found["result"].replace("|", "/")
        print(f"| {' | '.join([self.facts['model'].rpartition('/')[2], name, result, *cells])} |", flush=True)
        plain = {key: value for key, value in line.items() if isinstance(value, str | int | float | None)}
        with open(self.path, "a") as file:
            file.write(json.dumps(self.facts | plain | {"done": done}) + "\n")
        self.clean()
        return found if done else None

    def clean(self) -> None:
        """What a phase left goes, so that the next one's memory is its own."""
        gc.collect()
        if self.cuda:
            self.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def synchronize(self) -> float:
        """The time when all that was asked of the card is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, work):
        began = self.synchronize()
        value = work()
        return self.synchronize() - began, value


def version_of(package: str) -> str:
    for name in (package, f"{package}-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


# ------------------------------------------------------------------------------------------------------- what is measured


def card(table: Table, dtype: torch.dtype) -> dict:
    size, count, rounds = (8192, 2**29, 20) if table.cuda else (256, 2**22, 2)

    def fastest(work) -> float:
        def repeated():
            for _ in range(rounds):
                work()

        return min(table.timed(repeated)[0] for _ in range(6)) / rounds  # the first one warms up

    left, right = torch.randn(2, size, size, device=table.device, dtype=dtype)
    product = torch.empty_like(left)
    flops = 2 * size**3 / fastest(lambda: torch.mm(left, right, out=product))
    source = torch.zeros(count, device=table.device, dtype=dtype)
    target = torch.empty_like(source)
    bandwidth = 2 * count * dtype.itemsize / fastest(lambda: target.copy_(source))
    return {"result": f"{str(dtype)[6:]} matmul of {size:,} x {size:,}: {flops / 1e12:.3g} TFLOP/s; copy: {bandwidth / 1e9:.4g} GB/s",
            "flops": flops, "bandwidth": bandwidth}  # fmt: skip


def build(flags: Flags, dtype: torch.dtype) -> dict:
    """Saves a model with random weights, with all that Policy and vLLM read beside them; the tiny base's tokenizer names the ids."""
    folder, tokenizer = flags.folder(), load_tokenizer(cards.BASE)
    if folder.is_dir():
        return {"result": f"found in {folder}"}
    tiny = flags.model == "tiny"
    shape = public_config(next(iter(PUBLIC)) if tiny else flags.model)
    text, vision = shape.text_config.to_dict(), shape.vision_config.to_dict()
    if tiny:
        rope = text["rope_parameters"] | {"mrope_section": [8, 4, 4]}
        text, vision = text | TINY_TEXT | {"rope_parameters": rope}, vision | TINY_VISION
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    base = Qwen3VLConfig.from_pretrained(cards.BASE)
    marks = {key: value for key, value in base.to_dict().items() if key.endswith("_token_id")}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape.tie_word_embeddings, **marks)
    need, free = dtype.itemsize * parameters(config)["total"], shutil.disk_usage(folder.parent).free
    if need > free:
        raise UsageError(f"--out {flags.out}: {need / 1e9:.1f} GB of weights, and {free / 1e9:.1f} GB free")
    torch.manual_seed(0)
    with torch.device(flags.device):  # drawn there: billions of random numbers take minutes on a CPU
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    processor = Qwen2VLImageProcessorPil(  # Qwen3-VL's own limits, in pixels; vLLM tries the largest image, too large for a CPU
        patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 2**16, "longest_edge": 2**20 if tiny else 2**24},
    )  # fmt: skip
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    model.save_pretrained(aside, max_shard_size=SHARD)
    for part in (tokenizer, processor):
        part.save_pretrained(aside)
    shutil.copy(cards.BASE / VIDEO_CONFIG, aside)  # vLLM insists on one
    aside.rename(folder)  # a kill leaves no half of it under its name
    return {"result": f"{need / 1e9:.3g} GB in {folder}"}


def pictures(count: int) -> list[Prompt]:
    """Prompts with an image of noise each, all of the same length but for their digits."""
    noise = numpy.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, (PIXELS, PIXELS, 3), dtype=numpy.uint8)) for _ in range(count)]
    return [Prompt(f"random:{n}", cards.messages(cards.Hand(n, ())), [image], "0") for n, image in enumerate(images)]


def sampling(table: Table, sampler, policy: Policy, prompts: list[Prompt], config: NPOConfig, bandwidth: float) -> dict:
    def sample(some, tokens):
        return sampler.sample(some, config.group_size, tokens, config.temperature, seed=0)

    sample(prompts[config.prompts_per_step :], min(8, config.max_new_tokens))  # warms up, with images that no cache shall know
    seconds, groups = table.timed(lambda: sample(prompts[: config.prompts_per_step], config.max_new_tokens))
    model, count = policy.model.config, parameters(policy.model.config)
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
    rate, keys = sum(lengths) / seconds, len(groups[0].inputs.token_ids) + config.max_new_tokens / 2
    weights = policy.dtype.itemsize * (count["layers"] + model.text_config.vocab_size * model.text_config.hidden_size)
    cache = len(lengths) * keys * cache_bytes(model, config)
    bound = len(lengths) * bandwidth / (weights + cache)
    return {"result": f"{rate:,.0f} tokens/s, {rate / bound:.1%} of {bound:,.0f} (each token of {len(lengths)} sequences reads "
                      f"{weights / 1e9:.3g} GB of weights and {cache / 1e9:.3g} of keys and values); {sum(lengths):,} tokens of "
                      f"{len(lengths) * config.max_new_tokens:,}", "seconds": seconds, "tokens": sum(lengths), "rate": rate,
            "bound": bound}  # fmt: skip


def useful_flops(policy: Policy, lora: int, rows: list[tuple]) -> float:
    """Of a micro-batch's forward and backward, as the docstring above counts them; rows as in `policy_loss`."""
    model, count = policy.model.config, parameters(policy.model.config)
    prompts = {id(inputs): inputs for inputs, *_ in rows}.values()
    answers, read = sum(len(completion.token_ids) for _, completion, _ in rows), sum(len(one.token_ids) for one in prompts)
    patches, each = sum(len(one.pixel_values) for one in prompts), 4 if lora else 6
    language = (answers + read) * (each * count["layers"] + 6 * lora * count["adapters"])
    head = answers * each * model.text_config.vocab_size * model.text_config.hidden_size
    merged = patches / model.vision_config.spatial_merge_size**2
    tower = 2 * (patches * (count["patches"] + count["blocks"]) + merged * (count["merger"] + count["deepstack"]))
    return language + head + tower


def training(table: Table, policy: Policy, prompts: list[Prompt], config: NPOConfig, peak: float) -> dict:
    """Gradients stay, for the optimizer. The answers are drawn here, so that no sampler has to fit before."""
    draw, length = random.Random(0), config.max_new_tokens
    alike = [-torch.tensor(float(policy.model.config.text_config.vocab_size)).log().item()] * length
    rows = [(inputs, Completion(prompt.id, [draw.randrange(10, 40) for _ in range(length)], alike, "", False), 1.0)
            for prompt in prompts[: config.prompts_per_step] for inputs in [policy.encode(prompt)]
            for _ in range(config.group_size)]  # fmt: skip
    some = [rows[first : first + config.micro_batch_size] for first in range(0, len(rows), config.micro_batch_size)]
    warm, timed = some[0], some[1 : 1 + TIMED] or some

    def work(batches):
        for batch in batches:
            policy_loss(policy, batch, config, len(rows))[0].backward()

    work([warm])
    seconds, _ = table.timed(lambda: work(timed))
    tokens = length * sum(map(len, timed))
    flops = sum(useful_flops(policy, config.lora, batch) for batch in timed) / seconds
    return {"result": f"{tokens / seconds:,.0f} answer tokens/s, {flops / 1e12:.3g} TFLOP/s useful, {flops / peak:.1%} of the matmul's",
            "seconds": seconds, "tokens": tokens, "rate": tokens / seconds, "useful_flops": flops}  # fmt: skip


def optimizer_step(table: Table, policy: Policy, config: NPOConfig) -> dict:
    optimizer = make_optimizer(policy.parameters(), config.lr, config.weight_decay)

    def work():
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()

    work()  # allocates the moments; torchao's compiles itself
    seconds, _ = table.timed(work)
    optimizer.zero_grad()
    return {"result": type(optimizer).__name__, "seconds": seconds, "optimizer": optimizer}


def give_rewards(groups: list[Group], seed: int) -> None:
    """At random, less than half of a group right: the gate lets the guide in, and no group is without a signal."""
    draw = random.Random(seed)
    for group in groups:
        right = draw.sample(group.completions[:-1], draw.randint(0, (len(group.completions) - 1) // 2))
        for completion in group.completions:
            completion.accuracy = completion.reward = float(any(completion is one for one in right))


def npo_step(table: Table, policy: Policy, sampler, optimizer, prompts: list[Prompt], config: NPOConfig) -> dict:
    """As npo.train's loop, but for the rewards and the guide."""
    prompts, clock = prompts[: config.prompts_per_step], [table.synchronize()]
    groups = sampler.sample(prompts, config.group_size, config.max_new_tokens, config.temperature, seed=1)
    clock.append(table.synchronize())
    give_rewards(groups, seed=0)
    guides = [replace(group.completions[0], source="guide@40", accuracy=1.0, reward=1.0) for group in groups]
    mixed = [replace_slot(group, guide, config.gate) for group, guide in zip(groups, guides)]
    stats = update(policy, optimizer, mixed, config) | guide_use(0, mixed)
    clock.append(table.synchronize())
    sampler_of(policy, config, prompts)  # for vLLM the weights' sync, with its probe
    clock.append(table.synchronize())
    sample, train, sync = (after - before for before, after in zip(clock, clock[1:]))
    return {"result": f"{sample:.3g} sampling + {train:.3g} update + {sync:.3g} sync; a guide in {stats['npo/guide_frac']:.0%} of the "
                      f"groups; loss {stats['loss']:.3g}, gradient norm {stats['grad_norm']:.3g}", "seconds": clock[-1] - clock[0],
            "sample": sample, "update": train, "sync": sync,
            "tokens": sum(len(completion.token_ids) for group in groups for completion in group.completions)}  # fmt: skip


def extrapolation(step: dict, optimizer: dict) -> dict:
    """Linear in answer tokens, which is too little: longer answers attend to more, and transformers' `generate` holds a batch at once."""
    tokens, once = PAPER["prompts"] * PAPER["slots"] * PAPER["tokens"], optimizer["seconds"]
    times, train = tokens / step["tokens"], max(0.0, step["update"] - once)
    hours = PAPER["steps"] * (times * (step["sample"] + train) + once + step["sync"]) / 3600
    return {"result": f"{hours:,.3g} h = {PAPER['steps']} x ({tokens:,} / {step['tokens']:,} tokens x ({step['sample']:.3g} sampling + {train:.3g} "
                      f"forward, backward) + {once:.3g} optimizer + {step['sync']:.3g} sync) s, without scout, guide cache, evaluation",
            "hours": hours}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ in one process


def check(flags: Flags, kind: str, first: bool) -> None:
    """All phases with one sampler. vLLM is built before the optimizer's moments are there, as in training."""
    table, config = Table(flags, kind, first), flags.config(kind)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.dtype]
    prompts, name = pictures(flags.prompts + 2), {"hf": "transformers", "vllm": "vLLM"}[kind]

    def load() -> dict:
        seconds, policy = table.timed(lambda: Policy(flags.folder(), flags.device, config.dtype, lora=flags.lora,
                                                     gradient_checkpointing=True))  # fmt: skip
        trained = sum(parameter.numel() for parameter in policy.parameters())
        total = sum(parameter.numel() for parameter in policy.model.parameters())
        return {"result": f"{total:,} parameters, {trained:,} trained", "seconds": seconds, "policy": policy}

    def engine() -> dict:
        seconds, sampler = table.timed(lambda: sampler_of(policy, config, prompts))
        return {"result": f"log-probs {sampler.difference:.2g} nats off at most", "seconds": seconds, "sampler": sampler}

    measured = table.phase("the card", lambda: card(table, dtype))
    saved = table.phase("random weights", lambda: build(flags, dtype))
    loaded = table.phase("load", load, saved)
    policy = loaded and loaded["policy"]
    if kind == "vllm":  # its most of PyTorch is less than it was: vLLM resets that count when it has loaded
        loaded = table.phase("vLLM's engine and sync", engine, policy)
    sampler = loaded and loaded.get("sampler", policy)
    table.phase(
        f"sampling, {name}", lambda: sampling(table, sampler, policy, prompts, config, measured["bandwidth"]), sampler, measured
    )
    alone = replace(config, sampler="hf")  # no sampler's log-probs to be corrected
    trained = table.phase(
        "forward, backward", lambda: training(table, policy, prompts, alone, measured["flops"]), policy, measured
    )
    if policy is not None and trained is None:
        policy.model.zero_grad()  # some gradients of what did not fit
    stepped = table.phase("optimizer", lambda: optimizer_step(table, policy, config), trained)
    optimizer = stepped and stepped["optimizer"]
    step = table.phase(
        f"NPO step, {name}", lambda: npo_step(table, policy, sampler, optimizer, prompts, config), sampler, optimizer
    )
    table.phase("at the paper's sizes, extrapolated", lambda: extrapolation(step, stepped), step, stepped)
    if table.failed:
        sys.exit(1)


def main(flags: Flags) -> int:
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"torch {torch.__version__} finds no GPU; --model tiny runs the same code at a tiny size on a CPU")
    models = [name for name in PUBLIC if flags.model != "tiny"] if flags.all else [flags.model]
    if not models or not {*models} <= {*PUBLIC, "tiny"}:
        raise UsageError(f"--model {flags.model}{' --all' * flags.all}: take {', '.join(PUBLIC)}, or tiny without --all")
    kinds = {"both": ["hf", "vllm"], "auto": ["hf"]}.get(flags.sampler, [flags.sampler])
    if flags.sampler == "auto" and flags.device == "cuda" and vllm_sampler.available():
        kinds = ["hf", "vllm"]
    for kind in kinds:
        flags.config(kind).check()
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    spawn, codes = multiprocessing.get_context("spawn"), []
    for model in models:
        one = replace(flags, model=model)
        try:
            for kind in kinds:  # a process each: its memory is its own, and what breaks it breaks no other
                process = spawn.Process(target=check, args=(one, kind, not codes))
                process.start()
                process.join()
                codes.append(process.exitcode)
                if process.exitcode not in (0, 1):
                    print(
                        f"{model}, {kind}: the process ended with {process.exitcode} (-9: out of host memory)", file=sys.stderr
                    )
        finally:
            if not flags.keep:
                shutil.rmtree(one.folder(), ignore_errors=True)
                shutil.rmtree(one.folder().with_name(one.folder().name + ".tmp"), ignore_errors=True)
    print(f"\n{Path(flags.out) / 'gpu_check.jsonl'}")
    return int(any(codes))


if __name__ == "__main__":
    try:
        raise SystemExit(main(tyro.cli(Flags, description=__doc__)))
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
