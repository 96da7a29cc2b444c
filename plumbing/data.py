"""Prompts: from an embedded world, or from any data set of questions and answers.

`Prompt.id` is the data set's fingerprint (a hash of all its questions and golds) and the row. It
means the same prompt in every run, on every machine, so a guide cache is only ever used with the
prompts that it was made for. Rows that cannot be asked or judged are dropped and counted
(`PromptSet.dropped`), which changes no other prompt's id. docs/data.md lists the reasons.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from plumbing import Unusable, UsageError
from plumbing.encode import (
    MAX_IMAGES,
    image_parts,
    is_lfs_pointer,
    load_tokenizer,
    prompt_length,
    rendered,
    special_token,
    texts_of,
)
from plumbing.pictures import NO_IMAGE, as_seen, columns_of_pictures, undecoded
from plumbing.rollout import Prompt
from plumbing.rows import MORE_MARKS, listed, read_row
from worlds import cards, staircase

COLUMNS = {"prompt": "problem", "images": "images", "answer": "answer", "choices": ""}  # geometry3k
HUB_COLUMNS = {  # of data sets on the hub that name them differently
    "OpenDataArena/MMFineReason-SFT-123K-Qwen3-VL-235B-Thinking": "prompt=question,images=image",
    "FanqingM/MMK12": "prompt=question,images=image",
    "open-r1/DAPO-Math-17k-Processed": "prompt=prompt,answer=solution",
}
HUB_CONFIGS = {"open-r1/DAPO-Math-17k-Processed": "en"}  # of data sets that have several
FILE_TYPES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
LONGEST_TOKEN = 128  # characters; a text of more than so many per token is not worth a count
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
    examples: dict[str, str] = field(default_factory=dict)  # reason -> the first of them
    pictured: int = 0  # prompts with images
    parts: Sequence[str] = ()  # of a world that has several: the part of each row
    replaced: set[int] = field(default_factory=set)  # rows whose pixels are broken, so far

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, place: int) -> Prompt:
        for row in (self.kept[place], *self.kept[place + 1 :], *self.kept[:place]):
            try:
                return self.make(f"{self.fingerprint}:{row}", self.rows[row])
            except Unusable as error:
                if row not in self.replaced:
                    self.replaced.add(row)
                    tqdm.write(
                        f"{self.fingerprint}:{row} cannot be read ({error.got or error}); the next "
                        f"row is asked instead. So far {len(self.replaced)} of {len(self)}"
                    )
        raise UsageError(f"{self.fingerprint}: no row can be read")


def load_prompts(config) -> tuple[PromptSet, PromptSet]:
    """Training and held-out prompts of a configuration, read and introduced once per process."""
    world = config.borrows if config.in_world else 0
    limits = config.eval_prompts, config.max_prompt_tokens
    return _load_prompts(config.dataset, world, config.columns, *limits, config.model_path)


@functools.lru_cache(maxsize=2)
def _load_prompts(
    dataset: str, world: int, columns: str, eval_prompts: int, max_tokens: int, model: str
):
    if world:
        train, tokenizer = world_prompts(dataset, world, "train"), load_tokenizer(model)
        sets = train, world_prompts(dataset, world, "held_out", eval_prompts)
    else:
        parts = tokenizer, *_ = load_tokenizer(model), *image_parts(model)
        sets = dataset_prompts(dataset, columns, eval_prompts, max_tokens, parts)
    for name, prompts in zip(("training", "held-out"), sets):
        line = f"{dataset}: {len(prompts)} {name} prompts, {prompts.pictured} with pictures"
        tqdm.write(
            line + (f"; {counts(prompts.dropped, prompts.examples)}" if prompts.dropped else "")
        )
    first = sets[0][0]
    text = rendered(first.messages, tokenizer)
    if len(text) > MAX_SHOWN:
        text = f"{text[: MAX_SHOWN // 2]} […] {text[-MAX_SHOWN // 2 :]}"
    tqdm.write(f"{dataset}: the first prompt, as it is sent: {text!r}, with gold {first.gold!r}")
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
    rows = range(len(hands))
    return PromptSet(id, hands, make, rows, parts=parts, pictured=len(hands))


def dataset_prompts(
    dataset: str, columns: str, eval_prompts: int, max_tokens: int, parts: tuple
) -> tuple[PromptSet, PromptSet]:
    """The training prompts of a data set, and its last `eval_prompts` rows, held out.

    Args:
        columns: as in --columns.
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
    used = dict.fromkeys(column for column in names.values() if column in data.column_names)
    data = undecoded(data.select_columns(list(used)), [names["images"]])
    asked = [names[role] for role in ("prompt", "answer", "choices") if names[role] in used]

    def make(id: str, row: dict) -> Prompt:
        try:
            messages, images, gold, choices = read_row(row, names, folder, kind)
        except Unusable as error:
            raise UsageError(
                f"{dataset}: {id} has changed since the start ({error}: {error.got})"
            ) from error
        return Prompt(id, messages, [as_seen(image) for image in images], gold, choices)

    def check(row: dict) -> int:
        return check_row(row, names, folder, kind, max_tokens, parts)

    sets = []
    for rows in (range(cut), range(cut, len(data))):
        some = data.select(rows)
        name = f"{Path(dataset).name}-{fingerprint(zip(*(some[column] for column in asked)))}"
        kept, *found = check_rows(dataset, zip(rows, some), check)
        sets.append(PromptSet(name, data, make, kept, *found))
    if same := in_both(data, *sets, asked, names["images"]):
        tqdm.write(f"{dataset}: {same} of the held-out prompts are training prompts, too")
    return tuple(sets)


