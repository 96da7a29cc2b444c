"""How often each world's base is right, by what its prompts need: exact pass@1 and pass@8.

    python -m experiments.difficulty    # under a minute; writes experiments/difficulty.json

pass@1 is the mean probability p of the one right text, pass@8 the mean of 1 - (1 - p)^8: nothing is
sampled. Over the 2,048 training and the 256 held-out prompts.
"""

import json
import statistics

from experiments.runs import HERE, commit
from grpo import GRPOConfig
from plumbing.data import load_prompts
from plumbing.exact import exact_accuracies, right_texts
from plumbing.model import Policy

RESULTS = HERE / "difficulty.json"


def group_of(world: str, hand) -> str:
    return f"{hand.carries} carries" + (f", {hand.borrows} borrows" if world == "staircase" else "")


def rows(world: str) -> list[dict]:
    config, found = GRPOConfig(model=world), []
    policy = Policy(config.model_path)
    for split, prompts in zip(("training", "held-out"), load_prompts(config)):
        chances = exact_accuracies(policy, right_texts(policy, prompts), config)
        groups = {"all": chances}
        for hand, chance in zip(prompts.rows, chances):
            groups.setdefault(group_of(world, hand), []).append(chance)
        for name, some in sorted(groups.items()):
            again = statistics.fmean(1 - (1 - chance) ** 8 for chance in some)
            row = {"world": world, "split": split, "prompts": name, "count": len(some)}
            found.append(row | {"pass@1": statistics.fmean(some), "pass@8": again})
    return found


def main() -> None:
    found = rows("cards") + rows("staircase")
    for row in found:
        print("{world} {split}, {prompts}: {count} prompts".format(**row), end="")
        print(", pass@1 {pass@1:.5f}, pass@8 {pass@8:.5f}".format(**row))
    RESULTS.write_text(json.dumps({"commit": commit(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
