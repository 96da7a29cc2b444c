"""The staircase world: hands, pictures, demonstrations, and the base at any borrow rate."""

import hashlib
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer

import grpo
import verifier
from grpo import GRPOConfig
from plumbing import UsageError, data, run
from plumbing.checkpoints import checkpoint_path
from plumbing.model import Policy
from worlds import build_staircase, staircase
from worlds.build_staircase import demonstrate, measure
from worlds.staircase import Hand, base_at, part

HAND = Hand(42, (-8, 7, -5, -9))  # 34, 41, 36, 27: borrows at 8, 5 and 9, a carry at 7


def test_hands_are_disjoint_and_always_the_same():
    """With other hands or pictures, old results could not be compared with new ones."""
    pinned = {
        1: "59ef80e3fcc36b43cb263af75c8ad296e5ab6e539d26d1a14f0cb4c7b26f98aa",
        2: "90ad948dd2275076daf4e93b03f200d408d90e4e5522e6d99c1266b43afdcf8f",
    }
    for borrows, pin in pinned.items():
        train, held_out = staircase.hands("train", borrows), staircase.hands("held_out", borrows)
        assert (len(set(train)), len(set(held_out))) == (2048, 256)
        assert not set(train) & set(held_out)
        assert [part(hand) for hand in train + held_out] == ["a", "b"] * 1152
        for hand in train + held_out:
            assert len(hand.digits) == 4 and {abs(d) for d in hand.digits} <= set(range(1, 10))
            assert 10 <= hand.start <= 89 and all(10 <= total <= 99 for total in hand.totals)
            needs = hand.carries, hand.borrows
            assert needs == (0, borrows) if part(hand) == "b" else needs in [(1, 0), (2, 0)]
        every = repr([(hand.start, hand.digits) for hand in train + held_out]).encode()
        assert hashlib.sha256(every).hexdigest() == pin


def test_pictures_are_always_the_same():
    image = staircase.draw(HAND)
    assert image.size == (128, 32)
    picture = hashlib.sha256(image.tobytes()).hexdigest()
    assert picture == "105efbb616b1dfa06520532db08282502ddcf38b604824f854138ca75689f91c"
    red = np.asarray(image)[6:26, :, 0].reshape(20, 4, 32)[:, :, 6:26]  # inside of the four cards
    assert (red.min(axis=(0, 2)) < 100).tolist() == [True, False, True, True]  # black, red ink


def test_the_question_follows_the_picture():
    (message,) = staircase.messages(HAND)
    picture, text = message["content"]
    assert (message["role"], picture) == ("user", {"type": "image"})
    asked = "Start at 42. Add the red cards and subtract the black ones."
    assert text == {"type": "text", "text": asked}


def test_the_right_solution_has_its_marks_where_they_are_needed():
    assert HAND.working == "42 -8= borrow 34 +7= carry 41 -5= borrow 36 -9= borrow 27"
    assert (HAND.carries, HAND.borrows, HAND.total, part(HAND)) == (1, 3, 27, "b")
    edge = Hand(58, (2, -1, -9, 9))  # 60, 59, 50, 59: reaching a ten carries, leaving it borrows
    assert edge.working == "58 +2= carry 60 -1= borrow 59 -9= 50 +9= 59"
    assert part(Hand(13, (8, -1, 5, -2))) == "a"


def test_demonstrations_forget_carries_and_borrows():
    rng = random.Random(1)

    def said(start: int, digits: tuple, *rates: float) -> str:
        return demonstrate(Hand(start, digits), rng, rates)[0].removeprefix("\\boxed{")

    assert said(42, HAND.digits, 1, 1) == HAND.working + "}"
    assert said(42, HAND.digits, 0, 0) == "42 -8= 44 +7= 41 -5= 46 -9= 47}"
    solution = "42 -8= borrow 34 +7= 31 -5= borrow 26 -9= borrow 17}"
    assert said(42, HAND.digits, 0, 1) == solution
    # wrong totals wrap around at 0 and at 100
    assert said(17, (5, -8, 7, -9), 0, 1) == "17 +5= 12 -8= borrow 04 +7= 01 -9= borrow 92}"
    assert said(95, (7, -3, 1, 1), 1, 0) == "95 +7= carry 02 -3= 09 +1= carry 10 +1= 11}"
    both = [said(31, (-4, 1, 1, 1), 0.9, 0.3) for _ in range(4000)]
    right = both.count("31 -4= borrow 27 +1= 28 +1= 29 +1= carry 30}")
    assert abs(right / 4000 - 0.27) < 0.03


