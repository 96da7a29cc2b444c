"""guide.jsonl: what is kept of the guide's answers, and which files are continued or refused."""

import dataclasses
import json

import pytest
import torch
from conftest import group_of, lucky, save

from npo import NPOConfig
from plumbing import UsageError
from plumbing.data import load_prompts
from plumbing.encode import image_parts
from plumbing.guide_cache import build_guide_cache, line_of, load_guide_cache
from plumbing.model import Policy
from plumbing.rollout import Completion, Prompt
from plumbing.run import derived_seed, read_jsonl
from worlds import cards

ROWS = [5, 2, 9, 11, 7]  # three batches of 2, 2 and 1
UNTIL, KEEP = 3, 2
IMAGE = image_parts(cards.BASE)[1]  # the id of the image token


class Killed(BaseException):
    """No `except Exception` sees it."""


class Watched:
    """A sampler that remembers how many prompts it was asked, and dies after `last` calls."""

    def __init__(self, policy: Policy, last: int = 99):
        self.policy, self.last, self.asked = policy, last, []

    def sample(self, prompts, *rest):
        if len(self.asked) == self.last:
            raise Killed
        self.asked.append(len(prompts))
        self.settings = rest[:3]  # answers to each, longest answer, temperature
        return self.policy.sample(prompts, *rest)

    def sleep(self):
        self.slept = True


@pytest.fixture(autouse=True)
def _lucky(monkeypatch):
    monkeypatch.setattr("verifier.is_correct", lucky)


@pytest.fixture(scope="module")
def guide(tiny, tmp_path_factory) -> tuple[NPOConfig, Policy, str]:
    """A configuration, the policy that is the guide, and its checkpoint of step 7."""
    policy, path = Policy(tiny["model"]), tmp_path_factory.mktemp("guide") / "step_000007"
    save(policy, path, step=7, sampled_tokens=50)
    return NPOConfig(guide_samples=6, **tiny), policy, str(path)


def build(path, guide, asked=None, keep=KEEP, rows=ROWS, until=UNTIL, **flags):
    config, policy, checkpoint = guide
    config = dataclasses.replace(config, **flags)
    build_guide_cache(path, config, checkpoint, rows, until, keep, asked or policy)


@pytest.fixture(scope="module")
def built(guide, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "guide.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verifier.is_correct", lucky)
        build(path, guide)
    return path


def test_vllm_gets_one_submission(guide, tmp_path, monkeypatch):
    """As it has a queue of its own: 5 prompts x 6 answers; where 12 are too many at once, 2 x 6."""
    for most, asked in ((1024, [5]), (12, [2, 2, 1])):
        monkeypatch.setattr("plumbing.vllm_sampler.SUBMISSION", most)
        sampler = Watched(guide[1])
        build(tmp_path / f"{most}.jsonl", guide, sampler, sampler="vllm", prompts_per_step=1)
        assert sampler.asked == asked and sampler.slept  # the GPU is whoever's is loaded next


def test_a_line_per_prompt_with_its_first_right_answers(built, guide):
    """Against the same answers, sampled again batch by batch."""
    config, policy, _ = guide
    prompts, _ = load_prompts(config)
    header, *lines = read_jsonl(built)
    counts = {"prompts": 5, "samples": 6, "keep": 2, "until": 3}
    about_guide = {"guide_step": 7, "guide_sampled_tokens": 50, "temperature": 1.7, "version": 3}
    assert counts.items() | about_guide.items() <= header.items()
    expected = []
    for first in (0, 2, 4):
        some = [prompts[row] for row in ROWS[first : first + 2]]
        seed = derived_seed(config.seed, "guide", first)
        for group in policy.sample(some, 6, 16, 1.7, seed):
            right = [c for c in group.completions if lucky(c.text, "") and c.finished]
            pass_rate = len(right) / 6
            tokens = sum(len(c.token_ids) for c in group.completions)
            expected.append((group.prompt.id, pass_rate, tokens, [c.token_ids for c in right[:2]]))
    found = [
        (line["prompt_id"], line["pass_rate"], line["sampled_tokens"], line["answers"])
        for line in lines
    ]
    assert [(*of_line, [a["token_ids"] for a in kept]) for *of_line, kept in found] == expected
    assert {len(kept) for *_, kept in found} >= {0, 2}  # so each case is among them
    for answer in (answer for *_, kept in found for answer in kept):
        assert (answer["source"], answer["exact"], answer["finished"]) == ("guide@7", True, True)


