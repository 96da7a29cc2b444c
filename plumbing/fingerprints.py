"""Fingerprints: what a run must find again when it goes on, by whatever path."""

from pathlib import Path

from transformers.utils import cached_file

from plumbing.data import fingerprint, load_prompts
from plumbing.encode import load_tokenizer
from plumbing.files import file_hashes
from plumbing.lora import base_model_of

MODEL = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
]
TOKENIZER = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
]


def fingerprints(config) -> dict[str, str]:
    """Of the prompts that are asked, of the base model and of its tokenizer.

    Of a model on the hub the weights are not read: a checkpoint goes on without them.
    """
    path, found = config.model_path, {}
    for what, prompts in zip(("training prompts", "held-out prompts"), load_prompts(config)):
        found[what] = f"{prompts.fingerprint}:{prompts.content or fingerprint(prompts.kept)}"
    load_tokenizer(path)  # what has none is told in its words
    folders = dict.fromkeys((str(path), base_model_of(path)))  # of adapters both
    weights = [file for folder in folders for file in sorted(Path(folder).glob("*.safetensors"))]
    for what, names, more in (("base model", MODEL, weights), ("tokenizer", TOKENIZER, [])):
        files = (
            cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
            for folder in folders
            for name in names
        )
        found[what] = fingerprint(file_hashes([*map(Path, filter(None, files)), *more]))
    own = {"file of --reward": (config.reward or "").rpartition(":")[0]}
    own["file of --guide"] = getattr(config, "guide", None) or ""
    found |= {what: file_hashes([Path(f)])[0] for what, f in own.items() if Path(f).is_file()}
    return found
