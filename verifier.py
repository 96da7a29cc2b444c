r"""Is this answer right?  The verifiable reward, computed from text alone.

    reward = 0.9 * accuracy + 0.1 * format

accuracy is 1 for the right answer, format is 1 for any answer; otherwise they are 0.

1. Find the answer: the content of the last balanced `\boxed{…}` or `\fbox{…}`. If the text has
   `<answer>…</answer>`, only the last pair counts; without a box in it, all of its content.
2. Multiple choice: the option's letter, the text of exactly one option, or both if they agree.
3. Otherwise: equal as text, else equal as plain numbers, else equal by math-verify.

What happens to odd answers:
- An unclosed box is no answer: a completion that was cut off must not be paid for.
- An answer that could mean two options is wrong.
- An answer of more than 1,000 characters is compared as text only.
- An answer that math-verify cannot handle within 5 seconds is wrong.

math-verify parses LaTeX with sympy. Its own timeout needs SIGALRM, so it works in the main thread
only, and `9^{9^{9^{9}}}` hangs it for good. So it runs in a worker process, which is killed and
replaced whenever an answer takes too long.

    python verifier.py  # a table of accepted and rejected answers, with the reasons
    python verifier.py --gold '\frac{1}{2}' --response 'so \boxed{0.5}'
"""

import atexit
import contextlib
import json
import math
import re
import select
import subprocess
import sys
import threading
from decimal import Decimal
from types import SimpleNamespace

ACCURACY_WEIGHT, FORMAT_WEIGHT = 0.9, 0.1  # as in the NPO authors' configurations
TIMEOUT = 5.0  # seconds that math-verify may take for one answer
MAX_MATH_CHARS = 1000  # longer answers are compared as text only
WORKER_MEMORY = 4 << 30  # bytes of address space; a power tower would make sympy take everything


# EXPERIMENT HERE: the reward.
def reward(prompt, completion) -> float:
    """What GRPO compares within a group: any finite number, larger is better.

    It may look at prompt.gold, prompt.choices (None if the answer is free), completion.text,
    .token_ids, .finished (False if it was cut off) and .accuracy (0.0 or 1.0, already set).
    Partial credit or a length penalty goes here. Accuracy stays a fact about the answer: slot
    replacement and every reported accuracy look at it and never at the reward.
    """
    has_answer = extract_answer(completion.text) is not None
    return ACCURACY_WEIGHT * completion.accuracy + FORMAT_WEIGHT * has_answer


def score(groups) -> None:
    """Sets `accuracy` and then `reward` of every completion in the groups.

    Raises FloatingPointError if a reward is nan or infinite, and ValueError if an edited
    `is_correct` gives anything but right or wrong.
    """
    for group in groups:
        prompt = group.prompt
        for completion in group.completions:
            completion.accuracy = float(is_correct(completion.text, prompt.gold, prompt.choices))
            if completion.accuracy not in (0, 1):  # a guide cache would silently drop 0.9
                problem = f"accuracy is {completion.accuracy}; partial credit belongs in `reward`"
                raise ValueError(f"prompt {prompt.id}: {problem}")
            completion.reward = float(reward(prompt, completion))
            if not math.isfinite(completion.reward):
                raise FloatingPointError(f"prompt {prompt.id}: the reward is {completion.reward}")


def is_correct(response: str | None, gold: str, choices: list[str] | None = None) -> bool:
    """Whether the response's answer equals `gold`, for multiple choice a letter or an option."""
    return judge(response, gold, choices)[0]


def judge(response: str | None, gold: str, choices: list[str] | None = None) -> tuple[bool, str]:
    """The verdict of `is_correct`, and its reason in words."""
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


# ---- Finding the answer ---------------------------------------------------------------

BRACE = re.compile(r"\\[{}\\]|\\(?:boxed|fbox)\s*\{|[{}]")


def extract_answer(response: str | None) -> str | None:
    """The content of the last balanced box, or of the last answer tags; None if there is neither.

    One pass over the text, so that a megabyte of braces takes a second at most.
    """
    if not isinstance(response, str):
        return None
    tagged, close = False, response.rfind("</answer>")
    if close >= 0 and (start := response.rfind("<answer>", 0, close)) >= 0:
        tagged, response = True, response[start + len("<answer>") : close]
    open_braces = []  # where each open box's content starts; None for a plain brace
    last = None  # (start, end) of the last balanced box's content
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


# ---- Golds ----------------------------------------------------------------------------

# JSON reads "\frac" as a form feed and "rac", "\times" as a tab and "imes"
LOST_BACKSLASH = re.compile(
    r"[\f\b\v\a]|\t(?=imes|heta|ext|an|au|o\b|frac|riangle)"
    r"|\r(?=ho|ight|m\b|angle|ceil|floor)|\n(?=eq|u\b|e\b|abla|eg\b|ot\b|i\b|mid\b)"
)


def unanswerable(gold: str) -> str | None:
    """Why no short answer can equal this gold; None if one can."""
    if LOST_BACKSLASH.search(gold):
        return "control characters (LaTeX with single backslashes?)"
    return None


# ---- Comparing answers ----------------------------------------------------------------

LETTER = re.compile(r"(?:option\s+)?\(?([A-Z])\)?[.:]?", re.IGNORECASE)
LETTER_AND_TEXT = re.compile(r"\(?([A-Z])\)?[.:)]\s*(\S.*)", re.DOTALL)
PLAIN_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,400})(?:\.\d{1,400})?")
WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s'-]+[^\W\d_]+)*")


