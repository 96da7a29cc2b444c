"""What counts as an answer, what counts as right, and that no input hangs or breaks the verifier."""

import os
import signal
import threading
import time

import pytest
from conftest import group_of

import verifier
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
        ("A: B", "A", ["A: B", "C: D"], True),  # an option's exact text comes before letter and text
        ("A", "E", OPTIONS, False),  # a gold that names no option is never matched
    ],
)
def test_multiple_choice(response, gold, choices, right):
    assert is_correct(rf"\boxed{{{response}}}", gold, choices) is right


def test_letters_outside_a_box_do_not_count():
    assert not is_correct("The answer is B", "B", OPTIONS)


HOSTILE = [
    r"\boxed{9^{9^{9^{9}}}}", r"\boxed{" * 150_000, "{" * 1_000_000, "}" * 1_000_000, "<answer>" * 125_000,
    r"\boxed{" + "{" * 500_000 + "}" * 500_001, "\\boxed{\x00}", "\\boxed{😀}", "\\boxed{\ud800}", "", None, 5,
    r"\boxed{" + "9" * 5000 + "}", r"\boxed{\frac{1}{0}}", r"\boxed{" + "(" * 900 + "}",
]  # fmt: skip


def test_hostile_input_is_wrong_in_bounded_time_and_the_next_call_works(monkeypatch):
    monkeypatch.setattr(verifier, "TIMEOUT", 2.0)
    for response in HOSTILE:
        began = time.monotonic()
        assert is_correct(response, "7") is False
        assert time.monotonic() - began < 30  # not a speed test: the alternative is never
        assert is_correct(r"\boxed{\frac{14}{2}}", "7")


def test_the_worker_is_replaced_after_a_timeout():
    worker = verifier.MathVerifyWorker()
    assert worker.ask("7", "14/2", timeout=60) is True
    first = worker.process.pid
    assert worker.ask("7", "9^{9^{9^{9}}}", timeout=1.0) is None
    assert worker.ask("7", "14/2", timeout=60) is True
    assert worker.process.pid != first


def test_the_worker_is_replaced_when_it_died_by_itself():
    worker = verifier.MathVerifyWorker()
    assert worker.ask("7", "14/2", timeout=60) is True
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    assert worker.ask("7", "14/2", timeout=60) is True


def test_any_thread():
    verdicts = []
    threads = [
        threading.Thread(target=lambda n=n: verdicts.append((n, is_correct(rf"\boxed{{{2 * n}/2}}", str(n))))) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(verdicts) == [(n, True) for n in range(4)]


def test_score_keeps_accuracy_and_format_apart():
    group = group_of([0.0, 0.0, 0.0])
    for completion, text in zip(group.completions, (r"\boxed{0}", r"\boxed{1}", "0")):
        completion.text = text
    verifier.score([group])
    assert [c.accuracy for c in group.completions] == [1.0, 0.0, 0.0]
    assert [c.reward for c in group.completions] == pytest.approx([1.0, 0.1, 0.0])


def test_command_line(command):
    table = command("verifier.py").stdout
    assert table.count("accept") >= 5 and table.count("reject") >= 5 and "too much" in table
    assert "accept" in command("verifier.py", "--gold", "0.5", "--response", r"\boxed{\frac12}").stdout
    assert "reject" in command("verifier.py", "--gold", "B", "--response", r"\boxed{3}", "--choices", "3", "4").stdout
    assert "go together" in command("verifier.py", "--gold", "1", check=False).stderr
