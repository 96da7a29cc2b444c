"""A world of two logits: plateaus, jumps, near and far guides, and AutoNPO's rule. numpy alone.

    python -m experiments.twin  # under a minute; prints tables, writes experiments/twin.json

An A prompt needs one token of skill A, a B prompt L tokens of skill B. A skill is a logit, its
token's probability the sigmoid. A step asks 4 + 4 new prompts, G times each; group, gate, slot and
clip are NPO's. SGD adds to each logit LR times the mean pull, and what A's logit wins costs B's a
tenth of it (DRAG). So B falls while A is learnt, waits for rare successes, then jumps. Our sources
have no such world: A starts at 0.5, B at SUCCESS right answers; these two, LR and DRAG were chosen
on the generator's seeds 1 and 2. The tables are of its seed 0, with 128 runs side by side.

Each run's *start* is the middle of its plateau, halfway to its first step with B above 0.5. The
scout goes on from there, with fresh draws: it is plain GRPO, and its checkpoints are the guides.
The mean field has no draws: the same starts and guides, the expected pulls of signal_theory.py.
"""

import json
import math
from functools import partial
from pathlib import Path

import numpy

from signal_theory import guided_pull

LR, DRAG, SUCCESS = 4.0, 0.1, 0.001
LENGTHS, RUNS = (1, 2, 3), 128  # L; runs side by side
LIMIT, LAST = 1000, 10000  # steps of a comparison, where medians count; of runs that must jump
FAR, TOKENS = 300, 22  # steps from the jump to the far guide; tokens of an answer, for KL
LIVE = "live"  # the guide is the policy itself, asked again
RESULTS = Path(__file__).with_suffix(".json")


def sampled_pull(random, p, q, L: int, n=8, m=8, gate=0.6, clip_high=0.28, ratio="token", groups=4):
    """(runs,) what guided_pull expects, as the mean over sampled groups; p, q (runs,)."""
    p, q = p[:, None, None], q[:, None, None]
    rho = {"token": p / q, "sequence": (p / q) ** L, "none": numpy.ones_like(p)}[ratio]
    tokens = random.random((len(p), groups, n, L)) < p[..., None]
    score = tokens.sum(axis=-1) - L * p  # (runs, groups, n) of the decisive logit
    right = tokens.all(axis=-1)
    known = random.random((len(p), groups, 1)) < 1 - (1 - q**L) ** m  # the guide is right once
    slot = known & (right.mean(axis=-1, keepdims=True) <= gate) & (numpy.arange(n) == n - 1)
    score, right = numpy.where(slot, L * (1 - p), score), right | slot
    weight = numpy.where(slot, numpy.where(rho > 1 + clip_high, 0.0, rho), 1.0)
    centred = right - right.mean(axis=-1, keepdims=True)
    advantage = centred / (right.std(axis=-1, ddof=1, keepdims=True) + 1e-6)
    return (advantage * weight * score).mean(axis=(1, 2))


def probability(logit):
    return 1 / (1 + numpy.exp(-logit))


def train(pull, start, L: int, guide=None, past=0, limit=LAST, **method):
    """(steps + 1, runs, 2) logits of A and B, until all runs are `past` steps after B > 0.5.

    `pull` is guided_pull or sampled_pull; `guide` is None, LIVE or logits (runs, 2).
    """
    path, since = [start], numpy.zeros(len(start))
    while since.min() <= past and len(path) <= limit:
        p = probability(path[-1])
        q = p if guide is None or guide is LIVE else probability(guide)
        asked = 0 if guide is None else 8
        a, b = (
            LR / 2 * pull(p[:, skill], q[:, skill], length, m=asked, **method)
            for skill, length in enumerate((1, L))
        )
        path.append(path[-1] + numpy.stack([a, b - DRAG * a], axis=1))
        since += (since > 0) | (accuracy(path[-1], L) > 0.5)
    return numpy.array(path)


def accuracy(logits, L: int):
    """Of B, from logits (..., 2)."""
    return probability(logits[..., 1]) ** L


def first(path, L: int, level: float = 0.5):
    """(runs,) first step with B above the level; infinite if there is none."""
    above = accuracy(path, L) > level
    return numpy.where(above.any(axis=0), above.argmax(axis=0), math.inf)


def median(values) -> list[float]:
    """The median, and its 95 % interval from order statistics, whatever the distribution."""
    ordered, k, tail = sorted(map(float, values)), 0, 0.5 ** len(values)
    while tail <= 0.025:
        k += 1
        tail += math.comb(len(ordered), k) / 2 ** len(ordered)
    return [float(numpy.median(ordered)), ordered[k - 1], ordered[-k]]


def at(path, steps):
    """(runs, 2) logits at a step of each run's own."""
    return path[steps.astype(int), numpy.arange(len(steps))]


