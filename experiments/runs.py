"""The one runner of the experiments: makes the runs of experiments/plan.py and their result lines.

    python -m experiments.runs cards                  # two runs at a time on two cores
    python -m experiments.runs plateau --seeds 50 51  # seeds 50 to 59 are for looking
    python -m experiments.runs --help                 # the groups, their rows and reported seeds

Every run adds one line to experiments/FILE.jsonl (committed), from which experiments/tables.py
makes docs/results.md:

    {"row", "seed", "commit", "base", "command", "seconds", "updates",
     "evals": [[step, held-out accuracy, sampled tokens, that of part B on the staircase], ...],
     "entropy": [[step, mean of ten steps], ...], "npo/guide_frac", "npo/guide_ratio_max"}

or "left_out" with the reason in the place of a measurement. Further keys: "guide_b", the exact
accuracy of a guide chosen by it; of GRPO on the cards "moved", how far its weights went; of the lax
world "lucky"; of AutoNPO its "steps" and "decisions". A run whose line is there is skipped, so the
same command resumes. Run directories and logs are in experiments/runs/ (not committed).
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from experiments.plan import GROUPS, LEVELS, ROWS, Run
from npo import NPOConfig
from plumbing.checkpoints import checkpoint_path
from plumbing.data import load_prompts
from plumbing.files import read_jsonl
from plumbing.guide_cache import load_guide_cache
from plumbing.rollout import batched
from plumbing.run import current_lineage, evaluations

HERE = Path(__file__).parent
ROOT = HERE.parent
RUNS = "experiments/runs"
TAKEN = re.compile(r"\{([\w/-]+)([@>])([\d.]+)\}")  # a checkpoint of another row's run
BASES = {"cards": "cards_base", "cards_lax": "cards_lax", "staircase": "staircase_base"}


def planned(rows: list[Run], seeds) -> list[Run]:
    """The runs, row by row, with their seeds and directories."""
    return [with_seed(run, seed) for run in rows for seed in seeds]


def with_seed(run: Run, seed: int) -> Run:
    out = f"{RUNS}/{run.row}-{seed}"
    command = f"python {run.command} --seed {seed + run.shift} --out {out}"
    return replace(run, command=command, seed=seed, out=out)


def needs(run: Run) -> set[tuple[str, int]]:
    """The runs whose checkpoints it takes."""
    return {(row, run.seed) for row, _, _ in TAKEN.findall(run.command)}


def outstanding(runs: list[Run], done: set[tuple[str, int]]) -> list[Run]:
    """Runs without a line, each after what it needs, whose directory may be gone: its command
    resumes or starts over."""
    chosen = {}

    def choose(run: Run) -> None:
        for row, seed in sorted(needs(run)):
            choose(with_seed(ROWS[row], seed))
        chosen.setdefault((run.row, run.seed), run)

    for run in runs:
        if (run.row, run.seed) not in done:
            choose(run)
    return list(chosen.values())


def taken(row: str, sign: str, value: str, seed: int) -> tuple[int, float | None]:
    """The step of a checkpoint that a command names, and its accuracy on part B if that chose it.

    Raises:
        LookupError: there is none.
    """
    if sign == "@":
        return int(value), None
    for line in evaluations(ROOT / f"{RUNS}/{row}-{seed}"):
        if line["step"] and line["eval/accuracy_b"] > float(value):
            return line["step"], line["eval/accuracy_b"]
    raise LookupError(f"{row}: part B never above {value}")


def measured(out: Path) -> dict:
    """What tables and figures need of a run, without the steps that a rollback undid."""
    lines = read_jsonl(out / "metrics.jsonl")
    kept = current_lineage(lines)
    steps = [line for line in kept if "entropy" in line]
    tens = [(ten[-1]["step"], [line["entropy"] for line in ten]) for ten in batched(steps, 10)]
    guided = [line.get("npo/guide_frac", 0) for line in steps]
    ratios = [line["npo/guide_ratio_max"] for line in steps if "npo/guide_ratio_max" in line]
    evals = [
        [line["step"], round(line["eval/accuracy"], 5), line["sampled_tokens"]]
        + [round(line[key], 7) for key in ("eval/accuracy_b",) if key in line]
        for line in kept
        if "eval/accuracy" in line
    ]
    return {
        "updates": sum("loss" in line for line in lines),  # with the undone ones
        "evals": evals,
        "entropy": [[step, round(statistics.fmean(values), 5)] for step, values in tens],
        "npo/guide_frac": round(statistics.fmean(guided), 4),
        "npo/guide_ratio_max": max(ratios, default=None),
    }


def moved(out: Path) -> dict:
    """||theta(t + D) - theta(t)|| over all weights: [t, D, norm] from the base's first checkpoints
    on."""
    found, steps = [], range(20, 201, 20)
    weights = {s: load_file(checkpoint_path(out, s) / "model.safetensors") for s in steps}
    for start in (20, 60, 100):
        for step in (step for step in steps if step > start):
            gaps = [(weights[step][name] - weights[start][name]).norm() for name in weights[start]]
            norm = sum(gap.item() ** 2 for gap in gaps) ** 0.5
            found.append([start, step - start, round(norm, 5)])
    return {"moved": found}


def lucky(out: Path) -> dict:
    """The verified answers of a guide cache, and how many of them are right with a wrong working:
    the hand's own is not in the text."""
    config = NPOConfig(model="cards_lax", out=str(out))
    cache, (prompts, _) = load_guide_cache(out / "guide.jsonl", config), load_prompts(config)
    workings = {
        f"{prompts.fingerprint}:{row}": hand.working
        for row, hand in zip(prompts.kept, prompts.rows)
    }
    found = [workings[id] in a.text for id, answers in cache.answers.items() for a in answers]
    return {"verified": len(found), "lucky": found.count(False)}


