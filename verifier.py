r"""Is this answer right?  The verifiable reward, computed from text alone.

    reward = 0.9 * accuracy + 0.1 * format

accuracy is 1 for the right answer, format is 1 for any answer; otherwise they are 0.

1. Find the answer: the last balanced `\boxed{…}`, or several that only commas, "and" or "or" join.
   If the text has `<answer>…</answer>`, only the last pair counts; without a box, all of it. Boxes
   in thoughts (`<think>`) do not count, and a completion that was cut off has no answer.
2. Write gold and answer in one way: training and evaluation share `normalise`.
3. Multiple choice: the option's letter, the text of exactly one option, or both if they agree.
4. Otherwise compare text, option letters, words, numbers with units, lists, and the rest by
   math-verify, which parses LaTeX with sympy. Numbers are exact: 0.333 is not 1/3, 50% is 0.5.

For this method a wrong answer that is paid is worse than a right one that is refused. So what is
not clear is wrong: two options, another unit, `8 = 7`, broken LaTeX, prose in the box. Rounded or
converted answers (100 cm for 1 m), reduced ratios, decimal commas, synonyms and proofs are wrong,
too. An unfinished product is right (5*2 for 10), as is any order of letters or of a bare list.

sympy may take for ever. So a process of its own judges each answer in 2 seconds of CPU time, on a
busy machine too; an answer that takes more is *too dear*, and wrong.

    python verifier.py  # a table of accepted and rejected answers, with the reasons
    python verifier.py --gold '\frac{1}{2}' --response 'so \boxed{0.5}'
"""

import math
import re
from types import SimpleNamespace

from plumbing import UsageError
from plumbing.notation import bare, elements, named, normalise, number, pieces, short, split_unit
from plumbing.sympy_process import SympyProcess, TooDear

ACCURACY_WEIGHT, FORMAT_WEIGHT = 0.9, 0.1  # as in the NPO authors' configurations
DEAR_PER_PROMPT, DEAR_PER_STEP = 3, 4  # answers on which sympy may give up; it gets no more
MAX_MATH_CHARS = 1000  # longer answers are compared as text only
SYMPY = SympyProcess()  # starts with the first question


# EXPERIMENT HERE: the reward.
def reward(prompt, completion) -> float:
    """What GRPO compares within a group: any finite number, larger is better.

    It may look at prompt.gold, prompt.choices (None if the answer is free), completion.text,
    .token_ids, .answer (None if there is none, or it was cut off) and .accuracy (0.0 or 1.0), both
    already set. Partial credit or a length penalty goes here. Accuracy stays a fact about the
    answer: slot replacement and every reported accuracy look at it and never at the reward. Where
    another scorer is the judge, set completion.accuracy here, to 0.0 or 1.0.
    """
    return ACCURACY_WEIGHT * completion.accuracy + FORMAT_WEIGHT * (completion.answer is not None)


def score(groups) -> None:
    """Sets `answer`, `accuracy`, `too_dear` and `reward` of every completion in the groups.

    Short answers are judged first: which ones are too dear depends neither on the order of sampling
    nor, as remembered verdicts count, on what was judged before.

    Raises UsageError if a reward is no finite number, or an accuracy is neither right nor wrong.
    """
    left = DEAR_PER_STEP
    for group in groups:
        prompt, allowed = group.prompt, min(left, DEAR_PER_PROMPT)
        SYMPY.left = allowed
        for completion in sorted(group.completions, key=lambda c: (len(c.text), c.text)):
            completion.answer = extract_answer(completion.text) if completion.finished else None
            asked, dear = (completion.text, prompt.gold, prompt.choices), SYMPY.too_dear
            completion.accuracy = float(completion.finished and is_correct(*asked))
            completion.too_dear = SYMPY.too_dear > dear
            set_reward(prompt, completion)
        left -= allowed - SYMPY.left
    SYMPY.left = math.inf


