"""Q, V, S and the weight of a guide's answers, on the checkpoints of GRPO's runs on the cards.

    python -m experiments.signal_curve    # some 12 minutes on one core; resumes

The policy is the base or step 40 of a run (t), a guide is its checkpoint t + D; D = 0 asks the
policy again. The policy answers the 128 prompts of the steps after t, 8 times each. To those that
it *fails*, with no right answer, the guide gives 8 answers, and over these

    quality    Q: the share of the failed prompts with a right answer among the 8
    kl         KL(guide || policy) per token, in nats; AutoNPO's V^ is its exp
    answer_kl  the same per answer; its exp is V^ with `--kl-scale` at an answer's length
    right      mean w^2 of the right answers, w = p/q of a whole answer
    weight     mean of the right answers' smallest token ratio p/q; Q times that is pull^

The lines in experiments/signal_curve.jsonl are of the reported seeds; docs/results.md shows them.
"""

import json
import math
import statistics

import torch
from tqdm import tqdm

import verifier
from experiments.plan import GROUPS, ROWS
from experiments.runs import HERE, ROOT, commit, make, with_seed
from npo import NPOConfig
from plumbing.checkpoints import checkpoint_path
from plumbing.data import load_prompts
from plumbing.files import read_jsonl
from plumbing.model import Policy
from plumbing.rollout import Group, Prompt, batched
from plumbing.run import derived_seed, rows_of_step

RESULTS = HERE / "signal_curve.jsonl"
SEEDS = GROUPS["cards"][1]
STARTS, DISTANCES, PROMPTS = (0, 40), (0, 10, 20, 40, 80, 160), 128
CHUNK = 16  # prompts that are answered at a time


def ask(policy: Policy, prompts: list[Prompt], config: NPOConfig, *key) -> list[Group]:
    """Scored answers, G to each prompt."""
    groups = []
    for number, some in enumerate(batched(prompts, CHUNK)):
        seed = derived_seed(config.seed, "signal", *key, number)
        groups += policy.sample(some, config.group_size, config.max_new_tokens, 1.0, seed)
    verifier.score(groups)
    return groups


@torch.no_grad()
def signal_of(policy: Policy, answered: list[Group]) -> dict:
    """The docstring's five numbers of a guide's answers to prompts that the policy fails; `right`
    and `weight` are None without a right answer."""
    rows = [(group.encoded, c) for group in answered for c in group.completions]
    per_answer, tokens, squares, smallest = [], 0, [], []
    for some in batched(rows, 8 * CHUNK):
        logprobs, _ = policy.logprobs([(encoded, c.token_ids) for encoded, c in some], 1.0)
        for (_, c), mine in zip(some, logprobs.double().tolist()):  # (B, T), padded
            logratios = [a - b for a, b in zip(mine, c.behavior_logprobs)]
            per_answer.append(-sum(logratios))
            tokens += len(logratios)
            if c.accuracy:
                squares.append(math.exp(2 * sum(logratios)))
                smallest.append(math.exp(min(logratios)))
    solved = [bool(group.verified) for group in answered]
    return {
        "quality": statistics.fmean(solved),
        "kl": sum(per_answer) / tokens,
        "answer_kl": statistics.fmean(per_answer),
        "right": statistics.fmean(squares) if squares else None,
        "weight": statistics.fmean(smallest) if smallest else None,
    }


def measure(seed: int, start: int) -> list[dict]:
    """The result lines of one seed and t, by distance."""
    config, run = NPOConfig(seed=seed, device="cpu"), with_seed(ROWS["cards/grpo"], seed)
    if make(run) is None:  # returns at once if its directory is there
        raise SystemExit(f"error: {run.row}, seed {seed}, failed")

    def policy_at(step: int) -> Policy:
        return Policy(checkpoint_path(ROOT / run.out, step) if step else config.model_path, "cpu")

    prompts, _ = load_prompts(config)
    steps = range(start + 1, start + PROMPTS // config.prompts_per_step + 1)
    rows = [row for step in steps for row in rows_of_step(len(prompts), step, config)]
    policy = policy_at(start)
    own = ask(policy, [prompts[row] for row in rows], config, start)
    failed, lines = [group.prompt for group in own if group.pass_rate == 0], []
    for distance in DISTANCES:
        answered = ask(policy_at(start + distance), failed, config, start, distance)
        found = {key: v and float(f"{v:.5g}") for key, v in signal_of(policy, answered).items()}
        line = {"seed": seed, "t": start, "distance": distance, "commit": commit()}
        lines.append(line | {"failed": len(failed)} | found)
    return lines


def main() -> None:
    torch.set_num_threads(1)  # more would round differently
    done = {(line["seed"], line["t"]) for line in read_jsonl(RESULTS)}
    wanted = [(seed, start) for seed in SEEDS for start in STARTS if (seed, start) not in done]
    for seed, start in tqdm(wanted, desc="curves"):
        lines = measure(seed, start)
        with open(RESULTS, "a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