def dynamics(out: Path) -> dict:
    """What AutoNPO is said to change: training reward and entropy of every step, the undone ones
    of before a rollback included, and its decisions."""
    lines = read_jsonl(out / "metrics.jsonl")
    keys = "step", "rollbacks", "reward", "entropy"
    steps = [[round(line.get(key, 0), 5) for key in keys] for line in lines if "loss" in line]
    decisions = [
        {"step": line["autonpo/step"], "distance": line["autonpo/distance"]}
        for line in lines
        if "autonpo/decision" in line
    ]
    return {"steps": steps, "decisions": decisions}


FURTHER = {"cards/grpo": moved, "autonpo": dynamics} | {
    f"lax/{name}": lucky for name in ("40", "160", "40-no-is", "160-no-is")
}


def make(run: Run, measured=measured) -> dict | None:
    """Runs a command to its end: its result line, or None, with the end of its log printed."""
    line = {"row": run.row, "seed": run.seed, "commit": commit(), "base": base_model(run)}
    try:
        found = {words: taken(*words, run.seed) for words in TAKEN.findall(run.command)}
    except LookupError as error:
        say(run, f"left out: {error}")
        return line | {"left_out": str(error)}

    def path(match: re.Match) -> str:
        step, _ = found[match.groups()]
        return f"{RUNS}/{match[1]}-{run.seed}/checkpoints/step_{step:06d}"

    command, started = TAKEN.sub(path, run.command), time.monotonic()
    reached = max((line["step"] for line in evaluations(ROOT / run.out)), default=0)
    lengths = [steps for steps in run.steps if steps >= reached]
    for steps in lengths or [""]:
        words = command.replace("{steps}", str(steps))
        if not ended_well(run, words):
            return None
        if steps and evaluations(ROOT / run.out)[-1]["eval/accuracy_b"] > float(LEVELS[-1]):
            break
    line |= {"command": f"OMP_NUM_THREADS=1 {words}"}
    line |= {"seconds": round(time.monotonic() - started, 1)} | measured(ROOT / run.out)
    for _, accuracy in found.values():
        line |= {"guide_b": round(accuracy, 5)} if accuracy is not None else {}
    further = FURTHER.get(run.row) or FURTHER.get(run.row.split("/")[0])
    line |= further(ROOT / run.out) if further else {}
    say(run, f"accuracy {line['evals'][-1][1]:.3f}, {line['seconds']:.0f} s")
    return line


