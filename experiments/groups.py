"""Sections of docs/results.md: the groups of docs/protocol.md, from their lines."""

import statistics
from collections.abc import Iterable

from experiments.plan import AFTER, GROUPS, LONGER, PLATEAU, RIVALS, ROWS, SCOUT, WINDOW
from experiments.results import Runs, catch_ups, speed_ups
from experiments.student import bounds, detectable, geometric, interval, sameness, verdict

MISSING = "not run yet"
STUCK = 0.005  # B of a start: below it is a plateau
END, LATER = PLATEAU + AFTER, PLATEAU + LONGER  # last steps on the staircase, LATER of four arms
ARM_LABELS = {  # of plateau and one
    "grpo": "GRPO",
    "grpo-16": "GRPO, G = 16",
    "self": "D = 0: asked again",
    "low": "guide: B > .01",
    "lower": "guide: B > .16",
    "near": "near guide: B > .36",
    "far": "far guide: B > .90",
    "near-no-is": "near, without IS",
    "far-no-is": "far, without IS",
}
FUTURE_LABELS = {"grpo": "GRPO"}
FUTURE_LABELS |= {f"early-{step}": f"early, guide from step {step}" for step in (40, 80, 160)}
FUTURE_LABELS["late-grpo"] = "GRPO, the late rows' seeds"
FUTURE_LABELS |= {f"late-{step}": f"late, guide from step {step}" for step in (80, 120, 160)}
FUTURE_LABELS |= {"late-160-no-is": "late, step 160, without IS"}
CARD_LABELS = {"grpo": "GRPO", "grpo-16": "GRPO, G = 16", "self": "D = 0: asked again"}
CARD_LABELS |= {f"{step}": f"guide from step {step}" for step in (10, 20, 40, 80, 160)}
CARD_LABELS |= {
    "teacher": "guide: teacher",
    "40-no-is": "step 40, without IS",
    "160-no-is": "step 160, without IS",
    "40-slots-2": "step 40, 2 slots",
    "40-slots-4": "step 40, 4 slots",
}
RIVAL_LABELS = {
    "luffy": "LUFFY",
    "luffy-160": "LUFFY, step 160 its teacher†",
    "exgrpo": "ExGRPO",
    "rlep": "RLEP",
    "future": "step 40, gate .6",
    "teacher": "teacher, gate .6",
    "teacher-no-is": "teacher, gate .6, without IS†",
    "future-failed": "step 40, where all failed",
    "past-failed": "step 20, where all failed",
    "teacher-failed": "teacher, where all failed",
}
LAX_LABELS = {"grpo": "GRPO", "40": "near: step 40", "160": "far: step 160"}
LAX_LABELS |= {"40-no-is": "near, without IS", "160-no-is": "far, without IS"}
ON = "minus GRPO gone on†"  # from the guide, for as many steps as the row takes
EQUAL = "thousand tokens | GRPO at equal tokens | minus that"


# ---- Cells ---------------------------------------------------------------------------------------


