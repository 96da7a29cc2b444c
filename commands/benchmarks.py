"""The paper's eight benchmarks: where each one's data is, and how a row of it becomes a prompt.

A benchmark is one row of BENCHMARKS, and a ninth would be one more. Every prompt ends in "put your
final answer within \\boxed{}", and the training verifier judges every answer. The official scoring
differs: each row has a note that says how, and commands/evaluate.py prints it as a footnote.

Columns are those that lmms-eval and VLMEvalKit read, the two usual harnesses.
"""

import ast
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets

import verifier
from plumbing import Unusable, UsageError
from plumbing.data import fingerprint, undecoded
from plumbing.pictures import as_seen, open_image
from plumbing.rollout import Prompt
from plumbing.rows import BOXED, MARKER, compose, listed, with_options

# ---- Options --------------------------------------------------------------------------

LISTED = re.compile(r"(?:Options|Choices?)\s*:")


def lettered(text: str | None) -> list[str]:
    """The options that a text lists by letter: "Options: A: 3 cm, B: 5 cm" or "A. 3; B. 5"."""
    text = text or ""
    end = max((match.end() for match in LISTED.finditer(text)), default=0)
    markers = []
    for letter in "ABCDEFGHIJ":
        marker = re.compile(MARKER.format(letter)).search(text, end)
        if marker is None:
            break
        markers.append(marker)
        end = marker.end()
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    return [text[marker.end() : end].strip(" \n,;；") for marker, end in zip(markers, ends)]


def literal(text: str) -> list:
    """The list that a text spells in Python; empty if it spells none."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return []
    return found if isinstance(found, list) else []


def filled(row: dict, *columns: str) -> list[str]:
    """The texts in these columns, without the empty ones (None, "", nan, "nan")."""
    values = [row[column] for column in columns]
    return [str(value) for value in values if value is not None and str(value) not in ("", "nan")]


# ---- What counts together -------------------------------------------------------------


def all_right(right: dict[str, bool]) -> float:
    """1 if every part is right. MMBench's parts are the rotations of its options: "circular"."""
    return float(all(right.values()))


def we_math(right: dict[str, bool]) -> float | None:
    """We-Math's strict score (arXiv 2407.01284) of a problem, from its steps and its whole.

    All right is mastery, 1. Right steps without the whole are "inadequate generalisation", 0.5.
    The rest is 0, also a right whole whose steps are not all right: "rote memorisation".

    Args:
        right: by the column `key`, as in "2steps_1", "2steps_2", "2steps_multi".
    Returns:
        None if the data set lacks a part of the problem.
    """
    count = int(next(iter(right))[0])
    steps = [f"{count}steps_{number}" for number in range(1, count + 1)]
    whole = f"{count}steps_multi"
    if right.keys() != {*steps, whole}:
        return None
    return all(right[step] for step in steps) * (1.0 if right[whole] else 0.5)


# ---- The table ------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    title: str
    data: tuple[str, str | None, str]  # the hub's id, configuration and split
    note: str  # how the official scoring differs
    question: tuple[str, ...] = ("question",)  # columns of the text; empty ones are left out
    images: tuple[str, ...] = ("image",)  # columns of pictures, or of lists of pictures
    placed: bool = False  # "<image 2>" in the text stands for the second of them
    gold: str = "answer"  # a column
    options: Callable[[dict], list | None] = lambda row: None  # None: the answer is free
    listed: bool = False  # the text lists the options already
    rotated: bool = False  # asked once in every rotation of the options
    asked: Callable[[dict], bool] = lambda row: True  # rows that are asked
    unit: Callable[[dict], tuple[str, str]] | None = None  # what counts together, and the part
    score: Callable[[dict[str, bool]], float | None] = all_right  # of a unit, from its parts


