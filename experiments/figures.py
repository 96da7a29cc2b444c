"""The comparison's tables and figures, from experiments/compare.jsonl alone.

    python experiments/figures.py     # prints markdown; draws assets/compare.png, sources.png, sources_is.png and entropy.png

Intervals are 95 %, Student's t over the seeds; differences are paired, a method minus plain GRPO with the same seed. "Equal tokens" is GRPO's
last evaluation before it had sampled as many tokens as the method in all, guide included. Goals are shares of the
final accuracy of the same seed's GRPO.
"""

import statistics
import sys
from pathlib import Path

import numpy

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from compare import AT, FAR, PLANE, RESULTS, SEEDS, STEPS, commands
from tables import T_975, Result, band, equal_tokens, finish, interval, pyplot

from report import first_reach
from run import read_jsonl

LABELS = {
    "grpo": "GRPO", "grpo-16": "GRPO, G = 16", "luffy": "LUFFY", "luffy-unshaped": "LUFFY without shaping", "exgrpo": "ExGRPO",
    "rlep": "RLEP", "early": "NPO early", "early-no-is": "NPO early without IS",
    "early-teacher": "NPO early, guide: teacher", "early-far": "NPO early, guide: far future", "late": "NPO late",
    "early+late": "NPO early + late", "autonpo": "AutoNPO",
}  # fmt: skip
COLORS = dict(zip(LABELS, ("black", "C7", "C2", "C5", "C4", "C3", "C1", "C6", "C2", "C3", "C0", "C8", "C9")))
OTHERS = ("grpo", "luffy", "exgrpo", "rlep", "early")  # the lines of a figure's two panels
OURS = ("grpo", "grpo-16", "early", "late", "early+late", "autonpo")
GOALS = (0.5, 0.8)
PAPER_SPEED = 2.1  # steps of GRPO over those of NPO early to the same reward
SMALL, LARGE = 0.05, 0.1  # of held-out accuracy: our readings of "barely" and "collapses"; no paper gives one
BY_DEFINITION = {"luffy", "luffy-unshaped", "rlep", "early-no-is"}  # whose ratios are pi itself, or 1 at the update


def reach(runs: list[Result], goals: list[float], key: str) -> str:
    """Mean and interval of where the runs first reach their goals; those that never do, or start beyond, are counted."""
    found = [
        first_reach(run.evals, goal, key) if run.evals[0]["eval/accuracy"] < goal else None for run, goal in zip(runs, goals)
    ]
    reached = [value / (1000 if key == "sampled_tokens" else 1) for value in found if value is not None]
    if all(run.evals[0]["eval/accuracy"] >= goal for run, goal in zip(runs, goals)):
        return "before it goes back"
    if len(reached) < 2:
        return f"{len(reached)} of {len(runs)} runs"
    return interval(reached, 0) + ("" if len(reached) == len(runs) else f" ({len(reached)} of {len(runs)} runs)")


def paired(mine: list[float], theirs: list[float]) -> list[float]:
    return [a - b for a, b in zip(mine, theirs)]


def bounds(differences: list[float]) -> tuple[float, float]:
    """Of the 95 % interval."""
    half = T_975[len(differences)] * statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.fmean(differences) - half, statistics.fmean(differences) + half


def verdict(differences: list[float]) -> str:
    """What the interval of paired differences says of a claim that they lie above 0."""
    low, high = bounds(differences)
    return "holds" if low > 0 else "does not" if high < 0 else "undecided"