def test_recorded_logprobs_are_the_guides_own(built, guide):
    config, policy, _ = guide
    prompts, _ = load_prompts(config)
    by_id = {prompts[row].id: prompts[row] for row in ROWS}
    answers = load_guide_cache(built, config).answers
    for prompt_id, found in answers.items():
        for answer in found:
            row = (policy.encode(by_id[prompt_id]), answer.token_ids)
            with torch.no_grad():
                logprobs, _ = policy.logprobs([row], 1.7)
            assert logprobs[0].tolist() == pytest.approx(answer.behavior_logprobs, abs=1e-4)
    assert answers


def test_only_right_answers_are_kept_and_what_vllm_sampled_is_the_guides():
    group = group_of([0.0, 0.0, 1.0, 1.0])
    for completion in group.completions:
        completion.exact = False  # as vLLM returns them
    line = line_of(0, group, 30, keep=1)
    assert (line["pass_rate"], line["sampled_tokens"]) == (0.5, 8)
    (answer,) = line["answers"]
    answer = Completion(**json.loads(json.dumps(answer)))
    assert answer == dataclasses.replace(group.completions[2], source="guide@30", exact=True)
    assert line_of(3, group_of([0.0, 0.0]), 30, keep=1)["answers"] == []


def asked(prompt_id: str) -> Prompt:
    return Prompt(prompt_id, [], [], "7")


def test_a_cache_guides_until_its_last_step_and_knows_its_cost(built, guide):
    config, _, _ = guide
    lines = read_jsonl(built)[1:]
    cache = load_guide_cache(built, config)
    solved = [line["prompt_id"] for line in lines if line["answers"]]
    (unsolved, *_) = [line["prompt_id"] for line in lines if not line["answers"]]
    assert list(cache.answers) == solved
    first = lines[[line["prompt_id"] for line in lines].index(solved[0])]["answers"][0]
    assert cache.answers_to(asked(solved[0]), UNTIL) == [Completion(**first)]
    assert cache.answers_to(asked(solved[0]), UNTIL + 1) == []
    assert cache.answers_to(asked(unsolved), 1) == cache.answers_to(asked("elsewhere"), 1) == []
    tokens = sum(line["sampled_tokens"] for line in lines)
    assert (cache.sampled_tokens, cache.spent_tokens) == (tokens, tokens + 50)
    share = f"{len(solved)} of 5 prompts ({len(solved) / 5:.0%}) within 6 answers"
    assert str(cache) == f"guide@7 solved {share}, {tokens} tokens"
    longer = load_guide_cache(built, config, until=5)
    assert longer.until == 5 and longer.answers_to(asked(solved[0]), 5)


def test_without_is_correction_no_logprobs_are_read(built, guide):
    config, _, _ = guide
    for with_logprobs in (False, True):
        answers = load_guide_cache(built, config, with_logprobs=with_logprobs).answers.values()
        recorded = [answer.behavior_logprobs for found in answers for answer in found]
        assert all((values is not None) is with_logprobs for values in recorded) and recorded


# ------------------------------------------------------------------- continued, or made anew


def test_a_whole_cache_is_not_made_again(built, guide):
    before = built.stat().st_mtime_ns, built.read_bytes()
    build(built, guide, Watched(guide[1], last=0))
    assert (built.stat().st_mtime_ns, built.read_bytes()) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": ROWS[::-1]},
        {"until": 4},
        {"keep": 1},
        {"guide_samples": 5},
        {"temperature": 1.6},
    ],
)
def test_another_header_makes_it_anew(built, guide, tmp_path, changes):
    """Until the first answers are there it holds a header alone."""
    path = tmp_path / "guide.jsonl"
    path.write_bytes(built.read_bytes())
    with pytest.raises(Killed):
        build(path, guide, Watched(guide[1], last=0), **changes)
    (header,) = read_jsonl(path)
    assert header != read_jsonl(built)[0]
    build(path, guide, sampler := Watched(guide[1]), **changes)
    assert sampler.asked == [2, 2, 1] and read_jsonl(path)[0] == header
    answers, temperature = changes.get("guide_samples", 6), changes.get("temperature", 1.7)
    assert sampler.settings == (answers, 16, temperature)


