"""Does a guide break a plateau, and is a near one better than a far one? On the staircase.

    python -m experiments.staircase --seeds 50 51 52    # a few minutes; lines in staircase.jsonl

For each seed a GRPO run takes PLATEAU steps and stands on its plateau: part A is learnt, part B is
not. A sibling, which starts where borrows are less rare, supplies two guides: its first checkpoint
with a borrow's probability q = sqrt(B) of at least NEAR, and its first with at least FAR. Every row
then goes on from the plateau for WINDOW steps. Lines are those of experiments/runs.py, with the
exact accuracy of part B and the guide's q.
"""

import argparse
import json
import math

from experiments.runs import HERE, RUNS, Run, make
from plumbing.checkpoints import checkpoint_path
from plumbing.run import evaluations, read_jsonl

PLATEAU, WINDOW = 60, 40
NEAR, FAR = 0.4, 0.95
SIBLING = "grpo.py --model staircase --borrow-rate 0.05 --steps 160 --eval-every 5 --save-every 5"
GUIDED = f"--guided-until {PLATEAU + WINDOW} --guide"
ROWS = {  # how each row goes on
    "grpo": "grpo.py",
    "self": f"npo.py {GUIDED} self",
    "near": f"npo.py {GUIDED} {{near}}",
    "far": f"npo.py {GUIDED} {{far}}",
    "near-no-is": f"npo.py --no-is-correction {GUIDED} {{near}}",
}
RESULTS = HERE / "staircase.jsonl"


def run(row: str, command: str, seed: int) -> dict:
    out = f"{RUNS}/staircase/{row}-{seed}"
    line = make(Run(row, f"python {command} --seed {seed} --out {out}", seed=seed, out=out))
    if line is None:
        raise SystemExit(f"not made: {row} {seed}")
    lines = evaluations(out)
    return line | {"evals_b": [[e["step"], round(e["eval/accuracy_b"], 6)] for e in lines]}


def guides(seed: int) -> dict[str, tuple[str, float]]:
    """The sibling's checkpoints that guide, and their q."""
    run("sibling", SIBLING, seed)
    out, found = f"{RUNS}/staircase/sibling-{seed}", {}
    chances = {e["step"]: math.sqrt(e["eval/accuracy_b"]) for e in evaluations(out) if e["step"]}
    for name, level in (("near", NEAR), ("far", FAR)):
        step = min((step for step, q in chances.items() if q >= level), default=None)
        if step is None:
            raise SystemExit(f"seed {seed}: the sibling never borrows with probability {level}")
        found[name] = str(checkpoint_path(out, step)), chances[step]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.staircase",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[50, 51, 52])
    for seed in parser.parse_args().seeds:
        done = {line["row"] for line in read_jsonl(RESULTS) if line["seed"] == seed}
        if missing := [row for row in ROWS if row not in done]:
            run("plateau", f"grpo.py --model staircase --steps {PLATEAU} --eval-every 10", seed)
            start = checkpoint_path(f"{RUNS}/staircase/plateau-{seed}", PLATEAU)
            found = guides(seed)
        for row in missing:
            command = ROWS[row].format(**{name: path for name, (path, _) in found.items()})
            on = f"--model staircase --start {start} --steps {PLATEAU + WINDOW} --eval-every 10"
            line = run(row, f"{command} {on}", seed)
            guide = row.split("-")[0]
            line |= {"q": round(found[guide][1], 4)} if guide in found else {}
            with open(RESULTS, "a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
