"""What a run shows when it ends: curves.png, summary.json, and a few sentences."""

import json
from pathlib import Path

from tqdm import tqdm

from plumbing.files import read_jsonl, write_aside
from plumbing.run import current_lineage, evaluations


def report(out: str | Path, name: str) -> None:
    """Sums up a finished run, beside its scout if it has one."""
    out = Path(out)
    scout, summary, runs = out / "scout", totals(out), {name: out}
    after = f" after step {summary['start_step']}" if summary["start_step"] else ""
    tqdm.write(
        f"\n{name} went from {summary['eval/accuracy_start']:.3f} to "
        f"{summary['eval/accuracy']:.3f} held-out accuracy in "
        f"{summary['steps'] - summary['start_step']} steps{after}, "
        f"{summary['sampled_tokens']:,} sampled tokens in all."
    )
    if (scout / "metrics.jsonl").is_file():
        runs = {"the scout": scout, name: out}
        summary |= beside_scout(out, scout, name)
    lines = read_jsonl(out / "metrics.jsonl")
    decisions = [line for line in lines if "autonpo/decision" in line]
    for line in decisions:
        tqdm.write(f"after step {line['autonpo/step']}: {line['autonpo/decision']}")
    if "autonpo/reward" in lines[-1] and not decisions:
        tqdm.write("No warning: this run was plain GRPO.")
    summary |= {"updates": sum("loss" in line for line in lines), "decisions": decisions}
    if lines[1:] and not any(line.get("accuracy") for line in lines):
        tqdm.write("No answer was right in the whole run: look at samples.jsonl, gold and policy.")
    show_transcript(out)
    write_aside(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    draw(runs, decisions, out / "curves.png")
    tqdm.write(f"\ncurves: {out / 'curves.png'}   numbers: {out / 'summary.json'}")


def totals(out: Path) -> dict:
    """The end of a run in numbers."""
    evals, lines = evaluations(out), read_jsonl(out / "metrics.jsonl")
    return {
        "steps": lines[-1]["step"],
        "start_step": evals[0]["step"],
        "eval/accuracy": evals[-1]["eval/accuracy"],
        "eval/accuracy_start": evals[0]["eval/accuracy"],
        "sampled_tokens": lines[-1]["sampled_tokens"],
        "training_seconds": sum(line.get("step_time", 0) for line in lines),
    }


def first_reach(evals: list[dict], accuracy: float, key: str = "step") -> float | None:
    """Where held-out accuracy first reaches a level, linear between two evaluations.

    In steps, or with `key` "sampled_tokens" in tokens; None if it never does.
    """
    before = None
    for line in evals:
        if line["eval/accuracy"] >= accuracy:
            if before is None:
                return float(line[key])
            rise = line["eval/accuracy"] - before["eval/accuracy"]
            share = (accuracy - before["eval/accuracy"]) / rise
            return before[key] + share * (line[key] - before[key])
        before = line
    return None


def beside_scout(out: Path, scout: Path, name: str) -> dict:
    """Steps and tokens to the scout's final accuracy: the scout's own, and the guided run's."""
    before = totals(scout)
    goal, found = before["eval/accuracy"], {"scout": before}
    tqdm.write(
        f"The scout went from {before['eval/accuracy_start']:.3f} to {goal:.3f} in "
        f"{before['steps'] - before['start_step']} steps, {before['sampled_tokens']:,} sampled "
        "tokens."
    )
    for key in ("step", "sampled_tokens"):
        evals = evaluations(scout)
        before_both = evals[0][key]  # above 0 with --start
        alone, guided = first_reach(evals, goal, key), first_reach(evaluations(out), goal, key)
        alone -= before_both
        guided = None if guided is None else guided - before_both
        speed_up = alone / guided if guided else None
        found[f"to_goal/{key}"] = {"scout": alone, "guided": guided, "speed_up": speed_up}
    steps, tokens = found["to_goal/step"], found["to_goal/sampled_tokens"]
    if f"{goal:.3f}" == f"{before['eval/accuracy_start']:.3f}":
        tqdm.write("The scout gained too little to compare speeds.")
    elif not (steps["scout"] and steps["guided"]):
        verb = "started at" if steps["guided"] == 0 else "did not reach"
        tqdm.write(f"{name} {verb} {goal:.3f}.")
    else:
        tqdm.write(
            f"Steps to {goal:.3f}: {steps['scout']:.1f} for the scout, {steps['guided']:.1f} "
            f"guided: {steps['speed_up']:.2f}x.\n"
            f"Sampled tokens to {goal:.3f}, scout and guide cache counted: {tokens['scout']:,.0f} "
            f"for the scout, {tokens['guided']:,.0f} guided: {tokens['speed_up']:.2f}x."
        )
    return found


def show_transcript(out: Path) -> None:
    """Prints the first replaced slot: the policy's failure and the guide's answer."""
    for line in read_jsonl(out / "samples.jsonl"):
        if "guide" in line and line["reward"] < 1:
            tqdm.write(
                f"\nA replaced slot (step {line['step']}, pass-rate {line['pass_rate']:.2f}): "
                f"{line['question']} Gold {line['gold']}.\n"
                f"  policy    {line['policy']}\n  {line['source']:9} {line['guide']}"
            )
            return


def draw(runs: dict[str, Path], decisions: list[dict], path: Path) -> None:
    """Accuracy by steps and by tokens; entropy, with the share of guided groups dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    by_step, by_tokens, entropy = panels

    def curve(axes, lines: list[dict], across: str, up: str, style: str, label: str = "") -> None:
        points = [(line[across], line[up]) for line in lines if up in line]
        axes.plot([x for x, _ in points], [y for _, y in points], style, ms=3, label=label or None)

    for color, (name, out) in enumerate(runs.items()):
        lines = read_jsonl(out / "metrics.jsonl")
        kept = current_lineage(lines)
        undone = [line for line in lines if line not in kept]  # taken back by a rollback
        for axes, across in ((by_step, "step"), (by_tokens, "sampled_tokens")):
            curve(axes, undone, across, "eval/accuracy", "kx")
            curve(axes, kept, across, "eval/accuracy", f"C{color}o-", name)
        curve(entropy, kept, "step", "entropy", f"C{color}-")
        curve(entropy, kept, "step", "npo/guide_frac", f"C{color}--")
    for number, line in enumerate(decisions, 1):
        now, height = line["autonpo/step"], 0.04 * number
        back = now - line["autonpo/distance"]
        by_step.annotate("", (back, height), (now, height), arrowprops={"arrowstyle": "->"})
    by_step.set(xlabel="step; crosses and arrows: rolled back", ylabel="held-out accuracy")
    by_tokens.set(xlabel="sampled tokens, scout and cache counted")
    entropy.set(xlabel="step", ylabel="entropy (nats per token); dashed: guided groups")
    for axes in panels:
        axes.set_ylim(0, None if axes is entropy else 1)
        axes.grid(alpha=0.3)
    by_step.legend()
    aside = path.with_name("curves.tmp.png")
    figure.savefig(aside, dpi=110)
    pyplot.close(figure)
    aside.rename(path)
