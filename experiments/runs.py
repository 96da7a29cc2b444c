"""Named groups of training runs, and the one runner that makes their results.

    python -m experiments.runs early --seeds 0 1 2 3 4    # two runs at a time on two cores
    python -m experiments.runs --help                     # the groups and their rows

Every run adds one line to experiments/FILE.jsonl (committed), from which experiments/tables.py
makes docs/results.md:

    {"row", "seed", "commit", "base", "command", "seconds", "updates",
     "evals": [[step, held-out accuracy, sampled tokens], ...],
     "entropy": [[step, mean of ten steps], ...], "npo/guide_frac", "npo/guide_ratio_max"}

A run whose line is there is skipped, so the same command resumes. Run directories and logs are in
experiments/runs/ (not committed; about 1 GB of checkpoints per seed of "compare").
"""

import argparse
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from plumbing.rollout import batched
from plumbing.run import current_lineage, read_jsonl

HERE = Path(__file__).parent
ROOT = HERE.parent
RUNS = "experiments/runs"
SCOUT, WINDOW, LONG = 40, 60, 140  # npo.py's default; steps of "early", and of its GRPO
STEPS = 200  # of "compare"


@dataclass(frozen=True)
class Run:
    """A planned run. `needs`: the row whose run of the same seed has to be there before."""

    row: str
    command: str  # {seed} and {runs}, the group's directory, are filled in by `planned`
    needs: str = ""
    seed: int = 0
    out: str = ""  # run directory, relative to the repository's root


def guide(row: str, step: int) -> str:
    return f"--guide {{runs}}/{row}-{{seed}}/checkpoints/step_{step:06d}"


# GRPO, which goes on for as many tokens as the others sample; NPO whose guide is GRPO's step 40;
# and the two controls without a future: the policy asked again (D = 0), and twice the answers
EARLY = [
    Run("grpo", f"grpo.py --steps {LONG}"),
    Run("early", f"npo.py --steps {WINDOW} {guide('grpo', SCOUT)}", needs="grpo"),
    Run("self", f"npo.py --steps {WINDOW} --guide self --guided-until {SCOUT}"),
    Run("grpo-16", f"grpo.py --steps {WINDOW} --group-size 16"),
]

# The paper's comparison at the scale of the cards world: where should guidance come from? GRPO's
# first 200 steps are the baseline; it goes on for as many tokens as RLEP with its far future.
# Every row has its own defaults, but for RLEP's pool: 8 answers per prompt (its paper: 64).
NPO, EVALS = f"npo.py --steps {STEPS} --eval-every 10", "--eval-every 10"
LATE = f"--plateau-start 120 --plateau-end {STEPS} {EVALS}"
COMPARE = [
    Run("grpo", f"grpo.py --steps 840 {EVALS}"),
    Run("grpo-16", f"grpo.py --steps {STEPS} --group-size 16 {EVALS}"),
    Run("luffy", f"-m commands.luffy --steps {STEPS} {EVALS}"),
    Run("luffy-unshaped", f"-m commands.luffy --steps {STEPS} --no-shaping {EVALS}"),
    Run("exgrpo", f"-m commands.exgrpo --steps {STEPS} {EVALS}"),
    Run("early", f"{NPO} {guide('grpo', SCOUT)}", "grpo"),
    Run("early-no-is", f"{NPO} --no-is-correction {guide('grpo', SCOUT)}", "grpo"),
    Run("early-teacher", f"{NPO} --guided-until {SCOUT} --guide worlds/cards_teacher"),
    Run("early-far", f"{NPO} --guided-until {SCOUT} {guide('grpo', 400)}", "grpo"),
    Run("late", f"npo.py --intervention late {LATE} {guide('grpo', STEPS)}", "grpo"),
    Run("early+late", f"npo.py --intervention early+late {LATE} {guide('early', STEPS)}", "early"),
    Run("autonpo", f"autonpo.py --steps {STEPS} {EVALS}"),
    Run(
        "rlep",
        f"-m commands.rlep --steps {STEPS} --guide-samples 8 {EVALS} {guide('grpo', 400)}",
        needs="grpo",
    ),
]

# Group -> its result file, and its rows, each after the row that it needs
GROUPS = {"early": ("early", EARLY), "compare": ("compare", COMPARE)}


def planned(group: str, seeds: list[int]) -> list[Run]:
    """A group's runs, row by row, with their seeds and directories."""
    found, runs = [], f"{RUNS}/{group}"
    for run in GROUPS[group][1]:
        for seed in seeds:
            out = f"{runs}/{run.row}-{seed}"
            command = run.command.format(runs=runs, seed=seed)
            command = f"python {command} --seed {seed} --out {out}"
            found.append(Run(run.row, command, run.needs, seed, out))
    return found


