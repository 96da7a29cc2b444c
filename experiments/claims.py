"""What the numbers say: the primary claims of docs/protocol.md, the paper's claims, when to use NPO
and README's rows. Each sentence is chosen by the numbers that it quotes."""

import statistics

from experiments.dynamics import STEPS, WORLDS, around, exponents
from experiments.groups import (
    END,
    MISSING,
    at_equal_tokens,
    lucky_shares,
    mean,
    minus,
    ratio,
    same,
    spent,
    stuck,
    table,
    thousands,
)
from experiments.lucky import RESULTS as LUCKY
from experiments.plan import AFTER, RIVALS, SCOUT, WINDOW
from experiments.results import Runs, speed_ups
from experiments.student import bounds, detectable, geometric, holm, p_value, sameness, sign_flip
from experiments.student import verdict as of_interval
from plumbing.files import read_jsonl

PAPER_SPEED = 2.1


# ---- Primary claims ------------------------------------------------------------------------------


def primary(runs: Runs) -> dict[str, tuple[str, list[float], float]]:
    """Claim -> what is subtracted, the paired differences, p by Holm. Four, so that one that is not
    run yet counts with p = 1."""
    plateaus = stuck(runs)
    found = {
        "a near guide breaks a plateau where asking again does not": (
            f"near minus D = 0, B at +{AFTER}",
            plateaus.minus("plateau/near", "plateau/self", END),
        ),
        "near before far, with IS": (
            f"near minus far, B at +{AFTER - 10}",
            plateaus.minus("plateau/near", "plateau/far", END - 10),
        ),
        "early bootstrapping": (
            f"NPO minus GRPO, cards, step {WINDOW}",
            runs.minus("cards/40", "cards/grpo", WINDOW),
        ),
        "the future is worth more than asking again": (
            f"NPO minus D = 0, cards, step {WINDOW}",
            runs.minus("cards/40", "cards/self", WINDOW),
        ),
    }
    corrected = holm([p_value(d) if len(d) > 1 else 1.0 for _, d in found.values()])
    return {name: (*both, p) for (name, both), p in zip(found.items(), corrected)}


def corrected_verdict(differences: list[float], p: float) -> str:
    if len(differences) < 2:
        return MISSING
    if p >= 0.05:
        return "undecided"
    return "holds" if statistics.fmean(differences) > 0 else "not confirmed"


def primary_table(runs: Runs) -> str:
    rows = []
    for number, (name, (what, differences, p)) in enumerate(primary(runs).items(), 1):
        cells = [f"{number}. {name}", what, f"{len(differences)}", mean(differences)]
        if len(differences) > 1:
            exact = p_value(differences), p, sign_flip(differences)
            cells += [f"{value:.2g}" for value in exact] + [f"{detectable(differences):.3f}"]
        else:
            cells += [""] * 4
        rows.append([*cells, corrected_verdict(differences, p)])
    header = "claim | measure | seeds | difference | p | Holm | sign flip | detectable | verdict"
    return table(header, rows)


# ---- The paper's claims --------------------------------------------------------------------------


def all_of(*differences: list[float]) -> str:
    """The verdict of a claim that needs every one of them above 0."""
    found = [of_interval(values) for values in differences]
    for worst in (MISSING, "not confirmed", "undecided"):
        if worst in found:
            return worst
    return "holds"


def speed_verdict(speeds: list[float]) -> str:
    if len(speeds) < 2:
        return MISSING
    _, low, high = geometric(speeds)
    if low <= 1:
        return "slower" if high < 1 else "undecided"
    if low <= PAPER_SPEED <= high:
        return f"faster; consistent with {PAPER_SPEED}"
    return f"faster, but by {'less' if high < PAPER_SPEED else 'more'}"


def linear_verdict(exponents: list[float]) -> str:
    if len(exponents) < 2:
        return MISSING
    low, high = bounds(exponents)
    if low <= 1 <= high:
        return "consistent with it"
    return f"not confirmed: {'slower' if high < 1 else 'faster'}"