def option_index(answer: str, choices: list[str]) -> int | None:
    """Which option an answer means, by its letter, text or both; None if that is not clear."""
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
    r"""The answer without outer spaces and dollar signs, an outer \text{…}, a final full stop."""
    answer = " ".join(answer.split()).strip("$ ")
    if wrapped := re.fullmatch(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", answer):
        answer = wrapped[1].strip()
    return answer[:-1] if len(answer) > 1 and answer.endswith(".") else answer


def equal(gold: str, answer: str) -> tuple[bool, str]:
    """Whether two answers are equal, and the reason in words. Not symmetric: gold comes first."""
    gold, answer = plain_text(gold), plain_text(answer)
    if gold == answer:
        return True, "equal as text"
    if PLAIN_NUMBER.fullmatch(gold) and PLAIN_NUMBER.fullmatch(answer):
        numbers = [Decimal(text.replace(",", "")) for text in (gold, answer)]
        return numbers[0] == numbers[1], "compared as plain numbers"
    if WORDS.fullmatch(gold) and WORDS.fullmatch(answer):  # math-verify finds "act" equal to "cat"
        return gold.casefold() == answer.casefold(), "compared as words"
    if "%" in answer and "%" not in gold:  # it reads 7% as 7 and as 0.07
        return False, "a percentage, and the gold is none"
    if "=" in answer and not re.search(r"[A-Za-z]", answer.split("=")[0]):  # it reads 8=7 as 7
        return False, "an equation that defines nothing"
    if max(len(gold), len(answer)) > MAX_MATH_CHARS:
        return False, f"over {MAX_MATH_CHARS} characters, and not equal as text"
    verdict = MATH_VERIFY.ask(gold, answer, TIMEOUT)
    if verdict is None:
        return False, "too much for math-verify"
    return verdict, "compared by math-verify"


class MathVerifyWorker:
    """math-verify in a process of its own: one JSON line in, one line out.

    The process starts with the first question, and is killed when an answer hangs it.
    """

    def __init__(self):
        self.process, self.asked, self.lock = None, 0, threading.Lock()

    def ask(self, gold: str, answer: str, timeout: float) -> bool | None:
        """Whether math-verify finds the two equal; None after a crash or `timeout` seconds."""
        with self.lock:  # one question at a time, whichever thread asks
            if self.process is None or self.process.poll() is not None:
                self._start()
            self.asked += 1
            question = json.dumps([self.asked, gold, answer]).encode() + b"\n"
            try:
                self.process.stdin.write(question)
                self.process.stdin.flush()
                reply = self._reply(timeout)
            except BrokenPipeError:
                reply = b""
            if not reply.startswith(b"%d " % self.asked):
                self._kill()
                return None
            return reply.endswith(b" 1\n")

    def _start(self):
        # this file imports nothing heavy, so that a new worker is cheap
        command = [sys.executable, __file__, "--worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # in a session of its own, Ctrl-C in the terminal does not reach it
        self.process = subprocess.Popen(command, **pipes, start_new_session=True)
        atexit.register(self.process.kill)
        if self._reply(timeout=120.0) != b"ready\n":
            self._kill()
            raise RuntimeError("math-verify does not start: pip install -r requirements.txt")

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


MATH_VERIFY = MathVerifyWorker()


def worker() -> None:
    """The worker process: answers questions from stdin until it is closed or killed."""
    import resource

    from math_verify import parse, verify

    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is not a reply
    with contextlib.suppress(ValueError, OSError):  # some systems do not allow lowering it
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        number, *texts = json.loads(line)
        gold, answer = (parse(f"\\boxed{{{text}}}") for text in texts)
        same = bool(gold) and bool(answer) and verify(gold, answer)
        print(number, int(same), file=replies, flush=True)


# ---- The command ----------------------------------------------------------------------

LENGTHS = ["3 cm", "5 cm", "7 cm"]
EXAMPLES = [  # response, gold, choices
    (r"27 +8= 35 \boxed{35}", "35", None),
    (r"first \boxed{1}, no: \boxed{2}", "1", None),
    (r"so it is \boxed{\frac{1}{2}}", "0.5", None),
    (r"<answer> x = 3 </answer>", "3", None),
    (r"\boxed{1,000.0}", "1000", None),
    (r"\boxed{\text{(B)}}", "B", LENGTHS),
    (r"\boxed{5 cm}", "B", LENGTHS),
    (r"\boxed{B: 7 cm}", "B", LENGTHS),
    (r"it must be B", "B", LENGTHS),
    (r"\boxed{35", "35", None),
    (r"\boxed{act}", "cat", None),
    (r"\boxed{9^{9^{9^{9}}}}", "7", None),
]


def main(gold: str | None = None, response: str | None = None, choices: list[str] | None = None):
    """Judges one response, or prints a table of examples.

    Args:
        gold: The right answer; for multiple choice an option's letter or text.
        response: What the policy said, with its answer in \\boxed{…}.
        choices: The options' texts, in order.
    """
    if (gold is None) != (response is None):
        raise SystemExit("error: --gold and --response go together")
    print(f"{'verdict':8} {'reward':7} {'gold':14} {'response':34} reason")
    for text, right, options in [(response, gold, choices)] if gold is not None else EXAMPLES:
        correct, reason = judge(text, right, options)
        prompt = SimpleNamespace(id="example", gold=right, choices=options)
        completion = SimpleNamespace(text=text, accuracy=float(correct), finished=True)
        completion.token_ids = [ord(letter) for letter in text]
        value = reward(prompt, completion)
        print(f"{'accept' if correct else 'reject':8} {value:<7.2f} {right:14} {text:34} {reason}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        worker()
    else:
        import tyro

        tyro.cli(main)
