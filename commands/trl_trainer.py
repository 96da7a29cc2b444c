"""TRL's GRPOTrainer with a guide: a thin subclass that calls super().

1. Between generation and rewards npo.replace_slot gives slots to the guide's answers. So TRL's own
   code computes rewards, masks and advantages of the mixed groups.
2. The old log-probs of such a slot are those that the guide recorded. Without IS correction they
   are the policy's own, as TRL has them for every other slot.

Everything else is TRL's. It divides advantages by std + 1e-4, grpo.py by std + 1e-6. NPO's loss is
`loss_type="grpo"` without a KL term: NPOConfig below has these defaults. Without a guide and
without `watch` this is GRPOTrainer, bit for bit.

TRL calls, in a step: _generate_and_score_completions -> _generate, _calculate_rewards; then for
each micro-batch _compute_loss -> _get_per_token_logps_and_entropies.
"""

import dataclasses
import inspect
from dataclasses import dataclass, field

import torch
import trl
from accelerate.utils import gather_object

import npo
import verifier
from plumbing import UsageError
from plumbing.guide_cache import GuideCache
from plumbing.metrics import guide_metrics
from plumbing.rollout import Completion, EncodedPrompt, Group
from plumbing.trl_data import prompt_of

TESTED = "TRL 1.16 (with accelerate 1.15 and transformers 5.19)"
# TRL's private methods that are used here, with their first parameters
PRIVATE = {
    "_generate": "self, prompts",
    "_generate_single_turn": "self, prompt_ids, images, multimodal_fields, num_generations",
    "_generate_and_score_completions": "self, inputs",
    "_calculate_rewards": "self, inputs, prompts, completions, completion_ids_list",
    "_get_per_token_logps_and_entropies": "self, model, input_ids, attention_mask, logits_to_keep",
    "_compute_loss": "self, model, inputs",
    "_save_checkpoint": "self, model, trial",
}
OPTIONS = {"model", "args", "reward_funcs", "train_dataset", "processing_class", "peft_config"}