def best_guides(runs: Runs) -> str:
    """Which guide's row is ahead on the cards, seed by seed."""
    guides = 10, 20, 40, 80, 160
    found = runs.together(*(f"cards/{guide}" for guide in guides))
    best = [max(zip((run.at(WINDOW) for run in of), guides))[1] for of in found]
    return ", ".join(f"{guide} in {best.count(guide)}" for guide in guides) if best else MISSING


def paper(runs: Runs) -> str:
    """Every claim, with those that are not tested here."""
    rows, plateaus = [], stuck(runs)

    def add(claim: str, what: str, *differences: list[float]) -> None:
        text = "; ".join(map(minus, differences))
        rows.append([claim, f"{what}: {text}", all_of(*differences)])

    def untested(claim: str, why: str) -> None:
        rows.append([claim, why, "not tested"])

    def cards(mine: str, theirs: str, step: int = WINDOW) -> list[float]:
        return runs.minus(f"cards/{mine}", f"cards/{theirs}", step)

    def rivals(mine: str, theirs: str) -> list[float]:
        return runs.minus(mine, theirs, RIVALS)

    pairs = runs.together("cards/40", "cards/grpo")
    for name, before in (("scout not counted", 0), (f"the scout's {SCOUT} steps counted", SCOUT)):
        speeds, _ = speed_ups(pairs, before)
        what = f"GRPO's steps to its accuracy at {SCOUT} over NPO's, {name}: {ratio(speeds)}"
        rows.append([f"early is about {PAPER_SPEED}x faster", what, speed_verdict(speeds)])
    add("early is ahead of GRPO", f"cards, step {WINDOW}", cards("40", "grpo"))
    equal = at_equal_tokens(runs, "cards/40", "cards/grpo")[0]
    add("the same, at equal tokens", "cards", equal)
    late = "future/late-160"
    add("a late replay breaks a plateau", "B", runs.minus(late, "future/grpo", END))
    equal = at_equal_tokens(runs, late, "future/grpo")[0]
    add("the same, at equal tokens", "B", equal)
    untested("early + late ends above early", "no row has both")
    without = runs.minus(f"{late}-no-is", late, END)
    rows.append(["late, IS barely matters", f"without minus with: {same(without)}"])
    rows[-1].append(sameness(without))
    untested("LUFFY without importance sampling collapses", "no such row")

    curve = {step: runs.at("cards/grpo", step) for step in (0, 10, 20, 40, 80, 120, 160)}
    rise = [b - a for a, b in zip(curve[10], curve[160])]
    add("Q rises with the distance", "a guide's accuracy, step 160 minus 10", rise)
    bend = [2 * b - a - c for a, b, c in zip(curve[0], curve[20], curve[40])]
    add("Q is concave", "its gain from 0 to 20 minus that from 20 to 40", bend)
    late_gain = zip(curve[40], curve[80], curve[120], curve[160])
    bend = [(b - a) - (d - c) for a, b, c, d in late_gain]
    add("Q saturates", "its gain from 40 to 80 minus that from 120 to 160", bend)
    for start in (20, 100):
        found = exponents(runs, start)
        text = f"exponent of D from step {start}: {mean(found, 2)}"
        rows.append(["weights move linearly in D", text, linear_verdict(found)])
    untested(
        "V grows with D, at most like exp(beta D)",
        "V is not measured in these runs; see the law below",
    )
    peak = cards("40", "10"), cards("40", "160")
    add("S peaks at a near distance", "cards, step 40 minus 10, and minus 160", *peak)
    near = [plateaus.minus("plateau/near", f"plateau/{name}", END - 10) for name in ("low", "far")]
    add("S peaks at a near distance", f"plateau, +{AFTER - 10}, near minus B > .01, far", *near)
    text = f"the best guide's step at {WINDOW}, seeds: {best_guides(runs)}"
    rows.append(["D* is about 20 from the base, 70 later", text, "steps of a toy"])

    for world in WORLDS:
        auto, plain = f"autonpo/{world}-auto", f"autonpo/{world}-grpo"
        name = f"{world}, step {STEPS}"
        add("AutoNPO ends above GRPO", name, runs.minus(auto, plain, STEPS))
        fixed = runs.minus(auto, f"autonpo/{world}-fixed", STEPS)
        add("AutoNPO ends above a manual intervention", f"{name}, fixed D = 40", fixed)
        reward, entropy = (around(runs, world, "auto", what)[2:] for what in (0, 1))
        name = f"{world}, ten steps each after the first rollback, minus GRPO"
        add("AutoNPO's reward stays above GRPO's", name, *reward)
        add("its entropy expands again", name, *entropy)

    npo, plain = "rivals/future", "cards/grpo"
    for name, row in (("LUFFY", "luffy"), ("ExGRPO", "exgrpo"), ("RLEP", "rlep")):
        add(f"NPO ends above {name}", f"cards, step {RIVALS}", rivals(npo, f"rivals/{row}"))
    add("ExGRPO ends above GRPO", "cards", rivals("rivals/exgrpo", plain))
    add("RLEP ends above GRPO", "cards", rivals("rivals/rlep", plain))
    add("RLEP ends above ExGRPO", "cards", rivals("rivals/rlep", "rivals/exgrpo"))
    add("GRPO ends above LUFFY", "cards", rivals(plain, "rivals/luffy"))
    add("the near future beats a teacher", "cards", rivals(npo, "rivals/teacher"))
    add(
        "the near future beats the own past", "cards", rivals(f"{npo}-failed", "rivals/past-failed")
    )
    add("the near future beats the far one", f"cards, step {WINDOW}", cards("40", "160"))
    untested("+2.59 and +2.90 over GRPO on eight benchmarks", "8B model, 32 GPUs")
    return table("claim of the paper | measured here | verdict", rows)


