"""The eight benchmarks of the paper's table: how a row of each becomes a prompt, and when an answer to it is right.

A benchmark is a row of BENCHMARKS: hub id, configuration and split; what is asked, with which images and options; the rule
that says what is right; what counts together; how the official scoring differs. A ninth is one row more. evaluate.py asks them.

Every prompt ends in "put your final answer within \\boxed{}", and every rule is a rule: no language model reads or judges answers here.
Columns as in the data sets' own loaders in lmms-eval and VLMEvalKit.
"""

import ast
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

import verifier
from tasks import BOXED, MAX_ASPECT, Prompt


class Malformed(Exception):
    """An item of a benchmark that cannot be asked or scored; its message says why."""


# ---------------------------------------------------------------------------------------------------------------------
# From a row of a data set to a prompt
# ---------------------------------------------------------------------------------------------------------------------

MENTION = re.compile(r"\s*<image\s*(\d*)>\s*")
MARKER = r"(?:^|[\s,;；(]){}\s*[.:)．：]\s*"  # before an option, as in "A: 5 cm", "(A) 5 cm", "A. 5 cm"


def lettered(text: str | None) -> list[str]:
    """The options that a text lists by letter, such as "Options: A: 3 cm, B: 5 cm" or "A. 3; B. 5"."""
    text = text or ""
    begin, found = max((match.end() for match in re.finditer(r"(?:Options|Choices?)\s*:", text)), default=0), []
    for letter in "ABCDEFGHIJ":
        marker = re.compile(MARKER.format(letter)).search(text, begin)
        if marker is None:
            break
        found.append((marker.start(), marker.end()))
        begin = marker.end()
    ends = [start for start, _ in found[1:]] + [len(text)]
    return [text[begin:end].strip(" \n,;；") for (_, begin), end in zip(found, ends)]


def literal(text: str) -> list[str]:
    """The list that a text spells in Python."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError) as error:
        raise Malformed("its options are no list") from error
    if not isinstance(found, list):
        raise Malformed("its options are no list")
    return found


def columns(*names: str) -> Callable[[dict], list]:
    """What stands in these columns of a row, up to the first that is empty."""

    def empty(value) -> bool:
        return (
            value is None
            or (isinstance(value, float) and math.isnan(value))
            or (isinstance(value, str) and value in ("", "nan"))
        )

    return lambda row: list(itertools.takewhile(lambda value: not empty(value), (row.get(name) for name in names)))


def compose(text: str, images: list[Image.Image | None], placed: bool) -> tuple[list[dict], list[Image.Image]]:
    """Chat content and its images: all of them before the text, or, `placed`, where it mentions them (`<image 2>`, also twice)."""
    order, words = [], [text]
    if placed:
        words = MENTION.split(text)  # text, number, text, number, …, text
        order, words = [int(number or 1) - 1 for number in words[1::2]], words[::2]
    first = [place for place, image in enumerate(images) if place not in order and image is not None]
    if any(place >= len(images) or images[place] is None for place in order) or not first + order:
        raise Malformed("an image is missing")
    used = [images[place] for place in first + order]
    if not all(isinstance(image, Image.Image) for image in used):
        raise Malformed("an image is no picture column of datasets")
    if any(max(image.size) > MAX_ASPECT * min(image.size) for image in used):
        raise Malformed(f"an image is over {MAX_ASPECT} times as long as wide")
    content = [{"type": "image"}] * len(first)
    for place, part in enumerate(words):
        content += [{"type": "image"}] if place else []
        content += [{"type": "text", "text": part}] if part.strip() else []
    return content, [image.convert("RGB") for image in used]


# ---------------------------------------------------------------------------------------------------------------------
# What is right
# ---------------------------------------------------------------------------------------------------------------------

FRACTION = re.compile(r"(-?)(?:\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}|(\d+)\s*/\s*(\d+))(.*)", re.DOTALL)
NUMBER = re.compile(r"([-+]?(?:\d[\d,]*\.?\d*|\.\d+))(?:\s*\\times\s*10\s*\^\s*\{?(-?\d+)\}?)?(.*)", re.DOTALL)
UNIT = re.compile(r"\s*((?:[A-Za-z°%$µ][A-Za-z°%/ .]*)?)\s*(?:\^?\{?\d\}?|[²³])?\s*")  # words, and an exponent
TRAILING = re.compile(r"(?:\s+[mg]|\s*(?:[ck]m|mm|metres|(?:square |cubic )?units?|°\s*T?))\s*(?:\^\s*\{?\d\}?)?\s*$")  # units
NAMED = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")


def by_verifier(line: dict, response: str) -> bool:
    return verifier.is_correct(response, line["gold"], line["choices"])


def tidy(answer: str) -> str:
    """Without LaTeX's spaces, thousands separators, dollar signs and \\text{…}; degrees as °."""
    answer = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|掳", "°", answer.replace("{,}", ","))  # 掳 stands for ° in MathVerse
    answer = NAMED.sub(r"\1", answer.replace("\\%", "%").replace("\\$", "$").replace("$", ""))
    return re.sub(r"\\[,;:! ]|~|\s+", " ", answer).strip(" .")