def flag(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class NPOConfig(trl.GRPOConfig):
    _argument_group_name = "TRL's GRPOConfig; some defaults are NPO's, gate, slots and more its own"
    gate: float = flag(0.6, "tau: a slot is replaced if the pass-rate is at most this")
    slots: int = flag(1, "how many slots, the last ones, the guide's answers may take")
    is_correction: bool = flag(True, "ratio pi_theta / pi_guide; if off, it starts at 1")
    # GRPO as in grpo.py and in the NPO authors' settings
    loss_type: str = flag("grpo", "grpo: mean over each sequence's tokens, then over sequences")
    epsilon: float = flag(0.2, "the ratio's clip range begins at 1 - epsilon")
    epsilon_high: float | None = flag(0.28, "the ratio's clip range ends at 1 + epsilon_high")
    beta: float = flag(0.0, "weight of a KL term; NPO has none")
    lr_scheduler_type: str = flag("constant", "schedule of the learning rate")
    weight_decay: float = flag(0.01, "of AdamW")
    logging_steps: float = flag(1, "steps between lines of the log")


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
            All reward functions must be plain functions.
        watch: without guides, too, fill in `groups` and `entropy`, log more, and take advantages of
            equal rewards for 0.
        All others: GRPOTrainer's.

    Attributes:
        groups: of the last batch, over all processes and in its order, the same on each:
            (group as sampled, group that is trained on), without messages and pictures.
        entropy: of the last step: minus the mean log-prob of the policy's own sampled tokens in
            nats, over all processes; those of displaced answers are not computed.
        silent: whether nothing is logged.
        holds: the checkpoint whose weights it has, where that is known; TRLRun's.
    """

    def __init__(self, *args, guides: GuideCache | None = None, watch: bool = False, **options):
        check_trl()
        super().__init__(*args, **options)
        for name in ["_metrics", "eos_token_ids", *["_last_loaded_step"] * self.use_vllm]:
            if not hasattr(self, name):
                raise moved(f"has no GRPOTrainer.{name}")
        self.guides, self.watch, self.silent = guides or GuideCache(), watch, False
        self.groups, self.entropy, self.holds = [], 0.0, None
        # rows of this process, which of them replace_slot has changed, all processes' rewards, the
        # batch in the loss, its sums
        self._asked, self._taken, self._paid, self._scored, self._sums = [], {}, None, None, []

    def _guided(self) -> bool:
        return bool(self.guides.answers) and self.state.global_step < self.guides.until

    def _watching(self) -> bool:
        return self.model.training and (self.watch or self._guided())

    def create_model_card(self, *_, **__) -> None:
        """None: TRL's would call a local base "None"."""

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
            answers = self._scored_answers(columns)
            self._taken = self._take_slots(prompt_ids, answers)
            for row, answer in self._taken.items():
                token_ids[row] = answer.token_ids
                texts[row] = [{"role": "assistant", "content": answer.text}]
                if logprobs is not None:  # vLLM's, which has not sampled this here
                    logprobs[row] = [None] * len(answer.token_ids)
        return prompt_ids, token_ids, tool_mask, texts, logprobs, *rest

    def _scored_answers(self, columns: dict) -> list[Completion]:
        """This process's answers, or the error of their rewards, which all processes raise."""
        try:
            paid = [function(**columns) for function in self.reward_funcs]
        except UsageError as error:
            return [error]
        answers, weights = [], self.reward_weights.tolist()
        texts, places = columns["completions"], zip(self._asked, columns["completion_ids"])
        for text, (row, ids), *rewards in zip(texts, places, *paid):
            finished = ids[-1] in self.eos_token_ids
            answer = Completion(row["prompt_id"], ids, None, text[0]["content"], finished)
            answer.answer = verifier.extract_answer(answer.text) if finished else None
            answer.accuracy = rewards[0]
            answer.reward = sum(w * r for w, r in zip(weights, rewards) if r is not None)
            answers.append(answer)
        return answers

    def _take_slots(self, prompt_ids: list, answers: list[Completion]) -> dict[int, Completion]:
        """Which rows of this process replace_slot has changed.

        A group may span processes: each process looks at all groups that it has a row of.
        """
        batch = gather_object(answers)  # of all processes
        if error := next((found for found in batch if isinstance(found, UsageError)), None):
            raise error
        size, here, step = self.num_generations, len(answers), self.state.global_step + 1
        first = self.accelerator.process_index * here  # place in the batch of the first row here
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
        ids, here = batch["completion_ids"], self.accelerator.process_index * len(inputs)
        # Equal rewards have A = 0, as in grpo.py. TRL leaves a rounding error over 1e-4, of which
        # AdamW makes full steps where nothing else has a gradient
        weights = self.reward_weights.to(self._paid.device)
        rewards = (self._paid * weights).nansum(dim=1).unflatten(0, (-1, self.num_generations))
        alike = (rewards == rewards[:, :1]).all(dim=1)  # (P,)
        alike = alike.repeat_interleave(self.num_generations)[here : here + len(inputs)]
        batch["advantages"] = batch["advantages"].masked_fill(alike, 0.0)
        changed = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # (B,)
        guided = changed.clone()
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        recorded = torch.full(ids.shape, torch.nan, dtype=dtype, device=ids.device)
        for row, answer in self._taken.items():  # nan: not a guide's (B, T)
            changed[row], guided[row] = True, answer.source != "policy"
            if self.args.is_correction and answer.behavior_logprobs:
                values = torch.tensor(answer.behavior_logprobs, dtype=dtype)
                recorded[row, : len(values)] = values
        if "importance_sampling_ratio" in batch:
            self._only_own(batch, changed)
        if "old_per_token_logps" in batch:
            own = batch["old_per_token_logps"]
            batch["old_per_token_logps"] = torch.where(recorded.isnan(), own, recorded)
        else:
            batch["guide_logprobs"] = recorded
        if "sampling_per_token_logps" in batch:  # where TRL masks what is too far off-policy
            theirs = batch.get("old_per_token_logps", recorded)
            sampling = batch["sampling_per_token_logps"]
            batch["sampling_per_token_logps"] = torch.where(changed[:, None], theirs, sampling)
        return batch | {"guided": guided}

    def _calculate_rewards(self, *args):
        self._paid = super()._calculate_rewards(*args)  # (B, functions), of all processes
        return self._paid

    def _only_own(self, batch: dict, changed: torch.Tensor) -> None:
        """vLLM's correction, and what TRL has logged of it, for the policy's own rows alone."""
        ratio = batch["importance_sampling_ratio"]  # (B, T), or (B, 1) of whole sequences
        mask = batch["completion_mask"].bool() if ratio.shape[1] > 1 else ratio.isfinite()
        own = ratio[mask & ~changed[:, None]]
        none = own.new_tensor(torch.nan)
        found = [own.min(), own.mean(), own.max()] if len(own) else [none] * 3
        found = self.accelerator.gather(torch.stack(found)[None])  # (processes, 3)
        found = found[~found[:, 0].isnan()]
        values = found[:, 0].min(), found[:, 1].mean(), found[:, 2].max()
        for name, value in zip(("min", "mean", "max"), values):
            name = f"sampling/importance_sampling_ratio/{name}"
            self._metrics["train"][name][-1] = value.item()
        ratio[changed] = 1.0

    def _compute_loss(self, model, inputs: dict):
        self._scored = inputs if "guided" in inputs else None
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, *args, **options):
        """TRL's. Where a batch has no old log-probs, its loss takes these, detached.

        A batch in which a guide has rows gets them here: its own there, TRL's in all others.
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
        self.entropy = entropy / max(tokens, 1.0)  # 0 if all are masked
        if guides:
            some = seen[seen[:, 3] > 0]
            found = ratios / guides, some[:, 4].min().item(), some[:, 5].max().item()
            for name, value in zip(("mean", "min", "max"), found):
                self._metrics["train"][f"npo/guide_ratio_{name}"].append(value)
