"""Result lines of the reported seeds, and what is compared of them."""

from dataclasses import dataclass

from experiments.plan import GROUPS, SCOUT, WINDOW
from experiments.runs import HERE
from plumbing.files import read_jsonl
from plumbing.report import first_reach


@dataclass(frozen=True)
class Result:
    """A run: its line and its evaluations. On the staircase accuracy is that of part B."""

    line: dict
    evals: list[dict]

    @classmethod
    def of(cls, line: dict) -> "Result":
        keys = "step", "sampled_tokens", "eval/accuracy"
        return cls(
            line, [dict(zip(keys, (e[0], e[2], e[-1 if e[3:] else 1]))) for e in line["evals"]]
        )

    @property
    def accuracy(self) -> float:
        return self.evals[-1]["eval/accuracy"]

    @property
    def tokens(self) -> int:
        return self.evals[-1]["sampled_tokens"]

    def at(self, step: int, key: str = "eval/accuracy") -> float | None:
        """Accuracy, or "sampled_tokens", at a step; None where it was not evaluated."""
        found = [line[key] for line in self.evals if line["step"] == step]
        return found[0] if found else None

    def reach(self, level: float, end: int) -> tuple[float, bool]:
        """The step at which accuracy first reaches a level, and whether that is cut: `end` if it
        has not got there by then."""
        found = first_reach(self.evals, level)
        return (end, True) if found is None or found > end else (found, False)

    def at_tokens(self, tokens: float) -> dict:
        """The last evaluation before this run had sampled more than that."""
        return [line for line in self.evals if line["sampled_tokens"] <= tokens][-1]


class Runs:
    """Row -> seed -> run, and row -> seeds that were left out."""

    def __init__(self, lines: list[dict]):
        self.lines, self.of, self.left_out = lines, {}, {}
        for line in lines:
            if "left_out" in line:
                self.left_out.setdefault(line["row"], []).append(line["seed"])
            else:
                self.of.setdefault(line["row"], {})[line["seed"]] = Result.of(line)

    def only(self, seeds) -> "Runs":
        return Runs([line for line in self.lines if line["seed"] in seeds])

    def together(self, *rows: str) -> list[tuple[Result, ...]]:
        """Runs of these rows with the same seed, where all have one; by seed."""
        found = [self.of.get(row, {}) for row in rows]
        seeds = sorted(set.intersection(*(set(runs) for runs in found)))
        return [tuple(runs[seed] for runs in found) for seed in seeds]

    def at(self, row: str, step: int) -> list[float]:
        """Accuracy at a step, of every seed that has got there."""
        found = [run.at(step) for (run,) in self.together(row)]
        return [value for value in found if value is not None]

    def minus(self, mine: str, theirs: str, step: int, later: int | None = None) -> list[float]:
        """Paired differences of accuracy at a step; theirs may be at a later one."""
        later = later or step
        pairs = [(a.at(step), b.at(later)) for a, b in self.together(mine, theirs)]
        return [a - b for a, b in pairs if None not in (a, b)]

    def over(self, mine: str, theirs: str, step: int) -> list[float]:
        """The same as ratios: of accuracies that grow by a factor, from small ones on."""
        pairs = [(a.at(step), b.at(step)) for a, b in self.together(mine, theirs)]
        return [a / b for a, b in pairs if None not in (a, b)]


def load(folder=HERE) -> Runs:
    """The reported seeds' lines of all groups."""
    lines = []
    for rows, seeds, file in GROUPS.values():
        names = {run.row for run in rows}
        every = read_jsonl(folder / f"{file}.jsonl")
        lines += [line for line in every if line["row"] in names and line["seed"] in seeds]
    return Runs(lines)


def speed_ups(pairs: list[tuple[Result, Result]]) -> tuple[list[float], int]:
    """Of (run, GRPO's): GRPO's steps to its own accuracy at SCOUT over the run's; and how many runs
    were cut at WINDOW. Where GRPO has gained nothing by then there is nothing to be faster at: 1.
    """
    found, cuts = [], 0
    for mine, theirs in pairs:
        level = theirs.at(SCOUT)
        steps, cut = mine.reach(level, WINDOW)
        found.append(theirs.reach(level, SCOUT)[0] / steps if level > theirs.at(0) else 1.0)
        cuts += cut
    return found, cuts


def catch_ups(pairs: list[tuple[Result, Result]], scout: int = 0) -> tuple[list[float], int]:
    """Of (run, GRPO's): GRPO's steps to the run's accuracy at WINDOW, at least 1, over WINDOW and
    the scout's steps; and how many of GRPO's runs were cut at their end."""
    reached = [b.reach(a.at(WINDOW), b.evals[-1]["step"]) for a, b in pairs]
    return [max(step, 1) / (WINDOW + scout) for step, _ in reached], sum(cut for _, cut in reached)
