"""The statistics of docs/protocol.md over seeds: Student's t, Holm, sign flips, equivalence."""

import math
import statistics

import numpy
from scipy import stats

SAME, BARELY = 0.03, 0.06  # of accuracy: margins of "the same" and "barely changes"


def quantile(inside: float, free: int) -> float:
    """The t with P(|T| < t) = inside, T with `free` degrees of freedom."""
    return float(stats.t.ppf((1 + inside) / 2, free))


def error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


def bounds(values: list[float], inside: float = 0.95) -> tuple[float, float]:
    """Of the mean's interval."""
    half = quantile(inside, len(values) - 1) * error(values)
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def detectable(values: list[float]) -> float:
    """The smallest difference that so many seeds would have detected with 80 % power."""
    free = len(values) - 1
    return (quantile(0.95, free) + quantile(0.60, free)) * error(values)


def p_value(values: list[float]) -> float:
    """Two-sided, of the paired t test."""
    if len(set(values)) == 1:  # the same for every seed: certain, or no difference at all
        return float(values[0] == 0)
    return float(stats.ttest_1samp(values, 0).pvalue)


def sign_flip(values: list[float]) -> float:
    """Two-sided and exact: over all 2^n choices of signs."""
    exact = {"permutation_type": "samples", "n_resamples": numpy.inf}
    return float(stats.permutation_test((values,), numpy.mean, **exact).pvalue)


def holm(p_values: list[float]) -> list[float]:
    """Corrected for their number, in the same order."""
    order, found, least = sorted(range(len(p_values)), key=p_values.__getitem__), {}, 0.0
    for place, index in enumerate(order):
        least = found[index] = max(least, min(1.0, (len(order) - place) * p_values[index]))
    return [found[index] for index in range(len(p_values))]


def geometric(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean and its interval, by t on the logs."""
    logs = [math.log(ratio) for ratio in ratios]
    return tuple(math.exp(value) for value in (statistics.fmean(logs), *bounds(logs)))


def interval(values: list[float], digits: int = 2) -> str:
    low, high = bounds(values)
    return f"{statistics.fmean(values):z.{digits}f} [{low:z.{digits}f}, {high:z.{digits}f}]"


def verdict(differences: list[float]) -> str:
    """Of a claim that the paired differences lie above 0."""
    if len(differences) < 2:
        return "not run yet"
    low, high = bounds(differences)
    return "holds" if low > 0 else "reversed" if high < 0 else "undecided"


def sameness(differences: list[float]) -> str:
    """Two one-sided tests at 5 %: the 90 % interval lies within the margins."""
    if len(differences) < 2:
        return "not run yet"
    widest = max(map(abs, bounds(differences, 0.90)))
    if widest < BARELY:
        return "the same" if widest < SAME else "barely changes"
    return "changes" if verdict(differences) != "undecided" else "undecided"
