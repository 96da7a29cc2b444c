"""Q, V, S and D* against hand arithmetic, grids and enumeration; and where the theory fails."""

import itertools
import json
import math
import random

import numpy
import pytest
import torch

import signal_theory as st

# Two tokens. First token: p = (1/2, 1/2), q = (3/4, 1/4). After token 0: p = q = (1/2, 1/2).
# After token 1: p = (1/3, 2/3), q = (1/2, 1/2).
THETA = numpy.log([[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]])
DRIFT = numpy.log([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
MEASURED = [
    {"distance": 10, "prompts": 9, "quality": 0.25, "variance": 1.25, "signal": 0.2},
    {"distance": 20, "prompts": 12, "quality": 0.0, "variance": 1.5, "signal": 0.0},
]


def log_v(theta, drift, distance: float, length: int) -> float:
    return math.log(st.closed_form(theta, drift, distance, length))


def test_curves_by_hand():
    assert st.quality(0, 0.3) == 0
    assert st.quality(7, 0.3) == pytest.approx(1 - math.exp(-2.1))
    assert st.quality(numpy.array([0.0, 7.0]), 0.3)[1] == st.quality(7, 0.3)  # arrays too
    assert st.variance(7, 0.3) == pytest.approx(math.exp(2.1))
    assert st.local_variance(7, 0.02) == pytest.approx(math.exp(0.98))
    assert st.signal(0.6, 1.5) == pytest.approx(0.4)
    assert st.optimal_distance(0.04, 0.01) == pytest.approx(math.log(5) / 0.04)
    assert st.local_maxima([5, 1, 2, 0, 3, 3, 1, 4]) == [2, 4]  # a plateau once, no ends


def test_second_moment_by_hand_and_the_right_way_round():
    p, q = [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]
    assert st.second_moment(p, q) == pytest.approx(0.25 / 0.2 + 0.09 / 0.5 + 0.04 / 0.3)
    assert st.second_moment(q, p) == pytest.approx(0.04 / 0.5 + 0.25 / 0.3 + 0.09 / 0.2)
    assert st.second_moment([0.5, 0.5, 0.0], [0.5, 0.25, 0.25]) == pytest.approx(1.5)
    assert st.second_moment([0.5, 0.5], [1.0, 0.0]) == math.inf
    assert st.second_moment([1.0, 0.0], [1.0, 0.0]) == 1  # where both are 0 nothing is added


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.1), (0.1, 0.0), (-1.0, 0.1), (math.nan, 0.1)])
def test_no_interior_maximum_is_an_error(alpha, beta):
    with pytest.raises(ValueError, match=f"alpha {alpha}, beta {beta}"):
        st.optimal_distance(alpha, beta)


def test_optimal_distance_is_the_only_maximum_on_a_grid_for_100_random_pairs():
    draw = random.Random(3)
    for _ in range(100):
        alpha, beta = 10 ** draw.uniform(-3, -0.5), 10 ** draw.uniform(-3.5, -0.5)
        best = st.optimal_distance(alpha, beta)
        grid = numpy.arange(1, 4000) * best / 997
        s = st.signal(st.quality(grid, alpha), st.variance(grid, beta))
        assert abs(grid[numpy.argmax(s)] - best) <= best / 997
        assert len(st.local_maxima(s)) == 1
        assert st.local_maxima(-1 / s) == st.local_maxima(s)  # the minimum of the U


def test_reported_distances_and_what_alone_could_explain_them():
    assert st.optimal_distance(*st.EARLY) == pytest.approx(20, abs=0.1)
    assert st.optimal_distance(*st.MIDDLE) == pytest.approx(70, abs=0.3)
    assert st.optimal_distance(0.04, 0.00259) == pytest.approx(70, abs=0.01)  # slower drift can
    slower = [st.optimal_distance(alpha, 0.0326) for alpha in (0.04, 1e-2, 1e-3, 1e-6)]
    assert slower == sorted(slower) and slower[-1] < 1 / 0.0326 < 31  # slower learning cannot
    assert slower[-1] == pytest.approx(1 / 0.0326, rel=1e-4)


def test_assumptions_matter():
    grid = numpy.arange(0.1, 200, 0.1)
    local = st.signal(st.quality(grid, 0.03), st.local_variance(grid, 2e-4))
    assert len(st.local_maxima(local)) == 1  # the local law has one maximum too
    assert [len(st.local_maxima(s)) for _, s in st.counter_examples().values()] == [2, 0]