def set_reward(prompt, completion) -> None:
    """Sets `reward` of a completion whose accuracy is known; a guide's when it takes a slot."""
    value = reward(prompt, completion)
    if completion.accuracy not in (0, 1):  # a guide cache would silently drop 0.9
        problem = f"accuracy is {completion.accuracy}; partial credit belongs in `reward`"
        raise UsageError(f"prompt {prompt.id}: {problem}")
    try:
        completion.reward = float(value)
    except (TypeError, ValueError):
        completion.reward = math.nan
    if not math.isfinite(completion.reward):
        problem = f"the reward is {value!r}; it must be a finite number"
        raise UsageError(f"prompt {prompt.id}: {problem}")


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
    return said == right, "names no single option" if said is None else f"means {chr(65 + said)}"


CONTROL = re.compile(
    r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]|\t(?:imes|heta|au|ext|frac|an\b|o\b)|\r(?:ho|ight)|"
    r"\n(?:eq|e|u|abla|ot|i|geq|leq|mid)\b"
)


def unanswerable(gold: str) -> str | None:
    """Why no short answer can equal this gold; None if one can."""
    if CONTROL.search(gold):
        return "control characters: LaTeX with single backslashes?"
    if len(gold) > MAX_MATH_CHARS:
        return f"over {MAX_MATH_CHARS} characters"
    text = re.sub(r"\\[A-Za-z]+", " ", normalise(gold))
    if not normalise(gold) or re.fullmatch(r"[-+]?(inf|infinity|nan)", gold.strip(), re.I):
        return "empty, infinite or not a number"
    told = re.match(r"(?:[^\W\d_]+[ ,]+){2}.*\d", text)  # "it would take 180 days"
    return "a sentence" if told or len(re.findall(r"[A-Za-z]{2,}", text)) > 6 else None


# ---- Finding the answer ---------------------------------------------------------------

BRACE = re.compile(r"(?<!\\)\\+(?:boxed|fbox)(?:\s*\{|\s+(-?\d[\d.,]*\b|[A-Z]\b))|\\[{}\\]|[{}]")
BETWEEN = re.compile(r"(?:[\s$,;、{}]|\\[,; ()\[\]]|\\q?quad|\\text\b|and\b|or\b|[和或]|\w+ ?=)*")


def extract_answer(response: str | None) -> str | None:
    """The content of the last balanced box, or of the last answer tags; None if there is neither.

    One pass over the text, so that a megabyte of braces takes a second at most.
    """
    if not isinstance(response, str):
        return None
    response = response.rpartition("</think>")[2].partition("<think>")[0]
    tagged, close = False, response.rfind("</answer>")
    if close >= 0 and (start := response.rfind("<answer>", 0, close)) >= 0:
        tagged, response = True, response[start + len("<answer>") : close]
    opened, boxes = [], []  # None for a plain brace; (start, content, end), if not empty
    for brace in BRACE.finditer(response):
        if brace[1]:
            boxes.append((brace.start(), brace[1], brace.end()))
        elif brace[0] == "}" and opened:
            box = opened.pop()
            if box and (content := response[box.end() : brace.start()].strip()):
                boxes.append((box.start(), content, brace.end()))
        elif brace[0].endswith("{") and brace[0] != "\\{":
            opened.append(None if brace[0] == "{" else brace)
    if not boxes:
        return None if not tagged or "boxed" in response else response.strip() or None
    first, content, _ = max(boxes)
    contents, boxes = [content], sorted(boxes)[:-1]
    while boxes and boxes[-1][2] <= first and BETWEEN.fullmatch(response, boxes[-1][2], first):
        if not re.search("[,;、和或]|and|or", response[boxes[-1][2] : first]):
            break
        first, content, _ = boxes.pop()
        contents.insert(0, content)
    return ", ".join(dict.fromkeys(contents))


# ---- Multiple choice ------------------------------------------------------------------

LETTER = re.compile(r"[(\[]?([A-Z])[)\]]?[.:]?", re.IGNORECASE)
LETTER_TEXT = re.compile(r"(?s)(?:\(([A-Z])\)[.:,]?|([A-Z])(?:~?[.:),]| - |~| (?=\()))[ ~]*(\S.*)")
LETTERS = re.compile(r"(?:\\?[(\[{])?[A-J①-⑳](?:[ ~,;/()]*[A-J①-⑳])*(?:\\?[)\]}])?")


