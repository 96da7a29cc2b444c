"""docs/results.md (through results_template.md) and its figures, from the committed lines alone.

    python -m experiments.tables    # docs/results.md, docs/figures/{early,compare}.svg

Intervals are 95 %, Student's t over the seeds. Differences are paired: a row minus another row with
the same seed. "Equal tokens" is GRPO's last evaluation before it had sampled as many tokens as the
row did in all, guide included.
"""

import contextlib
import statistics

import matplotlib
import numpy
from matplotlib.figure import Figure

import signal_theory
from experiments import sections
from experiments.results import (
    PAPER_SPEED,
    Result,
    interval,
    paired,
    results,
    speed_verdict,
    verdict,
)
from experiments.runs import HERE, ROOT, SCOUT, STEPS, WINDOW
from experiments.sections import table
from plumbing.figures import draw_law
from plumbing.metrics import T_975, bounds
from plumbing.report import first_reach

DOCS = ROOT / "docs"
TEMPLATE = HERE / "results_template.md"
ROWS = {  # of the comparison: label and colour
    "grpo": ("GRPO", "black"),
    "grpo-16": ("GRPO, G = 16", "C7"),
    "luffy": ("LUFFY", "C2"),
    "luffy-unshaped": ("LUFFY without shaping", "C5"),
    "exgrpo": ("ExGRPO", "C4"),
    "rlep": ("RLEP", "C3"),
    "early": ("NPO early", "C1"),
    "early-no-is": ("NPO early without IS", "C6"),
    "early-teacher": ("NPO early, guide: teacher", "C2"),
    "early-far": ("NPO early, guide: far future", "C3"),
    "late": ("NPO late", "C0"),
    "early+late": ("NPO early + late", "C8"),
    "autonpo": ("AutoNPO", "C9"),
}
LABELS = {row: label for row, (label, _) in ROWS.items()}
EARLY_LABELS = {  # the group "early"
    "grpo": "GRPO",
    "early": f"NPO, guide from step {SCOUT}",
    "self": "D = 0: asked again, no guide",
    "grpo-16": "GRPO, G = 16",
}
OTHERS = ("grpo", "luffy", "exgrpo", "rlep", "early")  # the curves of a figure's two halves
OURS = ("grpo", "grpo-16", "early", "late", "early+late", "autonpo")
BY_DEFINITION = {"luffy", "luffy-unshaped", "rlep", "early-no-is"}  # ratios are pi, or 1
GOALS = (0.5, 0.8)  # shares of the same seed's final GRPO accuracy
BARELY = 0.05  # of held-out accuracy: our reading of "barely changes"
CLAIMS = (  # (claim of the paper, the row that it says is better, the worse one)
    ("NPO early ends above GRPO", "early", "grpo"),
    ("NPO early + late ends above GRPO", "early+late", "grpo"),
    ("AutoNPO ends above GRPO", "autonpo", "grpo"),
    ("a late intervention breaks through a plateau (this world has none)", "late", "grpo"),
    ("early + late ends above early alone", "early+late", "early"),
    ("AutoNPO ends above the manual interventions", "autonpo", "early+late"),
    ("the near future is a better source than the teacher", "early", "early-teacher"),
    ("the near future is a better source than the far future", "early", "early-far"),
    ("NPO early ends above LUFFY", "early", "luffy"),
    ("NPO early ends above ExGRPO", "early", "exgrpo"),
    ("NPO early ends above RLEP", "early", "rlep"),
    ("GRPO ends above LUFFY", "grpo", "luffy"),
    ("ExGRPO ends above GRPO", "exgrpo", "grpo"),
    ("RLEP ends above GRPO", "rlep", "grpo"),
    ("RLEP ends above ExGRPO", "rlep", "exgrpo"),
)
LAX = "e3310138ddab"  # the base of the lax world, in the result lines


# --------------------------------------------------------------------------------------------------
# Sections of the page. `runs`: of every row, GRPO's up to STEPS; `long`: GRPO that goes on
# --------------------------------------------------------------------------------------------------


