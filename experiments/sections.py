"""Sections of docs/results.md on the worlds, the law, its twin and TRL, from committed results."""

import contextlib
import io
import json

import signal_theory
from experiments import difficulty, trl_early, twin
from experiments.groups import table


def difficulties() -> str:
    """pass@1 and pass@8 of each base by what the prompts need."""
    found, cells = json.loads(difficulty.RESULTS.read_text()), {}
    for row in found["rows"]:
        text = [f"{row['count']}", f"{row['pass@1']:.5f}", f"{row['pass@8']:.4f}"]
        cells.setdefault((row["world"], row["prompts"]), {})[row["split"]] = text
    rows = [[*key, *of["training"], *of.get("held-out", [""] * 3)] for key, of in cells.items()]
    header = "world | prompts | training | pass@1 | pass@8 | held out | pass@1 | pass@8"
    return table(header, rows)


def law() -> str:
    """What signal_theory.py prints of it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        signal_theory.print_law()
    return f"```\n{printed.getvalue().strip()}\n```"


def by_length(found: dict, cell) -> list[list[str]]:
    """A row for each name, with a cell for each L."""
    names = next(iter(found.values()))
    return [[name, *(cell(of[name]) for of in found.values() if name in of)] for name in names]


def field(row: dict, *keys: str) -> str:
    return "; ".join(twin.shown(row[key]) for key in keys)


def twins() -> str:
    found = json.loads(twin.RESULTS.read_text())
    header = "| L = 1 | L = 2 | L = 3"
    steps = by_length(found["compare"], lambda row: field(row, "steps"))
    field_of = by_length(found["compare"], lambda row: field(row, "mean field"))
    work = by_length(found["compare"], lambda row: field(row, "work"))
    share = by_length(found["choose_guide"], lambda row: f"{row['share of the pull']:.0%}")
    back = by_length(found["choose_rollback"], lambda row: f"{row['chosen']:.0%}")
    then = by_length(
        found["choose_rollback"],
        lambda r: f"{field(r, 'B, rolled back')} ({field(r, 'B, gone on')})",
    )
    return f"""Median steps from the middle of the plateau until B > .5 (95 % intervals over
{found["runs"]} runs):

{table("method " + header, steps)}

The same by the expected pulls alone, without draws. For L = 3 they are too fast for the policy's
own answers: there a success is a rare draw, which most runs wait for.

{table("method " + header, field_of)}

Work, in units of a GRPO step's answers, with the scout's steps and the guide's answers counted:

{table("method " + header, work)}

AutoNPO's rule as a choice of *a guide for a fixed policy*: median share of the best pull.

{table("rule " + header, share)}

As a choice of *a rollback for a fixed guide* (the policy when B first exceeds .2) it nearly always
takes the smallest distance. How often each distance D is chosen:

{table("D " + header, back)}

And rolling back gains nothing here. B after D steps of replay, and (in brackets) after D more
steps of plain GRPO:

{table("D " + header, then)}"""


def through_trl() -> str:
    header = "loop | seeds | GRPO's steps over NPO's | GRPO at step 60 | NPO"
    pairs = trl_early.pairs()
    return table(header, [[loop, *trl_early.cells(of)] for loop, of in pairs.items()])
