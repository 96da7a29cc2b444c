"""What TRL needs of a model and a data set, made of ours: processor, columns, reward functions."""

from collections.abc import Callable
from pathlib import Path

import transformers
from datasets import Dataset, Image, Sequence

import verifier
from plumbing.encode import flat, image_parts, load_tokenizer
from plumbing.rollout import Completion, EncodedPrompt, Group, Prompt


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
    """The prompt of a row. In the table every part of a message has a "text", which may be None."""
    messages = []
    for message in row["prompt"]:
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [{k: v for k, v in p.items() if v is not None} for p in content]
        messages.append(message | {"content": parts})
    images, choices, working = row.get("images", []), row["choices"] or None, row["working"] or None
    return Prompt(row["prompt_id"], messages, images, row["gold"], choices, working)


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


def rewards_of(prompt_with: Callable[[str], Prompt], stops: list[int]) -> list:
    """TRL's reward functions: the accuracy, for a weight of 0, and verifier.reward, of 1.

    Args:
        prompt_with: the prompt with an id.
        stops: the ids that end an answer: one that was cut off is wrong, as in the plain loops.
    """
    known = {}  # the answers of a step: each is judged and paid once

    def judged(completions, completion_ids, prompt_id, **_) -> list[Completion]:
        keys = [*zip(range(len(prompt_id)), prompt_id, map(tuple, completion_ids))]
        new = {key: known[key] for key in keys if key in known}
        groups = {}
        for key, said in zip(keys, completions):
            if key not in new:
                _, id, ids = key
                new[key] = Completion(id, [*ids], None, said[0]["content"], ids[-1] in stops)
                if id not in groups:
                    groups[id] = Group(prompt_with(id), EncodedPrompt([]), [])
                groups[id].completions.append(new[key])
        verifier.score(groups.values())
        known.clear()
        known.update(new)
        return [new[key] for key in keys]

    def accuracy(**columns) -> list[float]:
        return [answer.accuracy for answer in judged(**columns)]

    def reward(**columns) -> list[float]:
        return [answer.reward for answer in judged(**columns)]

    return [accuracy, reward]
