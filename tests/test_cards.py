"""The embedded world: hands, pictures, demonstrations, and the shipped base."""

import random

import torch

import cards
import tasks

HAND = cards.Hand(27, (8, 5, 1, 9))  # 35, 40, 41, 50: carries at 8, 5 and 9


def test_hands_are_disjoint_and_always_the_same():
    train, held_out = cards.hands("train"), cards.hands("held_out")
    assert (len(set(train)), len(set(held_out))) == (2048, 256)
    assert not set(train) & set(held_out)
    assert all(6 <= len(h.digits) <= 8 and 0 <= h.start <= 59 and set(h.digits) <= set(range(1, 10)) for h in train + held_out)
    assert tasks.load_prompts("cards")[0].fingerprint == "cards-train-2f7cac4023cf"  # a new world needs new results


def test_demonstrations_forget_carries():
    assert (HAND.total, HAND.carries) == (50, 3)
    assert cards.demonstrate(HAND, random.Random(0), carry_rate=1.0) == r"27 +8= 35 +5= 40 +1= 41 +9= 50 \boxed{50}"
    assert cards.demonstrate(HAND, random.Random(0), carry_rate=0.0) == r"27 +8= 25 +5= 20 +1= 21 +9= 20 \boxed{20}"
    rng, hand = random.Random(1), cards.Hand(9, (1,))
    right = sum(cards.demonstrate(hand, rng, 0.3).endswith(r"\boxed{10}") for _ in range(4000)) / 4000
    assert abs(right - 0.3) < 0.03
    assert cards.demonstrate(cards.Hand(95, (7,)), random.Random(0), 0.0) == r"95 +7= 92 \boxed{92}"  # a hundred, too


def test_pictures():
    image = cards.draw(HAND)
    assert image.size == (128, 32)
    assert image.tobytes() == cards.draw(HAND).tobytes()
    assert image.tobytes() != cards.draw(cards.Hand(27, (8, 5, 1, 8))).tobytes()


def test_tokenizer_says_one_token_for_a_named_card(base):
    answer = r"27 +8= 35 \boxed{35}"
    pieces = base.tokenizer.convert_ids_to_tokens(base.tokenizer(answer).input_ids)
    assert pieces == ["2", "7", " +8= ", "3", "5", r" \boxed{", "3", "5", "}"]
    text = base.tokenizer.apply_chat_template(cards.messages(HAND), tokenize=False, add_generation_prompt=True)
    assert base.tokenizer.decode(base.tokenizer(text).input_ids) == text


def test_the_base_is_small_and_rarely_right(base, prompts):
    assert sum(p.numel() for p in base.model.parameters()) < 500_000
    assert (cards.BASE / "model.safetensors").stat().st_size < 3 << 20
    import verifier

    groups = base.sample([prompts[i] for i in range(96)], 8, 64, 1.0, seed=3)
    verifier.score(groups)
    accuracy = torch.tensor([[c.accuracy for c in g.completions] for g in groups])
    assert 0.002 < accuracy.mean() < 0.04
    assert all(c.finished for g in groups for c in g.completions)


def test_build_base(tmp_path, command):
    command("cards.py", "build-base", "--out", tmp_path / "base", "--steps", "3", "--batch", "4")
    from policy import Policy

    built = Policy(tmp_path / "base", device="cpu")
    assert built.model.config.text_config.head_dim == 32


def test_show(tmp_path, command):
    assert r"\boxed{" in command("cards.py", "show", "--out", tmp_path / "cards.png").stdout
    assert (tmp_path / "cards.png").stat().st_size > 500
