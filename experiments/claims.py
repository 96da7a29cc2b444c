"""The primary claims of docs/protocol.md, the paper's claims, and README's rows, each with what was
measured and its verdict."""

import statistics

from experiments.dynamics import STEPS, WORLDS, around, curves, exponents
from experiments.groups import (
    END,
    LATER,
    MISSING,
    STUCK,
    at_equal_tokens,
    digits_of,
    late,
    left,
    mean,
    minus,
    ratio,
    same,
    stuck,
    table,
)
from experiments.plan import AFTER, LONGER, PLATEAU, RIVALS, SCOUT, WINDOW
from experiments.results import Runs, catch_ups, speed_ups
from experiments.signal_curve import STARTS
from experiments.student import (
    SAME,
    bounds,
    detectable,
    geometric,
    holm,
    p_value,
    sameness,
    sign_flip,
)
from experiments.student import verdict as of_interval

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
    return "holds" if statistics.fmean(differences) > 0 else "reversed"


def primary_table(runs: Runs) -> str:
    rows = []
    for number, (name, (what, differences, p)) in enumerate(primary(runs).items(), 1):
        cells = [f"{number}. {name}", what, f"{len(differences)}", mean(differences)]
        if len(differences) > 1:
            exact = p_value(differences), p, sign_flip(differences)
            digits = digits_of(differences)
            cells += [f"{value:.2g}" for value in exact] + [f"{detectable(differences):.{digits}f}"]
        else:
            cells += [""] * 4
        rows.append([*cells, corrected_verdict(differences, p)])
    header = "claim | measure | seeds | difference | p, t test | p, Holm | p, sign flip | "
    header += "smallest detectable | verdict"
    return f"""{table(header, rows)}

A difference above 0 is no breakthrough yet: at +{AFTER} most runs of every arm with IS are still in
the plateau, where B is tiny and skewed, so that a t test sees little. The steps had been fixed
beforehand; +{LONGER} below was added afterwards."""


def at_equal(runs: Runs, row: str) -> tuple[list[float], str]:
    """Differences to the group's GRPO at equal tokens, and a note of those that ended before."""
    differences, _, ended = at_equal_tokens(runs, row, row.split("/")[0] + "/grpo")
    return differences, f" ({ended} of GRPO's ended before)" if ended else ""


# ---- The paper's claims --------------------------------------------------------------------------


def all_of(*differences: list[float]) -> str:
    """The verdict of a claim that needs every one of them above 0."""
    found = [of_interval(values) for values in differences]
    for worst in (MISSING, "reversed", "undecided"):
        if worst in found:
            return worst if len({*found}) == 1 or worst != "reversed" else "not confirmed"
    return "holds"


def above(*differences: list[float]) -> str:
    """The verdict; where undecided, whether all of them are *the same*."""
    found = all_of(*differences)
    equal = {sameness(values) for values in differences} == {"the same"}
    return f"no: within {SAME}" if found == "undecided" and equal else found


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


def signal_rows(start: int) -> list[list[str]]:
    """The claims on Q, V and S, of policies at one t."""
    found = {key: curves(start, key) for key in ("quality", "kl", "S", "S of answers")}
    if not found["S"]:
        return [[f"Q, V and S from t = {start}", MISSING, MISSING]]

    def differences(key: str, first: int, second: int, per_step: bool = False) -> list[float]:
        by = (first, second) if per_step else (1, 1)
        return [b / by[1] - a / by[0] for a, b in zip(found[key][first], found[key][second])]

    def row(claim: str, what: str, *of: list[float]) -> list[str]:
        return [claim, f"t = {start}, {what}: {'; '.join(map(minus, of))}", all_of(*of)]

    def less(first: list[float], second: list[float]) -> list[float]:
        return [a - b for a, b in zip(first, second)]

    bends = less(differences("quality", 0, 20), differences("quality", 20, 40))
    saturates = less(differences("quality", 40, 80), differences("quality", 80, 160))
    slower = [-value for value in differences("kl", 10, 160, per_step=True)]
    return [
        row("Q rises with the distance", "D = 160 minus 10", differences("quality", 10, 160)),
        row("Q is concave", "gain from D = 0 to 20 minus 20 to 40", bends),
        row("Q saturates", "gain from 40 to 80 minus 80 to 160", saturates),
        row("V grows with D", "log V^ = KL at D = 160 minus 10", differences("kl", 10, 160)),
        row("and log V more slowly than D", "log V^ / D at D = 10 minus 160", slower),
        *(
            row(
                "S peaks at a near distance",
                f"S^{what} at D = 10 (chosen afterwards) minus 0, and minus 160",
                differences(key, 0, 10),
                differences(key, 160, 10),
            )
            for key, what in (("S", ""), ("S of answers", ", c = length (not AutoNPO's rule),"))
        ),
    ]