def table(header: str, rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([f"| {header} |", "|" + "---|" * len(header.split(" | ")), *lines])


def digits_of(values: list[float]) -> int:
    """3, or 5 where the mean is small, as that of B is in a plateau."""
    return 5 if values and 0 < abs(statistics.fmean(values)) <= 0.01 else 3


def mean(values: list[float], digits: int | None = None) -> str:
    """With its interval, if there are two values."""
    digits = digits_of(values) if digits is None else digits
    if len(values) < 2:
        return ", ".join(f"{value:.{digits}f}" for value in values) or MISSING
    return interval(values, digits)


def minus(values: list[float]) -> str:
    """Paired differences; where undecided, in parentheses what could have been detected."""
    if verdict(values) != "undecided":
        return mean(values)
    return f"{mean(values)} ({detectable(values):.{digits_of(values)}f})"


def same(values: list[float]) -> str:
    """A paired difference that should be none, with the interval of the test, and its outcome."""
    if len(values) < 2:
        return mean(values)
    low, high = bounds(values, 0.90)
    return f"{mean(values)}, 90 % [{low:z.3f}, {high:z.3f}]: {sameness(values)}"


def ratio(values: list[float]) -> str:
    """Geometric mean and interval."""
    if len(values) < 2:
        return ", ".join(f"{value:.3g}" for value in values) or MISSING
    middle, low, high = geometric(values)
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def thousands(values: list[float]) -> str:
    return f"{statistics.fmean(values) / 1000:,.0f}" if values else MISSING


def steps_to(reached: list[tuple[float, bool]], start: int = 0) -> str:
    """The mean of what `Result.reach` finds, and how many runs are cut at the window's end."""
    if not reached:
        return ""
    cut = sum(cut for _, cut in reached)
    if cut == len(reached):
        return "not reached"
    return mean([step - start for step, _ in reached], 0) + (f" ({cut} cut)" if cut else "")


def seeds(runs: Runs, row: str, elsewhere: int = 0) -> str:
    """How many there are, and what is missing; so many are reported elsewhere."""
    have, out = len(runs.of.get(row, ())), len(runs.left_out.get(row, ()))
    wanted = len(GROUPS[row.split("/")[0]][1]) - out - elsewhere
    text = f"{have}" if have == wanted else f"{have} of {wanted}"
    return text + (f", {out} left out" if out else "")


def commands(runs: Runs, group: str) -> str:
    """Of each row's first seed."""
    of = {row: runs.of[row] for row in ROWS if row.startswith(f"{group}/") and row in runs.of}
    text = "\n".join(found[min(found)].line["command"] for found in of.values())
    made = sorted({run.line["commit"] for found in of.values() for run in found.values()})
    head = f"<details><summary>Commands of the first seeds; commits {', '.join(made)}</summary>"
    return f"{head}\n\n```\n{text}\n```\n\n</details>"


def whole(section):
    """A section of a group, with its commands, or that it is not run yet."""

    def made(runs: Runs, group: str) -> str:
        if not any(row.startswith(f"{group}/") for row in runs.of):
            return "Not run yet."
        return f"{section(runs, group)}\n\n{commands(runs, group)}"

    return made


# ---- Measures that several tables share ----------------------------------------------------------


def stuck(runs: Runs, of_plateau: bool = True) -> Runs:
    """The seeds whose start is a plateau, or those whose start is none."""
    starts = runs.of.get("plateau/start", {})
    return runs.only([s for s, run in starts.items() if (run.accuracy < STUCK) == of_plateau])


def left(runs: Runs, row: str, step: int) -> str:
    """How many runs are out of the plateau."""
    ends = runs.at(row, step)
    return f"{sum(b >= STUCK for b in ends)} of {len(ends)}" if ends else MISSING


def at_equal_tokens(runs: Runs, row: str, plain: str) -> tuple[list[float], list[float], int]:
    """Differences to GRPO's last evaluation before it had sampled as many tokens, GRPO's accuracies
    there, and how many of GRPO's runs had ended before."""
    pairs = runs.together(row, plain)
    theirs = [b.at_tokens(a.tokens)["eval/accuracy"] for a, b in pairs]
    ended = sum(b.tokens < a.tokens for a, b in pairs)
    return [a.accuracy - value for (a, _), value in zip(pairs, theirs)], theirs, ended


def equal_cells(runs: Runs, row: str, plain: str) -> list[str]:
    differences, theirs, ended = at_equal_tokens(runs, row, plain)
    tokens = [a.tokens for a, _ in runs.together(row, plain)]
    note = f" ({ended} ended before)" if ended else ""
    return [thousands(tokens), mean(theirs) + note, minus(differences) + ahead(differences)]


def ahead(differences: list[float]) -> str:
    """In how many runs, as an interval says little of what has one large outlier."""
    if not differences:
        return ""
    equal = differences.count(0)
    text = f", ahead in {sum(d > 0 for d in differences)} of {len(differences)}"
    return text + (f", equal in {equal}" if equal else "")


def against(runs: Runs, row: str, others: Iterable[str], step: int) -> list[str]:
    """Differences at a step, none to itself."""
    return ["" if row == other else minus(runs.minus(row, other, step)) for other in others]


# ---- The groups ----------------------------------------------------------------------------------


@whole
def plateau(runs: Runs, group: str) -> str:
    """plateau, of the seeds that start in one, or one: the arms from the start on."""
    chosen, others = (runs, runs.only(())) if group == "one" else (stuck(runs), stuck(runs, False))
    away = sorted(others.of.get("plateau/start", ()))
    arms = {
        f"{group}/{name}": label for name, label in ARM_LABELS.items() if f"{group}/{name}" in ROWS
    }
    shown, first, second = (END - 20, END - 10, END, LATER - AFTER, LATER), [], []
    for row, label in arms.items():
        steps = [step for step in shown if step <= END or f"--steps {LATER}" in ROWS[row].command]
        guides = [run.line["guide_b"] for (run,) in chosen.together(row) if "guide_b" in run.line]
        cells = [label, seeds(chosen, row, len(away)), mean(guides, 3) if guides else ""]
        cells += [mean(chosen.at(row, step)) for step in steps] + [""] * (len(shown) - len(steps))
        until = [run.reach(0.5, LATER) for (run,) in chosen.together(row) if LATER in steps]
        first.append([*cells, steps_to(until, PLATEAU)])
        cells = [label]
        for step in (END, LATER):
            gaps = against(chosen, row, (f"{group}/self", f"{group}/grpo"), step)
            cells += [left(chosen, row, step), *gaps] if step in steps else [""] * 3
        times = ratio(chosen.over(row, f"{group}/self", END))
        second.append([*cells, "" if row == f"{group}/self" else times])
    header = "arm | seeds | guide's B | " + " | ".join(f"B at +{s - PLATEAU}" for s in shown)
    header += " | steps to B > .5"
    ends = [f"out at +{n} | minus D = 0 at +{n} | minus GRPO at +{n}" for n in (AFTER, LONGER)]
    starts = [run.accuracy for (run,) in chosen.together(f"{group}/start")]
    near, far = f"{group}/near", f"{group}/far"
    said = [f"B at the start: {mean(starts)} ({len(starts)} seeds). *Out*: B of {STUCK} or more."]
    for step in (END - 10, END, LATER - AFTER, LATER):
        gap = minus(chosen.minus(near, far, step))
        factor = ratio(chosen.over(near, far, step))
        said.append(f"Near minus far at +{step - PLATEAU}: {gap}; near over far: {factor}.")
    for name, row in (("Near", near), ("Far", far)):
        if f"{row}-no-is" in ROWS:
            gap = same(chosen.minus(f"{row}-no-is", row, END))
            said.append(f"{name}, without IS minus with, at +{AFTER}: {gap}.")
    if away:
        each = [
            f"{label} {', '.join(f'{value:.3f}' for value in others.at(row, END))}"
            for row, label in arms.items()
            if others.at(row, END)
        ]
        which = ", ".join(map(str, away))
        said.append(f"\n\nStarts in no plateau (seeds {which}), B at +{AFTER}: {'; '.join(each)}.")
    ends.append(f"ratio of B to D = 0's at +{AFTER}")
    tables = table(header, first), table(f"arm | {' | '.join(ends)}", second)
    return "\n\n".join([*tables, " ".join(said)])


def late(runs: Runs) -> Runs:
    """The seeds whose own run is in a plateau when it is gone back to."""
    plain = runs.together("future/grpo")
    return runs.only([run.line["seed"] for (run,) in plain if run.at(PLATEAU) < STUCK])


@whole
def future(runs: Runs, group: str) -> str:
    """A run's own future, early and late; late ones of the seeds that start in a plateau."""
    plain, rows = f"{group}/grpo", []
    for name, label in FUTURE_LABELS.items():
        row, of = f"{group}/{name}", late(runs) if name.startswith("late") else runs
        if name == "late-grpo":
            row = plain
        found = of.together(row)
        reached = steps_to([run.reach(0.5, END) for (run,) in found])
        cells = [label, f"{len(found)}", mean(of.at(row, END)), left(of, row, END), reached]
        if row == plain:
            tokens = [run.at(END, "sampled_tokens") for (run,) in found]
            rows.append([*cells, "", "", thousands([t for t in tokens if t]), "", ""])
            continue
        guide, start = int(name.split("-")[1]), PLATEAU if name.startswith("late") else 0
        on = minus(of.minus(row, plain, END, guide + END - start))
        cells += [*against(of, row, (plain,), END), on]
        rows.append(cells + equal_cells(of, row, plain))
    header = f"row | seeds | B at step {END} | out | step with B > .5 | minus GRPO | {ON} | {EQUAL}"
    of, away = late(runs), runs.at(plain, PLATEAU)
    late_160, no_is = f"{group}/late-160", f"{group}/late-160-no-is"
    without = same(of.minus(no_is, late_160, END))
    equal = at_equal_tokens(runs, late_160, plain)[0]
    return f"""{table(header, rows)}

*Late* rows are of the {len(of.together(plain))} of {len(away)} seeds whose GRPO is in a plateau at
step {PLATEAU}. Late, without IS minus with (the paper's ablation): {without}. On all {len(away)}
seeds, late from step 160 minus GRPO: {minus(runs.minus(late_160, plain, END))}, at equal tokens
{minus(equal)}; without IS minus with: {minus(runs.minus(no_is, late_160, END))}."""


@whole
def cards(runs: Runs, group: str) -> str:
    plain, first, second = f"{group}/grpo", [], []
    for name, label in CARD_LABELS.items():
        row, scout = f"{group}/{name}", int(name.split("-")[0]) if name[0].isdigit() else 0
        cells = [label, seeds(runs, row), *(mean(runs.at(row, step)) for step in (20, 40, WINDOW))]
        first.append(cells + against(runs, row, (plain, f"{group}/self"), WINDOW))
        if row == plain:
            continue
        pairs = runs.together(row, plain)
        measures, on = [speed_ups(pairs), catch_ups(pairs)], []
        if scout:
            measures.append(catch_ups(pairs, scout))
            on = runs.minus(row, plain, WINDOW, scout + WINDOW)
        cells = [ratio(found) + (f" ({cut} cut)" if cut else "") for found, cut in measures]
        cells += [""] * (3 - len(cells)) + [minus(on) if on else ""]
        second.append([label, *cells, *equal_cells(runs, row, plain)])
    header = f"row | seeds | accuracy at 20 | at 40 | at {WINDOW} | minus GRPO | minus D = 0"
    costs = f"row | speed-up to GRPO's {SCOUT} | to the row's {WINDOW} | with the scout | "
    costs += f"{ON} | {EQUAL}"
    guides = [f"{step}: {mean(runs.at(plain, step))}" for step in (10, 20, 40, 80, 160)]
    near, far = f"{group}/40", f"{group}/160"
    gaps = [f"at {step} {minus(runs.minus(near, far, step))}" for step in (20, 40, WINDOW)]
    without = [same(runs.minus(f"{row}-no-is", row, WINDOW)) for row in (near, far)]
    return f"""{table(header, first)}

The guides' own accuracy, by step: {"; ".join(guides)}. Near (step 40) minus far (160):
{"; ".join(gaps)}. Without IS minus with, at {WINDOW}: step 40 {without[0]}; step 160 {without[1]}.

{table(costs, second)}

*Speed-up*: GRPO's steps to its own accuracy at step {SCOUT}, over the row's; a run that has not got
there by step {WINDOW} is *cut* and counts as {WINDOW}. Then GRPO's steps to the row's own accuracy
at step {WINDOW}, over {WINDOW}, and over {WINDOW} and the scout's steps; here GRPO is cut at its
end, and counts with 1 step at least. *GRPO gone on*: from the guide, for {WINDOW} more steps. The
teacher's training is not counted."""


@whole
def rivals(runs: Runs, group: str) -> str:
    plain, both = "cards/grpo", runs.only(GROUPS[group][1])
    rows = [["GRPO", f"{len(both.at(plain, RIVALS))}", mean(both.at(plain, RIVALS))] + [""] * 5]
    for name, label in RIVAL_LABELS.items():
        row = f"{group}/{name}"
        cells = [label, seeds(runs, row), mean(runs.at(row, RIVALS))]
        cells += against(runs, row, (plain, f"{group}/future"), RIVALS)
        ended = at_equal_tokens(runs, row, plain)[2]
        longer = "autonpo/cards-grpo" if ended else plain  # the same for more steps
        rows.append(cells + equal_cells(runs, row, longer))
    return table(
        f"row | seeds | accuracy at {RIVALS} | minus GRPO | minus step 40, gate .6 | {EQUAL}", rows
    )


@whole
def lax(runs: Runs, group: str) -> str:
    plain, rows = f"{group}/grpo", []
    for name, label in LAX_LABELS.items():
        row = f"{group}/{name}"
        share = "" if row == plain else mean(lucky_shares(runs, row), 2)
        cells = [label, seeds(runs, row), share, mean(runs.at(row, WINDOW))]
        rows.append(cells + against(runs, row, (plain,), WINDOW))
    near, far = f"{group}/40", f"{group}/160"
    without = [same(runs.minus(f"{row}-no-is", row, WINDOW)) for row in (near, far)]
    header = f"row | seeds | lucky share of its cache | accuracy at {WINDOW} | minus GRPO"
    return f"""{table(header, rows)}

Near minus far at {WINDOW}: {minus(runs.minus(near, far, WINDOW))}. Without IS minus with: near
{without[0]}; far {without[1]}."""


def lucky_shares(runs: Runs, row: str) -> list[float]:
    return [
        r.line["lucky"] / r.line["verified"] for (r,) in runs.together(row) if r.line["verified"]
    ]
