"""The network: sampling and log-probabilities of a Qwen3-VL or a text model of transformers.

Three rules make sampler and trainer one and the same distribution:
- a prompt is encoded once, by `encode`, and travels with its group;
- both sides turn logits into log-probs by `sampling_logprobs`: divided by the temperature, without
  vision tokens (a sampled `<|image_pad|>` would break the training forward);
- masks come from lengths, never from `ids != pad`: where pad is EOS, as in many tokenizers, EOS
  would lose its gradient.
"""

import functools
import gc
import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTORCH_ALLOC_CONF" not in os.environ:  # else micro-batches of many lengths leave gaps
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationConfig,
)
from transformers.utils import cached_file

from plumbing import UsageError
from plumbing.attention import without_masks
from plumbing.encode import (
    config_of,
    encode,
    image_parts,
    load_tokenizer,
    stop_ids,
    unloadable,
    vision_token_ids,
)
from plumbing.lora import base_model_of, train_adapters
from plumbing.rollout import Completion, EncodedPrompt, Group, Prompt

VOCABULARY_CHUNK = 1024  # tokens whose logits exist at one time: 1024 x 152k in fp32 are 0.6 GB
VIDEO_CONFIG = "video_preprocessor_config.json"  # unused here, but vLLM loads no Qwen3-VL without