def number(text: str) -> tuple[float, str] | None:
    """A number, also as a fraction or a power of ten, and its unit in words; None where something else stands."""
    found, rest, value = FRACTION.fullmatch(text) or NUMBER.fullmatch(text), "", math.nan
    if found is None:
        return None
    try:
        if found.re is FRACTION:
            sign, *parts, rest = found.groups()
            over, under = [int(part) for part in parts if part is not None]
            value = (-1 if sign else 1) * over / under
        else:
            value, rest = float(found[1].replace(",", "")) * 10.0 ** int(found[2] or 0), found[3]
    except (OverflowError, ZeroDivisionError, ValueError):  # 1/0, 10^{99999}, a number of thousands of digits
        return None
    unit = UNIT.fullmatch(rest)
    return (value, unit[1].strip(" .")) if unit and math.isfinite(value) else None


def by_precision(line: dict, response: str) -> bool:
    """MathVista: an integer cut from the number, a float rounded to `precision` decimals, a list element by element.

    A unit that was asked for may be left out, but no other may stand in its place.
    """
    kind, answer, facts = line["facts"]["answer_type"], verifier.extract_answer(response), line["facts"]
    if line["choices"] or kind == "text" or answer is None:
        return by_verifier(line, response)
    answer = re.sub(r"^(?:\\approx|≈)\s*", "", tidy(answer))
    if kind == "list":
        lists = [re.split(r"\s*(?:,|;|\band\b)\s*", text.strip("[](){}\\ ")) for text in (line["gold"], answer)]
        values = [[number(element) for element in elements] for elements in lists]
        return None not in values[1] and values[0] == values[1]
    mine, gold = number(answer), number(line["gold"])
    if mine is None or gold is None:
        return verifier.equal(line["gold"], answer)[0]
    asked = (facts["unit"] or "").lower().rstrip("s")
    if asked and mine[1] and not mine[1].lower().startswith(asked):
        return False
    if kind == "integer":
        return int(mine[0]) == int(gold[0])
    digits = int(facts["precision"] or 0)
    return round(mine[0], digits) == round(gold[0], digits)


def by_value(line: dict, response: str) -> bool:
    """MathVerse, whose golds are written as "Area $=9 \\pi \\mathrm{cm}^{2}$": the value alone, without name or unit, is right, too."""
    if by_verifier(line, response):
        return True
    answer = verifier.extract_answer(response)
    if line["choices"] or answer is None:
        return False
    gold, answer = tidy(line["gold"]), tidy(answer)
    if "=" in gold and "=" not in answer:
        gold = gold.split("=")[-1]
    gold, answer = (TRAILING.sub("", text) for text in (gold, answer))
    return bool(gold.strip() and answer.strip()) and verifier.equal(gold.strip(), answer.strip())[0]


def single(parts: dict[str, bool]) -> dict[str, float]:
    return {"": float(all(parts.values()))}


def circular(parts: dict[str, bool]) -> dict[str, float]:
    """MMBench's protocol: right only in every rotation of the options; "plain" is the mean over them."""
    return {"": float(all(parts.values())), "plain": sum(parts.values()) / len(parts)}


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
    placed: bool = False  # images stand where the question mentions them
    together: Callable[[dict], tuple[str, str]] | None = None  # row -> (unit, part), where rows are scored together
    parts: Callable[[str, list], int] = lambda unit, choices: 1  # how many parts a unit has
    score: Callable[[dict[str, bool]], dict[str, float]] = single  # of a unit, from its parts
    rotate: bool = False  # ask every rotation of the options, where the data set does not hold them as rows


