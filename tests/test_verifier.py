"""What counts as an answer, what counts as right, and that no input hangs the verifier."""

import functools
import inspect
import math
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import verifier
from plumbing import UsageError, sympy_process
from plumbing.rollout import Completion, EncodedPrompt, Group, Prompt
from plumbing.sympy_process import TooDear
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
        (r"<think>maybe \boxed{21}", None),  # thoughts that never ended
        (r"<think>maybe \boxed{22}</think> no", None),
        (r"maybe \boxed{23}</think> \boxed{24}", "24"),
        (r"\boxed{25}, as \boxed{} asks", "25"),
        (r"$x = \boxed{26}$ or $x = \boxed{27}$", "26, 27"),
        (r"\boxed{28}. And \boxed{29}", "29"),
        (r"\\boxed{30}", "30"),
        (r"row \\\boxed{31}", "31"),
        (r"\boxed 32", "32"),
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
        ("yx", "xy", False),  # two letters are a word: no, on
        ("3yx", "3xy", True),
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


@pytest.mark.parametrize("sign", ["_", "\\{", "、", "²", "$", "1,000"])
def test_no_option_is_100_kilobytes_long(sign):
    started = time.process_time()
    assert not is_correct(rf"\boxed{{{sign * 50_000}}}", "B", OPTIONS)
    assert time.process_time() - started < 5


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
    "100,000 backslashes": "\\" * 100_000,
    "1,000 quadruple primes": r"\boxed{" + "\u2057" * 990 + "}",
    "1,000 underscores": r"\boxed{" + "_" * 990 + "}",
    "1,000 commas": r"\boxed{" + "、" * 990 + "}",
    "900 parentheses": r"\boxed{" + "(" * 900 + "}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_input_is_wrong_and_the_next_call_works(kind):
    assert is_correct(HOSTILE[kind], "7") is False  # it returns at all
    assert is_correct(r"\boxed{\frac{14}{2}}", "7")


DEAR = r"(x+y+{n})^{{90}}"  # sympy expands it for minutes


def test_what_hangs_is_ended_by_its_cpu_time_and_what_dies_is_replaced(monkeypatch):
    worker = sympy_process.SympyProcess()
    assert worker.process is None  # it starts with the first question
    assert worker.equal("x+x", "2x") is True
    first = worker.process.pid
    with pytest.raises(TooDear, match="too much for math-verify"):
        worker.equal("7x", DEAR.format(n=3))
    assert worker.equal("x+x+x", "3x") is True and worker.process.pid == first  # only a child died
    os.killpg(first, signal.SIGKILL)
    assert worker.equal("x+y", "y+x") is True and worker.process.pid != first


def test_long_texts_are_not_asked():
    assert sympy_process.hopeless("m " * 300) and not sympy_process.hopeless("m " * 150)


def test_a_worker_that_does_not_start_is_one_clear_error(monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(sympy_process, "__file__", str(tmp_path / "broken.py"))
    message = "ended with code 3 before it was ready: pip install -r requirements.txt"
    with pytest.raises(RuntimeError, match=message):
        sympy_process.SympyProcess().equal("x+x", "2x")


def test_dear_answers_are_limited_whatever_is_remembered(monkeypatch):
    """The fourth is not asked; and a right one that needs sympy comes first, as it is short."""
    texts = [rf"\boxed{{{DEAR.format(n=n)}}}" for n in (13, 14, 15, 16)]
    asked, known = [], {"12x": True, "x12": True}

    def ask(gold, answer):
        asked.append(answer)
        return known.get(answer)

    process = sympy_process.SympyProcess()
    process.verdict = functools.lru_cache(ask)
    monkeypatch.setattr(verifier, "SYMPY", process)
    for order in (texts, texts[::-1]):  # the second time all verdicts are remembered
        groups = [group_of(*order, r"\boxed{12x}", gold="4x+8x"), group_of(*order, gold="5x")]
        verifier.score(groups)
        right = [c.accuracy for c in groups[0].completions]
        assert right == [0.0] * 4 + [1.0]
        assert [c.too_dear for c in groups[0].completions] == [True] * 4 + [False]
        assert len(asked) == 1 + 3 + 1  # the step's fourth and last is the second prompt's
    assert process.left == math.inf


def test_the_process_may_be_asked_from_any_thread():
    """Replies must not be swapped between threads: half of these answers are right."""
    with ThreadPoolExecutor(4) as threads:
        answers = [rf"\boxed{{{2 * n}x/2}}" for n in range(2, 18)]
        verdicts = threads.map(is_correct, answers, [f"{n + n % 2}x" for n in range(2, 18)])
        assert list(verdicts) == [True, False] * 8


def test_a_new_worker_loads_no_torch(command):
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


def test_what_was_cut_off_earns_nothing():
    group = group_of(r"\boxed{0}", r"so \boxed{0}")
    group.completions[1].finished = False
    verifier.score([group])
    assert [(c.answer, c.accuracy, c.reward) for c in group.completions] == [
        ("0", 1, 1),
        (None, 0, 0),
    ]
    assert group.verified == group.completions[:1]


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None, [1, 2]])
def test_a_reward_that_is_not_finite_is_an_error(monkeypatch, value):
    monkeypatch.setattr(verifier, "reward", lambda prompt, completion: value)
    with pytest.raises(
        UsageError, match=f"prompt p7: the reward is {re.escape(repr(value))}; it must be"
    ):
        verifier.score([group_of(r"\boxed{0}")])


def test_an_accuracy_between_right_and_wrong_is_an_error(monkeypatch):
    monkeypatch.setattr(verifier, "is_correct", lambda response, gold, choices: 0.75)
    with pytest.raises(UsageError, match="prompt p7: accuracy is 0.75; partial credit belongs"):
        verifier.score([group_of(r"\boxed{0}")])


def test_a_reward_may_judge_by_a_scorer_of_its_own(monkeypatch):
    def judged(prompt, completion):
        completion.accuracy = float(completion.answer == "7")
        return 2.0 * completion.accuracy - 0.5

    monkeypatch.setattr(verifier, "reward", judged)
    group = group_of(r"\boxed{0}", r"\boxed{7}")  # its gold is 0
    verifier.score([group])
    assert [(c.accuracy, c.reward) for c in group.completions] == [(0.0, -0.5), (1.0, 1.5)]


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
    assert table.count("accept") >= 3 and table.count("reject") >= 3 and "too much" in table
    half = command("verifier.py", "--gold", "0.5", "--response", r"\boxed{\frac12}").stdout
    assert "accept" in half and "1.00" in half
    three = ["--gold", "B", "--response", r"\boxed{3}"]
    assert "reject" in command("verifier.py", *three, "--choices", "3", "4").stdout
    alone = command("verifier.py", "--gold", "1", check=False)
    assert alone.returncode == 1 and "go together" in alone.stderr
