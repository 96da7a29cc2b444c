"""TRL's GRPOTrainer with a guide: a thin subclass that calls super().

1. Between generation and rewards npo.replace_slot gives slots to the guide's answers. So TRL's own
   code computes rewards, masks and advantages of the mixed groups.
2. The old log-probs of such a slot are those that the guide recorded. Without IS correction they
   are the policy's own, as TRL has them for every other slot.

Everything else is TRL's. It divides advantages by std + 1e-4, grpo.py by std + 1e-6. NPO's loss is
`loss_type="grpo"` without a KL term: NPOConfig below has these defaults. Without a guide this is
GRPOTrainer, bit for bit.
"""

import dataclasses
import inspect
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
import trl
from accelerate.utils import gather_object
from datasets import Dataset, Image, Sequence

import npo
import verifier
from plumbing.encode import flat, image_parts, load_tokenizer
from plumbing.guide_cache import GuideCache
from plumbing.metrics import guide_metrics
from plumbing.rollout import Completion, EncodedPrompt, Group, Prompt

TESTED = "TRL 1.16 (with accelerate 1.15 and transformers 5.19)"
# All that is private in TRL and used here, with its first parameters; also the attribute `_metrics`
PRIVATE = {
    "_generate": "self, prompts",
    "_generate_single_turn": "self, prompt_ids, images, multimodal_fields, num_generations",
    "_generate_and_score_completions": "self, inputs",
    "_get_per_token_logps_and_entropies": "self, model, input_ids, attention_mask, logits_to_keep",
    "_compute_loss": "self, model, inputs",
    "_save_checkpoint": "self, model, trial",
}
SILENT = 1e-3  # an advantage below it is a rounding error; real ones are above 0.3 at G = 8
COLUMNS = "images", "prompt_id", "gold", "choices", "working"  # of a data set, beside "prompt"
OPTIONS = {"model", "args", "reward_funcs", "train_dataset", "processing_class", "peft_config"}