BENCHMARKS = {
    "mmmu_pro": Benchmark(
        "MMMU-Pro", "MMMU/MMMU_Pro", "standard (10 options)", "test", lambda row: row["question"],
        lambda row: [row.get(f"image_{n}") for n in range(1, 8)], lambda row: literal(row["options"]), False, by_verifier,
        "the standard split with 10 options; the official score, and by its decimals the paper's, averages it with the vision split", placed=True,
    ),
    "mathvista": Benchmark(
        "MathVista", "AI4Math/MathVista", None, "testmini", lambda row: row["query"], columns("decoded_image"),
        lambda row: row["choices"] if row["question_type"] == "multi_choice" else None, True, by_precision,
        "officially a language model extracts the answer, and the nearest option counts; here the last box does",
        facts=("answer_type", "precision", "unit"),
    ),
    "mathvision": Benchmark(
        "MathVision", "MathLLMs/MathVision", None, "test", lambda row: row["question"], columns("decoded_image"),
        lambda row: row["options"] or None, False, by_verifier,
        "equality by math-verify, where the official script evaluates both sides to two decimals, and others let a language model extract",
    ),
    "zerobench": Benchmark(
        "ZeroBench", "jonathan-roberts1/zerobench", None, "zerobench_subquestions", lambda row: row["question_text"],
        lambda row: row["question_images_decoded"] or [], lambda row: None, False, by_verifier,
        "the 334 subquestions (all of the paper's values are multiples of 0.5/334, none of 1/100); officially the answer in curly "
        "braces, by containment; the data set asks for consent on the hub", gold="question_answer",
    ),
    "wemath": Benchmark(
        "WeMath", "We-Math/We-Math", None, "testmini", lambda row: f"{row['question']}\n{row['option']}", columns("image_path"),
        lambda row: lettered(row["option"]), True, by_verifier,
        "the strict score; the paper's values fit a score over 525 problems, it does not say which",
        together=lambda row: (f"{row['key'].split('_')[0]}-{row['ID']}", row["key"].split("_")[1]),
        parts=lambda unit, choices: int(unit[0]) + 1, score=we_math,
    ),
    "mmbench": Benchmark(
        "MMBench", "lmms-lab/MMBench", "en", "dev", lambda row: "\n".join([*columns("hint")(row), row["question"]]), columns("image"),
        columns("A", "B", "C", "D"), False, by_verifier,
        "English dev split, circular, which is stricter than the plain mean over rows that some tools report; officially a language model "
        "reads answers that are no letter", together=lambda row: (str(int(row["index"]) % 1_000_000), str(int(row["index"]) // 1_000_000)),
        parts=lambda unit, choices: len(choices), score=circular, rotate=True,
    ),
    "mmstar": Benchmark(
        "MMStar", "Lin-Chen/MMStar", None, "val", lambda row: row["question"], columns("image"),
        lambda row: lettered(row["question"]), True, by_verifier, "the mean over questions, where some tools average over categories",
    ),
    "mathverse": Benchmark(
        "MathVerse", "CaraJ/MathVerse-lmmseval", "testmini", "testmini", lambda row: row["query_cot"], columns("image"),
        lambda row: mathverse_options(row), True, by_value,
        "officially a language model judges; golds that are sentences (domain and range, say) hardly match by rule; the five versions with an "
        "image; in Vision Only the options are in it, and only letters count",
    ),
}  # fmt: skip


def mathverse_options(row: dict) -> list[str] | None:
    if row["question_type"] != "multi-choice":
        return None
    return list("ABCDEF") if row["problem_version"] == "Vision Only" else lettered(row["query_cot"])


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
        options = [str(option) for option in options]
        if len(options) < 2 or not all(option.strip() for option in options):
            raise Malformed("its options cannot be read")
        right = verifier.option_index(gold, options)
        if right is None:
            raise Malformed(f"gold {gold!r} names none of its {len(options)} options")
        options = options[rotation:] + options[:rotation]
        gold = chr(ord("A") + (right - rotation) % len(options))
        if not benchmark.listed:
            text += "\nOptions:\n" + "\n".join(f"{chr(ord('A') + place)}. {option}" for place, option in enumerate(options))
    content, images = compose(text, benchmark.images(row), benchmark.placed)
    content.append({"type": "text", "text": f"\n{BOXED}"})
    line = {"gold": gold, "choices": options, "facts": {name: row.get(name) for name in benchmark.facts}}
    return Prompt(id, [{"role": "user", "content": content}], images, gold, options), line
