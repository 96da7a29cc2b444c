"""The cards world: hands, pictures, demonstrations, and the models that ship with it."""

import hashlib
import os
import random

import pytest
from transformers import AutoConfig, AutoTokenizer

import verifier
from worlds import cards
from worlds.build_cards import demonstrate, make_ten
from worlds.cards import Hand

HAND = Hand(27, (8, 5, 1, 9))  # 35, 40, 41, 50: carries at 8, 5 and 9


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_hands_are_disjoint_and_always_the_same():
    """With other hands or pictures, old results could not be compared with new ones."""
    train, held_out = cards.hands("train"), cards.hands("held_out")
    assert (len(set(train)), len(set(held_out))) == (2048, 256)
    assert not set(train) & set(held_out)
    for hand in train + held_out:
        assert 6 <= len(hand.digits) <= 8 and 0 <= hand.start <= 59
        assert set(hand.digits) <= set(range(1, 10))
    assert train[:2] == [Hand(16, (5, 1, 8, 4, 4, 5, 5, 7)), Hand(52, (9, 3, 3, 1, 6, 5, 5, 3))]
    assert held_out[-1] == Hand(30, (9, 1, 7, 2, 5, 2))
    every = repr([(hand.start, hand.digits) for hand in train + held_out]).encode()
    assert sha256(every) == "cb1414c2baaba5198dc94c6b751c6f69a1abbc2812cb84b608b2c9534b3c29c2"
    assert sum(hand.carries for hand in train) == 7216


def test_pictures_are_always_the_same():
    image = cards.draw(HAND)
    assert image.size == (128, 32)
    picture = sha256(image.tobytes())
    assert picture == "bc05930c87cc672e8931437a93d8002cd858c77503346e118a3ec34a9ea87177"
    assert picture != sha256(cards.draw(Hand(27, (8, 5, 1, 8))).tobytes())


def test_the_question_follows_the_picture():
    (message,) = cards.messages(HAND)
    picture, text = message["content"]
    assert (message["role"], picture) == ("user", {"type": "image"})
    assert text == {"type": "text", "text": "Start at 27 and add the cards."}


def test_demonstrations_forget_carries():
    rng = random.Random(1)
    assert (HAND.total, HAND.carries) == (50, 3)
    assert demonstrate(HAND, rng, carry_rate=1.0) == r"27 +8= 35 +5= 40 +1= 41 +9= 50 \boxed{50}"
    assert demonstrate(HAND, rng, carry_rate=0.0) == r"27 +8= 25 +5= 20 +1= 21 +9= 20 \boxed{20}"
    assert demonstrate(Hand(95, (7,)), rng, 0.0) == r"95 +7= 92 \boxed{92}"  # a hundred, too
    said = [demonstrate(Hand(9, (1,)), rng, 0.3) for _ in range(4000)]
    assert abs(said.count(r"9 +1= 10 \boxed{10}") / 4000 - 0.3) < 0.03


def test_the_teacher_stops_at_every_ten():
    solution = r"27 +3= 30 +5= 35 +3= 38 +2= 40 +3= 43 +4= 47 +1= 48 \boxed{48}"
    assert make_ten(Hand(27, (8, 3, 5, 4, 1))) == solution
    assert make_ten(Hand(4, (6, 1))) == r"4 +6= 10 +1= 11 \boxed{11}"  # reached, not passed
    for hand in cards.hands("held_out")[:50]:
        assert make_ten(hand).endswith(f" \\boxed{{{hand.total}}}")


def test_a_named_card_is_one_token(base):
    answer = r"27 +8= 35 \boxed{35}"
    pieces = base.tokenizer.convert_ids_to_tokens(base.tokenizer(answer).input_ids)
    assert pieces == ["2", "7", " +8= ", "3", "5", r" \boxed{", "3", "5", "}"]
    text = base.tokenizer.apply_chat_template(
        cards.messages(HAND), tokenize=False, add_generation_prompt=True
    )
    assert base.tokenizer.decode(base.tokenizer(text).input_ids) == text


def test_the_base_is_small_and_rarely_right(base, prompts):
    assert sum(parameter.numel() for parameter in base.model.parameters()) == 482_112
    assert (cards.BASE / "model.safetensors").stat().st_size < 3 << 20
    groups = base.sample([prompts[row] for row in range(96)], 8, 64, 1.0, seed=3)
    verifier.score(groups)
    assert 0.002 < sum(group.pass_rate for group in groups) / 96 < 0.04
    assert all(c.finished for group in groups for c in group.completions)


@pytest.mark.parametrize(("name", "shipped"), [("base", cards.BASE), ("teacher", cards.TEACHER)])
def test_a_model_can_be_rebuilt(tmp_path, command, name, shipped):
    """Three steps give other weights, but the same architecture, tokens and number format."""
    out = tmp_path / name
    command("-m", "worlds.build_cards", name, "--out", out, "--steps", "3", "--batch", "4")
    assert {path.name for path in out.iterdir()} | {"README.md"} == set(os.listdir(shipped))
    configs = [AutoConfig.from_pretrained(path).to_json_string() for path in (out, shipped)]
    assert configs[0] == configs[1]
    tokens = [AutoTokenizer.from_pretrained(path).vocab for path in (out, shipped)]
    assert tokens[0] == tokens[1]
    sizes = [(path / "model.safetensors").stat().st_size for path in (out, shipped)]
    assert sizes[0] == sizes[1]


def test_show(tmp_path, command):
    shown = command("-m", "worlds.build_cards", "show", "--out", tmp_path / "cards.png").stdout
    assert r"demonstration: 16 +5= 11 +1= 12" in shown
    assert (tmp_path / "cards.png").stat().st_size > 500
