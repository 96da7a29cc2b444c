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

SEEDS, STEPS, LONG = range(5), (200, 300), 600  # a shorter run, and AutoNPO's default


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
    bar, lock = tqdm(total=3 * len(SEEDS), initial=len(done), desc="runs"), threading.Lock()

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
            methods = {f"auto{steps}": f"autonpo.py --steps {steps}" for steps in STEPS}
            methods["auto-grpo"] = f"grpo.py --steps {LONG} --eval-every 10"
            for name, command in methods.items():
                name, command = f"{name}-{seed}", f"{command} --seed {seed} --out experiments/runs/{name}-{seed}"
                jobs.append(pool.submit(work, name, command, seed))
        for job in jobs:
            job.result()


def table(found: dict, steps: int) -> None:
    from tables import interval

    auto, grpo = ([found[f"{name}-{seed}"] for seed in SEEDS] for name in (f"auto{steps}", "auto-grpo"))
    print(
        f"\n{steps} steps:\n\n| seed | interventions | AutoNPO | GRPO, same step | GRPO, equal tokens (step) | updates | tokens, all counted |"
    )
    print("|---|---|---|---|---|---|---|")
    ends = []
    for seed, mine, plain in zip(SEEDS, auto, grpo):
        spent = mine.line["sampled_tokens"]
        assert plain.evals[-1]["sampled_tokens"] > spent, "GRPO did not go on for long enough to be the control"
        tokens = [line["sampled_tokens"] for line in plain.evals]
        step, control = (
            float(numpy.interp(spent, tokens, [line[key] for line in plain.evals])) for key in ("step", "eval/accuracy")
        )
        ends.append((mine.at(steps), plain.at(steps), control))
        places = [
            f"{d['step']} -> {d['step'] - d['distance']}" if d["distance"] else f"{d['step']}: stay"
            for d in mine.line["decisions"]
        ]
        print(f"| {seed} | {', '.join(places) or 'none'} | {ends[-1][0]:.3f} | {ends[-1][1]:.3f} | {control:.3f} ({step:.0f}) "
              f"| {mine.line['updates']} | {spent:,} |")  # fmt: skip
    print(f"| mean [95 %] | | {' | '.join(interval(list(column), 3) for column in zip(*ends))} | | |")
    print(
        f"| AutoNPO minus it | | | {interval([a - b for a, b, _ in ends], 3)} | {interval([a - c for a, _, c in ends], 3)} | | |"
    )


def figure() -> None:
    from tables import Result, band, finish, pyplot

    found = {line["name"]: Result(line) for line in read_jsonl(RESULTS)}
    for steps in STEPS:
        table(found, steps)
    last = max(STEPS)
    auto, grpo = ([found[f"{name}-{seed}"] for seed in SEEDS] for name in (f"auto{last}", "auto-grpo"))
    panel, (by_step, by_tokens, entropy) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    band(by_step, grpo, "GRPO", "C0", last=last)
    band(by_step, auto, "AutoNPO", "C1")
    band(by_tokens, grpo, "GRPO", "C0", "sampled_tokens")
    for number, mine in enumerate(auto):  # not one curve: each seed jumps elsewhere
        label = "AutoNPO, each seed" if number == 0 else None
        by_tokens.plot([line["sampled_tokens"] / 1000 for line in mine.evals], [line["eval/accuracy"] for line in mine.evals],
                       "C1", lw=0.8, label=label)  # fmt: skip
    for runs, name, color in ((grpo, "GRPO", "C0"), (auto, "AutoNPO", "C1")):
        values = numpy.array([[value for step, value in run.line["entropy"] if step <= last] for run in runs])
        entropy.plot([step for step, _ in runs[0].line["entropy"] if step <= last], values.mean(axis=0), color, label=name)
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