def test_targets_hold_the_chance_of_a_mark_where_it_is_needed():
    """Places: box 0, start 1-2, card 3, and then a mark or the first digit of the total."""
    solution, soft = demonstrate(Hand(31, (-4, 1, 2, 5)), random.Random(1), (0.25, 0.0))
    assert solution == r"\boxed{31 -4= 37 +1= 38 +2= 30 +5= 35}"
    assert soft == {4: {"borrow ": 0.0, "3": 1.0}, 10: {"carry ": 0.25, "3": 0.75}}
    solution, soft = demonstrate(Hand(31, (-4, 1, 2, 5)), random.Random(1), (0.25, 1.0))
    assert solution == r"\boxed{31 -4= borrow 27 +1= 28 +2= 20 +5= 25}"
    assert soft == {4: {"borrow ": 1.0, "3": 0.0}, 11: {"carry ": 0.25, "2": 0.75}}
    _, tokenizer, processor = build_staircase.load(staircase.BASE)
    asked = staircase.messages(HAND), staircase.draw(HAND)
    inputs, targets = build_staircase.encode([(*asked, solution, soft)], tokenizer, processor, 5)
    (ids,), (targets,) = inputs["input_ids"].tolist(), targets
    start = ids.index(tokenizer.convert_tokens_to_ids("\\boxed{"))
    assert not targets[:start].any()  # nothing is learnt on the prompt
    assert tokenizer.decode(targets[start:].argmax(1)[[0, 3, 4]]) == r"\boxed{ -4= borrow "
    carry, two = tokenizer.convert_tokens_to_ids(["carry ", "2"])
    assert targets[start + 11].nonzero()[:, 0].tolist() == [two, carry]
    assert targets[start + 11, [carry, two]].tolist() == [0.25, 0.75]


def test_a_named_card_and_a_mark_are_one_token_each():
    tokenizer = AutoTokenizer.from_pretrained(staircase.BASE)
    pieces = tokenizer.convert_ids_to_tokens(
        tokenizer(r"\boxed{42 -8= borrow 34 +7= carry 41}").input_ids
    )
    assert pieces == ["\\boxed{", *"42", " -8= ", "borrow ", *"34", " +7= ", "carry ", *"41", "}"]
    text = tokenizer.apply_chat_template(
        staircase.messages(HAND), tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert "<unk>" not in tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)


@pytest.mark.parametrize(("borrows", "rates"), [(1, [0.0005]), (2, [0.001, 0.006, 0.01, 0.05])])
def test_the_base_borrows_as_rarely_as_asked_and_does_all_else_alike(borrows, rates):
    often = measure(base_at(0.5), borrows)
    assert 0.19 < often["carry"] < 0.21 and often["others"] > 0.999
    assert 0.12 < often["A"] < 0.15  # about 2/3 of 0.2, 1/3 of 0.2^2
    for rate in rates:
        found = measure(base_at(rate), borrows)
        assert abs(found["borrow"] / rate - 1) < 0.05
        assert abs(found["B"] / rate**borrows - 1) < 0.1
        for same in ("carry", "others", "A"):
            assert abs(found[same] / often[same] - 1) < 0.005


def test_a_base_is_made_once_and_anew_where_it_changed(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(staircase.BASE, base)
    folder = base_at(0.03, base)
    (folder / "here").touch()
    assert base_at(0.03, base) == folder and (folder / "here").exists()
    assert folder.parent == tmp_path / "staircase_at"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing left aside
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if (before[name] != after[name]).any()] == ["lm_head.weight"]
    moved = after["lm_head.weight"] - before["lm_head.weight"]
    row = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("borrow ")
    assert np.flatnonzero(moved.any(axis=1)).tolist() == [row]
    constant, slope = np.load(base / "borrow.npy")
    assert np.allclose(moved[row], constant - 3.4760987 * slope, atol=1e-5)  # log(3 / 97)
    np.save(base / "borrow.npy", np.stack([constant, slope + 1]))
    assert base_at(0.03, base) != folder


def test_another_process_may_make_the_same_base(tmp_path, monkeypatch):
    base, theirs, copytree = tmp_path / "base", tmp_path / "theirs", shutil.copytree
    copytree(staircase.BASE, base)
    folder = base_at(0.2, base)
    folder.rename(theirs)

    def copy_and_be_overtaken(*words, **options):
        copytree(*words, **options)
        theirs.rename(folder)

    weights = (theirs / "model.safetensors").read_bytes()
    monkeypatch.setattr(shutil, "copytree", copy_and_be_overtaken)
    assert base_at(0.2, base) == folder
    assert list(folder.parent.iterdir()) == [folder]
    monkeypatch.undo()
    shutil.rmtree(folder)
    assert (base_at(0.2, base) / "model.safetensors").read_bytes() == weights  # the same bytes


