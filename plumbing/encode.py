"""From prompts to token ids and patches. Needs a model's folder, but not its weights."""

import hashlib
import json
from pathlib import Path

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig

from plumbing import UsageError
from plumbing.lora import adapter_rank, base_model_of
from plumbing.rollout import EncodedPrompt, Prompt

MAX_IMAGES = 16  # in one prompt: vLLM reserves room for as many
VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def load_tokenizer(path: str | Path):
    if str(path).count("/") > 1 and not Path(path).is_dir():  # a hub id has one
        raise UsageError(
            f"model {path}: there is no such folder; give a hub id or a save_pretrained folder"
        )
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"model {path}: its tokenizer cannot be loaded ({reason}); "
            "give a hub id or a save_pretrained folder"
        ) from error


def image_parts(path: str | Path) -> tuple:
    """A model's image processor and the id of its image token; no weights are loaded."""
    try:
        processor = AutoImageProcessor.from_pretrained(path, backend="pil")  # without torchvision
        return processor, AutoConfig.from_pretrained(base_model_of(path)).image_token_id
    except (OSError, ValueError, AttributeError) as error:
        raise unloadable(path, error) from error


def unloadable(path: str | Path, error: Exception) -> UsageError:
    reason = str(error).strip().splitlines()[0]
    return UsageError(
        f"model {path}: cannot be loaded ({reason}); give a hub id or a save_pretrained folder "
        "of an image-text-to-text model with its image processor"
    )


def vision_token_ids(config) -> list[int]:
    """Tokens that are never sampled: a sampled `<|image_pad|>` would break the training forward."""
    ids = (getattr(config, name, None) for name in VISION_TOKENS)
    return [id for id in ids if id is not None]


def stop_ids(path: str | Path, tokenizer) -> list[int]:
    """The token ids that end an answer: the generation config's, else the tokenizer's."""
    try:
        stop = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the folder has no generation config
        stop = None
    stop = tokenizer.eos_token_id if stop is None else stop
    return stop if isinstance(stop, list) else [stop]


def tokenizer_fingerprint(tokenizer) -> str:
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:12]


def check_start(start: str | Path, model: str | Path, lora: int = 0) -> None:
    """UsageError if a checkpoint is not one of `model`: other tokens, another size or rank."""
    found = []
    for path, rank in ((start, adapter_rank(start)), (model, adapter_rank(model) or lora)):
        text = AutoConfig.from_pretrained(base_model_of(path)).text_config
        tokens = tokenizer_fingerprint(load_tokenizer(path))
        found.append((text.hidden_size, text.num_hidden_layers, tokens, rank))
    if found[0] != found[1]:
        raise UsageError(
            f"--start {start}: is no checkpoint of --model {model} --lora {lora}: its size, tokens "
            "or rank differ; give the --model and --lora of its run"
        )


def encode(prompt: Prompt, tokenizer, image_processor, image_token_id: int) -> EncodedPrompt:
    """Renders the chat template and repeats each image token once for every visual token."""
    ids = placeholder_ids(prompt, tokenizer, image_token_id)
    if not prompt.images:
        return EncodedPrompt(ids)
    pixels = image_processor(images=prompt.images, return_tensors="pt")
    visual_tokens = pixels.image_grid_thw.prod(-1) // image_processor.merge_size**2
    copies = iter(visual_tokens.tolist())
    expanded = []
    for id in ids:
        expanded += [id] * (next(copies) if id == image_token_id else 1)
    return EncodedPrompt(expanded, pixels.pixel_values, pixels.image_grid_thw)


def placeholder_ids(prompt: Prompt, tokenizer, image_token_id: int) -> list[int]:
    """The rendered chat template's token ids, with one image token per image."""
    text = tokenizer.apply_chat_template(
        prompt.messages, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if ids.count(image_token_id) != len(prompt.images):
        raise UsageError(
            f"prompt {prompt.id}: {ids.count(image_token_id)} image placeholders in its text, "
            f"but {len(prompt.images)} images"
        )
    return ids


def prompt_length(
    messages: list[dict], sizes: list[tuple[int, int]], tokenizer, image_processor, image_token_id
) -> int:
    """How many token ids `encode` makes, from the images' (width, height) alone."""
    prompt = Prompt("of the data set", messages, sizes, "")
    ids = placeholder_ids(prompt, tokenizer, image_token_id)
    patches = sum(
        image_processor.get_number_of_image_patches(height, width) for width, height in sizes
    )
    return len(ids) - len(sizes) + patches // image_processor.merge_size**2
