"""The numbers in the prose of results_template.md, each with the verdict that its sentence needs.

    {minus[plateau/near - plateau/self @100]:holds}

is the mean of the paired differences of these rows at step 100. Should the lines say anything else
than *holds*, that is put beside it, and the sentence has to be written anew.
"""

import re
from collections.abc import Callable

from experiments import groups
from experiments.results import Runs, speed_ups
from experiments.student import sameness, verdict

OTHERWISE = "BUT THE LINES SAY"


class Quoted(str):
    """The text of a number, formatted with the verdict that is expected of it."""

    verdicts: tuple[str, ...] = ()

    @classmethod
    def of(cls, differences: list[float], note: str = "") -> "Quoted":
        made = cls(groups.minus(differences) + note)
        made.verdicts = verdict(differences), sameness(differences)
        return made

    def __format__(self, expected: str) -> str:
        fits = not expected or {expected, groups.MISSING} & {*self.verdicts}
        return str(self) if fits else f"{self} {OTHERWISE} {' and '.join(self.verdicts)}"


def chosen(runs: Runs, row: str) -> Runs:
    """Of what starts in a plateau, the seeds for which it is one."""
    if row.startswith("future/late"):
        return groups.late(runs)
    return groups.stuck(runs) if row.startswith("plateau/") else runs


def minus(runs: Runs, mine: str, theirs: str, step: str) -> Quoted:
    """[mine - theirs @step]: paired differences."""
    return Quoted.of(chosen(runs, mine).minus(mine, theirs, int(step)))


def equal(runs: Runs, row: str, plain: str) -> Quoted:
    """[row - GRPO's row]: the difference at equal tokens."""
    found, _, ended = groups.at_equal_tokens(chosen(runs, row), row, plain)
    return Quoted.of(found, f"; in {ended} of {len(found)} GRPO had fewer" if ended else "")


def out(runs: Runs, row: str, step: str) -> str:
    """[row @step]: how many runs are out of the plateau."""
    return groups.left(chosen(runs, row), row, int(step))


def faster(runs: Runs, row: str, plain: str, scout: str) -> str:
    """[row - GRPO's @scout]: GRPO's steps to its accuracy at 40 over its own and the scout's."""
    return groups.ratio(speed_ups(runs.together(row, plain), int(scout))[0])


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
    every = minus, equal, out, faster, seeds, lucky_share
    return {find.__name__: Asked(find, runs) for find in every}