def early(runs: dict[str, list[Result]]) -> str:
    """The section on early bootstrapping. GRPO goes on until step LONG."""
    header = "method | steps to the scout's final accuracy | GRPO's steps over its | with the "
    header += "scout's steps counted | tokens, all counted | GRPO's tokens over its | accuracy at "
    header += f"step {WINDOW} | GRPO's at equal tokens"
    scouts, rows = [run.until(SCOUT) for run in runs["grpo"]], []
    goals = [scout.accuracy for scout in scouts]
    alone = {key: to_goals(scouts, goals, key)[0] for key in ("step", "sampled_tokens")}
    for row, mine in runs.items():
        ends = [run.until(WINDOW) for run in mine]
        (steps, missed), (tokens, _) = (to_goals(mine, goals, key) for key in alone)
        cells = [EARLY_LABELS[row], interval(steps, 1) + (f" ({missed} never)" if missed else "")]
        ratios = [""] * 3
        if row != "grpo":
            ratios[0] = interval([a / b for a, b in zip(alone["step"], steps)])
            ratios[2] = interval([a / b for a, b in zip(alone["sampled_tokens"], tokens)])
        if row == "early":
            ratios[1] = interval([a / (b + SCOUT) for a, b in zip(alone["step"], steps)])
        cells += [*ratios[:2], f"{statistics.fmean(tokens) / 1000:.0f}k", ratios[2]]
        cells.append(interval([run.accuracy for run in ends], 3))
        equal = [one["eval/accuracy"] for one in equal_tokens(runs["grpo"], ends)]
        rows.append([*cells, interval(equal, 3) if row != "grpo" else ""])
    goal = interval([scout.accuracy for scout in scouts], 3)
    differences = [
        f"NPO minus {EARLY_LABELS[row]} {interval(paired(*at_window(runs, 'early', row)), 3)}"
        for row in runs
        if row != "early"
    ]
    return f"""{table(header, rows)}

Scout's final accuracy: {goal}. At step {WINDOW}: {"; ".join(differences)}."""


def to_goals(runs: list[Result], goals: list[float], key: str) -> tuple[list[float], int]:
    """Where each run first reaches its goal, and how many never do: of these the end counts."""
    found = [first_reach(run.evals, goal, key) for run, goal in zip(runs, goals)]
    last = [run.evals[-1][key] for run in runs]
    return [end if at is None else at for at, end in zip(found, last)], found.count(None)


def at_window(runs: dict[str, list[Result]], *rows: str) -> list[list[float]]:
    return [[run.until(WINDOW).accuracy for run in runs[row]] for row in rows]


def reach(runs: list[Result], goals: list[float], key: str) -> str:
    """Where the runs first reach their goals. Those that start beyond, or never do, are counted."""
    found, begun = [], 0
    for run, goal in zip(runs, goals):
        beyond = run.evals[0]["eval/accuracy"] >= goal
        begun += beyond
        found.append(None if beyond else first_reach(run.evals, goal, key))
    if begun == len(runs):
        return "before it goes back"
    unit = 1000 if key == "sampled_tokens" else 1
    reached = [value / unit for value in found if value is not None]
    count = f"{len(reached)} of {len(runs)} runs"
    if len(reached) < 2:
        return count
    return interval(reached, 0) + (f" ({count})" if len(reached) < len(runs) else "")


def equal_tokens(long: list[Result], runs: list[Result]) -> list[dict]:
    """GRPO's evaluations at the tokens that these runs sampled."""
    return [mine.at_tokens(run.tokens) for mine, run in zip(long, runs)]


def beyond_equal(runs: list[Result], long: list[Result]) -> list[float]:
    """Accuracies minus GRPO's at equal tokens."""
    theirs = [line["eval/accuracy"] for line in equal_tokens(long, runs)]
    return paired([run.accuracy for run in runs], theirs)


def comparison(runs: dict[str, list[Result]], long: list[Result]) -> str:
    plain = [run.accuracy for run in runs["grpo"]]
    base = [run.evals[0]["eval/accuracy"] for run in runs["grpo"]]
    goals = "".join(f"steps to {goal:.0%} | thousand tokens to {goal:.0%} | " for goal in GOALS)
    header = f"method | held-out accuracy at step {STEPS} | minus GRPO | minus GRPO, equal tokens"
    header += f" | thousand tokens in all | {goals}largest ratio | entropy at the end"
    rows = [["base", interval(base, 3), interval(paired(base, plain), 3)] + [""] * 8]
    for row, mine in runs.items():
        ends = [run.accuracy for run in mine]
        cells = [LABELS[row], interval(ends, 3), "", ""]
        if row != "grpo":
            cells[2] = interval(paired(ends, plain), 3)
            cells[3] = interval(beyond_equal(mine, long), 3)
        cells.append(f"{statistics.fmean(run.tokens for run in mine) / 1000:,.0f}")
        for share in GOALS:
            levels = [share * accuracy for accuracy in plain]
            cells += [reach(mine, levels, key) for key in ("step", "sampled_tokens")]
        ratios = [run.line["npo/guide_ratio_max"] or 0 for run in mine]
        cells.append(f"{max(ratios):.3g}" if any(ratios) and row not in BY_DEFINITION else "")
        rows.append([*cells, interval([run.entropy[-1][1] for run in mine], 3)])
    costliest = max(runs, key=lambda row: sum(run.tokens for run in runs[row]))
    same = equal_tokens(long, runs[costliest])
    ends = [e["eval/accuracy"] for e in same]
    step, tokens = (statistics.fmean(e[key] for e in same) for key in ("step", "sampled_tokens"))
    name = f"GRPO, as many tokens as {LABELS[costliest]} (step {step:.0f})"
    differences = interval(paired(ends, plain), 3)
    rows.append([name, interval(ends, 3), differences, "", f"{tokens / 1000:,.0f}"] + [""] * 6)
    return table(header, rows)


