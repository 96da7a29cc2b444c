"""The eight benchmarks of the paper's table: how a row of each becomes a prompt, and when an answer to it is right.

A benchmark is a row of BENCHMARKS: hub id, configuration and split; what is asked, with which images and options; the rule
that says what is right; what counts together; how the official scoring differs. A ninth is one row more. evaluate.py asks them.

Every prompt ends in "put your final answer within \\boxed{}", and every rule is a rule: no language model reads or judges answers here.
Columns as in the data sets' own loaders in lmms-eval and VLMEvalKit.
"""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

import verifier
from tasks import BOXED, Prompt


class Malformed(Exception):
    """An item of a benchmark that cannot be asked or scored; its message says why."""


# ---------------------------------------------------------------------------------------------------------------------
# From a row of a data set to a prompt
# ---------------------------------------------------------------------------------------------------------------------

MENTION = re.compile(r"\s*<image\s*(\d*)>\s*")
MARKER = r"(?:^|[\s,;(]){}\s*[.:)]\s*"  # before an option, as in "A: 5 cm", "(A) 5 cm", "A. 5 cm"


def lettered(text: str) -> list[str]:
    """The options that a text lists by letter, such as "Options: A: 3 cm, B: 5 cm" or "A. 3; B. 5"."""
    begin = max((match.end() for match in re.finditer(r"(?:Options|Choices)\s*:", text)), default=0)
    found = []
    for letter in "ABCDEFGHIJ":
        marker = re.compile(MARKER.format(letter)).search(text, begin)
        if marker is None:
            break
        found.append((marker.start(), marker.end()))
        begin = marker.end()
    ends = [start for start, _ in found[1:]] + [len(text)]
    return [text[begin:end].strip(" \n,;") for (_, begin), end in zip(found, ends)]


def literal(text: str) -> list[str]:
    """The list that a text spells in Python."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError) as error:
        raise Malformed("its options are no list") from error
    return [str(option) for option in found]


def columns(*names: str) -> Callable[[dict], list]:
    """What stands in these columns of a row, where something does."""
    return lambda row: [row[name] for name in names if row.get(name) is not None and str(row[name]) not in ("", "nan")]


def compose(text: str, images: list[Image.Image | None]) -> tuple[list[dict], list[Image.Image]]:
    """Chat content and images in the order in which the text mentions them; those that it does not mention come first.

    `<image>` is the next one, `<image 2>` the second, also where it is mentioned twice.
    """
    parts, order, following = MENTION.split(text), [], 0  # text, number, text, number, …, text
    for number in parts[1::2]:
        order.append(int(number) - 1 if number else following)
        following += not number
    first = [place for place, image in enumerate(images) if place not in order and image is not None]
    if any(place >= len(images) or images[place] is None for place in order) or not first + order:
        raise Malformed("an image is missing")
    content = [{"type": "image"}] * len(first)
    for place, words in enumerate(parts[::2]):
        content += [{"type": "image"}] if place else []
        content += [{"type": "text", "text": words}] if words.strip() else []
    return content, [images[place].convert("RGB") for place in first + order]


# ---------------------------------------------------------------------------------------------------------------------
# What is right
# ---------------------------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"([-+]?(?:\d[\d,]*\.?\d*|\.\d+))\s*(.*)", re.DOTALL)


def by_verifier(line: dict, response: str) -> bool:
    return verifier.is_correct(response, line["gold"], line["choices"])


def by_precision(line: dict, response: str) -> bool:
    """MathVista: an integer cut from the number, a float rounded to `precision` decimals, a list element by element."""
    kind, answer = line["facts"]["answer_type"], verifier.extract_answer(response)
    if line["choices"] or kind == "text":
        return by_verifier(line, response)
    if answer is None:
        return False
    answer = (
        verifier.plain_text(answer).replace("\\%", "%").replace("\\$", "$").replace("^\\circ", "°").replace("^{\\circ}", "°")
    )
    if kind == "list":
        try:
            theirs, mine = (ast.literal_eval(text) for text in (line["gold"], answer))
            return [float(value) for value in theirs] == [float(value) for value in mine]
        except (ValueError, SyntaxError, TypeError):
            return verifier.equal(line["gold"], answer)[0]
    number = NUMBER.fullmatch(answer.removeprefix("$").strip())
    if number is None:
        return verifier.equal(line["gold"], answer)[0]  # a fraction, say
    unit = re.sub(r"\\(?:text|mathrm)\s*\{([^{}]*)\}|\\[,;! ]|\\ ", r"\1", number[2]).strip(" .")
    if re.search(r"\d", unit) or (line["facts"]["unit"] and unit and unit not in (line["facts"]["unit"], "°", "%")):
        return False  # more than one number, or another unit than the one that was asked for
    try:
        value, gold = float(number[1].replace(",", "")), float(line["gold"].replace(",", ""))
    except ValueError:
        return verifier.equal(line["gold"], answer)[0]
    if kind == "integer":
        return int(value) == int(gold)
    digits = int(line["facts"]["precision"] or 0)
    return round(value, digits) == round(gold, digits)


def all_right(parts: dict[str, bool]) -> dict[str, float]:
    """One answer, or MMBench's circular protocol: right only if right in every rotation of the options."""
    return {"": float(all(parts.values()))}


