"""NPO inside TRL's GRPOTrainer: the same slot replacement, on many GPUs.

GRPOTrainer, with accelerate's DDP, FSDP and DeepSpeed and TRL's vLLM server, but:

1. Between generation and rewards npo.replace_slot gives slots to the guide's answers. So TRL's own
   code computes rewards, masks and advantages of the mixed groups.
2. The old log-probs of such a slot are those that the guide recorded. Without IS correction they
   are the policy's own, as TRL has them for every other slot.

Everything else is TRL's. It divides advantages by std + 1e-4, grpo.py by std + 1e-6. NPO's loss is
`loss_type="grpo"` without a KL term: NPOConfig below has these defaults. Without a guide this is
GRPOTrainer, bit for bit.

    accelerate launch -m commands.npo_trl --guide runs/grpo/checkpoints/step_000040 \\
        --output_dir runs/npo_trl --use_cpu True --bf16 False --learning_rate 1e-4 \\
        --per_device_train_batch_size 64 --max_completion_length 80 --max_steps 60   # the cards
    accelerate launch --config_file experiments/accelerate/eight_gpus.yaml -m commands.npo_trl \\
        --model Qwen/Qwen3-VL-8B-Instruct --dataset hiyouga/geometry3k --guide GUIDE \\
        --output_dir runs/8b --bf16

GUIDE is a checkpoint folder of the same model, or a guide.jsonl. From a folder one process builds
the guide cache while the others wait. If that takes longer than they wait (minutes, under NCCL),
run the command on one process first, and then give its guide.jsonl to all of them.

TRL is optional: pip install -r requirements-trl.txt
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
import trl
from accelerate.utils import gather_object
from datasets import Dataset, Image, Sequence
from tqdm import tqdm

import npo
import verifier
from plumbing import UsageError
from plumbing.checkpoints import checkpoint_state
from plumbing.data import load_prompts
from plumbing.encode import config_of, flat, image_parts, load_tokenizer, vision_token_ids
from plumbing.files import lock, make_directory
from plumbing.guide_cache import GuideCache, build_guide_cache, load_guide_cache
from plumbing.model import auto_class
from plumbing.rollout import Completion, EncodedPrompt, Group, Prompt

NO_END = 10**9  # as the last guided step: all are guided
# All that is private in TRL and used here, with the attribute `_metrics`
PRIVATE = (
    "_generate",
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    "_compute_loss",
)


def flag(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class NPOConfig(trl.GRPOConfig):
    gate: float = flag(0.6, "tau: a slot is replaced if the pass-rate is at most this")
    is_correction: bool = flag(True, "ratio pi_theta / pi_guide; without, it starts at 1")
    # GRPO as in grpo.py and in the NPO authors' settings
    loss_type: str = flag("grpo", "grpo: mean over each sequence's tokens, then over sequences")
    epsilon: float = flag(0.2, "the ratio's clip range is 1 - epsilon ...")
    epsilon_high: float | None = flag(0.28, "... to 1 + epsilon_high")
    beta: float = flag(0.0, "weight of a KL term; NPO has none")
    lr_scheduler_type: str = flag("constant", "schedule of the learning rate")
    weight_decay: float = flag(0.01, "of AdamW")


class NPOTrainer(trl.GRPOTrainer):
    """GRPOTrainer with a guide.

    Args:
        guides: the guide cache. It needs the columns of `rows_of` in the data set, and as the
            first reward function the accuracy (0 or 1), whose mean over a group is its pass-rate.
        All others: GRPOTrainer's.
    """

    def __init__(self, *args, guides: GuideCache | None = None, **options):
        if moved := [name for name in PRIVATE if not hasattr(trl.GRPOTrainer, name)]:
            raise ImportError(
                f"TRL {trl.__version__} has no GRPOTrainer.{moved[0]}: commands/npo_trl.py was "
                "written for TRL 1.16; pip install -r requirements-trl.txt"
            )
        super().__init__(*args, **options)
        self.guides = guides or GuideCache()
        # rows of this process, which of them the guide has taken, and the batch in the loss
        self._asked, self._taken, self._scored = [], {}, None

    def _guided(self) -> bool:
        in_time = self.state.global_step < self.guides.until
        return bool(self.guides.answers) and in_time and self.model.training

    # ------------------------------------------------- 1. before the rewards: who takes which slot

    def _generate(self, prompts: list):
        """TRL's, with the guide's answers in the slots that they take."""
        prompt_ids, token_ids, tool_mask, texts, logprobs, *rest = super()._generate(prompts)
        if self._guided():
            columns = {key: [row[key] for row in self._asked] for key in self._asked[0]}
            columns |= {"prompts": prompts, "completions": texts, "completion_ids": token_ids}
            del columns["prompt"]
            accuracies = self.reward_funcs[0](**columns)
            answers = []
            for row, ids, text, right in zip(self._asked, token_ids, texts, accuracies):
                finished = ids[-1] in self.eos_token_ids
                answer = Completion(row["prompt_id"], ids, None, text[0]["content"], finished)
                answer.answer, answer.accuracy = verifier.extract_answer(answer.text), right
                answer.reward = verifier.reward(prompt_of(row), answer)
                answers.append(answer)
            self._taken = self._slots(prompt_ids, answers)
            for row, guide in self._taken.items():
                token_ids[row] = guide.token_ids
                texts[row] = [{"role": "assistant", "content": guide.text}]
                if logprobs is not None:
                    logprobs[row] = guide.behavior_logprobs or [None] * len(guide.token_ids)
        return prompt_ids, token_ids, tool_mask, texts, logprobs, *rest

    def _slots(self, prompt_ids: list, answers: list[Completion]) -> dict[int, Completion]:
        """Which rows of this process the guide's answers take.

        A group may span processes: each process looks at all groups that it has a row of.
        """
        size, here = self.num_generations, len(answers)
        first = self.accelerator.process_index * here  # place in the batch of the first row here
        batch = gather_object(answers)  # of all processes
        taken = {}
        for start in range(first // size * size, first + here, size):
            row, own = max(start - first, 0), batch[start : start + size]
            group = Group(prompt_of(self._asked[row]), EncodedPrompt(prompt_ids[row]), own)
            guide = self.guides.answers_to(group.prompt, self.state.global_step + 1)
            mixed = npo.replace_slot(group, guide, self.args.gate)
            for row, (before, after) in enumerate(zip(own, mixed.completions), start - first):
                if after is not before and 0 <= row < here:
                    taken[row] = after
        replaced = sum(gather_object([len(taken)]))
        accuracy = sum(answer.accuracy for answer in batch) / len(batch)
        self._metrics["train"]["npo/guide_frac"].append(replaced / (len(batch) / size))
        self._metrics["train"]["npo/accuracy"].append(accuracy)
        return taken

    # ------------------------------------- 2. after them: the old log-probs of the guide's answers

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        self._asked, self._taken = inputs, {}
        batch = super()._generate_and_score_completions(inputs)
        if not self._guided():
            return batch
        ids = batch["completion_ids"]
        recorded = torch.full(ids.shape, torch.nan, device=ids.device)  # (B, T), nan: not a guide's
        for row, guide in self._taken.items():
            values = torch.tensor(guide.behavior_logprobs or [])
            recorded[row, : len(values)] = values
            if "importance_sampling_ratio" in batch:
                batch["importance_sampling_ratio"][row] = 1.0  # vLLM did not sample this row
        if self.args.is_correction:
            if "old_per_token_logps" in batch:
                own = batch["old_per_token_logps"]
                batch["old_per_token_logps"] = torch.where(recorded.isnan(), own, recorded)
            else:
                batch["guide_logprobs"] = recorded
        return batch

    def _compute_loss(self, model, inputs: dict):
        self._scored = inputs if "guide_logprobs" in inputs else None
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, *args, **options):
        """TRL's. Its loss takes these, detached, as the old log-probs that the batch lacks.

        A batch with a guide's gets all of them here: the guide's, and these in every other row.
        """
        found = super()._get_per_token_logps_and_entropies(*args, **options)
        if self._scored is not None:
            recorded = self._scored["guide_logprobs"]
            old = torch.where(recorded.isnan(), found[0].detach(), recorded)
            self._scored["old_per_token_logps"], self._scored = old, None
        return found


# ---- What TRL needs of a model and a data set -----------------------------------------


class Processor(transformers.Qwen3VLProcessor):
    """Qwen3-VL's own, without the video part. It encodes exactly as `encode.encode` does.

    The video part needs torchvision, and PyPI's does not import beside a CPU build of torch.
    """

    def __init__(self, image_processor, tokenizer, chat_template=None):
        template = chat_template or tokenizer.chat_template
        super().__init__(image_processor, tokenizer, chat_template=template)

    def __call__(self, images=None, text=None, **options):
        """`images` are TRL's: a list for each prompt, or None where a prompt has no image."""
        flat = [image for of_prompt in images or [] for image in of_prompt or []]
        return super().__call__(images=flat or None, text=text, **options)


