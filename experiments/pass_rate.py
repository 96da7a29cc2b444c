"""pass@1 and pass@8 of a model on the held-out and the training prompts of the cards world, by number of carries.

python experiments/pass_rate.py                                   # the base
python experiments/pass_rate.py runs/grpo/checkpoints/step_000080
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import cards
import verifier
from policy import Policy
from tasks import load_prompts


def main(model: str) -> None:
    policy = Policy(model, device="cpu")
    for name, prompts in zip(("train", "held out"), load_prompts("cards")):
        groups = []
        for first in range(0, 256, 16):
            groups += policy.sample([prompts[row] for row in range(first, first + 16)], 8, 64, 1.0, seed=first)
        verifier.score(groups)
        rates = [statistics.fmean(c.accuracy for c in group.completions) for group in groups]
        error = 1.96 * statistics.stdev(rates) / len(rates) ** 0.5
        print(
            f"{name:8}  pass@1 {statistics.fmean(rates):.4f} +- {error:.4f}   pass@8 {statistics.fmean(r > 0 for r in rates):.3f}"
        )
        carries = [prompts.rows[row].carries for row in range(256)]
        for count in sorted(set(carries)):
            mine = [rate for rate, c in zip(rates, carries) if c == count]
            print(f"    {count} carries, {len(mine):3} prompts: pass@1 {statistics.fmean(mine):.4f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(cards.BASE))
