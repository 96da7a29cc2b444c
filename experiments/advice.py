"""The numbers in the prose of results_template.md, each with the verdict that its sentence needs.

    {minus[plateau/near - plateau/self @100]:holds}

is the mean of the paired differences of these rows at step 100. Should the lines say anything else
than *holds*, that is put beside it, and the sentence has to be written anew.
"""

import re
from collections.abc import Callable

from experiments import groups
from experiments.results import Runs, catch_ups
from experiments.student import geometric, sameness, verdict

OTHERWISE = "BUT THE LINES SAY"


class Quoted(str):
    """The text of a number, formatted with the verdict that is expected of it."""

    verdicts: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str, *verdicts: str) -> "Quoted":
        made = cls(text)
        made.verdicts = verdicts
        return made

    def __format__(self, expected: str) -> str:
        fits = not expected or {expected, groups.MISSING} & {*self.verdicts}
        return str(self) if fits else f"{self} {OTHERWISE} {' and '.join(self.verdicts)}"


def chosen(runs: Runs, row: str) -> Runs:
    """Of what starts in a plateau, the seeds for which it is one."""
    if row.startswith("future/late"):
        return groups.late(runs)
    return groups.stuck(runs) if row.startswith("plateau/") else runs


def minus(runs: Runs, mine: str, theirs: str, step: str, later: str = "") -> Quoted:
    """[mine - theirs @step]: paired differences; theirs may have a second @step of their own."""
    steps = int(step), int(later or step)
    found = chosen(runs, mine).minus(mine, theirs, *steps)
    return Quoted.of(groups.minus(found), verdict(found), sameness(found))


def equal(runs: Runs, row: str, plain: str) -> Quoted:
    """[row - GRPO's row]: the difference at equal tokens, and how often the row is ahead."""
    found, _, ended = groups.at_equal_tokens(chosen(runs, row), row, plain)
    note = groups.ahead(found) + (f"; in {ended} GRPO had fewer" if ended else "")
    return Quoted.of(groups.minus(found) + note, verdict(found), sameness(found))


def out(runs: Runs, row: str, step: str) -> Quoted:
    """[row @step]: how many runs are out of the plateau: none, some or all."""
    told = groups.left(chosen(runs, row), row, int(step))
    count, *_, whole = told.split()
    kind = {"0": "none", whole: "all", "not": groups.MISSING}.get(count, "some")
    return Quoted.of(told, kind)


def caught(runs: Runs, row: str, plain: str, scout: str) -> Quoted:
    """[row - GRPO's @scout]: GRPO's steps to the row's end, over the row's and the scout's: more or
    fewer."""
    ratios, cut = catch_ups(runs.together(row, plain), int(scout))
    if len(ratios) < 2:
        return Quoted.of(groups.ratio(ratios), groups.MISSING)
    _, low, high = geometric(ratios)
    kind = "more" if low > 1 else "fewer" if high < 1 else "undecided"
    return Quoted.of(groups.ratio(ratios) + (f" ({cut} cut)" if cut else ""), kind)


def level(runs: Runs, row: str, step: str) -> str:
    """[row @step]: its accuracy."""
    return groups.mean(chosen(runs, row).at(row, int(step)))


def seeds(runs: Runs, row: str) -> str:
    return f"{len(chosen(runs, row).together(row))}"


def lucky_share(runs: Runs, row: str) -> str:
    """[row]: the share of its cache's verified answers that are lucky."""
    return groups.mean(groups.lucky_shares(runs, row), 2)


class Asked:
    """A mapping from the words in brackets to what a function above finds."""

    def __init__(self, find: Callable, runs: Runs):
        self.find, self.runs = find, runs

    def __getitem__(self, words: str) -> str:
        return self.find(self.runs, *re.split(r" - | @", words))


def numbers(runs: Runs) -> dict[str, Asked]:
    """By their names in the template."""
    every = minus, equal, out, caught, level, seeds, lucky_share
    return {find.__name__: Asked(find, runs) for find in every}