def load_processor(path: str | Path):
    """A text model's is its tokenizer."""
    tokenizer, image_processor = load_tokenizer(path), image_parts(path)[0]
    tokenizer.padding_side = "left"
    return Processor(image_processor, tokenizer) if image_processor else tokenizer


def accuracy(completions, gold, choices, **_) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [float(verifier.is_correct(*answer)) for answer in zip(texts, gold, choices)]


def answered(completions, **_) -> list[float]:
    """The format reward: there is an answer to extract."""
    return [float(verifier.extract_answer(c[0]["content"]) is not None) for c in completions]


def rows_of(prompts: list[Prompt], for_text_model: bool = False) -> Dataset:
    """The columns that TRL, the rewards and `prompt_of` read."""
    rows = [
        {
            "prompt": flat(prompt.messages) if for_text_model else prompt.messages,
            "images": prompt.images,
            "prompt_id": prompt.id,
            "gold": prompt.gold,
            "choices": prompt.choices or [],
        }
        for prompt in prompts
    ]
    table = Dataset.from_list(rows)
    if any(prompt.images for prompt in prompts):
        return table.cast_column("images", Sequence(Image()))
    return table.remove_columns("images")


def prompt_of(row: dict) -> Prompt:
    """The prompt of a row. In the table every part of a message has a text, if only None."""
    messages = []
    for message in row["prompt"]:
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [{k: v for k, v in p.items() if v is not None} for p in content]
        messages.append(message | {"content": parts})
    images, choices = row.get("images", []), row["choices"] or None
    return Prompt(row["prompt_id"], messages, images, row["gold"], choices)