def option_index(answer: str, choices: list[str]) -> int | None:
    """Which option an answer means, by its letter, text or both; None if that is not clear."""
    if len(answer) > MAX_MATH_CHARS:
        return None
    answer, texts = normalise(answer), [normalise(choice) for choice in choices]
    letter = LETTER.fullmatch(answer)
    if letter and (letter[1].isupper() or answer not in texts):
        index = ord(letter[1].upper()) - ord("A")
        return index if index < len(choices) else None
    same = [i for i, text in enumerate(texts) if text == answer]
    if not same and (both := LETTER_TEXT.fullmatch(answer)):
        index = ord(both[1] or both[2]) - ord("A")
        return index if index < len(choices) and equal(choices[index], both[3])[0] else None
    same = same or [i for i, choice in enumerate(choices) if equal(choice, answer)[0]]
    return same[0] if len(same) == 1 else None


def letters(answer: str) -> list[str]:
    """The option letters, or circled digits, that an answer consists of; "(C) 14" counts as C."""
    both = LETTER_TEXT.fullmatch(answer)
    if both and not re.search(r"(?<!\w)[A-J](?!\w)", both[3]):
        return [both[1] or both[2]]
    if LETTERS.fullmatch(answer):
        return sorted(re.findall(r"[A-J①-⑳]", answer))
    return [answer.strip("()").upper()] if re.fullmatch(r"\(?[a-j]\)?", answer) else []


# ---- Comparing answers ----------------------------------------------------------------

WORDS = re.compile(r"[^\W\d_]+(?:[ ~'-]+[^\W\d_]+)*")
PROSE = r"is|of|if|not?|for|all|any|odd|the|are|but|its|th|st|nd|rd|to|by|at|as|be|in|it"
UNCLEAR = re.compile(  # math-verify reads 15 in "7 8", 7 in 7_8, 7' and 7\ldots, 3 in 8-5
    r"^\d+(?:-\d+)+$|\d ?_|\d[ ~]+\d|\.\d*\.|(?<![A-Za-z])'|[\"%?#@]|--|\+\+|[^\W\d_]{4,}|"
    rf"[^\x00-\x7fΩμ°]|(?<![A-Za-z\\])(?:{PROSE})(?![A-Za-z])"
)


def equal(gold: str, answer: str) -> tuple[bool, str]:
    """Whether two answers are equal, and the reason in words. Not symmetric: gold comes first."""
    if max(len(gold), len(answer)) > MAX_MATH_CHARS:
        return gold.split() == answer.split(), f"over {MAX_MATH_CHARS} characters: as text"
    return same(normalise(gold), normalise(answer))


def same(gold: str, answer: str) -> tuple[bool, str]:
    """`equal` of what is normalised already."""
    if bare(gold) == bare(answer):
        return True, "equal as text"
    if LETTERS.fullmatch(gold):
        return letters(gold) == letters(answer), "compared as option letters"
    if WORDS.fullmatch(gold) and WORDS.fullmatch(answer):  # case counts in m, Co and PbS
        alike = bare(gold).casefold() == bare(answer).casefold()
        words = re.findall(r"[^\W\d_]+", f"{gold} {answer}")
        alike &= all(word in (word.lower(), word.upper(), word.capitalize()) for word in words)
        return alike and (len(gold) > 2 or gold.lower() in ("no", "on", "up")), "compared as words"
    if not pieces(gold) or not pieces(answer):
        return False, "brackets that do not close"
    if all(len(pieces(t)) == 1 or number(named(t)[1]) is not None for t in (gold, answer)):
        if (values := without_names(gold, answer)) is None:
            return False, "an equation that does not say what the gold says"
        if values != (gold, answer):
            return same(*values)
    (gold, gold_unit), (answer, its_unit) = split_unit(gold), split_unit(answer)
    if gold_unit and its_unit and gold_unit != its_unit:
        return False, "another unit"
    if (value := number(gold)) is not None and (said := number(answer)) is not None:
        return said in (value, short(gold)), "compared as numbers"
    (kind, golds), (its_kind, answers) = elements(gold), elements(answer)
    if value is not None and answers[1:] and re.findall(r"\d", gold) != re.findall(r"\d", answer):
        return False, "a list for a number"
    if re.search(r"[<>]|\\[lg]eq", gold + answer) or golds == [gold] and answers == [answer]:
        return same_formula(gold, answer)
    return same_lists(kind, golds, its_kind, answers), "compared as lists"