def ended_well(run: Run, command: str) -> bool:
    log = ROOT / f"{run.out}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *shlex.split(command)[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # more threads would round differently
    with open(log, "a") as file:
        ended = subprocess.run(words, cwd=ROOT, env=environment, stdout=file, stderr=file)
    if ended.returncode:
        tail = "\n  ".join(log.read_text().strip().splitlines()[-6:])
        say(run, f"FAILED with exit code {ended.returncode}, see {log}\n  {tail}")
    return not ended.returncode


def make_all(runs: list[Run], results: Path, jobs: int, measured=measured) -> list[Run]:
    """Makes what is outstanding, `jobs` runs at a time. Returns those that failed or had to wait
    for one that did."""
    done = {(line["row"], line["seed"]) for line in read_jsonl(results)}
    wanted = {(run.row, run.seed) for run in runs}
    chosen, futures, lock = outstanding(runs, done), {}, threading.Lock()

    def work(run: Run) -> bool:
        for need in sorted(needs(run)):
            if not futures[need].result():
                say(run, f"skipped, since {need[0]} failed")
                return False
        if (run.row, run.seed) in done and (ROOT / run.out / "summary.json").is_file():
            return True  # only its checkpoints are needed, and they are there
        line = make(run, measured)
        if line and (run.row, run.seed) in wanted - done:
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
    """The checkout's; "-dirty" if a file has changed since, other than the result lines."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout

    changed = git("diff", "HEAD", "--name-only", "--", ".", ":!experiments/*.jsonl")
    return git("rev-parse", "--short", "HEAD").strip() + ("-dirty" if changed else "")


def base_model(run: Run) -> str:
    """Which tiny base a run starts from: the first 12 digits of its weights' SHA-256."""
    world = re.search(r"--model (\w+)", run.command)
    weights = ROOT / "worlds" / BASES[world[1] if world else "cards"] / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:12]


def main() -> None:
    shown = [
        f"  {name}, seeds {seeds[0]} to {seeds[-1]}, {file}.jsonl: "
        f"{', '.join(run.row.split('/')[1] for run in rows)}"
        for name, (rows, seeds, file) in GROUPS.items()
    ]
    parser = argparse.ArgumentParser(
        prog="python -m experiments.runs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="\n".join(["groups:", *shown]),
    )
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these rows of the group [all]")
    parser.add_argument("--seeds", type=int, nargs="+", help="[the group's reported ones]")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time [2]")
    args = parser.parse_args()
    rows, seeds, file = GROUPS[args.group]
    of = {run.row.split("/")[1]: run for run in rows}
    if unknown := set(args.rows or ()) - of.keys():
        parser.error(f"--rows {' '.join(sorted(unknown))}: {args.group} has {', '.join(of)}")
    chosen = [run for name, run in of.items() if not args.rows or name in args.rows]
    runs, results = planned(chosen, args.seeds or seeds), HERE / f"{file}.jsonl"
    lines, bases = read_jsonl(results), {base_model(run) for run in ROWS.values()}
    if any(line["base"] not in bases for line in lines):
        parser.error(
            f"{results.name} holds runs that started from another base; remove it first (the "
            "commits keep it), so that no table mixes two worlds"
        )
    # Without the half line that a kill may have left
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if failed := make_all(runs, results, args.jobs):
        sys.exit("not made: " + ", ".join(f"{run.row} {run.seed}" for run in failed))


if __name__ == "__main__":
    main()
