"""How fast answers are judged: ordinary ones a second, and the slowest step of 64 hostile ones.

python -m experiments.judging
python -m experiments.judging --against ../other  # the ordinary ones, in turns with a checkout
"""

import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import tyro

import verifier

OPTIONS, PROMPTS, SLOTS, ROUNDS = ["3 cm", "5 cm", "7 cm", "none of them"], 8, 8, 5
HOSTILE = (
    "9^{9^{9^{#}}}",
    "(x+y+#)^{90}",
    "((#!)!)!",
    r"\int_0^1 x^{x+#} dx",
    r"\sum_{k=0}^{10^9} #^k",
)


def ordinary(count: int) -> list[tuple[str, str, list[str] | None]]:
    """(response of 200 words, gold, options)."""
    found = []
    for n in range(2, 2 + count // 8):
        found += [("C", "B", OPTIONS), ("5 cm", "B", OPTIONS), (f"{n}.0", f"{n}", None)]
        found += [(rf"{n}\text{{ cm}}", f"{n}", None), (f"{n}, 1", f"1, {n}", None)]
        found += [(rf"\frac{{{n}}}{{7}}", rf"\frac{{{2 * n}}}{{14}}", None)]
        found += [(rf"\sqrt{{{n}}}", r"\sqrt{3}", None), (f"x(x+{n})", f"x^2+{n}x", None)]
    return [("Look at the picture. " * 50 + rf"\boxed{{{said}}}", *rest) for said, *rest in found]


def rate(count: int) -> float:
    """Answers a second."""
    verifier.is_correct(r"\boxed{x+1}", "1+x")  # the process is there
    answers, began = ordinary(count), time.perf_counter()
    for answer in answers:
        verifier.is_correct(*answer)
    return len(answers) / (time.perf_counter() - began)


def hostile_step(kinds: tuple[str, ...], first: int) -> float:
    """Seconds for 8 prompts with 8 answers each, all different."""
    groups = []
    for n in range(first, first + PROMPTS * SLOTS, SLOTS):
        texts = [kinds[i % len(kinds)].replace("#", str(n + i)) for i in range(SLOTS)]
        said = [SimpleNamespace(text=rf"\boxed{{{text}}}", finished=True) for text in texts]
        prompt = SimpleNamespace(id=str(n), gold=r"\sqrt{7}", choices=None)
        groups.append(SimpleNamespace(prompt=prompt, completions=said))
    began = time.perf_counter()
    verifier.score(groups)
    return time.perf_counter() - began


def main(against: str | None = None, count: int = 10_000) -> None:
    """Times judging here, and beside another checkout's root folder if one is given."""
    if against:
        code = "import sys; sys.path[:0] = [{!r}]; import verifier; sys.path[:1] = ['.']\n"
        code += f"from experiments import judging; print(judging.rate({count // ROUNDS}))"
        rates = {".": [], against: []}
        for place in [*rates] * ROUNDS:
            ran = subprocess.run([sys.executable, "-c", code.format(place)], stdout=-1, check=True)
            rates[place].append(float(ran.stdout))
        here, there = map(statistics.median, rates.values())
        return print(f"{here:.0f} answers a second, there {there:.0f}, ratio {here / there:.2f}")
    print(f"{rate(count):.0f} answers a second")
    sets = [*((kind,) for kind in HOSTILE), HOSTILE]
    steps = [hostile_step(kinds, 100 * place + 11) for place, kinds in enumerate(sets)]
    print(f"{max(steps):.1f} s for the slowest step of {PROMPTS * SLOTS} hostile answers")


if __name__ == "__main__":
    tyro.cli(main)