# its gradients can be NaN under explicit masks (pytorch#196678); importing vLLM does the same
torch.backends.cuda.enable_cudnn_sdp(False)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class Policy:
    def __init__(
        self, path: str | Path, device="auto", dtype="fp32", lora=0, recompute_layers=False
    ):
        """Loads a hub id or a `save_pretrained` folder of a whole model or of LoRA adapters.

        Args:
            device: "auto" is CUDA where there is one.
            dtype: "fp32", "bf16" or, for tests, "fp64". Adapters are always fp32.
            lora: rank of new adapters; 0 for none. A folder of adapters keeps its own rank.
            recompute_layers: compute each layer again in the backward pass instead of storing
                what is inside it; saves memory, changes no result.
        """
        gc.collect()  # of a model that nobody holds any more: its layers may refer to themselves
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(
                f"--device {device}: torch {torch.__version__} finds no CUDA here; use cpu"
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[dtype]
        self.tokenizer = load_tokenizer(path)
        self.image_processor, self.image_token_id = image_parts(path)
        self.model = load_model(path, self.dtype)
        without_masks(self.model)
        self.model.to(self.device).eval()  # no dropout: sampler and trainer are one function
        self.never_sampled = vision_token_ids(self.model.config)
        self.eos_token_ids = stop_ids(path, self.tokenizer)
        self.base_path = base_model_of(path)
        # A model's own sampling settings (Qwen3-VL: top_k 20, top_p 0.8) would bias the ratio.
        # They are put aside for its checkpoints.
        self.stock_generation_config = self.model.generation_config
        self.model.generation_config = GenerationConfig()
        video = cached_file(path, VIDEO_CONFIG, _raise_exceptions_for_missing_entries=False)
        self.video_config = Path(video).read_text() if video else None
        if self.image_processor:
            self.model.base_model.visual.requires_grad_(False)  # delete to train it, too
        else:
            self._check_logits(path)
        if lora or self.has_adapters:
            train_adapters(self.model, lora, path)
        if recompute_layers:
            checkpoint_layers(self.model)

    @property
    def has_adapters(self) -> bool:
        return self.model._hf_peft_config_loaded

    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that are trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    # -------------------------------------------------------------------------------- sampling

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        return encode(prompt, self.tokenizer, self.image_processor, self.image_token_id)

    @torch.no_grad()
    def sample(
        self,
        prompts: list[Prompt],
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[Group]:
        """P groups of G completions. `seed` alone decides them, whatever was sampled before."""
        torch.manual_seed(seed)
        encoded = [self.encode(prompt) for prompt in prompts]
        slots = [one for one in encoded for _ in range(group_size)]
        ids, attention, positions, cache = self.prefill_prompts(slots)
        stops, token = torch.tensor(self.eos_token_ids, device=self.device), ids[:, -1:]
        going, tokens, logprobs = torch.ones_like(token, dtype=torch.bool), [], []
        while len(tokens) < max_new_tokens and going.any():
            hidden = self.model.base_model(
                input_ids=token,
                attention_mask=attention,
                position_ids=positions[..., -1:] + len(tokens),
                past_key_values=cache,
            ).last_hidden_state[:, -1]  # (B, H)
            distribution = self.sampling_logprobs(self.logits_of(hidden), temperature)  # (B, V)
            if distribution.isnan().any():
                raise FloatingPointError("the policy's logits are nan or infinite")
            token = torch.multinomial(distribution.softmax(dim=-1), 1)  # (B, 1)
            tokens.append(token)
            logprobs.append(distribution.gather(-1, token))
            attention = longer(attention, 1)
            going &= ~torch.isin(token, stops)  # what a row says after EOS is cut off below
        tokens, logprobs = torch.cat(tokens, dim=1), torch.cat(logprobs, dim=1)  # (B, T)
        groups = [Group(prompt, one, []) for prompt, one in zip(prompts, encoded)]
        for row, (ids, values) in enumerate(zip(tokens.tolist(), logprobs.tolist())):
            stop = next((t for t, id in enumerate(ids) if id in self.eos_token_ids), None)
            length = len(ids) if stop is None else stop + 1
            text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
            group = groups[row // group_size]
            group.completions.append(
                Completion(
                    group.prompt.id, ids[:length], values[:length], text, finished=stop is not None
                )
            )
        return groups

    def sampling_logprobs(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """Log-probs (…, V) of the distribution that is sampled, from the model's logits."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        never = torch.tensor(self.never_sampled, device=logits.device, dtype=torch.long)
        return torch.log_softmax(logits.index_fill(-1, never, float("-inf")), dim=-1)

    # ------------------------------------------------------------------------------- log-probs

    def logprobs(
        self, rows: list[tuple[EncodedPrompt, list[int]]], temperature: float, entropy: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Token log-probs of completions, with gradient.

        Args:
            rows: B pairs of an encoded prompt and the completion's token ids, EOS included.
        Returns:
            log-probs (B, T), 0 beyond a row's length; mask (B, T), True on the completion's
            tokens; on request the entropy (B, T) in nats of each token's distribution.
        """
        ids, attention, positions, cache = self.prefill_prompts([encoded for encoded, _ in rows])
        completions = [torch.tensor(tokens, device=self.device) for _, tokens in rows]
        targets = pad_sequence(completions, batch_first=True)  # (B, T)
        lengths = torch.tensor([len(tokens) for _, tokens in rows], device=self.device)
        steps = torch.arange(targets.shape[1], device=self.device)
        mask = steps < lengths[:, None]  # (B, T)
        hidden = self.model.base_model(
            input_ids=torch.cat([ids[:, -1:], targets[:, :-1]], dim=1),  # each predicts the next
            attention_mask=longer(attention, targets.shape[1] - 1),
            position_ids=positions[..., -1:] + steps,
            past_key_values=cache,
        ).last_hidden_state  # (B, T, H)
        chunks = zip(hidden[mask].split(VOCABULARY_CHUNK), targets[mask].split(VOCABULARY_CHUNK))
        parts = [
            checkpoint(self._project, h, t, temperature, entropy, use_reentrant=False)
            for h, t in chunks
        ]
        values = torch.cat(parts)  # (N, 1 or 2), of the N real tokens
        laid_out = (
            values.new_zeros(mask.shape).masked_scatter(mask, column)
            for column in values.unbind(-1)
        )
        logprobs, *more = laid_out
        return logprobs, mask, *more

    def logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (…, V) from the last hidden states (…, H)."""
        logits = self.model.get_output_embeddings()(hidden)
        cap = getattr(self.model.config, "final_logit_softcapping", None)  # Gemma's
        return torch.tanh(logits / cap) * cap if cap else logits

    @torch.no_grad()
    def _check_logits(self, path: str | Path) -> None:
        """UsageError if a model does more to its logits than `logits_of` does."""
        ids = torch.tensor([self.eos_token_ids[:1]], device=self.device)
        theirs = self.model(input_ids=ids).logits
        if not torch.equal(theirs, self.logits_of(self.model.base_model(ids).last_hidden_state)):
            raise UsageError(
                f"model {path}: {type(self.model).__name__} scales its logits in a way of its own; "
                "teach it to Policy.logits_of, or take another model"
            )

    def _project(self, hidden, target, temperature, entropy):
        logprobs = self.sampling_logprobs(self.logits_of(hidden), temperature)  # (N, V)
        values = [logprobs.gather(-1, target[:, None])[:, 0]]
        if entropy:
            finite = logprobs.masked_fill(logprobs == float("-inf"), 0.0)
            values.append(-(logprobs.exp() * finite).sum(dim=-1))
        return torch.stack(values, dim=-1)

    def prefill_prompts(
        self, rows: list[EncodedPrompt]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, DynamicCache]:
        """Runs each distinct prompt once, all but its last token, and copies its keys and values.

        So a group's prompt with its images is computed once, not G times, in sampling and in
        training, where the gradient flows back through the copies (as in Prefix Grouper,
        arXiv 2506.05433).

        Returns:
            of the B rows, padded on the left: token ids (B, S), attention mask (B, S) or None
            where nothing is padded, positions (3, B, S), of a text model (B, S), and a cache of
            length S - 1.
        """
        distinct = {id(encoded): encoded for encoded in rows}
        prompts, order = list(distinct.values()), list(distinct)
        width = max(len(prompt.token_ids) for prompt in prompts)
        padding = [width - len(prompt.token_ids) for prompt in prompts]
        # attention hides the padding, so any id will do that is not an image's
        padded = [[0] * pad + prompt.token_ids for pad, prompt in zip(padding, prompts)]
        ids = torch.tensor(padded, device=self.device)
        starts = torch.tensor(padding, device=self.device)
        attention = (torch.arange(width, device=self.device) >= starts[:, None]).long()
        images = {}
        if pictured := [prompt for prompt in prompts if prompt.pixel_values is not None]:
            pixels = torch.cat([prompt.pixel_values for prompt in pictured])
            grids = torch.cat([prompt.image_grid_thw for prompt in pictured])
            images["pixel_values"] = pixels.to(self.device, self.dtype)
            images["image_grid_thw"] = grids.to(self.device)
        if self.image_processor:
            types = (ids == self.image_token_id).int()
            positions, _ = self.model.base_model.get_rope_index(
                ids, types, images.get("image_grid_thw"), attention_mask=attention
            )
            images["mm_token_type_ids"] = types[:, :-1]
        else:
            positions = (attention.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache()  # without the config: a sliding window masks keys, and drops none
        self.model.base_model(
            input_ids=ids[:, :-1],
            attention_mask=longer(attention, -1) if any(padding) else None,
            position_ids=positions[..., :-1],
            past_key_values=cache,
            **images,
        )
        copies = [order.index(id(encoded)) for encoded in rows]  # (B,)
        copies = torch.tensor(copies, device=self.device)
        cache.batch_select_indices(copies)
        attention = attention[copies] if any(padding) else None
        return ids[copies], attention, positions[..., copies, :], cache


def longer(attention: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """The mask (B, S) with so many tokens more, or fewer. Padding after a row needs no mask."""
    return attention if attention is None else pad(attention, (0, tokens), value=1)


def auto_class(config):
    """The class of transformers that loads a model: it may read images, or text only."""
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def load_model(path: str | Path, dtype: torch.dtype):
    """A text model, or one with multimodal rotary positions; no weight is missing."""
    try:
        loader = auto_class(config_of(path))
        model, loaded = loader.from_pretrained(
            path, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # of a dozen types, for a missing, cut or foreign file
        raise unloadable(path, broken_weights(path) or error) from error
    if missing := loaded["missing_keys"]:
        raise UsageError(
            f"model {path}: {len(missing)} weights are missing, such as {min(missing)}"
        )
    if hasattr(model.config, "vision_config") and not hasattr(model.base_model, "get_rope_index"):
        raise UsageError(
            f"model {path}: {type(model).__name__} has no multimodal rotary positions; "
            "take a Qwen3-VL, or a text model"
        )
    return model


def broken_weights(path: str | Path) -> str | None:
    """Which file of a folder holds no weights, and why: what transformers says names none."""
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            safe_open(file, "pt")
        except SafetensorError as error:
            pointer = file.open("rb").read(23) == b"version https://git-lfs"
            return f"{file.name}: " + ("a Git LFS pointer; git lfs pull" if pointer else str(error))
    return None


def checkpoint_layers(model) -> None:
    """Makes each layer of the language model store its input alone and recompute the rest.

    transformers' own gradient checkpointing drops the cache, in which rows share their prompt:
    here keys and values go through the checkpoint as tensors.
    """
    for layer in getattr(model.base_model, "language_model", model.base_model).layers:
        index = layer.self_attn.layer_idx
        layer.forward = functools.partial(_checkpointed, layer.forward, index)


def _checkpointed(forward, index: int, hidden, past_key_values=None, **rest):
    if not torch.is_grad_enabled():
        return forward(hidden, past_key_values=past_key_values, **rest)

    def compute(hidden, *before):
        cache = DynamicCache()
        if before:
            cache.update(*before, index)
        hidden = forward(hidden, past_key_values=cache, **rest)
        return (
            (hidden,) if before else (hidden, cache.layers[index].keys, cache.layers[index].values)
        )

    before = ()
    if past_key_values.get_seq_length(index):
        before = past_key_values.layers[index].keys, past_key_values.layers[index].values
    hidden, *prompt = checkpoint(compute, hidden, *before, use_reentrant=False)
    if prompt:  # completions come second, and nobody reads what they would leave in the cache
        past_key_values.update(*prompt, index)
    return hidden
