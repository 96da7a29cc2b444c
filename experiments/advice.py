"""docs/results.md's first page, when to use NPO: each sentence is chosen by the numbers that it
quotes, and says so where nothing is measured yet."""

import json
import statistics

from experiments.claims import at_equal, corrected_verdict, primary
from experiments.difficulty import RESULTS as DIFFICULTY
from experiments.dynamics import STEPS, WORLDS
from experiments.groups import (
    END,
    LATER,
    MISSING,
    STUCK,
    left,
    lucky_shares,
    mean,
    minus,
    stuck,
    table,
    thousands,
)
from experiments.lucky import RESULTS as LUCKY
from experiments.plan import AFTER, LONGER, PLATEAU, WINDOW
from experiments.results import Runs
from experiments.student import BARELY, SAME, sameness
from experiments.student import verdict as of_interval
from plumbing.files import read_jsonl

UNKNOWN = "not measured yet"


def pick(verdict: str, above: str, open_ended: str, below: str) -> str:
    """The words that fit a verdict on differences that could lie above 0."""
    said = {"holds": above, "undecided": open_ended, "not confirmed": below}
    return said.get(verdict, UNKNOWN if verdict == MISSING else verdict)


def answer(differences: list[float], above: str, open_ended: str, below: str) -> str:
    """The same, with how little it may be."""
    said = pick(of_interval(differences), above, open_ended, below)
    margin = {"the same": SAME, "barely changes": BARELY}.get(sameness(differences))
    if margin is None:
        return said
    undecided = of_interval(differences) == "undecided"
    return f"the same, within {margin}" if undecided else f"{said}, by less than {margin}"


def in_short(runs: Runs) -> str:
    """Three sentences."""
    claims = list(primary(runs).values())
    first, _, third, fourth = (corrected_verdict(d, p) for _, d, p in claims)
    equal, note = at_equal(runs, "cards/40")
    saved = of_interval(equal)
    if saved == "holds" and sameness(equal) != "changes":  # ahead, but by next to nothing
        saved = "undecided"
    pays = "a guide is there already"
    if freed(runs, "near", LATER) or freed(runs, "near-no-is", END):
        pays += " or plain GRPO would not get through"
    again = (
        "**Where right answers come now and then, ask the policy itself again** (`--guide self`)"
    )
    sentences = [
        sentence(
            "Whether NPO pays where a policy is stuck",
            where_stuck(runs, first),
            f"{out_of_plateau(runs)}; near guide minus asking again at +{LONGER}: "
            f"{minus(stuck(runs).minus('plateau/near', 'plateau/self', LATER))}; at +{AFTER}",
            claims[0][1],
        ),
        sentence(
            "Whether it pays where right answers come now and then",
            pick(
                fourth,
                "**Where right answers come now and then** it is ahead, at equal steps, of asking "
                "the policy itself again, which needs no guide",
                f"{again}: a future is not clearly worth more",
                f"{again}: that is better than a future",
            ),
            f"NPO minus asking again, cards, step {WINDOW}",
            claims[3][1],
        ),
        sentence(
            "What it costs in tokens",
            pick(
                saved,
                "**It saves tokens, too**, with scout and cache counted",
                "**It does not clearly save tokens**: with scout and cache counted NPO and plain "
                "GRPO are not apart",
                f"**It saves {'steps, not' if third == 'holds' else 'no'} tokens**: plain GRPO "
                "that samples as many as scout, cache and replay is ahead, so that NPO pays only "
                f"if {pays}",
            ),
            f"NPO minus GRPO at equal tokens, cards{note}",
            equal,
        ),
    ]
    return " ".join(sentences)


def sentence(topic: str, said: str, what: str, differences: list[float]) -> str:
    if said == UNKNOWN:
        return f"{topic} is {UNKNOWN}."
    return f"{said} ({what}: {minus(differences)}, {len(differences)} seeds)."


def freed(runs: Runs, arm: str, step: int) -> bool:
    """Whether most of its runs are out of the plateau."""
    ends = stuck(runs).at(f"plateau/{arm}", step)
    return bool(ends) and statistics.fmean(b >= STUCK for b in ends) > 0.5


