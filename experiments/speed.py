"""Four speeds, on one CPU thread. What is compared takes turns in one run; medians are printed.

    pip install -r requirements.txt -r requirements-trl.txt
    python -m experiments.speed          # all, some minutes
    python -m experiments.speed step     # or guided, trl, recorded

step     a GRPO step of ours against one of TRL's GRPOTrainer: the same tiny Qwen3-VL and text
         prompts (the cards written out), 8 prompts x 8 slots x 16 tokens, every group with signal
guided   a step with a guide's answer in every group against one without, 16 prompts of the cards
trl      a step of TRL's GRPOTrainer as in `step`, with a guide's answer in every group, against
         one of TRL's own
recorded a step whose 8 x 8 answers are written to rollouts/ against one that writes none
"""

import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from grpo import GRPOConfig, update
from npo import replace_slot
from plumbing.data import load_prompts
from plumbing.guide_cache import GuideCache
from plumbing.model import Policy
from plumbing.record import rollout_rows, write_rollouts
from plumbing.rollout import Completion, Group, Prompt
from worlds import cards

ROUNDS, STEPS = 7, 6  # STEPS steps of the one, then of the other, ROUNDS times


def our_step(
    policy: Policy, optimizer, prompts: list[Prompt], config: GRPOConfig, seed: int, guides=None
) -> tuple[float, list[Group]]:
    """Seconds of a step, and the groups that it trained on. `guides`: {prompt id: completion}."""
    began = time.perf_counter()
    groups = policy.sample(prompts, config.group_size, config.max_new_tokens, 1.0, seed)
    for group in groups:  # one success in four: all have signal, and the gate lets guides in
        for slot, completion in enumerate(group.completions):
            completion.accuracy = completion.reward = float(slot % 4 == 0)
    if guides:
        groups = [replace_slot(group, guides[group.prompt.id]) for group in groups]
    update(policy, optimizer, groups, config)
    return time.perf_counter() - began, groups


def text_prompts() -> list[Prompt]:
    """Without pictures: for those TRL's processor needs torchvision."""
    found = []
    for hand in cards.hands("train")[:8]:
        text = f"{cards.question(hand)[:-1]} {' '.join(map(str, hand.digits))}."
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        found.append(Prompt(text, messages, [], "0"))
    return found


def trl_steps(folder: str, guided: bool = False) -> list[float]:
    """Seconds of the steps of a new GRPOTrainer, without the first, which warms up."""
    import transformers
    import trl

    from commands.trl_trainer import NPOConfig, NPOTrainer
    from plumbing.trl_data import rows_of

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.began)

    def rewards(completions, **_) -> list[float]:
        return [float(slot % 4 == 0) for slot in range(len(completions))]

    seconds, batch = [], {"per_device_train_batch_size": 64, "num_generations": 8}
    batch |= {"max_completion_length": 16, "max_steps": STEPS}
    loss = {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28}
    loss |= {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "weight_decay": 0.01}
    machine = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
    kind, more = (NPOConfig, {"gate": 1.0}) if guided else (trl.GRPOConfig, {})
    settings = kind(folder, **batch, **loss, **machine, **quiet, **more, disable_tqdm=True)
    # <unk> is never said, so every answer has 16 tokens
    load = transformers.AutoTokenizer.from_pretrained
    tokenizer = load(cards.BASE, padding_side="left", eos_token="<unk>", trust_remote_code=False)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        cards.BASE, trust_remote_code=False
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    prompts, answers = text_prompts(), {}
    for prompt in prompts:  # as long as those that are sampled
        ids = tokenizer("12 +3= 15 +4= 19 +5= 24 +6= 30 +7= 37")["input_ids"][:16]
        answer = Completion(prompt.id, ids, [-0.1] * len(ids), "", False, "guide@9")
        answer.accuracy = answer.reward = 1.0
        answers[prompt.id] = [answer]
    kind, more = trl.GRPOTrainer, {}
    if guided:
        kind, more = NPOTrainer, {"guides": GuideCache(answers, 10**9)}
    rows = rows_of(prompts)
    trainer = kind(model, rewards, settings, rows, processing_class=tokenizer, **more)
    trainer.add_callback(Clock())
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    trained = [mixed.completions[-1].source for _, mixed in trainer.groups] if guided else []
    if "policy" in trained:
        raise RuntimeError("a group has no guide's answer")
    return seconds[1:]