# ---- When to use it ------------------------------------------------------------------------------


def pick(differences: list[float], above: str, open_ended: str, below: str) -> str:
    """The sentence that fits: above 0, undecided, below 0."""
    said = {"holds": above, "undecided": open_ended, "not confirmed": below}
    return said.get(of_interval(differences), "not measured yet")


def in_short(runs: Runs) -> str:
    """Three sentences."""
    (_, first, _), *_, (_, fourth, _) = primary(runs).values()
    equal = at_equal_tokens(runs, "cards/40", "cards/grpo")[0]
    sentences = [
        pick(
            first,
            "**NPO pays where the policy is stuck**: a right answer needs two or more tokens that "
            "it almost never says, so that neither more steps nor asking it again finds one, and "
            "there is a guide that has just learnt them",
            "**Where a policy is stuck**, a guide is not clearly better than asking the policy "
            "again",
            "**Where a policy is stuck**, asking it again is better than a guide",
        )
        + told("near guide minus asking again, staircase", first),
        pick(
            fourth,
            "**Where right answers come now and then**, it is ahead of asking the policy itself "
            "again at equal steps, which needs no guide",
            "**Where right answers come now and then, ask the policy itself again** "
            "(`--guide self`): a future is not clearly worth more",
            "**Where right answers come now and then, ask the policy itself again** "
            "(`--guide self`): that is better than a future",
        )
        + told("NPO minus asking again, cards", fourth),
        pick(
            equal,
            "**It saves tokens, too**, with scout and cache counted",
            "**It does not clearly save tokens**: with scout and cache counted NPO and plain GRPO "
            "are not apart",
            "**It saves steps, not tokens**: with scout and cache counted, plain GRPO is ahead, so "
            "it pays only if a guide is there already, or if plain GRPO would not get through",
        )
        + told("NPO minus GRPO at equal tokens, cards", equal),
    ]
    kinds = "where a policy is stuck", "where right answers come now and then", "in tokens"
    return " ".join(
        f"What NPO brings {kind} is not measured yet." if text.startswith("not") else f"{text}."
        for kind, text in zip(kinds, sentences)
    )


