"""What counts as an answer, what counts as right, and that no input hangs the verifier."""

import inspect
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import verifier
from plumbing.rollout import Completion, EncodedPrompt, Group, Prompt
from verifier import extract_answer, is_correct

OPTIONS = ["3 cm", "5 cm", "7 cm"]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"a \boxed{1} b \boxed{2} c", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\fbox{4} then text", "4"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\{6\}}", r"\{6\}"),
        (r"an open { brace, then \boxed{7}", "7"),
        (r"\boxed{8} and \boxed{9", "8"),
        ("<answer> 10 </answer>", "10"),
        (r"<answer>\boxed{11}</answer> not \boxed{12}", "11"),
        ("<answer>13</answer> <answer>14</answer>", "14"),
        (r"\boxed{15", None),
        (r"\boxed{1{6}", None),
        (r"<answer>\boxed{17</answer>", None),
        ("<answer>18", None),
        (r"\boxed{}", None),
        (r"\foxed{19}", None),
        ("20", None),
        ("", None),
        (None, None),
    ],
)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        ("35", "35", True),
        ("035", "35", True),
        ("35.0", "35", True),
        ("-35", "35", False),
        ("1,234", "1234", True),
        ("1,23", "123", False),
        (r"\frac{14}{2}", "7", True),
        ("x=3", "3", True),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("(1, 2)", "(2, 1)", False),
        (r"\sqrt{2}/2", r"\frac{1}{\sqrt{2}}", True),
        (r"\text{Paris}", "paris", True),
        ("act", "cat", False),  # to math-verify a product of three letters
        ("7.", "7", True),
        ("$7$", "7", True),
        ("7 and 8", "7", False),
        ("8=7", "7", False),
        ("7%", "7", False),
        ("yx", "xy", True),
    ],
)
def test_free_answers(response, gold, right):
    assert is_correct(rf"so \boxed{{{response}}}", gold) is right


@pytest.mark.parametrize(
    ("response", "gold", "choices", "right"),
    [
        ("B", "B", OPTIONS, True),
        ("(B)", "B", OPTIONS, True),
        (r"\text{B}", "B", OPTIONS, True),
        ("b", "B", OPTIONS, True),
        ("Option B", "B", OPTIONS, True),
        ("B: 5 cm", "B", OPTIONS, True),
        ("B: 7 cm", "B", OPTIONS, False),  # letter and text contradict each other
        ("5 cm", "B", OPTIONS, True),
        ("5 cm", "5 cm", OPTIONS, True),
        ("7 cm", "B", OPTIONS, False),
        ("D", "B", OPTIONS, False),
        ("A or B", "B", OPTIONS, False),
        ("1/2", "C", ["0.25", "2", "0.5"], True),
        ("2", "A", ["2", "2.0"], True),  # equal as text to one option only
        ("4/2", "B", ["2", "2.0"], False),  # equal to both: luck
        ("C", "A", ["C", "A", "B"], False),  # a letter is a letter, whatever the options say
        ("c", "C", ["b", "c", "a"], False),  # in lower case it is the text of option B
        ("c", "B", ["b", "c", "a"], True),
        ("A: B", "A", ["A: B", "C: D"], True),  # an option's exact text comes first
        ("A", "E", OPTIONS, False),  # a gold that names no option is never matched
    ],
)
def test_multiple_choice(response, gold, choices, right):
    assert is_correct(rf"\boxed{{{response}}}", gold, choices) is right


def test_letters_outside_a_box_do_not_count():
    assert not is_correct("The answer is B", "B", OPTIONS)


