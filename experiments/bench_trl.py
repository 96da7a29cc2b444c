"""What the extension costs a step: NPOTrainer with a guide in every group against TRL's GRPOTrainer, in turns in one run, on one thread.

    pip install -r requirements.txt -r requirements-trl.txt
    python experiments/bench_trl.py

The cards world, 8 prompts x 8 slots; the gate is 1, so that every group takes its guide. Seconds of a step by a callback, medians over rounds.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from transformers import TrainerCallback

import verifier
from npo_trl import Arguments, NPOConfig, make_trainer
from policy import Policy
from run import derived_seed
from tasks import load_prompts

ROUNDS, STEPS, PROMPTS = 6, 6, 48


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.began)


def steps(folder: str, guides: dict) -> list[float]:
    config = NPOConfig(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=64, num_generations=8, max_completion_length=64, learning_rate=1e-6,
        gate=1.0, gradient_checkpointing=False, use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, reward_weights=[verifier.ACCURACY_WEIGHT, verifier.FORMAT_WEIGHT],
    )  # fmt: skip
    trainer, clock = make_trainer(Arguments(guide_prompts=PROMPTS), config), Clock()
    trainer.guides = guides  # none: GRPOTrainer, as tests/test_npo_trl.py shows to the bit
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds[1:]  # the first one warms up


def main() -> None:
    torch.set_num_threads(1)
    prompts = [load_prompts("cards")[0][row] for row in range(PROMPTS)]
    answers = Policy(Path(__file__).parent.parent / "assets/base", "cpu").sample(prompts, 1, 64, 1.0, derived_seed("guides"))
    guides = {group.prompt.id: group.completions[0] for group in answers}
    for guide in guides.values():
        guide.source, guide.accuracy, guide.reward = "guide@40", 1.0, 1.0
    plain, guided = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            plain += steps(folder, {})
            guided += steps(folder, guides)
    mine, other = statistics.median(guided), statistics.median(plain)
    print(json.dumps({"NPOTrainer": round(mine, 4), "GRPOTrainer": round(other, 4), "ratio": round(mine / other, 3)}))


if __name__ == "__main__":
    main()