def table(found: dict[str, list[Result]], long: list[Result]) -> None:
    plain = found["grpo"]
    final = {name: [run.evals[-1]["eval/accuracy"] for run in runs] for name, runs in found.items()}
    costliest = max(found, key=lambda name: statistics.fmean(run.evals[-1]["sampled_tokens"] for run in found[name]))
    print(f"| method | held-out accuracy at step {STEPS} | minus GRPO | minus GRPO, equal tokens | thousand tokens in all "
          + "".join(f"| steps to {goal:.0%} | thousand tokens to {goal:.0%} " for goal in GOALS)
          + "| largest ratio | entropy at the end |\n|" + "---|" * (7 + 2 * len(GOALS)))  # fmt: skip
    base = [run.evals[0]["eval/accuracy"] for run in plain]
    print(f"| base | {interval(base, 3)} | {interval(paired(base, final['grpo']), 3)} |" + " |" * (5 + 2 * len(GOALS)))
    for name, runs in found.items():
        equal = [equal_tokens(mine, run)["eval/accuracy"] for mine, run in zip(long, runs)]
        tokens = [run.evals[-1]["sampled_tokens"] / 1000 for run in runs]
        goals = "".join(f"| {reach(runs, [share * goal for goal in final['grpo']], key)} "
                        for share in GOALS for key in ("step", "sampled_tokens"))  # fmt: skip
        ratios = [run.line["largest_ratio"] for run in runs if run.line["largest_ratio"] and name not in BY_DEFINITION]
        print(f"| {LABELS[name]} | {interval(final[name], 3)} | {interval(paired(final[name], final['grpo']), 3) if runs is not plain else ''} "
              f"| {interval(paired(final[name], equal), 3) if runs is not plain else ''} | {statistics.fmean(tokens):,.0f} {goals}"
              f"| {f'{max(ratios):.3g}' if ratios else ''} | {interval([run.line['entropy'][-1][1] for run in runs], 3)} |")  # fmt: skip
    ends = [equal_tokens(mine, run) for mine, run in zip(long, found[costliest])]
    last = [line["eval/accuracy"] for line in ends]
    print(f"| GRPO, as many tokens as {LABELS[costliest]} (step {statistics.fmean(line['step'] for line in ends):.0f}) | {interval(last, 3)} "
          f"| {interval(paired(last, final['grpo']), 3)} | | {statistics.fmean(line['sampled_tokens'] for line in ends) / 1000:,.0f} |"
          + " |" * (2 + 2 * len(GOALS)))  # fmt: skip

    print("\nGoals are shares of the same seed's GRPO at its end; runs that start beyond a goal, or never reach it, are left out of its mean, and "
          "the others counted. Largest ratio: before clip and shaping; LUFFY's is pi itself, RLEP's and without IS it is 1 by definition.")  # fmt: skip
    print("\nCommands, for seed 0 (the others differ in `--seed` and `--out`):\n\n```")
    for name, command in commands(0, Path("experiments/runs/compare")).items():
        print(f"OMP_NUM_THREADS=1 python {command}    # {name}")
    print("```")