def clear_cases(gains: dict[str, list[float]], digits: int) -> tuple[str, str]:
    """The rows whose gains are clearly below 0, and those clearly above, with their means."""
    lists = [], []
    for row, gain in gains.items():
        low, high = bounds(gain)
        if high < 0 or low > 0:
            lists[low > 0].append(f"{LABELS[row]} ({statistics.fmean(gain):+.{digits}f})")
    return "; ".join(lists[0]) or "no row", "; ".join(lists[1]) or "no row"


def at_equal_tokens(runs: dict[str, list[Result]], long: list[Result]) -> str:
    gains = {row: beyond_equal(mine, long) for row, mine in runs.items() if row != "grpo"}
    behind, ahead = clear_cases(gains, 3)
    best = max(gains, key=lambda row: sum(gains[row]))
    return f"""**At equal tokens** GRPO is clearly ahead of: {behind}. Clearly ahead of it: {ahead}.
The best mean is that of {LABELS[best]}: {interval(gains[best], 3)}."""


def steps_to(share: float, runs: dict[str, list[Result]]) -> dict[str, list[float]]:
    """Steps to that share of GRPO's final accuracy, for the rows whose runs all get there."""
    goals, found = [share * run.accuracy for run in runs["grpo"]], {}
    for row, mine in runs.items():
        steps = [first_reach(run.evals, goal) for run, goal in zip(mine, goals)]
        if None not in steps and mine[0].evals[0]["step"] == 0:  # late starts beyond
            found[row] = steps
    return found


def against_early(runs: dict[str, list[Result]]) -> str:
    steps = steps_to(GOALS[0], runs)
    early = steps.pop("early", None)
    gains = {row: paired(early, mine) for row, mine in steps.items() if early}
    more, fewer = clear_cases(gains, 0)
    return f"""**In steps to {GOALS[0]:.0%}** (NPO early's minus theirs) NPO early is clearly slower
than: {fewer}. Clearly faster than: {more}."""


def claims(runs: dict[str, list[Result]]) -> str:
    final = {row: [run.accuracy for run in mine] for row, mine in runs.items()}
    rows = []

    def minus(better: str, worse: str) -> str:
        difference = interval(paired(final[better], final[worse]), 3)
        return f"{LABELS[better]} minus {LABELS[worse]}: {difference}"

    for claim, better, worse in CLAIMS:
        says = verdict(paired(final[better], final[worse]))
        rows.append([claim, minus(better, worse), says])
    for share in GOALS:
        steps = steps_to(share, runs)
        for claim, row, before in (
            (f"early is about {PAPER_SPEED} times as fast (replay alone)", "early", 0),
            (f"the same with the scout's {SCOUT} steps counted", "early", SCOUT),
            ("GRPO with G = 16, no guide, by the same measure", "grpo-16", 0),
        ):
            measured, says = "not every run gets there", "undecided"
            if "grpo" in steps and row in steps:
                speed = [a / (b + before) for a, b in zip(steps["grpo"], steps[row])]
                measured, says = interval(speed), speed_verdict(speed)
            rows.append([claim, f"GRPO's steps to {share:.0%} over its: {measured}", says])
    low, high = bounds(paired(final["early-no-is"], final["early"]))
    within = low > -BARELY and high < BARELY
    says = "holds" if within else "undecided" if low <= 0 <= high else "not confirmed"
    claim = f"NPO barely changes without IS (by less than {BARELY}, our margin; the sources say it "
    claim += "of the *late* stage, this is the early one)"
    rows.append([claim, minus("early-no-is", "early"), says])
    other = f"not run. Without *shaping*, w in place of f(w): {minus('luffy-unshaped', 'luffy')}"
    rows.append(["LUFFY without importance sampling collapses", other, "not tested"])
    return table("claim | measured here | verdict", rows)


# --------------------------------------------------------------------------------------------------
# Figures and page
# --------------------------------------------------------------------------------------------------


