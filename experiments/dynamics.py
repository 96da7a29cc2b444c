"""Sections of docs/results.md: what happens along runs. AutoNPO's rollbacks, with training reward
and entropy aligned on them; how far the weights go; and Q, V and S of a run's checkpoints."""

import math
import statistics

import numpy

from experiments.groups import EQUAL, against, equal_cells, mean, seeds, table, whole
from experiments.results import Result, Runs
from experiments.signal_curve import DISTANCES, RESULTS, STARTS
from plumbing.files import read_jsonl

AUTO = {"auto": "AutoNPO", "fixed": "D = 40, if confirmed"}
AUTO |= {"always": "D = 40, always†", "grpo": "GRPO"}
WORLDS = "cards", "staircase"
STEPS, BEFORE, AFTER = 200, 20, 40  # of a run; around the first rollback


def rollbacks(run: Result) -> list[tuple[int, int]]:
    """(step, distance) of those that rolled back."""
    made = [(line["step"], line["distance"]) for line in run.line["decisions"]]
    return [(step, distance) for step, distance in made if distance]


MEASURES = "reward", "entropy", "reward minus GRPO's", "entropy minus GRPO's"


def aligned(mine: Result, plain: Result) -> numpy.ndarray | None:
    """(60, 4) MEASURES, GRPO's at the same step, of the 20 steps that were taken before the first
    rollback and of the 40 after it, up to the second; nan where there is none. None without one."""
    if not rollbacks(mine):
        return None
    steps = mine.line["steps"]
    at = next(i for i, (_, rollbacks, *_) in enumerate(steps) if rollbacks)
    theirs = {step: values for step, _, *values in plain.line["steps"]}
    found = numpy.full((BEFORE + AFTER, len(MEASURES)), math.nan)
    for place in range(max(0, at - BEFORE), min(len(steps), at + AFTER)):
        step, made, *values = steps[place]
        if made > 1:
            break
        found[place - at + BEFORE] = [*values, *numpy.subtract(values, theirs[step])]
    return found


def lines_around(runs: Runs, world: str, name: str, what: int) -> numpy.ndarray:
    """(runs, 60): one of MEASURES for every seed that rolled back."""
    pairs = runs.together(f"autonpo/{world}-{name}", f"autonpo/{world}-grpo")
    found = [lines[:, what] for pair in pairs if (lines := aligned(*pair)) is not None]
    return numpy.array(found).reshape(len(found), BEFORE + AFTER)


