"""Why the *near* future: quality Q, variance V, the signal S = Q / V, and where it peaks (the paper's Appendix B).

A policy p = pi(t) learns from trajectories o of a later checkpoint q = pi(t+D) of the same run. A(o) is o's advantage.

Variance.  The importance-weighted policy gradient from one trajectory o ~ q is

    (1)  g(o) = w(o) A(o) s(o),    w = p(o) / q(o),    s = grad log p(o),    E_q[g] = E_p[A s]   whatever D is:

the correction removes the bias, and pays in variance. With |A| ||s|| <= C,

    (2)  tr Cov_q(g) = E_q[w^2 A^2 ||s||^2] - ||E_q[g]||^2  <=  C^2 E_q[w^2],
    (3)  E_q[w^2] = sum_o p(o)^2 / q(o) = E_p[w] = 1 + chi^2(p || q)   >= 1, and = 1 only for p = q.

Assume (a) |log p(o) - log q(o)| <= L ||theta - theta'|| for every o, and (b) ||theta(t+D) - theta(t)|| <= c D. Then w <= exp(L c D)
for every o, and so is its mean under p:

    (4)  V(D) := E_q[w^2]  <=  exp(beta D),    beta = L c.         (squaring the bound on w instead gives the looser 2 L c)

How tight is that? For one token of a softmax policy, with logits z under p and z + D d under q (drift d a step), p^2/q is an
exponential of z - D d, so that with the log-partition a(z) = log sum_v exp z_v

    (5)  log E_q[w^2] = a(z + D d) - 2 a(z) + a(z - D d),
    (6)  = k D^2 + O(D^4) near 0,  k = Var_p(d) (the Fisher information along the drift);    slope max d - min d far away.

So one token's *local* law is exp(k D^2), and the exponential (4), with beta = max d - min d, is what it turns into beyond D of
about beta / k. For T tokens, each drawn given the one before it, p^2/q multiplies along the sequence, and the sum over sequences is a
product of matrices m(a, b) = p(b|a)^2 / q(b|a), the first of them the row of the first token's p^2/q:

    (7)  E_q[w^2] = m_1 m_2 ... m_T 1:    log V grows with T, each token adding the same in the end (from the first one on, where
                                          tokens are independent); k and beta are sums over the T tokens, and (4) holds with that beta.

NPO's own objective weighs token by token, rho_s = p(o_s | o_<s) / q(o_s | o_<s): not unbiased as (1) is, but its variance
does not multiply up with T. Both are enumerated below.

Signal.  Q(D) is the share of p's failed prompts that q solves. Assume (c) Q(0) = 0, Q increasing, concave, differentiable; it is at
most 1. Then (log Q)' = Q'/Q falls strictly from infinity to 0. If (d) (log V)' is positive for D > 0 and does not fall, as it
is with (4) taken as an equality and with exp(k D^2),

    (8)  (log S)' = Q'/Q - (log V)'   has exactly one zero D*:  S = Q/V has one maximum, its inverse V/Q is U-shaped with one minimum.

(The summaries of the paper call S U-shaped; it is the inverse, the cost of a unit of signal, that is.) For Q = 1 - exp(-alpha D) and
V = exp(beta D), (8) reads alpha / (exp(alpha D) - 1) = beta:

    (9)  D* = ln(1 + alpha / beta) / alpha.

A constant factor in front of Q or V does not move D*. Where (c) or (d) fails, so may (8): `counter_examples`.

    python signal_theory.py                       # a table, and signal_theory.png
    python signal_theory.py --run runs/autonpo    # with the points that an AutoNPO run has measured
"""

import json
import math
from itertools import product
from pathlib import Path

import numpy

# ---------------------------------------------------------------------------------------------------------------------
# Q, V, S, D*
# ---------------------------------------------------------------------------------------------------------------------


def quality(distance, alpha):
    """Q(D) = 1 - exp(-alpha D): share of failed prompts that a guide D steps ahead solves. `alpha` is per step."""
    return -numpy.expm1(-alpha * distance)


def variance(distance, beta):
    """V(D) = exp(beta D), equation (4) taken as an equality. `beta` is per step."""
    return numpy.exp(beta * distance)


def local_variance(distance, k):
    """V(D) = exp(k D^2), equation (6). `k` is per step squared."""
    return numpy.exp(k * distance**2)


def signal(quality, variance):
    """S = Q / V."""
    return quality / variance