def step() -> str:
    if not importlib.util.find_spec("trl"):
        return "not measured, TRL is not installed: pip install -r requirements-trl.txt"
    config = GRPOConfig(max_new_tokens=16, micro_batch_size=64, device="cpu")
    policy, prompts = Policy(cards.BASE, "cpu"), text_prompts()
    policy.eos_token_ids = [policy.tokenizer.unk_token_id]  # as for TRL
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for first in range(0, ROUNDS * STEPS, STEPS):
            theirs += trl_steps(folder)
            seeds = range(first, first + STEPS)
            ours += [our_step(policy, optimizer, prompts, config, seed)[0] for seed in seeds][1:]
    return compared("ours", ours, "TRL", theirs)


def in_trl() -> str:
    if not importlib.util.find_spec("trl"):
        return "not measured, TRL is not installed: pip install -r requirements-trl.txt"
    with_guides, plain = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            plain += trl_steps(folder)
            with_guides += trl_steps(folder, guided=True)
    return compared("guided", with_guides, "TRL's own", plain)


def guided() -> str:
    config = GRPOConfig(device="cpu")
    prompts = [load_prompts(config)[0][row] for row in range(16)]
    policies = [Policy(cards.BASE, "cpu") for _ in range(2)]
    # at so low a rate both go on sampling the same batch
    optimizers = [torch.optim.AdamW(policy.parameters(), 1e-6) for policy in policies]
    answered = policies[0].sample(prompts, 1, config.max_new_tokens, 1.0, 99)
    guides = {group.prompt.id: group.completions[0] for group in answered}
    for guide in guides.values():
        guide.source, guide.accuracy, guide.reward = "guide@40", 1.0, 1.0
    plain, with_guides = [], []
    for seed in range(ROUNDS * STEPS):
        plain.append(our_step(policies[0], optimizers[0], prompts, config, seed)[0])
        taken = our_step(policies[1], optimizers[1], prompts, config, seed, guides)
        with_guides.append(taken[0])
    return compared("guided", with_guides[2:], "plain", plain[2:])


def recorded() -> str:
    config = GRPOConfig(device="cpu")
    prompts = [load_prompts(config)[0][row] for row in range(8)]
    policy = Policy(cards.BASE, "cpu")
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6)
    without, written = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rollouts" / "step.parquet"
        for number in range(2 * ROUNDS * STEPS):
            took, groups = our_step(policy, optimizer, prompts, config, number // 2)
            began = time.perf_counter()
            if number % 2:
                write_rollouts(path, rollout_rows(number, groups, groups))
            (written if number % 2 else without).append(took + time.perf_counter() - began)
    return compared("written", written[2:], "none", without[2:])


def compared(name: str, seconds: list[float], other_name: str, other: list[float]) -> str:
    mine, theirs = statistics.median(seconds), statistics.median(other)
    return f"{name} {mine:.3f} s, {other_name} {theirs:.3f} s, ratio {mine / theirs:.2f}"


def main() -> None:
    parts = {"step": step, "guided": guided, "trl": in_trl, "recorded": recorded}
    chosen = sys.argv[1:] or list(parts)
    if unknown := set(chosen) - set(parts):
        raise SystemExit(f"error: {', '.join(unknown)}: choose from {', '.join(parts)}")
    torch.set_num_threads(1)
    for name in chosen:
        print(f"{name:8} {parts[name]()}", flush=True)


if __name__ == "__main__":
    main()