def around(runs: Runs, world: str, name: str, what: int) -> list[list[float]]:
    """The same as means of ten steps each, of the seeds that took all ten."""
    tens = (
        lines_around(runs, world, name, what).reshape(-1, (BEFORE + AFTER) // 10, 10).mean(axis=2)
    )
    return [ten[~numpy.isnan(ten)].tolist() for ten in tens.T]


@whole
def autonpo(runs: Runs, group: str) -> str:
    rows, curves = [], []
    for world in WORLDS:
        plain, always = f"{group}/{world}-grpo", f"{group}/{world}-always"
        for name, label in AUTO.items():
            row = f"{group}/{world}-{name}"
            cells = [world, label, seeds(runs, row), mean(runs.at(row, STEPS))]
            if row == plain:
                rows.append(cells + [""] * 6)
                continue
            fired = [
                " ".join(
                    [f"{len(run.line['decisions'])}", *(f"{t}-{d}" for t, d in rollbacks(run))]
                )
                for (run,) in runs.together(row)
            ]
            cells += against(runs, row, (plain, always), STEPS)
            rows.append([*cells, *equal_cells(runs, row, plain), "; ".join(fired)])
            for what, measure in enumerate(MEASURES):
                tens = around(runs, world, name, what)
                cells = [mean(ten) if ten else "" for ten in tens]
                if tens[2]:
                    curves.append([world, label, measure, f"{len(tens[2])}", *cells])
    header = f"world | row | seeds | accuracy at {STEPS} | minus GRPO | minus always | {EQUAL} | "
    spans = [f"{at - BEFORE + 1} to {at - BEFORE + 10}" for at in range(0, BEFORE + AFTER, 10)]
    return f"""{table(header + "each run's warnings, rollbacks", rows)}

`2 140-40 180-20`: two warnings, and rollbacks of 40 steps at step 140 and of 20 at 180.
Accuracy on the staircase is B. Training reward and entropy of the policy's own answers,
in means of ten steps, counted from the first rollback; GRPO's are those of the same step. Runs that
never roll back have none:

{table(f"world | row | measure | runs | {' | '.join(spans)}", curves)}"""


def moved(runs: Runs) -> str:
    """How far GRPO's weights go, and the exponent of that in D."""
    lines = [
        {tuple(m[:2]): m[2] for m in run.line["moved"]} for (run,) in runs.together("cards/grpo")
    ]
    if not lines:
        return "Not run yet."
    spans, rows = sorted({span for _, span in lines[0]}), []
    for start in sorted({start for start, _ in lines[0]}):
        far = [[line[start, span] for line in lines if (start, span) in line] for span in spans]
        cells = [f"{statistics.fmean(norms):.2f}" if norms else "" for norms in far]
        rows.append([f"{start}", *cells, mean(exponents(runs, start), 2)])
    return table(f"t | {' | '.join(f'D = {span}' for span in spans)} | exponent of D", rows)


def exponents(runs: Runs, start: int) -> list[float]:
    """Of each seed: the slope of log distance over log D, 1 where it is linear."""
    found = []
    for (run,) in runs.together("cards/grpo"):
        moved = [(span, norm) for t, span, norm in run.line["moved"] if t == start]
        points = numpy.log(moved)
        found.append(float(numpy.polyfit(*points.T, 1)[0]))
    return found


def curves(start: int, key: str) -> dict[int, list[float]]:
    """Of experiments/signal_curve.jsonl, policies at `start`: {distance: a value of each seed}."""
    lines = [line for line in read_jsonl(RESULTS) if line["t"] == start]
    of = {d: [line for line in lines if line["distance"] == d] for d in DISTANCES}
    return {d: [measures(line)[key] for line in found] for d, found in of.items() if found}


def measures(line: dict) -> dict[str, float]:
    """With V^ and S^ of AutoNPO for c = 1, S^ for c = an answer's length, and pull^."""
    quality, v = line["quality"], math.exp(line["kl"])
    found = {"V": v, "S": quality / v, "S of answers": quality / math.exp(line["answer_kl"])}
    return line | found | {"pull": quality * (line["weight"] or 0)}  # None: nothing is solved


def signals() -> str:
    """Q, V and S by distance."""
    keys = "quality", "V", "S", "answer_kl", "S of answers", "right", "pull"
    peaks = {"S": "S^", "S of answers": "S^, c = length", "pull": "pull^"}
    rows, best = [], []
    for start in STARTS:
        columns = [curves(start, key) for key in keys]
        for distance in columns[0]:
            known = [[v for v in of[distance] if v is not None] for of in columns]
            rows.append([f"{start}", f"{distance}", *map(mean, known)])
        for key, of in zip(keys, columns):
            if of and key in peaks:
                each = zip(*[of[d] for d in DISTANCES if d])
                largest = [DISTANCES[1 + values.index(max(values))] for values in each]
                where = [f"{d} in {largest.count(d)}" for d in DISTANCES if d in largest]
                best.append(f"{peaks[key]}, t = {start}: {', '.join(where)}")
    if not rows:
        return "Not run yet."
    header = "t | D | Q | V^ | S^ | KL of an answer | S^, c = length | w² of right | pull^"
    return f"""{table(header, rows)}

Number of seeds in which each is largest at D = ... (D > 0): {"; ".join(best)}."""
