"""NPO inside TRL's GRPOTrainer: the same slot replacement, on accelerate (DDP, FSDP, DeepSpeed, vLLM server).

GRPOTrainer, but (1) where a group's pass-rate is at most the gate and the guide cache has its prompt, npo.replace_slot gives one slot to
the guide's answer *between generation and rewards*, so that TRL's own code computes rewards, masks and advantages of the mixed group;
(2) that slot's old log-probs are the guide's recorded ones (without IS correction, as TRL does for every other slot, the policy's own).

Kept: everything else of TRL's. Its advantages divide by std + 1e-4, ours by std + 1e-6. NPO's loss is `loss_type="grpo"`, no KL: the defaults
of NPOConfig below. Without guides this is GRPOTrainer to the bit.

    accelerate launch npo_trl.py --guide runs/grpo/checkpoints/step_000040 --output_dir runs/npo_trl --use_cpu True --bf16 False \\
        --learning_rate 1e-4 --per_device_train_batch_size 64 --max_completion_length 64 --max_steps 60      # the cards world
    accelerate launch --config_file experiments/accelerate/eight_gpus.yaml npo_trl.py \\
        --model Qwen/Qwen3-VL-8B-Instruct --dataset hiyouga/geometry3k --guide GUIDE --output_dir runs/8b --bf16

The guide is a checkpoint folder of the same model, or a guide.jsonl. From a folder one process builds the cache while the others wait; where that
takes longer than their patience (minutes, under NCCL), run the command once on one process and then give its guide.jsonl to all.
TRL is optional: pip install -r requirements-trl.txt
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset, Image, Sequence
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    BatchFeature,
    HfArgumentParser,
    ProcessorMixin,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer
from trl import __version__ as trl_version

import npo
import verifier
from command import load_config_prompts, model_path
from npo import build_cache, load_cache, replace_slot
from policy import VISION_TOKENS, Completion, Group, load_tokenizer
from tasks import PromptSet, UsageError

# What of TRL is private and used here, with the attribute _metrics; nothing else in this project touches it.
PRIVATE = ("_generate", "_generate_and_score_completions", "_get_per_token_logps_and_entropies", "_compute_loss")


@dataclass
class NPOConfig(GRPOConfig):
    gate: float = field(default=0.6, metadata={"help": "tau: a slot is replaced where the pass-rate is at most this"})
    is_correction: bool = field(
        default=True, metadata={"help": "the guide slot's ratio is pi_theta / pi_guide; False: it starts at 1"}
    )
    guided_until: int = field(
        default=0, metadata={"help": "last guided step; take the guide's own, beyond it it is no future [no end]"}
    )
    # GRPO as npo.py and the NPO authors' settings have it
    loss_type: str = field(default="grpo", metadata={"help": "grpo: mean over each sequence's tokens, then over sequences"})
    epsilon: float = field(default=0.2, metadata={"help": "the ratio's clip range is 1 - epsilon ..."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "... to 1 + epsilon_high"})
    beta: float = field(default=0.0, metadata={"help": "weight of a KL term; NPO has none"})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "schedule of the learning rate"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW weight decay"})


class NPOTrainer(GRPOTrainer):
    """GRPOTrainer with a guide.

    Args:
        guides: the guide cache by prompt id, as npo.load_cache returns it. The data set needs a column `prompt_id`, and the first reward
            function is the accuracy (0 or 1) that the gate looks at.
        All others: GRPOTrainer's.
    """

    def __init__(self, *args, guides: dict[str, Completion] | None = None, **options):
        if moved := [name for name in PRIVATE if not hasattr(GRPOTrainer, name)]:
            raise ImportError(f"TRL {trl_version} has no GRPOTrainer.{moved[0]}: npo_trl.py was written for TRL 1.16; "
                              "pip install -r requirements-trl.txt")  # fmt: skip
        super().__init__(*args, **options)
        self.guides = guides or {}
        self._asked, self._taken, self._scored = [], {}, None

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        self._asked, self._taken = inputs, {}  # rows of this process, and which of them a guide has taken
        batch = super()._generate_and_score_completions(inputs)
        if not self._guided():
            return batch
        recorded = torch.full(batch["completion_ids"].shape, torch.nan, device=batch["completion_ids"].device)  # (B, T)
        for row, guide in self._taken.items():
            recorded[row, : len(guide.token_ids)] = torch.tensor(guide.behavior_logprobs, device=recorded.device)
            if "importance_sampling_ratio" in batch:
                batch["importance_sampling_ratio"][row] = 1.0  # vLLM did not sample this row
        if self.args.is_correction:
            if "old_per_token_logps" in batch:
                batch["old_per_token_logps"] = torch.where(recorded.isnan(), batch["old_per_token_logps"], recorded)
            else:
                batch["guide_logprobs"] = recorded
        return batch

    def _guided(self) -> bool:
        until = self.args.guided_until
        return bool(self.guides) and self.model.training and (not until or self.state.global_step < until)

    def _generate(self, prompts: list):
        """TRL's, with the guides' answers in the slots that they take."""
        prompt_ids, completion_ids, tool_mask, completions, logprobs, *rest = super()._generate(prompts)
        if self._guided():
            accuracy = self.reward_funcs[0](
                prompts=prompts, completions=completions, completion_ids=completion_ids,
                **{key: [row[key] for row in self._asked] for key in self._asked[0] if key != "prompt"},
            )  # fmt: skip
            self._taken = self._slots([row["prompt_id"] for row in self._asked], accuracy)
            for row, guide in self._taken.items():
                completion_ids[row] = guide.token_ids
                completions[row] = [{"role": "assistant", "content": guide.text}]
                if logprobs is not None:
                    logprobs[row] = guide.behavior_logprobs
        return prompt_ids, completion_ids, tool_mask, completions, logprobs, *rest

    def _slots(self, prompt_ids: list[str], accuracy: list[float]) -> dict[int, Completion]:
        """Which rows of this process the guides take. A group may span processes, so each looks at all groups."""
        first, size = self.accelerator.process_index * len(prompt_ids), self.num_generations
        answers = gather_object(list(zip(prompt_ids, accuracy)))  # of all processes, in the order of the batch
        taken, groups = {}, range(0, len(answers), size)
        for start in groups:
            own = [Completion(prompt, [], [], "", True, accuracy=solved) for prompt, solved in answers[start : start + size]]
            group = Group(None, None, own)
            mixed = replace_slot(group, self.guides.get(own[0].prompt_id), self.args.gate)
            taken |= {start + slot: now for slot, now in enumerate(mixed.completions) if now is not own[slot]}
        self._metrics["train"]["npo/guide_frac"].append(len(taken) / len(groups))
        self._metrics["train"]["npo/accuracy"].append(sum(solved for _, solved in answers) / len(answers))
        return {row - first: guide for row, guide in taken.items() if first <= row < first + len(prompt_ids)}

    def _compute_loss(self, model, inputs: dict):
        self._scored = inputs if "guide_logprobs" in inputs else None
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, *args, **options):
        """TRL's loss takes a missing `old_per_token_logps` for the policy's own, detached; here but for the guides' rows."""
        found = super()._get_per_token_logps_and_entropies(*args, **options)
        if self._scored is not None:
            recorded = self._scored["guide_logprobs"]
            self._scored["old_per_token_logps"] = torch.where(recorded.isnan(), found[0].detach(), recorded)
            self._scored = None
        return found


