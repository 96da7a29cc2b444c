"""The paper's comparison at the scale of the cards world: where should guidance come from?

    python experiments/compare.py                      # about 80 minutes on two cores; resumes where it was stopped
    python experiments/compare.py rerun 0 luffy late   # runs some of seed 0 again, with what they need, and compares with the committed lines

Five seeds of every method, 200 steps each, one line a run in experiments/compare.jsonl (committed), from which
experiments/figures.py makes tables and figures. Steps and all settings below were chosen once, before any of these runs, to fit
100 minutes; methods have their own defaults, but for RLEP's pool (8 answers a prompt for 64, as many as NPO's guide gives). Nothing was tuned for any
row but NPO, whose defaults were settled on this world's seeds 10 to 12. Two rows were added while the others ran, to switch the source alone: NPO early's
loop, loss and window with the teacher or the far future as its guide. LUFFY, ExGRPO and RLEP change loss and window, too.

One plain GRPO run per seed is the baseline (its first 200 steps), the early scout (40), late's scout (200) and where it goes back to (120),
RLEP's far future (400) and, at 840 steps, the control with as many sampled tokens as the costliest method, RLEP with its far future.
`sampled_tokens` of every method holds what its guide has cost: the scout's run, the cache, the probes, the teacher's data (not the
teacher's own training), but not the slots that LUFFY, ExGRPO and RLEP replace, which their own code never samples (baselines.py).

The plane: at step 60 of each GRPO run, on the 256 prompts that the next steps ask, each source's quality Q (share of the prompts failed 8
times of 8 that it solves within 8) and variance V: exp of the mean per-token KL(source || policy), and the noise-to-signal
ratio of NPO's gradient with its answer in the slot, over the prompts that the source solves. Definitions as in
experiments/signal_curve.py. The past is the checkpoint of step 20, asked afresh; ExGRPO's own pool holds only prompts that were solved.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).parent
ROOT, RUNS, RESULTS = HERE.parent, HERE / "runs" / "compare", HERE / "compare.jsonl"
sys.path.insert(0, str(ROOT))
from run import checkpoint_path, evaluations, read_jsonl, rows_of_step, surviving

SEEDS, STEPS = range(5), 200
SCOUT, BACK = 40, 120  # npo.py's default; where the late intervention goes back to
FAR, LONG = 400, 840
AT, PROMPTS = 60, 256  # the plane
PLANE = {"near future": AT + 40, "far future": FAR, "past": AT - 40, "teacher": None}  # a step of the GRPO run


def commands(seed: int, runs: Path) -> dict[str, str]:
    """Name -> command of a seed's runs, each after those that it needs."""

    def to(name: str) -> str:
        return f"--seed {seed} --eval-every 10 --out {runs}/{name}-{seed}"

    def saved(name: str, step: int) -> str:
        return f"--guide {checkpoint_path(runs / f'{name}-{seed}', step)}"

    late = f"--plateau-start {BACK} --plateau-end {STEPS}"
    return {
        "grpo": f"grpo.py --steps {STEPS} {to('grpo')}",
        "grpo-16": f"grpo.py --steps {STEPS} --group-size 16 {to('grpo-16')}",
        "luffy": f"baselines.py luffy --steps {STEPS} {to('luffy')}",
        "luffy-unshaped": f"baselines.py luffy --no-shaping --steps {STEPS} {to('luffy-unshaped')}",
        "exgrpo": f"baselines.py exgrpo --steps {STEPS} {to('exgrpo')}",
        "early": f"npo.py --steps {STEPS} {saved('grpo', SCOUT)} {to('early')}",
        "early-no-is": f"npo.py --steps {STEPS} --no-is-correction {saved('grpo', SCOUT)} {to('early-no-is')}",
        "early-teacher": f"npo.py --steps {STEPS} --guide assets/teacher --guided-until {SCOUT} {to('early-teacher')}",
        "late": f"npo.py --intervention late {late} {saved('grpo', STEPS)} {to('late')}",
        "early+late": f"npo.py --intervention early+late {late} {saved('early', STEPS)} {to('early+late')}",
        "autonpo": f"autonpo.py --steps {STEPS} {to('autonpo')}",
        "grpo-equal": f"grpo.py --steps {LONG} {to('grpo')}",  # goes on from step 200
        "early-far": f"npo.py --steps {STEPS} {saved('grpo', FAR)} --guided-until {SCOUT} {to('early-far')}",
        "plane": f"experiments/compare.py plane {seed} {runs}",
        "rlep": f"baselines.py rlep --steps {STEPS} --guide-samples 8 {saved('grpo', FAR)} {to('rlep')}",
    }


NEEDS = {"grpo-equal": ["grpo"], "early": ["grpo"], "early-no-is": ["grpo"], "late": ["grpo"], "early+late": ["early"],
         "rlep": ["grpo-equal"], "early-far": ["grpo-equal"], "plane": ["grpo-equal"]}  # fmt: skip
STAGES = (
    ("grpo",),
    ("grpo-equal", "grpo-16", "luffy", "luffy-unshaped", "exgrpo", "early", "early-no-is", "late", "autonpo", "early-teacher"),
    ("rlep", "early+late", "plane", "early-far"),
)


