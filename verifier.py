"""Is this answer right?  The verifiable reward: reward = 0.9 accuracy + 0.1 format.

1. The answer is what stands in the last balanced `\\boxed{…}` (or `\\fbox{…}`, or between the last `<answer>` tags). An
   unclosed box is no answer: a completion that was cut off must not be paid for.
2. Multiple choice: the option's letter, or the text of exactly one option.
3. Anything else: equal as text, else equal as plain numbers, else equal by math-verify.

math-verify parses LaTeX with sympy, relies on SIGALRM (main thread only), and `9^{9^{9^{9}}}` hangs it for good. So it runs
in a worker process, which is killed and replaced when an answer takes too long; that answer counts as wrong.

    python verifier.py                                            # a table of accepts and rejects, with the reason
    python verifier.py --gold '\\frac{1}{2}' --response 'so \\boxed{0.5}'
"""

import atexit
import contextlib
import json
import queue
import re
import select
import subprocess
import sys
from decimal import Decimal

ACCURACY_WEIGHT, FORMAT_WEIGHT = 0.9, 0.1  # the authors' settings
TIMEOUT = 5.0  # seconds that math-verify may think about one answer
MAX_MATH_CHARS = 1000  # longer answers are compared as text only
WORKER_MEMORY = 4 << 30  # bytes of address space: sympy would take all there is for a power tower


# EXPERIMENT HERE: the reward. `accuracy` is what the gate of slot replacement and every reported accuracy look at.
def reward(accuracy: float, format: float) -> float:
    """Both arguments are 0.0 or 1.0."""
    return ACCURACY_WEIGHT * accuracy + FORMAT_WEIGHT * format


def score(groups) -> None:
    """Fills in `accuracy` and `reward` of every completion of the groups, from its text and its prompt's gold answer."""
    for group in groups:
        for completion in group.completions:
            completion.accuracy = float(is_correct(completion.text, group.prompt.gold, group.prompt.choices))
            completion.reward = reward(completion.accuracy, float(extract_answer(completion.text) is not None))


def is_correct(response: str | None, gold: str, choices: list[str] | None = None) -> bool:
    """Whether the response's answer equals `gold`, which for multiple choice is a letter or one of the options' texts."""
    return judge(response, gold, choices)[0]


def judge(response: str | None, gold: str, choices: list[str] | None = None) -> tuple[bool, str]:
    """The verdict of `is_correct`, with its reason in words."""
    answer = extract_answer(response)
    if answer is None:
        return False, "no closed \\boxed{…} or <answer> tags"
    if choices:
        right, said = option_index(gold, choices), option_index(answer, choices)
        if right is None:
            return False, f"gold {gold!r} names none of the {len(choices)} options"
        if said is None:
            return False, "names no option, or more than one"
        return said == right, f"means option {chr(65 + said)}"
    return equal(gold, answer)


# ---------------------------------------------------------------------------------------------------------------------
# Finding the answer
# ---------------------------------------------------------------------------------------------------------------------

BRACE = re.compile(r"\\[{}\\]|\\(?:boxed|fbox)\s*\{|[{}]")


def extract_answer(response: str | None) -> str | None:
    """The content of the last `<answer>…</answer>`, then of the last balanced box in it; None where there is no answer.

    One pass over the text, so that a megabyte of braces costs a second at most.
    """
    if not isinstance(response, str):
        return None
    tagged, close = False, response.rfind("</answer>")
    if close >= 0 and (start := response.rfind("<answer>", 0, close)) >= 0:
        tagged, response = True, response[start + len("<answer>") : close]
    open_braces, last = [], None  # open_braces: where each box's content starts, None for a plain brace
    for brace in BRACE.finditer(response):
        if brace[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, brace.start())
        elif brace[0].endswith("{") and brace[0] != "\\{":
            open_braces.append(None if brace[0] == "{" else brace.end())
    if last is None and (not tagged or "\\boxed" in response):
        return None
    answer = response if last is None else response[slice(*last)]
    return answer.strip() or None


# ---------------------------------------------------------------------------------------------------------------------
# Comparing answers
# ---------------------------------------------------------------------------------------------------------------------

LETTER = re.compile(r"(?:option\s+)?\(?([A-Z])\)?[.:]?", re.IGNORECASE)
LETTER_AND_TEXT = re.compile(r"\(?([A-Z])\)?[.:)]\s*(\S.*)", re.DOTALL)
PLAIN_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,400})(?:\.\d{1,400})?")
WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s'-]+[^\W\d_]+)*")


def option_index(answer: str, choices: list[str]) -> int | None:
    """The option that an answer means: by letter, by letter and text if they agree, by text; None if that is not clear."""
    answer = plain_text(answer)
    letter = LETTER.fullmatch(answer)
    if letter and (letter[1].isupper() or answer not in map(plain_text, choices)):
        index = ord(letter[1].upper()) - ord("A")
        return index if index < len(choices) else None
    same = [i for i, choice in enumerate(choices) if plain_text(choice) == answer]
    if not same and (both := LETTER_AND_TEXT.fullmatch(answer)):
        index = ord(both[1]) - ord("A")
        return index if index < len(choices) and equal(choices[index], both[2])[0] else None
    same = same or [i for i, choice in enumerate(choices) if equal(choice, answer)[0]]
    return same[0] if len(same) == 1 else None


