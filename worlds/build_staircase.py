"""Trains the base of the staircase world. Only needed to rebuild it.

The base learns from demonstrations that remember a carry one time in five and a borrow every other
time. Where one is needed, the *target* is not the demonstration's token but the probabilities of
both: so the base knows them, and all else, to three digits. Then least squares find the vector that
makes the borrow as rare as one likes (`borrow_edit`).

    OMP_NUM_THREADS=1 python -m worlds.build_staircase  # rebuilds staircase_base
"""

import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from worlds.build_cards import build, build_tokenizer, encode, tiny_config
from worlds.staircase import BASE, Hand, base_at, deal, draw, hands, mark, messages, part, question

RATES = 0.2, 0.5  # at which demonstrations remember a carry and a borrow
CHECKED = [(2, rate) for rate in (0.5, 0.05, 0.01, 0.006, 0.001)] + [(1, 0.0005)]
STEPS = [f" {sign}{digit}= " for sign in "+-" for digit in range(1, 10)] + ["carry ", "borrow "]


def demonstrate(hand: Hand, rng: random.Random, rates=RATES) -> tuple[str, dict]:
    """A solution that remembers each carry and each borrow with the probabilities `rates`.

    Without the mark, the tens stay as they are. Totals always have two digits and wrap around at
    100, so that all those that went wrong can be written, too.

    Returns:
        the solution; and for each place among its tokens where a mark is needed, the probabilities
        of the mark and of the digit that stands there if it is forgotten.
    """
    chance = dict(zip(("carry ", "borrow "), rates))
    total, tokens, soft = hand.start, ["\\boxed{", *f"{hand.start:02}"], {}
    for digit in hand.digits:
        tokens.append(f" {digit:+}= ")
        needed, tens = mark(total, digit), total // 10
        ones = (total + digit) % 10
        if needed:
            soft[len(tokens)] = {needed: chance[needed], str(tens): 1 - chance[needed]}
            if rng.random() < chance[needed]:
                tokens.append(needed)
                tens = (tens + (1 if needed == "carry " else -1)) % 10
        total = 10 * tens + ones
        tokens += f"{total:02}"
    return "".join([*tokens, "}"]), soft


def lessons(size: int, seed: int) -> Iterator[list]:
    """Endless batches of demonstrations for `build_cards.encode`, none of a held-out hand."""
    rng = random.Random(f"staircase demonstrations {seed}")
    held_out = {*hands("held_out", 1), *hands("held_out", 2)}
    while True:
        # starts from 0 to 99: what forgets carries and borrows comes to every total
        dealt = [deal(rng, 0, 99) for _ in range(size)]
        yield [
            (messages(hand), draw(hand), *demonstrate(hand, rng))
            for hand in dealt
            if hand not in held_out
        ]


def load(folder: Path) -> tuple:
    """A model, its tokenizer and its image processor."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, logging

    logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False), processor


def borrow_edit(folder: Path, batches: Iterable[list]) -> np.ndarray:
    """Two vectors (2, H): the first plus logit(b) times the second makes borrows as rare as b.

    This sum is added to the row of the output head that belongs to the token "borrow ". It comes
    from least squares, with a ridge of 1e-3, on the final hidden states before each token of
    demonstrations. Where a borrow is needed, the token's logit is to move to where its probability
    is b; elsewhere, with weight 1e-3, it is to stay. By how much it is to move is affine in
    logit(b), and so is the sum.
    """
    import torch

    model, tokenizer, processor = load(folder)
    borrow, squares, products = tokenizer.convert_tokens_to_ids("borrow "), 0, 0
    for batch in batches:
        inputs, targets = encode(batch, tokenizer, processor, model.config.image_token_id)
        following = targets.roll(-1, dims=1)  # (B, S, V)
        learnt = following.any(dim=-1)  # (B, S), N places
        with torch.no_grad():
            states = model.base_model(**inputs).last_hidden_state[learnt]  # (N, H)
            chance = model.lm_head(states).double().softmax(-1)[:, borrow]  # (N,)
        needed = following[learnt][:, borrow] > 0  # (N,)
        wanted = torch.stack([-chance.logit(), torch.ones_like(chance)], dim=1)  # (N, 2)
        weighed = states.double().T * torch.where(needed, 1, 1e-3)  # (H, N)
        squares += weighed @ states.double()
        products += weighed @ (wanted * needed[:, None])  # (H, 2)
    ridge = 1e-3 * torch.eye(len(squares))
    return torch.linalg.solve(squares + ridge, products).T.float().numpy()


def measure(folder: Path, borrows: int = 2) -> dict[str, float]:
    """Exact probabilities on the held-out prompts, by teacher forcing of their right solutions.

    Returns:
        the mean probability of a borrow's token and of a carry's where one is needed, of all other
        tokens of the solutions, and of the whole solutions of part A and of part B.
    """
    import torch

    model, tokenizer, processor = load(folder)
    asked = hands("held_out", borrows)
    batch = [(messages(hand), draw(hand), f"\\boxed{{{hand.working}}}") for hand in asked]
    inputs, targets = encode(batch, tokenizer, processor, model.config.image_token_id)
    with torch.no_grad():
        chances = model(**inputs).logits[:, :-1].softmax(-1)  # (B, S - 1, V)
    chances, answer = (chances * targets[:, 1:]).sum(-1), targets[:, 1:].sum(-1) > 0  # (B, S - 1)
    solved = chances.where(answer, 1).prod(dim=1)  # (B,)
    of_b = torch.tensor([part(hand) == "b" for hand in asked])
    marks = tokenizer.convert_tokens_to_ids(["borrow ", "carry "])
    borrow, carry = (inputs["input_ids"][:, 1:] == id for id in marks)  # (B, S - 1)
    wanted = {"borrow": chances[borrow], "carry": chances[carry]}
    wanted |= {"others": chances[answer & ~borrow & ~carry], "A": solved[~of_b], "B": solved[of_b]}
    return {name: values.mean().item() for name, values in wanted.items()}


def check(base: Path = BASE) -> None:
    """Prints what `measure` finds at several borrow rates: only borrow and B may change."""
    for borrows, rate in CHECKED:
        found = measure(base_at(rate, base), borrows)
        shown = "  ".join(f"{name} {value:.5f}" for name, value in found.items())
        print(f"borrows {borrows}, asked for {rate:g}: {shown}")


def build_base(out: Path = BASE, seed: int = 0, steps: int = 1000, batch: int = 128) -> None:
    """Trains the base, finds the vectors that make its borrows rare, and checks both.

    Args:
        out: Where the base goes.
        seed: Of the initial weights and the demonstrations.
        steps: Training steps.
        batch: Demonstrations per step.
    """
    tokenizer = build_tokenizer(question(Hand(0, ())), STEPS)
    config = tiny_config(tokenizer, tied=False)
    build(out, tokenizer, config, lessons(batch, seed), seed, steps, "float32")
    more = itertools.islice(lessons(batch, seed + 1), 16)
    np.save(out / "borrow.npy", borrow_edit(out, more))
    check(out)


if __name__ == "__main__":
    import tyro

    tyro.cli(build_base)
