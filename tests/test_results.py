"""The statistics of the protocol by hand, and the page, README's rows and figures that are made of
the result lines."""

import json
import math
import re
import statistics
import xml.etree.ElementTree as xml

import numpy
import pytest

from experiments import advice, claims, dynamics, groups, student, tables, trl_early
from experiments.plan import GROUPS
from experiments.results import Result, Runs, catch_ups, load, speed_ups

ROOT = tables.ROOT


# ---- Statistics ----------------------------------------------------------------------------------


def test_student_t_has_the_known_quantiles():
    for inside, free, known in ((0.95, 2, 4.303), (0.90, 9, 1.833), (0.60, 5, 0.920)):
        assert student.quantile(inside, free) == pytest.approx(known, abs=6e-4)


def test_intervals_and_p_values_by_hand():
    values = [1.0, 2.0, 4.0]  # mean 7/3, std 1.5275, its error 0.8819, t = 2.6458
    low, high = student.bounds(values)
    assert (low, high) == pytest.approx((7 / 3 - 4.3027 * 0.88192, 7 / 3 + 4.3027 * 0.88192), 1e-4)
    assert student.interval(values) == f"2.33 [{low:.2f}, {high:.2f}]"
    assert student.interval([-1e-5, 1e-6], 3) == "0.000 [0.000, 0.000]"  # no -0.000
    assert student.bounds(values, 0.90)[1] == pytest.approx(7 / 3 + 2.9200 * 0.88192, rel=1e-4)
    assert student.p_value(values) == pytest.approx(1 - math.sqrt(7) / 3)
    assert student.p_value([-v for v in values]) == pytest.approx(1 - math.sqrt(7) / 3)
    assert (student.p_value([0.0, 0.0]), student.p_value([2.0, 2.0])) == (1, 0)
    assert student.detectable(values) == pytest.approx((4.3027 + 1.0607) * 0.88192, rel=1e-4)
    assert student.verdict([0.1, 0.11, 0.12]) == "holds"
    assert student.verdict([-0.1, -0.11, -0.12]) == "reversed"
    assert student.verdict(values) == "undecided"
    assert student.verdict([1.0]) == "not run yet"


def test_sign_flips_and_holm_by_hand():
    assert student.sign_flip([1.0, 2.0, 4.0]) == 2 / 8
    assert student.sign_flip([3.0, -1.0, 2.0]) == 4 / 8  # 6, 4, -4 and -6, not 2, -2 and 0 twice
    assert student.sign_flip([0.1] * 10) == 2 / 2**10
    assert student.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert student.holm([1.0, 0.5, 1.0]) == [1, 1, 1]


def test_geometric_means_and_equivalence_by_hand():
    middle, low, high = student.geometric([1.0, 2.0, 4.0])
    assert middle == pytest.approx(2)
    assert high / 2 == pytest.approx(math.exp(4.3027 * math.log(2) / 3**0.5), rel=1e-4)
    assert low * high == pytest.approx(4)
    assert student.sameness([0.01, 0.012, 0.02]) == "the same"  # 0.014 within 0.009
    assert student.sameness([0.03, 0.032, 0.04]) == "barely changes"
    assert student.sameness([-0.03, -0.032, -0.04]) == "barely changes"
    assert student.sameness([0.07, 0.08, 0.1]) == "changes"
    assert student.sameness([-0.1, 0.0, 0.13]) == "undecided"


# ---- Runs ----------------------------------------------------------------------------------------


def line(row: str, seed: int, *evals, **more) -> dict:
    """`evals` are [step, accuracy, tokens] or with a fourth, B."""
    commons = {"commit": "abc", "command": f"python {row}"}
    return {"row": row, "seed": seed, "evals": [list(e) for e in evals], **commons, **more}