@dataclass
class Arguments:
    model: str = flag("cards", "cards, cards_lax, staircase, a hub id, or a save_pretrained folder")
    dataset: str | None = flag(None, '"cards", a hub id, a data file or a folder, as in npo.py')
    columns: str = flag("", "as in prompt=problem,images=images,answer=answer,choices=options")
    guide: str | None = flag(None, "checkpoint folder of the same model, or a guide.jsonl [none]")
    guide_samples: int = flag(8, "the guide's answers to a prompt; not in our sources")
    guide_prompts: int | None = flag(None, "only the first so many prompts of the data set [all]")
    guided_until: int | None = flag(
        None, "last guided step; beyond the guide's own step it is no future [all steps]"
    )


class GuideCallback(transformers.TrainerCallback):
    """Before the first step one process lets the guide answer the prompts; then all read them."""

    def __init__(self, trainer: NPOTrainer, arguments: Arguments, config: npo.GuidedConfig):
        self.trainer, self.arguments, self.config = trainer, arguments, config

    def on_train_begin(self, args, state, control, **_):
        guide, accelerator = self.arguments.guide, self.trainer.accelerator
        path = Path(guide)
        if path.suffix != ".jsonl":
            path = Path(args.output_dir) / "guide.jsonl"
            rows = list(range(len(self.trainer.train_dataset)))
            until = checkpoint_state(guide)["step"] or NO_END
            with accelerator.main_process_first():
                if accelerator.is_main_process:
                    build_guide_cache(path, self.config, guide, rows, until)
        until = self.arguments.guided_until or NO_END
        self.trainer.guides = load_guide_cache(path, self.config, until)
        if accelerator.is_main_process:
            tqdm.write(f"{path}: {self.trainer.guides}")


def make_trainer(arguments: Arguments, config: NPOConfig) -> NPOTrainer:
    ours = npo.GuidedConfig(
        model=arguments.model,
        dataset=arguments.dataset,
        columns=arguments.columns,
        gate=config.gate,
        guide_samples=arguments.guide_samples,
        max_new_tokens=config.max_completion_length,
        temperature=config.temperature,
        prompts_per_step=32,  # that the guide answers at a time
        seed=config.seed,
        device="cpu" if config.use_cpu else "auto",
        sampler="hf",
    )
    ours.check()
    prompts, _ = load_prompts(ours)
    rows = range(len(prompts))[: arguments.guide_prompts or None]
    processor = load_processor(ours.model_path)
    model = auto_class(config_of(ours.model_path)).from_pretrained(
        ours.model_path,
        dtype=torch.bfloat16 if config.bf16 else torch.float32,
        trust_remote_code=False,
    )
    sees = isinstance(processor, Processor)
    if sees:
        model.base_model.visual.requires_grad_(False)
        # a sampled image token breaks the training forward
        never = {"suppress_tokens": vision_token_ids(model.config)}
        config.generation_kwargs = never | (config.generation_kwargs or {})
    trainer = NPOTrainer(
        model=model,
        args=config,
        reward_funcs=[accuracy, answered],
        train_dataset=rows_of([prompts[row] for row in rows], for_text_model=not sees),
        processing_class=processor,
    )
    if arguments.guide:
        trainer.add_callback(GuideCallback(trainer, arguments, ours))
    return trainer


def main() -> None:
    parser = transformers.HfArgumentParser((Arguments, NPOConfig), description=__doc__)
    arguments, config = parser.parse_args_into_dataclasses()
    config.reward_weights = [verifier.ACCURACY_WEIGHT, verifier.FORMAT_WEIGHT]
    try:
        trainer = make_trainer(arguments, config)
        if trainer.accelerator.is_main_process:
            make_directory(Path(config.output_dir))
            lock(Path(config.output_dir))
        trainer.train(resume_from_checkpoint=any(Path(config.output_dir).glob("checkpoint-*")))
    except (UsageError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # else a process that leaves takes the others down


if __name__ == "__main__":
    main()