def told(what: str, differences: list[float]) -> str:
    if len(differences) < 2:
        return ""
    return f" ({what}: {minus(differences)}, {len(differences)} seeds)"


def questions(runs: Runs) -> str:
    """Question, answer, what it rests on; the negative results first."""
    plateaus, rows = stuck(runs), []

    def ask(question: str, answer: str, *measured: tuple[str, list[float]]) -> None:
        rows.append([question, answer, "; ".join(f"{name} {minus(d)}" for name, d in measured)])

    def cards(mine: str, theirs: str, step: int = WINDOW) -> list[float]:
        return runs.minus(f"cards/{mine}", f"cards/{theirs}", step)

    def stairs(mine: str, theirs: str, step: int = END, group: str = "plateau") -> list[float]:
        return plateaus_or_all[group].minus(f"{group}/{mine}", f"{group}/{theirs}", step)

    plateaus_or_all = {"plateau": plateaus, "one": runs}
    equal = {
        "cards": at_equal_tokens(runs, "cards/40", "cards/grpo")[0],
        "staircase, early": at_equal_tokens(runs, "future/early-160", "future/grpo")[0],
        "staircase, late": at_equal_tokens(runs, "future/late-160", "future/grpo")[0],
    }
    saved = "yes", "not clearly", "no, plain GRPO is ahead"
    answer = "; ".join(f"{name}: {pick(d, *saved)}" for name, d in equal.items())
    ask("Does it save tokens, with scout and cache counted?", answer, *equal.items())
    again, npo = cards("self", "grpo"), cards("40", "self")
    answer = pick(
        npo, "nearly: a future is better", "yes, and needs no scout", "yes, and it is better"
    )
    both = ("asking again minus GRPO", again), ("NPO minus asking again", npo)
    ask("Right answers come now and then: is asking again as good?", answer, *both)
    one = stairs("near", "self", group="one")
    answer = pick(one, "no, a near guide is better", "yes", "yes, and it is better")
    gaps = ("near minus asking again", one), ("near minus far", stairs("near", "far", group="one"))
    ask("A right answer needs one rare token (L = 1): is asking again as good?", answer, *gaps)
    low = stairs("low", "self")
    answer = pick(low, "yes, a little", "not clearly", "no, it harms")
    gap = ("guide of B > .01 minus asking again", low)
    ask("Does a guide help that has hardly got through itself?", answer, gap)
    auto = {w: runs.minus(f"autonpo/{w}-auto", f"autonpo/{w}-grpo", STEPS) for w in WORLDS}
    answers = [f"{w}: {pick(d, 'yes', 'not clearly', 'no, it is behind')}" for w, d in auto.items()]
    ask("Is AutoNPO ahead of GRPO?", "; ".join(answers), *auto.items())
    rows.append(["What do lucky answers do?", *lucky(runs)])
    first = stairs("near", "self")
    answer = pick(first, "yes, if near", "not clearly", "no")
    gaps = ("near minus asking again", first), ("minus GRPO", stairs("near", "grpo"))
    ask("The policy is stuck, two rare tokens (L = 2): does a guide help?", answer, *gaps)
    gaps = {
        f"staircase, +{AFTER - 10}": stairs("near", "far", END - 10),
        "cards, step 20": cards("40", "160", 20),
        f"cards, step {WINDOW}": cards("40", "160"),
    }
    answers = [f"{name}: {pick(d, 'near', 'not apart', 'far')}" for name, d in gaps.items()]
    ask("Near or far, with IS?", "; ".join(answers), *gaps.items())
    late = runs.minus("future/late-160-no-is", "future/late-160", END)
    gaps = {
        "staircase, near": stairs("near-no-is", "near"),
        "staircase, late": late,
        "cards": cards("40-no-is", "40"),
    }
    answers = [f"{name}: {pick(d, 'without', sameness(d), 'with')}" for name, d in gaps.items()]
    ask("With IS or without?", "; ".join(answers), *gaps.items())
    rows.append(["What does it cost?", *costs(runs)])
    return table("question | answer | measured: accuracy, differences", rows)


