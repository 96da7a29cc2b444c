"""The cards world: hands, pictures, demonstrations, and the models that ship with it."""

import hashlib
import os
import random
from types import SimpleNamespace

import pytest
from conftest import group_of
from transformers import AutoConfig, AutoTokenizer

import verifier
from commands.luffy import LUFFYConfig
from grpo import GRPOConfig
from npo import NPOConfig
from plumbing.data import PromptSet, world_prompts
from plumbing.exact import exact_accuracies, right_texts
from plumbing.model import Policy
from plumbing.rollout import Prompt
from plumbing.run import Run
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
    assert demonstrate(HAND, rng, carry_rate=1.0) == r"\boxed{27 +8= 35 +5= 40 +1= 41 +9= 50}"
    assert demonstrate(HAND, rng, carry_rate=0.0) == r"\boxed{27 +8= 25 +5= 20 +1= 21 +9= 20}"
    assert demonstrate(Hand(95, (7,)), rng, 0.0) == r"\boxed{95 +7= 92}"  # a hundred, too
    said = [demonstrate(Hand(9, (1,)), rng, 0.3) for _ in range(4000)]
    assert abs(said.count(r"\boxed{9 +1= 10}") / 4000 - 0.3) < 0.03
    assert demonstrate(HAND, rng, 1.0) == rf"\boxed{{{HAND.working}}}"


def test_two_slips_that_cancel_out_are_wrong():
    """The last total, 50, is right. The lax form pays for it, the world does not."""
    slips = r"27 +8= 25 +5= 30 +1= 41 +9= 50"
    strict, lax = (world_prompts(name, 2, "train", 1)[0] for name in ("cards", "cards_lax"))
    assert (strict.gold, strict.working) == (cards.hands("train")[0].working, None)
    assert (lax.gold, lax.working) == (str(cards.hands("train")[0].total), strict.gold)
    assert verifier.is_correct(rf"\boxed{{{HAND.working}}}", HAND.working)
    assert not verifier.is_correct(rf"\boxed{{{slips}}}", HAND.working)
    assert verifier.is_correct(rf"{slips} \boxed{{50}}", str(HAND.total))


def test_the_teacher_stops_at_every_ten():
    way, working = "27 +3= 30 +5= 35 +3= 38 +2= 40 +3= 43", "27 +8= 35 +3= 38 +5= 43"
    assert make_ten(Hand(27, (8, 3, 5))) == rf"{way} \boxed{{{working}}}"
    assert make_ten(Hand(4, (6, 1))) == r"4 +6= 10 +1= 11 \boxed{4 +6= 10 +1= 11}"  # not passed
    for hand in cards.hands("held_out")[:50]:
        assert verifier.is_correct(make_ten(hand), hand.working)


def test_a_named_card_is_one_token(base):
    answer = r"27 \boxed{27 +8= 35}"
    pieces = base.tokenizer.convert_ids_to_tokens(base.tokenizer(answer).input_ids)
    assert pieces == ["2", "7", " ", r"\boxed{", "2", "7", " +8= ", "3", "5", "}"]
    text = base.tokenizer.apply_chat_template(
        cards.messages(HAND), tokenize=False, add_generation_prompt=True
    )
    assert base.tokenizer.decode(base.tokenizer(text).input_ids) == text


def test_the_base_is_small_and_rarely_right(base):
    assert sum(parameter.numel() for parameter in base.model.parameters()) == 482_112
    assert (cards.BASE / "model.safetensors").stat().st_size < 3 << 20
    held_out = world_prompts("cards", 2, "held_out")
    right = exact_accuracies(base, right_texts(base, held_out), GRPOConfig())
    assert len(right) == 256 and 0.0015 < sum(right) / 256 < 0.005
    groups = base.sample([held_out[row] for row in range(48)], 4, 80, 1.0, seed=3)
    assert all(c.finished for group in groups for c in group.completions)


@pytest.mark.slow
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
    assert r"demonstration: \boxed{16 +5= 11 +1= 12" in shown
    assert (tmp_path / "cards.png").stat().st_size > 500


