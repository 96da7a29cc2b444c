"""math-verify in a process of its own, which ends what takes too long.

sympy hangs in C code where no exception reaches it, so the kernel must end it. The worker loads
math-verify once and forks a child that answers; when the child has used up its time, the worker
forks another in milliseconds. The limit is CPU time: a busy machine changes no verdict.

    python plumbing/sympy_process.py  # the worker: a JSON line in, a word out
"""

import contextlib
import functools
import json
import math
import os
import re
import subprocess
import sys
import threading

CPU_SECONDS = 2.0  # for one question
MEMORY = 4 << 30  # bytes of address space; a power tower would make sympy take everything
HOPELESS = re.compile(  # towers; huge powers, factorials, numbers, sums and binomials
    r"\d\^\{?\d+\^|\^\{[^{}]*\^\{?[^{}]*\^|\^\{?-?\d{4}|\)\}?\^\{?\d{3}|\d{4}!|![)}]*!|\d{401}|"
    r"\\(?:sum|prod|binom)\b.*(?:\d{4}|10\^)"
)
MAX_BRACKETS, MAX_LENGTH = 120, 400  # 900 letters in a row take a second or two


class TooDear(Exception):
    """sympy would need too much time or memory for this."""


def hopeless(text: str) -> bool:
    if len(text) > MAX_LENGTH:
        return True
    return bool(HOPELESS.search(text)) or text.count("{") + text.count("(") > MAX_BRACKETS


class SympyProcess:
    """The worker as its parent sees it. It starts with the first question.

    left: how many questions may still be too dear; then none is asked any more.
    too_dear: how many were.
    """

    def __init__(self):
        self.process, self.lock = None, threading.Lock()
        self.left, self.too_dear = math.inf, 0
        self.verdict = functools.lru_cache(maxsize=1 << 17)(self._verdict)

    def equal(self, gold: str, answer: str) -> bool:
        """Whether math-verify finds two LaTeX texts equal; raises TooDear."""
        verdict = None
        if self.left > 0 and not any(map(hopeless, (gold, answer))):
            verdict = self.verdict(gold, answer)
            self.left -= verdict is None  # remembered ones, too: a resumed run remembers nothing
        if verdict is None:
            self.too_dear += 1
            raise TooDear("too much for math-verify")
        return verdict

    def _verdict(self, gold: str, answer: str) -> bool | None:
        question = json.dumps([gold, answer]).encode() + b"\n"
        with self.lock:  # one question at a time, whichever thread asks
            for _ in range(2):  # again if somebody killed the worker
                if self.process is None:
                    self._start()
                with contextlib.suppress(BrokenPipeError):
                    self.process.stdin.write(question)
                    self.process.stdin.flush()
                reply = self.process.stdout.readline()
                if reply:
                    return {b"equal\n": True, b"unequal\n": False, b"dear\n": None}[reply]
                self._end()
        raise RuntimeError("math-verify's process was killed twice: is there memory left?")

    def _start(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # it ends when stdin is closed; in a session of its own, Ctrl-C does not reach it; and a
        # fixed hash seed gives sympy one order of terms
        fixed = {"start_new_session": True, "env": os.environ | {"PYTHONHASHSEED": "0"}}
        self.process = subprocess.Popen([sys.executable, __file__], **pipes, **fixed)
        if self.process.stdout.readline() != b"ready\n":
            raise RuntimeError(
                f"math-verify's process ended with code {self._end()} before it was ready: "
                "pip install -r requirements.txt"
            )

    def _end(self) -> int:
        self.process.kill()
        self.process.communicate()
        code, self.process = self.process.returncode, None
        return code


def worker() -> None:
    """Loads math-verify, and answers through a child that may die of a question."""
    import resource

    import math_verify  # noqa: F401  loaded here, for all children

    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is not a reply
    with contextlib.suppress(ValueError, OSError):  # some systems do not allow lowering it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", file=replies, flush=True)
    while child := os.fork():
        if os.waitpid(child, 0)[1] == 0:
            return  # stdin is closed
        print("dear", file=replies, flush=True)
    answer_questions(replies)


def answer_questions(replies) -> None:
    import signal

    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF ends this process
        verdict = "equal" if equal_in_math(*json.loads(line)) else "unequal"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(verdict, file=replies, flush=True)


def equal_in_math(gold: str, answer: str) -> bool:
    """math-verify, but for what it takes for equal and is not.

    It reads units away, falls back to the last number where LaTeX does not parse, rounds decimals
    to six digits, and takes what differs by less than 1e-15 for equal.
    """
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr

    clean = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, units=False)
    rules, parsed = [LatexExtractionConfig(normalization_config=clean)], []
    for text in (gold, answer):
        text = (
            re.sub(r"(\d*)\.(\d+)", as_fraction, text).replace("°", r"^{\circ}").replace("~", " ")
        )
        parsed.append(parse(rf"\boxed{{{text}}}", rules, "no_fallback", parsing_timeout=None))
    if not all(parsed) or not verify(*parsed, numeric_precision=100, timeout_seconds=None):
        return False
    gold, answer = parsed[0][0], parsed[1][0]
    if not (isinstance(gold, Expr) and isinstance(answer, Expr)):
        return True
    if gold.free_symbols | answer.free_symbols:
        return True
    gold, answer = gold.evalf(30), answer.evalf(30)
    return bool(gold == answer or abs(gold - answer) <= 1e-25 * abs(gold))


def as_fraction(decimal: re.Match) -> str:
    return rf"(\frac{{{decimal[1]}{decimal[2]}}}{{1{'0' * len(decimal[2])}}})"


if __name__ == "__main__":
    worker()