def lucky(runs: Runs) -> list[str]:
    near, far = (lucky_shares(runs, f"lax/{step}") for step in (40, 160))
    gaps = (runs.minus(f"{world}/40", f"{world}/160", WINDOW) for world in ("lax", "cards"))
    answer = pick(
        [a - b for a, b in zip(near, far)],
        "they sit in a near cache more than in a far one",
        "they sit in near and far caches alike",
        "they sit in a far cache more than in a near one",
    )
    told = [f"share of the cache, near {mean(near, 2)}, far {mean(far, 2)}"]
    told += [f"near minus far, {world} {minus(d)}" for world, d in zip(("lax", "strict"), gaps)]
    return [f"{answer}; check the working before you trust a guide", "; ".join(told)]


def lesson(runs: Runs) -> str:
    """What was in the old caches, and in those of the reruns."""
    before = next(line for line in read_jsonl(LUCKY) if line["world"] == "cards_lax")
    answer, measured = lucky(runs)
    return (
        f"{before['lucky']} of the {before['verified']} verified answers in the guide cache of "
        f"seed {before['seed']} were two slips that cancel. Run again, {answer.split(';')[0]}: "
        f"{measured}."
    )


def costs(runs: Runs) -> list[str]:
    pairs = runs.together("cards/40", "cards/grpo")
    if not pairs:
        return ["not measured yet", ""]
    plain = [next(e for e in b.evals if e["step"] == WINDOW)["sampled_tokens"] for _, b in pairs]
    mine = [spent(a, b) for a, b in pairs]
    ratios = [a / b for a, b in zip(mine, plain)]
    answer = f"{statistics.fmean(ratios):.1f} times the tokens of as many steps of GRPO"
    told = f"cards, {WINDOW} steps: NPO {thousands(mine)}k, scout and cache counted; GRPO "
    return [answer, f"{told}{thousands(plain)}k"]


# ---- README --------------------------------------------------------------------------------------


def readme(runs: Runs) -> str:
    """Eight rows."""
    rows = [
        [name, f"{what}: {mean(differences)}", corrected_verdict(differences, p)]
        for name, (what, differences, p) in primary(runs).items()
    ]
    pairs = runs.together("cards/40", "cards/grpo")
    speeds, counted = (speed_ups(pairs, before)[0] for before in (0, SCOUT))
    told = f"GRPO's steps over NPO's {ratio(speeds)}; with the scout's {ratio(counted)}"
    rows.append([f"early is about {PAPER_SPEED}x faster", told, speed_verdict(speeds)])
    equal, _, _ = at_equal_tokens(runs, "cards/40", "cards/grpo")
    told = f"NPO minus GRPO, cards: {mean(equal)}"
    rows.append(["early is ahead at equal tokens", told, of_interval(equal)])
    late = runs.minus("future/late-160-no-is", "future/late-160", END)
    rows.append(["late, IS barely matters", f"without minus with, B: {mean(late)}"])
    rows[-1].append(sameness(late))
    auto = [runs.minus(f"autonpo/{w}-auto", f"autonpo/{w}-grpo", STEPS) for w in WORLDS]
    told = "; ".join(f"{world} {mean(d)}" for world, d in zip(WORLDS, auto))
    rows.append(["AutoNPO ends above GRPO", told, all_of(*auto)])
    return table("claim | measured | verdict", rows)
