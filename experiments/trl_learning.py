"""The cards world through TRL: NPO's early speed-up over TRL's own GRPO, three seeds.

    pip install -r requirements.txt -r requirements-trl.txt
    python experiments/trl_learning.py            # about 10 minutes on two cores; resumes where it was stopped
    python experiments/trl_learning.py table      # from experiments/trl_learning.jsonl alone

GRPO runs 60 steps; its checkpoint of step 40 is the guide, and NPO starts again from the base. Held-out accuracy of each checkpoint as
grpo.py measures it: 256 prompts, 4 answers each, sampled as in training.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT, RUNS, RESULTS = HERE.parent, HERE / "runs", HERE / "trl_learning.jsonl"
sys.path.insert(0, str(ROOT))
import verifier
from policy import Policy
from report import first_reach
from run import derived_seed, read_jsonl
from tasks import load_prompts

SEEDS, STEPS, SCOUT, EVERY = range(3), 60, 40, 5
FLAGS = (f"--guide_prompts {8 * STEPS} --max_steps {STEPS} --save_steps {EVERY} --save_only_model True --per_device_train_batch_size 64 "
         "--num_generations 8 --max_completion_length 64 --learning_rate 1e-4 --use_cpu True --bf16 False --report_to none "
         "--gradient_checkpointing False --logging_steps 1 --disable_tqdm True")  # fmt: skip


def held_out_accuracy(model: Path, seed: int, step: int) -> float:
    policy, right, (_, held_out) = Policy(model, "cpu"), 0.0, load_prompts("cards")
    for first in range(0, len(held_out), 32):
        groups = policy.sample(
            [held_out[i] for i in range(first, first + 32)], 4, 64, 1.0, derived_seed(seed, "evaluate", step, first)
        )
        verifier.score(groups)
        right += sum(c.accuracy for group in groups for c in group.completions)
    return right / (4 * len(held_out))


def work(seed: int) -> None:
    done = {line["name"] for line in read_jsonl(RESULTS)}
    scout = RUNS / f"trl-grpo-{seed}" / f"checkpoint-{SCOUT}"
    for name, guide in (
        (f"trl-grpo-{seed}", ""),
        (f"trl-npo-{seed}", f"--guide {scout.relative_to(ROOT)} --guided_until {SCOUT}"),
    ):
        if name in done:
            continue
        words = f"npo_trl.py --seed {seed} {guide} --output_dir experiments/runs/{name} {FLAGS}"
        with open(RUNS / f"{name}.log", "w") as log:
            subprocess.run([sys.executable, *words.split()], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
                           check=True)  # fmt: skip
        state = json.loads((RUNS / name / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        steps = [line for line in state["log_history"] if "reward" in line]
        curve = [[0, held_out_accuracy(ROOT / "assets/base", seed, 0)]]
        curve += [
            [step, held_out_accuracy(RUNS / name / f"checkpoint-{step}", seed, step)] for step in range(EVERY, STEPS + 1, EVERY)
        ]
        with open(RESULTS, "a") as file:
            file.write(json.dumps({
                "name": name, "seed": seed, "command": "OMP_NUM_THREADS=1 python " + words, "evaluations": curve,
                "guide_frac": statistics.fmean(line.get("npo/guide_frac", 0) for line in steps),
            }) + "\n")  # fmt: skip


def table() -> None:
    from tables import interval

    found = {line["name"]: line for line in read_jsonl(RESULTS)}
    print(
        f"| seed | GRPO at step {SCOUT} | steps: TRL's GRPO | steps: NPO | speed-up | GRPO at step {STEPS} | NPO at step {STEPS} |\n|---|---|---|---|---|---|---|"
    )
    speed, ends = [], []
    for seed in SEEDS:
        grpo, npo = ([{"step": step, "eval/accuracy": value} for step, value in found[f"trl-{name}-{seed}"]["evaluations"]]
                     for name in ("grpo", "npo"))  # fmt: skip
        goal = next(line["eval/accuracy"] for line in grpo if line["step"] == SCOUT)
        steps = [first_reach(curve, goal) for curve in (grpo, npo)]
        assert all(steps), f"seed {seed} never reached {goal}: the mean below would hide it"
        speed.append(steps[0] / steps[1])
        ends.append((grpo[-1]["eval/accuracy"], npo[-1]["eval/accuracy"]))
        print(
            f"| {seed} | {goal:.3f} | {steps[0]:.1f} | {steps[1]:.1f} | {speed[-1]:.2f} | {ends[-1][0]:.3f} | {ends[-1][1]:.3f} |"
        )
    columns = [interval(list(column), 3) for column in zip(*ends)]
    print(f"| mean [95 %] | | | | {interval(speed)} | {columns[0]} | {columns[1]} |")


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        table()
    else:
        RUNS.mkdir(exist_ok=True)
        with ThreadPoolExecutor(2) as pool:  # two at a time on two cores
            list(pool.map(work, SEEDS))