def outstanding(runs: list[Run], done: set[tuple[str, int]]) -> list[Run]:
    """Runs without a line, and what these need: its directory may be gone, its command resumes."""
    chosen, needed = [], set()
    for run in reversed(runs):
        if (run.row, run.seed) not in done or (run.row, run.seed) in needed:
            chosen.append(run)
            needed.add((run.needs, run.seed))
    return chosen[::-1]


def measured(out: Path) -> dict:
    """What tables and figures need of a run, without the steps that a rollback undid."""
    lines = read_jsonl(out / "metrics.jsonl")
    kept = current_lineage(lines)
    steps = [line for line in kept if "entropy" in line]
    tens = [(ten[-1]["step"], [line["entropy"] for line in ten]) for ten in batched(steps, 10)]
    guided = [line.get("npo/guide_frac", 0) for line in steps]
    ratios = [line["npo/guide_ratio_max"] for line in steps if "npo/guide_ratio_max" in line]
    evals = [line for line in kept if "eval/accuracy" in line]
    return {
        "updates": sum("loss" in line for line in lines),  # with the undone ones
        "evals": [[e["step"], round(e["eval/accuracy"], 5), e["sampled_tokens"]] for e in evals],
        "entropy": [[step, round(statistics.fmean(values), 5)] for step, values in tens],
        "npo/guide_frac": round(statistics.fmean(guided), 4),
        "npo/guide_ratio_max": max(ratios, default=None),
    }


def make(run: Run, measured=measured) -> dict | None:
    """Runs a command to its end: its result line, or None, with the end of its log printed."""
    out, log = ROOT / run.out, ROOT / f"{run.out}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *shlex.split(run.command)[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # more threads would round differently
    started = time.monotonic()
    with open(log, "w") as file:
        ended = subprocess.run(words, cwd=ROOT, env=environment, stdout=file, stderr=file)
    if ended.returncode:
        tail = "\n  ".join(log.read_text().strip().splitlines()[-6:])
        say(run, f"FAILED with exit code {ended.returncode}, see {log}\n  {tail}")
        return None
    line = {
        "row": run.row,
        "seed": run.seed,
        "commit": commit(),
        "base": base_model(),
        "command": f"OMP_NUM_THREADS=1 {run.command}",
        "seconds": round(time.monotonic() - started, 1),
    } | measured(out)
    say(run, f"accuracy {line['evals'][-1][1]:.3f}, {line['seconds']:.0f} s")
    return line


def make_all(runs: list[Run], results: Path, jobs: int, measured=measured) -> list[Run]:
    """Makes what is outstanding, `jobs` runs at a time. Returns those that failed or had to wait
    for one that did."""
    done = {(line["row"], line["seed"]) for line in read_jsonl(results)}
    chosen, futures, lock = outstanding(runs, done), {}, threading.Lock()

    def work(run: Run) -> bool:
        if run.needs and not futures[run.needs, run.seed].result():
            say(run, f"skipped, since {run.needs} failed")
            return False
        line = make(run, measured)
        if line and (run.row, run.seed) not in done:
            with lock, open(results, "a") as file:
                file.write(json.dumps(line) + "\n")
        return line is not None

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for run in chosen:  # in this order, a run waits only for one that has already begun
                futures[run.row, run.seed] = pool.submit(work, run)
            return [run for run in chosen if not futures[run.row, run.seed].result()]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def say(run: Run, text: str) -> None:
    print(f"{run.row}, seed {run.seed}: {text}", flush=True)


def commit() -> str:
    words = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def base_model() -> str:
    """Which tiny base the runs start from: the first 12 digits of its weights' SHA-256."""
    weights = ROOT / "worlds" / "cards_base" / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:12]


def main() -> None:
    rows = [f"  {name}: {', '.join(run.row for run in GROUPS[name][1])}" for name in GROUPS]
    parser = argparse.ArgumentParser(
        prog="python -m experiments.runs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="\n".join(["groups:", *rows]),
    )
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time [2]")
    args = parser.parse_args()
    results = HERE / f"{GROUPS[args.group][0]}.jsonl"
    lines = read_jsonl(results)
    if any(line["base"] != base_model() for line in lines):
        parser.error(
            f"{results.name} holds runs that started from another base; remove it first (the "
            "commits keep it), so that no table mixes two worlds"
        )
    # Without the half line that a kill may have left
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = planned(args.group, args.seeds)
    if failed := make_all(runs, results, args.jobs):
        sys.exit("not made: " + ", ".join(f"{run.row} {run.seed}" for run in failed))


if __name__ == "__main__":
    main()