HOSTILE = {
    "a power tower": r"\boxed{9^{9^{9^{9}}}}",
    "150,000 open boxes": r"\boxed{" * 150_000,
    "a million opening braces": "{" * 1_000_000,
    "a million closing braces": "}" * 1_000_000,
    "125,000 open tags": "<answer>" * 125_000,
    "deeply nested braces": r"\boxed{" + "{" * 500_000 + "}" * 500_001,
    "a null byte": "\\boxed{\x00}",
    "an emoji": "\\boxed{😀}",
    "half a surrogate pair": "\\boxed{\ud800}",
    "nothing": "",
    "None": None,
    "a number": 5,
    "5,000 digits": r"\boxed{" + "9" * 5000 + "}",
    "division by zero": r"\boxed{\frac{1}{0}}",
    "900 parentheses": r"\boxed{" + "(" * 900 + "}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_input_is_wrong_in_bounded_time_and_the_next_call_works(monkeypatch, kind):
    monkeypatch.setattr(verifier, "TIMEOUT", 2.0)
    began = time.monotonic()
    assert is_correct(HOSTILE[kind], "7") is False
    assert time.monotonic() - began < 30  # not a speed test: without a worker it never returns
    monkeypatch.undo()
    assert is_correct(r"\boxed{\frac{14}{2}}", "7")


def test_the_worker_is_replaced_when_it_hangs_and_when_it_died():
    worker = verifier.MathVerifyWorker()
    assert worker.process is None  # it starts with the first question
    assert worker.ask("7", "14/2", timeout=60) is True
    first = worker.process.pid
    assert worker.ask("7", "9^{9^{9^{9}}}", timeout=1.0) is None
    assert worker.ask("7", "14/2", timeout=60) is True
    assert worker.process.pid != first
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    assert worker.ask("7", "14/2", timeout=60) is True


def test_the_worker_may_be_asked_from_any_thread():
    """Replies must not be swapped between threads: half of these answers are right."""
    with ThreadPoolExecutor(4) as threads:
        answers = [rf"\boxed{{{2 * n}/2}}" for n in range(16)]
        verdicts = threads.map(is_correct, answers, [str(n + n % 2) for n in range(16)])
        assert list(verdicts) == [True, False] * 8


def test_a_new_worker_loads_no_torch(command):
    """Each hanging answer costs a new worker, so its start must stay cheap."""
    code = "import sys, verifier, math_verify; print({'torch', 'transformers'} & {*sys.modules})"
    assert command("-c", code).stdout == "set()\n"


def group_of(*texts: str, gold: str = "0") -> Group:
    """A group whose completions are these texts, with as many tokens as characters."""
    completions = [Completion("p7", [*map(ord, text)], None, text, True) for text in texts]
    return Group(Prompt("p7", [], [], gold), EncodedPrompt([1, 2]), completions)


def test_score_keeps_accuracy_and_format_apart():
    group, other = group_of(r"\boxed{0}", r"\boxed{1}", "0"), group_of(r"\boxed{3}", gold="3")
    verifier.score([group, other])
    assert [c.accuracy for c in group.completions] == [1.0, 0.0, 0.0]
    assert [c.reward for c in group.completions] == [0.9 + 0.1, 0.1, 0.0]
    assert (other.completions[0].accuracy, other.completions[0].reward) == (1.0, 1.0)


def test_an_edited_reward_sees_the_prompt_and_the_completion(monkeypatch):
    """A length penalty, and half of the reward for an answer that is off by one."""

    def edited(prompt, completion):
        off = abs(int(verifier.extract_answer(completion.text)) - int(prompt.gold))
        partial = completion.accuracy + 0.5 * (off == 1)
        return partial - 0.25 * len(completion.token_ids)

    monkeypatch.setattr(verifier, "reward", edited)  # `score` must look it up at call time
    group = group_of(r"\boxed{40}", r"ab \boxed{41}", r"\boxed{43}", gold="40")
    verifier.score([group])
    assert [c.accuracy for c in group.completions] == [1.0, 0.0, 0.0]
    assert [c.reward for c in group.completions] == [1 - 2.5, 0.5 - 3.25, -2.5]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_is_an_error(monkeypatch, value):
    monkeypatch.setattr(verifier, "reward", lambda prompt, completion: value)
    with pytest.raises(FloatingPointError, match=f"prompt p7: the reward is {value}"):
        verifier.score([group_of(r"\boxed{0}")])


def test_an_accuracy_between_right_and_wrong_is_an_error(monkeypatch):
    monkeypatch.setattr(verifier, "is_correct", lambda response, gold, choices: 0.75)
    with pytest.raises(ValueError, match="prompt p7: accuracy is 0.75; partial credit belongs"):
        verifier.score([group_of(r"\boxed{0}")])


PUBLIC = {
    verifier.reward: ["prompt", "completion"],
    verifier.score: ["groups"],
    verifier.is_correct: ["response", "gold", "choices"],
    verifier.extract_answer: ["response"],
}


@pytest.mark.parametrize("function", PUBLIC)
def test_signatures(function):
    names, name = list(inspect.signature(function).parameters), function.__name__
    assert names == PUBLIC[function], f"forkers import verifier.{name}: its parameters must stay"


def test_command_line(command):
    table = command("verifier.py").stdout
    assert table.count("accept") >= 5 and table.count("reject") >= 5 and "too much" in table
    half = command("verifier.py", "--gold", "0.5", "--response", r"\boxed{\frac12}").stdout
    assert "accept" in half and "1.00" in half
    three = ["--gold", "B", "--response", r"\boxed{3}"]
    assert "reject" in command("verifier.py", *three, "--choices", "3", "4").stdout
    alone = command("verifier.py", "--gold", "1", check=False)
    assert alone.returncode == 1 and "go together" in alone.stderr