def paper(runs: Runs) -> str:
    """Every claim, with those that are not tested here."""
    rows, plateaus = [], stuck(runs)

    def add(claim: str, what: str, *differences: list[float], judge=all_of) -> None:
        text = "; ".join(map(minus, differences))
        rows.append([claim, f"{what}: {text}", judge(*differences)])

    def untested(claim: str, why: str) -> None:
        rows.append([claim, why, "not tested"])

    def cards(mine: str, theirs: str, step: int = WINDOW) -> list[float]:
        return runs.minus(f"cards/{mine}", f"cards/{theirs}", step)

    def rivals(mine: str, theirs: str) -> list[float]:
        return runs.minus(mine, theirs, RIVALS)

    pairs = runs.together("cards/40", "cards/grpo")
    for what, speeds in (
        (f"its accuracy at {SCOUT} over NPO's", speed_ups(pairs)[0]),
        (f"NPO's accuracy at {WINDOW}, over {WINDOW}", catch_ups(pairs)[0]),
        (f"the same over {WINDOW} and the scout's {SCOUT}", catch_ups(pairs, SCOUT)[0]),
    ):
        what = f"cards, GRPO's steps to {what}: {ratio(speeds)}"
        rows.append([f"early is about {PAPER_SPEED}x faster", what, speed_verdict(speeds)])
    add("early is ahead of GRPO", f"cards, step {WINDOW}", cards("40", "grpo"))
    equal, note = at_equal(runs, "cards/40")
    add("early is ahead at equal tokens", f"cards{note}", equal)
    own, plain, of = "future/late-160", "future/grpo", late(runs)
    out = f"out of it: late {left(of, own, END)}, GRPO {left(of, plain, END)}"
    add("a late replay breaks a plateau", f"B, {out}", of.minus(own, plain, END))
    if rows[-1][-1] == "holds" and statistics.median(of.at(own, END)) < STUCK:
        rows[-1][-1] = "not confirmed: ahead, but not out"
    elif rows[-1][-1] == "holds" and statistics.median(of.at(plain, END)) >= STUCK:
        rows[-1][-1] = "ahead; GRPO leaves it, too"
    equal, note = at_equal(of, own)
    add("a late replay is ahead at equal tokens", f"B{note}", equal)
    without = of.minus(f"{own}-no-is", own, END)
    rows.append(["late, IS barely matters", f"B, without minus with: {same(without)}"])
    rows[-1].append(sameness(without))

    for start in STARTS:
        rows += signal_rows(start)
    for start in (20, 60, 100):
        found = exponents(runs, start)
        text = f"exponent of D from step {start}: {mean(found, 2)}"
        rows.append(["weights move linearly in D", text, linear_verdict(found)])
    peak = cards("40", "10"), cards("40", "160")
    claim = "training gains most with a near guide"
    add(claim, "cards, step 40 minus 10, and minus 160", *peak)
    best = [plateaus.minus("plateau/lower", f"plateau/{arm}", END - 10) for arm in ("low", "far")]
    what = (
        f"plateau, +{AFTER - 10}, B > .16 (the best of four, chosen afterwards) minus B > .01, far"
    )
    add(claim, what, *best)
    text = f"the best guide's step at {WINDOW}, seeds: {best_guides(runs)}"
    rows.append(["D* is about 20 from the base, 70 later", text, "not comparable"])

    for world in WORLDS:
        auto, plain = f"autonpo/{world}-auto", f"autonpo/{world}-grpo"
        name = f"{world}, step {STEPS}"
        add("AutoNPO ends above GRPO", name, runs.minus(auto, plain, STEPS), judge=above)
        always = runs.minus(auto, f"autonpo/{world}-always", STEPS)
        what = f"{name}, D = 40 at step 120"
        add("AutoNPO ends above a manual intervention", what, always, judge=above)
        reward, entropy = (around(runs, world, "auto", what)[2:] for what in (2, 3))
        name = f"{world}, {len(reward[0])} runs, tens of steps from the first rollback, minus GRPO"
        if auto in runs.of and len(reward[0]) < 2:
            fewer = f"{world}: {len(reward[0])} of its runs rolled back"
            untested("AutoNPO's reward stays above GRPO's", fewer)
            continue
        add("AutoNPO's reward stays above GRPO's", name, *reward)
        add("its entropy expands again", name, *entropy)

    npo, plain = "rivals/future", "cards/grpo"
    for row, name, note in (
        ("luffy", "LUFFY", ", LUFFY by the teacher"),
        ("luffy-160", "LUFFY", ", LUFFY by step 160"),
        ("exgrpo", "ExGRPO", ", for more tokens"),
        ("rlep", "RLEP", ", RLEP by 160"),
    ):
        what = f"cards, step {RIVALS}, NPO guided to it by step {SCOUT}{note}"
        add(f"NPO ends above {name}", what, rivals(npo, f"rivals/{row}"))
    add("ExGRPO ends above GRPO", "cards", rivals("rivals/exgrpo", plain))
    add("RLEP ends above GRPO", "cards", rivals("rivals/rlep", plain))
    add("RLEP ends above ExGRPO", "cards", rivals("rivals/rlep", "rivals/exgrpo"))
    add("GRPO ends above LUFFY", "cards, the teacher's answers", rivals(plain, "rivals/luffy"))
    own = rivals(plain, "rivals/luffy-160")
    add("GRPO ends above LUFFY", "cards, the policy's step 160 as its teacher", own)
    add("the near future beats a teacher", f"cards, step {WINDOW}", cards("40", "teacher"))
    past = rivals(f"{npo}-failed", "rivals/past-failed")
    what = f"cards, step {RIVALS}"
    add("the near future beats the own past", f"{what}, where all failed, step 40 minus 20", past)
    add("the near future beats the far one", f"cards, step {WINDOW}", cards("40", "160"))
    untested("+2.59 and +2.90 over GRPO on eight benchmarks", "8B model, 32 GPUs")
    return table("claim of the paper | measured here | verdict", rows)


