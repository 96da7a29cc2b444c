"""Q, V, S and D* against hand arithmetic, exact enumeration, grids, and sampling; the theory's claims, and where they fail."""

import itertools
import json
import math
import random

import numpy
import pytest
import torch

from signal_theory import (
    closed_form,
    counter_examples,
    enumerated,
    golden_section,
    gradients,
    growth_rates,
    local_maxima,
    local_variance,
    monte_carlo,
    optimal_distance,
    quality,
    second_moment,
    signal,
    small_policy,
    token_logprobs,
    variance,
)


def test_pure_functions_by_hand():
    assert quality(0, 0.3) == 0
    assert quality(7, 0.3) == pytest.approx(1 - math.exp(-2.1))
    assert variance(7, 0.3) == pytest.approx(math.exp(2.1))
    assert local_variance(7, 0.02) == pytest.approx(math.exp(0.98))
    assert signal(0.6, 1.5) == pytest.approx(0.4)
    assert optimal_distance(0.04, 0.01) == pytest.approx(math.log(5) / 0.04)
    assert quality(numpy.array([0.0, 7.0]), 0.3)[1] == quality(7, 0.3)  # arrays too


def test_second_moment_by_hand_and_the_right_way_round():
    p, q = [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]
    assert second_moment(p, q) == pytest.approx(0.25 / 0.2 + 0.09 / 0.5 + 0.04 / 0.3)
    assert second_moment(q, p) == pytest.approx(0.04 / 0.5 + 0.25 / 0.3 + 0.09 / 0.2)
    assert second_moment(p, p) == pytest.approx(1)
    assert second_moment([0.5, 0.5, 0.0], [0.5, 0.25, 0.25]) == pytest.approx(1.5)
    assert second_moment([0.5, 0.5], [1.0, 0.0]) == math.inf
    assert second_moment([1.0, 0.0], [1.0, 0.0]) == 1  # where neither has mass nothing is added


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.1), (0.1, 0.0), (-1.0, 0.1), (0.1, -0.2), (math.nan, 0.1)])
def test_no_interior_maximum_is_an_error(alpha, beta):
    with pytest.raises(ValueError, match="alpha .* beta"):
        optimal_distance(alpha, beta)


def test_optimal_distance_is_the_grids_and_golden_sections_on_100_random_pairs():
    draw = random.Random(3)
    for _ in range(100):
        alpha, beta = 10 ** draw.uniform(-3, -0.5), 10 ** draw.uniform(-3.5, -0.5)
        best = optimal_distance(alpha, beta)
        step = best / 997
        grid = numpy.arange(1, 4000) * step
        s = signal(quality(grid, alpha), variance(grid, beta))
        assert abs(grid[numpy.argmax(s)] - best) <= step
        assert len(local_maxima(s)) == 1  # unique, and so is the minimum of the inverse
        assert local_maxima(-1 / s) == local_maxima(s)
        golden = golden_section(lambda d, a=alpha, b=beta: variance(d, b) / quality(d, a), 1e-6, 10 * best)
        assert golden == pytest.approx(best, rel=1e-5)


def test_paper_distances_are_reproduced():
    from signal_theory import EARLY, MIDDLE

    assert optimal_distance(*EARLY) == pytest.approx(20, abs=0.1)
    assert optimal_distance(*MIDDLE) == pytest.approx(70, abs=0.3)


def test_a_local_law_has_one_maximum_too():
    grid = numpy.arange(0.1, 200, 0.1)
    assert len(local_maxima(signal(quality(grid, 0.03), local_variance(grid, 2e-4)))) == 1


def test_counter_examples_fail():
    found = [local_maxima(s) for _, s in counter_examples().values()]
    assert [len(maxima) for maxima in found] == [2, 0]


@pytest.mark.parametrize(("size", "length", "seed"), [(2, 7, 1), (3, 4, 2), (4, 5, 0), (5, 1, 4)])
@pytest.mark.parametrize("distance", [0.0, 3.0, 11.0, 40.0])
def test_closed_form_is_the_enumeration(size, length, seed, distance):
    theta, drift = small_policy(size, seed)
    assert closed_form(theta, drift, distance, length) == pytest.approx(
        enumerated(theta, drift, distance, length)["second_moment"], rel=1e-6
    )


def test_enumerated_gradient_variance_is_that_of_a_plain_loop_with_autograd():
    """Independent of the vectorised code: each sequence's gradient by torch, the sums in a loop."""
    theta, drift = small_policy(3, 5)
    distance, length = 9.0, 3
    p_table, q_table = torch.tensor(theta, requires_grad=True), torch.tensor(theta + distance * drift)

    def logprobs(table, sequence):
        rows, before = [], 3
        for token in sequence:
            rows.append(torch.log_softmax(table[before], dim=0)[token])
            before = token
        return torch.stack(rows)

    sequences = list(itertools.product(range(3), repeat=length))
    probability = {s: logprobs(p_table, s).sum().exp().item() for s in sequences}
    value = sum(probability[s] for s in sequences if sum(s) % 3 == 0)
    found = {"gradient": [], "gradient_by_token": []}
    for s in sequences:
        mine, guides = logprobs(p_table, s), logprobs(q_table, s)
        ratio, advantage = (mine.detach() - guides).exp(), (sum(s) % 3 == 0) - value
        for key, weighted in (("gradient", ratio.prod() * mine), ("gradient_by_token", ratio * mine)):
            gradient = torch.autograd.grad(advantage * weighted.mean(), p_table, retain_graph=True)[0]
            found[key].append((guides.sum().exp().item(), gradient))
    exact = enumerated(theta, drift, distance, length)
    for key, pairs in found.items():
        mean = sum(weight * gradient for weight, gradient in pairs)
        spread = sum(weight * ((gradient - mean) ** 2).sum() for weight, gradient in pairs)
        assert exact[key] == pytest.approx(spread.item(), rel=1e-9)
        if key == "gradient":
            assert exact["gradient_mean"] == pytest.approx(mean.norm().item(), rel=1e-9)


