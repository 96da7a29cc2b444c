"""The importance ratios of the tokens that matter: the digits that a carry changes, in the guides' cached answers.

`27 +8= 35`: who forgets the carry writes 25, so the 3 is decisive; the rest every policy gets right. For guides at four
distances and the policy at several steps of plain GRPO, this measures pi_t / pi_guide on decisive and on other tokens.

    python experiments/claims.py && python experiments/decisive_tokens.py      # writes experiments/decisive_tokens.json
"""

import json
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from claims import DISTANCES, RUNS, SEEDS

import cards
from npo import NPOConfig, load_cache
from policy import Policy
from run import checkpoint_path
from tasks import load_prompts

STEPS = (0, 10, 20, 40, 60)  # of the policy
ANSWERS = 200  # a seed and a distance


def decisive(pieces: list[str]) -> list[bool]:
    """For each token: is it a digit, but not the last, of a running total that a carry has changed?"""
    marks, number, added, place = [False] * len(pieces), "", None, []
    total = None
    for i, piece in enumerate([*pieces, " "]):
        if piece.isdigit():
            number, place = number + piece, [*place, i]
            continue
        if number:
            if added is not None and total % 10 + added > 9:
                for position in place[:-1]:
                    marks[position] = True
            total, number, place = int(number), "", []
        added = int(piece[2]) if piece.startswith(" +") else None
    return marks


def main() -> None:
    torch.set_num_threads(1)
    prompts = {prompt.id: prompt for prompt in load_prompts("cards")[0]}
    rows = []
    with tqdm(total=len(SEEDS) * len(DISTANCES) * len(STEPS), desc="ratios") as bar:
        for seed in SEEDS:
            for distance in DISTANCES:
                _, cache, _ = load_cache(NPOConfig(), RUNS / f"guide{distance}-is-correction-{seed}" / "guide.jsonl")
                answers = list(cache.values())[:ANSWERS]
                for step in STEPS:
                    policy = Policy(checkpoint_path(RUNS / f"grpo-{seed}", step) if step else cards.BASE, device="cpu")
                    rows.append({"seed": seed, "guide": distance, "policy": step} | measure(policy, prompts, answers))
                    bar.update()
    (HERE / "decisive_tokens.json").write_text(json.dumps(rows, indent=1) + "\n")
    table(rows)


@torch.no_grad()
def measure(policy: Policy, prompts: dict, answers: list) -> dict:
    """Mean ratio, and shares below 0.8 and above 1.28 (clipped for a positive advantage), of decisive and other tokens."""
    found = {True: [], False: []}
    for first in range(0, len(answers), 32):
        chunk = answers[first : first + 32]
        rows = [(policy.encode(prompts[answer.prompt_id]), answer.token_ids) for answer in chunk]
        logprobs, mask = policy.logprobs(rows, 1.0)
        for answer, values, real in zip(chunk, logprobs, mask):
            ratios = (values[real] - torch.tensor(answer.behavior_logprobs)).exp().tolist()
            for ratio, mark in zip(ratios, decisive(policy.tokenizer.convert_ids_to_tokens(answer.token_ids))):
                found[mark].append(ratio)
    shares = {}
    for mark, name in ((True, "decisive"), (False, "other")):
        shares[name] = {"tokens": len(found[mark]), "mean": round(statistics.fmean(found[mark]), 4),
                        "median": round(statistics.median(found[mark]), 4),
                        "below 0.8": round(statistics.fmean(r < 0.8 for r in found[mark]), 4),
                        "above 1.28": round(statistics.fmean(r > 1.28 for r in found[mark]), 4)}  # fmt: skip
    return shares


def table(rows: list[dict]) -> None:
    print("| guide at step | policy at step | decisive: median ratio | below 0.8 | above 1.28 | other tokens: median |")
    print("|---|---|---|---|---|---|")
    for guide in DISTANCES:
        for step in STEPS:
            mine = [row for row in rows if (row["guide"], row["policy"]) == (guide, step)]
            mean = {
                key: statistics.fmean(row["decisive"][key] for row in mine) for key in ("median", "below 0.8", "above 1.28")
            }
            other = statistics.fmean(row["other"]["median"] for row in mine)
            print(
                f"| {guide} | {step} | {mean['median']:.2f} | {mean['below 0.8']:.0%} | {mean['above 1.28']:.0%} | {other:.2f} |"
            )


if __name__ == "__main__":
    main()
