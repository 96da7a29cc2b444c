"""AutoNPO against GRPO at equal steps and at equal sampled tokens, five seeds.

    python experiments/autonpo_claims.py           # about 20 minutes on two cores; resumes where it was stopped
    python experiments/autonpo_claims.py figure    # table, and assets/autonpo.png, from experiments/autonpo_claims.jsonl alone

GRPO goes on for so many steps that it has sampled more tokens than AutoNPO with everything counted: what a rollback took back, probes,
caches. (Sampled tokens are not all compute: V^ also costs a forward pass of the probe's answers for each checkpoint.) Between evaluations, which
come every 10 steps, the control is interpolated.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from tqdm import tqdm

HERE = Path(__file__).parent
ROOT, RUNS, RESULTS = HERE.parent, HERE / "runs", HERE / "autonpo_claims.jsonl"
sys.path.insert(0, str(ROOT))
from run import evaluations, read_jsonl, surviving

SEEDS, STEPS, LONG = range(5), 200, 600


def result(name: str, command: str, seed: int) -> dict:
    out = RUNS / name
    lines = read_jsonl(out / "metrics.jsonl")
    steps = [line for line in surviving(lines) if "entropy" in line]
    return {
        "name": name, "seed": seed, "command": "OMP_NUM_THREADS=1 python " + command,
        "evaluations": [[line["step"], line["sampled_tokens"], round(line["eval/accuracy"], 5)] for line in evaluations(out)],
        "entropy": [[steps[i]["step"], round(statistics.fmean(line["entropy"] for line in steps[i - 9 : i + 1]), 5)]
                    for i in range(9, len(steps), 10)],
        "updates": sum("loss" in line for line in lines), "sampled_tokens": lines[-1]["sampled_tokens"],
        "decisions": [{key.removeprefix("autonpo/"): line[key] for key in line if key.startswith("autonpo/")}
                      for line in lines if "autonpo/decision" in line],
    }  # fmt: skip


def main() -> None:
    RUNS.mkdir(exist_ok=True)
    done = {line["name"] for line in read_jsonl(RESULTS)}
    bar, lock = tqdm(total=2 * len(SEEDS), initial=len(done), desc="runs"), threading.Lock()

    def work(name: str, command: str, seed: int) -> None:
        if name in done:
            return
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two runs at a time on two cores
        with open(RUNS / f"{name}.log", "w") as log:
            subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
        with lock, open(RESULTS, "a") as file:
            file.write(json.dumps(result(name, command, seed)) + "\n")
            bar.update()

    with ThreadPoolExecutor(2) as pool:
        jobs = []
        for seed in SEEDS:
            for name, command in (
                ("auto", f"autonpo.py --steps {STEPS}"),
                ("auto-grpo", f"grpo.py --steps {LONG} --eval-every 10"),
            ):
                name, command = f"{name}-{seed}", f"{command} --seed {seed} --out experiments/runs/{name}-{seed}"
                jobs.append(pool.submit(work, name, command, seed))
        for job in jobs:
            job.result()


def figure() -> None:
    from tables import Result, band, finish, interval, pyplot

    found = {line["name"]: Result(line) for line in read_jsonl(RESULTS)}
    auto, grpo = ([found[f"{name}-{seed}"] for seed in SEEDS] for name in ("auto", "auto-grpo"))
    print(
        "| seed | interventions (trigger -> back to) | AutoNPO | GRPO, same step | GRPO, equal tokens (step) | updates | tokens, all counted |"
    )
    print("|---|---|---|---|---|---|---|")
    same, equal = [], []
    for seed, mine, plain in zip(SEEDS, auto, grpo):
        end = mine.at(STEPS)
        spent = mine.line["sampled_tokens"]
        assert plain.evals[-1]["sampled_tokens"] > spent, "GRPO did not go on for long enough to be the control"
        tokens = [line["sampled_tokens"] for line in plain.evals]
        step, control = (
            float(numpy.interp(spent, tokens, [line[key] for line in plain.evals])) for key in ("step", "eval/accuracy")
        )
        same.append((end, plain.at(STEPS)))
        equal.append((end, control))
        places = ", ".join(
            f"{d['step']} -> {d['step'] - d['distance']}" if d["distance"] else f"{d['step']}: stay"
            for d in mine.line["decisions"]
        )
        print(f"| {seed} | {places or 'none'} | {end:.3f} | {plain.at(STEPS):.3f} | {control:.3f} ({step:.0f}) "
              f"| {mine.line['updates']} | {spent:,} |")  # fmt: skip
    means = [interval(list(column), 3) for column in (*zip(*same), list(zip(*equal))[1])]
    print(f"| mean [95 %] | | {means[0]} | {means[1]} | {means[2]} | | |")
    print(
        f"\nAutoNPO minus GRPO: at the same step {interval([a - b for a, b in same], 3)}, at equal tokens {interval([a - b for a, b in equal], 3)}"
    )
    area = [[statistics.fmean(line["eval/accuracy"] for line in run.until(STEPS)) for run in runs] for runs in (auto, grpo)]
    print(f"Mean held-out accuracy over all {STEPS} steps: {interval(area[0], 3)} and {interval(area[1], 3)}, "
          f"difference {interval([a - b for a, b in zip(*area)], 3)}")  # fmt: skip

    panel, (by_step, by_tokens, entropy) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    band(by_step, grpo, "GRPO", "C0", last=STEPS)
    band(by_step, auto, "AutoNPO", "C1")
    band(by_tokens, grpo, "GRPO", "C0", "sampled_tokens")
    for number, mine in enumerate(auto):  # not one curve: each seed jumps elsewhere
        label = "AutoNPO, each seed" if number == 0 else None
        by_tokens.plot(
            [line["sampled_tokens"] / 1000 for line in mine.evals],
            [line["eval/accuracy"] for line in mine.evals],
            "C1",
            lw=0.8,
            label=label,
        )
    for runs, name, color in ((grpo, "GRPO", "C0"), (auto, "AutoNPO", "C1")):
        values = numpy.array([[value for step, value in run.line["entropy"] if step <= STEPS] for run in runs])
        entropy.plot([step for step, _ in runs[0].line["entropy"] if step <= STEPS], values.mean(axis=0), color, label=name)
    for mine in auto:
        for d in mine.line["decisions"]:
            if d["distance"]:
                by_step.axvspan(d["step"] - d["distance"], d["step"], color="C1", alpha=0.05, lw=0)
                by_step.axvline(d["step"], color="C3", lw=0.6, ls="--")
    by_step.set(xlabel="step (dashed: triggers; shaded: guided segments)", ylabel="held-out accuracy", ylim=(0, 1))
    by_tokens.set(xlabel="thousand sampled tokens, all counted", ylim=(0, 1))
    entropy.set(xlabel="step", ylabel="entropy (nats per token)")
    finish(panel, (by_step, by_tokens, entropy), "autonpo.png")


if __name__ == "__main__":
    {"all": main, "figure": figure}[(sys.argv[1:] or ["all"])[0]]()
