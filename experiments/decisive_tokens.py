"""Importance ratios of the tokens that matter: digits that a carry changes, in guides' answers.

In `27 +8= 35` the 3 is decisive: a policy that forgets the carry writes 25. The other tokens are
easy. For guides from four steps and policies from five steps of the same GRPO runs this measures
pi_policy / pi_guide on decisive and on other tokens of the answers that a guide cache keeps.

    python -m experiments.runs cards --rows grpo --seeds 0 1 2 3 4
    python -m experiments.decisive_tokens

The second command takes about ten minutes, and writes experiments/decisive_tokens.json.
"""

import json
import statistics
from itertools import product

import torch
from tqdm import tqdm

from experiments.plan import WINDOW
from experiments.runs import HERE, ROOT, RUNS
from npo import NPOConfig
from plumbing.checkpoints import checkpoint_path
from plumbing.data import load_prompts
from plumbing.guide_cache import build_guide_cache, load_guide_cache
from plumbing.model import Policy
from plumbing.rollout import Completion, batched
from plumbing.run import rows_of_step

SEEDS, GUIDES, POLICIES = range(5), (10, 20, 40, 60), (0, 10, 20, 40, 60)  # steps
ANSWERS = 200  # per seed and guide


def decisive(pieces: list[str]) -> list[bool]:
    """For each token: is it a digit, but not the last, of a total that a carry has changed?"""
    marks, places, total, added = [False] * len(pieces), [], None, None
    for i, piece in enumerate([*pieces, " "]):
        if piece.isdigit():
            places.append(i)
            continue
        if places:  # a number has ended
            if added is not None and total % 10 + added > 9:
                for place in places[:-1]:
                    marks[place] = True
            total, places = int("".join(pieces[place] for place in places)), []
        added = int(piece[2]) if piece.startswith(" +") else None
    return marks


@torch.no_grad()
def measure(policy: Policy, prompts: dict, answers: list[Completion]) -> dict:
    """Ratios of the answers' decisive and other tokens, summed up."""
    found = {"decisive": [], "other": []}
    for chunk in batched(answers, 32):
        rows = [(policy.encode(prompts[answer.prompt_id]), answer.token_ids) for answer in chunk]
        logprobs, mask = policy.logprobs(rows, 1.0)  # (B, T)
        for answer, values, real in zip(chunk, logprobs, mask):
            ratios = (values[real] - torch.tensor(answer.behavior_logprobs)).exp().tolist()
            pieces = policy.tokenizer.convert_ids_to_tokens(answer.token_ids)
            for ratio, mark in zip(ratios, decisive(pieces)):
                found["decisive" if mark else "other"].append(ratio)
    return {name: summary(ratios) for name, ratios in found.items()}


def summary(ratios: list[float]) -> dict:
    """With the shares that the clip stops: below 0.8 if A < 0, above 1.28 if A > 0."""
    found = {"mean": statistics.fmean(ratios), "median": statistics.median(ratios)}
    found["below 0.8"] = statistics.fmean(ratio < 0.8 for ratio in ratios)
    found["above 1.28"] = statistics.fmean(ratio > 1.28 for ratio in ratios)
    return {"tokens": len(ratios)} | {key: round(value, 4) for key, value in found.items()}


def answers_of(guide: int, seed: int) -> list[Completion]:
    """The first answers of a guide cache for the prompts of GRPO's steps, made if need be."""
    config, folder = NPOConfig(seed=seed, device="cpu"), ROOT / RUNS / "cards"
    count, path = len(load_prompts(config)[0]), folder / f"decisive-{guide}-{seed}.jsonl"
    rows = [row for step in range(1, WINDOW + 1) for row in rows_of_step(count, step, config)]
    source = checkpoint_path(folder / f"grpo-{seed}", guide)
    build_guide_cache(path, config, source, list(dict.fromkeys(rows)), WINDOW)
    cache = load_guide_cache(path, config)
    return [answer for kept in cache.answers.values() for answer in kept][:ANSWERS]


def main() -> None:
    torch.set_num_threads(1)
    config, lines = NPOConfig(device="cpu"), []
    prompts = {prompt.id: prompt for prompt in load_prompts(config)[0]}
    for seed, guide, step in tqdm(list(product(SEEDS, GUIDES, POLICIES)), desc="ratios"):
        path = checkpoint_path(ROOT / RUNS / "cards" / f"grpo-{seed}", step)
        policy = Policy(path if step else config.model_path, "cpu")
        found = measure(policy, prompts, answers_of(guide, seed))
        lines.append({"seed": seed, "guide": guide, "policy": step} | found)
    (HERE / "decisive_tokens.json").write_text(json.dumps(lines, indent=1) + "\n")
    for guide, step in product(GUIDES, POLICIES):
        mine = [line for line in lines if (line["guide"], line["policy"]) == (guide, step)]
        median = statistics.fmean(line["decisive"]["median"] for line in mine)
        print(f"guide of step {guide}, policy of step {step}: median decisive ratio {median:.2f}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