def where_stuck(runs: Runs, verdict: str) -> str:
    """The first sentence. `verdict` is that of near minus asking again, with IS, after AFTER."""
    if verdict == MISSING:
        return UNKNOWN
    why = (
        "a right answer needs two or more tokens that it almost never says, and a guide knows them"
    )
    slow = freed(runs, "near", LATER) and not freed(runs, "near", END)
    quick = freed(runs, "near-no-is", END)
    if freed(runs, "self", LATER):
        return "**Where a policy is stuck**, asking it again frees it, too"
    if slow and quick:
        return (
            f"**NPO pays where the policy is stuck**: {why}; it is free after {LONGER} steps, and "
            f"without IS already after {AFTER}"
        )
    if freed(runs, "near", LATER) or freed(runs, "near", END):
        return f"**NPO pays where the policy is stuck**: {why}"
    if quick:
        return (
            f"**NPO pays where the policy is stuck, but only without IS**: {why}; with IS they "
            "weigh p/q, next to nothing"
        )
    return "**Where a policy is stuck**, " + pick(
        verdict,
        "a near guide lifts it more than asking again does, but does not free it",
        "a guide is not clearly better than asking the policy again",
        "asking it again is better than a guide",
    )


def out_of_plateau(runs: Runs) -> str:
    """How many runs of four arms are out of it."""
    arms = {"grpo": "GRPO", "self": "asked again", "near": "near guide"}
    late = [f"{name} {left(stuck(runs), f'plateau/{arm}', LATER)}" for arm, name in arms.items()]
    arms["near-no-is"] = "near without IS"
    soon = [f"{name} {left(stuck(runs), f'plateau/{arm}', END)}" for arm, name in arms.items()]
    return f"out of the plateau at +{AFTER}: {', '.join(soon)}; at +{LONGER}: {', '.join(late)}"


def rarity(runs: Runs, group: str = "plateau") -> str:
    """p of a borrow at the start, by B, which is p^2 or with one borrow p."""
    of = runs if group == "one" else stuck(runs)
    starts = [run.accuracy for (run,) in of.together(f"{group}/start")]
    if not starts:
        return f"p {MISSING}"
    return f"p about {statistics.fmean(starts) ** (1 if group == 'one' else 0.5):.3f}"


def questions(runs: Runs) -> str:
    """Question, answer, what it rests on; the negative results first."""
    rows, of = [], {"plateau": stuck(runs), "one": runs}

    def ask(question: str, words: tuple, note: str, first: dict, *more) -> None:
        """The words answer for each of the first differences; the others stand beside them."""
        answers = {name: answer(d, *words) for name, d in first.items()}
        told = [text if len(first) == 1 else f"{name}: {text}" for name, text in answers.items()]
        shown = [f"{name} {minus(d)}" for name, d in (first | dict(more)).items()]
        rows.append([question, "; ".join(told), "; ".join([note] * bool(note) + shown)])

    def cards(mine: str, theirs: str, step: int = WINDOW) -> list[float]:
        return runs.minus(f"cards/{mine}", f"cards/{theirs}", step)

    def stairs(mine: str, theirs: str, step: int = END, group: str = "plateau") -> list[float]:
        return of[group].minus(f"{group}/{mine}", f"{group}/{theirs}", step)

    tokens = {"cards": "cards/40", "staircase early": "future/early-80"}
    tokens |= {"staircase late": "future/late-160"}
    equal = {name: at_equal(runs, row) for name, row in tokens.items()}
    ask(
        "Does it save tokens, with scout and cache counted?",
        ("yes", "not clearly", "no, plain GRPO is ahead"),
        "NPO minus GRPO at equal tokens",
        {name + note: differences for name, (differences, note) in equal.items()},
    )
    ask(
        "Right answers come now and then: is asking again as good?",
        ("no, a future is better", "yes, and needs no scout", "yes, and it is better"),
        f"cards, the base is right once in {1 / base_accuracy():.0f} answers",
        {"NPO minus asking again": cards("40", "self")},
        ("asking again minus GRPO", cards("self", "grpo")),
    )
    ask(
        "A right answer needs one rare token (L = 1): is asking again as good?",
        ("no, a near guide is better", "yes", "yes, and it is better"),
        f"{rarity(runs, 'one')}; near minus asking again",
        {f"+{n}": stairs("near", "self", PLATEAU + n, "one") for n in (AFTER, LONGER)},
        (f"near minus far, +{AFTER}", stairs("near", "far", group="one")),
    )
    ask(
        "Does a guide help that has hardly got through itself?",
        ("yes", "not clearly", "no, it harms"),
        "",
        {"guide of B > .01 minus asking again": stairs("low", "self")},
    )
    ask(
        "Is AutoNPO ahead of GRPO?",
        ("yes", "not clearly", "no, it is behind"),
        "",
        {w: runs.minus(f"autonpo/{w}-auto", f"autonpo/{w}-grpo", STEPS) for w in WORLDS},
    )
    rows.append(["What do lucky answers do?", *lucky(runs)])
    ask(
        "The policy is stuck, two rare tokens (L = 2): does a guide help?",
        ("yes", "not clearly", "no"),
        f"{rarity(runs)}; {out_of_plateau(runs)}; near minus asking again",
        {
            f"with IS, +{AFTER}": stairs("near", "self"),
            f"+{LONGER}": stairs("near", "self", LATER),
            f"without IS, +{AFTER}": stairs("near-no-is", "self"),
        },
    )
    ask(
        "Near or far, with IS?",
        ("near", "not apart", "far"),
        "",
        {
            f"staircase, +{AFTER - 10}": stairs("near", "far", END - 10),
            f"+{LONGER}": stairs("near", "far", LATER),
            "cards, step 20": cards("40", "160", 20),
            f"cards, step {WINDOW}": cards("40", "160"),
        },
    )
    ask(
        "With IS or without?",
        ("without", "not apart", "with"),
        "without minus with",
        {
            "staircase, near": stairs("near-no-is", "near"),
            "staircase, late": runs.minus("future/late-160-no-is", "future/late-160", END),
            "cards": cards("40-no-is", "40"),
        },
    )
    rows.append(["What does it cost?", *costs(runs)])
    return table("question | answer | measured: accuracy, differences", rows)


