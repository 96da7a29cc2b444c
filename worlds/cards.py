"""The cards world: add a row of digit cards that you see in a picture.

A *hand* is a start value and 6 to 8 digit cards. The prompt shows the cards as one picture and
asks, "Start at 27 and add the cards." A solution repeats the start and names each card with the
running total, all of it in the box:

    \\boxed{27 +8= 35 +5= 40}

So the verifier compares the whole working, and two slips that cancel out earn nothing.

Three models ship with this world; build_cards.py trains the first two:

- BASE, the policy to be trained: a real Qwen3-VL of half a million parameters. It reads the cards
  and adds, but has learnt to *forget most carries*: it says 27 +8= 25, and continues from this
  wrong total. So right answers are rare, and rarer with every carry. What reinforcement learning
  finds on one prompt, to carry, helps on all the others.
- TEACHER, a guide that is not the policy's own future (commands/luffy.py asks it): of the
  same size, nearly always right, it comes to its answers in another way, unlikely under the policy.
- LAX, the base of the *lax* form: only the total is boxed, 27 +8= 35 +5= 40 \\boxed{40}, and only
  the total is judged. It shows what false positives do: most of what a guide teaches is luck.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

BASE = Path(__file__).parent / "cards_base"
LAX = Path(__file__).parent / "cards_lax"
TEACHER = Path(__file__).parent / "cards_teacher"
TRAIN_PROMPTS, HELD_OUT_PROMPTS = 2048, 256
MAX_START, MIN_CARDS, MAX_CARDS = 59, 6, 8
CARD_PX = 32  # = patch 16 x merge 2: each card becomes exactly one visual token
TABLE, CARD, EDGE = "#2e6b4f", "white", "#888888"
INKS = ("#1b1b1b", "#b3202c", "#1d4e9e", "#1f6f3d")


@dataclass(frozen=True)
class Hand:
    """A start value and the digits (1-9) on the cards, left to right."""

    start: int
    digits: tuple[int, ...]

    @property
    def total(self) -> int:
        """The right answer."""
        return self.start + sum(self.digits)

    @property
    def working(self) -> str:
        """The right answer with its working, as in "27 +8= 35 +5= 40"."""
        total, words = self.start, [str(self.start)]
        for digit in self.digits:
            total += digit
            words.append(f"+{digit}= {total}")
        return " ".join(words)

    @property
    def carries(self) -> int:
        """How many additions of the right solution carry into the next digit."""
        total, count = self.start, 0
        for digit in self.digits:
            count += total % 10 + digit > 9
            total += digit
        return count


def deal(
    rng: random.Random,
    min_cards: int = MIN_CARDS,
    max_cards: int = MAX_CARDS,
    max_start: int = MAX_START,
) -> Hand:
    """A random hand; the number of cards, the start and every digit are uniform."""
    count = rng.randint(min_cards, max_cards)
    return Hand(rng.randint(0, max_start), tuple(rng.randint(1, 9) for _ in range(count)))


def hands(split: str) -> list[Hand]:
    """The 2,048 "train" or the 256 "held_out" hands: all different, the same on every machine."""
    rng, dealt = random.Random(20733), {}  # a dict keeps the order and drops repeats
    while len(dealt) < TRAIN_PROMPTS + HELD_OUT_PROMPTS:
        dealt[deal(rng)] = True
    every = list(dealt)
    return {"train": every[:TRAIN_PROMPTS], "held_out": every[TRAIN_PROMPTS:]}[split]


def question(hand: Hand) -> str:
    """The prompt's text. It names the start, but the cards are in the picture only."""
    return f"Start at {hand.start} and add the cards."


def messages(hand: Hand) -> list[dict]:
    """The prompt as chat messages: the picture, then the question."""
    content = [{"type": "image"}, {"type": "text", "text": question(hand)}]
    return [{"role": "user", "content": content}]


def draw(hand: Hand, inks: Callable[[int], Sequence[str]] = lambda digit: INKS) -> Image.Image:
    """The row of cards, 32 x 32 px each. Ink and position vary, but not for the same hand."""
    rng = random.Random(f"{hand.start}:{hand.digits}")
    image = Image.new("RGB", (CARD_PX * len(hand.digits), CARD_PX), TABLE)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=24)
    for place, digit in enumerate(hand.digits):
        left = place * CARD_PX
        box = (left + 2, 1, left + CARD_PX - 3, CARD_PX - 2)
        pen.rounded_rectangle(box, radius=4, fill=CARD, outline=EDGE)
        middle = CARD_PX // 2
        center = (left + middle + rng.randint(-2, 2), middle + rng.randint(-2, 2))
        pen.text(center, str(abs(digit)), fill=rng.choice(inks(digit)), font=font, anchor="mm")
    return image
