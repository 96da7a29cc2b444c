"""Two ratios, each measured in turns in one run, on one thread:

1. One GRPO step of ours (sample, reward, update) against one of TRL's GRPOTrainer: the same tiny Qwen3-VL, the same text
   prompts (the cards written out: TRL's Qwen3-VL processor needs torchvision), 8 prompts x 8 slots x 16 tokens, every group
   with signal, AdamW, TRL's gradient checkpointing off.
2. One NPO step with a guide in every group against a GRPO step on the same batch, 16 prompts x 8 slots of the cards world.

    pip install -r requirements.txt -r requirements-trl.txt
    python experiments/bench_step.py
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import cards
from grpo import GRPOConfig, update
from npo import replace_slot
from policy import Policy
from tasks import Prompt, load_prompts

ROUNDS, STEPS = 7, 6  # medians over all rounds; in each, STEPS steps of the one, then of the other


def text_prompts() -> list[Prompt]:
    asked = [f"{cards.question(hand)[:-1]} {' '.join(map(str, hand.digits))}." for hand in cards.hands("train")[:8]]
    return [Prompt(text, [{"role": "user", "content": [{"type": "text", "text": text}]}], [], "0") for text in asked]


def give_rewards(groups) -> None:
    """Every group has one success in four: all of them have signal, and the gate lets a guide in."""
    for group in groups:
        for slot, completion in enumerate(group.completions):
            completion.accuracy = completion.reward = float(slot % 4 == 0)


def our_step(policy, optimizer, prompts, config, seed, guides=None):
    began = time.perf_counter()
    groups = policy.sample(prompts, config.group_size, config.max_new_tokens, 1.0, seed)
    give_rewards(groups)
    if guides:
        groups = [replace_slot(group, guides[group.prompt.id], 0.6) for group in groups]
    update(policy, optimizer, groups, config)
    return time.perf_counter() - began


def trl_steps(folder: str) -> list[float]:
    """Seconds of each step of a fresh GRPOTrainer, from the callback before a step to the one after it."""
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig as TRLConfig
    from trl import GRPOTrainer

    class Clock(TrainerCallback):
        seconds = []

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.began)

    clock = Clock()
    clock.seconds = []
    settings = TRLConfig(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=64, num_generations=8, max_completion_length=16,
        learning_rate=1e-4, lr_scheduler_type="constant", weight_decay=0.01, epsilon=0.2, epsilon_high=0.28, beta=0.0,
        loss_type="grpo", gradient_checkpointing=False, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(cards.BASE)
    tokenizer = AutoTokenizer.from_pretrained(cards.BASE, padding_side="left", eos_token="<unk>")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(slot % 4 == 0) for slot in range(len(completions))],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": prompt.messages} for prompt in text_prompts()]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds[1:]  # the first one warms up


def main() -> None:
    torch.set_num_threads(1)
    config = GRPOConfig(prompts_per_step=8, group_size=8, max_new_tokens=16, micro_batch_size=64)
    policy = Policy(cards.BASE, device="cpu")
    policy.eos_token_ids = [policy.tokenizer.unk_token_id]  # never said: all completions have 16 tokens, as TRL's above
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            theirs += trl_steps(folder)
            ours += [our_step(policy, optimizer, text_prompts(), config, number * STEPS + i) for i in range(STEPS)][1:]
    report("GRPO step, 8 x 8 x 16 tokens: ours / TRL", ours, theirs)

    config = GRPOConfig()
    prompts = [load_prompts("cards")[0][row] for row in range(16)]
    fresh = [Policy(cards.BASE, device="cpu") for _ in range(2)]
    optimizers = [torch.optim.AdamW(policy.parameters(), lr=1e-6) for policy in fresh]  # both stay near the same batch
    answers = fresh[0].sample(prompts, 2, 64, 1.0, seed=99)
    guides = {group.prompt.id: group.completions[0] for group in answers}
    for guide in guides.values():
        guide.source, guide.accuracy, guide.reward = "guide@40", 1.0, 1.0
    plain, guided = [], []
    for number in range(ROUNDS * STEPS):
        plain.append(our_step(fresh[0], optimizers[0], prompts, config, number))
        guided.append(our_step(fresh[1], optimizers[1], prompts, config, number, guides))
    report("NPO step, a guide in every group / GRPO step, 16 x 8, cards", guided[2:], plain[2:])


def report(name: str, mine: list[float], other: list[float]) -> None:
    first, second = statistics.median(mine), statistics.median(other)
    print(json.dumps({"what": name, "seconds": [round(first, 4), round(second, 4)], "ratio": round(first / second, 3)}))


if __name__ == "__main__":
    main()