def curve(axes, runs, label, color, key="step", style="-", shift=0, seeds=False) -> None:
    """Mean over seeds with its 95 % interval, and every seed's own curve if wanted."""
    unit = 1000 if key == "sampled_tokens" else 1
    where = numpy.array([[line[key] for line in run.evals] for run in runs], float) / unit + shift
    values = numpy.array([[line["eval/accuracy"] for line in run.evals] for run in runs])
    grid = where.mean(axis=0)
    on_grid = numpy.array([numpy.interp(grid, x, y) for x, y in zip(where, values)])
    half = T_975[len(runs)] * on_grid.std(axis=0, ddof=1) / len(runs) ** 0.5
    mean = on_grid.mean(axis=0)
    axes.plot(grid, mean, style, color=color, label=label)
    axes.fill_between(grid, mean - half, mean + half, color=color, alpha=0.12, linewidth=0)
    for x, y in zip(where, values) if seeds else ():
        axes.plot(x, y, color=color, lw=0.5, alpha=0.5)


def draw_early(runs: dict[str, list[Result]]) -> None:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key in ((left, "step"), (right, "sampled_tokens")):
        for (row, mine), color in zip(runs.items(), ("black", "C1", "C0", "C7")):
            own = row in ("grpo", "early")
            curve(axes, mine, EARLY_LABELS[row], color, key, "-" if own else "--", seeds=own)
    curve(left, runs["early"], "NPO, the scout's steps counted", "C1", style=":", shift=SCOUT)
    left.set(xlabel="step", ylabel="held-out accuracy", ylim=(0, None), xlim=(0, WINDOW + SCOUT))
    right.set(xlabel="thousand sampled tokens, scout and guide cache counted", xlim=(0, None))
    left.legend(fontsize=8)
    save(figure, "early.svg")


def draw_comparison(runs: dict[str, list[Result]], long: list[Result]) -> None:
    figure = Figure(figsize=(12, 8), layout="constrained")
    for panels, rows in zip(figure.subplots(2, 2, sharey=True), (OTHERS, OURS)):
        for axes, key in zip(panels, ("step", "sampled_tokens")):
            for row in rows:
                curve(axes, runs[row], *ROWS[row], key)
        curve(panels[1], long, "GRPO that goes on", "black", "sampled_tokens", ":")
        panels[0].set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1))
        panels[1].set(xlabel="thousand sampled tokens, guides' included", xlim=(0, None))
        panels[1].legend(fontsize=8)
    save(figure, "compare.svg")


def save(figure: Figure, name: str) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    with matplotlib.rc_context({"svg.hashsalt": "npo"}):  # the same file from the same numbers
        figure.savefig(DOCS / "figures" / name, metadata={"Date": None, "Creator": None})


def commands(runs: dict[str, list[Result]]) -> str:
    lines = "\n".join(f"{mine[0].line['command']}    # {row}" for row, mine in runs.items())
    return f"<details><summary>Commands, first seed</summary>\n\n```\n{lines}\n```\n\n</details>"


def at_steps(compared: dict[str, list[Result]]) -> dict[str, list[Result]]:
    """The comparison's rows; GRPO, which goes on as the control at equal tokens, until STEPS."""
    return compared | {"grpo": [run.until(STEPS) for run in compared["grpo"]]}


def results_page() -> str:
    """All of docs/results.md."""
    first, compared = every_result()
    runs, long = at_steps(compared), compared["grpo"]
    lines = [run.line for mine in compared.values() for run in mine]
    assert {line["base"] for line in lines} == {LAX}, "say in the template where it was measured"
    return TEMPLATE.read_text().format(
        scout=SCOUT,
        window=WINDOW,
        steps=STEPS,
        difficulty=sections.difficulties(),
        lucky=sections.lucky_shares(),
        early=early(first),
        early_seeds=", ".join(str(run.line["seed"]) for run in first["grpo"]),
        early_commit=", ".join(sorted({run.line["commit"] for run in first["grpo"]})),
        early_commands=commands(first),
        law=sections.law(),
        twin=sections.twins(),
        staircase=sections.staircases(),
        seeds=", ".join(str(run.line["seed"]) for run in long),
        comparison=comparison(runs, long),
        equal_tokens=at_equal_tokens(runs, long),
        against_early=against_early(runs),
        compare_commands=commands(compared),
        claims=claims(runs),
        count=len(long),
        least=2 / 2 ** len(long),
    )


def every_result() -> tuple[dict[str, list[Result]], dict[str, list[Result]]]:
    """Of the groups "early" and "compare"."""
    return results("early.jsonl", EARLY_LABELS), results("compare.jsonl", LABELS)


def main() -> None:
    first, compared = every_result()
    (DOCS / "results.md").write_text(results_page())
    draw_early(first)
    draw_comparison(at_steps(compared), compared["grpo"])
    with contextlib.redirect_stdout(None):
        draw_law(signal_theory.print_law(), DOCS / "figures" / "law.png")


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
