"""Prompts: from an embedded world, or from any data set of questions and answers.

`Prompt.id` is the data set's fingerprint (a hash of all its questions and golds) and the row. It
means the same prompt in every run, on every machine, so a guide cache is only ever used with the
prompts that it was made for. Rows that cannot be asked or judged are dropped and counted
(`PromptSet.dropped`), which changes no other prompt's id. docs/data.md lists the reasons.
"""

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from plumbing import Unusable, UsageError
from plumbing.encode import (
    MAX_IMAGES,
    image_parts,
    load_tokenizer,
    prompt_length,
    rendered,
    special_token,
)
from plumbing.pictures import NO_IMAGE, as_seen, columns_of_pictures
from plumbing.rollout import Prompt
from plumbing.rows import BOXED, MORE_MARKS, read_row
from plumbing.sources import open_dataset
from worlds import cards, staircase

COLUMNS = {"prompt": "problem", "images": "images", "answer": "answer", "choices": ""}  # geometry3k
HUB_COLUMNS = {  # of data sets on the hub that name them differently
    "OpenDataArena/MMFineReason-SFT-123K-Qwen3-VL-235B-Thinking": "prompt=question,images=image",
    "FanqingM/MMK12": "prompt=question,images=image",
    "open-r1/DAPO-Math-17k-Processed": "prompt=prompt,answer=solution",
}
LONGEST_TOKEN = 128  # characters, in Qwen's vocabulary
THREAD = ThreadPoolExecutor(1)
MAX_SHOWN = 1200  # characters of the prompt that is shown at the start


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are made when asked for: images are decoded a batch at a time.

    A row whose pixels turn out to be broken is replaced by the next one, with that one's id: the
    same in every run, in a guide cache and in an evaluation.
    """

    fingerprint: str
    rows: Sequence
    make: Callable[[str, object], Prompt]  # (id, row) -> prompt; raises Unusable
    kept: Sequence[int]  # the numbers of the rows that are asked
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> number of rows
    parts: Sequence[str] = ()  # of a world that has several: the part of each row
    replaced: set[int] = field(default_factory=set)  # rows whose pixels are broken, so far
    content: str = ""  # a hash of all that is asked, pictures too
    coming: dict[int, Future] = field(default_factory=dict)  # prompts that a thread makes

    def __len__(self) -> int:
        return len(self.kept)

    def id_of(self, place: int) -> str:
        """The id of a prompt, without making it; another's is asked if its picture is broken."""
        return f"{self.fingerprint}:{self.kept[place]}"

    def prefetch(self, places: Sequence[int]) -> None:
        """Makes prompts in a thread of its own, while something else is done, for asking once."""
        for prompt in self.coming.values():
            prompt.cancel()
        self.coming.clear()
        self.coming.update({place: THREAD.submit(self._made, place) for place in places})

    def __getitem__(self, place: int) -> Prompt:
        first = range(len(self))[place]  # IndexError behind the last, which ends a loop
        coming = self.coming.pop(first, None)
        return coming.result() if coming else self._made(first)

    def _made(self, first: int) -> Prompt:
        for step in range(len(self)):
            row = self.kept[(first + step) % len(self)]
            try:
                return self.make(f"{self.fingerprint}:{row}", self.rows[row])
            except Unusable as error:
                if row not in self.replaced:
                    self.replaced.add(row)
                    tqdm.write(
                        f"{self.fingerprint}:{row} is left out ({error}{error.shown}), the next "
                        f"row asked in its place; so far {len(self.replaced)} of {len(self)}"
                    )
        raise UsageError(f"{self.fingerprint}: no row can be read")


def load_prompts(config) -> tuple[PromptSet, PromptSet]:
    """Training and held-out prompts of a configuration, read and introduced once per process."""
    world = config.borrows if config.in_world else 0
    limits = config.eval_prompts, config.max_prompt_tokens
    words = config.columns, config.instruction
    return _load_prompts(config.dataset, world, *words, *limits, config.model_path)