class World:
    """One L: plain runs from the base, their starts, and the scouts."""

    def __init__(self, L: int, seed: int, runs: int = RUNS):
        self.L, p = L, SUCCESS ** (1 / L)
        self.pull = partial(sampled_pull, numpy.random.default_rng([seed, L]))
        base = numpy.tile([0.0, math.log(p / (1 - p))], (runs, 1))
        self.plain = train(self.pull, base, L)
        self.start = at(self.plain, first(self.plain, L) // 2)
        self.scout = train(self.pull, self.start, L, past=FAR)
        self.jump = first(self.scout, L)
        assert numpy.isfinite(self.jump).all(), f"L = {L}: a run has no jump in {LAST} steps"

    def steps(self, guide=None, pull=None, **method):
        """(runs,) from the start until B > 0.5; infinite above LIMIT."""
        path = train(pull or self.pull, self.start, self.L, guide, limit=LIMIT, **method)
        return first(path, self.L)


def compare(world: World) -> dict[str, dict]:
    """Every method from the start: its steps, their mean field, and its work, scout included.

    The unit of work is a GRPO step's answers; asking a guide takes as many again.
    """
    near, half, far = first(world.scout, world.L, 0.1), world.jump, world.jump + FAR
    methods = {  # the guide's step, and what else is different
        "GRPO": (None, {}),
        "G = 16": (None, {"n": 16}),
        "D = 0, live": (LIVE, {}),
        "D = 0, frozen": (0 * near, {}),
        "guide B > .1": (near, {}),
        "guide B > .5": (half, {}),
        "far": (far, {}),
        "far, no IS": (far, {"ratio": "none"}),
        "B > .1, sequence ratio": (near, {"ratio": "sequence"}),
    }
    found = {}
    for name, (reached, method) in methods.items():
        scout, guide = 0, reached
        if isinstance(reached, numpy.ndarray):
            scout, guide = reached, at(world.scout, reached)
        steps = world.jump if name == "GRPO" else world.steps(guide, **method)
        answers = method.get("n", 8) / 8 + (guide is not None)  # per step
        found[name] = {
            "steps": median(steps),
            "within 100": float((steps <= 100).mean()),
            "mean field": float(numpy.median(world.steps(guide, guided_pull, **method))),
            "scout": float(numpy.median(scout)),
            "scout + steps": median(scout + steps),
            "work": median(scout + steps * answers),
        }
    return found


def token_kl(guide, policy, L: int):
    """KL(guide || policy) per token of a B answer, from logits (..., 2)."""
    q, p = probability(guide[..., 1]), probability(policy[..., 1])
    return L / TOKENS * (q * numpy.log(q / p) + (1 - q) * numpy.log((1 - q) / (1 - p)))


def choose_guide(world: World) -> dict[str, dict]:
    """A fixed policy, the start, chooses among the scout's checkpoints, ten steps apart.

    AutoNPO's S^ is the guide's pass-rate over exp(KL); the law's S is g p / q.
    """
    L, chosen = world.L, {}
    for run, (policy, jump) in enumerate(zip(world.start, world.jump)):
        futures = world.scout[10 : int(jump) + FAR + 1 : 10, run]
        p, q, kl = probability(policy[1]), probability(futures[:, 1]), token_kl(futures, policy, L)
        pulls, right = guided_pull(p, q, L), q**L
        signals = {f"S^ with {c} KL": right / numpy.exp(c * kl) for c in (1, 5)}
        signals["S^ with the KL of decisive tokens"] = right / numpy.exp(TOKENS / L * kl)
        signals |= {"S of the law": (1 - (1 - right) ** 8) / q, "the largest pull": pulls}
        for name, signal in signals.items():
            best = signal.argmax()
            row = 10 * (best + 1), right[best], pulls[best] / pulls.max()
            chosen.setdefault(name, []).append(row)
    found = {}
    for name, rows in chosen.items():
        columns = dict(zip(("D", "B of the guide", "share of the pull"), numpy.array(rows).T))
        found[name] = {key: float(numpy.median(values)) for key, values in columns.items()}
        found[name]["steps"] = median(world.steps(at(world.scout, columns["D"])))
    return found


def choose_rollback(world: World) -> dict[int, dict]:
    """A fixed guide, the plain run at its first step t with B > 0.2, chooses how far it goes back.

    All B prompts are alike: those that failed within D steps are solved at one rate for every D, so
    the smallest V^ decides. Rolled back, the policy takes the D steps to t again, guided; for the
    same work it could go on for D steps.
    """
    L, now, distances = world.L, first(world.plain, world.L, 0.2), (10, 20, 40, 80, 160)
    guide, found = at(world.plain, now), {}
    olds = [at(world.plain, numpy.maximum(now - distance, 0)) for distance in distances]
    there = [now >= distance for distance in distances]  # runs that have such a checkpoint
    v = numpy.where(there, [numpy.exp(token_kl(guide, old, L)) for old in olds], math.inf)
    for i, (distance, old, some) in enumerate(zip(distances, olds, there)):
        again = train(world.pull, old, L, guide, past=distance)[distance]
        further = train(world.pull, guide, L, past=distance)[distance]
        row = {"Q^": accuracy(guide, L), "V^": v[i], "S^": accuracy(guide, L) / v[i]}
        row |= {"B, rolled back": accuracy(again, L), "B, gone on": accuracy(further, L)}
        found[distance] = {key: float(numpy.median(x[some])) for key, x in row.items()}
        found[distance] |= {
            "chosen": float((v.argmin(axis=0) == i).mean()),
            "of": float(some.mean()),
        }
    return found


def shown(value) -> str:
    if isinstance(value, list):
        return "{:.0f} [{:.0f}, {:.0f}]".format(*value)
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def table(title: str, rows: dict) -> None:
    """Prints rows (name -> column -> number, or median and interval) as markdown."""
    columns = list(next(iter(rows.values())))
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(map(shown, row.values()))} |")


def main() -> None:
    parts = {
        "Steps from the middle of the plateau until B > .5, and work": compare,
        "The start chooses a guide": choose_guide,
        "The policy at B > .2 chooses how far it goes back, D": choose_rollback,
    }
    found = {"success": SUCCESS, "lr": LR, "drag": DRAG, "runs": RUNS}
    for L in LENGTHS:
        world = World(L, seed=0)
        for title, part in parts.items():
            found.setdefault(part.__name__, {})[L] = rows = part(world)
            table(f"L = {L}. {title}", rows)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