def we_math(parts: dict[str, bool]) -> dict[str, float]:
    """We-Math (arXiv 2407.01284): a problem of two or three steps and as a whole; 1 mastered, 0.5 steps alone, 0 otherwise.

    Strict: the whole without every step is rote memorisation, 0. Loose: only without any step.
    """
    whole, steps = parts["multi"], [right for part, right in parts.items() if part != "multi"]
    alone = 0.5 * all(steps)
    return {"": float(all(steps)) if whole else alone, "loose": float(any(steps)) if whole else alone}


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    title: str
    hub: str
    config: str | None
    split: str
    question: Callable[[dict], str]
    images: Callable[[dict], list]
    options: Callable[[dict], list[str] | None]  # None: not multiple choice
    listed: bool  # the question lists its options already
    right: Callable[[dict, str], bool]
    note: str  # how the official scoring differs
    gold: str = "answer"  # a column
    facts: tuple[str, ...] = ()  # further columns that scoring needs
    together: Callable[[dict], tuple[str, str]] | None = None  # row -> (unit, part), where rows are scored together
    score: Callable[[dict[str, bool]], dict[str, float]] = all_right  # of a unit, from its parts
    complete: Callable[[str, set[str]], bool] = lambda unit, parts: True  # whether a unit has all its parts
    rotate: bool = False  # ask every rotation of the options, where the data set does not hold them as rows