def result(out: Path) -> dict:
    """What tables and figures need of a run: its held-out curve by steps and tokens, entropy, its source's ratios."""
    lines = [line for line in surviving(read_jsonl(out / "metrics.jsonl")) if "entropy" in line]
    tens = [lines[first : first + 10] for first in range(0, len(lines), 10)]
    return {
        "evaluations": [[line["step"], line["sampled_tokens"], round(line["eval/accuracy"], 5)] for line in evaluations(out)],
        "entropy": [[ten[-1]["step"], round(statistics.fmean(line["entropy"] for line in ten), 5)] for ten in tens],
        "guide_frac": round(statistics.fmean(line.get("npo/guide_frac", 0) for line in lines), 4),
        "largest_ratio": max((line["npo/guide_ratio_max"] for line in lines if "npo/guide_ratio_max" in line), default=None),
    }


def execute(name: str, seed: int, runs: Path) -> dict:
    """Runs one command to its end. One thread, two at a time on two cores: the number of threads would change the rounding."""
    command, log = commands(seed, runs)[name], ROOT / runs / f"{name}-{seed}.log"
    line = {"name": name, "seed": seed, "command": "OMP_NUM_THREADS=1 python " + command}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                              stdout=subprocess.PIPE, stderr=file, text=True)  # fmt: skip
    if done.returncode:
        raise SystemExit(
            f"error: {command}\nended with {done.returncode}: {log.read_text().strip().splitlines()[-1:]}, see {log}"
        )
    if name == "plane":
        return line | {"sources": json.loads(done.stdout.splitlines()[-1])}
    return line | result(ROOT / re.findall(r"--out (\S+)", command)[0])


def plane(seed: int, runs: Path) -> None:
    """Q and V of every source against the policy of step 60, as one line of JSON."""
    import torch
    from signal_curve import distributions, gradient_variance, group_gradient, sample

    import cards
    from command import load_config_prompts
    from npo import NPOConfig, replace_slot
    from policy import Policy

    config, run = NPOConfig(seed=seed), ROOT / runs / f"grpo-{seed}"
    train_prompts, _ = load_config_prompts(config)
    steps = range(AT + 1, AT + 1 + PROMPTS // config.prompts_per_step)
    prompts = [train_prompts[row] for step in steps for row in rows_of_step(len(train_prompts), step, config)]
    policy = Policy(checkpoint_path(run, AT), "cpu")
    groups = sample(policy, prompts, config, "plane policy")
    failed = [i for i, group in enumerate(groups) if not any(c.accuracy for c in group.completions)]
    found = {}
    for name, step in PLANE.items():
        source = Policy(checkpoint_path(run, step) if step else cards.TEACHER, "cpu")
        answers = sample(source, prompts, config, "plane source", name)
        rows = [(groups[i].inputs, c.token_ids) for i, group in enumerate(answers) for c in group.completions]
        kl = [torch.where(q == float("-inf"), 0.0, q.exp() * (q - p)).sum(dim=-1)
              for p, q in zip(distributions(policy, rows), distributions(source, rows))]  # fmt: skip
        right = {i: next((c for c in answers[i].completions if c.accuracy == 1 and c.finished), None) for i in failed}
        mixed = [replace_slot(groups[i], dataclasses.replace(c, source="guide"), config.gate) for i, c in right.items() if c]
        spread = norm = None
        if mixed:
            flat = torch.stack([group_gradient(policy, group, config) for group in mixed])
            gram = (flat @ flat.T).double().numpy()
            spread, norm = gradient_variance(gram, torch.ones(len(mixed)).double().numpy())
        found[name] = {
            "failed": len(failed), "quality": round(len(mixed) / len(failed), 4),
            "exp_kl": round(math.exp(torch.cat(kl).mean().item()), 4),
            "noise_to_signal": round(spread / norm, 3) if norm and norm > 0 else None,
        }  # fmt: skip
    print(json.dumps(found))


def main() -> None:
    lines = read_jsonl(RESULTS)
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))  # without what a kill left unfinished
    done = {(line["name"], line["seed"]) for line in lines}
    every = [[(name, seed) for name in stage for seed in SEEDS] for stage in STAGES]
    bar, lock = tqdm(total=sum(map(len, every)), initial=len(done), desc="runs"), threading.Lock()

    def work(name: str, seed: int) -> None:
        line = execute(name, seed, RUNS.relative_to(ROOT))
        with lock, open(RESULTS, "a") as file:
            file.write(json.dumps(line) + "\n")
            bar.update()

    for stage in every:
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(work, *job) for job in stage if job not in done]:
                future.result()


def rerun(seed: int, names: list[str]) -> None:
    """Runs them from nothing in a directory of their own, what they need included, and says what came out differently."""
    lines, again = {(line["name"], line["seed"]): line for line in read_jsonl(RESULTS)}, RUNS.with_name("again")
    if unknown := [name for name in names if (name, seed) not in lines]:
        raise SystemExit(f"error: no line of {unknown[0]!r} with seed {seed}; names are {', '.join(commands(seed, again))}")
    shutil.rmtree(again, ignore_errors=True)
    done = []

    def run(name: str) -> None:
        for needed in NEEDS.get(name, []):
            run(needed)
        if name not in done:
            done.append(name)
            before, now = lines[name, seed], execute(name, seed, again.relative_to(ROOT))
            changed = [key for key in before if key != "command" and now[key] != before[key]]
            print(f"{name}, seed {seed}: {'DIFFERENT: ' + ', '.join(changed) if changed else 'the same numbers'}", flush=True)

    for name in names:
        run(name)


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or ["all"]
    if what == "plane":
        plane(int(rest[0]), Path(rest[1]))
    elif what == "rerun":
        rerun(int(rest[0]), rest[1:])
    else:
        main()
