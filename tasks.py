"""What is asked: prompts with an image and a gold answer, from the cards world or from any data set of images and answers.

`Prompt.id` is the data set's fingerprint (a hash of all its questions and golds) and the row, so it means the same prompt
in every run, on every machine; a guide cache is only ever used with the prompts that it was made for.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import cards

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
DEFAULT_COLUMNS = {"prompt": "problem", "images": "images", "answer": "answer", "choices": ""}  # geometry3k's names
FILE_TYPES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


class UsageError(Exception):
    """Something that the user can mend; its message names the bad value and the remedy, and is shown without a traceback."""


@dataclass(frozen=True)
class Prompt:
    id: str
    messages: list[dict]  # chat messages; an {"type": "image"} part stands for the next of `images`
    images: list[Image.Image]
    gold: str
    choices: list[str] | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts made when they are asked for: images are decoded a batch at a time, not all at once."""

    fingerprint: str
    rows: Sequence
    make: Callable[[str, object], Prompt]  # (id, row) -> prompt

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Prompt:
        return self.make(f"{self.fingerprint}:{row}", self.rows[row])


def load_prompts(dataset: str, columns: str = "", train_split: str = "train", eval_split: str = "",
                 eval_prompts: int = 256) -> tuple[PromptSet, PromptSet]:  # fmt: skip
    """Training and held-out prompts. `dataset`: "cards", a hub id, a data file or a folder.

    Without an `eval_split` the last `eval_prompts` rows of a data set are held out and never trained on.
    """
    if dataset == "cards":
        train, held_out = cards.hands("train"), cards.hands("held_out")[:eval_prompts]
        return card_prompts("train", train), card_prompts("held_out", held_out)
    names = DEFAULT_COLUMNS | parse_columns(columns)
    train = open_dataset(dataset, train_split)
    if eval_split:
        held_out = open_dataset(dataset, eval_split)
        held_out = held_out.select(range(min(eval_prompts, len(held_out))))
    else:
        if len(train) <= eval_prompts:
            raise UsageError(f"{dataset}: {len(train)} rows, and --eval-prompts {eval_prompts} would hold out all of them; "
                             "lower it or name an --eval-split")  # fmt: skip
        cut = len(train) - eval_prompts
        train, held_out = train.select(range(cut)), train.select(range(cut, len(train)))
    return dataset_prompts(dataset, train, names), dataset_prompts(dataset, held_out, names)


def card_prompts(split: str, hands: list[cards.Hand]) -> PromptSet:
    def make(id: str, hand: cards.Hand) -> Prompt:
        return Prompt(id, cards.messages(hand), [cards.draw(hand)], str(hand.total))

    return PromptSet(f"cards-{split}-{fingerprint((cards.question(h), h.digits) for h in hands)}", hands, make)


def dataset_prompts(name: str, data, columns: dict[str, str]) -> PromptSet:
    for role, column in columns.items():
        optional = column == DEFAULT_COLUMNS[role] and role in ("images", "choices")
        if column not in data.column_names and not optional:
            raise UsageError(f"{name}: no column {columns[role]!r} for {role}; it has {', '.join(data.column_names)}; "
                             f"map them, as in --columns {role}={data.column_names[0]}")  # fmt: skip

    def make(id: str, row: dict) -> Prompt:
        images = row.get(columns["images"]) or []
        images = images if isinstance(images, list) else [images]
        question, choices = row[columns["prompt"]], row.get(columns["choices"]) or None
        for role, ok in (("prompt", isinstance(question, str)), ("choices", not isinstance(choices, str)),
                         ("images", all(isinstance(image, Image.Image) for image in images))):  # fmt: skip
            if not ok:
                raise UsageError(f"{name}: column {columns[role]!r} of {id} is not usable as {role}; prompts are texts, images "
                                 "are pictures (a datasets.Image column), choices are lists of texts")  # fmt: skip
        images = [image.convert("RGB") for image in images]
        texts = re.split(r"\s*<image>\s*", question)
        missing = len(images) - (len(texts) - 1)
        if missing < 0:
            raise UsageError(f"{name}: {id} mentions {len(texts) - 1} images but holds {len(images)}")
        content = [{"type": "image"}] * missing  # images that the text does not place come first
        for place, text in enumerate(texts):
            content += [{"type": "image"}] if place else []
            content += [{"type": "text", "text": text}] if text else []
        content.append({"type": "text", "text": f"\n{BOXED}"})
        return Prompt(id, [{"role": "user", "content": content}], images, str(row[columns["answer"]]), choices)

    asked = zip(data[columns["prompt"]], data[columns["answer"]])
    return PromptSet(f"{Path(name).name}-{fingerprint(asked)}", data, make)


def fingerprint(items) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()[:12]


def parse_columns(text: str) -> dict[str, str]:
    columns = dict(pair.partition("=")[::2] for pair in text.split(",") if pair)
    if unknown := set(columns) - set(DEFAULT_COLUMNS):
        raise UsageError(f"--columns {text}: unknown {', '.join(sorted(unknown))}; known are {', '.join(DEFAULT_COLUMNS)}, "
                         "as in prompt=problem,images=images,answer=answer")  # fmt: skip
    return columns


def open_dataset(name: str | list[str], split: str, config: str | None = None):
    """The rows of one split, through `datasets`: a local .parquet, .json, .jsonl or .csv (or a list of them), a folder, or a hub id."""
    import datasets  # a second to import, and not needed for the cards

    try:
        if isinstance(name, list):
            return datasets.load_dataset(FILE_TYPES[Path(name[0]).suffix], data_files=name, split="train")
        path = Path(name)
        if path.is_file():
            if path.suffix not in FILE_TYPES:
                raise UsageError(f"--dataset {name}: cannot read {path.suffix or 'this'} files, only {', '.join(FILE_TYPES)}")
            return datasets.load_dataset(FILE_TYPES[path.suffix], data_files=str(path), split="train")
        return datasets.load_dataset(name, config, split=split)
    except UsageError:
        raise
    except Exception as error:  # datasets raises a dozen types for "not there", "no such split" and "no network"
        raise UsageError(f"--dataset {name}, split {split}: cannot be loaded ({type(error).__name__}: {error}); give the "
                         "path of a data file, a folder, or a hub id") from error  # fmt: skip
