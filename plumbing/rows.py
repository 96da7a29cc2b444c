"""A row of a data set: what it asks, as chat messages with pictures, and its gold.

Training and evaluation share how pictures are placed and options are listed.
"""

import re
from decimal import Decimal
from pathlib import Path

import numpy as np
from PIL import Image

import verifier
from plumbing import Unusable
from plumbing.pictures import open_image

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
MAX_ASPECT = 200  # Qwen's image processor refuses a longer or narrower picture
MORE_MARKS = "more <image> marks than images"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MARKER = r"(?:^|[\s,;；(]){}\s*[.:)．：]\s*"  # before an option: "A: 5 cm", "(A) 5 cm", "A. 5 cm"
MORE_TEXT = re.compile(r"[.,]?\w")  # behind the 1 of 12 or of 1.5
MARK = re.compile(  # of a picture: <image>, <image 2>, <image_2>, <Image>, <img>, verl's tokens
    r"(?:<\|?(?:image|img)[ _-]?(\d{0,3})\|?\s?/?>|<img\s[^<>]{0,500}>)(?:</(?:image|img)>)?"
    r"|<\|vision_start\|><\|image_pad\|><\|vision_end\|>",
    re.IGNORECASE,
)
LOST_BACKSLASH = re.compile(  # where JSON read "\\frac" as a form feed and "rac"
    r"[\b\a]|\f(?=[a-z])|\r(?=ight|angle|floor|ceil|(?:ho|m)(?![a-z]))|\{\n(?=[uei]\b)"
    r"|\t(?=imes|heta|ext(?:\{|bf|it|rm)|frac|riangle|ilde|binom|(?:au|op)(?![a-z])"
    r"|an(?:[({^\\]| [a-zA-Z]\b)|o(?: ?\\| [-+\d]))"
    r"|\n(?=abla|exists|otin|(?:eq|leq|geq|mid|ot)(?![a-z]))"
)
LOST = "control characters (LaTeX with single backslashes?)"


def compose(text: str, images: list[Image.Image | None], placed: bool = True) -> tuple[list, list]:
    """Chat content and its images: where the text marks them, the others before it.

    "<image>" is the next image, "<image 2>" the second, also twice; None is one that is missing.
    With `placed` False all images come first, and the marks stay in the text. Raises Unusable.
    """
    pieces = MARK.split(text) if placed else [text]  # text, number, text, number, …, text
    texts, marks, unnumbered = pieces[::2], pieces[1::2], iter(range(len(pieces)))
    mentioned = [int(number) - 1 if number else next(unnumbered) for number in marks]
    there = [place for place, image in enumerate(images) if image is not None]
    if not {*mentioned} <= {*there}:
        raise Unusable(
            MORE_MARKS,
            "name the images' column, as in --columns images=image",
            got=MARK.search(text)[0],
        )
    first = [place for place in there if place not in mentioned]
    used = [images[place] for place in first + mentioned]
    if any(max(image.size) > MAX_ASPECT * min(image.size) for image in used):
        raise Unusable(f"an image over {MAX_ASPECT} times as long as wide", "cut the images")
    content = [{"type": "image"}] * len(first)
    for place, piece in enumerate(texts):
        piece = piece.lstrip() if place else piece
        piece = piece.rstrip() if place < len(marks) else piece
        content += [{"type": "image"}] if place else []
        content += [{"type": "text", "text": piece}] if piece.strip() else []
    return content, used


def with_options(text: str, options: list[str]) -> str:
    """The text with the options by letter under it, unless it lists every one of them so itself."""
    plain, end = " ".join(text.split()).casefold(), 0
    for letter, option in zip(LETTERS.casefold(), options):
        option = " ".join(option.split()).casefold()
        starts = [mark.end() for mark in re.finditer(MARKER.format(letter), plain)]
        ends = [start + len(option) for start in starts if plain.startswith(option, start)]
        ends = [place for place in ends if place > end and not MORE_TEXT.match(plain, place)]
        if not ends:
            lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]
            return "\n".join(filter(None, [text, "Options:", *lines]))
        end = ends[0]
    return text


