"""Every run behind the README's numbers: early speed-up, IS ablation, late breakthrough, and their controls.

    python experiments/claims.py            # about half an hour on two cores; resumes where it was stopped

Runs go to experiments/runs/ (not committed), one line a run to experiments/claims.jsonl (committed), from which
experiments/tables.py makes the tables and figures. Each seed's plain GRPO run is the baseline and the
scout of every distance at once; a longer one is late's scout and the control at equal sampled tokens.
"""

import json
import os
import re
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
DISTANCES = (10, 20, 40, 60)
WINDOW = 60  # IS ablation: guided all the way, also past the guide's own step
PLATEAU_START, PLATEAU_END = 240, 320  # npo.py's defaults
# late spends PLATEAU_END steps, 8 answers to each prompt of the replay, and the replay: GRPO may spend that on more steps
LONG = PLATEAU_END + 2 * (PLATEAU_END - PLATEAU_START)


def stages(seed: int) -> list[list[tuple[str, str]]]:
    """(name, command) of a seed's runs, in three stages."""
    runs = RUNS.relative_to(ROOT)

    def plain(name: str, flags: str) -> tuple[str, str]:
        return f"{name}-{seed}", f"grpo.py --seed {seed} {flags} --out {runs}/{name}-{seed}"

    def guided(name: str, guide: str, flags: str) -> tuple[str, str]:
        return f"{name}-{seed}", f"npo.py --seed {seed} --guide {guide} {flags} --out {runs}/{name}-{seed}"

    early = [
        plain("grpo", f"--steps {WINDOW} --save-every 10"),
        guided("early", f"{runs}/grpo-{seed}/checkpoints/step_{SCOUT:06d}", f"--steps {WINDOW}"),
    ]
    ablation, flags = [], f"--steps {WINDOW} --guided-until {WINDOW} --eval-every 10"
    for distance in DISTANCES:
        with_is = guided(f"guide{distance}-is-correction", f"{runs}/grpo-{seed}/checkpoints/step_{distance:06d}", flags)
        same_cache = f"{runs}/guide{distance}-is-correction-{seed}/guide.jsonl"
        ablation += [with_is, guided(f"guide{distance}-no-is-correction", same_cache, f"{flags} --no-is-correction")]
    late = [
        plain("long", f"--steps {LONG} --eval-every 20"),
        guided("late", f"{runs}/long-{seed}/checkpoints/step_{PLATEAU_END:06d}", "--intervention late --eval-every 20"),
    ]
    return [early, ablation, late if seed in LATE_SEEDS else []]


def result(name: str, command: str, seed: int) -> dict:
    """What tables and figures need of a run: its held-out curve, its guide's ratios, its cost."""
    out = RUNS / name
    lines = read_jsonl(out / "metrics.jsonl")
    guided = [line for line in lines if "npo/guide_ratio_mean" in line]
    cache = read_jsonl(out / "guide.jsonl") or read_jsonl(ROOT / re.findall(r"--guide (\S+)|$", command)[0])
    return {
        "name": name, "seed": seed, "command": "OMP_NUM_THREADS=1 python " + command,
        "commit": subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "evaluations": [[line["step"], line["sampled_tokens"], round(line["eval/accuracy"], 5)] for line in evaluations(out)],
        "guide": [[line["step"], round(line["npo/guide_frac"], 3), round(line["npo/guide_ratio_mean"], 4),
                   round(line["npo/guide_ratio_min"], 5), round(line["npo/guide_ratio_max"], 3)] for line in guided],
        "guide_solved": sum(line["completion"] is not None for line in cache[1:]) / len(cache[1:]) if cache else None,
        "largest_ratio": max((line["npo/guide_ratio_max"] for line in guided), default=None),
        "entropy_end": round(sum(line["entropy"] for line in lines[-10:]) / 10, 4),
    }  # fmt: skip


def main() -> None:
    RUNS.mkdir(exist_ok=True)
    done = {line["name"] for line in read_jsonl(RESULTS)}
    plan = [[stages(seed)[stage] for seed in SEEDS] for stage in range(3)]
    total = sum(len(chain) for stage in plan for chain in stage)
    bar, lock = tqdm(total=total, initial=len(done), desc="runs"), threading.Lock()

    def work(seed: int, chain: list[tuple[str, str]]) -> None:
        for name, command in chain:
            if name in done:
                continue
            environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two runs at a time on two cores
            with open(RUNS / f"{name}.log", "w") as log:
                subprocess.run(
                    [sys.executable, *command.split()], cwd=ROOT, env=environment, stdout=log, stderr=log, check=True
                )
            with lock, open(RESULTS, "a") as file:
                file.write(json.dumps(result(name, command, seed)) + "\n")
                bar.update()

    for stage in plan:
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(work, seed, chain) for seed, chain in zip(SEEDS, stage)]:
                future.result()


if __name__ == "__main__":
    main()
