"""What a user brings: rewards, sources, words, guides of texts; and what is kept of edited code."""

import json
from dataclasses import replace

import pytest
from conftest import TINY, cards_file, group_of, lucky

import grpo
import npo
import verifier
from grpo import GRPOConfig
from npo import NPOConfig
from plumbing import UsageError, command
from plumbing.data import PromptSet, load_prompts
from plumbing.guide_cache import GuideCache, guide_of_texts, kind_of_guide
from plumbing.own_code import load_function
from plumbing.rollout import Completion
from plumbing.run import read_jsonl
from worlds import cards

REWARDS = """
from beside import SCALE

def scaled(prompt, completion):
    return SCALE * completion.accuracy - 0.5

def infinite(prompt, completion):
    return float("inf")

def fails(prompt, completion):
    raise KeyError("why")

def fails_deep(prompt, completion):
    import json
    return json.loads("not JSON")

def three(prompt, completion, more):
    return 0.0
"""
CONFIG = TINY | {"lr": 1e-4, "steps": 2}


@pytest.fixture(autouse=True)
def forget():
    load_function.cache_clear()


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "beside.py").write_text("SCALE = 3.0\n")
    monkeypatch.setattr(verifier, "reward", verifier.reward)  # puts it back in the end
    monkeypatch.setattr(verifier, "is_correct", lucky)
    return tmp_path / "my_rewards.py"


def test_a_reward_of_ones_own_also_pays_the_guide(rewards, tmp_path, capsys):
    config = NPOConfig(out=str(tmp_path / "run"), reward=f"{rewards}:scaled", gate=1.0, **CONFIG)
    config.scout_steps = 2
    npo.main(config)
    lines = read_jsonl(tmp_path / "run/metrics.jsonl")[1:]
    for line in lines:
        assert line["reward"] == pytest.approx(3.0 * line["accuracy"] - 0.5)
    assert "| rew " in capsys.readouterr().out
    shown = read_jsonl(tmp_path / "run/guide.jsonl")[1:]
    assert {a["reward"] for line in shown for a in line["answers"]} <= {2.5}
    rewards.write_text(REWARDS.replace("- 0.5", "- 0.25"))
    load_function.cache_clear()
    config.steps = 3
    with pytest.raises(UsageError, match="reward .* there and .* here"):
        npo.main(config)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothere.py:f", "--reward nothere.py:f: give a file that is there and a name, as my_f"),
        ("{file}", "give a file that is there and a name, as my_file.py:my_function"),
        ("{file}:nothere", "must have def nothere.prompt, completion."),
        ("{file}:three", "must have def three.prompt, completion."),
        ("{broken}:f", r"ZeroDivisionError: division by zero \(line 2 of broken.py"),
        ("{leaves}:f", r"SystemExit: 3 \(line 1 of leaves.py"),
    ],
)
def test_what_is_no_reward_is_told_in_one_line(rewards, tmp_path, spec, message):
    broken, leaves = tmp_path / "broken.py", tmp_path / "leaves.py"
    broken.write_text("\n1 / 0\n")
    leaves.write_text("raise SystemExit(3)\n")
    spec = spec.format(file=rewards, broken=broken, leaves=leaves)
    with pytest.raises(UsageError, match=message) as caught:
        load_function("--reward", spec, "prompt", "completion")
    assert "\n" not in str(caught.value)


def test_a_reward_that_is_not_finite_stops_the_run(rewards, tmp_path):
    config = GRPOConfig(out=str(tmp_path / "run"), reward=f"{rewards}:infinite", **CONFIG)
    with pytest.raises(UsageError, match="the reward is inf; it must be a finite number"):
        grpo.train(config, config.out)


def test_a_reward_that_fails_is_told_with_its_line(rewards, tmp_path):
    config = GRPOConfig(out=str(tmp_path / "run"), reward=f"{rewards}:fails", **CONFIG)
    with pytest.raises(UsageError, match=r":fails: KeyError: .why.* .line 11 of my_rewards.py.;"):
        grpo.train(config, config.out)


def test_a_failure_in_a_library_names_the_users_line(rewards):
    reward = load_function("--reward", f"{rewards}:fails_deep", "prompt", "completion")
    with pytest.raises(
        UsageError, match=r"JSONDecodeError: Expecting value.*line 15 of my_rewards"
    ):
        reward(None, None)


