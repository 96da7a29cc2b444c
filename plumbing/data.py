"""Prompts: from an embedded world, or from any data set of questions and answers.

`Prompt.id` is the data set's fingerprint (a hash of all its questions and golds) and the row. It
means the same prompt in every run, on every machine, so a guide cache is only ever used with the
prompts that it was made for. Rows that cannot be asked or judged are dropped and counted
(`PromptSet.dropped`), which changes no other prompt's id.
"""

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

import verifier
from plumbing import UsageError
from plumbing.encode import MAX_IMAGES, image_parts, load_tokenizer, prompt_length
from plumbing.rollout import Prompt
from worlds import cards, staircase

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
COLUMNS = {"prompt": "problem", "images": "images", "answer": "answer", "choices": ""}  # geometry3k
HUB_COLUMNS = {  # of data sets on the hub that name them differently
    "OpenDataArena/MMFineReason-SFT-123K-Qwen3-VL-235B-Thinking": "prompt=question,images=image",
    "FanqingM/MMK12": "prompt=question,images=image",
    "open-r1/DAPO-Math-17k-Processed": "prompt=prompt,answer=solution",
}
HUB_CONFIGS = {"open-r1/DAPO-Math-17k-Processed": "en"}  # of data sets that have several
FILE_TYPES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
NO_IMAGE = "an image missing or unreadable"
MAX_ASPECT = 200  # Qwen's image processor refuses a longer or narrower picture


