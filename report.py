"""What a run directory shows from outside: curves.png, summary.json and a summary in words."""

import json
from pathlib import Path

from command import say
from run import evaluations, read_jsonl, surviving


def first_reach(evals: list[dict], accuracy: float, key: str = "step") -> float | None:
    """Where held-out accuracy first reaches a level, in steps or "sampled_tokens": linear between evaluations."""
    before = None
    for line in evals:
        if line["eval/accuracy"] >= accuracy:
            if before is None:
                return float(line[key])
            share = (accuracy - before["eval/accuracy"]) / (line["eval/accuracy"] - before["eval/accuracy"])
            return before[key] + share * (line[key] - before[key])
        before = line
    return None


def totals(out: Path) -> dict:
    """The end of a run in numbers."""
    evals, lines = evaluations(out), read_jsonl(out / "metrics.jsonl")
    return {
        "steps": lines[-1]["step"],
        "eval/accuracy": evals[-1]["eval/accuracy"],
        "eval/accuracy_start": evals[0]["eval/accuracy"],
        "sampled_tokens": lines[-1]["sampled_tokens"],
        "training_seconds": sum(line.get("step_time", 0) for line in lines),
    }


def grpo(out: Path, name: str = "GRPO") -> None:
    """summary.json and curves.png of a run, alone."""
    summary = totals(out)
    write(out, summary, {name: out})
    say(f"{out}: held-out accuracy {summary['eval/accuracy_start']:.3f} -> {summary['eval/accuracy']:.3f} in "
        f"{summary['steps']} steps, {summary['sampled_tokens']:,} sampled tokens, {summary['training_seconds']:.0f} s")  # fmt: skip


def npo(out: Path) -> None:
    """The same for a guided run, beside the scout that went ahead: steps and tokens to the scout's final accuracy."""
    summary, scout = totals(out), out / "scout"
    if not scout.is_dir():  # --guide: the guide's own run is elsewhere
        write(out, summary, {"NPO": out})
        say(f"{out}: held-out accuracy {summary['eval/accuracy']:.3f} after {summary['steps']} steps")
        return
    before, goal = totals(scout), totals(scout)["eval/accuracy"]
    summary |= {"scout": before, "goal": goal}
    for key in ("step", "sampled_tokens"):
        alone, guided = first_reach(evaluations(scout), goal, key), first_reach(evaluations(out), goal, key)
        summary[f"to_goal/{key}"] = {"scout": alone, "guided": guided, "speed_up": alone / guided if guided else None}
    ahead = "NPO early" if (scout / "scout").is_dir() else "GRPO"  # early+late: the run that plateaus was guided itself
    write(out, summary, {f"scout ({ahead})": scout, "NPO": out})
    say(f"\nThe scout ({ahead}) went from {before['eval/accuracy_start']:.3f} to {goal:.3f} held-out accuracy "
        f"in {before['steps']} steps.")  # fmt: skip
    steps, tokens = summary["to_goal/step"], summary["to_goal/sampled_tokens"]
    if not steps["guided"]:
        say(f"NPO {'started at' if steps['guided'] == 0 else 'did not reach'} {goal:.3f} within {summary['steps']} steps.")
    else:
        say(f"Steps to {goal:.3f}: {steps['scout']:.1f} for the scout, {steps['guided']:.1f} guided: "
            f"{steps['speed_up']:.2f}x.")  # fmt: skip
        say(f"Sampled tokens to {goal:.3f}, scout and guide cache counted: {tokens['scout']:,.0f} for the "
            f"scout, {tokens['guided']:,.0f} guided: {tokens['speed_up']:.2f}x.")  # fmt: skip
    say(f"NPO ended at {summary['eval/accuracy']:.3f} after {summary['steps']} steps, "
        f"{summary['sampled_tokens']:,} sampled tokens in all.")  # fmt: skip
    show_transcript(out)
    say(f"\ncurves: {out / 'curves.png'}   numbers: {out / 'summary.json'}")


def autonpo(out: Path) -> None:
    """The same for a run that intervened by itself: its decisions, and what they did to reward, entropy and accuracy."""
    lines = read_jsonl(out / "metrics.jsonl")
    decisions = [line for line in lines if "autonpo/decision" in line]
    updates = sum("loss" in line for line in lines)
    summary = totals(out) | {"updates": updates, "decisions": decisions}
    write_summary(out, summary)
    draw_decisions(lines, decisions, out / "curves.png")
    say(f"\n{out}: held-out accuracy {summary['eval/accuracy_start']:.3f} -> {summary['eval/accuracy']:.3f} in {summary['steps']} steps "
        f"({updates} with those taken back), {summary['sampled_tokens']:,} sampled tokens in all")  # fmt: skip
    for line in decisions:
        say(f"after step {line['autonpo/step']}: {line['autonpo/decision']}")
    if not decisions:
        say("no warning: this run was plain GRPO")
    show_transcript(out)
    say(f"\ncurves: {out / 'curves.png'}   numbers: {out / 'summary.json'}")


def show_transcript(out: Path) -> None:
    line = next((line for line in read_jsonl(out / "samples.jsonl") if "guide" in line and line["reward"] < 1), None)
    if line:
        say(f"\nA replaced slot (step {line['step']}, pass-rate {line['pass_rate']:.2f}): {line['question']} Gold {line['gold']}.\n"
            f"  policy    {line['policy']}\n  {line['source']:9} {line['guide']}")  # fmt: skip