def same_lists(kind: str, golds: list[str], its_kind: str, answers: list[str]) -> bool:
    """Whether all elements are equal: in any order, but between brackets or if they have names."""
    kinds, ordered, sides = {kind, its_kind} - {""}, False, []
    for pairs in ([named(element) for element in side] for side in (golds, answers)):
        names = {name for name, _ in pairs} - {""}
        ordered |= len(names) == len(pairs)
        point = len(names) == len(pairs) and names <= {*"xyz"}  # x=3, y=4
        kinds |= {"()"} if point else set()
        sides.append(sorted(pairs) if point else pairs)
    if len(golds) != len(answers) or len(kinds) > 1 or kind != its_kind and kinds - {"()", r"\{\}"}:
        return False
    ordered |= not kinds <= {r"\{\}"}
    if all(name for pairs in sides for name, _ in pairs):
        sides = [sorted(pairs) for pairs in sides]
    left = [*sides[1]]
    for name, value in sides[0]:
        for place, (its_name, said) in enumerate(left[:1] if ordered else left):
            if {name, its_name} - {""} <= {name or its_name} and same(value, said)[0]:
                del left[place]
                break
        else:
            return False
    return True


def without_names(gold: str, answer: str) -> tuple[str, str] | None:
    r"""("3", "3") of "x=3" and "3"; the same two if nothing is to be taken off; None if unequal.

    A chain as in "x=\frac{3}{6}=\frac{1}{2}" must be right in each number, and "8=7" names nothing.
    """
    (name, value), (its_name, said) = named(gold), named(answer)
    equation = "=" in gold
    if name and (name == its_name or "=" not in answer):
        gold = value.split("=")[-1]
    if its_name and (name == its_name or not equation):
        *steps, answer = said.split("=")
        if not all(re.search("[A-Za-z]", step) or same(gold, step)[0] for step in steps):
            return None
    exact, _, rounded = answer.partition(r"\approx")
    if rounded and (not exact.strip() or number(exact) is None or number(rounded) is None):
        answer = exact.strip() or rounded
    sides = gold.split("="), answer.split("=")
    numeric = len(sides[1]) == 2 and not re.search("[A-Za-z]", sides[1][0])
    if numeric or len(sides[0]) != len(sides[1]) or len(sides[1]) > 2:
        return None
    return gold.strip(" ~"), answer.strip(" ~")


def same_formula(gold: str, answer: str) -> tuple[bool, str]:
    """Of two that are neither numbers nor lists: ratios, and what math-verify can read."""
    ratios = gold.split(":"), answer.split(":")
    if len(ratios[0]) > 1 or len(ratios[1]) > 1:
        alike = len(ratios[0]) == len(ratios[1]) and all(same(*pair)[0] for pair in zip(*ratios))
        return alike, "compared as ratios"
    commands = r"\\(?:begin|end)\{\w+\}|\\(?![lc]?dots|\w*angle|over\w|phantom)[A-Za-z]+(?:_\w)?"
    plain = [re.sub(commands, r"\\", text) for text in (gold, answer)]
    other = any(c not in plain[0] and c.swapcase() in plain[0] for c in plain[1])  # m for M
    if other or any(map(UNCLEAR.search, plain)):
        return False, "no clear LaTeX, and not equal as text"
    return SYMPY.equal(gold, answer), "compared by math-verify"


# ---- The command ----------------------------------------------------------------------

LENGTHS = ["3 cm", "5 cm", "7 cm"]
EXAMPLES = [  # response, gold, choices
    (r"so it is \boxed{\frac{1}{2}}", "0.5", None),
    (r"\boxed{1,000.0}", "1000", None),
    (r"\boxed{\text{(B)}}", "B", LENGTHS),
    (r"\boxed{B: 7 cm}", "B", LENGTHS),
    (r"it must be B", "B", LENGTHS),
    (r"\boxed{35", "35", None),
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
        completion.answer, completion.token_ids = extract_answer(text), [*map(ord, text)]
        verdict, value = "accept" if correct else "reject", reward(prompt, completion)
        print(f"{verdict:8} {value:<7.2f} {right:14} {text:34} {reason}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
