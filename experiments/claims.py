"""Every run behind the README's numbers: early speed-up, IS ablation, late breakthrough, and their controls.

    python experiments/claims.py            # about half an hour on two cores; resumes where it was stopped

Runs go to experiments/runs/ (not committed), one line a run to experiments/claims.jsonl (committed), from which
experiments/tables.py makes the tables and figures. Each seed's plain GRPO run is long enough to be all of these at once: the
scout of every distance, the baseline, and the control at equal sampled tokens. Steps and seeds were set before any of these
runs; the defaults under test were chosen on seed 10, which is not among them.
"""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).parent
ROOT, RUNS, RESULTS = HERE.parent, HERE / "runs", HERE / "claims.jsonl"
sys.path.insert(0, str(ROOT))
from run import evaluations, read_jsonl

SEEDS, LATE_SEEDS = range(5), range(3)
SCOUT = 40  # npo.py's default
DISTANCES = (10, 20, 40, 80)
WINDOW = 100  # IS ablation: guided all the way, also past the guide's own step
PLATEAU_START, PLATEAU_END = 80, 200
# late: PLATEAU_END steps ahead, 8 guide samples for each prompt of the replay, and the replay itself
EQUAL_TOKENS = PLATEAU_END + 2 * (PLATEAU_END - PLATEAU_START)


def commands(seed: int) -> list[tuple[str, list[str]]]:
    """(name, command) of a seed's runs; the first is the one whose checkpoints the others start from or learn from."""
    late = seed in LATE_SEEDS
    steps = EQUAL_TOKENS if late else WINDOW
    grpo, guide = f"experiments/runs/grpo-{seed}", "experiments/runs/grpo-{}/checkpoints/step_{:06d}"
    plan = [(f"grpo-{seed}", f"grpo.py --seed {seed} --steps {steps} --save-every 10 --out {grpo}")]
    plan.append((f"early-{seed}", f"npo.py --seed {seed} --steps {WINDOW} --guide {guide.format(seed, SCOUT)}"))
    for distance in DISTANCES:
        for ratio in ("is-correction", "no-is-correction"):
            plan.append((f"guide{distance}-{ratio}-{seed}",
                         f"npo.py --seed {seed} --steps {WINDOW} --guided-until {WINDOW} --{ratio} "
                         f"--guide {guide.format(seed, distance)}"))  # fmt: skip
    if late:
        plan.append((f"late-{seed}", f"npo.py --seed {seed} --steps {PLATEAU_END} --save-every 10 --intervention late "
                     f"--plateau-start {PLATEAU_START} --plateau-end {PLATEAU_END} --guide {guide.format(seed, PLATEAU_END)}"))  # fmt: skip
    return [
        (name, [*words.split(), *([] if "--out" in words else ["--out", f"experiments/runs/{name}"])]) for name, words in plan
    ]


def result(name: str, command: list[str], seed: int) -> dict:
    """What tables and figures need of a run: its held-out curve, its guide's ratios, its cost."""
    out = RUNS / name
    lines = read_jsonl(out / "metrics.jsonl")
    guided = [line for line in lines if "npo/guide_ratio_mean" in line]
    cache = read_jsonl(out / "guide.jsonl")
    return {
        "name": name, "seed": seed, "command": "OMP_NUM_THREADS=1 python " + " ".join(command),
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "evaluations": [[line["step"], line["sampled_tokens"], round(line["eval/accuracy"], 5)] for line in evaluations(out)],
        "guide": [[line["step"], round(line["npo/guide_frac"], 3), round(line["npo/guide_ratio_mean"], 4),
                   round(line["npo/guide_ratio_min"], 5), round(line["npo/guide_ratio_max"], 3)] for line in guided],
        "guide_solved": sum(line["completion"] is not None for line in cache[1:]) / len(cache[1:]) if cache else None,
        "largest_ratio": max((line["npo/guide_ratio_max"] for line in guided), default=None),
        "entropy_end": round(sum(line["entropy"] for line in lines[-10:]) / 10, 4),
    }  # fmt: skip


def main() -> None:
    plans = {seed: commands(seed) for seed in SEEDS}
    done = {line["name"] for line in read_jsonl(RESULTS)}
    bar = tqdm(total=sum(map(len, plans.values())), initial=len(done), desc="runs")
    lock = threading.Lock()

    def chain(seed: int) -> None:
        for name, command in plans[seed]:
            checkpoints = RUNS / f"grpo-{seed}" / "checkpoints"
            if name in done and (not name.startswith("grpo") or checkpoints.is_dir()):
                continue
            RUNS.mkdir(exist_ok=True)
            with open(RUNS / f"{name}.log", "w") as log:
                environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two runs at a time on two cores
                subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
            with lock:
                if name not in done:
                    with open(RESULTS, "a") as file:
                        file.write(json.dumps(result(name, command, seed)) + "\n")
                bar.update()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(chain, seed) for seed in SEEDS]:
            future.result()


if __name__ == "__main__":
    main()
