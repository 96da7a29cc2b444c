r"""Is this answer right?  The verifiable reward, computed from text alone.

    reward = 0.9 * accuracy + 0.1 * format

accuracy is 1 for the right answer, format is 1 for any answer; otherwise they are 0.

1. Find the answer: the last balanced `\boxed{…}`, or several that only commas, "and" or "or" join.
   If the text has `<answer>…</answer>`, only the last pair counts; without a box, all of it.
   What stands in thoughts (`<think>`) is no answer, and neither is anything that was cut off.
2. Write gold and answer in one way (`normalise`): training and evaluation share it.
3. Multiple choice: the option's letter, the text of exactly one option, or both if they agree.
4. Otherwise compare, in this order: text, option letters, words, numbers with units, lists, and
   last by math-verify, which parses LaTeX with sympy. Decimals are exact: 0.333 is not 1/3.

A wrong answer that is paid does more harm than a right one that is refused, so what is not clear is
wrong: two options at once, a unit other than the gold's, `7 = 8`, broken LaTeX, prose in the box.
What no rule here can judge: rounded values, converted units (100 cm for 1 m), reduced ratios
(2:3 for 4:6), decimal commas, synonyms, proofs.

sympy can run for ever. A worker process judges one answer in at most 2 seconds of its own CPU time,
whatever else the machine does; an answer that takes more is *too dear*, and wrong.

    python verifier.py  # a table of accepted and rejected answers, with the reasons
    python verifier.py --gold '\frac{1}{2}' --response 'so \boxed{0.5}'
"""

import contextlib
import functools
import json
import math
import os
import re
import struct
import subprocess
import sys
import threading
import unicodedata
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

ACCURACY_WEIGHT, FORMAT_WEIGHT = 0.9, 0.1  # as in the NPO authors' configurations
CPU_SECONDS = 2.0  # that one answer may take
DEAR_ANSWERS = 3  # to one prompt and in one step; math-verify judges no further ones
MAX_MATH_CHARS = 1000  # longer answers are compared as text only
WORKER_MEMORY = 4 << 30  # bytes of address space; a power tower would make sympy take everything


class TooDear(Exception):
    """math-verify would need too much time or memory for this answer."""


# EXPERIMENT HERE: the reward.
def reward(prompt, completion) -> float:
    """What GRPO compares within a group: any finite number, larger is better.

    It may look at prompt.gold, prompt.choices (None if the answer is free), completion.text,
    .token_ids, .finished (False if it was cut off), .answer (None if there is none) and .accuracy
    (0.0 or 1.0), all set already. Partial credit or a length penalty goes here. Accuracy stays a
    fact about the answer: slot replacement and every reported accuracy look at it and never at
    the reward.
    """
    return ACCURACY_WEIGHT * completion.accuracy + FORMAT_WEIGHT * (completion.answer is not None)


def score(groups) -> None:
    """Sets `answer`, `accuracy`, `too_dear` and `reward` of every completion, in this order.

    A completion that was cut off has no answer. Short answers are judged first, so that neither
    the order of sampling nor what an earlier step remembers has a say in what is too dear.

    Raises FloatingPointError if a reward is nan or infinite, and ValueError if an edited
    `is_correct` gives anything but right or wrong.
    """
    for group in groups:
        prompt, MATH_VERIFY.left = group.prompt, DEAR_ANSWERS
        for completion in group.completions:
            completion.answer = extract_answer(completion.text) if completion.finished else None
        for completion in sorted(group.completions, key=lambda c: (len(c.answer or ""), c.text)):
            before = MATH_VERIFY.too_dear
            right = completion.answer and is_correct(completion.text, prompt.gold, prompt.choices)
            completion.accuracy = float(right or 0)
            completion.too_dear = MATH_VERIFY.too_dear > before
            if completion.accuracy not in (0, 1):  # a guide cache would silently drop 0.9
                problem = f"accuracy is {completion.accuracy}; partial credit belongs in `reward`"
                raise ValueError(f"prompt {prompt.id}: {problem}")
            completion.reward = float(reward(prompt, completion))
            if not math.isfinite(completion.reward):
                raise FloatingPointError(f"prompt {prompt.id}: the reward is {completion.reward}")
    MATH_VERIFY.left = math.inf


def is_correct(response: str | None, gold: str, choices: list[str] | None = None) -> bool:
    """Whether the response's answer equals `gold`, for multiple choice a letter or an option."""
    return judge(response, gold, choices)[0]


