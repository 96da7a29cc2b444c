"""docs/results.md (through results_template.md), its figures and README's "What we found", from the
committed lines alone. What is not run yet says so.

    python -m experiments.tables
"""

import contextlib
import re
import sys

import matplotlib
import numpy
from matplotlib.figure import Figure

import signal_theory
from experiments import advice, claims, dynamics, groups, sections
from experiments.plan import LONGER, PLATEAU, WINDOW
from experiments.results import Result, Runs, load
from experiments.runs import HERE, ROOT
from experiments.student import quantile
from plumbing.figures import draw_law

DOCS = ROOT / "docs"
TEMPLATE = HERE / "results_template.md"
MARKED = re.compile(r"(<!-- results -->\n).*?(<!-- end of results -->)", re.DOTALL)  # in README
ARM_COLORS = {  # of the figures
    "grpo": "black",
    "grpo-16": "C7",
    "self": "C0",
    "near": "C1",
    "far": "C3",
    "near-no-is": "C2",
}
CARD_COLORS = {"grpo": "black", "grpo-16": "C7", "self": "C0", "40": "C1", "160": "C3"}


# ---- Figures -------------------------------------------------------------------------------------


def curve(axes, runs: list[Result], label: str, color: str, key="step", shift=0, log=False) -> None:
    """Mean over seeds with its 95 % interval, and every seed's own curve, thin."""
    unit = 1000 if key == "sampled_tokens" else 1
    where = numpy.array([[line[key] for line in run.evals] for run in runs], float) / unit - shift
    values = numpy.array([[line["eval/accuracy"] for line in run.evals] for run in runs])
    values = numpy.log10(numpy.maximum(values, 1e-7)) if log else values  # lines have 7 digits
    grid = where.mean(axis=0)
    on_grid = numpy.array([numpy.interp(grid, x, y) for x, y in zip(where, values)])
    band(axes, grid, on_grid, label, color)
    for x, y in zip(where, values):
        axes.plot(x, y, color=color, lw=0.5, alpha=0.4)


def band(axes, grid, values, label: str, color: str) -> None:
    """The mean of the rows of `values` (seeds, places), with its interval."""
    mean = values.mean(axis=0)
    axes.plot(grid, mean, color=color, label=label)
    if len(values) > 1:
        spread = values.std(axis=0, ddof=1) / len(values) ** 0.5
        half = quantile(0.95, len(values) - 1) * spread
        axes.fill_between(grid, mean - half, mean + half, color=color, alpha=0.12, linewidth=0)


def draw_plateau(runs: Runs) -> None:
    """log10 of B from the start on: two borrows (seeds that start in a plateau), and one."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, group, of in zip(panels, ("plateau", "one"), (groups.stuck(runs), runs)):
        for name, color in ARM_COLORS.items():
            if found := [run for (run,) in of.together(f"{group}/{name}")]:
                curve(axes, found, groups.ARM_LABELS[name], color, shift=PLATEAU, log=True)
        title = "two borrows (L = 2)" if group == "plateau" else "one borrow (L = 1)"
        axes.set(title=title, xlabel="steps from the start", xlim=(0, LONGER))
    panels[0].set(ylabel="log10 of B, the accuracy on part B", ylim=(-5, 0))
    save(figure, "plateau.svg")


def draw_early(runs: Runs) -> None:
    """Accuracy on the cards by steps and by tokens."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key in zip(panels, ("step", "sampled_tokens")):
        for name, color in CARD_COLORS.items():
            if found := [run for (run,) in runs.together(f"cards/{name}")]:
                curve(axes, found, groups.CARD_LABELS[name], color, key)
    panels[0].set(xlabel="step", ylabel="held-out accuracy", xlim=(0, WINDOW), ylim=(0, 1))
    panels[1].set(xlabel="thousand sampled tokens, scout and guide cache counted", xlim=(0, None))
    save(figure, "early.svg")


def draw_autonpo(runs: Runs) -> None:
    """Training reward and entropy minus GRPO's, by steps from the first rollback."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes_of_world, world in zip(figure.subplots(2, 2), dynamics.WORLDS):
        for axes, what in zip(axes_of_world, (2, 3)):
            for name, color in (("auto", "C1"), ("always", "C0")):
                if (found := dynamics.lines_around(runs, world, name, what)).size:
                    tens = found.reshape(len(found), -1, 10).mean(axis=2)
                    where = numpy.arange(tens.shape[1]) * 10 - dynamics.BEFORE + 5
                    whole = tens[~numpy.isnan(tens).any(axis=1)]
                    label = f"{dynamics.AUTO[name]} ({len(whole)} runs)"
                    if len(whole):
                        band(axes, where, whole, label, color)
                    axes.plot(where, tens.T, color=color, lw=0.5, alpha=0.4)
            axes.axvline(0, color="black", lw=0.5)
            axes.axhline(0, color="black", lw=0.5)
            axes.set(title=f"{world}: {dynamics.MEASURES[what]}", xlabel="steps from the rollback")
    save(figure, "autonpo.svg")


def save(figure: Figure, name: str) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        else:
            axes.text(0.5, 0.5, "not run yet", ha="center", transform=axes.transAxes)
    with matplotlib.rc_context({"svg.hashsalt": "npo"}):  # the same file from the same numbers
        figure.savefig(DOCS / "figures" / name, metadata={"Date": None, "Creator": None})


# ---- Page and README -----------------------------------------------------------------------------


def results_page(runs: Runs) -> str:
    """All of docs/results.md."""
    return TEMPLATE.read_text().format(
        **advice.numbers(runs),
        primary=claims.primary_table(runs),
        paper=claims.paper(runs),
        plateau=groups.plateau(runs, "plateau"),
        one=groups.plateau(runs, "one"),
        future=groups.future(runs, "future"),
        cards=groups.cards(runs, "cards"),
        moved=dynamics.moved(runs),
        signals=dynamics.signals(),
        rivals=groups.rivals(runs, "rivals"),
        lax=groups.lax(runs, "lax"),
        autonpo=dynamics.autonpo(runs, "autonpo"),
        trl=sections.through_trl(),
        difficulty=sections.difficulties(),
        law=sections.law(),
        twin=sections.twins(),
    )


def readme_with_rows(text: str, runs: Runs) -> str:
    """README, with its rows made anew between the two markers."""
    return MARKED.sub(lambda found: f"{found[1]}{claims.readme(runs)}\n{found[2]}", text)


def main() -> None:
    runs, readme = load(), ROOT / "README.md"
    page = results_page(runs)
    (DOCS / "results.md").write_text(page)
    readme.write_text(readme_with_rows(readme.read_text(), runs))
    draw_plateau(runs)
    draw_early(runs)
    draw_autonpo(runs)
    with contextlib.redirect_stdout(None):
        draw_law(signal_theory.print_law(), DOCS / "figures" / "law.png")
    if advice.OTHERWISE in page:
        sys.exit(f"error: docs/results.md has sentences that do not fit, see {advice.OTHERWISE}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