def claims(found: dict[str, list[Result]], long: list[Result], plane: list[dict]) -> None:
    final = {name: [run.evals[-1]["eval/accuracy"] for run in runs] for name, runs in found.items()}
    print("\n| claim | measured here | verdict |\n|---|---|---|")

    def order(claim: str, better: str, worse: str) -> None:
        differences = paired(final[better], final[worse])
        print(f"| {claim} | {LABELS[better]} minus {LABELS[worse]}: {interval(differences, 3)} | {verdict(differences)} |")

    order("NPO early ends above GRPO", "early", "grpo")
    order("NPO early + late ends above GRPO", "early+late", "grpo")
    order("AutoNPO ends above GRPO", "autonpo", "grpo")
    order("a late intervention breaks through", "late", "grpo")
    order("early + late ends above early alone", "early+late", "early")
    order("AutoNPO ends above the manual interventions", "autonpo", "early+late")
    for other in ("early-teacher", "early-far"):
        order(f"the near future is the better source than the {LABELS[other].split(': ')[1]}", "early", other)
    for rival in ("luffy", "exgrpo", "rlep"):
        order(f"NPO early ends above {LABELS[rival]}", "early", rival)
    order("GRPO ends above LUFFY", "grpo", "luffy")
    order("ExGRPO ends above GRPO", "exgrpo", "grpo")
    order("RLEP ends above GRPO", "rlep", "grpo")
    order("RLEP ends above ExGRPO", "rlep", "exgrpo")
    goals = {share: [share * goal for goal in final["grpo"]] for share in GOALS}
    for share, levels in goals.items():
        steps = [[first_reach(run.evals, goal) for run, goal in zip(found[name], levels)] for name in ("grpo", "early")]
        if all(all(some) for some in steps):
            faster = [a / b for a, b in zip(*steps)]
            low, high = bounds(faster)
            says = "holds" if low > 1 and low <= PAPER_SPEED <= high else "faster, but less so" if low > 1 else "undecided"
            print(f"| early is about {PAPER_SPEED} times as fast | steps to {share:.0%} of GRPO's final accuracy, GRPO over NPO early: "
                  f"{interval(faster)} | {says} |")  # fmt: skip
    within, beyond = paired(final["early-no-is"], final["early"]), paired(final["luffy-unshaped"], final["luffy"])
    low, high = bounds(within)
    says = "holds" if low > -SMALL and high < SMALL else "does not" if high < 0 or low > 0 else "undecided"
    print(
        f"| NPO barely changes without IS (by less than {SMALL}) | {LABELS['early-no-is']} minus {LABELS['early']}: {interval(within, 3)} | {says} |"
    )
    low, high = bounds(beyond)
    says = "holds" if high < -LARGE else "does not" if low > -LARGE else "undecided"
    print(f"| LUFFY without its correction collapses (by more than {LARGE}) | {LABELS['luffy-unshaped']} minus {LABELS['luffy']}: "
          f"{interval(beyond, 3)} | {says} |")  # fmt: skip
    best = [max(line, key=lambda name: line[name]["quality"] / line[name]["exp_kl"]) for line in plane]
    says = "holds" if set(best) == {"near future"} else "undecided" if "near future" in best else "does not"
    print(f"| the near future has the highest S of all sources | highest Q / exp KL, by seed: {', '.join(best)} | {says} |")


def curves(axes, found: dict[str, list[Result]], names, key: str, long: list[Result] | None = None) -> None:
    for name in names:
        band(axes, found[name], LABELS[name], COLORS[name], key)
    if long:
        band(axes, long, "GRPO going on", "black", key, ":")