OWN_PROMPT = "asked with our own prompt"
BENCHMARKS = {
    "mmmu_pro": Benchmark(
        "MMMU-Pro", "MMMU/MMMU_Pro", "standard (10 options)", "test", lambda row: row["question"],
        lambda row: [row.get(f"image_{n}") for n in range(1, 8)], lambda row: literal(row["options"]), False, by_verifier,
        f"standard split with 10 options only (the official score averages it with the vision split); {OWN_PROMPT}",
    ),
    "mathvista": Benchmark(
        "MathVista", "AI4Math/MathVista", None, "testmini", lambda row: row["query"], columns("decoded_image"),
        lambda row: row["choices"] if row["question_type"] == "multi_choice" else None, True, by_precision,
        "officially a language model extracts the answer; here the last box does", facts=("answer_type", "precision", "unit"),
    ),
    "mathvision": Benchmark(
        "MathVision", "MathLLMs/MathVision", None, "test", lambda row: row["question"], columns("decoded_image"),
        lambda row: row["options"] or None, False, by_verifier, f"{OWN_PROMPT}; equality by math-verify",
    ),
    "zerobench": Benchmark(
        "ZeroBench", "jonathan-roberts1/zerobench", None, "zerobench", lambda row: row["question_text"],
        lambda row: row["question_images_decoded"], lambda row: None, False, by_verifier,
        "officially the answer in curly braces, by containment; the 100 main questions, not the subquestions", gold="question_answer",
    ),
    "wemath": Benchmark(
        "WeMath", "We-Math/We-Math", None, "testmini", lambda row: row["question"], columns("image_path"),
        lambda row: lettered(row["option"] or ""), False, by_verifier, "the strict score; the paper does not say which it reports",
        together=lambda row: (f"{row['key'].split('_')[0]}-{row['ID']}", row["key"].split("_")[1]), score=we_math,
        complete=lambda unit, parts: parts == {*map(str, range(1, int(unit[0]) + 1)), "multi"},
    ),
    "mmbench": Benchmark(
        "MMBench", "lmms-lab/MMBench", "en", "dev", lambda row: "\n".join([*columns("hint")(row), row["question"]]), columns("image"),
        lambda row: columns("A", "B", "C", "D")(row), False, by_verifier,
        "English dev split, circular; officially a language model reads answers that are no letter",
        together=lambda row: (str(int(row["index"]) % 1_000_000), str(int(row["index"]) // 1_000_000)), rotate=True,
    ),
    "mmstar": Benchmark(
        "MMStar", "Lin-Chen/MMStar", None, "val", lambda row: row["question"], columns("image"),
        lambda row: lettered(row["question"] or ""), True, by_verifier, OWN_PROMPT,
    ),
    "mathverse": Benchmark(
        "MathVerse", "CaraJ/MathVerse-lmmseval", "testmini", "testmini", lambda row: row["query_cot"], columns("image"),
        lambda row: mathverse_options(row), True, by_verifier,
        "officially a language model judges; all five versions of each problem, without Text Only",
    ),
}  # fmt: skip


def mathverse_options(row: dict) -> list[str] | None:
    if row["question_type"] != "multi-choice":
        return None
    in_picture = row["problem_version"] == "Vision Only"  # there the options are, and only letters can be compared
    return list("ABCDE") if in_picture else lettered(row["query_cot"] or "")


# arXiv 2604.20733: Qwen3-VL-8B-Instruct, MMFineReason-123K, 32 H200; the eight in the paper's order, then their average
PAPER_ORDER = ("mmmu_pro", "mathvista", "mathvision", "zerobench", "wemath", "mmbench", "mmstar", "mathverse", "avg")
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


def item(benchmark: Benchmark, id: str, row: dict, rotation: int) -> tuple[Prompt, dict]:
    """A prompt and what scoring it takes, as they go into predictions.jsonl; raises Malformed."""
    gold, options = str(row[benchmark.gold] if row[benchmark.gold] is not None else "").strip(), benchmark.options(row)
    if not gold:
        raise Malformed("no gold answer")
    text = benchmark.question(row)
    if not (text or "").strip():
        raise Malformed("no question")
    if options is not None:
        if len(options) < 2 or not all(str(option).strip() for option in options):
            raise Malformed("its options cannot be read")
        right = verifier.option_index(gold, options)
        if right is None:
            raise Malformed(f"gold {gold!r} names none of its {len(options)} options")
        options = options[rotation:] + options[:rotation]
        gold = chr(ord("A") + (right - rotation) % len(options))
        if not benchmark.listed:
            text += "\nOptions:\n" + "\n".join(f"{chr(ord('A') + place)}. {option}" for place, option in enumerate(options))
    content, images = compose(text, benchmark.images(row))
    content.append({"type": "text", "text": f"\n{BOXED}"})
    line = {"gold": gold, "choices": options, "facts": {name: row.get(name) for name in benchmark.facts}}
    return Prompt(id, [{"role": "user", "content": content}], images, gold, options), line
