"""The flags that every run has, what they default to, and how a value that makes no sense is told.

A comment beside a field is its help; a comment on a line of its own is a heading of `--help`.
"""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from plumbing import UsageError, memory
from plumbing.checkpoints import checkpoint_state
from plumbing.lora import adapter_rank
from plumbing.rows import BOXED
from worlds import cards, staircase

WORLDS = {  # the embedded ones: how each of them finds its base
    "cards": lambda config: cards.BASE,
    "cards_lax": lambda config: cards.LAX,
    "staircase": lambda config: staircase.base_at(config.borrow_rate),
}

# What a field that is None becomes: (for a world's prompts or model, elsewhere)
BY_WORLD = {
    "max_new_tokens": (80, 4096),  # 4096 and 1e-6: the authors' settings
    "lr": (1e-4, 1e-6),
    "eval_samples": (4, 1),
    "micro_batch_size": (32, 4),
    "keep": ("all", "none"),
    "min_gain": (0.04, 0.01),
    "rollouts": (64, 8),
}

INSTALL = "pip install -r requirements-gpu.txt"

# Flags that change nothing in what a run computes
MAY_CHANGE_ON_RESUME = {
    "out",
    "fresh",
    "keep",
    "device",
    "vllm_memory",
    "card_gb",
    "micro_batch_size",
    "rollouts",
    "track",
}


@dataclass
class ModelConfig:
    # Model
    model: str = "cards"  # cards, cards_lax, staircase, a hub id, or a save_pretrained folder
    borrows: int = 2  # staircase: how many each prompt of part B needs, 1 or 2
    borrow_rate: float | None = None  # staircase: chance that the base says one [0.006; of 1 .0005]
    device: str = "auto"  # "cpu", "cuda", "cuda:1" [cuda if there is one]
    sampler: Literal["auto", "hf", "vllm"] = "auto"  # [vllm if installed, on CUDA, no world]

    def __post_init__(self):
        if self.sampler == "auto":
            use_vllm = self.on_gpu and installed("vllm") and not self.in_world
            self.sampler = "vllm" if use_vllm else "hf"
        if self.model == "staircase" and self.borrow_rate is None:
            self.borrow_rate = staircase.BORROW_RATE.get(self.borrows)

    @property
    def in_world(self) -> bool:
        """Whether an embedded world asks the prompts."""
        return self.model in WORLDS

    @property
    def on_gpu(self) -> bool:
        return torch.cuda.is_available() and self.device != "cpu"

    @property
    def model_path(self) -> str:
        return str(WORLDS[self.model](self) if self.model in WORLDS else self.model)

    @property
    def dtype(self) -> str:
        """Of weights and gradients: bf16 on CUDA; the embedded worlds are fp32 everywhere."""
        return "bf16" if self.on_gpu and not self.in_world else "fp32"

    @property
    def where(self) -> str:
        """The first line of a run: device, dtype and sampler, and why one is not the best."""
        device, sampler = "cpu", self.sampler
        if self.on_gpu:
            device = torch.cuda.get_device_name(None if self.device == "auto" else self.device)
        elif self.device != "cpu":
            device += f" (torch {torch.__version__} finds no CUDA)"
        if self.on_gpu and not self.in_world and not installed("vllm"):
            sampler += f", many times slower than vllm, which is not installed: {INSTALL}"
        return f"device {device} | {self.dtype} | sampler {sampler}"

    def check(self) -> None:
        """Raises UsageError for the first value that makes no sense, or what is not installed."""
        within(self, "borrows", least=1, most=2)
        if self.model != "staircase" and self.borrow_rate is not None:
            raise UsageError(f"--borrow-rate {self.borrow_rate}: needs --model staircase")
        if self.borrow_rate is not None:
            within(self, "borrow_rate", above=0, below=1)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"--device {self.device}: must be auto, cpu, cuda or cuda:N")
        number = int(self.device.partition(":")[2] or 0)
        if self.on_gpu and number and number >= torch.cuda.device_count():
            raise UsageError(f"--device {self.device}: there are {torch.cuda.device_count()} GPUs")
        if self.sampler == "vllm" and not installed("vllm"):
            raise UsageError(
                f"--sampler vllm: vllm is not installed; {INSTALL}, or use --sampler hf"
            )
        if self.sampler == "vllm" and self.device not in ("auto", "cpu", "cuda", "cuda:0"):
            raise UsageError(
                f"--device {self.device}: vLLM uses the first GPU that it sees; "
                "set CUDA_VISIBLE_DEVICES and leave --device out"
            )


