"""Early bootstrapping through TRL: the rows cards/grpo and cards/40 of experiments/plan.py, with
commands/npo_trl.py in the place of grpo.py and npo.py. The same prompts, sizes and seeds.

    pip install -r requirements.txt -r requirements-trl.txt
    python -m experiments.trl_early                    # ten seeds, one run at a time
    python -m experiments.trl_early --seeds 10 11

Every run adds a line to experiments/trl_early.jsonl, as experiments/runs.py does; a run whose line
is there is skipped, so the same command resumes. At the end: the speed-up in steps over the seeds
that are there, beside the plain loop's over the same seeds.
"""

import argparse
import statistics
import sys
from pathlib import Path

from experiments.groups import mean, ratio
from experiments.plan import SCOUT, WINDOW, Run
from experiments.results import Result, Runs, load, speed_ups
from experiments.runs import HERE, RUNS, make_all
from grpo import GRPOConfig
from plumbing.checkpoints import checkpoints, step_of
from plumbing.data import load_prompts
from plumbing.exact import exact_accuracies, right_texts
from plumbing.files import read_jsonl
from plumbing.model import Policy
from plumbing.rollout import batched
from worlds import cards

RESULTS = HERE / "trl_early.jsonl"
LONG = 140  # steps of GRPO
FLAGS = (
    "--per_device_train_batch_size 64 --num_generations 8 --max_completion_length 80 "
    "--learning_rate 1e-4 --save_steps 5 --logging_steps 1 --use_cpu True --bf16 False "
    "--gradient_checkpointing False --report_to none --disable_tqdm True"
)
ROWS = {
    "grpo": f"--max_steps {LONG}",
    "early": f"--intervention early --scout_steps {SCOUT} --max_steps {WINDOW}",
}


def planned(seeds: list[int]) -> list[Run]:
    found = []
    for seed in seeds:
        for row, flags in ROWS.items():
            out = f"{RUNS}/trl/{row}-{seed}"
            command = f"python -m commands.npo_trl {flags} {FLAGS} --seed {seed} --output_dir {out}"
            found.append(Run(row, command, seed=seed, out=out))
    return found


def measured(out: Path) -> dict:
    """As `runs.measured`: TRL has not evaluated, so every checkpoint is evaluated here."""
    config, lines = GRPOConfig(device="cpu"), read_jsonl(out / "metrics.jsonl")
    tokens = {line["step"]: line["sampled_tokens"] for line in lines} | {0: 0}
    evals = []
    for path in (cards.BASE, *checkpoints(out)):
        step = step_of(path) if path != cards.BASE else 0
        policy = Policy(path, "cpu")
        texts = right_texts(policy, load_prompts(config)[1])
        found = exact_accuracies(policy, texts, config)
        evals.append([step, round(statistics.fmean(found), 5), tokens[step]])
    tens = [(ten[-1]["step"], [line["entropy"] for line in ten]) for ten in batched(lines, 10)]
    guided = [line.get("npo/guide_frac", 0) for line in lines]
    ratios = [line["npo/guide_ratio_max"] for line in lines if "npo/guide_ratio_max" in line]
    return {
        "updates": len(lines),
        "evals": evals,
        "entropy": [[step, round(statistics.fmean(values), 5)] for step, values in tens],
        "npo/guide_frac": round(statistics.fmean(guided), 4),
        "npo/guide_ratio_max": max(ratios, default=None),
    }


def pairs() -> dict[str, list[tuple[Result, Result]]]:
    """NPO and GRPO of each seed: TRL's, and the plain loop's of the same seeds."""
    trl = Runs(read_jsonl(RESULTS)).together("early", "grpo")
    plain = load().only([run.line["seed"] for run, _ in trl])
    return {"TRL": trl, "plain": plain.together("cards/40", "cards/grpo")}


def cells(pairs: list[tuple[Result, Result]]) -> list[str]:
    """Seeds; speed-up, the scout not counted; accuracy of GRPO and of NPO at step WINDOW."""
    found = [
        [run.at(WINDOW) for run in runs] for runs in ([b for _, b in pairs], [a for a, _ in pairs])
    ]
    return [f"{len(pairs)}", ratio(speed_ups(pairs)[0]), *map(mean, found)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.trl_early",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10, 20)))
    args = parser.parse_args()
    failed = make_all(planned(args.seeds), RESULTS, 1, measured)
    for loop, found in pairs().items():
        seeds, speed_up, grpo, npo = cells(found)
        print(f"{loop:6} {seeds} seeds: speed-up {speed_up}; at {WINDOW}: GRPO {grpo}, NPO {npo}")
    if failed:
        sys.exit("not made: " + ", ".join(f"{run.row} {run.seed}" for run in failed))


if __name__ == "__main__":
    main()