def figures(found: dict[str, list[Result]], long: list[Result], plane: list[dict]) -> None:
    figure, grid = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained", sharey=True)
    for row, names in zip(grid, (OTHERS, OURS)):
        curves(row[0], found, names, "step")
        curves(row[1], found, names, "sampled_tokens", long)
        row[0].set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1))
        row[1].set(xlabel="thousand sampled tokens, guides' included", xlim=(0, None))
        row[1].legend(fontsize=8)
    grid[0, 0].set_title("other sources for the slot, by steps")
    grid[0, 1].set_title("by all sampled tokens")
    grid[1, 0].legend(fontsize=8)
    finish(figure, grid.flat, "compare.png")

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axes, key, name in zip(
        panels, ("exp_kl", "noise_to_signal"), ("exp of the mean token KL", "noise to signal of NPO's gradient")
    ):
        for color, source in enumerate(PLANE):
            points = [(line[source][key], line[source]["quality"]) for line in plane if line[source][key]]
            axes.plot(*zip(*points), "o", color=f"C{color}", alpha=0.35, ms=5)
            axes.plot(*(statistics.fmean(values) for values in zip(*points)), "o", color=f"C{color}", ms=11, label=source)
        axes.set_xscale("log")
        left, right = axes.get_xlim()[0] / 1.2, axes.get_xlim()[1] * 1.2
        best = max(line[source]["quality"] / line[source][key] for line in plane for source in PLANE if line[source][key])
        for signal in (best * 4**-power for power in range(5)):  # contours of S = Q / V
            ends = [value for value in (max(left, 0.02 / signal), min(right, 1 / signal)) if left <= value <= right]
            grid = numpy.geomspace(*ends, 50)
            axes.plot(grid, signal * grid, color="grey", lw=0.6, zorder=0)
            axes.annotate(
                f"S = {signal:.1g}", (grid[-1], signal * grid[-1]), fontsize=7, color="grey", ha="center", va="bottom"
            )
        axes.set(xlim=(left, right * 1.3), ylim=(0, 1.1), xlabel=f"V: {name}", ylabel="Q: share of failed prompts solved")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PLANE))
    finish(figure, panels, "sources.png")

    figure, panels = pyplot.subplots(1, 3, figsize=(14, 3.8), layout="constrained", sharey=True)
    shown = {"NPO early, its guide alone switched": ("early", "early-far", "early-teacher"),
             "without importance sampling": ("early", "early-no-is"), "LUFFY without shaping": ("luffy", "luffy-unshaped")}  # fmt: skip
    for axes, (title, names) in zip(panels, shown.items()):
        curves(axes, found, ("grpo", *names), "step")
        axes.set(xlabel="step", title=title, ylim=(0, 1))
        axes.legend(fontsize=8)
    panels[0].set_ylabel("held-out accuracy")
    finish(figure, panels, "sources_is.png")

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained", sharey=True)
    for axes, names in zip(panels, (OTHERS, OURS)):
        for name in names:
            steps = [step for step, _ in found[name][0].line["entropy"]]
            values = [[dict(run.line["entropy"]).get(step) for run in found[name]] for step in steps]
            kept = [(step, statistics.fmean(some)) for step, some in zip(steps, values) if None not in some]
            axes.plot(*zip(*kept), color=COLORS[name], label=LABELS[name])
        axes.set(xlabel="step", ylim=(0, None))
        axes.legend(fontsize=8)
    panels[0].set_ylabel("entropy (nats per token)")
    finish(figure, panels, "entropy.png")


def plane_table(plane: list[dict]) -> None:
    where = {
        "near future": f"step {PLANE['near future']}",
        "far future": f"step {FAR}",
        "past": f"step {PLANE['past']}",
        "teacher": "assets/teacher",
    }
    print(
        f"\nThe policy at step {AT}; failed prompts by seed: {', '.join(str(line['teacher']['failed']) for line in plane)} of 256.\n"
    )
    print("| source | Q | V: exp KL | V: noise to signal | S: Q / exp KL | S: Q / noise to signal |\n|---|---|---|---|---|---|")
    for source in PLANE:
        of = [line[source] for line in plane]
        noise = [line["noise_to_signal"] for line in of if line["noise_to_signal"]]
        missing = f" ({len(noise)} of {len(of)} runs)" if len(noise) < len(of) else ""
        signals = interval([line["quality"] / line["noise_to_signal"] for line in of if line["noise_to_signal"]], 3)
        print(f"| {source} ({where[source]}) | {interval([line['quality'] for line in of])} | {interval([line['exp_kl'] for line in of])} "
              f"| {interval(noise, 1)}{missing} | {interval([line['quality'] / line['exp_kl'] for line in of])} | {signals}{missing} |")  # fmt: skip


def main() -> None:
    lines = {(line["name"], line["seed"]): line for line in read_jsonl(RESULTS)}
    if missing := [
        f"{name}-{seed}" for name in (*LABELS, "grpo-equal", "plane") for seed in SEEDS if (name, seed) not in lines
    ]:
        raise SystemExit(f"error: {RESULTS.name} lacks {', '.join(missing)}; experiments/compare.py runs them")
    found = {name: [Result(lines[name, seed]) for seed in SEEDS] for name in LABELS}
    long = [Result(lines["grpo-equal", seed]) for seed in SEEDS]
    plane = [lines["plane", seed]["sources"] for seed in SEEDS]
    table(found, long)
    claims(found, long, plane)
    plane_table(plane)
    figures(found, long, plane)


if __name__ == "__main__":
    main()
