"""Runs in one picture, and a table of the flags in which they differ.

Runs that differ in nothing but the seed are one curve: their mean, with a band of a 95 % interval.

    python -m commands.compare_runs runs/grpo runs/npo
    python -m commands.compare_runs runs/len-* --metric completions/mean_length --to lengths.png
"""

import statistics
from pathlib import Path

from scipy import stats

from plumbing import UsageError
from plumbing.command import stored_config, stored_json
from plumbing.files import file_hashes, read_jsonl
from plumbing.run import current_lineage
from plumbing.settings import MAY_CHANGE_ON_RESUME

# flags that make no other curve
SAYS_NOTHING = MAY_CHANGE_ON_RESUME | {"seed", "dry_run"}


def curve_of(run: Path, metric: str) -> dict[int, float]:
    """{step: value} of the present lineage, without what a rollback undid."""
    lines = current_lineage(read_jsonl(run / "metrics.jsonl"))
    numbers = [{k: v for k, v in line.items() if isinstance(v, int | float)} for line in lines]
    found = {line["step"]: line[metric] for line in numbers if metric in line}
    if not found:
        names = sorted({name for line in numbers for name in line} - {"step"})
        known = f"it logs {', '.join(names)}" if names else "it has no metrics.jsonl"
        raise UsageError(f"{run}: nothing is logged as {metric!r}; {known}")
    return found


def rollbacks_of(run: Path) -> list[tuple[int, int]]:
    """(from, to) of each rollback."""
    lines = read_jsonl(run / "metrics.jsonl")
    return [
        (line["autonpo/step"], line["autonpo/step"] - line["autonpo/distance"])
        for line in lines
        if line.get("autonpo/distance")
    ]


def what_sets_apart(run: Path) -> dict:
    """Its flags, and short hashes of its code, data, model and reward.

    Raises:
        UsageError: there is no run.
    """
    config = stored_config(run)
    if config is None:
        raise UsageError(f"{run}: holds no run")
    code = run / "code.diff"
    found = {"code": file_hashes([code])[0]} if code.is_file() else {}
    found |= {
        f"{name}, content": value for name, value in stored_json(run / "fingerprints.json").items()
    }
    return config | {name: value[-8:] for name, value in found.items()}


def grouped(configs: dict[Path, dict]) -> tuple[list[str], dict[tuple, list[Path]]]:
    """The flags that differ, and {their values: the runs that have them}."""
    flags = {name for config in configs.values() for name in config} - SAYS_NOTHING
    values = {
        run: [str(config.get(name, "-")) for name in flags] for run, config in configs.items()
    }
    differ = sorted(name for name, *found in zip(flags, *values.values()) if len({*found}) > 1)
    groups = {}
    for run, config in configs.items():
        key = tuple(str(config.get(name, "-")) for name in differ)
        groups.setdefault(key, []).append(run)
    return differ, groups


def band(curves: list[dict[int, float]]) -> list[tuple[int, float, float]]:
    """(step, mean, half of the 95 % interval) where all of the curves have a value."""
    found = []
    for step in sorted(set.intersection(*map(set, curves))):
        values = [curve[step] for curve in curves]
        half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) if len(values) > 1 else 0.0
        found.append((step, statistics.fmean(values), float(half)))
    return found


def draw(groups: dict[str, list[Path]], metric: str, path: Path) -> None:
    """A curve per group with its band, a rollback as an arrow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, (label, runs) in enumerate(groups.items()):
        points = band([curve_of(run, metric) for run in runs])
        steps, means, halves = zip(*points)
        axes.plot(steps, means, f"C{number}-", label=label)
        low, high = zip(*((mean - half, mean + half) for mean, half in zip(means, halves)))
        axes.fill_between(steps, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
        for run in runs:
            for now, back in rollbacks_of(run):
                at = dict(zip(steps, means)).get(back, means[0])
                style = {"arrowstyle": "->", "color": f"C{number}"}
                axes.annotate("", (back, at), (now, at), arrowprops=style)
    axes.set(xlabel="step; arrows: rolled back", ylabel=metric)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(
    runs: list[Path], /, metric: str = "eval/accuracy", to: Path = Path("compare_runs.png")
) -> None:
    """Draws a metric of several runs, and prints what sets them apart.

    Args:
        runs: Run directories.
        metric: A key of metrics.jsonl, such as accuracy or completions/mean_length.
        to: Where the picture goes.
    """
    to = to if to.suffix else to.with_suffix(".png")
    short = len({run.name for run in runs}) == len(runs)
    names = {run: run.name if short else str(run) for run in runs}
    try:
        differ, groups = grouped({run: what_sets_apart(run) for run in runs})
        rows = [("runs", *differ, f"last {metric}")]
        for values, some in groups.items():
            points = band([curve_of(run, metric) for run in some])
            if not points:
                raise UsageError(f"{', '.join(map(str, some))}: {metric} at no step of all of them")
            step, mean, half = points[-1]
            last = f"{mean:.4g}" + (f" ± {half:.2g}" if len(some) > 1 else "") + f" (step {step})"
            rows.append((", ".join(names[run] for run in some), *values, last))
        draw({row[0]: some for row, some in zip(rows[1:], groups.values())}, metric, to)
    except (UsageError, OSError, ValueError) as error:  # ValueError: of an unknown kind of picture
        raise SystemExit(f"error: {error}") from None
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)))
    print(to)


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