def test_a_reward_that_judges_takes_wrong_answers_out_of_a_cache(rewards, tmp_path):
    """The guide's answers with an even number of tokens are wrong for this scorer."""
    code = "\ndef judged(prompt, completion):\n    even = len(completion.token_ids) % 2 == 0"
    rewards.write_text(REWARDS + code + "\n    completion.accuracy = 1.0 - even\n    return 3.0\n")
    of = {"source": "guide", "accuracy": 1.0, "reward": 1.0}
    answers = [Completion("p", [5] * n, [-0.5] * n, "so", True, **of) for n in (2, 3)]
    cache = GuideCache({"p": answers}, 4)
    prompt = group_of([1.0], "p").prompt
    assert [a.reward for a in cache.answers_to(prompt, 4, 2)] == [0.9, 0.9]  # it has no .answer
    verifier.reward = load_function("--reward", f"{rewards}:judged", "prompt", "completion")
    (found,) = cache.answers_to(prompt, 4, 2)
    assert (len(found.token_ids), found.reward, answers[1].reward) == (3, 3.0, 1.0)
    assert found is not cache.answers_to(prompt, 4)[0]  # a prompt may be asked twice in a step
    prompts = PromptSet("set", "pq", lambda id, row: replace(prompt, id=row), [0, 1])
    cache.answers = {"set:0": answers[:1], "p": answers[:1], "set:1": answers, "q": answers}
    assert cache.reach(prompts, [0, 1, 1, 0], 2, 3) == "2 of the 4 prompts of steps 2-3"


def test_a_function_is_a_source_and_its_rows_reach_the_reward(tmp_path):
    row = "{'problem': f'{n} + 1?', 'answer': n + 1, 'entry': {'n': n}}"
    code = f"def rows():\n    return [{row} for n in range(9)]\ndef nothing():\n    return []\n"
    code += "def late():\n    return [*rows(), rows()[0] | {'entry': {'k': 1}}]\n"
    code += "def more():\n    return [r | ({'note': 'new'} if n > 4 else {}) for n, r in "
    code += "enumerate(rows())]\n"
    (tmp_path / "sums.py").write_text(code)
    flags = {"dataset": f"{tmp_path / 'sums.py'}:rows", "eval_prompts": 2}
    train, held_out = load_prompts(GRPOConfig(**flags))
    assert (len(train), train[3].gold, train[3].row["entry"]) == (7, "4", {"n": 3})
    assert held_out[0].row["entry"] == {"n": 7}
    for name, message in (("nothing", "must return a list of dicts"), ("late", "json.dumps")):
        with pytest.raises(UsageError, match=message):
            load_prompts(GRPOConfig(dataset=f"{tmp_path / 'sums.py'}:{name}"))
    later = load_prompts(GRPOConfig(**flags | {"dataset": f"{tmp_path / 'sums.py'}:more"}))[0]
    assert [later[n].row.get("note") for n in (0, 5)] == [None, "new"]


def test_an_instruction_makes_other_prompts(tmp_path):
    cards_file(tmp_path / "a.parquet", 6)
    flags = {"dataset": str(tmp_path / "a.parquet"), "eval_prompts": 2}
    usual, _ = load_prompts(GRPOConfig(**flags))
    other, _ = load_prompts(GRPOConfig(instruction="Box it.", **flags))
    assert usual.fingerprint != other.fingerprint
    assert other[0].messages[0]["content"][-1] == {"type": "text", "text": "\nBox it."}
    with pytest.raises(UsageError, match="--instruction: cards asks in words of its own"):
        GRPOConfig(instruction="Box it.").check()


