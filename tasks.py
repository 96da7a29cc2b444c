"""What is asked: prompts with images and a gold answer, from the cards world or from any data set of questions and answers.

`Prompt.id` is the data set's fingerprint (a hash of all its questions and golds) and the row, so it means the same prompt
in every run, on every machine; a guide cache is only ever used with the prompts that it was made for. Rows that cannot be
asked or judged are left out and counted (`PromptSet.dropped`); they change no other prompt's id.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

import cards
import verifier

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
DEFAULT_COLUMNS = {"prompt": "problem", "images": "images", "answer": "answer", "choices": ""}  # geometry3k's names
FILE_TYPES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
NO_IMAGE = "an image missing or unreadable"
MAX_IMAGES = 16  # in one prompt: what vLLM is set for
MAX_IMAGES = 16  # in one prompt: what vLLM is set for
MAX_ASPECT = 200  # a longer or narrower picture is refused by Qwen's image processor


class UsageError(Exception):
    """Something that the user can mend; its message names the bad value and the remedy, and is shown without a traceback."""


class Unusable(Exception):
    """A row that cannot be asked or judged. Its arguments: the reason, and what mends it where it is true of all rows."""


@dataclass(frozen=True)
class Preset:
    """A data set whose columns are known. Each has a split "train"."""

    hub: str
    columns: str = ""  # where they are not geometry3k's, as in --columns
    config: str | None = None
    file: str = ""  # of rows whose images are files beside it: read from a local copy only


PRESETS = {
    "geometry3k": Preset("hiyouga/geometry3k"),
    # the paper's training data, as its authors published it, and with the images among the rows, as its source did
    "mmfinereason": Preset("iieycx/rlsd-train-MMFineReason-123K", file="MMFineReason_data_with_conclusion.json"),
    "mmfinereason_sft": Preset("OpenDataArena/MMFineReason-SFT-123K-Qwen3-VL-235B-Thinking", "prompt=question,images=image"),
    "virl39k": Preset("TIGER-Lab/ViRL39K", "prompt=question,images=image", file="39Krelease.parquet"),
    "mmk12": Preset("FanqingM/MMK12", "prompt=question,images=image"),
    "dapo": Preset("open-r1/DAPO-Math-17k-Processed", "prompt=prompt,answer=solution", config="en"),  # text only
}


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
    kept: Sequence[int]  # the numbers of the rows that are asked
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> how many rows it keeps out

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, place: int) -> Prompt:
        row = self.kept[place]
        return self.make(f"{self.fingerprint}:{row}", self.rows[row])


def load_prompts(dataset: str, columns: str = "", train_split: str = "train", eval_split: str = "", eval_prompts: int = 256,
                 max_prompt_tokens: int = 0, length_of: Callable[[list[dict], list[tuple[int, int]]], int] | None = None,
                 ) -> tuple[PromptSet, PromptSet]:  # fmt: skip
    """Training and held-out prompts.

    Without an `eval_split` the last `eval_prompts` rows of a data set are held out and never trained on.

    Args:
        dataset: "cards"; a preset, by its name or hub id, from the hub or from a copy ("mmk12=PATH"); another hub id, a data
            file, or a folder.
        columns: as in "prompt=question,images=image"; before a preset's, which go before DEFAULT_COLUMNS.
        max_prompt_tokens: longer prompts are left out; 0 for no limit.
        length_of: tokens of a prompt, from its messages and its images' (width, height) as stored, before EXIF turns them.
    Raises:
        UsageError: for what is wrong with the data set as a whole.
    """
    if dataset == "cards":
        train, held_out = cards.hands("train"), cards.hands("held_out")[:eval_prompts]
        return card_prompts("train", train), card_prompts("held_out", held_out)
    preset, source = locate(dataset)
    names = DEFAULT_COLUMNS | parse_columns(preset.columns) | parse_columns(columns)
    if eval_split and Path(source).is_file():
        raise UsageError(f"--eval-split {eval_split}: {source} is one file, without splits; leave the flag out, and its last "
                         "--eval-prompts rows are held out")  # fmt: skip
    train = open_dataset(source, train_split, preset.config)
    if eval_split:
        held_out = open_dataset(source, eval_split, preset.config)
        held_out = held_out.select(range(min(eval_prompts, len(held_out))))
    else:
        if len(train) <= eval_prompts:
            raise UsageError(f"{dataset}: {len(train)} rows, and --eval-prompts {eval_prompts} would hold out all of them; "
                             "lower it or name an --eval-split")  # fmt: skip
        cut = len(train) - eval_prompts
        train, held_out = train.select(range(cut)), train.select(range(cut, len(train)))

    folder = Path(source) if Path(source).is_dir() else Path(source).parent

    def prompts(data) -> PromptSet:
        return dataset_prompts(dataset, Path(preset.hub).name, data, names, folder, max_prompt_tokens, length_of)

    return prompts(train), prompts(held_out)


def card_prompts(split: str, hands: list[cards.Hand]) -> PromptSet:
    def make(id: str, hand: cards.Hand) -> Prompt:
        return Prompt(id, cards.messages(hand), [cards.draw(hand)], str(hand.total))

    name = f"cards-{split}-{fingerprint((cards.question(h), h.digits) for h in hands)}"
    return PromptSet(name, hands, make, range(len(hands)))


def locate(dataset: str) -> tuple[Preset, str]:
    """The preset that a --dataset means (for any other data set, one that knows nothing), and where its rows are."""
    name, _, copy = dataset.partition("=")
    preset = next((preset for key, preset in PRESETS.items() if name in (key, preset.hub)), None)
    if preset is None:
        return Preset(dataset), dataset
    source = copy or preset.hub
    if preset.file and Path(source).is_dir():
        source = str(Path(source) / preset.file)
    if preset.file and not Path(source).is_file():
        raise UsageError(f"--dataset {dataset}: no file {source}. {preset.hub} keeps its images beside {preset.file}: hf "
                         f"download {preset.hub} --repo-type dataset --local-dir DIR, unpack what is zipped there, then "
                         f"--dataset {name}=DIR")  # fmt: skip
    return preset, source


def dataset_prompts(
    dataset: str, name: str, data, columns: dict[str, str], folder: Path, max_tokens: int, length_of
) -> PromptSet:
    """The prompts of a data set, called `name` in their ids; `folder` is where the paths of its images start."""
    import datasets

    for role, column in columns.items():
        optional = column == DEFAULT_COLUMNS[role] and role in ("images", "choices")
        if column not in data.column_names and not optional:
            raise UsageError(f"{dataset}: no column {column!r} for {role}; it has {', '.join(data.column_names)}; map them, as "
                             f"in --columns {role}={data.column_names[0]}")  # fmt: skip
    asked = zip(data[columns["prompt"]], data[columns["answer"]])
    name = f"{name}-{fingerprint(asked)}"
    data = data.select_columns(list(dict.fromkeys(column for column in columns.values() if column in data.column_names)))
    feature = data.info.features.get(columns["images"])
    feature = getattr(feature, "feature", feature)  # a list's elements
    if isinstance(feature, datasets.Image):
        feature.decode = False  # a check of 100,000 rows reads their images' headers, not the pixels

    def make(id: str, row: dict) -> Prompt:
        try:
            messages, images, gold, choices = read_row(row, columns, folder)
            images = [ImageOps.exif_transpose(image).convert("RGB") for image in images]
        except (Unusable, OSError, SyntaxError) as error:  # Pillow has them for broken pixels
            raise UsageError(f"{dataset}: {id} cannot be read ({error.args[0]}); mend or remove that row") from error
        return Prompt(id, messages, images, gold, choices)

    kept, dropped = check_rows(dataset, data, lambda row: read_row(row, columns, folder), max_tokens, length_of)
    return PromptSet(name, data, make, kept, dropped)


def check_rows(dataset: str, data, read: Callable, max_tokens: int, length_of) -> tuple[list[int], dict[str, int]]:
    """The numbers of the rows that can be asked, and how many cannot for which reason; raises UsageError where none can."""
    kept, dropped, remedies, pictured = [], Counter(), {}, False
    for number, row in enumerate(tqdm(data, desc=f"checking {dataset}", leave=False, delay=3)):
        try:
            messages, images, _, _ = read(row)
            sizes = [image.size for image in images]
            for image in images:
                image.close()
            pictured = pictured or bool(sizes)
            if any(max(size) > MAX_ASPECT * min(size) for size in sizes):
                raise Unusable(f"an image over {MAX_ASPECT} times as long as wide", "cut the images")
            if len(sizes) > MAX_IMAGES:
                raise Unusable(f"over {MAX_IMAGES} images", "ask about fewer")
            if max_tokens and length_of and length_of(messages, sizes) > max_tokens:
                raise Unusable(f"over {max_tokens} tokens", "raise --max-prompt-tokens")
            kept.append(number)
        except Unusable as error:
            reason, remedies[reason] = error.args
            dropped[reason] += 1
    lost = not pictured and dropped[NO_IMAGE] > len(data) // 10  # then the few rows without images are not what is meant
    if lost or not kept:
        worst = NO_IMAGE if lost else max(dropped, key=dropped.get, default=None)
        raise UsageError(f"{dataset}: {len(data)} rows, {counts(dropped) or 'nothing to ask'}; "
                         f"{remedies.get(worst, 'choose another split')}")  # fmt: skip
    return kept, dict(dropped)


def counts(dropped: dict[str, int]) -> str:
    """As in "12 dropped: over 4096 tokens, 3 dropped: no verifiable gold"."""
    return ", ".join(f"{count} dropped: {reason}" for reason, count in dropped.items())


def read_row(row: dict, columns: dict[str, str], folder: Path) -> tuple[list[dict], list[Image.Image], str, list[str] | None]:
    """Messages, images (only their headers are read yet), gold and options; raises Unusable."""
    question, gold, choices = row[columns["prompt"]], gold_text(row[columns["answer"]]), row.get(columns["choices"]) or None
    stored = row.get(columns["images"]) or []
    stored = stored if isinstance(stored, list) else [stored]
    if not isinstance(question, str) or not (question.strip() or stored):
        raise Unusable("no question", "prompts are texts: name their column, as in --columns prompt=question")
    if choices and not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        raise Unusable("options are no list of texts", "name another column of options, or none: --columns choices=")
    if gold is None or (choices and verifier.option_index(gold, choices) is None):
        raise Unusable("no verifiable gold", f"golds are texts or numbers of up to {verifier.MAX_MATH_CHARS} characters, or, "
                       "with options, a letter or an option's text: name another column, as in --columns answer=x")  # fmt: skip
    texts = re.split(r"\s*<image>\s*", question)
    unplaced = len(stored) - (len(texts) - 1)
    if unplaced < 0:
        raise Unusable("more <image> marks than images", "name the images' column, as in --columns images=image")
    content = [{"type": "image"}] * unplaced  # images that the text does not place come first
    for place, text in enumerate(texts):
        content += [{"type": "image"}] if place else []
        content += [{"type": "text", "text": text}] if text else []
    content.append({"type": "text", "text": f"\n{BOXED}"})
    return [{"role": "user", "content": content}], [open_image(one, folder) for one in stored], gold, choices


def gold_text(answer) -> str | None:
    """What answers are compared with, without its \\boxed{…} or <answer> tags, if any; None where nothing can equal it."""
    if not isinstance(answer, str | int | float) or answer != answer:  # a table's nan stands for nothing
        return None
    gold = str(answer)
    if "\\boxed" in gold or "<answer>" in gold:
        gold = (verifier.extract_answer(gold) if gold.count("\\boxed") < 2 else None) or ""  # of two boxes, none is the answer
    return gold if gold.strip() and len(gold) <= verifier.MAX_MATH_CHARS else None


def open_image(stored: str | dict, folder: Path) -> Image.Image:
    """An image of which only the header is read yet, from its path or from `datasets`' {"bytes", "path"}; raises Unusable."""
    try:
        stored = {"bytes": None, "path": stored} if isinstance(stored, str) else stored
        return Image.open(folder / stored["path"] if stored["bytes"] is None else BytesIO(stored["bytes"]))
    # not there, no picture, a column of something else, a path with a null character, a picture of billions of pixels
    except (OSError, TypeError, KeyError, ValueError, Image.DecompressionBombError) as error:
        raise Unusable(NO_IMAGE, "images are pictures, or paths from the data file's folder on: unpack them there") from error


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
    """The rows of one split, through `datasets`: a local .parquet, .json, .jsonl or .csv (or a list), a folder, or a hub id."""
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
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise UsageError(f"--dataset {name}, split {split}: cannot be loaded ({type(error).__name__}: {reason}); check the "
                         "name and the split. Without a network, give a copy (a data file, a cloned folder, mmk12=PATH for a "
                         "preset's), or with HF_HOME the cache of a machine that has loaded it") from error  # fmt: skip