def judge(response: str | None, gold: str, choices: list[str] | None = None) -> tuple[bool, str]:
    """The verdict of `is_correct`, and its reason in words."""
    answer = extract_answer(response)
    if answer is None:
        return False, "no closed \\boxed{…} or <answer> tags"
    try:
        if not choices:
            return equal(gold, answer)
        right, said = option_index(gold, choices), option_index(answer, choices)
    except TooDear as error:
        return False, str(error)
    if right is None:
        return False, f"gold {gold!r} names none of the {len(choices)} options"
    if said is None:
        return False, "names no option, or more than one"
    return said == right, f"means option {chr(65 + said)}"


def unanswerable(gold: str) -> str | None:
    """Why no short answer can equal this gold, or None if one can."""
    if CONTROL.search(gold):
        return "control characters: LaTeX with single backslashes?"
    if len(gold) > MAX_MATH_CHARS:
        return f"over {MAX_MATH_CHARS} characters"
    text = normalise(gold)
    if not text or re.fullmatch(r"[-+]?(?:inf|infinity|nan)", gold.strip(), re.IGNORECASE):
        return "empty, infinite or no number"
    words = WORD.findall(re.sub(r"\\[A-Za-z]+", " ", text))
    told = re.match(r"(?:[^\W\d_]+[ ,]+){2,}[^ ]*\d", text)  # as in "it would take 180 days"
    return "a sentence" if "=" not in text and (told or len(words) > 6) else None


# ---- Finding the answer ---------------------------------------------------------------

BRACE = re.compile(r"\\+(?:boxed|fbox)(?:\s*\{|\s+(-?\d[\d.,]*\b|[A-Z]\b))|\\[{}\\]|[{}]")
JOINED = re.compile(
    r"(?:[\s$,;、]|\\[,; ()\[\]]|\\q?quad|\\text\b|[{}]|and\b|or\b|[和或与]|\w+ ?=)*"
)


def extract_answer(response: str | None) -> str | None:
    """The content of the last balanced box, or of the last answer tags; None if there is neither.

    One pass over the text, so that a megabyte of braces takes a second at most.
    """
    if not isinstance(response, str):
        return None
    response = re.split(r"</think(?:ing)?>", response)[-1]
    response = re.split(r"<think(?:ing)?>", response, maxsplit=1)[0]
    tagged, close = False, response.rfind("</answer>")
    if close >= 0 and (start := response.rfind("<answer>", 0, close)) >= 0:
        tagged, response = True, response[start + len("<answer>") : close]
    open_braces = []  # of each open box: where it starts and its content; None for a plain brace
    boxes = []  # (start, content) of those that are balanced and hold something, and their end
    for brace in BRACE.finditer(response):
        if brace[1]:
            boxes.append((brace.start(), brace[1], brace.end()))
        elif brace[0] == "}" and open_braces:
            start = open_braces.pop()
            if start and (content := response[start[1] : brace.start()].strip()):
                boxes.append((start[0], content, brace.end()))
        elif brace[0].endswith("{") and brace[0] != "\\{":
            open_braces.append(None if brace[0] == "{" else (brace.start(), brace.end()))
    if not boxes:
        return None if not tagged or "boxed" in response else response.strip() or None
    boxes.sort()
    first, content, _ = boxes.pop()
    contents = [content]
    while boxes and (between := response[boxes[-1][2] : first]) and JOINED.fullmatch(between):
        if not re.search(r"[,;、和或与]|and|or", between):
            break
        first, content, _ = boxes.pop()
        contents.append(content)
    return ", ".join(dict.fromkeys(reversed(contents)))


# ---- One way to write it --------------------------------------------------------------