# ---- README --------------------------------------------------------------------------------------


def readme(runs: Runs) -> str:
    """Eight rows."""
    rows = [
        [name, f"{what}: {mean(differences)}", corrected_verdict(differences, p)]
        for name, (what, differences, p) in primary(runs).items()
    ]
    for row, other, name in ((0, "self", "D = 0"), (1, "far", "far")):
        for step in (END, LATER):
            near, its = (left(stuck(runs), f"plateau/{arm}", step) for arm in ("near", other))
            later = " (added afterwards)" if step == LATER else ""
            rows[row][1] += f"; out at +{step - PLATEAU}{later}: near {near}, {name} {its}"
    pairs = runs.together("cards/40", "cards/grpo")
    speeds, caught, counted = speed_ups(pairs)[0], catch_ups(pairs)[0], catch_ups(pairs, SCOUT)[0]
    told = f"GRPO's steps to its accuracy at {SCOUT} over NPO's {ratio(speeds)}; to NPO's at "
    told += f"{WINDOW} {ratio(caught)}, with the scout's counted {ratio(counted)}"
    judged = f"{speed_verdict(speeds)}; with the scout's steps {speed_verdict(counted)}"
    rows.append([f"early is about {PAPER_SPEED}x faster", told, judged])
    equal, note = at_equal(runs, "cards/40")
    told = f"NPO minus GRPO, cards{note}: {mean(equal)}"
    rows.append(["early is ahead at equal tokens", told, of_interval(equal)])
    without = late(runs).minus("future/late-160-no-is", "future/late-160", END)
    stairs = stuck(runs).minus("plateau/near-no-is", "plateau/near", END)
    told = f"without IS minus with, B, own future: {mean(without)}; another run's answers in a "
    told += f"plateau, +{AFTER}: {mean(stairs)}"
    rows.append(["late, IS barely matters", told, sameness(without)])
    auto = [runs.minus(f"autonpo/{w}-auto", f"autonpo/{w}-grpo", STEPS) for w in WORLDS]
    told = "; ".join(f"{world} {mean(d)}" for world, d in zip(WORLDS, auto))
    rows.append(["AutoNPO ends above GRPO", told, above(*auto)])
    return table("claim | measured | verdict", rows)