def test_only_reported_seeds_of_the_plan_enter(tmp_path):
    lines = [line("cards/40", seed, (0, 0.1, 0)) for seed in (9, 10, 19, 20, 50)]
    lines += [line("cards/gone", 10, (0, 0.1, 0)), line("plateau/near", 12, (0, 0.1, 0))]
    (tmp_path / "cards.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert {row: sorted(runs) for row, runs in load(tmp_path).of.items()} == {"cards/40": [10, 19]}


def test_runs_are_paired_by_seed_and_left_out_ones_are_counted():
    lines = [line("plateau/near", s, (60, 0.5, 1, 0.0), (100, 0.5, 2, s / 64)) for s in (12, 10)]
    lines += [line("plateau/far", s, (60, 0.5, 1, 0.0), (100, 0.5, 2, 0.125)) for s in (10, 12, 14)]
    lines.append({"row": "plateau/near", "seed": 14, "left_out": "never", "commit": "abc"})
    runs = Runs(lines)
    assert runs.minus("plateau/near", "plateau/far", 100) == [10 / 64 - 0.125, 12 / 64 - 0.125]
    assert runs.over("plateau/near", "plateau/far", 100) == [10 / 8, 12 / 8]
    assert runs.at("plateau/near", 60) == [0, 0]  # B, not the whole accuracy
    assert groups.seeds(runs, "plateau/near") == "2 of 11, 1 left out"
    assert groups.seeds(runs, "plateau/far", elsewhere=2) == "3 of 10"
    assert groups.seeds(runs.only([10]), "plateau/near") == "1 of 12"


def test_small_accuracies_have_more_digits():
    assert groups.mean([0.0001, 0.0003]).startswith("0.00020 [")
    assert groups.mean([0.0001, 0.3]).startswith("0.150 [")
    assert groups.mean([0.0, 0.0]) == "0.000 [0.000, 0.000]"
    assert (groups.mean([0.25]), groups.mean([])) == ("0.250", "not run yet")
    assert groups.minus([0.1, 0.2, 0.4]).endswith("] (0.473)")  # (4.3027 + 1.0607) 0.08819
    assert groups.minus([0.1, 0.11, 0.12]).endswith("]")


def test_where_runs_reach_a_level_by_hand():
    run = Result.of({"evals": [[0, 0.0, 0], [10, 0.2, 150], [20, 0.6, 300]]})
    assert run.reach(0.5, 60) == (17.5, False)  # linear between two evaluations
    assert run.reach(0.7, 60) == (60, True)
    assert run.reach(0.5, 15) == (15, True)
    assert run.at_tokens(299)["step"] == 10 and run.at_tokens(300)["step"] == 20


def test_speed_ups_by_hand():
    """GRPO's steps to its own accuracy at step 40; a run that is cut counts with 60."""
    plain = Result.of({"evals": [[0, 0.0, 0], [30, 0.2, 3], [40, 0.1, 4], [60, 0.4, 6]]})  # at 15
    fast = Result.of({"evals": [[0, 0.0, 0], [10, 0.2, 9], [60, 0.5, 9]]})  # at 5
    never = Result.of({"evals": [[0, 0.0, 0], [60, 0.05, 9]]})
    flat = Result.of({"evals": [[0, 0.2, 0], [40, 0.1, 9]]})  # has nothing to be faster at
    pairs = [(fast, plain), (never, plain), (fast, flat)]
    assert speed_ups(pairs) == (pytest.approx([3, 15 / 60, 1]), 1)
    slow = Result.of({"evals": [[0, 0.0, 0], [40, 0.1, 4], [60, 0.4, 6], [90, 0.7, 9]]})
    lost = Result.of({"evals": [[0, 0.0, 0], [60, 0.0, 9]]})
    pairs = [(fast, slow), (fast, plain), (lost, plain)]  # .5 at 70; never; at once
    assert catch_ups(pairs) == (pytest.approx([70 / 60, 60 / 60, 1 / 60]), 1)
    assert catch_ups(pairs, 20) == (pytest.approx([70 / 80, 60 / 80, 1 / 80]), 1)


def test_equal_tokens_by_hand():
    plain = [[0, 0.0, 0], [60, 0.1, 600], [80, 0.3, 800], [300, 0.9, 3000]]
    lines = [line("future/grpo", seed, *plain) for seed in (10, 11)]
    lines.append(line("future/late-160", 10, (60, 0.1, 2300), (100, 0.7, 2700)))  # 600 of it twice
    lines.append(line("future/early-40", 11, (0, 0.0, 500), (100, 0.7, 3100)))
    runs = Runs(lines)
    assert groups.at_equal_tokens(runs, "future/late-160", "future/grpo") == (
        [pytest.approx(0.4)],
        [0.3],
        0,
    )
    differences, theirs, ended = groups.at_equal_tokens(runs, "future/early-40", "future/grpo")
    assert (theirs, ended) == ([0.9], 1) and differences == pytest.approx([-0.2])
    assert groups.ahead([0.1, 0, -0.2, 0, 0.3]) == ", ahead in 2 of 5, equal in 2"
    assert (groups.ahead([-0.1]), groups.ahead([])) == (", ahead in 0 of 1", "")


def test_a_rival_meets_the_longer_grpo_only_where_the_shorter_one_ends():
    lines = []
    for seed in (10, 11):
        lines.append(line("cards/grpo", seed, (95, 0.4, 900), (100, 0.5, 1000)))
        lines.append(line("autonpo/cards-grpo", seed, (90, 0.3, 900), (300, 0.8, 2000)))
        lines.append(line("rivals/exgrpo", seed, (100, 0.6, 950)))
        lines.append(line("rivals/luffy", seed, (100, 0.7, 1001)))
        lines.append(line("rivals/rlep", seed, (100, 0.7, 2100)))
    told = groups.rivals(Runs(lines), "rivals")
    found = dict(re.findall(r"^\| (ExGRPO|LUFFY|RLEP) \|.*\| (.+?) \| .+? \|$", told, re.MULTILINE))
    assert found == {
        "ExGRPO": "0.400 [0.400, 0.400]",
        "LUFFY": "0.300 [0.300, 0.300]",
        "RLEP": "0.800 [0.800, 0.800] (2 ended before)",
    }


def test_starts_that_are_no_plateau_are_apart():
    lines = [line("plateau/start", 10, (60, 0.5, 1, 0.0049)), line("plateau/near", 10, (100, 1, 1))]
    lines += [line("plateau/start", 11, (60, 0.5, 1, 0.005)), line("plateau/near", 11, (100, 1, 1))]
    runs = Runs(lines)
    assert list(groups.stuck(runs).of["plateau/near"]) == [10]
    assert list(groups.stuck(runs, False).of["plateau/near"]) == [11]


def test_autonpo_is_aligned_on_its_first_rollback():
    """At step 30 back by 10: the 31st line is step 21's again."""
    first = [[step, 0, step / 8, 1.0] for step in range(1, 31)]
    again = [[step, 1, step / 8 + 0.25, 0.5] for step in range(21, 46)]
    plain = [[step, 0, step / 8, 0.75] for step in range(1, 101)]
    mine = Result.of(
        {"evals": [], "steps": first + again, "decisions": [{"step": 20, "distance": 0}]}
    )
    theirs = Result.of({"evals": [], "steps": plain})
    assert dynamics.aligned(mine, theirs) is None  # it stayed
    mine.line["decisions"].append({"step": 30, "distance": 10})
    assert dynamics.rollbacks(mine) == [(30, 10)]
    found = dynamics.aligned(mine, theirs)
    assert found[:20, 2:].tolist() == [[0, 0.25]] * 20
    assert found[20:45, 2:].tolist() == [[0.25, -0.25]] * 25
    assert found[19:21, :2].tolist() == [[30 / 8, 1.0], [21 / 8 + 0.25, 0.5]]
    assert numpy.isnan(found[45:]).all() and found.shape == (60, 4)
    mine.line["steps"][40:] = [[step, 2, 0.0, 0.0] for step in range(29, 46)]  # back once more
    assert numpy.isnan(dynamics.aligned(mine, theirs)[30:]).all()


def test_q_v_and_s_by_hand(tmp_path, monkeypatch):
    """Of two seeds at t = 0: Q grows and bends, log V^ = D/100, so S^ is largest at D = 40."""
    quality, lines = {0: 0.1, 10: 0.3, 20: 0.45, 40: 0.6, 80: 0.65, 160: 0.66}, []
    for seed, extra in ((10, 0.0), (11, 0.001)):
        for distance, q in quality.items():
            line = {"seed": seed, "t": 0, "distance": distance, "quality": q + extra}
            line |= {"kl": distance / 100 - extra * distance**2 / 1e4, "answer_kl": distance / 4}
            lines.append(line | {"weight": 0.5, "right": 0.1})
    (tmp_path / "curve.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    monkeypatch.setattr(dynamics, "RESULTS", tmp_path / "curve.jsonl")
    found = dynamics.curves(0, "S")[40]
    assert found[0] == pytest.approx(0.6 / math.exp(0.4))
    assert dynamics.curves(0, "pull")[10][1] == pytest.approx(0.301 / 2)
    assert dynamics.curves(0, "S of answers")[20][0] == pytest.approx(0.45 / math.exp(5))
    assert dynamics.curves(40, "S") == {}
    text = dynamics.signals()
    assert "S^, t = 0: 40 in 2; S^, c = length, t = 0: 10 in 2; pull^, t = 0: 160 in 2" in text
    *_, peak, of_answers = rows = claims.signal_rows(0)
    assert [peak[-1], of_answers[-1]] == ["holds", "not confirmed"]
    said = {row[0]: row[-1] for row in rows[:-2]}
    assert {said.pop(f"Q {what}") for what in ("rises with the distance", "is concave")} == {
        "holds"
    }
    assert said == {
        "Q saturates": "holds",
        "V grows with D": "holds",
        "and log V more slowly than D": "undecided",  # exactly so for one seed, less for the other
    }
    assert claims.signal_rows(40)[0][-1] == "not run yet"


def test_the_exponent_of_the_weights_way():
    moved = [
        [t, span, 3 * span**power] for t, power in ((20, 0.5), (100, 1)) for span in (20, 40, 80)
    ]
    runs = Runs([line("cards/grpo", 10, (0, 0.1, 0), moved=moved)])
    assert dynamics.exponents(runs, 20) == [pytest.approx(0.5)]
    assert dynamics.exponents(runs, 100) == [pytest.approx(1)]


# ---- Verdicts and sentences ----------------------------------------------------------------------


def test_verdicts_of_claims():
    assert claims.all_of([0.1, 0.2], [0.1, 0.11]) == "undecided"
    assert claims.all_of([0.1, 0.11], [0.1, 0.11]) == "holds"
    assert claims.all_of([-0.1, -0.11], [0.1, 0.11]) == "not confirmed"
    assert claims.all_of([-0.1, -0.11]) == "reversed"
    assert claims.all_of([-0.1, -0.11], []) == "not run yet"
    assert claims.above([0.01, -0.012, 0.001], [0.011, -0.01, 0.0]) == "no: within 0.03"
    assert claims.above([0.01, -0.012, 0.001], [0.02, -0.03, 0.0]) == "undecided"
    assert claims.above([0.01, 0.0101, 0.0102]) == "holds"
    assert claims.speed_verdict([1.9, 2.1, 2.2]) == "faster; consistent with 2.1"
    assert claims.speed_verdict([1.5, 1.51, 1.52]) == "faster, but by less"
    assert claims.speed_verdict([2.5, 2.51, 2.52]) == "faster, but by more"
    assert claims.speed_verdict([0.5, 0.51, 0.52]) == "slower"
    assert claims.speed_verdict([0.5, 1.5, 1.2]) == "undecided"
    assert claims.linear_verdict([0.5, 0.51]) == "not confirmed: slower"
    assert claims.linear_verdict([0.9, 1.2]) == "consistent with it"
    assert claims.corrected_verdict([0.1, 0.2], 0.049) == "holds"
    assert claims.corrected_verdict([-0.1, -0.2], 0.049) == "reversed"
    assert claims.corrected_verdict([0.1, 0.2], 0.05) == "undecided"


def test_numbers_in_prose_know_whether_their_sentence_fits():
    lines = [line("plateau/start", s, (60, 0.5, 7, 0.0001)) for s in (10, 11, 12)]
    lines.append(line("plateau/start", 13, (60, 0.5, 7, 0.1)))  # no plateau
    for name, b in (("near", 0.7), ("self", 0.004)):
        ends = (b, b + 0.002, b + 0.004, 0.9)
        lines += [line(f"plateau/{name}", s, (100, 1, 9, e)) for s, e in zip(range(10, 14), ends)]
    told = advice.numbers(Runs(lines))

    def text(template: str) -> str:
        return template.format(**told)

    gap = "0.696 [0.696, 0.696]"
    assert text("{minus[plateau/near - plateau/self @100]:holds}") == gap
    assert text("{minus[plateau/near - plateau/self @100]:changes}") == gap
    assert text("{minus[plateau/near - plateau/self @100]}") == gap
    turned = text("{minus[plateau/self - plateau/near @100]:holds}")
    assert turned.endswith(f"{advice.OTHERWISE} reversed and changes")
    assert text("{minus[plateau/self - plateau/self @100]:the same}").startswith("0.000")
    assert text("{minus[cards/40 - cards/self @60]:holds}") == "not run yet"
    assert text("{out[plateau/self @100]:some}, {out[plateau/far @100]}") == "2 of 3, not run yet"
    assert text("{out[plateau/near @100]:all}, {out[plateau/start @60]:none}") == "3 of 3, 0 of 3"
    assert text("{out[plateau/self @100]:none}").endswith(f"{advice.OTHERWISE} some")


def test_tokens_and_steps_in_prose_by_hand():
    plain = [[0, 0.0, 0], [20, 0.1, 300], [40, 0.2, 500], [60, 0.3, 800], [200, 0.9, 3000]]
    lines = [line("cards/grpo", seed, *plain) for seed in (10, 11)]
    lines += [line("cards/40", s, [0, 0.0, 700], [20, 0.2, 900], [60, 0.5, 1600]) for s in (10, 11)]
    lines.append(line("lax/40", 10, (0, 0, 0), verified=8, lucky=2))
    told = advice.numbers(Runs(lines))
    assert "{level[cards/40 @60]}".format(**told) == "0.500 [0.500, 0.500]"
    assert "{caught[cards/40 - cards/grpo @0]:more}".format(**told) == "1.78 [1.78, 1.78]"  # 320/3
    assert "{caught[cards/40 - cards/grpo @60]:fewer}".format(**told) == "0.889 [0.889, 0.889]"
    assert "{caught[cards/40 - cards/grpo @60]:more}".format(**told).endswith("SAY fewer")
    assert "{minus[cards/40 - cards/grpo @20 @60]}".format(**told) == "-0.100 [-0.100, -0.100]"
    assert "{seeds[cards/40]}".format(**told) == "2"
    assert "{equal[cards/40 - cards/grpo]:holds}".format(**told) == (
        "0.200 [0.200, 0.200], ahead in 2 of 2"
    )
    assert "{lucky_share[lax/40]}".format(**told) == "0.25"


def test_a_late_replay_that_is_ahead_may_still_be_in_the_plateau():
    def verdict(b: float, plain=0.0001) -> str:
        lines = [line("future/grpo", s, (60, 0, 1, 0), (100, 0, 2, plain)) for s in (10, 11, 12)]
        lines += [
            line("future/late-160", s, (60, 0, 1, 0), (100, 0, 2, b + s / 1e6)) for s in (10, 11)
        ]
        rows = [row for row in claims.paper(Runs(lines)).splitlines() if "a late replay" in row]
        return rows[0].split("|")[3].strip()

    assert verdict(0.0049) == "not confirmed: ahead, but not out" and verdict(0.005) == "holds"
    assert verdict(0.5, plain=0.005) == "ahead; GRPO leaves it, too"


# ---- The page ------------------------------------------------------------------------------------


def whole() -> list[dict]:
    """A line for every planned run, as long and as often evaluated as its command says."""
    lines = []
    for group, (rows, seeds, _) in GROUPS.items():
        for run in rows:
            command, name = run.command.replace("{steps}", "90"), run.row.split("/")[1]
            first = 60 if "--start" in command else 0
            last = int(re.search(r"--steps (\d+)", command)[1])
            stairs = group in ("plateau", "future", "one") or "staircase" in name
            for seed in seeds:
                chance = numpy.random.default_rng([len(lines), seed])
                end = 0.3 + 0.2 * chance.random() + 0.1 * ("guide" in command)
                steps = range(first, last + 1, 5)
                evals = [[s, 0.002 + end * s / 200, 1600 * s + 9 * seed] for s in steps]
                if stairs:
                    evals = [[*e, 0.001 if e[0] <= 60 else e[1] ** 2] for e in evals]
                more = {"guide_b": 0.4 + 0.01 * seed} if ">" in command else {}
                if run.row == "cards/grpo":
                    more["moved"] = [
                        [t, d, d**0.5 + seed / 50] for t in (20, 60, 100) for d in (20, 80)
                    ]
                if group == "lax" and name != "grpo":
                    more |= {"verified": 90 + seed, "lucky": 30 + 2 * seed}
                if group == "autonpo":
                    taken = [[s, 0, 0.5 + s / 1000, 0.1] for s in range(1, last + 1)]
                    if name.endswith("auto"):
                        taken[150:] = [[s, 1, 0.6, 0.2] for s in range(111, last + 1)]
                    decisions = [{"step": 150, "distance": 40}] if name.endswith("auto") else []
                    more |= {"steps": taken, "decisions": decisions}
                lines.append(line(run.row, seed, *evals, **more))
    return lines


def table_after(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, its header left out."""
    found = text[text.index(f"\n{heading}\n") :]
    rows = re.search(r"(?:^\|.*\n)+", found, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_a_page_comes_out_at_every_stage():
    lines = whole()
    none, all_of_it = tables.results_page(Runs([])), tables.results_page(Runs(lines))
    assert none.count("Not run yet.") == 8 and advice.OTHERWISE not in none
    assert {row[-1] for row in table_after(none, "## Primary claims")} == {"not run yet"}
    assert "Not run yet." not in all_of_it
    without_trl = all_of_it.replace(tables.sections.through_trl(), "")
    assert "not run yet" not in without_trl and "not measured yet" not in without_trl
    stayed = [one | {"decisions": []} if "decisions" in one else one for one in lines]
    assert "| cards: 0 of its runs rolled back | not tested |" in tables.results_page(Runs(stayed))
    for count in (1, 30, 250, 450):
        page = tables.results_page(Runs(lines[:count]))
        assert "not run yet" in page and "nan" not in page
    one_seed = tables.results_page(Runs(lines).only([10]))
    assert {row[-1] for row in table_after(one_seed, "## Primary claims")} == {"not run yet"}


def test_the_numbers_of_the_page_are_those_of_the_lines():
    runs = Runs(whole())
    page, of = tables.results_page(runs), {(x["row"], x["seed"]): x["evals"] for x in runs.lines}

    def differences(mine: str, theirs: str, seeds, step: int) -> list[float]:
        rows = [
            [dict((e[0], e[-1] if e[3:] else e[1]) for e in of[row, s])[step] for s in seeds]
            for row in (mine, theirs)
        ]
        return [a - b for a, b in zip(*rows)]

    near = differences("plateau/near", "plateau/self", range(10, 22), 100)
    cards = differences("cards/40", "cards/grpo", range(10, 20), 60)
    primary = table_after(page, "## Primary claims")
    assert len(primary) == 4
    assert primary[0][2:5] == ["12", student.interval(near, 5), f"{student.p_value(near):.2g}"]
    assert primary[2][2:4] == ["10", student.interval(cards, 3)]
    assert float(primary[2][5]) >= float(primary[2][4])  # Holm's is no smaller
    row = next(row for row in table_after(page, "## Cards") if row[0] == "guide from step 40")
    mean = statistics.fmean(
        dict((e[0], e[1]) for e in of["cards/40", s])[20] for s in range(10, 20)
    )
    assert (
        row[1] == "10"
        and row[2].startswith(f"{mean:.3f} [")
        and row[5] == student.interval(cards, 3)
    )
    lucky = table_after(page, "## The lax cards world")
    assert lucky[1][2] == student.interval([(30 + 2 * s) / (90 + s) for s in range(10, 20)])
    readme = claims.readme(runs).splitlines()
    assert len(readme) == 2 + 8 and student.interval(near, 5) in readme[2]


def test_the_committed_page_and_readme_are_those_of_the_committed_lines():
    runs, readme = load(), (ROOT / "README.md").read_text()
    page = (ROOT / "docs" / "results.md").read_text()
    assert page == tables.results_page(runs) and advice.OTHERWISE not in page
    assert len(tables.MARKED.findall(readme)) == 1
    assert readme == tables.readme_with_rows(readme, runs)


def test_figures_are_drawn_at_every_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    (tmp_path / "figures").mkdir()
    sizes = []
    for runs in (Runs([]), Runs(whole())):
        for draw in (tables.draw_plateau, tables.draw_early, tables.draw_autonpo):
            draw(runs)
        figures = sorted((tmp_path / "figures").iterdir())
        assert [path.name for path in figures] == ["autonpo.svg", "early.svg", "plateau.svg"]
        assert all(xml.parse(path).getroot().tag.endswith("svg") for path in figures)
        sizes.append([path.stat().st_size for path in figures])
    assert all(drawn > empty + 5_000 for empty, drawn in zip(*sizes)), sizes


def test_the_speed_up_through_trl_is_of_steps_to_grpos_own_accuracy(tmp_path, monkeypatch):
    lines = []
    for seed, reached in ((13, 10), (14, 20)):
        plain = [[0, 0.0, 0], [20, 0.1, 7], [40, 0.2, 9], [60, 0.3, 12]]
        guided = [[0, 0.0, 0], [reached, 0.2, 8], [60, 0.5, 11]]
        lines += [line("grpo", seed, *plain), line("early", seed, *guided)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    monkeypatch.setattr(trl_early, "RESULTS", tmp_path / "lines.jsonl")
    both = [
        line(row, s, *e)
        for row, e in (("cards/40", guided), ("cards/grpo", plain))
        for s in (14, 15)
    ]
    monkeypatch.setattr(trl_early, "load", lambda: Runs(both))
    found = trl_early.pairs()
    assert [mine.line["seed"] for mine, _ in found["plain"]] == [14]  # 15 is none of TRL's
    seeds, speed, grpo, npo = trl_early.cells(found["TRL"])
    assert speed.startswith("2.83 [")  # the geometric mean of 4 and 2
    assert (seeds, grpo, npo) == ("2", "0.300 [0.300, 0.300]", "0.500 [0.500, 0.500]")