TABLE = str.maketrans(
    dict.fromkeys("–—−‐‑", "-")
    | dict.fromkeys("·∙⋅•", r"\cdot ")
    | dict.fromkeys("‘’′", "'")
    | dict.fromkeys("“”″", '"')
    | dict.fromkeys("⟨〈", "(")
    | dict.fromkeys("⟩〉", ")")
    | {"×": r"\times ", "÷": "/", "⁄": "/", "±": r"\pm ", "∞": r"\infty ", "π": r"\pi "}
    | {"≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "∪": r"\cup "}
    | {"∈": r"\in ", "∠": r"\angle ", "△": r"\triangle ", "θ": r"\theta ", "α": r"\alpha "}
    | {"β": r"\beta ", "λ": r"\lambda ", "、": ",", "。": ".", "√": r"\sqrt "}
)
FONT = r"\\(?:text\w*|math(?!bb|cal)\w+|mbox|hbox|boldsymbol|bm|pmb|emph|underline|boxed|fbox)"
FONT = re.compile(FONT + r"\s*\{([^{}]*)\}")
LATEX = [  # (pattern, replacement), in this order
    (r"\\\\(?=[A-Za-z])(?!.*matrix)", r"\\"),  # a command whose backslash was doubled
    (r"\\(?:left|right|[bB]igg?[lr]?|display\w+|bf|rm|it|limits)(?![A-Za-z])|\\!\s*", ""),
    (r"\\(?:text|f)?color(?:box)?\{[^{}]*\}", ""),
    (r"\\q?quad(?![A-Za-z])|\\[,;: ]|\\[()\[\]]|\\\\$", " "),
    (r"\{,\}", ","),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac\s*(\d)", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
    (r"\\sqrt\s*\(?(\w+)\)?", r"\\sqrt{\1}"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\\textdegree|\\circ(?=\s*$)", "°"),
    (r"\\Omega(?![A-Za-z])", "Ω"),
    (r"\\mu(?![A-Za-z])", "μ"),
    (r"\\%|\s*\b(?:percent(?:age)?|per cent|pct)\b", "%"),
    (r"\\l?angle(?=\s*[-\d(\\])(?=.*\\rangle)|\\langle", "("),
    (r"\\rangle", ")"),
    (r"\\lt(?![A-Za-z])|&lt;", "<"),
    (r"\\gt(?![A-Za-z])|&gt;", ">"),
    (r"<=|\\le(?:qslant)?(?![A-Za-z])", r"\\leq "),
    (r">=|\\ge(?:qslant)?(?![A-Za-z])", r"\\geq "),
    (r"!=|\\ne(?![A-Za-z])", r"\\neq "),
    (r"\s*\b(?:is equal to|equals|等于)\s*", "="),
    (r"(?<=[^A-Za-z\\])[,~\s]*(?:\b(?:and|or)\b|[和或与及])[~\s]*", ","),
]
LATEX = [(re.compile(pattern), replacement) for pattern, replacement in LATEX]
LEAD_IN = re.compile(
    r"(?:.*####|(?:(?:so|thus|hence|therefore|i choose)\b[, ]*)?(?:(?:the|la|le|die|el)\s+)?"
    r"(?:(?:final|correct|right)\s+)?(?:answer|ans|option|choice|result|solution|respuesta|"
    r"réponse|antwort|opción)(?:\s+(?:is|es|est|ist|lautet)\b)?(?=[\s:.=])[:.=]?"
    r"(?:\s*(?:option|choice)(?=\s))?|(?:故|所以|因此)?(?:正确)?(?:答案|选项|应选|选|答)[是为选]?:?"
    r"|\w+\s*\\in(?=\W))\s*(?=\S)",
    re.IGNORECASE | re.DOTALL,
)
QUOTED = re.compile(r"([*_`'\"]+)(.+)\1|\{([^{}]*)\}|(.+?)(?<!\.)[.;:,]", re.DOTALL)


@functools.lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """Gold or answer in one way of writing: ASCII and plain LaTeX, no fonts, no lead-in.

    Superscripts and fractions of one sign go first, as NFKC would make 52 of 5² and 31/2 of 3½. A
    tilde remains where text was set upright: in 5~m a unit begins there.
    """
    nfkc = functools.partial(unicodedata.normalize, "NFKC")
    text = re.sub("[⁰¹²³⁴-⁹⁻⁺ⁿ]+", lambda run: f"^{{{nfkc(run[0])}}}", re.sub("[º˚]", "°", text))
    text = re.sub("[₀-₉]+", lambda run: f"_{{{nfkc(run[0])}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda sign: r"\frac{%s}{%s}" % (*nfkc(sign[0]).split("⁄"),), text)
    text = re.sub("[^①-⑳]+", lambda run: nfkc(run[0]), text).translate(TABLE)
    text = re.sub(r"\\\$|^\s*\$(?=[\d.,]+$)", "¤", text).replace("$", " ").replace("¤", "$")
    for _ in range(9):  # fonts may be nested
        text, count = FONT.subn(r"~\1~", text)
        if not count:
            break
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    text = re.sub(r"[\s~]*~[\s~]*", "~", " ".join(text.split()))
    before = None
    while before != text:
        before, text = text, LEAD_IN.sub("", text.strip(" ~"), count=1).strip(" ~")
        if (outer := QUOTED.fullmatch(text)) and any(outer.groups()):
            text = outer[2] or outer[3] or outer[4] or text
    return text


# ---- Multiple choice ------------------------------------------------------------------

LETTER = re.compile(r"\(?([A-Z])\)?[.:]?", re.IGNORECASE)
LETTER_AND_TEXT = re.compile(
    r"(?:\(([A-Z])\)[.:,]?|([A-Z])(?:[.:)]|, | - |~))[\s~]*(\S.*)", re.DOTALL
)
LETTERS = re.compile(r"\(?[A-J①-⑳]\)?(?:[\s~,;/]*\(?[A-J①-⑳]\)?)*")


def option_index(answer: str, choices: list[str]) -> int | None:
    """Which option an answer means, by its letter, text or both; None if that is not clear."""
    answer, texts = normalise(answer), [normalise(choice) for choice in choices]
    letter = LETTER.fullmatch(answer)
    if letter and (letter[1].isupper() or answer not in texts):
        index = ord(letter[1].upper()) - ord("A")
        return index if index < len(choices) else None
    same = [i for i, text in enumerate(texts) if text == answer]
    if not same and (both := LETTER_AND_TEXT.fullmatch(answer)):
        index = ord(both[1] or both[2]) - ord("A")
        return index if index < len(choices) and equal(choices[index], both[3])[0] else None
    same = same or [i for i, choice in enumerate(choices) if equal(choice, answer)[0]]
    return same[0] if len(same) == 1 else None


def letters(text: str) -> set[str]:
    """The option letters or circled digits that a text consists of; "(C) 14" counts as C."""
    both = LETTER_AND_TEXT.fullmatch(text)
    if both and not re.search(r"(?<!\w)[A-J](?!\w)", both[3]):
        return {both[1] or both[2]}
    if LETTERS.fullmatch(text):
        return set(re.findall(r"[A-J①-⑳]", text))
    return {text.strip("()").upper()} if re.fullmatch(r"\(?[a-j]\)?", text) else set()


# ---- Numbers and units ----------------------------------------------------------------

PLAIN = re.compile(r"(?=.*\d)(?:[1-9]\d{0,2}(?:[, ]\d{3})+|\d{1,400})?(?:\.\d{1,400})?")
POWER = re.compile(r"(.*?)(?:[eE]|(?:^| ?(?:\\times|\\cdot|\*|x)) ?10\^)\{?\(?([-+]?\d{1,4})\)?\}?")
FRACTION = re.compile(r"(?:(\d{1,9})(?: |(?=\\)))?(?:\\frac ?\{(.+)\} ?\{(.+)\}|([^/ ]+)/([^/ ]+))")


def number(text: str) -> Fraction | None:
    """The exact value of a decimal, a power of ten, a fraction or mixed number, or percent."""
    text, value = text.replace("~", " ").strip(), None
    if text[:1] in ("-", "+") and text[1:2] not in ("-", "+"):
        value = number(text[1:])
        return -value if value is not None and text[0] == "-" else value
    if text.endswith("%"):
        value = number(text[:-1])
        return value if value is None else value / 100
    if PLAIN.fullmatch(text):
        return Fraction(re.sub("[, ]", "", text))
    if (power := POWER.fullmatch(text)) and (not power[1] or PLAIN.fullmatch(power[1].strip())):
        return Fraction(re.sub("[, ]", "", power[1]) or 1) * Fraction(10) ** int(power[2])
    if parts := FRACTION.fullmatch(text):
        over, under = (number(part) for part in parts.groups()[1:] if part)
        if over is not None and under and (not parts[1] or 0 < over < under):
            value = int(parts[1] or 0) + over / under
    return value


def denoised(gold: str) -> Fraction | None:
    """The short decimal behind a float's long text, as in 0.10000000149011612 or 3.0000000000000004."""
    if not re.fullmatch(r"-?\d{1,9}\.\d{9,}", gold):
        return None
    value, short = float(gold), f"{float(gold):.15g}"
    single = struct.unpack("f", struct.pack("f", value))[0] == value
    if single and struct.pack("f", float(f"{value:.6g}")) == struct.pack("f", value):
        return Fraction(f"{value:.6g}")
    return Fraction(short) if len(short) < 14 and len(gold) > 16 else None


UNITS = """mm 毫米 millimeter millimetre|cm 厘米 公分 centimeter centimetre|dm 分米|m 米 meter metre
km 千米 公里 kilometer kilometre|in inch inches|ft foot feet|yd yard|mi mile 英里|g 克 gram gm
kg 千克 公斤 kilogram|mg 毫克 milligram|t 吨 ton tonne|lb lbs pound|s 秒 sec second
min 分钟 分 minute|h 小时 时 hr hour|d 天 日 day|week 周|month 月 个月|year 年 岁 yr|N 牛 newton kN
J 焦 joule|kJ|W 瓦 watt|kW|V 伏 volt|A 安 amp ampere|mA|Ω 欧 ohm|Hz 赫兹 hertz|kHz|MHz|GHz
Pa 帕 pascal|kPa|MPa|C 库 coulomb|K 开 kelvin|mol 摩尔 mole|L l 升 liter litre|mL ml 毫升 milliliter
eV|MeV|cal|kcal|rad 弧度 radian|° 度 deg degree|°C 摄氏度 ℃|°F|T tesla|Wb|F farad|H|M|nm|μm|atm|bar
$ dollar usd 美元|¥ 元 yuan rmb|£ |€ euro 欧元|cent|mph|hectare ha 公顷|acre|gallon|mile|unit 单位
person 人 people 名|child children|time 次|piece 个 只 件 张 块 条 本 支 辆 棵 台 头|way ways 种"""
UNIT_OF = {name: names.split()[0] for names in re.split(r"[|\n]", UNITS) for name in names.split()}
UNIT = re.compile(
    r"(/|per[ ~]|每)?[\s~·*]*(square|sq\.?|平方|cubic|cu\.?|立方)?[\s~]*(°[CF]?|[$£¥€]|[^\W\d_]+)\.?"
    r"(?:\^?\{?(-?\d)\}?(?!\d))?[\s~]*(?:\\cdot|\*)?[\s~]*"
)
NO_NOUN = re.compile(
    r"(?:times|less|plus|minus|halves|.*th|.*thirds|dozens|.*[nr]ds|tens)s?|.*illions?"
)
NO_COUNT = "[百千万亿兆十分之倍不或约多上下左右第余几半负点减加]"


def unit(text: str) -> dict[str, int] | None:
    """The powers of what a unit is made of, as in {"m": 1, "s": -2}; None if it is no unit."""
    powers, place = Counter(), 0
    while place < len(text):
        part = UNIT.match(text, place)
        word = part[3] if part else ""
        name = (
            UNIT_OF.get(word) or UNIT_OF.get(word.lower().rstrip("s"))
            if len(word) > 2
            else UNIT_OF.get(word)
        )
        if not name and re.fullmatch(r"[a-z]{3,}s", word) and not NO_NOUN.fullmatch(word):
            name = word
        if not name and re.fullmatch("[一-鿿]{1,4}", word) and not re.search(NO_COUNT, word):
            name = word
        if not name:
            return None
        power = int(part[4] or {"s": 2, "平": 2, "c": 3, "立": 3}.get((part[2] or "-")[0], 1))
        powers[name] += -power if part[1] else power
        place = part.end()
    return powers


def split_unit(text: str) -> tuple[str, dict[str, int] | None]:
    """("5", {"m": 1}) of "5 m"; a letter right after a number, or one after a formula, is none."""
    if text[:1] in tuple("$£¥€") and number(text[1:]) is not None:
        return text[1:], unit(text[0])
    for start in re.finditer(r"(?<=[\d)}!])(?:[\s~]*)(?=[^\W\d_]|[°$£¥€])|~(?=[A-Za-z])", text):
        value, rest = text[: start.start()], text[start.end() :]
        bare = (
            start[0]
            and PLAIN.fullmatch(value.lstrip("-+"))
            or not re.match(r"[A-Za-z]{1,2}\b", rest)
        )
        safe = "~" in start[0] or rest[:2] in ("cm", "km", "mm", "kg")
        if (safe or bare) and (found := unit(rest)):
            return value, found
    return text, None


# ---- Comparing ------------------------------------------------------------------------

WORD = re.compile(r"[^\W\d_]{2,}")
WORDS = re.compile(r"[^\W\d_]+(?:[\s~'-]+[^\W\d_]+)*")
NAME = re.compile(
    r"(?=.*[A-Za-z])(?:[A-Za-z\s~|:{}]|_\w|_\{[^{}]*\}|\^\{-1\}|\([\w, ~]*\)|"
    r"\\(?:angle|triangle|frac|overline|vec|Delta|alpha|beta|theta|lambda|phi|omega|rho)(?![A-Za-z]))+"
)
KINDS = (("(", ")"), (r"\{", r"\}"), ("[", "]"), ("[", ")"), ("(", "]"))


def equal(gold: str, answer: str) -> tuple[bool, str]:
    """Whether two answers are equal, and the reason in words. Not symmetric: gold comes first."""
    if max(len(gold), len(answer)) > MAX_MATH_CHARS:
        return gold.split() == answer.split(), f"over {MAX_MATH_CHARS} characters: as text"
    return same(normalise(gold), normalise(answer))


def same(gold: str, answer: str) -> tuple[bool, str]:
    """As `equal`, of normalised texts."""
    if gold.replace("~", " ") == answer.replace("~", " "):
        return True, "equal as text"
    if LETTERS.fullmatch(gold):
        return letters(gold) == letters(answer), "compared as option letters"
    if WORDS.fullmatch(gold) and WORDS.fullmatch(answer):
        alike = gold.replace("~", " ").casefold() == answer.replace("~", " ").casefold()
        return alike and (
            len(gold) > 2 or gold.lower() in ("no", "up", "on", "ok")
        ), "compared as words"
    (gold, gold_unit), (answer, its_unit) = split_unit(gold), split_unit(answer)
    if gold_unit and its_unit and gold_unit != its_unit:
        return False, "another unit"
    values = number(gold), number(answer)
    if None not in values:
        return values[1] in (values[0], denoised(gold)), "compared as numbers"
    (gold_kind, golds), (kind, answers) = parts(gold), parts(answer)
    if not golds or not answers:
        return False, "brackets that do not close"
    relation = re.search(r"[<>]|\\[lg]eq|\\cup", gold + answer)
    if len(golds) == len(answers) == 1 or relation:
        return same_value(gold, answer) if relation else same_value(golds[0], answers[0])
    return same_list(gold_kind, golds, kind, answers), "compared as lists"


def parts(text: str) -> tuple[str, list[str]]:
    r"""("(", ["3", "4"]) of "(3,4)"; the kind is empty without brackets. [] if they do not close."""
    for opens, closes in KINDS:
        inner = text[len(opens) : -len(closes)]
        if text.startswith(opens) and text.endswith(closes) and (found := pieces(inner)):
            return ("" if len(found) == 1 else opens + closes), found
    return "", [half for piece in pieces(text) for half in both_signs(piece)]


def both_signs(text: str) -> list[str]:
    return [text.replace(r"\pm", sign) for sign in "+-"] if text.count(r"\pm") == 1 else [text]


def pieces(text: str) -> list[str]:
    """What commas and semicolons outside of brackets separate; [] if brackets do not balance."""
    depth, start, found = 0, 0, []
    for token in re.finditer(r"\\?[{}]|[()\[\],;]", text):
        if token[0] not in ",;":
            depth += 1 if token[0][-1] in "{([" else -1
            if depth < 0:
                return []
        elif depth == 0:
            found.append(text[start : token.start()])
            start = token.end()
    found = [piece.strip(" ~") for piece in [*found, text[start:]]]
    return [] if depth else [piece for piece in found if piece]


def same_list(gold_kind: str, golds: list[str], kind: str, answers: list[str]) -> bool:
    """Element by element; in any order if neither side has brackets, other than braces, or names."""
    kinds = {gold_kind, kind} - {""}
    if len(golds) != len(answers) or len(kinds) > 1 or ("[]" in kinds and gold_kind != kind):
        return False
    sides, ordered = [], not kinds <= {r"\{\}"}
    for side in ([named(element) for element in some] for some in (golds, answers)):
        names = {name for name, _ in side if name}
        ordered |= len(names) == len(side)
        sides.append(sorted(side) if len(names) == len(side) and names <= {*"xyz"} else side)
    if all(name for side in sides for name, _ in side):
        sides = [sorted(side) for side in sides]
    left = [value for _, value in sides[1]]
    for place, (name, value) in enumerate(sides[0]):
        if name and sides[1][place][0] not in ("", name):
            return False
        found = [i for i in ([0] if ordered else range(len(left))) if same(value, left[i])[0]][:1]
        if not found:
            return False
        del left[found[0]]
    return True


def named(text: str) -> tuple[str, str]:
    """("x", "3") of "x=3" and of "3=x"; the name is empty if the left side is no mere name."""
    sides = re.split(r"=|\\approx", text)
    if len(sides) == 2 and NAME.fullmatch(sides[1]) and not NAME.fullmatch(sides[0]):
        sides.reverse()
    if len(sides) > 1 and NAME.fullmatch(sides[0]):
        return re.sub(r"[\s~]", "", sides[0]), "=".join(sides[1:]).strip()
    return "", text


def same_value(gold: str, answer: str) -> tuple[bool, str]:
    """Of two that are no lists: names, chains of equations, ratios; the rest by math-verify."""
    before, (gold_name, gold_value), (name, value) = (gold, answer), named(gold), named(answer)
    if gold_name and (gold_name == name or "=" not in answer):
        gold = gold_value
    if name and (gold_name == name or "=" not in gold):
        *steps, answer = value.split("=")
        if any(not re.search("[A-Za-z]", step) and not same(gold, step)[0] for step in steps):
            return False, "a chain of equations that contradicts itself"
    exact, _, rounded = answer.partition(r"\approx")
    if rounded and (not exact.strip() or number(exact) is None or number(rounded) is None):
        answer = exact if exact.strip() else rounded
    if before != (gold, answer):
        return same(gold.strip(" ~"), answer.strip(" ~"))
    if ("=" in gold) != ("=" in answer):
        return False, "an equation, and the other is none"
    ratios = gold.split(":"), answer.split(":")
    if ":" in gold + answer:
        alike = len(ratios[0]) == len(ratios[1]) and all(same(*pair)[0] for pair in zip(*ratios))
        return alike, "compared as ratios"
    if UNCLEAR.search(re.sub(r"\\[A-Za-z]+", "\\ ", gold)) or UNCLEAR.search(
        re.sub(r"\\[A-Za-z]+", "\\ ", answer)
    ):
        return False, "no clear LaTeX, and not equal as text"
    return MATH_VERIFY.ask(latex(gold), latex(answer)), "compared by math-verify"


UNCLEAR = re.compile(
    r"\d ?_|\d[ ~]+\d|\.\d*\.|(?<![A-Za-z])'|[\"%?&#@,;]|--|\+\+|^[*/^=]|[-+*/^=_]\s*$|[^\W\d_]{4,}|"
    r"[^\x00-\x7fΩμ°]|(?<![A-Za-z])(?:is|of|if|not?|for|all|any|odd|the|are|but|its|th|st|nd|rd|to|by|at|as|be|in|it)(?![A-Za-z])"
)
TOWER = re.compile(
    r"\^\{?[^{}^]*\d\^\{?\d|\^[^^]*\^[^^]*\^|\^\{?-?\d{4}|\d{4}!|!\)*!|(?:[({].*){25}|\d{401}"
)


def latex(text: str) -> str:
    """What math-verify reads: decimals as exact fractions, for it rounds floats to six digits."""
    text = re.sub(
        r"(\d*)\.(\d+)", lambda d: rf"(\frac{{{d[1]}{d[2]}}}{{1{'0' * len(d[2])}}})", text
    )
    return text.replace("°", r"^{\circ}").replace("~", " ")


# ---- math-verify in a process of its own ----------------------------------------------


class MathVerify:
    """A worker process, which starts with the first question: one JSON line in, one word out."""

    def __init__(self):
        self.process, self.lock = None, threading.Lock()
        self.verdict = functools.lru_cache(maxsize=1 << 17)(self._verdict)
        self.left, self.too_dear = math.inf, 0  # dear answers still allowed; answers that were

    def ask(self, gold: str, answer: str) -> bool:
        """Whether math-verify finds two LaTeX texts equal; raises TooDear."""
        verdict = None
        if not TOWER.search(gold) and not TOWER.search(answer) and self.left > 0:
            verdict = self.verdict(gold, answer)
            self.left -= verdict is None  # also if it is remembered: a resumed run remembers less
        if verdict is None:
            self.too_dear += 1
            raise TooDear("too much for math-verify")
        return verdict

    def _verdict(self, gold: str, answer: str) -> bool | None:
        with self.lock:  # one question at a time, whichever thread asks
            for _ in range(2):  # a second time if somebody else has killed the worker
                if self.process is None:
                    self._start()
                with contextlib.suppress(BrokenPipeError):
                    self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                    self.process.stdin.flush()
                    if reply := self.process.stdout.readline():
                        return {b"right\n": True, b"wrong\n": False, b"dear\n": None}[reply]
                self._end()
        raise RuntimeError("math-verify's worker process was killed twice: out of memory?")

    def _start(self):
        command = [sys.executable, __file__, "--worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # in a session of its own, Ctrl-C in the terminal does not reach it; it ends with stdin
        fixed = os.environ | {"PYTHONHASHSEED": "0"}  # sympy's order of terms
        self.process = subprocess.Popen(command, **pipes, env=fixed, start_new_session=True)
        if self.process.stdout.readline() != b"ready\n":
            code = self._end()
            raise RuntimeError(
                f"math-verify does not start (its process ended with {code}): "
                "pip install -r requirements.txt"
            )

    def _end(self) -> int:
        self.process.kill()
        self.process.communicate()
        code, self.process = self.process.returncode, None
        return code


MATH_VERIFY = MathVerify()


def worker() -> None:
    """The worker process: forks a child that answers, and another where a question killed it."""
    import resource
    import signal

    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr

    rules = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True)  # no units
    rules = [LatexExtractionConfig(normalization_config=rules)]  # LaTeX alone: no last number

    def equal_in_math(gold: str, answer: str) -> bool:
        both = [
            parse(rf"\boxed{{{text}}}", rules, "no_fallback", parsing_timeout=None)
            for text in (gold, answer)
        ]
        if not all(both) or not verify(*both, numeric_precision=100, timeout_seconds=None):
            return False
        (gold, *_), (answer, *_) = both
        if not isinstance(gold, Expr) or not isinstance(answer, Expr) or gold.free_symbols:
            return True
        gold, answer = gold.evalf(30), answer.evalf(30)  # math-verify takes all below 1e-15 as 0
        return abs(gold - answer) <= abs(gold) * 1e-25

    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is not a reply
    with contextlib.suppress(ValueError, OSError):  # some systems do not allow lowering it
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    print("ready", file=replies, flush=True)
    while child := os.fork():
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            return  # stdin was closed
        print("dear", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal ends the child
        verdict = "right" if equal_in_math(*json.loads(line)) else "wrong"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, file=replies, flush=True)


# ---- The command ----------------------------------------------------------------------

LENGTHS = ["3 cm", "5 cm", "7 cm"]
EXAMPLES = [  # response, gold, choices
    (r"27 +8= 35 \boxed{35}", "35", None),
    (r"first \boxed{1}, no: \boxed{2}", "1", None),
    (r"so it is \boxed{\frac{1}{2}}", "0.5", None),
    (r"<answer> x = 3 </answer>", "3", None),
    (r"\boxed{1,000.0}", "1000", None),
    (r"\boxed{\text{(B)}}", "B", LENGTHS),
    (r"\boxed{5 cm}", "B", LENGTHS),
    (r"\boxed{B: 7 cm}", "B", LENGTHS),
    (r"it must be B", "B", LENGTHS),
    (r"\boxed{35", "35", None),
    (r"\boxed{act}", "cat", None),
    (r"\boxed{9^{9^{9^{9}}}}", "7", None),
]


def main(gold: str | None = None, response: str | None = None, choices: list[str] | None = None):
    """Judges one response, or prints a table of examples.

    Args:
        gold: The right answer; for multiple choice an option's letter or text.
        response: What the policy said, with its answer in \\boxed{…}.
        choices: The options' texts, in order.
    """
    if (gold is None) != (response is None):
        raise SystemExit("error: --gold and --response go together")
    print(f"{'verdict':8} {'reward':7} {'gold':14} {'response':34} reason")
    for text, right, options in [(response, gold, choices)] if gold is not None else EXAMPLES:
        correct, reason = judge(text, right, options)
        prompt = SimpleNamespace(id="example", gold=right, choices=options)
        completion = SimpleNamespace(text=text, accuracy=float(correct), finished=True)
        completion.token_ids = [ord(letter) for letter in text]
        value = reward(prompt, completion)
        print(f"{'accept' if correct else 'reject':8} {value:<7.2f} {right:14} {text:34} {reason}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        worker()
    else:
        import tyro

        tyro.cli(main)
