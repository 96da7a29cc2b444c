"""What a user brings: rewards, sources, words, guides of texts; and what is kept of edited code."""

import json

import pytest
from conftest import TINY, cards_file, lucky

import grpo
import npo
import verifier
from grpo import GRPOConfig
from npo import NPOConfig
from plumbing import UsageError, command
from plumbing.data import load_prompts
from plumbing.guide_cache import guide_of_texts, kind_of_guide
from plumbing.own_code import load_function
from plumbing.run import read_jsonl
from worlds import cards

REWARDS = """
from beside import SCALE

def scaled(prompt, completion):
    return SCALE * completion.accuracy - 0.5

def infinite(prompt, completion):
    return float("inf")

def three(prompt, completion, more):
    return 0.0
"""
CONFIG = TINY | {"lr": 1e-4, "steps": 2}


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
    config.steps = 3
    with pytest.raises(UsageError, match="reward .* there and .* here"):
        npo.main(config)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothere.py:f", "--reward nothere.py:f: there is no such file; give it as"),
        ("{file}", "there is no such file; give it as my_file.py:my_function"),
        ("{file}:nothere", "must have def nothere.prompt, completion."),
        ("{file}:three", "must have def three.prompt, completion."),
        ("{broken}:f", "broken.py fails .ZeroDivisionError"),
    ],
)
def test_what_is_no_reward_is_told_in_one_line(rewards, tmp_path, spec, message):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    spec = spec.format(file=rewards, broken=tmp_path / "broken.py")
    with pytest.raises(UsageError, match=message) as caught:
        load_function("--reward", spec, "prompt", "completion")
    assert "\n" not in str(caught.value)


def test_a_reward_that_is_not_finite_stops_the_run(rewards, tmp_path):
    config = GRPOConfig(out=str(tmp_path / "run"), reward=f"{rewards}:infinite", **CONFIG)
    with pytest.raises(UsageError, match="the reward is inf; it must be a finite number"):
        grpo.train(config, config.out)


def test_a_function_is_a_source_and_its_rows_reach_the_reward(tmp_path):
    row = "{'problem': f'{n} + 1?', 'answer': n + 1, 'entry': {'n': n}}"
    code = f"def rows():\n    return [{row} for n in range(9)]\ndef nothing():\n    return []\n"
    (tmp_path / "sums.py").write_text(code)
    flags = {"dataset": f"{tmp_path / 'sums.py'}:rows", "eval_prompts": 2}
    train, held_out = load_prompts(GRPOConfig(**flags))
    assert (len(train), train[3].gold, train[3].row["entry"]) == (7, "4", {"n": 3})
    assert held_out[0].row["entry"] == {"n": 7}
    with pytest.raises(UsageError, match="must return a list of dicts"):
        load_prompts(GRPOConfig(dataset=f"{tmp_path / 'sums.py'}:nothing"))


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
    """Rows of the file: one right, one wrong, one held out, one twice."""
    config = NPOConfig(eval_prompts=4, max_new_tokens=60)
    hands, path = cards.hands("train"), tmp_path / "answers.jsonl"
    right = [rf"\boxed{{{hand.working}}}" for hand in hands[:4]]
    id = load_prompts(config)[0].id_of(3)
    lines = [{"row": 0, "text": right[0]}, {"row": 1, "text": right[0]}]
    lines += [{"row": 99_999, "text": right[0]}, {"prompt_id": id, "text": right[3]}]
    lines += [{"row": 0, "text": f"so {right[0]}"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert kind_of_guide(str(path)) == ("texts", path)
    cache = guide_of_texts(path, config, until=7)
    assert {id.rpartition(":")[2]: len(found) for id, found in cache.answers.items()} == {
        "0": 2,
        "3": 1,
    }
    answer = cache.answers[id][0]
    assert answer.behavior_logprobs is None and answer.source == "guide" and answer.finished
    assert "a right text for 2 of 2048 prompts" in str(cache)
    path.write_text('{"row": 0, "text": 7}\n')
    with pytest.raises(UsageError, match="line 1 has no text"):
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
    command.keep_code(tmp_path, begun=False)
    first = (tmp_path / "code.diff").read_text()
    assert first.startswith("commit ") and capsys.readouterr().out == ""
    command.keep_code(tmp_path, begun=True)
    assert (tmp_path / "code.diff").read_text() == first and capsys.readouterr().out == ""
    (tmp_path / "code.diff").write_text("commit 123\n")
    command.keep_code(tmp_path, begun=True)
    assert (tmp_path / "code.diff").read_text() == f"commit 123\n{first}"
    assert "goes on with other code" in capsys.readouterr().out
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    command.keep_code(tmp_path / "none", begun=True)
    assert not (tmp_path / "none").exists()


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
    with pytest.raises(UsageError, match="has answers to 0 of the 4 prompts of steps 1-2; was it"):
        npo.intervene(config, tmp_path / "run")