@dataclass
class RunConfig(ModelConfig):
    # Run
    dataset: str | None = None  # world, hub id, file, folder, my.py:rows [the model's; geometry3k]
    columns: str = ""  # prompt=problem,images=images,answer=answer,choices= [known or these]
    instruction: str = BOXED  # what every question ends with; the worlds have none
    reward: str | None = None  # my_file.py:function(prompt, completion) [verifier.reward]
    out: str = "runs"  # run directory; the same command resumes it
    fresh: bool = False  # start over; the run in --out is moved to OUT.old
    start: str | None = None  # checkpoint to go on from: its step, prompts, weights and AdamW
    lora: int = 0  # rank of LoRA adapters trained in place of the weights; not in our sources
    # Length
    steps: int = 100  # training steps, those before --start counted
    seed: int = 0  # decides prompts, sampling and evaluation
    eval_every: int = 5  # steps between evaluations
    eval_prompts: int = 256  # held-out prompts: the last rows of the data set, never trained on
    eval_samples: int | None = None  # 0: exact [cards, staircase 0; else 1; lax, teacher, file 4]
    save_every: int = 20  # steps between checkpoints (the NPO authors: 10 or 20)
    keep: str | None = None  # old checkpoints: all, none, steps as 40,100 [worlds all, else none]
    track: Literal["", "wandb", "trackio"] = ""  # live curves, beside metrics.jsonl; pip install it
    rollouts: int | None = None  # prompts per step whose answers are kept; 0: none [worlds 64, 8]
    # Memory
    micro_batch_size: int | None = None  # sequences at a time, memory only [worlds 32, else 4]
    max_prompt_tokens: int = 4096  # longer prompts, images counted, are dropped (as the authors)
    vllm_memory: float = 0.35  # share of the GPU for vLLM's weights and cache
    card_gb: float | None = None  # as if the GPU were so small: not its speed, nor CUDA's own 1 GB
    dry_run: bool = False  # print the batch arithmetic and the memory that it takes, and stop

    def __post_init__(self):
        if self.dataset is None:
            self.dataset = self.model if self.model in WORLDS else "hiyouga/geometry3k"
        super().__post_init__()
        if self.eval_samples is None and self.has_one_right_text and self.keeps_its_manner:
            self.eval_samples = 0
        tiny = self.in_world or self.model in WORLDS
        for name, (in_world, elsewhere) in BY_WORLD.items():
            if getattr(self, name, 0) is None:
                setattr(self, name, in_world if tiny else elsewhere)
                if name == "lr" and self.lora:
                    self.lr *= 10

    @property
    def in_world(self) -> bool:
        return self.dataset in WORLDS

    @property
    def has_one_right_text(self) -> bool:
        """Whether the policy can earn a prompt's reward by one text alone, `\\boxed{gold}`."""
        return self.in_world and self.dataset != "cards_lax"

    @property
    def keeps_its_manner(self) -> bool:
        """Whether all that it learns from was written by a run's checkpoint, not by a teacher."""
        guide = getattr(self, "guide", None)
        return guide in (None, "self") or (Path(guide) / "state.json").is_file()

    @property
    def vllm_share(self) -> float:
        """Of the GPU that is there."""
        if not self.card_gb or not self.on_gpu:
            return self.vllm_memory
        _, total = torch.cuda.mem_get_info()
        return self.vllm_memory * min(1.0, self.card_gb * 1e9 / total)

    @property
    def start_step(self) -> int:
        return checkpoint_state(self.start)["step"] if self.start else 0

    def check(self) -> None:
        super().check()
        for name in ("steps", "eval_every", "eval_prompts", "save_every"):
            within(self, name, least=1)
        for name in ("micro_batch_size", "max_prompt_tokens"):
            within(self, name, least=1)
        within(self, "rollouts", least=0)
        if self.borrows != 2 and self.dataset != "staircase":
            raise UsageError(f"--borrows {self.borrows}: needs --model staircase")
        if self.instruction != BOXED and self.in_world:
            raise UsageError(
                f"--instruction: {self.dataset} asks in words of its own; leave it out"
            )
        other = self.model in WORLDS and self.dataset != self.model
        if other and (self.in_world or self.model == "staircase"):
            raise UsageError(
                f"--dataset {self.dataset}: the base of {self.model} answers its own world's "
                "prompts; leave --dataset out"
            )
        of = "" if self.has_one_right_text else "0 needs a world with one right text a prompt"
        within(self, "eval_samples", least=0 if self.has_one_right_text else 1, of=of)
        if self.start and not (Path(self.start) / "state.json").is_file():
            raise UsageError(
                f"--start {self.start}: is no checkpoint of a run; give one, as in "
                "runs/grpo/checkpoints/step_000040"
            )
        within(self, "steps", above=self.start_step, of="the step of --start")
        within(self, "lora", least=0)
        rank = self.lora or adapter_rank(self.model_path)
        if rank and not installed("peft"):
            raise UsageError(f"--lora {rank}: needs peft; {INSTALL}")
        if self.dtype == "bf16" and not rank and not installed("torchao"):
            raise UsageError(
                f"bf16 weights are trained with torchao's AdamW: {INSTALL}, or use --lora 64"
            )
        within(self, "vllm_memory", above=0, below=1)
        if self.card_gb is not None:
            within(self, "card_gb", above=0)
            if not (self.on_gpu or self.dry_run):
                raise UsageError(f"--card-gb {self.card_gb:g}: there is no GPU; use --dry-run")
        if not re.fullmatch(r"(all|none|\d+)(,\d+)*", self.keep):
            raise UsageError(f"--keep {self.keep}: must be all, none, or steps as in 40,100")
        if self.on_gpu and not self.dry_run:
            memory.check_room(self)


def within(config, name: str, least=None, most=None, above=None, below=None, of="") -> None:
    """Raises UsageError where a value lies outside its range, and says which range that is.

    `of` names the flags that the limits come from.
    """
    value, flag = getattr(config, name), f"--{name.replace('_', '-')}"
    wanted = [
        (least, "at least", lambda: value >= least),
        (above, "above", lambda: value > above),
        (most, "at most", lambda: value <= most),
        (below, "below", lambda: value < below),
    ]
    wanted = [(limit, word, holds) for limit, word, holds in wanted if limit is not None]
    if not all(holds() for _, _, holds in wanted):  # also for nan, which compares with nothing
        limits = " and ".join(f"{word} {limit:g}" for limit, word, _ in wanted)
        raise UsageError(f"{flag} {value}: must be {limits}{of and f' ({of})'}")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