def optimal_distance(alpha: float, beta: float) -> float:
    """D*, where S is largest: equation (9). ValueError where there is no interior maximum."""
    if not (alpha > 0 and beta > 0):
        raise ValueError(f"alpha {alpha}, beta {beta}: S = Q/V has an interior maximum only where both are above 0")
    return math.log1p(alpha / beta) / alpha


def second_moment(p, q) -> float:
    """E_q[(p/q)^2] = sum_x p(x)^2 / q(x) of two distributions over the same x; infinite where p has mass and q none."""
    p, q = numpy.asarray(p, float), numpy.asarray(q, float)
    with numpy.errstate(divide="ignore"):
        return float(numpy.sum(p[p > 0] ** 2 / q[p > 0]))


def golden_section(cost, low: float, high: float) -> float:
    """Minimises a function with one minimum between `low` and `high`; it needs no derivative and no formula."""
    shrink = (math.sqrt(5) - 1) / 2
    left, right = high - shrink * (high - low), low + shrink * (high - low)
    while high - low > 1e-9 * high:
        if cost(left) < cost(right):
            high, right = right, left
            left = high - shrink * (high - low)
        else:
            low, left = left, right
            right = low + shrink * (high - low)
    return (low + high) / 2


def local_maxima(values) -> list[int]:
    """Places of the interior maxima of a curve."""
    rise = numpy.diff(values)
    return [int(i) + 1 for i in numpy.flatnonzero((rise[:-1] > 0) & (rise[1:] <= 0))]


