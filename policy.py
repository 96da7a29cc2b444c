"""Who answers: model, sampling, log-probabilities, checkpoints.  Plumbing; skip it on a first read.

Shapes: P prompts a step, G slots a group, B = P*G sequences, T completion length, V vocabulary.

The policy is a Qwen3-VL of transformers, of any size. Three rules keep its two forward passes, the
sampler's and the trainer's, one and the same distribution:
- prompts are encoded once, by `encode`, and travel with their group;
- logits are divided by the temperature, and vision tokens (a sampled `<|image_pad|>` would break the training forward)
  masked, by the same function `adjust` on both sides;
- masks come from lengths, never from `ids != pad`: where pad is EOS, as in many tokenizers, EOS would lose its gradient.
"""

import errno
import gc
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch
import transformers
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
)
from transformers.utils import cached_file

from large import checkpoint_layers, stored_bytes, train_adapters
from tasks import Prompt, UsageError

VOCABULARY_CHUNK = 1024  # tokens whose logits exist at one time: 1024 x 152k fp32 logits are 0.6 GB
VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
VIDEO_CONFIG = "video_preprocessor_config.json"  # not used here, but vLLM loads no Qwen3-VL without it: kept for `save`

SHARD = "5GB"  # of a checkpoint's safetensors

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
    trainer_logprobs: list[float] | None = None  # where vLLM sampled: the trainer's own, grpo.py's to fill in


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


def image_parts(path: str | Path) -> tuple:
    """The image processor of a model, and the id of the token that stands for an image; no weights are loaded."""
    try:
        processor = AutoImageProcessor.from_pretrained(path, backend="pil")  # needs no torchvision
        return processor, AutoConfig.from_pretrained(whole_model(path)).image_token_id
    except (OSError, ValueError, AttributeError) as error:
        raise unloadable(path, error) from error


def stop_ids(path: str | Path, tokenizer) -> list[int]:
    """The token ids that end an answer: the generation config's, else the tokenizer's."""
    try:
        stop = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # there is none
        stop = None
    stop = tokenizer.eos_token_id if stop is None else stop
    return stop if isinstance(stop, list) else [stop]


def whole_model(path: str | Path) -> str:
    """The model that a checkpoint of LoRA adapters belongs to; any other path is itself."""
    adapter = Path(path) / "adapter_config.json"
    return json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else str(path)


def unloadable(path: str | Path, error: Exception) -> UsageError:
    reason = str(error).strip().splitlines()[0]
    return UsageError(f"model {path}: cannot be loaded ({reason}); give a hub id or a save_pretrained folder of an "
                      "image-text-to-text model with its image processor")  # fmt: skip


def tokenizer_fingerprint(tokenizer) -> str:
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:12]


