"""From prompts to token ids and patches. Needs a model's folder, but not its weights."""

import functools
import hashlib
import json
import re
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig

from plumbing import UsageError
from plumbing.lora import adapter_rank, base_model_of
from plumbing.rollout import EncodedPrompt, Prompt

MAX_IMAGES = 16  # in one prompt: vLLM reserves room for as many
MODEL_FILE = re.compile(r".+\.(json|jinja|safetensors|txt)")  # that is read
VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def load_tokenizer(path: str | Path):
    if str(path).count("/") > 1 and not Path(path).is_dir():  # a hub id has one
        raise UsageError(
            f"model {path}: there is no such folder; give a hub id or a save_pretrained folder"
        )
    if Path(path).is_dir():
        check_files(Path(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise a dozen types
        raise UsageError(
            f"model {path}: its tokenizer cannot be loaded ({first_line(error)}); "
            "give a hub id or a save_pretrained folder"
        ) from error
    if not tokenizer.chat_template:
        raise UsageError(
            f"model {path}: no chat template; put a chat_template.jinja into its folder: its "
            "instruct model's, or a plain {% for m in messages %}{{ m.content }}{% endfor %}"
        )
    return tokenizer


def check_files(folder: Path) -> None:
    """UsageError if a model's folder has no tokenizer, or Git LFS has not brought its files."""
    files = {file.name for file in folder.iterdir() if file.is_file()}
    for name in filter(MODEL_FILE.fullmatch, sorted(files)):
        if is_lfs_pointer(folder / name):
            raise UsageError(f"model {folder}: {name} is a Git LFS pointer; git lfs pull brings it")
    if not (files & {"tokenizer.json", "vocab.json"} and "tokenizer_config.json" in files):
        raise UsageError(
            f"model {folder}: no tokenizer; copy tokenizer_config.json and tokenizer.json of its "
            "base model there, or give a hub id or a save_pretrained folder"
        )


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether Git LFS left a note in the file's place."""
    with open(path, "rb") as file:
        return file.read(23) == b"version https://git-lfs"


def image_parts(path: str | Path) -> tuple:
    """A model's image processor and the id of its image token, both None for a text model."""
    try:
        shape = config_of(path)
        if not hasattr(shape, "vision_config"):
            return None, None
        # torchvision's where it is installed, else PIL's, as vLLM does: they resize differently
        processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
        return processor, shape.image_token_id
    except Exception as error:
        raise unloadable(path, error) from error


def config_of(path: str | Path):
    return AutoConfig.from_pretrained(base_model_of(path), trust_remote_code=False)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unloadable(path: str | Path, error: Exception) -> UsageError:
    return UsageError(
        f"model {path}: cannot be loaded ({first_line(error)}); give a hub id or a save_pretrained "
        "folder of a text model, or of an image-text-to-text model with its image processor"
    )


def vision_token_ids(config) -> list[int]:
    """Tokens that are never sampled: a sampled `<|image_pad|>` would break the training forward."""
    ids = (getattr(config, name, None) for name in VISION_TOKENS)
    return [id for id in ids if id is not None]


def stop_ids(path: str | Path, tokenizer) -> list[int]:
    """The token ids that end an answer: the generation config's, else the tokenizer's."""
    try:
        stop = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError as error:
        if (Path(path) / "generation_config.json").is_file():  # else the folder has none
            raise unloadable(path, error) from error
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
        text = config_of(path).get_text_config()
        tokens = tokenizer_fingerprint(load_tokenizer(path))
        found.append((text.hidden_size, text.num_hidden_layers, tokens, rank))
    if found[0] != found[1]:
        raise UsageError(
            f"--start {start}: is no checkpoint of --model {model} --lora {lora}: its size, tokens "
            "or rank differ; give the --model and --lora of its run"
        )


def encode(prompt: Prompt, tokenizer, image_processor, image_token_id) -> EncodedPrompt:
    """Renders the chat template and repeats each image token once for every visual token.

    `image_processor` and `image_token_id` are None for a text model.
    """
    ids = placeholder_ids(prompt, tokenizer, image_token_id)
    if not prompt.images:
        return EncodedPrompt(ids)
    copies = iter([visual_tokens(image.size, image_processor) for image in prompt.images])
    expanded = []
    for id in ids:
        expanded += [id] * (next(copies) if id == image_token_id else 1)
    cut = functools.partial(image_processor, images=prompt.images, return_tensors="pt")
    return EncodedPrompt(expanded, cut)


def visual_tokens(size: tuple[int, int], image_processor) -> int:
    """How many tokens a picture of (width, height) is."""
    width, height = size
    patches = image_processor.get_number_of_image_patches(height, width)
    return patches // image_processor.merge_size**2


def flat(messages: list[dict]) -> list[dict]:
    """Messages without pictures as the templates of text models take them: texts, not parts."""
    return [m | {"content": "".join(p["text"] for p in m["content"])} for m in messages]


def rendered(messages: list[dict], tokenizer, image_token_id: int | None) -> str:
    """The prompt as text, through the chat template; an image is one token yet."""
    asked = flat(messages) if image_token_id is None else messages
    try:
        shown = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UsageError(
            f"the chat template cannot be rendered ({first_line(error)}); copy "
            "chat_template.jinja of the base model"
        ) from error
    parts = [part for message in messages for part in message["content"]]
    texts = [part["text"] for part in parts if "text" in part]
    # a template for texts alone shows Python's list of the parts
    if not all(text.strip() in shown and repr(text) not in shown for text in texts):
        raise UsageError(
            "the chat template does not show the question; copy chat_template.jinja of the base "
            "model"
        )
    return shown


def special_token(messages: list[dict], tokenizer) -> str | None:
    """One in a text, where it could end a turn or stand for a picture; the template has its own."""
    texts = [part.get("text", "") for message in messages for part in message["content"]]
    tokens = filter(str.strip, tokenizer.get_added_vocab())
    return next((token for token in tokens if any(token in text for text in texts)), None)


def placeholder_ids(prompt: Prompt, tokenizer, image_token_id: int | None) -> list[int]:
    """The rendered chat template's token ids, with one image token per image."""
    text = rendered(prompt.messages, tokenizer, image_token_id)
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
    return len(ids) - len(sizes) + sum(visual_tokens(size, image_processor) for size in sizes)
