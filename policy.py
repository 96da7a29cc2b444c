"""Who answers: model, sampling, log-probabilities, checkpoints.  Plumbing; skip it on a first read.

Shapes: P prompts a step, G slots a group, B = P*G sequences, T completion length, V vocabulary.

The policy is any image-text-to-text model of transformers (made for Qwen3-VL). Three rules keep its two forward passes, the
sampler's and the trainer's, one and the same distribution:
- prompts are encoded once, by `encode`, and travel with their group;
- logits are divided by the temperature, and vision tokens (a sampled `<|image_pad|>` would break the training forward)
  masked, by the same function `adjust` on both sides;
- masks come from lengths, never from `ids != pad`: where pad is EOS, as in many tokenizers, EOS would lose its gradient.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig, LogitsProcessor

from tasks import Prompt, UsageError

VOCABULARY_CHUNK = 1024  # tokens whose logits exist at one time: 1024 x 152k fp32 logits are 0.6 GB
VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@dataclass
class Completion:
    """One sampled answer. `token_ids` include EOS if the model stopped by itself (`finished`)."""

    prompt_id: str
    token_ids: list[int]
    behavior_logprobs: list[float]  # of each token, under the policy that really sampled it
    text: str
    finished: bool
    source: str = "policy"  # or "guide@40": the guide's step
    accuracy: float | None = None  # accuracy and reward are the verifier's to fill in
    reward: float | None = None


@dataclass
class Inputs:
    """An encoded prompt: token ids with one `<|image_pad|>` per visual token, and the images' patches."""

    token_ids: list[int]
    pixel_values: torch.Tensor | None = None  # (patches, patch values)
    image_grid_thw: torch.Tensor | None = None  # (images, 3)


@dataclass
class Group:
    """A prompt and its G completions."""

    prompt: Prompt
    inputs: Inputs
    completions: list[Completion]


def load_tokenizer(path: str | Path):
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"model {path}: no tokenizer can be loaded ({reason}); give a hub id or a save_pretrained "
                         "folder") from error  # fmt: skip


def tokenizer_fingerprint(tokenizer) -> str:
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:12]