def test_texts_guide_where_they_are_right(tmp_path):
    """Rows of the file: one right, one wrong, unknown ones, one twice, and no last newline."""
    config = NPOConfig(eval_prompts=4, max_new_tokens=60)
    hands, path = cards.hands("train"), tmp_path / "answers.jsonl"
    right = [rf"\boxed{{{hand.working}}}" for hand in hands[:4]]
    id = load_prompts(config)[0].id_of(3)
    lines = [{"row": 0, "text": right[0]}, {"row": 1, "text": right[0]}]
    lines += [{"row": 99_999, "text": right[0]}, {"prompt_id": id, "text": right[3]}]
    lines += [
        {"row": 2, "text": "so " * 60 + right[2]},
        {"row": 2, "text": "<|im_end|>" + right[2]},
    ]
    lines += [{"text": right[2]}, {"row": 0, "text": f"27 {right[0]}"}]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert kind_of_guide(str(path)) == ("texts", path)
    cache = guide_of_texts(path, config, until=7)
    assert {id.rpartition(":")[2]: len(found) for id, found in cache.answers.items()} == {
        "0": 2,
        "3": 1,
    }
    answer = cache.answers[id][0]
    assert answer.behavior_logprobs is None and answer.source == "guide" and answer.finished
    skipped = (
        "1 wrong, 2 to no training prompt, 1 longer than --max-new-tokens, 1 with a special token"
    )
    assert str(cache) == f"a right text for 2 of 2048 prompts, {skipped}"
    for bad in (
        '{"row": 0, "text": 7}',
        '{"prompt_id": [1], "text": "7"}',
        '{"text"',
        "[]",
        "# text",
    ):
        path.write_text(f'{{"row": 0, "text": "7"}}\n{bad}\n')
        with pytest.raises(UsageError, match="answers.jsonl: line 2: .* a line is"):
            guide_of_texts(path, config, until=7)


def test_a_guide_is_told_by_its_content(tmp_path):
    assert kind_of_guide(str(cards.TEACHER)) == ("checkpoint", cards.TEACHER)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"prompts_per_step": 2}')
    with pytest.raises(UsageError, match="is no guide; give self, a checkpoint's folder, the dir"):
        kind_of_guide(str(run))
    (run / "guide.jsonl").write_text('{"version": 3}\n')
    assert (
        kind_of_guide(str(run))
        == ("cache", run / "guide.jsonl")
        == kind_of_guide(str(run / "guide.jsonl"))
    )
    (tmp_path / "other.jsonl").write_text('{"question": "?"}\n')
    for wrong in ("other.jsonl", "nothere"):
        with pytest.raises(UsageError, match=f"--guide .*{wrong}: is no guide"):
            kind_of_guide(str(tmp_path / wrong))


def test_the_code_of_a_run_is_kept_with_it(tmp_path, monkeypatch, capsys):
    config = GRPOConfig()
    command.keep_code(config, tmp_path, begun=False)
    first = (tmp_path / "code.diff").read_text()
    assert first.startswith("commit ") and capsys.readouterr().out == ""
    command.keep_code(config, tmp_path, begun=True)
    assert (tmp_path / "code.diff").read_text() == first and capsys.readouterr().out == ""
    (tmp_path / "code.diff").write_text("commit 123\n")
    command.keep_code(config, tmp_path, begun=True)
    assert (tmp_path / "code.diff").read_text() == f"commit 123\n{first}"
    assert "goes on with other code" in capsys.readouterr().out
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    command.keep_code(config, tmp_path / "none", begun=True)
    assert not (tmp_path / "none").exists()
    (tmp_path / "mine.py").write_text("def short(prompt, completion): ...\n")
    config.reward = f"{tmp_path / 'mine.py'}:short"
    command.keep_code(config, tmp_path, begun=False)
    kept = (tmp_path / "code.diff").read_text()
    assert kept.endswith("mine.py\ndef short(prompt, completion): ...\n")


def test_a_word_when_nothing_is_right(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verifier, "is_correct", lambda *_: False)
    config = GRPOConfig(out=str(tmp_path / "run"), **CONFIG | {"steps": 21, "max_new_tokens": 3})
    grpo.main(config)
    shown = capsys.readouterr().out
    assert shown.count("No answer was right in 20 steps") == 1
    assert "No answer was right in the whole run" in shown


def test_a_guide_that_reaches_no_prompt_of_the_run_is_refused(tmp_path):
    path, hand = tmp_path / "answers.jsonl", cards.hands("train")[3]
    path.write_text(json.dumps({"row": 3, "text": rf"\boxed{{{hand.working}}}"}) + "\n")
    config = NPOConfig(
        out=str(tmp_path / "run"), guide=str(path), **CONFIG | {"max_new_tokens": 60}
    )
    message = "right answers to 0 of the 4 prompts of steps 1-2; it has a right text for 1 of 2048"
    with pytest.raises(UsageError, match=message):
        npo.intervene(config, tmp_path / "run")
