"""How many of a guide's verified answers are lucky: right at the end, with a wrong working.

    python -m experiments.lucky    # seeds 0 to 9 of cards, seed 0 of cards_lax; 15 minutes

For each world and seed it makes the scout (40 steps) and the guide cache of the main job,
`python npo.py --model WORLD --seed SEED`, and adds a line to experiments/lucky.jsonl. What has a
line is skipped. It does not ask the verifier: an answer is lucky if the right working, from the
start to the last total, is not in its text.
"""

import json

import npo
from experiments.runs import HERE, ROOT, RUNS, commit
from plumbing.data import load_prompts
from plumbing.guide_cache import GuideCache
from plumbing.run import read_jsonl

RESULTS = HERE / "lucky.jsonl"
SEEDS = {"cards": range(10), "cards_lax": range(1)}


def counted(world: str, seed: int) -> dict:
    """The line of one world and seed."""
    out = ROOT / RUNS / "lucky" / f"{world}-{seed}"
    config = npo.NPOConfig(model=world, seed=seed, out=str(out), eval_every=1000)
    cache = npo.ask_guide(config, npo.go_ahead(config, out / "scout"), 1, out / "guide.jsonl")
    line = {"world": world, "seed": seed} | count(cache, config)
    return line | {"prompts": cache.header["prompts"], "commit": commit()}


def count(cache: GuideCache, config: npo.NPOConfig) -> dict:
    """The verified answers of a cache, and the lucky ones of them."""
    prompts, _ = load_prompts(config)
    workings = {}
    for row, hand in zip(prompts.kept, prompts.rows):
        workings[f"{prompts.fingerprint}:{row}"] = hand.working
    answers = [(id, answer.text) for id, found in cache.answers.items() for answer in found]
    return {
        "verified": len(answers),
        "lucky": sum(workings[id] not in text for id, text in answers),
    }


def main() -> None:
    done = {(line["world"], line["seed"]) for line in read_jsonl(RESULTS)}
    for world, seed in ((world, seed) for world, seeds in SEEDS.items() for seed in seeds):
        if (world, seed) not in done:
            line = counted(world, seed)
            print(line)
            with open(RESULTS, "a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