def encode(prompt: Prompt, tokenizer, image_processor, image_token_id: int) -> Inputs:
    """Renders the chat template and expands each image placeholder to as many tokens as its image has."""
    ids = placeholder_ids(prompt, tokenizer, image_token_id)
    if not prompt.images:
        return Inputs(ids)
    pixels = image_processor(images=prompt.images, return_tensors="pt")
    lengths = iter((pixels.image_grid_thw.prod(-1) // image_processor.merge_size**2).tolist())
    expanded = [token for id in ids for token in ([id] * next(lengths) if id == image_token_id else [id])]
    return Inputs(expanded, pixels.pixel_values, pixels.image_grid_thw)


def placeholder_ids(prompt: Prompt, tokenizer, image_token_id: int) -> list[int]:
    """The rendered chat template's token ids, one image token an image."""
    text = tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if ids.count(image_token_id) != len(prompt.images):
        raise UsageError(f"prompt {prompt.id}: {ids.count(image_token_id)} image placeholders in its text, but "
                         f"{len(prompt.images)} images")  # fmt: skip
    return ids


def prompt_length(messages: list[dict], sizes: list[tuple[int, int]], tokenizer, image_processor, image_token_id: int) -> int:
    """How many token ids `encode` makes of a prompt whose images have these (width, height), without their pixels."""
    ids = placeholder_ids(Prompt("of the data set", messages, sizes, ""), tokenizer, image_token_id)
    patches = sum(image_processor.get_number_of_image_patches(height, width) for width, height in sizes)
    return len(ids) - len(sizes) + patches // image_processor.merge_size**2


class Policy:
    def __init__(
        self, path: str | Path, device: str = "auto", dtype: str = "auto", train_vision: bool = False, lora: int = 0,
        gradient_checkpointing: bool = False,
    ):  # fmt: skip
        """Loads a hub id or a `save_pretrained` folder, of a whole model or of a LoRA adapter (then its base, too).

        Args:
            dtype: of the weights; "auto" is bf16 on CUDA, fp32 elsewhere. LoRA's own are always fp32.
            lora: rank of the adapters that are trained in place of the weights; 0 for none. A folder's own rank counts before it.
            gradient_checkpointing: compute layers again in the backward pass instead of keeping what is in them.
        """
        gc.collect()  # of a model that nobody holds any more: its layers may refer to themselves
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(f"--device {device}: torch {torch.__version__} finds no CUDA here; take cpu")
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        on_gpu = self.device.type == "cuda"
        dtype = ("bf16" if on_gpu else "fp32") if dtype == "auto" else dtype
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[dtype]  # fp64: for tests
        self.tokenizer = load_tokenizer(path)
        self.image_processor, self.image_token_id = image_parts(path)
        try:
            self.model, loaded = AutoModelForImageTextToText.from_pretrained(path, dtype=self.dtype, output_loading_info=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise unloadable(path, error) from error
        config = self.model.config
        if loaded["missing_keys"]:
            raise UsageError(
                f"model {path}: {len(loaded['missing_keys'])} weights are missing, as {min(loaded['missing_keys'])}"
            )
        if not hasattr(self.model.base_model, "get_rope_index"):
            raise UsageError(f"model {path}: {type(self.model).__name__} has no multimodal rotary positions; take a Qwen3-VL")
        self.model.to(self.device).eval()  # no dropout: sampler and trainer must be the same function
        self.never_sampled = [getattr(config, name) for name in VISION_TOKENS if getattr(config, name, None) is not None]
        # a model's own sampling settings (Qwen3-VL: top_k 20, top_p 0.8) would bias the ratio: kept for `save`, not used
        video = cached_file(path, VIDEO_CONFIG, _raise_exceptions_for_missing_entries=False)
        self.video_config = Path(video).read_text() if video else None
        self.stock_generation_config, self.model.generation_config = self.model.generation_config, GenerationConfig()
        self.eos_token_ids = stop_ids(path, self.tokenizer)
        self.model.base_model.visual.requires_grad_(train_vision)
        self.base_path = whole_model(path)
        if lora or self.model._hf_peft_config_loaded:
            train_adapters(self.model, lora, path)
        if gradient_checkpointing:
            checkpoint_layers(self.model)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    # ----------------------------------------------------------------------------------------------- encode and sample

    def encode(self, prompt: Prompt) -> Inputs:
        return encode(prompt, self.tokenizer, self.image_processor, self.image_token_id)

    @torch.no_grad()
    def sample(self, prompts: list[Prompt], group_size: int, max_new_tokens: int, temperature: float, seed: int) -> list[Group]:
        """P groups of G completions. `seed` alone decides the outcome: the generator's state before does not matter."""
        torch.manual_seed(seed)
        inputs = [self.encode(prompt) for prompt in prompts]
        ids, attention, positions, cache = self._read([one for one in inputs for _ in range(group_size)])
        recorder = BehaviorRecorder(self, temperature)
        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0,  # the recorder applies the temperature
            max_new_tokens=max_new_tokens, eos_token_id=self.eos_token_ids, pad_token_id=self.eos_token_ids[0],
        )  # fmt: skip
        sequences = self.model.generate(
            input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache,
            generation_config=settings, logits_processor=[recorder],
        )  # fmt: skip
        tokens = sequences[:, ids.shape[1] :]  # (B, T)
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

    def logprobs(
        self, rows: list[tuple[Inputs, list[int]]], temperature: float, entropy: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Token log-probs of completions, with gradient.

        Args:
            rows: B pairs of an encoded prompt and the completion's token ids, EOS included.
        Returns:
            log-probs (B, T), 0 beyond a row's length; mask (B, T), True on the completion's tokens; if asked for, the
            entropy (B, T) in nats of the distribution that each token is drawn from.
        """
        ids, attention, positions, cache = self._read([inputs for inputs, _ in rows])
        completions = [torch.tensor(tokens, device=self.device) for _, tokens in rows]
        targets = pad_sequence(completions, batch_first=True)  # (B, T); what stands in the padding is masked
        lengths = torch.tensor([len(tokens) for _, tokens in rows], device=self.device)
        steps = torch.arange(targets.shape[1], device=self.device)
        mask = steps < lengths[:, None]  # (B, T)
        hidden = self.model.base_model(
            input_ids=torch.cat([ids[:, -1:], targets[:, :-1]], dim=1),  # token t is predicted by the one before it
            attention_mask=torch.cat([attention, mask[:, :-1].to(attention.dtype)], dim=1),
            position_ids=positions[:, :, -1:] + steps,
            past_key_values=cache,
        ).last_hidden_state  # (B, T, H)
        parts = [
            checkpoint(self._project, h, t, temperature, entropy, use_reentrant=False)
            for h, t in zip(hidden[mask].split(VOCABULARY_CHUNK), targets[mask].split(VOCABULARY_CHUNK))
        ]
        values = torch.cat(parts)  # (N, 1 or 2), of the N real tokens
        logprobs, *more = (values.new_zeros(mask.shape).masked_scatter(mask, column) for column in values.unbind(-1))
        return logprobs, mask, *more

    def _project(self, hidden, target, temperature, entropy):
        logprobs = self.adjust(self.model.get_output_embeddings()(hidden), temperature)  # (N, V)
        values = [logprobs.gather(-1, target[:, None])[:, 0]]
        if entropy:
            values.append(-(logprobs.exp() * logprobs.masked_fill(logprobs == float("-inf"), 0.0)).sum(dim=-1))
        return torch.stack(values, dim=-1)

    def _read(self, rows: list[Inputs]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, DynamicCache]:
        """Runs each distinct prompt once, all but its last token, and copies its keys and values to all of its rows.

        A group's prompt with its images is thus computed once, not G times, in sampling as in training, where the
        gradient flows back through the copies (as in Prefix Grouper, arXiv 2506.05433).

        Returns:
            of the B rows, padded on the left: token ids (B, S), attention mask (B, S), positions (3, B, S), cache (S - 1).
        """
        distinct = {id(inputs): inputs for inputs in rows}
        prompts, order = list(distinct.values()), list(distinct)
        width = max(len(prompt.token_ids) for prompt in prompts)
        padding = [width - len(prompt.token_ids) for prompt in prompts]
        # any id but an image's will do as padding: attention hides it
        ids = torch.tensor([[0] * pad + prompt.token_ids for pad, prompt in zip(padding, prompts)], device=self.device)
        attention = (torch.arange(width, device=self.device) >= torch.tensor(padding, device=self.device)[:, None]).long()
        images = {}
        if pictured := [prompt for prompt in prompts if prompt.pixel_values is not None]:
            images["pixel_values"] = torch.cat([prompt.pixel_values for prompt in pictured]).to(self.device, self.dtype)
            images["image_grid_thw"] = torch.cat([prompt.image_grid_thw for prompt in pictured]).to(self.device)
        types = (ids == self.image_token_id).int()
        positions, _ = self.model.base_model.get_rope_index(ids, types, images.get("image_grid_thw"), attention_mask=attention)
        cache = DynamicCache(config=self.model.config)
        self.model.base_model(
            input_ids=ids[:, :-1], attention_mask=attention[:, :-1], position_ids=positions[:, :, :-1],
            mm_token_type_ids=types[:, :-1], past_key_values=cache, **images,
        )  # fmt: skip
        copies = torch.tensor([order.index(id(inputs)) for inputs in rows], device=self.device)  # (B,)
        cache.batch_select_indices(copies)
        return ids[copies], attention[copies], positions[:, copies], cache

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def checkpoint_bytes(self, optimizer: torch.optim.Optimizer | None) -> int:
        """What `save` takes on disk: adapters, or all weights; and the optimizer's moments, if there are any yet."""
        kept = self.parameters() if self.model._hf_peft_config_loaded else list(self.model.parameters())
        if optimizer is not None:
            kept += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        return sum(stored_bytes(value) for value in kept)

    def save(self, path: Path, state: dict, optimizer: torch.optim.Optimizer | None = None) -> None:
        """A `save_pretrained` folder with `state.json` and `optimizer.pt`, written aside and renamed: all of it or nothing."""
        if not all(parameter.isfinite().all() for parameter in self.parameters()):
            raise FloatingPointError("a weight is not finite")
        path.parent.mkdir(parents=True, exist_ok=True)
        need, free = self.checkpoint_bytes(optimizer), shutil.disk_usage(path.parent).free
        if need > free:
            raise UsageError(f"{path}: no space left for a checkpoint of {need / 1e9:.3g} GB, only {free / 1e9:.3g}; free some, then the same "
                             "command resumes (--keep and --save-optimizers say what is kept)")  # fmt: skip
        aside = path.with_name(path.name + ".tmp")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            for part in (self.model, self.tokenizer, self.image_processor, self.stock_generation_config):
                part.save_pretrained(aside, **({"max_shard_size": SHARD} if part is self.model else {}))
            (aside / "state.json").write_text(json.dumps(state))
            if self.video_config:
                (aside / VIDEO_CONFIG).write_text(self.video_config)
            if optimizer is not None:
                torch.save(optimizer.state_dict(), aside / "optimizer.pt")
        except Exception as error:
            full = shutil.disk_usage(aside).free < 1 << 20  # each library has its own error for it
            shutil.rmtree(aside)
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise
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
        self.distribution = self.policy.adjust(scores, self.temperature)
        if self.distribution.isnan().any():
            raise FloatingPointError("the policy's logits are nan or infinite")
        return self.distribution

    def finish(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probs (B, T) of the tokens (B, T) that were sampled in all; padding after EOS holds numbers without meaning."""
        if len(self.drawn) < tokens.shape[1]:
            self.drawn.append(self.distribution.gather(-1, tokens[:, -1:]))
        return torch.cat(self.drawn, dim=-1)[:, : tokens.shape[1]]
