"""The twin: its groups against the enumeration, its steps by hand, and what it is there to show."""

import json
import math
from functools import partial

import numpy
import pytest

import signal_theory as st
from experiments import twin


@pytest.mark.parametrize(
    ("p", "q", "L", "changes"),
    [
        (0.3, 0.3, 2, {"m": 0}),  # GRPO
        (0.3, 0.6, 2, {}),
        (0.5, 0.5, 3, {"n": 5, "m": 3}),  # asked again
        (0.3, 0.25, 2, {"m": 20}),  # 1.2: within the clip range
        (0.3, 0.2, 2, {"m": 40}),  # stopped by the clip
        (0.4, 0.8, 3, {"ratio": "sequence", "gate": 0.1}),
        (0.2, 0.9, 1, {"ratio": "none", "gate": 0.2, "n": 4}),
    ],
)
def test_sampled_groups_agree_with_the_enumeration(p, q, L, changes):
    random, ones = numpy.random.default_rng(3), numpy.ones(200)
    found = twin.sampled_pull(random, p * ones, q * ones, L, groups=400, **changes)
    error = found.std(ddof=1) / math.sqrt(len(found))
    exact = st.guided_pull(p, q, L, **changes)
    assert abs(found.mean() - exact) < 3 * error and error < 0.03 * exact


def test_a_step_by_hand():
    """A from 1/2, B from p = 1/5, asked with a pull that only tells what it was asked."""
    calls = []

    def pull(p, q, L, n=8, m=8, **_):
        calls.append((p.round(3).tolist(), q.round(3).tolist(), L, m))
        return numpy.array([0.25 * L])

    start, guide = numpy.log([[1.0, 1 / 4]]), numpy.log([[3.0, 1 / 3]])
    path = twin.train(pull, start, 3, guide)
    a, b = 2.0 * 0.25, 2.0 * 0.75  # half of the prompts are A's, LR is 4
    assert path[1] - path[0] == pytest.approx(numpy.array([[a, b - 0.1 * a]]))
    assert calls[:2] == [([0.5], [0.75], 1, 8), ([0.2], [0.25], 3, 8)]
    steps = math.ceil((math.log(0.5 ** (1 / 3) / (1 - 0.5 ** (1 / 3))) - start[0, 1]) / 1.45)
    assert twin.first(path, 3) == [steps] and len(path) == steps + 1  # ends with the jump
    assert len(twin.train(pull, start, 3, guide, past=4)) == steps + 5
    for other, asked in ((None, 0), (twin.LIVE, 8)):
        calls.clear()
        twin.train(pull, start, 3, other)
        assert calls[1] == ([0.2], [0.2], 3, asked)


def test_median_and_its_interval_are_order_statistics():
    assert twin.median(range(64, 0, -1)) == [32.5, 24, 41]  # P(fewer than 24 of 64 heads) < .025
    assert twin.median([math.inf, 5, 7, 6, 9, 8]) == [7.5, 5, math.inf]


def test_token_kl_by_hand():
    guide, policy = numpy.log([[1.0, 3.0]]), numpy.log([[5.0, 1 / 3]])  # B: 3/4 and 1/4
    by_hand = 2 / 22 * (0.75 * math.log(3) - 0.25 * math.log(3))
    assert twin.token_kl(guide, policy, 2) == pytest.approx(by_hand)


def test_near_breaks_the_plateau_if_answers_need_two_tokens_but_not_one(monkeypatch):
    monkeypatch.setattr(twin, "FAR", 60)
    medians = {}
    for L in (1, 2):
        world = twin.World(L, seed=5, runs=32)
        assert (twin.first(world.plain, L) >= 40).all()  # a plateau
        assert numpy.median(twin.accuracy(world.start, L)) < 0.003
        near = twin.at(world.scout, twin.first(world.scout, L, 0.1))
        far = twin.at(world.scout, world.jump + twin.FAR)
        ways = {"plain": {}, "again": {"guide": twin.LIVE}, "near": {"guide": near}}
        ways |= {"far": {"guide": far}, "no IS": {"guide": far, "ratio": "none"}}
        medians[L] = {name: numpy.median(world.steps(**way)) for name, way in ways.items()}
        expected = numpy.median(world.steps(near, st.guided_pull))  # the mean field
        assert expected == pytest.approx(medians[L]["near"], rel=0.25)
    one, two = medians[1], medians[2]
    assert one["no IS"] < one["again"] < one["near"] < one["plain"] < one["far"]
    assert two["no IS"] < two["near"] < two["far"] < two["again"] < two["plain"]


def test_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(twin, "RESULTS", tmp_path / "twin.json")
    monkeypatch.setattr(twin, "LENGTHS", (3,))
    monkeypatch.setattr(twin, "FAR", 50)
    monkeypatch.setattr(twin, "World", partial(twin.World, runs=5))
    twin.main()
    found, text = json.loads((tmp_path / "twin.json").read_text()), capsys.readouterr().out
    steps = found["compare"]["3"]["guide B > .1"]["steps"]
    assert "| guide B > .1 | {:.0f} [{:.0f}, {:.0f}] |".format(*steps) in text
    work = found["compare"]["3"]["G = 16"]
    assert work["work"] == [2 * value for value in work["steps"]] and work["scout"] == 0
    assert found["choose_guide"]["3"]["the largest pull"]["share of the pull"] == 1
    rollback = found["choose_rollback"]["3"]
    assert rollback["10"]["Q^"] > 0.2 and rollback["10"]["V^"] > 1
    assert sum(row["chosen"] for row in rollback.values()) == 1