@functools.lru_cache(maxsize=2)
def _load_prompts(
    dataset: str,
    world: int,
    columns: str,
    instruction: str,
    eval_prompts: int,
    max_tokens: int,
    model: str,
):
    parts = load_tokenizer(model), *image_parts(model)
    if world and parts[1] is None:
        raise UsageError(f"--dataset {dataset}: asks about pictures, and {model} reads text only")
    if world:
        train = world_prompts(dataset, world, "train")
        sets = train, world_prompts(dataset, world, "held_out", eval_prompts)
        sizes = f"{len(train)} training and {len(sets[1])} held-out prompts"
        tqdm.write(f"{dataset}: {sizes}, each with a picture")
    else:
        sets = dataset_prompts(dataset, columns, instruction, eval_prompts, max_tokens, parts)
    first = sets[0][0]
    text = rendered(first.messages, parts[0], parts[2])
    if len(text) > MAX_SHOWN:
        text = f"{text[: MAX_SHOWN // 2]} […] {text[-MAX_SHOWN // 2 :]}"
    tqdm.write(f"{dataset}: the first prompt, as it is sent: {text!r}; its gold: {first.gold!r}")
    return sets


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
    dataset: str, columns: str, instruction: str, eval_prompts: int, max_tokens: int, parts: tuple
) -> tuple[PromptSet, ...]:
    """The training prompts of a data set, and its last `eval_prompts` rows, held out, if any.

    Args:
        columns, instruction: as in --columns and --instruction.
        max_tokens: longer prompts are dropped; 0 for no limit.
        parts: tokenizer, image processor and image token id that lengths are measured with.
    """
    names = COLUMNS | parse_columns(HUB_COLUMNS.get(dataset, "")) | parse_columns(columns)
    data, folder = open_dataset(dataset), Path(dataset)
    folder = folder if folder.is_dir() else folder.parent
    cut = len(data) - eval_prompts
    if cut <= 0:
        raise UsageError(
            f"{dataset}: {len(data)} rows, and --eval-prompts {eval_prompts} would hold out all of "
            "them; lower it"
        )
    check_columns(dataset, data, names)
    kind = data.features[names["answer"]]
    data = undecoded(data, data.column_names)
    asked = [names[role] for role in ("prompt", "answer", "choices")]
    asked = [column for column in asked if column in data.column_names]

    def make(id: str, row: dict) -> Prompt:
        try:
            messages, images, gold, choices = read_row(row, names, folder, instruction, kind)
        except Unusable as error:
            raise UsageError(
                f"{dataset}: {id} has changed since the start ({error}{error.shown})"
            ) from error
        images = [as_seen(image) for image in images]
        return Prompt(id, messages, images, gold, choices, row=row)

    def check(row: dict) -> tuple[int, str]:
        return check_row(row, names, folder, instruction, kind, max_tokens, parts)

    sets, keys = [], []
    spans = [("training", range(cut)), ("held-out", range(cut, len(data)))]
    for name, rows in spans if eval_prompts else spans[:1]:
        some = data.select(rows)
        kept, dropped, found = check_rows(f"{dataset}, {name}", zip(rows, some), check)
        told = [instruction] if instruction != BOXED else []  # other words, another prompt
        id = fingerprint([*zip(*(some[column] for column in asked)), *told])
        content = fingerprint([kept, found])
        id = f"{Path(dataset).name}-{id}"
        sets.append(PromptSet(id, data, make, kept, dropped, content=content))
        keys.append(found)
    trained = set(keys[0])
    if same := sum(key in trained for some in keys[1:] for key in some):
        by = "by text, gold and pictures"
        tqdm.write(f"{dataset}: {same} held-out prompts are training prompts, too, {by}")
    return tuple(sets)


def undecoded(data, columns: list[str]):
    """Rows whose pictures stay as they are stored: checking 100,000 of them reads no pixels."""
    import datasets

    for column in columns:
        feature = data.info.features.get(column)
        feature = getattr(feature, "feature", feature)  # of a list's elements
        if isinstance(feature, datasets.Image):
            feature.decode = False
    return data