def read_options(stored) -> list[str] | None:
    """The options of a row, without letters of their own: "A. red" is "red". Raises Unusable.

    "B. blue", "A. red" would be shown as A. and B.: another answer than the row means.
    """
    if not stored:
        return None
    texts = stored if isinstance(stored, list) and len(stored) <= len(LETTERS) else [None]
    longest, known = verifier.MAX_MATH_CHARS, LETTERS[: len(texts)]
    fine = all(isinstance(text, str) and text.strip() and len(text) <= longest for text in texts)
    own = [re.match(MARKER.format("([A-Za-z])"), text) for text in texts if fine]
    letters = "".join(found[1].upper() for found in own) if all(own) else ""
    if not fine or letters != known and {*letters} & {*known}:
        raise Unusable(
            "options are no list of texts" if not fine else "options with letters in another order",
            f"lists of up to {len(LETTERS)} texts can be shown: name another column of options, "
            "or none: --columns choices=",
            got=stored,
        )
    bare = [text[found.end() :] for text, found in zip(texts, own)] if letters == known else []
    return bare if bare and all(bare) else texts


def gold_text(answer, kind=None) -> str | None:
    """What answers are compared with, out of its \\boxed{…} or <answer> tags, if it has any.

    A number is the shortest text that reads back in its column's precision, without an exponent.
    None where nothing can equal it. `kind` is the column's type, as `datasets` has it.
    """
    if isinstance(answer, Decimal) and answer.is_finite():
        answer = f"{answer:f}"
    if isinstance(answer, float) and np.isfinite(answer):
        narrow = {"float16": np.float16, "float32": np.float32}.get(getattr(kind, "dtype", ""))
        answer = np.format_float_positional((narrow or np.float64)(answer), trim="-")
    if not isinstance(answer, str | int):
        return None
    gold = str(answer)
    if "\\boxed" in gold or "<answer>" in gold:
        one = gold.count("\\boxed") < 2  # of two boxes, neither is the answer
        gold = (verifier.extract_answer(gold) if one else None) or ""
    return gold if gold.strip() and len(gold) <= verifier.MAX_MATH_CHARS else None


def read_gold(answer, kind, options: list[str] | None) -> str:
    """The gold of a row: some short answer equals it, or it means one option; raises Unusable."""
    if isinstance(answer, int) and hasattr(kind, "int2str"):  # a ClassLabel is its name
        answer = kind.int2str(answer) if answer >= 0 else None
    gold = gold_text(answer, kind)
    number = verifier.normalise(gold or "").strip("()[] ")
    integer = options and re.fullmatch(r"[+-]?\d{1,9}(\.0*)?", number)
    # a text beyond the number of options can only be one of them
    if integer and not (isinstance(answer, str) and not 0 <= float(number) <= len(options)):
        raise Unusable(
            "an integer as the answer beside options",
            "whether it is an index, and from 0 or from 1, is not said: write letters or the "
            "options' texts instead",
            got=answer,
        )
    why = LOST if isinstance(answer, str) and LOST_BACKSLASH.search(answer) else None
    if gold and options:
        right, same = verifier.option_index(gold, options), [o == gold for o in options]
        # "A" may be the letter of the first and the text of the second
        gold = gold if right is not None and (same[right] or not any(same)) else None
    elif gold:
        why = why or verifier.unanswerable(gold)
    if not gold or why:
        raise Unusable(
            f"no verifiable gold: {why}" if why else "no verifiable gold",
            f"golds are texts or numbers of up to {verifier.MAX_MATH_CHARS} characters, or, with "
            "options, a letter or an option's text: name another column, as in --columns answer=x",
            got=answer,
        )
    return gold


def listed(stored) -> list:
    """The pictures of a row, of which a column may hold one, a list, or none."""
    return [] if stored is None else stored if isinstance(stored, list) else [stored]


def read_row(
    row: dict, columns: dict[str, str], folder: Path, instruction: str = BOXED, kind=None
) -> tuple[list[dict], list[Image.Image], str, list[str] | None]:
    """Messages, images (of which only the headers are read yet), gold, options; raises Unusable.

    Args:
        columns: the row's name for each of "prompt", "images", "answer" and "choices".
        folder: where the paths of its images start.
        instruction: what every question ends with.
        kind: the type of the column of answers.
    """
    question, stored = row[columns["prompt"]], listed(row.get(columns["images"]))
    if not isinstance(question, str) or not (question.strip() or stored):
        raise Unusable(
            "no question", "prompts are texts: name their column, as in --columns prompt=question"
        )
    options = read_options(row.get(columns["choices"]))
    gold = read_gold(row[columns["answer"]], kind, options)
    text = with_options(question, options) if options else question
    if found := LOST_BACKSLASH.search(text):
        raise Unusable(
            f"a question with {LOST}",
            "in JSON a backslash is written twice, as in \\\\frac",
            got=text[found.start() :],
        )
    content, images = compose(text, [open_image(one, folder) for one in stored])
    content += [{"type": "text", "text": f"\n{instruction}"}] if instruction else []
    return [{"role": "user", "content": content}], images, gold, options