class Unusable(Exception):
    """A row that cannot be asked or judged."""

    def __init__(self, reason: str, remedy: str):
        """`remedy` is what to do where this holds for all rows."""
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are made when asked for: images are decoded a batch at a time."""

    fingerprint: str
    rows: Sequence
    make: Callable[[str, object], Prompt]  # (id, row) -> prompt
    kept: Sequence[int]  # the numbers of the rows that are asked
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> number of rows
    parts: Sequence[str] = ()  # of a world that has several: the part of each row

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, place: int) -> Prompt:
        row = self.kept[place]
        return self.make(f"{self.fingerprint}:{row}", self.rows[row])


def load_prompts(config) -> tuple[PromptSet, PromptSet]:
    """Training and held-out prompts of a configuration, read once per process."""
    limits = config.eval_prompts, config.max_prompt_tokens
    if config.in_world:
        world = config.dataset, config.borrows
        return world_prompts(*world, "train"), world_prompts(*world, "held_out", limits[0])
    return _load_prompts(config.dataset, config.columns, *limits, config.model_path)


@functools.lru_cache(maxsize=2)
def _load_prompts(dataset: str, columns: str, eval_prompts: int, max_tokens: int, model: str):
    names = COLUMNS | parse_columns(HUB_COLUMNS.get(dataset, "")) | parse_columns(columns)
    rows = open_dataset(dataset)
    if len(rows) <= eval_prompts:
        raise UsageError(
            f"{dataset}: {len(rows)} rows, and --eval-prompts {eval_prompts} would hold out all of "
            "them; lower it"
        )
    parts = load_tokenizer(model), *image_parts(model)
    folder = Path(dataset) if Path(dataset).is_dir() else Path(dataset).parent
    cut, sets = len(rows) - eval_prompts, []
    for name, chosen in (("training", range(cut)), ("held-out", range(cut, len(rows)))):
        prompts = dataset_prompts(dataset, rows.select(chosen), names, folder, max_tokens, parts)
        if prompts.dropped:
            tqdm.write(f"{dataset}: {len(prompts)} {name} prompts; {counts(prompts.dropped)}")
        sets.append(prompts)
    return tuple(sets)


@functools.lru_cache(maxsize=2)
def world_prompts(name: str, borrows: int, split: str, count: int | None = None) -> PromptSet:
    """The first `count` prompts of a world. Gold is the whole working, but in cards_lax."""
    if name == "staircase":
        world, hands = staircase, staircase.hands(split, borrows)[:count]
        parts = tuple(map(staircase.part, hands))
    else:
        world, hands, parts = cards, cards.hands(split)[:count], ()

    def make(id: str, hand: cards.Hand) -> Prompt:
        messages, images = world.messages(hand), [world.draw(hand)]
        if name == "cards_lax":
            return Prompt(id, messages, images, str(hand.total), working=hand.working)
        return Prompt(id, messages, images, hand.working)

    asked = ((world.question(hand), hand.digits) for hand in hands)
    id = f"{name}-{split}-{fingerprint(asked)}"
    return PromptSet(id, hands, make, range(len(hands)), parts=parts)


def dataset_prompts(
    dataset: str, data, columns: dict[str, str], folder: Path, max_tokens: int, parts: tuple
) -> PromptSet:
    """The prompts of a data set's rows.

    Args:
        data: rows, as `datasets` has them.
        columns: the data set's name for each key of `COLUMNS`.
        folder: where the paths of its images start.
        max_tokens: longer prompts are dropped; 0 for no limit.
        parts: tokenizer, image processor and image token id that lengths are measured with.
    """
    import datasets

    for role, column in columns.items():
        optional = column == COLUMNS[role] and role in ("images", "choices")
        if column not in data.column_names and not optional:
            raise UsageError(
                f"{dataset}: no column {column!r} for {role}; it has "
                f"{', '.join(data.column_names)}; map them, as in "
                f"--columns {role}={data.column_names[0]}"
            )
    asked = zip(data[columns["prompt"]], data[columns["answer"]])
    name = f"{Path(dataset).name}-{fingerprint(asked)}"
    used = dict.fromkeys(column for column in columns.values() if column in data.column_names)
    data = data.select_columns(list(used))
    feature = data.info.features.get(columns["images"])
    feature = getattr(feature, "feature", feature)  # of a list's elements
    if isinstance(feature, datasets.Image):
        feature.decode = False  # checking 100,000 rows reads the images' headers, not the pixels

    def make(id: str, row: dict) -> Prompt:
        try:
            messages, images, gold, choices = read_row(row, columns, folder)
            images = [ImageOps.exif_transpose(image).convert("RGB") for image in images]
        except (Unusable, OSError, SyntaxError) as error:  # Pillow raises both for broken pixels
            raise UsageError(
                f"{dataset}: {id} cannot be read ({error.args[0]}); mend or remove that row"
            ) from error
        return Prompt(id, messages, images, gold, choices)

    def check(row: dict) -> int:
        return check_row(row, columns, folder, max_tokens, parts)

    kept, dropped = check_rows(dataset, data, check)
    return PromptSet(name, data, make, kept, dropped)


def check_rows(dataset: str, data, check: Callable) -> tuple[list[int], dict[str, int]]:
    """The numbers of the usable rows, and how many are not, for which reason.

    Raises:
        UsageError: none is usable, or so many lack an image that its column must be wrong.
    """
    kept, dropped, remedies, images = [], Counter(), {}, 0
    for number, row in enumerate(tqdm(data, desc=f"checking {dataset}", leave=False, delay=3)):
        try:
            images += check(row)
            kept.append(number)
        except Unusable as error:
            dropped[error.reason] += 1
            remedies[error.reason] = error.remedy
    no_pictures = not images and dropped[NO_IMAGE] > len(data) // 10
    if no_pictures or not kept:
        worst = NO_IMAGE if no_pictures else max(dropped, key=dropped.get, default=None)
        raise UsageError(
            f"{dataset}: {len(data)} rows, {counts(dropped) or 'nothing to ask'}; "
            f"{remedies.get(worst, 'choose another data set')}"
        )
    return kept, dict(dropped)


def check_row(row: dict, columns: dict, folder: Path, max_tokens: int, parts: tuple) -> int:
    """How many images a row has; raises Unusable."""
    messages, images, _, _ = read_row(row, columns, folder)
    sizes = [image.size for image in images]
    for image in images:
        image.close()
    if any(max(size) > MAX_ASPECT * min(size) for size in sizes):
        raise Unusable(f"an image over {MAX_ASPECT} times as long as wide", "cut the images")
    if len(sizes) > MAX_IMAGES:
        raise Unusable(f"over {MAX_IMAGES} images", "ask about fewer")
    try:
        length = prompt_length(messages, sizes, *parts) if max_tokens else 0
    except UsageError as error:
        remedy = "remove marks such as <|image_pad|> from the questions"
        raise Unusable("an image token in its text", remedy) from error
    if length > max_tokens:
        raise Unusable(f"over {max_tokens} tokens", "raise --max-prompt-tokens")
    return len(sizes)


def counts(dropped: dict[str, int]) -> str:
    """As in "12 dropped: over 4096 tokens, 3 dropped: no verifiable gold"."""
    return ", ".join(f"{count} dropped: {reason}" for reason, count in dropped.items())


def read_row(
    row: dict, columns: dict[str, str], folder: Path
) -> tuple[list[dict], list[Image.Image], str, list[str] | None]:
    """Messages, images (of which only the headers are read yet), gold, options; raises Unusable."""
    question, gold = row[columns["prompt"]], gold_text(row[columns["answer"]])
    choices = row.get(columns["choices"]) or None
    stored = row.get(columns["images"]) or []
    stored = stored if isinstance(stored, list) else [stored]
    if not isinstance(question, str) or not (question.strip() or stored):
        raise Unusable(
            "no question", "prompts are texts: name their column, as in --columns prompt=question"
        )
    listed = choices if isinstance(choices, list) else [None]
    if choices and not all(isinstance(choice, str) for choice in listed):
        raise Unusable(
            "options are no list of texts",
            "name another column of options, or none: --columns choices=",
        )
    if gold is None or (choices and verifier.option_index(gold, choices) is None):
        raise Unusable(
            "no verifiable gold",
            f"golds are texts or numbers of up to {verifier.MAX_MATH_CHARS} characters, or, with "
            "options, a letter or an option's text: name another column, as in --columns answer=x",
        )
    texts = re.split(r"\s*<image>\s*", question)
    unplaced = len(stored) - (len(texts) - 1)
    if unplaced < 0:
        raise Unusable(
            "more <image> marks than images",
            "name the images' column, as in --columns images=image",
        )
    content = [{"type": "image"}] * unplaced  # images that the text does not place come first
    for place, text in enumerate(texts):
        content += [{"type": "image"}] if place else []
        content += [{"type": "text", "text": text}] if text else []
    content.append({"type": "text", "text": f"\n{BOXED}"})
    images = [open_image(one, folder) for one in stored]
    return [{"role": "user", "content": content}], images, gold, choices


def gold_text(answer) -> str | None:
    """What answers are compared with, out of its \\boxed{…} or <answer> tags, if it has any.

    None where nothing can equal it.
    """
    if not isinstance(answer, str | int | float) or answer != answer:  # a table's nan is nothing
        return None
    gold = str(answer)
    if "\\boxed" in gold or "<answer>" in gold:
        one = gold.count("\\boxed") < 2  # of two boxes, neither is the answer
        gold = (verifier.extract_answer(gold) if one else None) or ""
    return gold if gold.strip() and len(gold) <= verifier.MAX_MATH_CHARS else None


def open_image(stored: str | dict, folder: Path) -> Image.Image:
    """An image, from a path or `datasets`' {"bytes", "path"}; its pixels are read later."""
    try:
        stored = {"bytes": None, "path": stored} if isinstance(stored, str) else stored
        in_file = stored["bytes"] is None
        return Image.open(folder / stored["path"] if in_file else BytesIO(stored["bytes"]))
    # missing, no picture, a column of something else, a null character, billions of pixels
    except (OSError, TypeError, KeyError, ValueError, Image.DecompressionBombError) as error:
        raise Unusable(
            NO_IMAGE,
            "images are pictures, or paths from the data file's folder on: unpack them there",
        ) from error