def check_columns(dataset: str, data, columns: dict[str, str]) -> None:
    """Raises UsageError for a column that is not there, or one of pictures that nobody reads.

    Says so of options, and of pictures beside those that are read.
    """
    for role, column in columns.items():
        optional = role in ("images", "choices") and column in ("", COLUMNS[role])
        if column not in data.column_names and not optional:
            raise UsageError(
                f"{dataset}: no column {column!r} for {role}; it has "
                f"{', '.join(data.column_names)}; map them, as in "
                f"--columns {role}={data.column_names[0]}"
            )
    options = [name for name in data.column_names if re.fullmatch("(?i)options?|choices?", name)]
    if options and not columns["choices"]:
        tqdm.write(
            f"{dataset}: options in {options[0]} are not shown to the policy; --columns "
            f"choices={options[0]} lists them under the question"
        )
    used = [column for column in columns.values() if column in data.column_names]
    unread = columns_of_pictures(data, used) if columns["images"] else []
    if unread and columns["images"] not in used:
        raise UsageError(
            f"{dataset}: pictures in {', '.join(unread)} would not be asked; name their "
            f"column, one list for each row where there are several, as in --columns "
            f"images={unread[0]}, or none, --columns images="
        )
    if unread:
        tqdm.write(f"{dataset}: pictures in {', '.join(unread)} are not asked")


def check_rows(name: str, rows: Iterable[tuple[int, dict]], check: Callable) -> tuple:
    """The numbers of the usable rows, how many are not, by reason, and a key of each usable one.

    Raises:
        UsageError: none is usable, or so many lack an image that its column must be wrong.
    """
    kept, keys, dropped, first, pictured = [], [], Counter(), {}, 0
    for number, row in tqdm(rows, desc=f"checking {name}", leave=False, delay=3):
        try:
            images, key = check(row)
            pictured += images > 0
            kept.append(number)
            keys.append(key)
        except Unusable as error:
            dropped[error.reason] += 1
            first.setdefault(error.reason, (number, error))
    found = [
        f"{count} dropped: {reason} (row {first[reason][0]}{first[reason][1].shown})"
        for reason, count in dropped.items()
    ]
    total = len(kept) + dropped.total()
    blind = [] if pictured else [r for r in (NO_IMAGE, MORE_MARKS) if r in dropped]
    if sum(dropped[reason] for reason in blind) > total // 10 or not kept:
        worst = max(blind or dropped, key=dropped.get)
        raise UsageError(f"{name}: {total} rows, {', '.join(found)}; {first[worst][1].remedy}")
    if dropped.total() > len(kept):
        found.append(first[max(dropped, key=dropped.get)][1].remedy)
    tqdm.write(", ".join([f"{name}: {len(kept)} prompts, {pictured} with pictures", *found]))
    return kept, dict(dropped), keys


def check_row(
    row: dict, columns: dict, folder: Path, instruction: str, kind, max_tokens: int, parts: tuple
) -> tuple[int, str]:
    """How many images a row has, and what is the same for the same prompt; raises Unusable."""
    messages, images, gold, _ = read_row(row, columns, folder, instruction, kind)
    sizes, seen = [image.size for image in images], [digest(image) for image in images]
    for image in images:
        image.close()
    if sizes and parts[1] is None:
        remedy = "take a --model that reads images, such as Qwen/Qwen3-VL-8B-Instruct"
        raise Unusable("a picture, which a text model cannot read", remedy)
    if len(sizes) > MAX_IMAGES:
        raise Unusable(f"over {MAX_IMAGES} images", "ask about fewer")
    too_long = Unusable(f"over {max_tokens} tokens", "raise --max-prompt-tokens")
    characters = sum(len(part.get("text", "")) for part in messages[0]["content"])
    if characters > LONGEST_TOKEN * max_tokens > 0:
        raise too_long  # counting the tokens of 10 MB would take a minute
    # a gold with one is dropped, too: the text of an answer has none
    if token := special_token([*messages, {"content": [{"text": gold}]}], parts[0]):
        raise Unusable("a special token of the tokenizer in its text", "remove it", got=token)
    try:
        length = prompt_length(messages, sizes, *parts) if max_tokens else 0
    except UsageError as error:
        raise Unusable(
            "a chat template that does not show all of it",
            "copy chat_template.jinja of the base model",
            got=error,
        ) from error
    if length > max_tokens:
        raise too_long
    return len(sizes), fingerprint([messages, gold, sizes, seen])


def digest(image) -> tuple[int, bytes]:
    """A file's length and its last bytes: PNG ends in a checksum, JPEG and WebP in coded pixels."""
    length = image.fp.seek(0, 2)
    image.fp.seek(max(0, length - 64))
    return length, image.fp.read()


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