BENCHMARKS = {
    "mmmu_pro": Benchmark(
        title="MMMU-Pro",
        data=("MMMU/MMMU_Pro", "standard (10 options)", "test"),
        images=tuple(f"image_{number}" for number in range(1, 8)),
        placed=True,
        options=lambda row: literal(row["options"]),
        note="the standard split with 10 options; the official score, and by its decimals the "
        "paper's, averages it with the vision split",
    ),
    "mathvista": Benchmark(
        title="MathVista",
        data=("AI4Math/MathVista", None, "testmini"),
        question=("query",),
        images=("decoded_image",),
        options=lambda row: row["choices"] or None,
        listed=True,
        note="officially a language model extracts the answer, integers are cut, decimals are "
        "rounded as the question asks, and the nearest option counts",
    ),
    "mathvision": Benchmark(
        title="MathVision",
        data=("MathLLMs/MathVision", None, "test"),
        images=("decoded_image",),
        options=lambda row: row["options"] or None,
        note="the official script evaluates both sides to two decimals; other tools let a language "
        "model extract the answer",
    ),
    "zerobench": Benchmark(
        title="ZeroBench",
        data=("jonathan-roberts1/zerobench", None, "zerobench_subquestions"),
        question=("question_text",),
        images=("question_images_decoded",),
        gold="question_answer",
        note="the 334 subquestions (the paper's values are multiples of 0.5/334, and none is one "
        "of 1/100); officially an answer in curly braces that contains the gold is right; the hub "
        "asks for consent before it gives the data",
    ),
    "wemath": Benchmark(
        title="WeMath",
        data=("We-Math/We-Math", None, "testmini"),
        question=("question", "option"),
        images=("image_path",),
        options=lambda row: lettered(row["option"]),
        listed=True,
        unit=lambda row: (f"{row['key'].split('_')[0]}-{row['ID']}", row["key"]),
        score=we_math,
        note="the strict score over 525 problems; the paper's values fit these 525, but strict or "
        "loose is not in our sources",
    ),
    "mmbench": Benchmark(
        title="MMBench",
        data=("lmms-lab/MMBench", "en", "dev"),
        question=("hint", "question"),
        options=lambda row: filled(row, "A", "B", "C", "D"),
        rotated=True,
        asked=lambda row: int(row["index"]) < 1_000_000,  # the others are rotations of these
        note="the English dev split, circular: stricter than the mean over rows that some tools "
        "report; officially a language model reads answers that are no letter",
    ),
    "mmstar": Benchmark(
        title="MMStar",
        data=("Lin-Chen/MMStar", None, "val"),
        options=lambda row: lettered(row["question"]),
        listed=True,
        note="the mean over questions; some tools average over categories",
    ),
    "mathverse": Benchmark(
        title="MathVerse",
        data=("CaraJ/MathVerse-lmmseval", "testmini", "testmini"),
        question=("query_cot",),
        options=lambda row: (  # in the version "Vision Only" they stand in the picture
            lettered(row["query_cot"]) or None if row["question_type"] == "multi-choice" else None
        ),
        listed=True,
        note="officially a language model judges; golds with a name or in words (a domain and "
        "range, say) hardly match by rule; the five versions with an image; where the options "
        "stand in the picture, only the letter is right",
    ),
}

EIGHT = tuple(BENCHMARKS)[:8]  # in the paper's order

# arXiv 2604.20733: Qwen3-VL-8B-Instruct trained on MMFineReason-123K; the eight, and their average
PAPER = {
    "base": (51.75, 73.80, 47.37, 19.76, 54.10, 89.79, 71.83, 54.61, 57.88),
    "LUFFY": (54.23, 73.80, 54.00, 20.51, 52.38, 89.49, 69.47, 55.58, 58.68),
    "GRPO": (55.78, 76.20, 48.82, 22.60, 56.57, 90.29, 72.20, 59.52, 60.25),
    "ExGRPO": (55.49, 77.30, 55.46, 19.01, 62.67, 90.44, 72.00, 56.89, 61.16),
    "RLEP": (55.38, 78.50, 54.23, 19.61, 62.48, 90.45, 72.27, 58.91, 61.48),
    "NPO early": (56.85, 76.60, 54.31, 26.35, 62.76, 90.41, 70.30, 59.38, 62.12),
    "NPO early + late": (57.07, 76.30, 54.61, 24.85, 66.95, 90.30, 72.20, 60.00, 62.84),
    "AutoNPO": (57.24, 79.20, 55.72, 24.70, 66.00, 90.63, 72.63, 59.11, 63.15),
}


