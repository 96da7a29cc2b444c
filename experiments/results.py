"""Result lines, and the statistics over seeds that the tables show."""

import statistics
from dataclasses import dataclass, replace

from experiments.runs import HERE
from plumbing.metrics import bounds
from plumbing.run import read_jsonl

PAPER_SPEED = 2.1


@dataclass(frozen=True)
class Result:
    """A run: its line, its evaluations and its entropy (the mean of every ten steps)."""

    line: dict
    evals: list[dict]
    entropy: list[tuple[int, float]]

    @classmethod
    def of(cls, line: dict) -> "Result":
        keys = ("step", "eval/accuracy", "sampled_tokens")
        return cls(line, [dict(zip(keys, values)) for values in line["evals"]], line["entropy"])

    @property
    def accuracy(self) -> float:
        return self.evals[-1]["eval/accuracy"]

    @property
    def tokens(self) -> int:
        return self.evals[-1]["sampled_tokens"]

    def until(self, step: int) -> "Result":
        evals = [line for line in self.evals if line["step"] <= step]
        return replace(
            self, evals=evals, entropy=[pair for pair in self.entropy if pair[0] <= step]
        )

    def at_tokens(self, tokens: float) -> dict:
        """The last evaluation before this run had sampled more than that."""
        return [line for line in self.evals if line["sampled_tokens"] <= tokens][-1]


def results(file: str, rows) -> dict[str, list[Result]]:
    """Row -> its runs, of the seeds that every one of these rows has."""
    lines = {(line["row"], line["seed"]): line for line in read_jsonl(HERE / file)}
    seeds = sorted(set.intersection(*({s for row, s in lines if row == wanted} for wanted in rows)))
    if len(seeds) < 2:
        raise SystemExit(f"error: {file} has fewer than two seeds with all of {', '.join(rows)}")
    return {row: [Result.of(lines[row, seed]) for seed in seeds] for row in rows}


def interval(values: list[float], digits: int = 2) -> str:
    low, high = bounds(values)
    return f"{statistics.fmean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def paired(mine: list[float], theirs: list[float]) -> list[float]:
    return [a - b for a, b in zip(mine, theirs)]


def verdict(differences: list[float]) -> str:
    """Of a claim that the paired differences lie above 0."""
    low, high = bounds(differences)
    return "holds" if low > 0 else "not confirmed" if high < 0 else "undecided"


def speed_verdict(speed_ups: list[float]) -> str:
    low, high = bounds(speed_ups)
    if low <= 1:
        return "slower" if high < 1 else "undecided"
    if low <= PAPER_SPEED <= high:
        return f"faster; consistent with {PAPER_SPEED}"
    return f"faster, but by {'less' if high < PAPER_SPEED else 'more'}"