def flag(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class NPOConfig(trl.GRPOConfig):
    gate: float = flag(0.6, "tau: a slot is replaced if the pass-rate is at most this")
    slots: int = flag(1, "the guide's first so many answers take the last so many slots")
    is_correction: bool = flag(True, "ratio pi_theta / pi_guide; without, it starts at 1")
    # GRPO as in grpo.py and in the NPO authors' settings
    loss_type: str = flag("grpo", "grpo: mean over each sequence's tokens, then over sequences")
    epsilon: float = flag(0.2, "the ratio's clip range is 1 - epsilon ...")
    epsilon_high: float | None = flag(0.28, "... to 1 + epsilon_high")
    beta: float = flag(0.0, "weight of a KL term; NPO has none")
    lr_scheduler_type: str = flag("constant", "schedule of the learning rate")
    weight_decay: float = flag(0.01, "of AdamW")


def check_trl() -> None:
    """Raises ImportError, in one sentence, for a TRL whose private parts have moved."""
    options = {*inspect.signature(trl.GRPOTrainer.__init__).parameters}
    if gone := sorted(OPTIONS - options):
        raise moved(f"GRPOTrainer takes no {gone[0]}")
    for name, parameters in PRIVATE.items():
        method = getattr(trl.GRPOTrainer, name, None)
        if method is None:
            raise moved(f"has no GRPOTrainer.{name}")
        found, first = list(inspect.signature(method).parameters), parameters.split(", ")
        if found[: len(first)] != first:
            raise moved(f"GRPOTrainer.{name} takes {', '.join(found[:6])}, not {parameters}")


def moved(what: str) -> ImportError:
    return ImportError(
        f"TRL {trl.__version__}: {what}. This was written for and tested with {TESTED}; "
        "pip install -r requirements-trl.txt"
    )


class NPOTrainer(trl.GRPOTrainer):
    """GRPOTrainer with a guide.

    Args:
        guides: the guide cache. It needs the columns of `rows_of` in the data set, and as the
            first reward function the accuracy (0 or 1), whose mean over a group is its pass-rate.
        watch: without guides, too, fill in `groups` and `entropy`, log more, and take advantages of
            equal rewards for 0.
        All others: GRPOTrainer's.

    Attributes:
        groups: of the last batch, over all processes and in its order, the same on each:
            (group as sampled, group that is trained on), without messages and pictures.
        entropy: of the last step: minus the mean log-prob of the policy's own sampled tokens in
            nats, over all processes; those of displaced answers are not computed.
        silent: whether nothing is logged.
    """

    def __init__(self, *args, guides: GuideCache | None = None, watch: bool = False, **options):
        check_trl()
        super().__init__(*args, **options)
        if not hasattr(self, "_metrics"):
            raise moved("has no GRPOTrainer._metrics")
        self.guides, self.watch, self.silent = guides or GuideCache(), watch, False
        self.groups, self.entropy = [], 0.0
        # rows of this process, which of them the guide has taken, the batch in the loss, its sums
        self._asked, self._taken, self._scored, self._sums = [], {}, None, []

    def _guided(self) -> bool:
        return bool(self.guides.answers) and self.state.global_step < self.guides.until

    def _watching(self) -> bool:
        return self.model.training and (self.watch or self._guided())

    def log(self, *args, **options) -> None:
        if not self.silent:
            super().log(*args, **options)

    # ------------------------------------------------- 1. before the rewards: who takes which slot

    def _generate(self, prompts: list):
        """TRL's, with the guide's answers in the slots that they take."""
        found = super()._generate(prompts)
        if len(found) != 8:
            raise moved(f"GRPOTrainer._generate returns {len(found)} values, not 8")
        prompt_ids, token_ids, tool_mask, texts, logprobs, *rest = found
        if self._watching():
            columns = {key: [row[key] for row in self._asked] for key in self._asked[0]}
            columns |= {"prompts": prompts, "completions": texts, "completion_ids": token_ids}
            del columns["prompt"]
            accuracies = self.reward_funcs[0](**columns)
            answers = []
            for row, ids, text, right in zip(self._asked, token_ids, texts, accuracies):
                finished = ids[-1] in self.eos_token_ids
                answer = Completion(row["prompt_id"], ids, None, text[0]["content"], finished)
                answer.answer = verifier.extract_answer(answer.text) if finished else None
                answer.accuracy = right
                answer.reward = verifier.reward(prompt_of(row), answer)
                answers.append(answer)
            self._taken = self._take_slots(prompt_ids, answers)
            for row, guide in self._taken.items():
                token_ids[row] = guide.token_ids
                texts[row] = [{"role": "assistant", "content": guide.text}]
                if logprobs is not None:  # vLLM's, which has not sampled this
                    logprobs[row] = [None] * len(guide.token_ids)
        return prompt_ids, token_ids, tool_mask, texts, logprobs, *rest

    def _take_slots(self, prompt_ids: list, answers: list[Completion]) -> dict[int, Completion]:
        """Which rows of this process the guide's answers take.

        A group may span processes: each process looks at all groups that it has a row of.
        """
        size, here, step = self.num_generations, len(answers), self.state.global_step + 1
        first = self.accelerator.process_index * here  # place in the batch of the first row here
        batch = gather_object(answers)  # of all processes
        taken, begun = {}, []
        for start in range(first // size * size, first + here, size):
            row, own = max(start - first, 0), batch[start : start + size]
            group = Group(prompt_of(self._asked[row]), EncodedPrompt(prompt_ids[row]), own)
            guide = self.guides.answers_to(group.prompt, step, self.args.slots)
            mixed = npo.replace_slot(group, guide, self.args.gate)
            for row, (before, after) in enumerate(zip(own, mixed.completions), start - first):
                if after is not before and 0 <= row < here:
                    taken[row] = after
            if start >= first:
                light = dataclasses.replace(group.prompt, messages=[], images=[])
                begun.append(tuple(dataclasses.replace(g, prompt=light) for g in (group, mixed)))
        self.groups = gather_object(begun)
        found = guide_metrics(step, [mixed for _, mixed in self.groups]) if self._guided() else {}
        found["accuracy"] = sum(answer.accuracy for answer in batch) / len(batch)
        for name, value in found.items():
            self._metrics["train"][name].append(value)
        return taken

    # ------------------------------------- 2. after them: the old log-probs of the guide's answers

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        self._asked, self._taken = inputs, {}
        batch = super()._generate_and_score_completions(inputs)
        if not self._watching():
            return batch
        # Equal rewards have A = 0, as in grpo.py. TRL leaves a rounding error over 1e-4, of which
        # AdamW makes full steps where nothing else has a gradient
        near_zero = batch["advantages"].abs() < SILENT
        batch["advantages"] = batch["advantages"].masked_fill(near_zero, 0.0)
        ids = batch["completion_ids"]
        guided = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # (B,)
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        recorded = torch.full(ids.shape, torch.nan, dtype=dtype, device=ids.device)
        for row, guide in self._taken.items():  # nan: not a guide's (B, T)
            guided[row] = True
            if self.args.is_correction and guide.behavior_logprobs:
                values = torch.tensor(guide.behavior_logprobs, dtype=dtype)
                recorded[row, : len(values)] = values
        if "importance_sampling_ratio" in batch:
            self._only_own(batch, guided)
        if "old_per_token_logps" in batch:
            own = batch["old_per_token_logps"]
            batch["old_per_token_logps"] = torch.where(recorded.isnan(), own, recorded)
        else:
            batch["guide_logprobs"] = recorded
        if "sampling_per_token_logps" in batch:  # where TRL masks what is too far off-policy
            theirs = batch.get("old_per_token_logps", recorded)
            sampling = batch["sampling_per_token_logps"]
            batch["sampling_per_token_logps"] = torch.where(guided[:, None], theirs, sampling)
        return batch | {"guided": guided}

    def _only_own(self, batch: dict, guided: torch.Tensor) -> None:
        """vLLM's correction, and what TRL has logged of it, for the policy's own rows alone."""
        ratio = batch["importance_sampling_ratio"]  # (B, T), or (B, 1) of whole sequences
        mask = batch["completion_mask"].bool() if ratio.shape[1] > 1 else ratio.isfinite()
        own = ratio[mask & ~guided[:, None]]
        none = own.new_tensor(torch.nan)
        found = [own.min(), own.mean(), own.max()] if len(own) else [none] * 3
        found = self.accelerator.gather(torch.stack(found)[None])  # (processes, 3)
        found = found[~found[:, 0].isnan()]
        values = found[:, 0].min(), found[:, 1].mean(), found[:, 2].max()
        for name, value in zip(("min", "mean", "max"), values):
            name = f"sampling/importance_sampling_ratio/{name}"
            self._metrics["train"][name][-1] = value.item()
        ratio[guided] = 1.0

    def _compute_loss(self, model, inputs: dict):
        self._scored = inputs if "guided" in inputs else None
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, *args, **options):
        """TRL's. Its loss takes these, detached, as the old log-probs that the batch lacks.

        A batch with a guide's gets all of them here: the guide's, and these in every other row.
        """
        found = super()._get_per_token_logps_and_entropies(*args, **options)
        batch, self._scored = self._scored, None
        if batch is not None:
            logprobs = found[0].detach()  # (B, T)
            if "guide_logprobs" in batch:
                recorded = batch["guide_logprobs"]
                old = torch.where(recorded.isnan(), logprobs, recorded.to(logprobs.dtype))
                batch["old_per_token_logps"] = old
            self._see(logprobs, batch)
        return found

    def _see(self, logprobs: torch.Tensor, batch: dict) -> None:
        """Sums over a micro-batch; with a step's last one they become what is logged of it."""
        mask, guided = batch["completion_mask"].bool(), batch["guided"][:, None]
        own, ratio = logprobs[mask & ~guided], (logprobs - batch["old_per_token_logps"]).exp()
        ratio = ratio[mask & guided]
        sums = [-own.sum(), own.new_tensor(len(own)), ratio.sum(), ratio.new_tensor(len(ratio))]
        ends = [ratio.min(), ratio.max()] if len(ratio) else [ratio.new_tensor(1.0)] * 2
        self._sums.append(torch.stack(sums + ends))
        if not self.accelerator.sync_gradients:
            return
        seen, self._sums = self.accelerator.gather(torch.stack(self._sums)), []  # (batches, 6)
        entropy, tokens, ratios, guides = seen[:, :4].sum(dim=0).tolist()
        self.entropy = entropy / tokens
        if guides:
            some = seen[seen[:, 3] > 0]
            found = ratios / guides, some[:, 4].min().item(), some[:, 5].max().item()
            for name, value in zip(("mean", "min", "max"), found):
                self._metrics["train"][f"npo/guide_ratio_{name}"].append(value)


# ---- The columns of a data set ----------------------------------------------------------


def rows_of(prompts: list[Prompt], for_text_model: bool = False) -> Dataset:
    """The columns that TRL, the rewards and `prompt_of` read."""
    rows = [
        {
            "prompt": flat(prompt.messages) if for_text_model else prompt.messages,
            "images": prompt.images,
            "prompt_id": prompt.id,
            "gold": prompt.gold,
            "choices": prompt.choices or [],
            "working": prompt.working or "",
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
    images, choices, working = row.get("images", []), row["choices"] or None, row["working"] or None
    return Prompt(row["prompt_id"], messages, images, row["gold"], choices, working)


# ---- What TRL needs of a model, and the rewards -----------------------------------------


class Processor(transformers.Qwen3VLProcessor):
    """Qwen3-VL's own, without the video part. It encodes exactly as `encode.encode` does.

    The video part needs torchvision, and PyPI's does not import beside a CPU build of torch.
    """

    def __init__(self, image_processor, tokenizer, chat_template=None):
        template = chat_template or tokenizer.chat_template
        super().__init__(image_processor, tokenizer, chat_template=template)

    def __call__(self, images=None, text=None, **options):
        """`images` are TRL's: a list for each prompt, or None where a prompt has no image."""
        every = [image for of_prompt in images or [] for image in of_prompt or []]
        return super().__call__(images=every or None, text=text, **options)


def load_processor(path: str | Path):
    """A text model's is its tokenizer."""
    tokenizer, image_processor = load_tokenizer(path), image_parts(path)[0]
    tokenizer.padding_side = "left"
    return Processor(image_processor, tokenizer) if image_processor else tokenizer


def rewards_of(stops: list[int]) -> list:
    """TRL's reward functions: the accuracy, for a weight of 0, and verifier.reward, of 1.

    `stops` are the ids that end an answer: one that was cut off is wrong, as in the plain loops.
    """

    def judged(prompts, completions, completion_ids, **columns) -> list[Completion]:
        answers = []
        for place, (said, ids) in enumerate(zip(completions, completion_ids)):
            row = {name: columns[name][place] for name in COLUMNS if name in columns}
            prompt = prompt_of(row | {"prompt": prompts[place]})
            answer = Completion(prompt.id, ids, None, said[0]["content"], ids[-1] in stops)
            verifier.score([Group(prompt, EncodedPrompt([]), [answer])])
            answers.append(answer)
        return answers

    def accuracy(**columns) -> list[float]:
        return [answer.accuracy for answer in judged(**columns)]

    def reward(**columns) -> list[float]:
        return [answer.reward for answer in judged(**columns)]

    return [accuracy, reward]