class Policy:
    def __init__(self, path: str | Path, device: str = "auto", dtype: str = "auto", train_vision: bool = False):
        """Loads a hub id or a `save_pretrained` folder. `dtype` "auto" is bf16 on CUDA, fp32 elsewhere."""
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        on_gpu = self.device.type == "cuda"
        dtype = ("bf16" if on_gpu else "fp32") if dtype == "auto" else dtype
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[dtype]  # fp64: for tests
        self.tokenizer = load_tokenizer(path)
        try:
            self.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")  # needs no torchvision
            self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=self.dtype).to(self.device)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"model {path}: cannot be loaded ({reason}); give a hub id or a save_pretrained folder of an "
                             "image-text-to-text model with its image processor") from error  # fmt: skip
        self.model.eval()  # no dropout: sampler and trainer must be the same function
        config = self.model.config
        self.image_token_id = config.image_token_id
        self.never_sampled = [getattr(config, name) for name in VISION_TOKENS if getattr(config, name, None) is not None]
        stop = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        self.eos_token_ids = stop if isinstance(stop, list) else [stop]
        if not train_vision:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(".visual." not in f".{name}")

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    # ----------------------------------------------------------------------------------------------- encode and sample

    def encode(self, prompt: Prompt) -> Inputs:
        """Renders the chat template and expands each image placeholder to as many tokens as its image has."""
        text = self.tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if ids.count(self.image_token_id) != len(prompt.images):
            raise UsageError(f"prompt {prompt.id}: {ids.count(self.image_token_id)} image placeholders in its text, but "
                             f"{len(prompt.images)} images")  # fmt: skip
        if not prompt.images:
            return Inputs(ids)
        pixels = self.image_processor(images=prompt.images, return_tensors="pt")
        lengths = iter((pixels.image_grid_thw.prod(-1) // self.image_processor.merge_size**2).tolist())
        expanded = [token for id in ids for token in ([id] * next(lengths) if id == self.image_token_id else [id])]
        return Inputs(expanded, pixels.pixel_values, pixels.image_grid_thw)

    @torch.no_grad()
    def sample(self, prompts: list[Prompt], group_size: int, max_new_tokens: int, temperature: float, seed: int) -> list[Group]:
        """P groups of G completions. `seed` alone decides the outcome: the generator's state before does not matter."""
        torch.manual_seed(seed)
        inputs = [self.encode(prompt) for prompt in prompts]
        batch = self._batch(inputs, [prompt.token_ids for prompt in inputs], pad_left=True)
        recorder = BehaviorRecorder(self, temperature)
        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0,  # a model's own would bias the ratio
            num_return_sequences=group_size, max_new_tokens=max_new_tokens,
            eos_token_id=self.eos_token_ids, pad_token_id=self.eos_token_ids[0],
        )  # fmt: skip
        sequences = self.model.generate(**batch, generation_config=settings, logits_processor=[recorder])
        tokens = sequences[:, batch["input_ids"].shape[1] :]  # (B, T)
        logprobs = recorder.finish(tokens).tolist()  # (B, T)
        groups = [Group(prompt, encoded, []) for prompt, encoded in zip(prompts, inputs)]
        for row, ids in enumerate(tokens.tolist()):
            stop = next((t for t, id in enumerate(ids) if id in self.eos_token_ids), None)
            length = len(ids) if stop is None else stop + 1
            group = groups[row // group_size]
            text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
            group.completions.append(
                Completion(group.prompt.id, ids[:length], logprobs[row][:length], text, finished=stop is not None)
            )
        return groups

    def adjust(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """Log-probs (…, V) of the distribution that is sampled: at this temperature, without vision tokens."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        never = torch.tensor(self.never_sampled, device=logits.device)
        return torch.log_softmax(logits.index_fill(-1, never, float("-inf")), dim=-1)

    # ------------------------------------------------------------------------------------------------------ log-probs

    def logprobs(self, rows: list[tuple[Inputs, list[int]]], temperature: float) -> tuple[torch.Tensor, ...]:
        """Token log-probs of completions, with gradient.

        Args:
            rows: B pairs of an encoded prompt and the completion's token ids, EOS included.
        Returns:
            log-probs (B, T), 0 beyond a row's length; mask (B, T), True on the completion's tokens.
        """
        lengths = torch.tensor([len(completion) for _, completion in rows], device=self.device)
        starts = torch.tensor([len(inputs.token_ids) for inputs, _ in rows], device=self.device)
        batch = self._batch([inputs for inputs, _ in rows], [inputs.token_ids + tokens for inputs, tokens in rows])
        hidden = self.model.base_model(**batch, use_cache=False).last_hidden_state  # (B, S, H)
        steps = torch.arange(int(lengths.max()), device=self.device)
        mask = steps < lengths[:, None]  # (B, T)
        row, step = mask.nonzero(as_tuple=True)  # the N real completion tokens
        position = starts[row] + step
        target = batch["input_ids"][row, position]
        hidden = hidden[row, position - 1]  # (N, H): position s - 1 predicts token s
        parts = [
            checkpoint(self._project, h, t, temperature, use_reentrant=False)
            for h, t in zip(hidden.split(VOCABULARY_CHUNK), target.split(VOCABULARY_CHUNK))
        ]
        logprobs = torch.cat(parts)  # (N,)
        return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs), mask

    def _project(self, hidden, target, temperature):
        logprobs = self.adjust(self.model.get_output_embeddings()(hidden), temperature)  # (N, V)
        return logprobs.gather(-1, target[:, None])[:, 0]

    def _batch(self, inputs: list[Inputs], sequences: list[list[int]], pad_left: bool = False) -> dict[str, torch.Tensor]:
        width = max(map(len, sequences))
        ids, attention = [], []
        for sequence in sequences:
            padding = [0] * (width - len(sequence))  # any id that is not an image's: attention hides it
            ids.append(padding + sequence if pad_left else sequence + padding)
            attention.append(padding + [1] * len(sequence) if pad_left else [1] * len(sequence) + padding)
        ids = torch.tensor(ids, device=self.device)
        batch = {
            "input_ids": ids,
            "attention_mask": torch.tensor(attention, device=self.device),
            "mm_token_type_ids": (ids == self.image_token_id).int(),
        }
        if pictures := [one for one in inputs if one.pixel_values is not None]:
            batch["pixel_values"] = torch.cat([one.pixel_values for one in pictures]).to(self.device, self.dtype)
            batch["image_grid_thw"] = torch.cat([one.image_grid_thw for one in pictures]).to(self.device)
        return batch

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def save(self, path: Path, state: dict, optimizer: torch.optim.Optimizer | None = None) -> None:
        """A `save_pretrained` folder with `state.json` and `optimizer.pt`, written aside and renamed: all of it or nothing."""
        aside = path.with_name(path.name + ".tmp")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for part in (self.model, self.tokenizer, self.image_processor):
            part.save_pretrained(aside)
        (aside / "state.json").write_text(json.dumps(state))
        if optimizer is not None:
            torch.save(optimizer.state_dict(), aside / "optimizer.pt")
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)


class BehaviorRecorder(LogitsProcessor):
    """Turns logits into the log-probs that are sampled from, and keeps those of the tokens drawn: (B, V) at a time.

    `generate` calls it once a token, before its token is drawn; so each call first records the token of the last one.
    """

    def __init__(self, policy: Policy, temperature: float):
        self.policy, self.temperature = policy, temperature
        self.drawn, self.distribution = [], None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.distribution is not None:
            self.drawn.append(self.distribution.gather(-1, input_ids[:, -1:]))
        if scores.isnan().any():
            raise FloatingPointError("the policy's logits are nan")
        self.distribution = self.policy.adjust(scores, self.temperature)
        return self.distribution

    def finish(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probs (B, T) of the tokens (B, T) that were sampled in all; padding after EOS holds numbers without meaning."""
        if len(self.drawn) < tokens.shape[1]:
            self.drawn.append(self.distribution.gather(-1, tokens[:, -1:]))
        return torch.cat(self.drawn, dim=-1)[:, : tokens.shape[1]]