@pytest.mark.parametrize(
    ("lines", "piece", "asked"),
    [
        (0, 20, [2, 2, 1]),  # within the header
        (1, 0, [2, 2, 1]),
        (2, 30, [2, 2, 1]),  # in the first batch
        (3, 0, [2, 1]),
        (4, 60, [2, 1]),  # of the second batch one line and a piece
        (5, 5, [1]),
    ],
)
def test_whole_batches_are_kept_of_a_cache_cut_short(built, guide, tmp_path, lines, piece, asked):
    path, whole = tmp_path / "guide.jsonl", built.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:lines]) + whole[lines][:piece])
    with pytest.raises(UsageError, match="cut short" if lines else "format version 3"):
        load_guide_cache(path, guide[0])
    build(path, guide, sampler := Watched(guide[1]))
    assert sampler.asked == asked and path.read_bytes() == built.read_bytes()


def test_a_kill_keeps_the_batches_before_it(built, guide, tmp_path):
    path = tmp_path / "new" / "guide.jsonl"
    for last, kept in ((1, 3), (1, 5)):  # dies at its second call, and is started again
        with pytest.raises(Killed):
            build(path, guide, Watched(guide[1], last))
        assert len(read_jsonl(path)) == kept
    build(path, guide, sampler := Watched(guide[1]))
    assert sampler.asked == [1] and path.read_bytes() == built.read_bytes()


# ------------------------------------------------------------------------------------ refused


def changed(**values):
    def edit(text: str) -> str:
        header, *rest = text.splitlines(keepends=True)
        return json.dumps(json.loads(header) | values) + "\n" + "".join(rest)

    return edit


def answered(change, sealed: bool = False):
    """Changes the first line with an answer. Without its seal, so that the check itself is seen."""

    def edit(text: str) -> str:
        header, *lines = map(json.loads, text.splitlines())
        line = next(line for line in lines if line["answers"])
        change(line, line["answers"][0])
        for one in (line, header) if not sealed else ():
            del one["seal"]
        return "".join(json.dumps(line) + "\n" for line in (header, *lines))

    return edit


def swapped(text: str) -> str:
    """Two lines stand for each other's row."""
    header, first, second, *rest = map(json.loads, text.splitlines())
    for line, row in ((second, first["row"]), (first, second["row"])):
        line["row"] = row
        del line["seal"]
    return "".join(json.dumps(line) + "\n" for line in (header, first, second, *rest))