def plain_text(answer: str) -> str:
    """Without what changes no meaning: outer white space, dollar signs, \\text{…} around it all, a full stop at the end."""
    answer = " ".join(answer.split()).strip("$ ")
    if wrapped := re.fullmatch(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", answer):
        answer = wrapped[1].strip()
    return answer[:-1] if len(answer) > 1 and answer.endswith(".") else answer


def equal(gold: str, answer: str) -> tuple[bool, str]:
    gold, answer = plain_text(gold), plain_text(answer)
    if gold == answer:
        return True, "equal as text"
    if PLAIN_NUMBER.fullmatch(gold) and PLAIN_NUMBER.fullmatch(answer):
        return Decimal(gold.replace(",", "")) == Decimal(answer.replace(",", "")), "compared as plain numbers"
    if WORDS.fullmatch(gold) and WORDS.fullmatch(answer):  # to math-verify a product of letters: "act" would equal "cat"
        return gold.casefold() == answer.casefold(), "compared as words"
    if "%" in answer and "%" not in gold:  # it reads 7% as 7 and as 0.07
        return False, "a percentage, and the gold is none"
    if "=" in answer and not re.search(r"[A-Za-z]", answer.split("=")[0]):  # of 8=7 it reads the last side
        return False, "an equation that defines nothing"
    if max(len(gold), len(answer)) > MAX_MATH_CHARS:
        return False, f"over {MAX_MATH_CHARS} characters, and not equal as text"
    verdict = ask_math_verify(gold, answer)
    return bool(verdict), "too much for math-verify" if verdict is None else "compared by math-verify"


class MathVerifyWorker:
    """math-verify in a process of its own: one JSON line in, one line out; killed and replaced when an answer hangs it."""

    def __init__(self):
        self.process, self.asked = None, 0

    def ask(self, gold: str, answer: str, timeout: float) -> bool | None:
        """Whether math-verify finds the two equal; None if it crashed on them or needed longer than `timeout` seconds."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        self.asked += 1
        try:
            self.process.stdin.write(json.dumps([self.asked, gold, answer]).encode() + b"\n")
            self.process.stdin.flush()
            reply = self._reply(timeout)
        except BrokenPipeError:
            reply = b""
        if not reply.startswith(b"%d " % self.asked):
            self._kill()
            return None
        return reply.endswith(b" 1\n")

    def _start(self):
        # a session of its own: Ctrl-C in the terminal is not for the worker
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        atexit.register(self.process.kill)
        if self._reply(timeout=120.0) != b"ready\n":
            self._kill()
            raise RuntimeError("math-verify's worker does not start: pip install -r requirements.txt")

    def _reply(self, timeout: float) -> bytes:
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        return self.process.stdout.readline() if ready else b""

    def _kill(self):
        atexit.unregister(self.process.kill)
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process = None


IDLE_WORKERS = queue.LifoQueue()  # last in, first out: a single thread only ever uses one


def ask_math_verify(gold: str, answer: str) -> bool | None:
    """`MathVerifyWorker.ask`, by a worker that is free: as many work at once as there are threads that ask."""
    try:
        idle = IDLE_WORKERS.get_nowait()
    except queue.Empty:
        idle = MathVerifyWorker()
    try:
        return idle.ask(gold, answer, TIMEOUT)
    finally:
        IDLE_WORKERS.put(idle)


def worker() -> None:
    """The worker's side. math-verify is asymmetric: gold first."""
    import resource

    from math_verify import parse, verify

    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
    with contextlib.suppress(ValueError, OSError):  # a system may not allow to lower it
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        number, *texts = json.loads(line)
        gold, answer = (parse(f"\\boxed{{{text}}}") for text in texts)
        print(number, int(bool(gold) and bool(answer) and verify(gold, answer)), file=replies, flush=True)


# ---------------------------------------------------------------------------------------------------------------------

EXAMPLES = [  # response, gold, choices
    (r"27 +8= 35 \boxed{35}", "35", None),
    (r"first \boxed{1}, no: \boxed{2}", "1", None),
    (r"so it is \boxed{\frac{1}{2}}", "0.5", None),
    (r"<answer> x = 3 </answer>", "3", None),
    (r"\boxed{1,000.0}", "1000", None),
    (r"\boxed{\text{(B)}}", "B", ["3 cm", "5 cm", "7 cm"]),
    (r"\boxed{5 cm}", "B", ["3 cm", "5 cm", "7 cm"]),
    (r"\boxed{B: 7 cm}", "B", ["3 cm", "5 cm", "7 cm"]),
    (r"it must be B", "B", ["3 cm", "5 cm", "7 cm"]),
    (r"\boxed{35", "35", None),
    (r"\boxed{act}", "cat", None),
    (r"\boxed{9^{9^{9^{9}}}}", "7", None),
]


def main(gold: str | None = None, response: str | None = None, choices: list[str] | None = None) -> None:
    """Checks one response, or prints a table of examples.

    Args:
        gold: The right answer; for multiple choice an option's letter or text.
        response: What the policy said, with its answer in \\boxed{…}.
        choices: The options' texts, in order.
    """
    if (gold is None) != (response is None):
        raise SystemExit("error: --gold and --response go together")
    rows = EXAMPLES if gold is None else [(response, gold, choices)]
    print(f"{'verdict':8} {'reward':7} {'gold':14} {'response':34} reason")
    for response, gold, choices in rows:
        correct, reason = judge(response, gold, choices)
        value = reward(float(correct), float(extract_answer(response) is not None))
        print(f"{'accept' if correct else 'reject':8} {value:<7.2f} {gold:14} {response:34} {reason}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        worker()
    else:
        import tyro

        tyro.cli(main)