def counter_examples() -> dict[str, tuple[numpy.ndarray, numpy.ndarray]]:
    """(D, S) where an assumption fails. Q not concave: two skills, learnt at different times, give two maxima. V not growing for
    ever: where it saturates (a clip bounds every weight, say), so does S, and the farthest guide is the best."""
    distance = numpy.linspace(1, 300, 3000)
    two_skills = 0.5 * quality(distance, 0.2) + 0.5 / (1 + numpy.exp(-(distance - 120) / 5))
    bounded = 2 - numpy.exp(-distance / 50)
    return {
        "Q not concave (two skills)": (distance, signal(two_skills, variance(distance, 0.005))),
        "V bounded (clipped weights)": (distance, signal(quality(distance, 0.02), bounded)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# A policy small enough to enumerate: the next token depends on the last one, theta (V + 1, V), row V for the first token
# ---------------------------------------------------------------------------------------------------------------------


def log_partition(z):
    return numpy.logaddexp.reduce(z, axis=-1)


def contexts(tokens, size: int):
    """(N, T): the row of theta that each token of the sequences (N, T) is drawn from."""
    return numpy.concatenate([numpy.full((len(tokens), 1), size), tokens[:, :-1]], axis=1)


def token_logprobs(theta, tokens):
    """(N, T) log-probs of the sequences `tokens` (N, T)."""
    return (theta - log_partition(theta)[:, None])[contexts(tokens, theta.shape[1]), tokens]


def log_moments(theta, moved):
    """(V + 1,): equation (5) for the next token, by the token before it."""
    return log_partition(theta + moved) - 2 * log_partition(theta) + log_partition(theta - moved)


def draw(theta, length: int, count: int, random):
    """(count, length) sequences from the policy."""
    cumulative = numpy.exp(theta - log_partition(theta)[:, None]).cumsum(axis=1)
    tokens, before = [], numpy.full(count, theta.shape[1])
    for _ in range(length):
        before = (random.random((count, 1)) > cumulative[before, :-1]).sum(axis=1)
        tokens.append(before)
    return numpy.stack(tokens, axis=1)


def closed_form(theta, drift, distance: float, length: int) -> float:
    """E_q[w^2] by equations (5) and (7), q = theta + distance * drift."""
    moved = distance * drift
    tilted = numpy.exp(theta - moved - log_partition(theta - moved)[:, None])  # (V + 1, V): p^2/q, normalised
    m = numpy.exp(log_moments(theta, moved))[:, None] * tilted  # p^2/q
    total = numpy.ones(theta.shape[1])
    for _ in range(length - 1):
        total = m[:-1] @ total
    return float(m[-1] @ total)


def growth_rates(theta, drift, length: int) -> tuple[float, float]:
    """(k, beta): log V = k D^2 near 0, and log V <= beta D everywhere; equations (6) and (4) for `length` tokens."""
    p = numpy.exp(theta - log_partition(theta)[:, None])
    of_context = (p * drift**2).sum(axis=1) - (p * drift).sum(axis=1) ** 2  # (V + 1,) Var_p(d) of the next token
    widest = numpy.ptp(drift, axis=1)  # (V + 1,)
    now, k = numpy.eye(len(theta))[-1], 0.0  # (V + 1,) share of sequences in each context
    for _ in range(length):
        k += float(now @ of_context)
        now = numpy.append(now @ p, 0.0)
    return k, float(widest[-1] + (length - 1) * widest[:-1].max())


def gradients(theta, drift, distance: float, tokens, advantage) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Of each sequence its gradient (N, parameters) with the sequence's weight, equation (1), and with a weight a token, as NPO.

    Both with the mean over the sequence's tokens, so s is divided by T."""
    length, size = tokens.shape[1], theta.shape[1]
    p = numpy.exp(theta - log_partition(theta)[:, None])
    before = contexts(tokens, size)
    scores = numpy.zeros((*tokens.shape, *theta.shape))  # (N, T, V + 1, V): gradient of each token's log-prob
    n, t = numpy.indices(tokens.shape)
    scores[n, t, before] -= p[before]
    scores[n, t, before, tokens] += 1
    scores = scores.reshape(len(tokens), length, -1)
    log_ratio = token_logprobs(theta, tokens) - token_logprobs(theta + distance * drift, tokens)  # (N, T)
    whole = numpy.exp(log_ratio.sum(axis=1))[:, None] * scores.sum(axis=1) / length
    by_token = (numpy.exp(log_ratio)[:, :, None] * scores).sum(axis=1) / length
    return advantage[:, None] * whole, advantage[:, None] * by_token


def total_variance(gradient, weight) -> float:
    """tr Cov of gradients (N, parameters) whose probabilities are `weight` (N,)."""
    mean = weight @ gradient
    return float(weight @ (gradient**2).sum(axis=1) - mean @ mean)


def enumerated(theta, drift, distance: float, length: int) -> dict[str, float]:
    """Second moment of the weight and variance of both gradients, over all sequences. A sequence is right where its tokens' sum
    is a multiple of 3; its advantage is its reward minus the mean."""
    tokens = numpy.array(list(product(range(theta.shape[1]), repeat=length)))  # all of them
    p = numpy.exp(token_logprobs(theta, tokens).sum(axis=1))
    q = numpy.exp(token_logprobs(theta + distance * drift, tokens).sum(axis=1))
    reward = (tokens.sum(axis=1) % 3 == 0).astype(float)
    whole, by_token = gradients(theta, drift, distance, tokens, reward - p @ reward)
    return {
        "second_moment": second_moment(p, q),
        "gradient": total_variance(whole, q),
        "gradient_mean": float(numpy.linalg.norm(q @ whole)),
        "gradient_by_token": total_variance(by_token, q),
    }


def monte_carlo(theta, drift, distance: float, length: int, count: int, seed: int = 0) -> dict[str, tuple[float, ...]]:
    """(estimate, half of its 95 % band, effective sample size) of E_q[w^2] from `count` sequences, two ways.

    naive: the mean of w^2 over o ~ q. Far away the sequences that carry the mean are never drawn: it stays near 1 or falls below,
    with a band that does not reach the truth. The effective sample size tells.
    tilted: o ~ r, r(o_t | o_<t) proportional to p^2/q, and the mean of the product of r's normalisers,
    prod_t sum_v p(v)^2/q(v). The sum over o of r times that product is (7): unbiased, and never below 1.
    """
    random, moved = numpy.random.default_rng(seed), distance * drift
    tokens = draw(theta + moved, length, count, random)
    w = numpy.exp((token_logprobs(theta, tokens) - token_logprobs(theta + moved, tokens)).sum(axis=1))
    path = draw(theta - moved, length, count, random)  # theta - moved: the logits of p^2/q
    products = numpy.exp(log_moments(theta, moved)[contexts(path, theta.shape[1])].sum(axis=1))
    found = {}
    for name, x in (("naive", w**2), ("tilted", products)):
        found[name] = x.mean(), 1.96 * x.std(ddof=1) / math.sqrt(count), x.sum() ** 2 / (x**2).sum()
    return found


def small_policy(vocabulary: int = 4, seed: int = 0):
    """(theta, drift per step): a random policy and direction, the drift scaled so that 30 steps are far."""
    random = numpy.random.default_rng(seed)
    return random.normal(size=(vocabulary + 1, vocabulary)), 0.05 * random.normal(size=(vocabulary + 1, vocabulary))


# ---------------------------------------------------------------------------------------------------------------------
# The table and the picture
# ---------------------------------------------------------------------------------------------------------------------

EARLY, MIDDLE = (0.0400, 0.0326), (0.0100, 0.0099)  # (alpha, beta) a step that give the paper's D*, about 20 and about 70
DISTANCES, LENGTH, LENGTHS, SAMPLES = (0, 2, 4, 8, 16, 32, 64, 256), 5, (1, 2, 3, 4, 5, 6), 20_000


def print_growth(theta, drift) -> None:
    k, beta = growth_rates(theta, drift, LENGTH)
    print(
        f"V = E[w^2] over {theta.shape[1]}^{LENGTH} sequences; k {k:.2e}, beta {beta:.3f}: the laws cross at D = {beta / k:.0f}"
    )
    print("  D  closed form  enumerated  tilted Monte Carlo, ESS        naive Monte Carlo, ESS         exp(beta D)  exp(k D^2)  closer  "
          "gradient variance: sequence, token")  # fmt: skip
    at_zero = enumerated(theta, drift, 0, LENGTH)
    for distance in DISTANCES:
        exact, closed = enumerated(theta, drift, distance, LENGTH), closed_form(theta, drift, distance, LENGTH)
        drawn = monte_carlo(theta, drift, distance, LENGTH, SAMPLES)
        bound, local = variance(distance, beta), local_variance(distance, k)
        closer = "" if distance == 0 else "bound" if math.log(bound / closed) < abs(math.log(local / closed)) else "local"
        columns = "  ".join(f"{mean:9.4g} +- {half:<7.2g} {ess:6.0f}" for mean, half, ess in (drawn["tilted"], drawn["naive"]))
        print(f"{distance:3d}  {closed:11.5g}  {exact['second_moment']:10.5g}  {columns}  {bound:11.4g}  {local:10.4g}  {closer:6}  "
              f"{exact['gradient'] / at_zero['gradient']:9.4g}, {exact['gradient_by_token'] / at_zero['gradient_by_token']:.4g}")  # fmt: skip


def print_lengths(theta, drift, distance: int = 16) -> None:
    print(f"\nGrowth with T at D = {distance}\n  T  log V  log V / T  k         beta   log gradient variance: sequence, token")
    for length in LENGTHS:
        log_v, (k, beta) = math.log(closed_form(theta, drift, distance, length)), growth_rates(theta, drift, length)
        now, zero = enumerated(theta, drift, distance, length), enumerated(theta, drift, 0, length)
        whole, by_token = (math.log(now[key] / zero[key]) for key in ("gradient", "gradient_by_token"))
        print(f"{length:3d}  {log_v:.3f}  {log_v / length:9.3f}  {k:.2e}  {beta:.3f}  {whole:.3f}, {by_token:.3f}")


def print_optimum() -> None:
    print("\nD* = ln(1 + alpha/beta)/alpha           closed form  golden section  grid of 0.1  S(D*)")
    moves = {
        "early": EARLY,
        "slower learning": (MIDDLE[0], EARLY[1]),
        "slower drift": (EARLY[0], MIDDLE[1]),
        "mid-training": MIDDLE,
    }
    grid = numpy.arange(0.1, 500, 0.1)
    for name, (alpha, beta) in moves.items():

        def cost(distance, alpha=alpha, beta=beta):  # the U
            return variance(distance, beta) / quality(distance, alpha)

        best, golden, on_grid = optimal_distance(alpha, beta), golden_section(cost, 1e-3, 500), grid[numpy.argmin(cost(grid))]
        print(
            f"{name:15}  alpha {alpha:.4f}  beta {beta:.4f}  {best:9.2f}  {golden:14.2f}  {on_grid:11.1f}  {1 / cost(best):.3f}"
        )
    for name, (distance, s) in counter_examples().items():
        found = [f"{distance[i]:.0f}" for i in local_maxima(s)]
        print(f"{name}: {'maxima at D = ' + ' and '.join(found) if found else 'no interior maximum, S rises to the end'}")


def measured(run: Path) -> list[dict]:
    """The decisions of an AutoNPO run that measured anything, each with its table of distance, quality, variance, signal."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise SystemExit(f"error: --run {run}: has no metrics.jsonl; give a run directory of autonpo.py")
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]  # a run that goes on may have half a last line
    found = [line for line in lines if line.get("autonpo/table")]
    if not found:
        raise SystemExit(f"error: --run {run}: no Q and V in it: not an AutoNPO run, or one without a confirmed warning")
    return found


def draw_figure(theta, drift, decisions: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((v, length, q), (s, cost, counter)) = pyplot.subplots(2, 3, figsize=(14, 8), layout="constrained")
    k, beta = growth_rates(theta, drift, LENGTH)
    distance = numpy.linspace(0, 64, 65)
    exact = [enumerated(theta, drift, d, LENGTH) for d in distance]
    drawn = [monte_carlo(theta, drift, d, LENGTH, SAMPLES) for d in distance]
    v.plot(distance, [e["second_moment"] for e in exact], "k", lw=2, label="second moment, enumerated")
    v.plot(distance, variance(distance, beta), "C3--", label=r"bound $e^{\beta D}$")
    v.plot(distance, local_variance(distance, k), "C0:", lw=2, label="local law $e^{kD^2}$")
    for name, color in (("tilted", "C2"), ("naive", "C1")):
        low, high = ([max(d[name][0] + side * d[name][1], 1e-3) for d in drawn] for side in (-1, 1))
        v.fill_between(distance, low, high, color=color, alpha=0.4, label=f"Monte Carlo, {name}: 95 % band")
    for key, style, name in (("gradient", "C4-.", "whole sequence"), ("gradient_by_token", "C5-.", "by token")):
        v.plot(distance, [e[key] / exact[0][key] for e in exact], style, label=f"gradient variance, {name}")
    v.set(yscale="log", ylim=(0.5, exact[-1]["second_moment"] * 10), title=f"V: {theta.shape[1]} tokens, T = {LENGTH}")
    for d in (4, 16, 64):
        length.plot(LENGTHS, [math.log(closed_form(theta, drift, d, t)) for t in LENGTHS], "o-", label=f"D = {d}")
    length.set(title="log V grows with length", xlabel="T (tokens)", ylabel="log V")

    distance = numpy.linspace(0.5, 200, 400)
    for (name, (alpha, beta)), color in zip((("early", EARLY), ("mid-training", MIDDLE)), ("C0", "C1")):
        good, noisy, best = quality(distance, alpha), variance(distance, beta), optimal_distance(alpha, beta)
        label = rf"{name}: $\alpha$ {alpha:g}, $\beta$ {beta:g}"
        q.plot(distance, good, color, label=label)
        s.plot(distance, signal(good, noisy), color, label=label)
        cost.plot(distance, noisy / good, color, label=f"{name}: $D^*$ = {best:.0f}")
        top = signal(quality(best, alpha), variance(best, beta))
        s.plot(best, top, f"{color}o")
        cost.plot(best, 1 / top, f"{color}o")
    for decision in decisions:
        at, good, noisy = zip(*((row["distance"], row["quality"], row["variance"]) for row in decision["autonpo/table"]))
        inverse = [b / a if a else math.nan for a, b in zip(good, noisy)]
        for axes, values in ((q, good), (v, noisy), (s, numpy.divide(good, noisy)), (cost, inverse)):
            axes.plot(at, values, "x-", color="grey", lw=0.8, label=f"measured at step {decision['autonpo/step']}")
    q.set(title="Q: failed prompts that the guide solves", ylim=(0, 1))
    s.set(title="S = Q / V: one maximum")
    cost.set(title="1/S = V / Q: U-shaped, one minimum", yscale="log", ylim=(0.9, 200))
    for name, (at, values) in counter_examples().items():
        counter.plot(at, values, label=name)
    counter.set(title="S where an assumption fails")
    for axes in (v, length, q, s, cost, counter):
        axes.set_xlabel(axes.get_xlabel() or "D (steps)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main(run: Path | None = None, out: Path = Path("signal_theory.png")) -> None:
    """Why the near future: checks the theory of Q, V and S on a policy small enough to enumerate.

    Args:
        run: an AutoNPO run directory, whose measured Q, V and S are drawn too.
        out: the picture.
    """
    if not out.resolve().parent.is_dir():
        raise SystemExit(f"error: --out {out}: there is no such folder")
    decisions = measured(run) if run else []
    theta, drift = small_policy()
    print_growth(theta, drift)
    print_lengths(theta, drift)
    print_optimum()
    for decision in decisions:
        print(f"\nMeasured at step {decision['autonpo/step']}: {decision['autonpo/reason']}\n  D   Q      V      S")
        for row in decision["autonpo/table"]:
            print(f"{row['distance']:4d}  {row['quality']:.3f}  {row['variance']:.3f}  {row['signal']:.3f}")
    draw_figure(theta, drift, decisions, out)
    print(f"\npicture: {out}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
