"""How fast answers are judged: ordinary ones a second, and the slowest step of hostile ones.

    python -m experiments.judging
    python -m experiments.judging --against ../other  # takes turns with another checkout
"""

import argparse
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import verifier

OPTIONS, PROMPTS, SLOTS = ["3 cm", "5 cm", "7 cm", "none of them"], 8, 8
HOSTILE = (  # {n} makes each of the 64 another text
    "9^{{9^{{9^{{{n}}}}}}}",
    "(x+y+{n})^{{900}}",
    r"\sum_{{k=1}}^{{10^9}} \frac{{{n}}}{{k^k+1}}",
    r"\int_0^1 \frac{{\sin^{{{n}}}(x^x)}}{{\log(1+x^{{19}})}} dx",
    "((({n}!)!)!)!",
    r"\prod_{{k=1}}^{{99999999}} (k+{n})",
    r"\binom{{10^9+{n}}}{{10^8}}",
    r"\sqrt{{" * 60 + "{n}" + "}}" * 60,
)


def ordinary(numbers: range) -> list[tuple[str, str, list[str] | None]]:
    """(response of 200 words, gold, options), half of them right."""
    found = []
    for n in numbers:
        found += [("C", "B", OPTIONS), ("5 cm", "B", OPTIONS), (f"{n}.0", f"{n}", None)]
        found += [(rf"{n} \text{{ cm}}", f"{n + n % 2}", None), (f"{n}, {n + 3}", f"{n + 3}, {n}", None)]
        found += [(rf"\frac{{{n}}}{{7}}", rf"\frac{{{2 * n}}}{{14}}", None)]
        found += [(rf"\sqrt{{{n}}}", rf"\sqrt{{{n + 1}}}", None), (f"x(x+{n})", f"x^2+{n}x", None)]
    return [("Look at the picture. " * 50 + rf"\boxed{{{said}}}", *rest) for said, *rest in found]


def rate() -> float:
    """Answers a second, over 10,000."""
    verifier.is_correct(r"\boxed{x+1}", "1+x")  # the process is there
    began, answers = time.perf_counter(), ordinary(range(2, 1252))
    for answer in answers:
        verifier.is_correct(*answer)
    return len(answers) / (time.perf_counter() - began)


def hostile_steps() -> list[float]:
    """Seconds of steps of 64: of one kind each, and of all kinds."""
    kinds = [[kind] * SLOTS for kind in HOSTILE] + [list(HOSTILE)]
    seconds = []
    for step, kind in enumerate(kinds):
        groups = []
        for place in range(PROMPTS):
            texts = [t.format(n=2 + 100 * step + 10 * place + i) for i, t in enumerate(kind)]
            said = [SimpleNamespace(text=rf"\boxed{{{t}}}", finished=True) for t in texts]
            prompt = SimpleNamespace(id=f"{place}", gold=r"\sqrt{7}", choices=None)
            groups.append(SimpleNamespace(prompt=prompt, completions=said))
        began = time.perf_counter()
        verifier.score(groups)
        seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    print(f"{rate():.0f} ordinary answers a second", flush=True)
    print([f"{x:.1f}" for x in hostile_steps()])