def fingerprint(items: Iterable) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()[:12]


def parse_columns(text: str) -> dict[str, str]:
    columns = dict(pair.partition("=")[::2] for pair in text.split(",") if pair)
    if unknown := set(columns) - set(COLUMNS):
        raise UsageError(
            f"--columns {text}: unknown {', '.join(sorted(unknown))}; known are "
            f"{', '.join(COLUMNS)}, as in prompt=problem,images=images,answer=answer"
        )
    return columns


def open_dataset(name: str):
    """The rows of the split "train": of a data file, a folder, or a hub id."""
    import datasets  # takes a second to import, and the cards do without

    kind = FILE_TYPES.get(Path(name).suffix)
    if kind and not Path(name).is_file():
        raise UsageError(f"--dataset {name}: there is no such file")
    if Path(name).is_file() and not kind:
        raise UsageError(f"--dataset {name}: cannot be read; only {', '.join(FILE_TYPES)} can")
    try:
        if Path(name).is_file():
            return datasets.load_dataset(kind, data_files=name, split="train")
        return datasets.load_dataset(name, HUB_CONFIGS.get(name), split="train")
    except Exception as error:  # datasets raises a dozen types for not there, no split, no network
        reason = (str(error.__cause__ or error).strip() or "it may be empty").splitlines()[0]
        raise UsageError(
            f"--dataset {name}: cannot be loaded ({type(error).__name__}: {reason}); check the "
            'name and that it has a split "train". Without a network, give a data file or a '
            "folder, or set HF_HOME to the cache of a machine that has loaded it"
        ) from error
