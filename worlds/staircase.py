"""The staircase world: half of its prompts need a skill that the policy almost never shows.

A *hand* is a start value and four digit cards; red cards are added, black ones subtracted. The
solution names each card with the running total, and the box holds all of it. Where adding a card
carries into the tens, or subtracting one borrows from them, one more token says so:

    \\boxed{27 +8= carry 35 -3= 32}      \\boxed{42 -8= borrow 34 -5= borrow 29}

The policy, a real Qwen3-VL of half a million parameters, does everything right but these two
tokens. Without one it leaves the tens alone (27 +8= 25), and the answer is wrong. Prompts of part
A need one or two carries and no borrow. The base carries one time in five, so reinforcement
learning starts at once. Prompts of part B need exactly two borrows (one with --borrows 1) and
no carry, and the base borrows as rarely as one likes: at a rate of b, an answer is right with
probability b^2. That is a plateau, then a step up: what part B needs must first be seen.

`base_at(b)` makes the base for any b without training, by adding a vector to one row of the output
head. build_staircase.py trains the base and finds that vector.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from worlds import cards

BASE = Path(__file__).parent / "staircase_base"
BORROW_RATE = {1: 0.0005, 2: 0.006}  # by the borrows of part B: so that it starts on a plateau
CARDS = 4
REDS, BLACKS = ("#b3202c", "#d8434f"), ("#1b1b1b", "#3d3d3d")


@dataclass(frozen=True)
class Hand(cards.Hand):
    """A start value and four signed digits: +1 to +9 on red cards, -1 to -9 on black ones."""

    @property
    def totals(self) -> list[int]:
        """The right running totals, the start first."""
        return list(itertools.accumulate(self.digits, initial=self.start))

    @property
    def marks(self) -> list[str]:
        """What each card needs: "carry ", "borrow " or nothing."""
        return [mark(total, digit) for total, digit in zip(self.totals, self.digits)]

    @property
    def carries(self) -> int:
        return self.marks.count("carry ")

    @property
    def borrows(self) -> int:
        return self.marks.count("borrow ")

    @property
    def working(self) -> str:
        """The right solution, as in "42 -8= borrow 34 -5= borrow 29"."""
        steps = zip(self.digits, self.marks, self.totals[1:])
        return f"{self.start}" + "".join(f" {d:+}= {mark}{total}" for d, mark, total in steps)


def mark(total: int, digit: int) -> str:
    """What adding a signed digit to a total needs: "carry ", "borrow " or nothing."""
    ones = total % 10 + digit
    return "carry " if ones > 9 else "borrow " if ones < 0 else ""


def deal(rng: random.Random, low: int, high: int) -> Hand:
    """A random hand with a start from `low` to `high`; start, signs and digits are uniform."""
    digits = (rng.choice((-1, 1)) * rng.randint(1, 9) for _ in range(CARDS))
    return Hand(rng.randint(low, high), tuple(digits))


def part(hand: Hand) -> str:
    """The part that a prompt belongs to: "a" without borrows, else "b"."""
    return "b" if hand.borrows else "a"


@functools.cache
def hands(split: str, borrows: int = 2) -> tuple[Hand, ...]:
    """The 2,048 "train" or the 256 "held_out" hands: all different, the same on every machine.

    Parts A and B take turns. Every right total has two digits.

    Args:
        borrows: how many each prompt of part B needs, 1 or 2.
    """
    rng, dealt = random.Random(f"staircase {borrows}"), {}
    while len(dealt) < cards.TRAIN_PROMPTS + cards.HELD_OUT_PROMPTS:
        wanted = [(0, borrows)] if len(dealt) % 2 else [(1, 0), (2, 0)]
        hand = deal(rng, 10, 89)
        if (hand.carries, hand.borrows) in wanted and all(10 <= t <= 99 for t in hand.totals):
            dealt[hand] = True
    every = tuple(dealt)
    cut = cards.TRAIN_PROMPTS
    return {"train": every[:cut], "held_out": every[cut:]}[split]


def question(hand: Hand) -> str:
    """The prompt's text. It names the start, but the cards are in the picture only."""
    return f"Start at {hand.start:02}. Add the red cards and subtract the black ones."


def messages(hand: Hand) -> list[dict]:
    """The prompt as chat messages: the picture, then the question."""
    content = [{"type": "image"}, {"type": "text", "text": question(hand)}]
    return [{"role": "user", "content": content}]


def draw(hand: Hand) -> Image.Image:
    """The row of cards, 32 x 32 px each, with red or black digits."""
    return cards.draw(hand, lambda digit: REDS if digit > 0 else BLACKS)


def base_at(borrow_rate: float, base: Path = BASE) -> Path:
    """The folder of the base that remembers a borrow with this probability, made on first use.

    The probability, between 0 and 1, is the mean over the places in held-out prompts of part B that
    need a borrow. The folder lies in staircase_at/ beside the base (in ~/.cache/npo where that is
    read-only), named by the rate and by a hash of the base: one that was built anew gets others. It
    is written aside and renamed, so that two processes may ask at once.
    """
    import numpy as np
    from safetensors.numpy import load_file, save_file

    weights, edit = base / "model.safetensors", base / "borrow.npy"
    version = hashlib.sha256(weights.read_bytes() + edit.read_bytes()).hexdigest()[:8]
    home = base.parent if os.access(base.parent, os.W_OK) else Path.home() / ".cache/npo"
    folder = home / "staircase_at" / f"{borrow_rate}-{version}"
    if folder.is_dir():
        return folder
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    unneeded = shutil.ignore_patterns("README.md", edit.name)
    shutil.copytree(base, aside, ignore=unneeded, dirs_exist_ok=True)
    tensors = load_file(weights)
    row = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]["borrow "]
    constant, slope = np.load(edit)  # (H,) each
    tensors["lm_head.weight"][row] += constant + math.log(borrow_rate / (1 - borrow_rate)) * slope
    save_file(tensors, aside / weights.name, metadata={"format": "pt"})
    try:
        aside.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(aside)  # another process was first
    return folder