def test_the_correction_leaves_the_gradients_mean_and_pays_in_variance():
    theta, drift = small_policy(4, 0)
    found = [enumerated(theta, drift, distance, 4) for distance in (0, 5, 15, 30)]
    assert [one["gradient_mean"] for one in found] == pytest.approx([found[0]["gradient_mean"]] * 4, rel=1e-9)  # equation (1)
    assert [one["gradient"] for one in found] == sorted(one["gradient"] for one in found)
    # equation (2): C bounds |A| ||s||, here found over all sequences
    tokens = numpy.array(list(itertools.product(range(4), repeat=4)))
    p = numpy.exp(token_logprobs(theta, tokens).sum(axis=1))
    reward = (tokens.sum(axis=1) % 3 == 0).astype(float)
    largest = numpy.linalg.norm(gradients(theta, drift, 0.0, tokens, reward - p @ reward)[0], axis=1).max()
    assert all(one["gradient"] <= largest**2 * one["second_moment"] for one in found)


def test_which_law_holds_where():
    theta, drift = small_policy(4, 0)
    for length in (1, 5):
        k, beta = growth_rates(theta, drift, length)
        for distance in (0.5, 3, 20, 100, 400):
            assert math.log(closed_form(theta, drift, distance, length)) <= beta * distance  # equation (4), everywhere
        assert math.log(closed_form(theta, drift, 0.05, length)) == pytest.approx(k * 0.05**2, rel=1e-3)  # equation (6), near 0
    k, beta = growth_rates(theta, drift, 1)
    slope = (math.log(closed_form(theta, drift, 1500, 1)) - math.log(closed_form(theta, drift, 1400, 1))) / 100
    assert slope == pytest.approx(beta, rel=1e-6)  # and far away the exponential's slope, for one token


def test_growth_is_proportional_to_length():
    theta, drift = small_policy(4, 0)
    theta[:], drift[:] = theta[0], drift[0]  # no context: tokens are independent
    one = math.log(closed_form(theta, drift, 12.0, 1))
    for length in (2, 5, 30):
        assert math.log(closed_form(theta, drift, 12.0, length)) == pytest.approx(length * one)
        assert growth_rates(theta, drift, length) == pytest.approx([length * x for x in growth_rates(theta, drift, 1)])


def test_monte_carlo_agrees_where_it_can_and_its_sample_size_tells_where_not():
    theta, drift = small_policy(4, 0)
    for distance in (2, 8, 16):
        truth, drawn = closed_form(theta, drift, distance, 5), monte_carlo(theta, drift, distance, 5, 20_000, seed=1)
        for mean, half, _ in drawn.values():
            assert abs(mean - truth) < 2 * half  # four standard errors
        assert drawn["tilted"][1] < drawn["naive"][1] / 5
        assert drawn["tilted"][2] > drawn["naive"][2]
    truth, drawn = closed_form(theta, drift, 64, 5), monte_carlo(theta, drift, 64, 5, 20_000, seed=1)
    mean, half, sample = drawn["naive"]
    assert mean + 10 * half < truth and sample < 50  # far away the naive estimate has collapsed, and says so
    assert drawn["tilted"][0] > 0.5 * truth


def test_tilted_sampling_never_falls_below_one():
    theta, drift = small_policy(3, 7)
    assert all(monte_carlo(theta, drift, d, 4, 3, seed)["tilted"][0] >= 1 for d in (0, 1, 30) for seed in range(5))


def test_command_line(command, tmp_path):
    table = [
        {"distance": 10, "quality": 0.25, "variance": 1.25, "signal": 0.2},
        {"distance": 20, "quality": 0.0, "variance": 1.5, "signal": 0.0},
    ]
    decision = {"step": 41, "autonpo/step": 40, "autonpo/reason": "because", "autonpo/table": table}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + json.dumps(decision) + "\n")
    done = command("signal_theory.py", "--run", tmp_path, "--out", tmp_path / "picture.png")
    assert "Measured at step 40: because" in done.stdout and "  10  0.250  1.250  0.200" in done.stdout
    assert (tmp_path / "picture.png").stat().st_size > 50_000
    assert "20.02" in done.stdout and "69.82" in done.stdout


@pytest.mark.parametrize(("lines", "message"), [(None, "has no metrics.jsonl"), ('{"step": 1}\n', "no Q and V in it")])
def test_a_directory_without_measurements(command, tmp_path, lines, message):
    if lines:
        (tmp_path / "metrics.jsonl").write_text(lines)
    done = command("signal_theory.py", "--run", tmp_path, check=False)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