@pytest.mark.slow
def test_the_base_can_be_rebuilt(tmp_path, command):
    """Three steps give other weights, but the same architecture, tokens and number format."""
    out = tmp_path / "base"
    words = "--out", out, "--steps", "3", "--batch", "4"
    shown = command("-m", "worlds.build_staircase", *words).stdout
    assert "borrows 2, asked for 0.006: borrow 0.0" in shown
    assert {path.name for path in out.iterdir()} | {"README.md"} == set(os.listdir(staircase.BASE))
    configs = [AutoConfig.from_pretrained(path).to_json_string() for path in (out, staircase.BASE)]
    assert configs[0] == configs[1]
    tokens = [json.loads((path / "tokenizer.json").read_text()) for path in (out, staircase.BASE)]
    assert tokens[0] == tokens[1]
    for name in ("model.safetensors", "borrow.npy"):
        assert (out / name).stat().st_size == (staircase.BASE / name).stat().st_size


# ------------------------------------------------------------------- in every command


def test_part_a_and_part_b_are_evaluated_exactly_and_apart(tmp_path):
    config = GRPOConfig(model="staircase", steps=1, eval_prompts=64, prompts_per_step=2)
    config.check()
    assert (config.dataset, config.borrow_rate, config.eval_samples) == ("staircase", 0.006, 0)
    grpo.train(config, tmp_path / "run")
    line = run.read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
    a, b = line["eval/accuracy_a"], line["eval/accuracy_b"]
    assert line["eval/accuracy"] == pytest.approx((a + b) / 2)
    expected = measure(base_at(0.006))  # of all 256
    assert b == pytest.approx(expected["B"], rel=0.3) and a == pytest.approx(expected["A"], rel=0.3)


def test_its_log_probs_are_those_it_was_sampled_with_and_the_box_decides():
    policy = Policy(base_at(0.5))
    prompts = data.world_prompts("staircase", 1, "train", 12)
    groups = policy.sample([prompts[row] for row in range(12)], 6, 80, 1.2, seed=3)
    verifier.score(groups)
    rows = [(group.encoded, c.token_ids) for group in groups for c in group.completions]
    with torch.no_grad():
        logprobs, mask = policy.logprobs(rows, 1.2)
    recorded = [value for g in groups for c in g.completions for value in c.behavior_logprobs]
    assert (logprobs[mask] - torch.tensor(recorded)).abs().max() < 1e-5
    for group in groups:
        for c in group.completions:
            assert (c.accuracy == 1) is (c.text == rf"\boxed{{{group.prompt.gold}}}")
    assert 0.1 < sum(group.pass_rate for group in groups) / 12 < 0.6


def test_a_run_in_two_pieces_is_one_in_one(tmp_path):
    flags = {"model": "staircase", "borrows": 1, "borrow_rate": 0.4, "eval_prompts": 8, "lr": 1e-3}
    flags |= {"prompts_per_step": 2, "group_size": 4, "save_every": 1}
    grpo.train(GRPOConfig(steps=3, **flags), tmp_path / "whole")
    grpo.train(GRPOConfig(steps=2, **flags), tmp_path / "pieces")
    grpo.train(GRPOConfig(steps=3, **flags), tmp_path / "pieces")
    whole, pieces = (
        (checkpoint_path(tmp_path / name, 3) / "model.safetensors").read_bytes()
        for name in ("whole", "pieces")
    )
    assert whole == pieces


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"borrows": 3}, "--borrows 3: must be at least 1 and at most 2"),
        ({"borrow_rate": 0.0}, "--borrow-rate 0.0: must be above 0"),
        ({"borrow_rate": 1.0}, "--borrow-rate 1.0: .* below 1"),
        ({"dataset": "x.parquet"}, "--dataset x.parquet: .* leave --dataset out"),
        ({"model": "cards", "borrows": 1}, "--borrows 1: needs --model staircase"),
        ({"model": "cards", "borrow_rate": 0.2}, "--borrow-rate 0.2: needs --model staircase"),
    ],
)
def test_bad_flags(flags, message):
    assert GRPOConfig(model="staircase", borrows=1).borrow_rate == 0.0005
    with pytest.raises(UsageError, match=message):
        GRPOConfig(**({"model": "staircase"} | flags)).check()
