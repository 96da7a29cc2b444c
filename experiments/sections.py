"""Sections of docs/results.md on the worlds and on the law, from their committed results."""

import contextlib
import io
import json
import statistics

import signal_theory
from experiments import difficulty, lucky, staircase, twin
from experiments.results import interval, paired
from plumbing.run import read_jsonl

STAIRCASE_LABELS = {
    "grpo": "GRPO",
    "self": "D = 0: asked again, no guide",
    "near": "NPO, near guide",
    "far": "NPO, far guide",
    "near-no-is": "NPO, near guide, without IS",
}


def table(header: str, rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([f"| {header} |", "|" + "---|" * len(header.split(" | ")), *lines])


def difficulties() -> str:
    """pass@1 and pass@8 of each base by what the prompts need."""
    found, cells = json.loads(difficulty.RESULTS.read_text()), {}
    for row in found["rows"]:
        text = [f"{row['count']}", f"{row['pass@1']:.5f}", f"{row['pass@8']:.4f}"]
        cells.setdefault((row["world"], row["prompts"]), {})[row["split"]] = text
    rows = [[*key, *of["training"], *of.get("held-out", [""] * 3)] for key, of in cells.items()]
    header = "world | prompts | training | pass@1 | pass@8 | held out | pass@1 | pass@8"
    return table(header, rows)


def lucky_shares() -> str:
    rows = []
    for world in lucky.SEEDS:
        lines = [line for line in read_jsonl(lucky.RESULTS) if line["world"] == world]
        shares = [line["lucky"] / line["verified"] for line in lines]
        each = ", ".join(f"{line['lucky']} of {line['verified']}" for line in lines)
        seeds = f"{lines[0]['seed']} to {lines[-1]['seed']}"
        rows.append([world, seeds, each, f"{statistics.fmean(shares):.0%}"])
    return table("world | seeds | lucky answers in each cache | mean share", rows)


def staircases() -> str:
    lines = {(line["row"], line["seed"]): line for line in read_jsonl(staircase.RESULTS)}
    seeds = sorted({seed for _, seed in lines})
    ends = {r: [lines[r, seed]["evals_b"][-1][1] for seed in seeds] for r in STAIRCASE_LABELS}
    rows = []
    for row, label in STAIRCASE_LABELS.items():
        q = "; ".join(f"{lines[row, s]['q']:.2f}" for s in seeds if "q" in lines[row, s])
        middle = [lines[row, seed]["evals_b"][2][1] for seed in seeds]
        cells = ["; ".join(f"{value:.5f}" for value in values) for values in (middle, ends[row])]
        rows.append([label, q, *cells])
    start = "; ".join(f"{lines['grpo', seed]['evals_b'][0][1]:.5f}" for seed in seeds)
    half = staircase.PLATEAU + staircase.WINDOW // 2
    header = f"row | q of the guide | B at step {half} | B at step {half + staircase.WINDOW // 2}"
    gain = interval(paired(ends["near"], ends["self"]), 4)
    return f"""Seeds {"; ".join(map(str, seeds))}, in this order in every cell. All rows start at
step {staircase.PLATEAU}, with B at {start}.

{table(header, rows)}

Near minus D = 0 at the end: {gain}."""


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