# ---- From a row to a prompt -----------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """What is asked at one time: one prompt, K answers, one line of predictions.jsonl."""

    id: str
    unit: str  # items of one unit are scored together
    part: str
    prompt: Callable[[], Prompt]  # decodes the images; raises Unusable


def items_of(name: str, data_dir: str | None) -> list[Item]:
    """All items of a benchmark, in the data set's order; reads its texts, but no image yet.

    Raises:
        UsageError: the data set cannot be loaded, or has other columns.
    """
    benchmark, rows, items = BENCHMARKS[name], open_rows(name, data_dir), []
    rows = undecoded(rows, benchmark.images)
    try:
        for column in benchmark.images:
            if "Image" not in repr(rows.features[column]):
                raise KeyError(f"pictures in {column}")
        for number, row in enumerate(rows.remove_columns(list(benchmark.images))):
            texts = [row[column] for column in (*benchmark.question, benchmark.gold)]
            options = benchmark.options(row) or [""]
            turns = len(options) if benchmark.rotated else 1
            unit, part = benchmark.unit(row) if benchmark.unit else (str(number), "")
            for turn in range(turns if benchmark.asked(row) else 0):
                id = f"{name}:{number}:{turn}:{fingerprint(texts)}"  # not another data set's item
                prompt = functools.partial(prompt_of, benchmark, id, rows, number, turn)
                items.append(Item(id, unit, part or str(turn), prompt))
    except KeyError as error:
        raise UsageError(
            f"--benchmarks {name}: its rows have no {error}; is this {benchmark.data[0]}? "
            f"It has {', '.join(rows.column_names)}"
        ) from error
    return items


def open_rows(name: str, data_dir: str | None):
    """A benchmark's rows, from the hub, or from NAME.parquet or the folder NAME in `data_dir`."""
    title, (hub, config, split) = BENCHMARKS[name].title, BENCHMARKS[name].data
    file, folder = Path(data_dir or "") / f"{name}.parquet", Path(data_dir or "") / name
    try:
        if not data_dir:
            return datasets.load_dataset(hub, config, split=split)
        if file.is_file():
            return datasets.load_dataset("parquet", data_files={split: str(file)}, split=split)
        if folder.is_dir():
            return datasets.load_dataset(str(folder), config, split=split)
        raise FileNotFoundError(f"neither {name}.parquet nor a folder {name} is there")
    except Exception as error:  # datasets raises a dozen types for not there, no split, no network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        source = f"--data-dir {data_dir}" if data_dir else f"the hub, {hub}"
        raise UsageError(
            f"--benchmarks {name}: {title}, split {split}, cannot be loaded from {source} "
            f"({reason}); without a network, give --data-dir: a folder with {name}.parquet, or "
            f"with a copy of {hub} in {name}/"
        ) from error


def prompt_of(benchmark: Benchmark, id: str, rows, number: int, turn: int) -> Prompt:
    """The prompt of a row, its options moved up by `turn` places; raises Unusable."""
    row = rows[number]
    text = "\n".join(filled(row, *benchmark.question))
    gold, options = "".join(filled(row, benchmark.gold)).strip(), benchmark.options(row)
    if not text.strip() or not gold:
        raise Unusable("no question or no gold answer")
    if options is not None:
        options = [str(option) for option in options]
        if len(options) < 2 or not all(option.strip() for option in options):
            raise Unusable("its options cannot be read")
        right = verifier.option_index(gold, options)
        if right is None:
            raise Unusable(f"gold {gold!r} names none of its {len(options)} options")
        options = options[turn:] + options[:turn]
        gold = chr(ord("A") + (right - turn) % len(options))
        if not benchmark.listed:
            text = with_options(text, options)
    stored = [one for column in benchmark.images for one in listed(row[column]) or [None]]
    pictures = [one and open_image(one, Path()) for one in stored]
    if not any(pictures):
        raise Unusable("an image is missing")
    content, images = compose(text, pictures, benchmark.placed)
    content.append({"type": "text", "text": f"\n{BOXED}"})
    images = [as_seen(image) for image in images]
    return Prompt(id, [{"role": "user", "content": content}], images, gold, options)