# ---------------------------------------------------------------------------------------------------------------------
# What TRL needs of a model and a data set
# ---------------------------------------------------------------------------------------------------------------------


class Processor(ProcessorMixin):
    """Tokenizer and image processor for TRL, without the video processor and torchvision that Qwen3-VL's own one wants.

    It encodes as policy.Policy does, so that the guide's answers meet the prompts that they were given to.
    """

    def __init__(self, image_processor, tokenizer, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def __call__(self, images=None, text=None, padding=False, return_tensors=None, **_):
        ids = self.tokenizer([text] if isinstance(text, str) else text, add_special_tokens=False).input_ids
        flat = [image for of_prompt in images or [] for image in of_prompt or []]
        pixels = dict(self.image_processor(images=flat, return_tensors="pt")) if flat else {}
        lengths = iter((pixels["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist() if flat else [])
        ids = [[token for id in row for token in ([id] * next(lengths) if id == self.image_token_id else [id])] for row in ids]
        types = {"mm_token_type_ids": [[int(id == self.image_token_id) for id in row] for row in ids]} if flat else {}
        encoded = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], **types}
        if return_tensors:
            width = max(map(len, ids))
            fill = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}
            encoded = {
                key: torch.tensor([[fill[key]] * (width - len(row)) + row for row in rows]) for key, rows in encoded.items()
            }
        return BatchFeature({**encoded, **pixels})

    def apply_chat_template(self, conversation, tokenize=False, return_dict=False, **options):
        batch = conversation if isinstance(conversation[0], list) else [conversation]
        options.pop("chat_template", None)
        text = [self.tokenizer.apply_chat_template(messages, tokenize=False, **options) for messages in batch]
        if not tokenize:
            return text if batch is conversation else text[0]
        parts = [[p for m in messages if isinstance(m["content"], list) for p in m["content"]] for messages in batch]
        return self(images=[[p["image"] for p in found if p["type"] == "image"] for found in parts], text=text)


def accuracy(completions, gold, choices, **_) -> list[float]:
    return [float(verifier.is_correct(c[0]["content"], g, o)) for c, g, o in zip(completions, gold, choices)]


def answered(completions, **_) -> list[float]:
    """The format reward: there is an answer to extract."""
    return [float(verifier.extract_answer(c[0]["content"]) is not None) for c in completions]


def rows_of(prompts: PromptSet) -> Dataset:
    """The columns that TRL and the rewards read."""
    lines = [
        {"prompt": p.messages, "images": p.images, "prompt_id": p.id, "gold": p.gold, "choices": p.choices or []}
        for p in prompts
    ]
    rows = Dataset.from_list(lines)
    return (
        rows.cast_column("images", Sequence(Image()))
        if any(line["images"] for line in lines)
        else rows.remove_columns("images")
    )


class GuideCallback(TrainerCallback):
    """Before the first step one process lets the guide answer the prompts; then all of them read the cache."""

    def __init__(self, trainer: NPOTrainer, config: npo.NPOConfig, path: Path, prompts: int):
        self.trainer, self.config, self.path, self.prompts = trainer, config, path, prompts

    def on_train_begin(self, args, state, control, **_):
        path = Path(self.config.guide)
        if path.suffix != ".jsonl":
            path = self.path
            with self.trainer.accelerator.main_process_first():
                if self.trainer.accelerator.is_main_process:
                    build_cache(self.config, self.config.guide, 1, 1, path, list(range(self.prompts)))
        _, self.trainer.guides, _ = load_cache(self.config, path)


@dataclass
class Arguments:
    model: str = field(default="cards", metadata={"help": '"cards" (the tiny base), a hub id, or a save_pretrained folder'})
    dataset: str = field(default="", metadata={"help": '"cards", a hub id, a data file or a folder, as in npo.py'})
    columns: str = field(
        default="", metadata={"help": "the data set's names, as in prompt=problem,images=images,answer=answer"}
    )
    guide: str = field(default="", metadata={"help": "checkpoint folder of the same model, or a guide.jsonl; none: plain GRPO"})
    guide_samples: int = field(default=8, metadata={"help": "the guide's answers to a prompt; not specified by the paper"})
    guide_prompts: int = field(default=0, metadata={"help": "only the first so many prompts of the data set [all]"})


def make_trainer(arguments: Arguments, config: NPOConfig) -> NPOTrainer:
    ours = npo.NPOConfig(
        model=arguments.model, dataset=arguments.dataset, columns=arguments.columns, guide=arguments.guide,
        guide_samples=arguments.guide_samples, max_new_tokens=config.max_completion_length, temperature=config.temperature,
        prompts_per_step=32, seed=config.seed, device="cpu" if config.use_cpu else "auto", sampler="hf",
    )  # fmt: skip
    path = model_path(ours)
    prompts, _ = load_config_prompts(ours)
    tokenizer = load_tokenizer(path)
    tokenizer.padding_side = "left"
    count = min(arguments.guide_prompts or len(prompts), len(prompts))
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16 if config.bf16 else torch.float32)
    model.base_model.visual.requires_grad_(False)
    never = [getattr(model.config, name) for name in VISION_TOKENS if getattr(model.config, name, None) is not None]
    config.generation_kwargs = {"suppress_tokens": never} | (
        config.generation_kwargs or {}
    )  # a sampled image token breaks the forward
    trainer = NPOTrainer(
        model=model,
        args=config,
        reward_funcs=[accuracy, answered],
        train_dataset=rows_of([prompts[row] for row in range(count)]),
        processing_class=Processor(AutoImageProcessor.from_pretrained(path, backend="pil"), tokenizer),
    )
    if arguments.guide:
        trainer.add_callback(GuideCallback(trainer, ours, Path(config.output_dir) / "guide.jsonl", count))
    return trainer


def main() -> None:
    arguments, config = HfArgumentParser((Arguments, NPOConfig), description=__doc__).parse_args_into_dataclasses()
    config.reward_weights = [verifier.ACCURACY_WEIGHT, verifier.FORMAT_WEIGHT]
    try:
        trainer = make_trainer(arguments, config)
        trainer.train(resume_from_checkpoint=any(Path(config.output_dir).glob("checkpoint-*")))
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # a process that leaves while another still talks to it takes it down


if __name__ == "__main__":
    main()