def write(out: Path, summary: dict, runs: dict[str, Path]) -> None:
    write_summary(out, summary)
    draw_curves(runs, out / "curves.png")


def write_summary(out: Path, summary: dict) -> None:
    aside = out / "summary.json.tmp"
    aside.write_text(json.dumps(summary, indent=2) + "\n")
    aside.rename(out / "summary.json")


def draw_curves(runs: dict[str, Path], path: Path) -> None:
    """Held-out accuracy by steps and by all sampled tokens, entropy, and what the guide did."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((by_step, by_tokens), (entropy, guide)) = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for color, (name, out) in enumerate(runs.items()):
        evals, lines = evaluations(out), [line for line in read_jsonl(out / "metrics.jsonl") if "entropy" in line]
        accuracy = [line["eval/accuracy"] for line in evals]
        by_step.plot([line["step"] for line in evals], accuracy, f"C{color}o-", ms=3, label=name)
        by_tokens.plot([line["sampled_tokens"] / 1e3 for line in evals], accuracy, f"C{color}o-", ms=3, label=name)
        entropy.plot([line["step"] for line in lines], [line["entropy"] for line in lines], f"C{color}", label=name)
        asked = [line for line in lines if "npo/guide_frac" in line]
        guided = [line for line in asked if "npo/guide_ratio_mean" in line]
        if guided:
            guide.plot([line["step"] for line in asked], [line["npo/guide_frac"] for line in asked], f"C{color}",
                       label="groups with a guide")  # fmt: skip
            steps = [line["step"] for line in guided]
            guide.plot(steps, [line["npo/guide_ratio_mean"] for line in guided], f"C{color}--", label="its ratio: mean")
            guide.plot(steps, [line["npo/guide_ratio_min"] for line in guided], f"C{color}:", label="its ratio: least token")
    by_step.set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1))
    by_tokens.set(xlabel="thousand sampled tokens, scout and cache counted", ylabel="held-out accuracy", ylim=(0, 1))
    entropy.set(xlabel="step", ylabel="entropy (nats per token)")
    guide.set(xlabel="step", ylabel="guide slots", ylim=(0, None))
    for axes in (by_step, by_tokens, entropy, guide):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        else:
            axes.text(0.5, 0.5, "no guide in this run", ha="center", transform=axes.transAxes)
    save_figure(figure, path)


def draw_decisions(lines: list[dict], decisions: list[dict], path: Path) -> None:
    """Reward, entropy and held-out accuracy by step, what a rollback took back in grey, and the signal that each decision saw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    alive = surviving(lines)
    lost = [line for line in lines if not any(line is other for other in alive)]
    stretches = [[line for line in lost if line.get("rollbacks", 0) == number] for number in range(len(decisions))]
    figure, panels = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    *by_step, seen = panels.flat
    shown = (("reward", "autonpo/reward", "reward"), ("entropy", "autonpo/entropy", "entropy (nats per token)"),
             ("eval/accuracy", "eval/accuracy", "held-out accuracy"))  # fmt: skip
    for axes, (raw, smooth, name) in zip(by_step, shown):
        for some, style in (
            *((stretch, {"color": "grey", "label": "taken back"}) for stretch in stretches),
            (alive, {"color": "C0"}),
        ):
            some = [line for line in some if raw in line and smooth in line]
            if some and raw != smooth:
                axes.plot(
                    [line["step"] for line in some], [line[raw] for line in some], lw=0.5, alpha=0.4, color=style["color"]
                )
            if some:
                axes.plot(
                    [line["step"] for line in some],
                    [line[smooth] for line in some],
                    marker="" if raw != smooth else ".",
                    **style,
                )
        for height, line in enumerate(decisions, 1):
            step, back = line["autonpo/step"], line["autonpo/step"] - line["autonpo/distance"]
            if back == step:
                axes.axvline(step, color="grey", ls=":", lw=1, label="warning, no rollback")
                continue
            axes.axvline(step, color="C3", ls="--", lw=1, label="trigger")
            axes.axvspan(back, step, color="C1", alpha=0.12, lw=0, label="guided segment")
            axes.annotate("", (back, 0.04 * height), (step, 0.04 * height), xycoords=("data", "axes fraction"),
                          arrowprops={"arrowstyle": "->", "color": "C3"})  # fmt: skip
        axes.set(xlabel="step", ylabel=name if raw == smooth else f"{name}, and its moving average")
    for number, line in enumerate(decisions):
        table = line["autonpo/table"]
        seen.plot([row["distance"] for row in table], [row["signal"] for row in table], f"C{number}o-", ms=4,
                  label=f"after step {line['autonpo/step']}")  # fmt: skip
        chosen = [row for row in table if row["distance"] == line["autonpo/distance"]]
        seen.plot([row["distance"] for row in chosen], [row["signal"] for row in chosen], f"C{number}*", ms=14)
    seen.set(
        xlabel="distance D (steps), chosen: star",
        ylabel=r"signal $\hat S = \hat Q / \hat V$",
        ylim=(0, 1.05 * seen.get_ylim()[1]),
    )
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        once = {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
        if once:
            axes.legend(once.values(), once.keys(), fontsize=8)
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    from matplotlib import pyplot

    aside = path.with_name("curves.tmp.png")
    figure.savefig(aside, dpi=110)
    pyplot.close(figure)
    aside.rename(path)