def test_tiny_policy_by_hand():
    tokens = numpy.array([[1, 0], [0, 1], [1, 1]])
    assert st.contexts(tokens, 2).tolist() == [[2, 1], [2, 0], [2, 1]]
    by_hand = numpy.array([[1 / 2, 1 / 3], [1 / 2, 1 / 2], [1 / 2, 2 / 3]])
    assert numpy.exp(st.token_logprobs(THETA, tokens)) == pytest.approx(by_hand)
    by_hand = [1, 2 / 9 + 8 / 9, 1 / 3 + 1]  # sum of p^2/q after token 0, after token 1, at first
    assert numpy.exp(st.log_moments(THETA, DRIFT)) == pytest.approx(by_hand)
    assert st.closed_form(THETA, DRIFT, 1, 1) == pytest.approx(4 / 3)
    assert st.closed_form(THETA, DRIFT, 1, 2) == pytest.approx(1 / 3 * 1 + 1 * 10 / 9)
    k, beta = st.growth_rates(THETA, DRIFT, 2)
    first, after_1 = math.log(3) ** 2 / 4, math.log(2) ** 2 * 2 / 9  # Var_p(d); after 0 it is 0
    assert k == pytest.approx(first + after_1 / 2)
    assert beta == pytest.approx(math.log(3) + math.log(2))
    gradient, probability = numpy.array([[2.0, 0.0], [-1.0, 3.0]]), numpy.array([0.25, 0.75])
    by_hand = 0.25 * 4 + 0.75 * 10 - 0.25**2 - 2.25**2
    assert st.total_variance(gradient, probability) == pytest.approx(by_hand)


@pytest.mark.parametrize(("size", "length", "seed"), [(2, 7, 1), (3, 4, 2), (4, 5, 0), (5, 1, 4)])
@pytest.mark.parametrize("distance", [0.0, 3.0, 11.0, 40.0])
def test_closed_form_is_the_enumeration(size, length, seed, distance):
    theta, drift = st.small_policy(size, seed)
    summed = st.enumerated(theta, drift, distance, length)["second_moment"]
    assert st.closed_form(theta, drift, distance, length) == pytest.approx(summed, rel=1e-6)


def test_gradient_variance_is_that_of_a_plain_loop_with_autograd():
    theta, drift = st.small_policy(3, 5)
    exact = st.enumerated(theta, drift, distance=9.0, length=3)
    p_table, q_table = torch.tensor(theta, requires_grad=True), torch.tensor(theta + 9.0 * drift)

    def logprobs(table, sequence):
        steps = zip((3, *sequence), sequence)  # (token before, token); 3: none before
        return torch.stack([torch.log_softmax(table[row], dim=0)[token] for row, token in steps])

    sequences = list(itertools.product(range(3), repeat=3))
    right = [sequence for sequence in sequences if sum(sequence) % 3 == 0]
    value = sum(logprobs(p_table, sequence).sum().exp().item() for sequence in right)
    for key in ("gradient", "gradient_by_token"):
        pairs = []  # (probability under the guide, gradient)
        for sequence in sequences:
            mine, guides = logprobs(p_table, sequence), logprobs(q_table, sequence)
            ratio = (mine.detach() - guides).exp()
            weight = ratio.prod() if key == "gradient" else ratio
            loss = ((sequence in right) - value) * (weight * mine).mean()
            pairs.append((guides.sum().exp(), *torch.autograd.grad(loss, p_table)))
        mean = sum(q * gradient for q, gradient in pairs)
        spread = sum(q * ((gradient - mean) ** 2).sum() for q, gradient in pairs)
        assert exact[key] == pytest.approx(spread.item(), rel=1e-9)
        if key == "gradient":
            assert exact["gradient_mean"] == pytest.approx(mean.norm().item(), rel=1e-9)


def test_the_weight_keeps_the_gradients_mean_and_costs_variance():
    theta, drift = st.small_policy(4, 0)
    found = [st.enumerated(theta, drift, distance, 4) for distance in (0, 5, 15, 30)]
    means, variances = ([one[key] for one in found] for key in ("gradient_mean", "gradient"))
    assert means == pytest.approx([means[0]] * 4, rel=1e-9)  # equation (1)
    assert variances == sorted(variances)
    tokens = numpy.array(list(itertools.product(range(4), repeat=4)))
    p = numpy.exp(st.token_logprobs(theta, tokens).sum(axis=1))
    reward = (tokens.sum(axis=1) % 3 == 0).astype(float)
    unweighted = st.gradients(theta, drift, 0.0, tokens, reward - p @ reward)[0]
    bound = (unweighted**2).sum(axis=1).max()  # C^2 of equation (2)
    assert all(one["gradient"] <= bound * one["second_moment"] for one in found)