def base_accuracy() -> float:
    """Exact, of the cards' base on the held-out prompts."""
    rows = json.loads(DIFFICULTY.read_text())["rows"]
    wanted = {"world": "cards", "split": "held-out", "prompts": "all"}
    return next(row["pass@1"] for row in rows if wanted.items() <= row.items())


def lucky(runs: Runs) -> list[str]:
    near, far = (lucky_shares(runs, f"lax/{step}") for step in (40, 160))
    gaps = (runs.minus(f"{world}/40", f"{world}/160", WINDOW) for world in ("lax", "cards"))
    where = pick(
        of_interval([a - b for a, b in zip(near, far)]),
        "they sit in a near cache more than in a far one",
        "they sit in near and far caches alike",
        "they sit in a far cache more than in a near one",
    )
    told = [f"share of the cache, near {mean(near, 2)}, far {mean(far, 2)}"]
    told += [f"near minus far, {world} {minus(d)}" for world, d in zip(("lax", "strict"), gaps)]
    return [f"{where}; check the working before you trust a guide", "; ".join(told)]


def lesson(runs: Runs) -> str:
    """What was in the old caches, and in those of the reruns."""
    before = next(line for line in read_jsonl(LUCKY) if line["world"] == "cards_lax")
    told, measured = lucky(runs)
    again = f"Run again, {told.split(';')[0]} ({measured})."
    return (
        f"{before['lucky']} of the {before['verified']} verified answers in the guide cache of "
        f"seed {before['seed']} were two slips that cancel. "
        + (f"The rerun is {UNKNOWN}." if told.startswith(UNKNOWN) else again)
    )


def costs(runs: Runs) -> list[str]:
    pairs = runs.together("cards/40", "cards/grpo")
    if not pairs:
        return [UNKNOWN, ""]
    plain = [next(e for e in b.evals if e["step"] == WINDOW)["sampled_tokens"] for _, b in pairs]
    mine = [a.tokens for a, _ in pairs]
    ratios = [a / b for a, b in zip(mine, plain)]
    answer = f"{statistics.fmean(ratios):.1f} times the tokens of as many steps of GRPO"
    told = f"cards, {WINDOW} steps: NPO {thousands(mine)}k, scout and cache counted; GRPO "
    return [answer, f"{told}{thousands(plain)}k"]