def check_columns(dataset: str, data, columns: dict[str, str]) -> None:
    """Raises UsageError for a column that is not there, or one of pictures that nobody reads."""
    for role, column in columns.items():
        optional = role in ("images", "choices") and column in ("", COLUMNS[role])
        if column not in data.column_names and not optional:
            raise UsageError(
                f"{dataset}: no column {column!r} for {role}; it has "
                f"{', '.join(data.column_names)}; map them, as in "
                f"--columns {role}={data.column_names[0]}"
            )
    if columns["images"] and columns["images"] not in data.column_names:
        used = [column for column in columns.values() if column in data.column_names]
        if unread := columns_of_pictures(data, used):
            raise UsageError(
                f"{dataset}: pictures in {', '.join(unread)} would not be asked; name their "
                f"column, one list for each row where there are several, as in --columns "
                f"images={unread[0]}, or none, --columns images="
            )


def check_rows(dataset: str, rows: Iterable[tuple[int, dict]], check: Callable) -> tuple:
    """The `kept`, `dropped`, `examples` and `pictured` of a PromptSet.

    Raises:
        UsageError: none is usable, or so many lack an image that its column must be wrong.
    """
    kept, dropped, first, pictured = [], Counter(), {}, 0
    for number, row in tqdm(rows, desc=f"checking {dataset}", leave=False, delay=3):
        try:
            pictured += check(row) > 0
            kept.append(number)
        except Unusable as error:
            dropped[error.reason] += 1
            first.setdefault(error.reason, (number, error))
    total = len(kept) + dropped.total()
    examples = {r: f"row {n}" + (e.got and f": {e.got}") for r, (n, e) in first.items()}
    blind = [] if pictured else [r for r in (NO_IMAGE, MORE_MARKS) if r in dropped]
    if sum(dropped[reason] for reason in blind) > total // 10 or not kept:
        worst = max(blind or dropped, key=dropped.get)
        raise UsageError(
            f"{dataset}: {total} rows, {counts(dropped, examples)}; {first[worst][1].remedy}"
        )
    return kept, dict(dropped), examples, pictured


def in_both(data, train: PromptSet, held_out: PromptSet, asked: list[str], images: str) -> int:
    """How many held-out prompts are training prompts, too: in texts, gold and pictures."""
    texts = [repr(row) for row in zip(*(data[column] for column in asked))]
    alike, same = {}, set()
    for row in held_out.kept:
        alike.setdefault(texts[row], []).append(row)

    def pictures(row: int) -> list:
        stored = listed(data[row].get(images))
        return [(one["bytes"] or one["path"]) if isinstance(one, dict) else one for one in stored]

    for row in train.kept:
        same |= {one for one in alike.get(texts[row], ()) if pictures(one) == pictures(row)}
    return len(same)


def check_row(row: dict, columns: dict, folder: Path, kind, max_tokens: int, parts: tuple) -> int:
    """How many images a row has; raises Unusable."""
    messages, images, _, _ = read_row(row, columns, folder, kind)
    sizes = [image.size for image in images]
    for image in images:
        image.close()
    if len(sizes) > MAX_IMAGES:
        raise Unusable(f"over {MAX_IMAGES} images", "ask about fewer")
    too_long = Unusable(f"over {max_tokens} tokens", "raise --max-prompt-tokens")
    if sum(map(len, texts_of(messages))) > LONGEST_TOKEN * max_tokens > 0:
        raise too_long
    if token := special_token(messages, parts[0]):
        raise Unusable("a special token of the tokenizer in its text", "remove it", got=token)
    try:
        length = prompt_length(messages, sizes, *parts) if max_tokens else 0
    except UsageError as error:
        raise Unusable(
            "a chat template that does not show its pictures",
            "copy chat_template.jinja of the base model",
            got=str(error),
        ) from error
    if length > max_tokens:
        raise too_long
    return len(sizes)


def counts(dropped: dict[str, int], examples: dict[str, str]) -> str:
    """As in "12 dropped: over 4096 tokens (row 7), 3 dropped: no question (row 20)"."""
    return ", ".join(f"{n} dropped: {why} ({examples[why]})" for why, n in dropped.items())


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
        if kind:
            return datasets.load_dataset(kind, data_files=name, split="train")
        return datasets.load_dataset(name, HUB_CONFIGS.get(name), split="train")
    except Exception as error:  # datasets raises a dozen types for not there, no split, no network
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        if kind:
            reason = fault_of(name, kind) or reason
            raise UsageError(f"--dataset {name}: cannot be loaded ({reason})") from error
        raise UsageError(
            f"--dataset {name}: cannot be loaded ({type(error).__name__}: {reason}); check the "
            'name and that it has a split "train". Without a network, give a data file or a '
            "folder, or set HF_HOME to the cache of a machine that has loaded it"
        ) from error


def fault_of(path: str, kind: str) -> str | None:
    """What is wrong with a data file, where `datasets` does not say it well."""
    content = Path(path).read_bytes()
    if is_lfs_pointer(path):
        return "it is a Git LFS pointer; fetch it by git lfs pull"
    lines = content.splitlines() if kind == "json" else []
    if content.lstrip().startswith(b"["):
        lines = [content][: len(lines)]
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line.strip() or "null")
        except ValueError as error:
            return f"line {number}: {error}"
    return None if content.strip(b"[]{} \n") and kind != "csv" else "it holds no rows"
