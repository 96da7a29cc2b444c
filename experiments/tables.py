"""The README's tables and figures, from experiments/claims.jsonl alone.

python experiments/tables.py          # prints markdown; draws assets/early.png, assets/is_correction.png, assets/late.png
"""

import statistics
import sys
from pathlib import Path

import matplotlib
import numpy

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from claims import DISTANCES, LATE_SEEDS, PLATEAU_END, PLATEAU_START, RESULTS, SCOUT, SEEDS, WINDOW

from report import first_reach
from run import read_jsonl

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t by number of seeds
HALFWAY = WINDOW // 2
ASSETS = HERE.parent / "assets"


def interval(values: list[float], digits: int = 2) -> str:
    """Mean and 95 % interval over seeds."""
    half = T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f} [{mean - half:.{digits}f}, {mean + half:.{digits}f}]"


class Result:
    def __init__(self, line: dict):
        self.line = line
        self.evals = [{"step": s, "sampled_tokens": t, "eval/accuracy": a} for s, t, a in line["evaluations"]]

    def at(self, step: int) -> float:
        return next(line["eval/accuracy"] for line in self.evals if line["step"] == step)

    def until(self, step: int) -> list[dict]:
        return [line for line in self.evals if line["step"] <= step]


def early(found: dict[str, Result], seeds, scout: int) -> None:
    print(f"\n### Early bootstrapping, scout of {scout} steps\n")
    print(
        "| seed | scout's final accuracy | steps: GRPO | steps: NPO | speed-up | tokens: GRPO | tokens: NPO, all counted | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    speed, cost = [], []
    for seed in seeds:
        grpo, npo = found[f"grpo-{seed}"].until(scout), found[f"early-{seed}"].evals
        goal = grpo[-1]["eval/accuracy"]
        steps = [first_reach(run, goal) for run in (grpo, npo)]
        tokens = [first_reach(run, goal, "sampled_tokens") for run in (grpo, npo)]
        assert all(steps), f"seed {seed} never reached {goal}: the mean below would hide it"
        speed.append(steps[0] / steps[1])
        cost.append(tokens[0] / tokens[1])
        print(
            f"| {seed} | {goal:.3f} | {steps[0]:.1f} | {steps[1]:.1f} | {speed[-1]:.2f} | {tokens[0]:,.0f} | {tokens[1]:,.0f} "
            f"| {cost[-1]:.2f} |"
        )
    print(f"| mean [95 %] | | | | {interval(speed)} | | | {interval(cost)} |")


def is_correction(found: dict[str, Result]) -> None:
    print(f"\n### Importance-sampling correction, guided through all {WINDOW} steps, {len(SEEDS)} seeds\n")
    print(
        f"| guide at step | its accuracy | prompts it solved | IS | speed-up to its accuracy | accuracy at {HALFWAY} "
        f"| accuracy at {WINDOW} | IS minus no IS at {WINDOW} | largest ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    plain = [found[f"grpo-{seed}"] for seed in SEEDS]
    at = [interval([run.at(step) for run in plain], 3) for step in (HALFWAY, WINDOW)]
    print(f"| none (GRPO) | | | | 1 | {at[0]} | {at[1]} | | |")
    for distance in DISTANCES:
        accuracy = statistics.fmean(run.at(distance) for run in plain)
        ends = {}
        for ratio in ("is-correction", "no-is-correction"):
            runs = [found[f"guide{distance}-{ratio}-{seed}"] for seed in SEEDS]
            ends[ratio] = [run.at(WINDOW) for run in runs]
            speed, missed = [], 0
            for run, grpo in zip(runs, plain):
                goal = grpo.at(distance)
                reached = first_reach(run.evals, goal)
                missed += reached is None
                speed.append(first_reach(grpo.until(distance), goal) / (reached or WINDOW))
            solved = statistics.fmean(run.line["guide_solved"] for run in runs)
            with_is = ratio == "is-correction"
            paired = interval([a - b for a, b in zip(*ends.values())], 3) if len(ends) == 2 else ""
            print(
                f"| {distance} | {accuracy:.3f} | {solved:.0%} | {'yes' if with_is else 'no'} | {interval(speed)}"
                f"{f' ({missed} not in {WINDOW} steps, counted as {WINDOW})' if missed else ''} | {interval([run.at(HALFWAY) for run in runs], 3)} "
                f"| {interval(ends[ratio], 3)} | {paired} | {max(run.line['largest_ratio'] for run in runs):.1f} |"
            )


def late(found: dict[str, Result]) -> None:
    print(f"\n### Late breakthrough, rolled back from step {PLATEAU_END} to {PLATEAU_START}, {len(LATE_SEEDS)} seeds\n")
    print("| run | held-out accuracy | minus GRPO, same step | minus GRPO, equal tokens | step | sampled tokens |")
    print("|---|---|---|---|---|---|")
    grpo, npo = ([found[f"{name}-{seed}"] for seed in LATE_SEEDS] for name in ("long", "late"))
    ends = {
        f"GRPO, step {PLATEAU_START}": [run.until(PLATEAU_START)[-1] for run in grpo],
        f"GRPO, step {PLATEAU_END}": [run.until(PLATEAU_END)[-1] for run in grpo],
        f"NPO late, step {PLATEAU_END}": [run.evals[-1] for run in npo],
        "GRPO, equal tokens": [equal_tokens(run, other) for run, other in zip(grpo, npo)],
    }
    accuracy = {name: [line["eval/accuracy"] for line in lines] for name, lines in ends.items()}
    same, equal = accuracy[f"GRPO, step {PLATEAU_END}"], accuracy["GRPO, equal tokens"]
    for name, lines in ends.items():
        mine = accuracy[name]
        paired = ["" if other is mine else interval([a - b for a, b in zip(mine, other)], 3) for other in (same, equal)]
        step, tokens = (statistics.fmean(line[key] for line in lines) for key in ("step", "sampled_tokens"))
        print(f"| {name} | {interval(mine, 3)} | {paired[0]} | {paired[1]} | {step:.0f} | {tokens:,.0f} |")


def equal_tokens(grpo: Result, npo: Result) -> dict:
    """The last evaluation of GRPO before it had sampled as many tokens as the whole of NPO late, scout and cache counted."""
    return [line for line in grpo.evals if line["sampled_tokens"] <= npo.evals[-1]["sampled_tokens"]][-1]


def band(
    axes, runs: list[Result], label: str, color: str, key: str = "step", style: str = "-", last: int | None = None
) -> None:
    """Mean over seeds, with the 95 % interval; by tokens, seeds are joined on a common grid."""
    curves = [run.until(last) if last else run.evals for run in runs]
    where = numpy.array([[line[key] for line in curve] for curve in curves], float)
    grid = where.mean(axis=0)
    values = numpy.array([numpy.interp(grid, x, [line["eval/accuracy"] for line in curve]) for x, curve in zip(where, curves)])
    mean = values.mean(axis=0)
    half = T_975[len(runs)] * values.std(axis=0, ddof=1) / len(runs) ** 0.5
    grid = grid / 1000 if key == "sampled_tokens" else grid
    axes.plot(grid, mean, style, color=color, label=label)
    axes.fill_between(grid, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)


def figures(found: dict[str, Result]) -> None:
    runs = {name: [found[f"{name}-{seed}"] for seed in SEEDS] for name in ("grpo", "early")}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for axes, key in ((left, "step"), (right, "sampled_tokens")):
        band(axes, runs["grpo"], "GRPO", "C0", key, last=WINDOW)
        band(axes, runs["early"], f"NPO, guide from step {SCOUT}", "C1", key, last=WINDOW)
    long = [found[f"long-{seed}"] for seed in LATE_SEEDS]
    band(right, long, f"GRPO going on, {len(long)} seeds", "C2", "sampled_tokens", "--", last=3 * WINDOW)
    left.axvline(SCOUT, color="grey", lw=0.8, ls=":")
    left.text(SCOUT + 1, 0.02, "guided until here", color="grey", fontsize=8)
    left.set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1), title="by steps")
    right.set(xlabel="thousand sampled tokens", title="by all sampled tokens, scout and cache counted")
    right.legend()
    finish(figure, (left, right), "early.png")
    spent = statistics.fmean(run.evals[-1]["sampled_tokens"] for run in runs["early"])
    equal = [[line for line in run.evals if line["sampled_tokens"] <= spent][-1] for run in long]
    print(f"\nAt the {spent:,.0f} tokens that {WINDOW} steps of NPO early cost in all ({interval([r.at(WINDOW) for r in runs['early']], 3)}), "
          f"GRPO (step {equal[0]['step']}, {len(long)} seeds) is at {interval([line['eval/accuracy'] for line in equal], 3)}.")  # fmt: skip

    figure, panels = pyplot.subplots(1, len(DISTANCES), figsize=(12, 3.4), layout="constrained", sharey=True)
    for axes, distance in zip(panels, DISTANCES):
        band(axes, runs["grpo"], "GRPO", "grey", last=WINDOW)
        for ratio, label, color in (("is-correction", "NPO", "C1"), ("no-is-correction", "NPO without IS", "C3")):
            band(axes, [found[f"guide{distance}-{ratio}-{seed}"] for seed in SEEDS], label, color, last=WINDOW)
        axes.axvline(distance, color="grey", lw=0.8, ls=":")
        axes.set(xlabel="step", title=f"guide from step {distance}", ylim=(0, 1))
    panels[0].set_ylabel("held-out accuracy")
    finish(figure, panels, "is_correction.png")

    figure, axes = pyplot.subplots(figsize=(6, 3.8), layout="constrained")
    band(axes, [found[f"long-{seed}"] for seed in LATE_SEEDS], "GRPO", "C0")
    band(axes, [found[f"late-{seed}"] for seed in LATE_SEEDS], f"NPO late, back from {PLATEAU_END} to {PLATEAU_START}", "C1")
    spent = equal_tokens(found[f"long-{LATE_SEEDS[0]}"], found[f"late-{LATE_SEEDS[0]}"])["step"]
    axes.axvline(spent, color="grey", lw=0.8, ls=":")
    axes.text(spent - 4, 0.02, "GRPO has sampled as much\nas all of NPO late", color="grey", fontsize=8, ha="right")
    axes.set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1))
    finish(figure, [axes], "late.png")


def finish(figure, panels, name: str) -> None:
    for axes in panels:
        axes.grid(alpha=0.3)
    if not figure.legends:
        panels[0].legend()
    figure.savefig(ASSETS / name, dpi=90)
    pyplot.close(figure)


def main() -> None:
    found = {line["name"]: Result(line) for line in read_jsonl(RESULTS)}
    early(found, SEEDS, SCOUT)
    first = {line["name"]: Result(line) for line in read_jsonl(HERE / "claims_16_prompts.jsonl")}
    print("\nThe first attempt, with 16 prompts a step:")
    early(first, range(4), 30)
    is_correction(found)
    late(found)
    figures(found)


if __name__ == "__main__":
    main()