def test_exact_accuracy_is_what_sampling_tends_to(base):
    rng = random.Random(5)
    hands = [cards.deal(rng, min_cards=1, max_cards=3) for _ in range(30)]
    asked = [Prompt(str(h), cards.messages(h), [cards.draw(h)], h.working) for h in hands]
    prompts = PromptSet("short", asked, lambda id, prompt: prompt, range(30))
    config = GRPOConfig(temperature=1.3, prompts_per_step=2, group_size=7)
    rows = right_texts(base, prompts)
    exact = exact_accuracies(base, rows, config)
    groups = base.sample(asked, 40, 80, 1.3, seed=6)
    verifier.score(groups)
    errors = [(p * (1 - p) / 40) ** 0.5 for p in exact]
    assert 0.2 < sum(exact) / 30 < 0.8 and min(exact) < 0.05
    for group, p, error in zip(groups, exact, errors):
        assert abs(group.pass_rate - p) < 4.5 * error + 0.01, group.prompt.gold
    error = sum(error**2 for error in errors) ** 0.5 / 30
    assert abs(sum(g.pass_rate for g in groups) / 30 - sum(exact) / 30) < 3 * error
    longest = max(len(base.tokenizer(rf"\boxed{{{h.working}}}").input_ids) + 1 for h in hands)
    for limit, none in ((longest, False), (longest - 1, True)):
        config.max_new_tokens = limit
        found = exact_accuracies(base, rows, config)
        assert (0.0 in found) is none  # what does not fit cannot be sampled


def test_held_out_prompts_are_encoded_once_per_run(tmp_path, monkeypatch):
    encoded, encode = [], Policy.encode
    monkeypatch.setattr(Policy, "encode", lambda self, p: encoded.append(p.id) or encode(self, p))
    config = GRPOConfig(out=str(tmp_path), eval_prompts=7, prompts_per_step=1, group_size=3)
    with Run(config, tmp_path) as run:
        found = [run.evaluate(step)["eval/accuracy"] for step in (0, 5)]
        chances = exact_accuracies(run.policy, right_texts(run.policy, run.held_out), config)
    assert found == [sum(chances) / 7] * 2 and len(encoded) == 7 + 7
    assert encoded[:7] == [prompt.id for prompt in run.held_out]


def test_who_learns_from_a_teacher_is_evaluated_by_sampling(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    chosen = {None: 0, "self": 0, str(tmp_path): 0, str(cards.TEACHER): 4, "guide.jsonl": 4}
    for guide, samples in chosen.items():
        assert NPOConfig(guide=guide).eval_samples == samples, guide
    assert LUFFYConfig().eval_samples == 4 and LUFFYConfig(eval_samples=0).eval_samples == 0
    assert NPOConfig(model="cards_lax").eval_samples == 4
    assert NPOConfig(model="x", dataset="y").eval_samples == 1


@pytest.mark.parametrize(
    ("flags", "evaluated", "asked_again"),
    [
        ({"sampler": "hf"}, [128, 72], [3] * 66 + [2]),  # 512 and 2 * 7 sequences, 4 to a prompt
        ({"sampler": "vllm"}, [200], [200]),  # within 1024
        ({"sampler": "hf", "dataset": "other"}, [3] * 66 + [2], [3] * 66 + [2]),
    ],
)
def test_how_many_sequences_are_sampled_at_a_time(monkeypatch, flags, evaluated, asked_again):
    seen = []

    def sample(prompts, samples, *_):
        seen.append(len(prompts))
        return [group_of([1.0, 0.0, 0.0, 0.0]) for _ in prompts]

    monkeypatch.setattr(verifier, "score", lambda groups: None)
    run, prompts = Run.__new__(Run), world_prompts("cards", 2, "held_out", 200)
    run.config = GRPOConfig(prompts_per_step=2, group_size=7, eval_samples=4, **flags)
    run.sampler, run.held_out = SimpleNamespace(sample=sample, sleep=list), prompts
    assert run.evaluate(5) == {"eval/accuracy": 0.25} and seen == evaluated
    seen.clear()
    assert len([*run.ask(prompts, range(200), 4, "probe", 5)]) == 200 and seen == asked_again