def repeated(text: str) -> str:
    """The second line stands in the third's place, too."""
    lines = text.splitlines(keepends=True)
    return "".join([*lines[:2], lines[1], *lines[3:]])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swapped, "its header was changed, or whose answers they are"),
        (repeated, "its header was changed, or whose answers they are"),
        (changed(until=90), "its header was changed"),
        (changed(temperature=0.5), "its header was changed"),
        (answered(lambda line, _: line.update(prompt_id="x:1")), "prompt x:1 is unknown"),
        (answered(lambda line, _: line.pop("prompt_id")), "is damaged .'prompt_id'"),
        (answered(lambda _, answer: answer.update(prompt_id="x:1")), "right one to its prompt"),
        (answered(lambda _, answer: answer.update(accuracy=0.9)), "right one to its prompt"),
        (answered(lambda _, answer: answer.update(accuracy=0.0)), "right one to its prompt"),
        (answered(lambda _, answer: answer.update(finished=False)), "right one to its prompt"),
        (answered(lambda _, answer: answer.update(reward=float("inf"))), "the reward inf"),
        (answered(lambda _, answer: answer.update(reward=1e9), sealed=True), "it was changed"),
        (answered(lambda _, answer: answer.update(text="7"), sealed=True), "it was changed"),
        (answered(lambda line, _: line.update(sampled_tokens=-9)), "it was changed"),
        (answered(lambda line, _: line.update(sampled_tokens="9")), "is damaged"),
        (answered(lambda _, answer: answer["token_ids"].pop()), "not one per token"),
        (answered(lambda _, answer: answer["behavior_logprobs"].append(-1.0)), "not one per token"),
        (answered(lambda _, answer: answer.update(behavior_logprobs=None)), "is damaged"),
        (
            answered(lambda _, a: a.update(behavior_logprobs=[0.5] * len(a["token_ids"]))),
            "at most 0",
        ),
        (answered(lambda _, a: a["behavior_logprobs"].__setitem__(0, float("nan"))), "finite"),
        (answered(lambda _, a: a["behavior_logprobs"].__setitem__(0, -float("inf"))), "finite"),
        (answered(lambda _, a: a["token_ids"].__setitem__(0, 151)), "never sampled"),
        (answered(lambda _, a: a["token_ids"].__setitem__(0, -1)), "never sampled"),
        (answered(lambda _, a: a["token_ids"].__setitem__(0, 7.0)), "never sampled"),
        (answered(lambda _, a: a["token_ids"].__setitem__(0, IMAGE)), "never sampled"),
        (answered(lambda _, a: a.update(token_ids=[7] * 90_000)), "90000 tokens, with --max-new-t"),
        (answered(lambda _, a: a.update(token_ids=[])), "0 tokens, with --max-new-tokens 16"),
    ],
)
def test_what_no_guide_can_have_said_is_refused(built, guide, tmp_path, damage, message):
    path = tmp_path / "guide.jsonl"
    path.write_text(damage(built.read_text()))
    with pytest.raises(UsageError, match=message) as caught:
        load_guide_cache(path, guide[0])
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_cache_made_by_hand_needs_no_seals(built, guide, tmp_path):
    path = tmp_path / "guide.jsonl"
    lines = [{k: v for k, v in line.items() if k != "seal"} for line in read_jsonl(built)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load_guide_cache(path, guide[0]).answers == load_guide_cache(built, guide[0]).answers


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed(version=1), "is none of format version 3"),
        (changed(dataset="other"), r"made for another dataset \(other; this run has cards-train"),
        (changed(tokenizer="0123"), r"made for another tokenizer \(0123; this run has"),
        (lambda text: text[:-40], "cut short, 4 of 5 prompts"),
        (lambda text: text[: text.rstrip().rindex("\n") + 1], "cut short, 4 of 5 prompts"),
        (lambda text: "", "is none of format version 3"),
        (lambda text: "[1]\n", r"is not JSON lines \(line 1: it is no object"),
        (lambda text: '{"step": 0}\n', "is none of format version 3"),
        (lambda text: text.replace('"text"', '"words"'), r"line \d is damaged .*words"),
        (
            lambda text: text.replace('"answers"', '"completion"'),
            r"line 2 is damaged \('answers'\)",
        ),
        (lambda text: text.replace("}\n", "\n", 2), "is not JSON lines"),
    ],
)
def test_damaged_or_foreign_caches_are_refused_in_one_line(built, guide, tmp_path, damage, message):
    path = tmp_path / "guide.jsonl"
    path.write_text(damage(built.read_text()))
    with pytest.raises(UsageError, match=message) as caught:
        load_guide_cache(path, guide[0])
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_no_such_cache(tmp_path, guide):
    with pytest.raises(UsageError, match=r"guide cache .*guide\.jsonl: there is no such file"):
        load_guide_cache(tmp_path / "guide.jsonl", guide[0])


def test_a_guide_with_another_tokenizer(guide, fresh, tmp_path):
    fresh.tokenizer.add_tokens(["new"])
    other = str(save(fresh, tmp_path / "other", step=9))
    with pytest.raises(UsageError, match="its tokenizer .* is not that of the policy"):
        build(tmp_path / "guide.jsonl", (*guide[:2], other))
    assert not (tmp_path / "guide.jsonl").exists()
