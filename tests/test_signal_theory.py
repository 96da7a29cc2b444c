"""Q, V, S and D* against hand arithmetic, grids and enumeration; and where the theory fails."""

import itertools
import json
import math
import random

import numpy
import pytest
import torch

import signal_theory as st
from grpo import clipped_policy_loss, group_advantages
from plumbing.figures import draw_law, draw_theory

# Two tokens. First token: p = (1/2, 1/2), q = (3/4, 1/4). After token 0: p = q = (1/2, 1/2).
# After token 1: p = (1/3, 2/3), q = (1/2, 1/2).
THETA = numpy.log([[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]])
DRIFT = numpy.log([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
MEASURED = [
    {"distance": 10, "prompts": 9, "quality": 0.25, "variance": 1.25, "signal": 0.2, "pull": 0.1},
    {"distance": 20, "prompts": 12, "quality": 0.0, "variance": 1.5, "signal": 0.0, "pull": 0.0},
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


# ---- The law of decisive tokens: p^L, L, and the pulls relative to GRPO's at success 0.001


def by_hand(p: float, q: float, L: int, m: int, n: int, gate: float, weight: float) -> float:
    """Every group of n answers one by one, with group_advantages; a list entry is True if right."""
    success, g, total = p**L, 1 - (1 - q**L) ** m, 0.0
    score = {True: L * (1 - p), False: -success * L * (1 - p) / (1 - success)}
    for own in itertools.product((True, False), repeat=n):
        chance = math.prod(success if right else 1 - success for right in own)
        known = g if sum(own) / n <= gate else 0.0
        for answers, weights, share in (
            (own, [1] * n, 1 - known),
            ((*own[:-1], True), [1] * (n - 1) + [weight], known),
        ):
            rewards = torch.tensor([[0.1 + 0.9 * right for right in answers]], dtype=torch.float64)
            slots = zip(group_advantages(rewards)[0].tolist(), answers, weights)
            total += chance * share * sum(a * w * score[right] for a, right, w in slots) / n
    return total


@pytest.mark.parametrize(
    ("ratio", "q", "gate", "weight"),
    [
        ("token", 0.7, 0.6, 4 / 7),
        ("sequence", 0.7, 0.2, (4 / 7) ** 3),
        ("none", 0.7, 0.6, 1.0),
        ("token", 0.35, 0.6, 0.4 / 0.35),  # up to 1.28 the clip lets it through
        ("token", 0.3, 0.6, 0.0),  # 1.33: stopped
        ("sequence", 0.36, 0.6, 0.0),  # 1.11 per token, but 1.37 in all
        ("none", 0.3, 1.0, 1.0),
    ],
)
def test_pull_is_that_of_every_group_one_by_one(ratio, q, gate, weight):
    found = st.guided_pull(0.4, q, 3, n=5, m=4, gate=gate, ratio=ratio)
    assert found == pytest.approx(by_hand(0.4, q, 3, 4, 5, gate, weight), rel=1e-5)
    assert st.group_pull(0.4, 3, 5) == pytest.approx(by_hand(0.4, q, 3, 0, 5, gate, 0), rel=1e-5)


def test_pull_of_two_slots_by_hand():
    """One right of two: A = +-1/sqrt(2). p = .6, L = 2: success .36, score .8 or -.45."""
    own = 2 * 0.36 * 0.64 * (0.8 + 0.45) / math.sqrt(2) / 2
    assert st.group_pull(0.6, 2, 2) == pytest.approx(own, rel=1e-5)
    g, rho = 1 - (1 - 0.81) ** 3, 0.6 / 0.9
    # The guide's answer beside a wrong first one; beside a right one, or for two right, A is 0.
    beside_wrong = 0.64 * (0.8 * rho + 0.45) / math.sqrt(2) / 2
    guided = (1 - g) * own + g * beside_wrong
    assert st.guided_pull(0.6, 0.9, 2, n=2, m=3) == pytest.approx(guided, rel=1e-5)


def test_pull_is_the_gradient_of_the_loss():
    """L = 1, two own wrong answers and the guide's right one, differentiated by torch."""
    p, q = 0.3, 0.5
    logit = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    right, wrong = torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)
    logprobs = torch.stack([wrong, wrong, right])[:, None]
    old = torch.tensor([[1 - p], [1 - p], [q]], dtype=torch.float64).log()
    advantages = group_advantages(torch.tensor([[0.1, 0.1, 1.0]], dtype=torch.float64))[0]
    loss, _ = clipped_policy_loss(logprobs, old, advantages, torch.ones(3, 1, dtype=torch.bool))
    loss.backward()
    # gate 0: only the groups without a right answer are guided; the guide is always right once
    chance = (1 - p) ** 3
    own, mixed = st.group_pull(p, 1, 3), st.guided_pull(p, q, 1, n=3, m=1000, gate=0.0)
    assert (mixed - own) / chance == pytest.approx(-logit.grad.item(), rel=1e-5)


def test_closed_form_of_rare_successes():
    """Equation (12), for n, m and q that are not the defaults."""
    n, m, L, p = 6, 5, 3, 0.01
    for ratio, rho in (("token", p / 0.4), ("sequence", (p / 0.4) ** 3), ("none", 1.0)):
        g, success = 1 - (1 - 0.4**L) ** m, p**L
        lost = g * (1 - 1 / n) * math.sqrt((n - 2) / (2 * n - 2))
        expected = 1 - g + g * (rho + success) / (n * success) + lost
        found = st.guided_pull(p, 0.4, L, n=n, m=m, ratio=ratio) / st.group_pull(p, L, n)
        assert found == pytest.approx(expected, rel=1e-4)
    plain = 8 * p**L * L * (1 - p) * (7 / 8 / math.sqrt(1 / 8)) / 8  # n p^L groups have one
    assert st.group_pull(p, L) == pytest.approx(plain, rel=1e-4)


LAW = {  # 16 slots, D = 0, near, its q, far, no IS far; then g/q's q, Q/V's q and share of near
    1: (1.51, 1.99, 1.99, 0.001, 0.82, 126, 0.001, 0.24, 0.60),
    2: (1.51, 1.99, 8.20, 0.39, 4.65, 126, 0.40, 0.37, 1.00),
    3: (1.51, 1.99, 18.6, 0.61, 13.2, 126, 0.61, 0.43, 0.81),
    5: (1.51, 1.99, 38.3, 0.79, 32.1, 126, 0.79, 0.52, 0.44),
}


@pytest.mark.parametrize("L", LAW)
def test_the_law_in_numbers_and_where_each_signal_peaks(L):
    p, q = 0.001 ** (1 / L), numpy.linspace(0.001 ** (1 / L), 1, 5001)
    own = st.group_pull(p, L)
    token, none = (st.guided_pull(p, q, L, ratio=ratio) / own for ratio in ("token", "none"))
    g, v = 1 - (1 - q**L) ** 8, numpy.array([st.second_moment([p, 1 - p], [x, 1 - x]) for x in q])
    near, ours, papers = token.argmax(), (g / q).argmax(), (g / v**L).argmax()
    found = [st.group_pull(p, L, 16) / own, token[0], token[near], q[near], token[-1], none[-1]]
    found += [q[ours], q[papers], token[papers] / token[near]]
    assert found == pytest.approx(LAW[L], rel=5e-3, abs=5e-3)
    assert (numpy.diff(none) > -1e-3).all()  # without IS it only rises
    whole = st.guided_pull(p, q, L, ratio="sequence") / own
    assert (whole.argmax(), whole[-1]) == (0, pytest.approx(0.82, abs=5e-3))


def test_the_best_guide_does_not_depend_on_the_policy():
    q = numpy.linspace(0.2, 1, 8001)
    for L, best in ((2, 0.401), (3, 0.614), (5, 0.789)):
        g, slope = 1 - (1 - best**L) ** 8, 8 * L * best**L * (1 - best**L) ** 7
        assert slope / g == pytest.approx(1, abs=0.01)  # equation (13)
        for p in (0.01, 0.03):
            assert q[st.guided_pull(p, q, L).argmax()] == pytest.approx(best, abs=0.01)


def test_picture_of_the_law_marks_near_far_and_asking_again(tmp_path, monkeypatch, capsys):
    shown = []
    save = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(save, lambda figure, *_, **__: shown.append(figure))
    draw_law(st.print_law(), tmp_path / "law.png")
    assert "2   1.51   1.99   8.20   0.39   4.65   1.99   0.82 125.57" in capsys.readouterr().out
    stars = [[x for x in axes.lines if x.get_marker() == "*"] for axes in shown[0].axes]
    marks = [xy.round(2).tolist() for line in stars[0] for xy in line.get_xydata()]
    assert marks == [[0.39, 8.2], [0.61, 18.6], [0.79, 38.33]] and stars[1:] == [[], []]
    first = shown[0].axes[0].lines[1].get_xydata()[0]  # L = 1 at D = 0
    assert first == pytest.approx([0.001, 1.993], abs=1e-3)


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
    for path in (picture, tmp_path / "picture_law.png"):
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 50_000


def test_figure_shows_the_theory_and_the_measured_points(tmp_path, monkeypatch):
    figures, (theta, drift) = [], st.small_policy()
    save = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(save, lambda figure, *_, **__: figures.append(figure))
    decisions = [{"autonpo/step": 40, "autonpo/table": MEASURED}]
    draw_theory(*st.theory_curves(theta, drift), decisions, tmp_path / "picture.png")
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
