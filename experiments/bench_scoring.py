"""How long it takes to score 10,000 stored predictions of all kinds: letters, options, numbers, LaTeX, words, no answer at all.

python experiments/bench_scoring.py
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import BENCHMARKS

COUNT = 10_000
OPTIONS = ["3 cm", "5 cm", "7 cm", "none of them"]


def line(name: str, number: int, rng: random.Random) -> dict:
    """An item with one answer of some 200 words, right or wrong."""
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    gold, said, choices = rng.choice([
        ("B", rng.choice("ABCD"), OPTIONS), ("B", rng.choice(OPTIONS), OPTIONS), (str(a), str(rng.choice([a, b])), None),
        (rf"\\frac{{{a}}}{{{b}}}".replace("\\\\", "\\"), f"{a / b:.6f}", None), (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}", None),
        (f"({a}, {b})", f"({a},{rng.choice([a, b])})", None), ("yellow", rng.choice(["Yellow", "red"]), None),
        (f"x^2+{a}x", f"x(x+{rng.choice([a, b])})", None),
    ])  # fmt: skip
    facts = {"answer_type": "float" if number % 2 else "text", "precision": 2, "unit": None}  # of MathVista
    unit, part = str(number), "0"
    if name == "wemath":
        unit, part = f"2steps-{number // 3}", ("1", "2", "multi")[number % 3]
    if name == "mmbench":
        (gold, said, choices), unit, part = ("B", rng.choice("ABCD"), OPTIONS), str(number // 4), str(number % 4)
    answer = rng.choice([rf"\boxed{{{said}}}"] * 9 + [said])
    return {"benchmark": name, "id": f"{name}:{number}", "unit": unit, "part": part, "gold": gold, "choices": choices, "facts": facts,
            "responses": ["Look at the picture first. " * 40 + answer], "finished": [True]}  # fmt: skip


def main() -> None:
    rng, names = random.Random(0), list(BENCHMARKS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.jsonl"
        lines = [{"model": "made up"}, *(line(names[i % len(names)], i // len(names), rng) for i in range(COUNT))]
        path.write_text("".join(json.dumps(one) + "\n" for one in lines))
        start = time.perf_counter()
        command = [sys.executable, "evaluate.py", "--predictions", path, "--out", folder]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        print(f"{COUNT:,} predictions scored in {time.perf_counter() - start:.1f} s, imports included")


if __name__ == "__main__":
    main()