def test_which_law_holds_where():
    theta, drift = st.small_policy(4, 0)
    for length in (1, 5):
        k, beta = st.growth_rates(theta, drift, length)
        for distance in (0.5, 3, 20, 100, 400):  # equation (4), everywhere
            assert log_v(theta, drift, distance, length) <= beta * distance
        near = log_v(theta, drift, 0.05, length)  # equation (6)
        assert near == pytest.approx(k * 0.05**2, rel=1e-3)
    rise = log_v(theta, drift, 1500, 1) - log_v(theta, drift, 1400, 1)  # far away, one token
    assert rise / 100 == pytest.approx(st.growth_rates(theta, drift, 1)[1], rel=1e-6)


def test_growth_is_proportional_to_length_for_independent_tokens():
    theta, drift = st.small_policy(4, 0)
    theta[:], drift[:] = theta[0], drift[0]  # every context alike
    one, rates = log_v(theta, drift, 12, 1), numpy.array(st.growth_rates(theta, drift, 1))
    for length in (2, 5, 30):
        assert log_v(theta, drift, 12, length) == pytest.approx(length * one)
        assert st.growth_rates(theta, drift, length) == pytest.approx(length * rates)


def test_command(command, tmp_path):
    stayed = {"step": 31, "autonpo/step": 30, "autonpo/reason": "dip", "autonpo/table": []}
    decision = stayed | {"autonpo/step": 40, "autonpo/reason": "flat", "autonpo/table": MEASURED}
    lines = [json.dumps(line) for line in ({"step": 1}, stayed, decision)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4']))  # half written
    picture = tmp_path / "picture.png"
    shown = command("signal_theory.py", "--run", tmp_path, "--out", picture).stdout
    assert " 16       2.4668      2.4668         3711       2.281  local" in shown
    assert "256   3.2961e+41  3.2961e+41    1.295e+57   5.017e+91  bound" in shown
    assert "alpha 0.0400  beta 0.03260      20.02         20.0  0.287" in shown
    assert "alpha 0.0100  beta 0.00990      69.82         69.8  0.252" in shown
    assert "alpha 0.0400  beta 0.00259      70.00         70.0" in shown
    assert "maxima at D = 19 and 135" in shown and "no interior maximum" in shown
    assert "step 40: flat" in shown and "  10  0.250  1.250  0.200" in shown and "dip" not in shown
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 50_000


def test_figure_shows_the_theory_and_the_measured_points(tmp_path, monkeypatch):
    figures, (theta, drift) = [], st.small_policy()
    save = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(save, lambda figure, *_, **__: figures.append(figure))
    decisions = [{"autonpo/step": 40, "autonpo/table": MEASURED}]
    st.draw_figure(theta, drift, decisions, tmp_path / "picture.png")
    v, s, cost = ({line.get_label(): line for line in axes.lines} for axes in figures[0].axes)
    assert v["V, run's step 40"].get_xydata().tolist() == [[10, 1.25], [20, 1.5]]
    assert s["Q, run's step 40"].get_ydata().tolist() == [0.25, 0]
    assert s["S, run's step 40"].get_ydata().tolist() == [0.2, 0]
    assert cost["run's step 40"].get_ydata() == pytest.approx([5, math.nan], nan_ok=True)
    assert "early: $D^*$ = 20" in cost and "mid-training: $D^*$ = 70" in cost
    s_peak, d_star = figures[0].axes[1].lines[2], figures[0].axes[2].lines[1]
    assert s_peak.get_xydata() == pytest.approx(numpy.array([[20.02, 0.287]]), rel=1e-3)
    assert d_star.get_xydata() == pytest.approx(numpy.array([[20.02, 1], [20.02, 3.484]]), rel=1e-3)
    exact, (k, beta) = st.closed_form(theta, drift, 16, 5), st.growth_rates(theta, drift, 5)
    assert v["V, enumerated"].get_xydata()[2] == pytest.approx([16, exact])
    assert v[r"bound $e^{\beta D}$"].get_ydata()[16] == pytest.approx(math.exp(beta * 16))
    assert v["local $e^{kD^2}$"].get_ydata()[16] == pytest.approx(math.exp(k * 256))


@pytest.mark.parametrize(
    ("out", "log", "message"),
    [
        ("missing/a.png", None, "--out .*a.png: create the folder .*missing first"),
        ("a.png", None, "--run .*: no metrics.jsonl"),
        ("a.png", '{"step": 1, "autonpo/table": []}\n', "--run .*: no Q and V"),
    ],
)
def test_bad_input_ends_before_any_work(tmp_path, capsys, out, log, message):
    if log:
        (tmp_path / "metrics.jsonl").write_text(log)
    with pytest.raises(SystemExit, match=f"error: {message}"):
        st.main(run=tmp_path, out=tmp_path / out)
    assert capsys.readouterr().out == "" and not (tmp_path / out).exists()
