"""Why the *near* future: quality Q, variance V, and the distance D* at which S = Q / V peaks.

A policy p = pi(t) learns from the answers of a guide q = pi(t+D), a later checkpoint of its
own run. A guide further ahead solves more of what the policy fails (Q), but the policy finds
its answers less likely, which makes the importance weights noisy (V).

Of the paper's Appendix B our sources give only V <~ exp(beta D). Equations (1)-(9) are our
reconstruction. Their letters:

    t, D         training step; how many steps the guide is ahead
    o, T, j      an answer (trajectory); its number of tokens; a token's position
    A, w, u      advantage A(o); weight w = p(o) / q(o); score u = grad log p(o)
    M            size of the vocabulary (V is always the variance)
    z, d         a token's logits under p; their drift per step: q has z + D d
    alpha, beta  rates of Q and of V, per step; k is V's near D = 0, per step squared

Variance. The policy gradient from one answer o, sampled from q, is

    (1)  g(o) = w A u,    with mean E_q[g] = E_p[A u] for every D.

The weight removes the bias at the price of variance. If |A| ||u|| <= C for every answer,

    (2)  tr Cov_q(g) = E_q[w^2 A^2 ||u||^2] - ||E_q[g]||^2  <=  C^2 E_q[w^2],
    (3)  E_q[w^2] = sum_o p(o)^2 / q(o) = 1 + chi^2(p || q)  >=  1.

Assume (a) |log p(o) - log q(o)| <= L ||theta(t+D) - theta(t)|| for every answer, and
(b) ||theta(t+D) - theta(t)|| <= r D. Then w <= exp(L r D), and so is w's mean under p:

    (4)  V(D) := E_q[w^2] = E_p[w]  <=  exp(beta D),    beta = L r.

How tight is this? For one token of a softmax policy, with Z(z) = sum_x exp(z_x),

    (5)  log V = log Z(z + D d) - 2 log Z(z) + log Z(z - D d)
    (6)        = k D^2 + O(D^4),    k = Var_p(d), the Fisher information along d.

So V starts as exp(k D^2), the *local* law. Far away, log V rises by max d - min d per step,
which is this token's beta. The laws cross at D = beta / k. For T tokens, each drawn given
the one before, V is a product of matrices (m_1, for the first token, is a row):

    (7)  V = m_1 m_2 ... m_T (1, ..., 1)',    m_j(x, y) = p(y | x)^2 / q(y | x).

Thus log V grows with T, in the end by the same amount per token; k and beta are sums over
the tokens. NPO itself weights each token by p(o_j | o_<j) / q(o_j | o_<j). That is biased,
unlike (1), but its variance does not multiply up along the answer.

Signal. Q(D) is the share of the prompts failed by p that q solves. Assume (c) Q(0) = 0, and
Q increasing, concave, differentiable: as Q <= 1, Q'/Q falls strictly from infinity to 0.
Assume (d) log V is increasing and convex, as with exp(beta D) and exp(k D^2). Then

    (8)  (log S)' = Q'/Q - (log V)'   is 0 at exactly one D*, the maximum of S.

Its inverse V / Q, the cost, is U-shaped. (Summaries of the paper call S itself U-shaped.)
A constant factor in Q or V does not move D*. If (c) or (d) fails, (8) may fail too: see
`counter_examples`. For Q = 1 - exp(-alpha D) and V = exp(beta D),

    (9)  D* = ln(1 + alpha / beta) / alpha.

The reported D* is about 20 from the base and 70 in mid-training. Slower drift alone can
explain this: D*(0.04, 0.0326) = 20, but D*(0.04, 0.00259) = 70. Slower learning alone
cannot: as alpha falls to 0, D* rises only to 1 / beta, here 31.

V grows through wrong answers, which never take a slot; for right ones see `guided_pull`.

    python signal_theory.py  # three tables, signal_theory.png and signal_theory_law.png
    python signal_theory.py --run runs/autonpo  # with what an AutoNPO run measured
"""

import json
import math
from itertools import product
from pathlib import Path

import numpy

# ---- Q, V, S, D* ---------------------------------------------


def quality(distance, alpha):
    """Q(D) = 1 - exp(-alpha D), the share of failed prompts that the guide solves."""
    return -numpy.expm1(-alpha * distance)


def variance(distance, beta):
    """V(D) = exp(beta D): equation (4) taken as an equality."""
    return numpy.exp(beta * distance)


def local_variance(distance, k):
    """V(D) = exp(k D^2): equation (6)."""
    return numpy.exp(k * distance**2)


def signal(quality, variance):
    """S = Q / V."""
    return quality / variance


def optimal_distance(alpha: float, beta: float) -> float:
    """D* in steps: equation (9). ValueError where S has no interior maximum."""
    if not (alpha > 0 and beta > 0):
        raise ValueError(f"alpha {alpha}, beta {beta}: S peaks only if both are above 0")
    return math.log1p(alpha / beta) / alpha


def second_moment(p, q) -> float:
    """E_q[(p/q)^2] of p, q (N,), equation (3); infinite if only p has mass somewhere."""
    p, q = numpy.asarray(p, float), numpy.asarray(q, float)
    with numpy.errstate(divide="ignore"):
        return float(numpy.sum(p[p > 0] ** 2 / q[p > 0]))


def local_maxima(values) -> list[int]:
    """Indices of the interior maxima of a curve."""
    rise = numpy.diff(values)
    return [int(i) + 1 for i in numpy.flatnonzero((rise[:-1] > 0) & (rise[1:] <= 0))]


def counter_examples() -> dict[str, tuple]:
    """Curves (D, S) where an assumption fails, and with it equation (8).

    (c) Two skills learnt at different times: Q is not concave, S has two maxima.
    (d) V saturates, as with clipped weights: S rises to the end.
    """
    distance = numpy.linspace(1, 300, 3000)
    late_skill = 1 / (1 + numpy.exp(-(distance - 120) / 5))
    two_skills = 0.5 * quality(distance, 0.2) + 0.5 * late_skill
    bounded = 2 - numpy.exp(-distance / 50)
    return {
        "Q not concave (two skills)": (distance, signal(two_skills, variance(distance, 0.005))),
        "V bounded (clipped weights)": (distance, signal(quality(distance, 0.02), bounded)),
    }


# ---- A policy small enough to enumerate ----------------------
# A token depends only on the one before it. theta and drift are (M + 1, M): row x belongs to
# the token after x, row M to the first token.


def log_partition(z):
    """log Z of the logits in the last axis."""
    return numpy.logaddexp.reduce(z, axis=-1)


def log_softmax(theta):
    """(M + 1, M) log-probs of every token in every context."""
    return theta - log_partition(theta)[:, None]


def contexts(tokens, vocabulary: int):
    """(N, T) row of theta that each token of (N, T) sequences is drawn from."""
    return numpy.insert(tokens[:, :-1], 0, vocabulary, axis=1)


def token_logprobs(theta, tokens):
    """(N, T) log-probs of every token of (N, T) sequences."""
    return log_softmax(theta)[contexts(tokens, theta.shape[1]), tokens]


def log_moments(theta, moved):
    """(M + 1,) equation (5) in every context, with moved = D d."""
    return log_partition(theta + moved) - 2 * log_partition(theta) + log_partition(theta - moved)


def closed_form(theta, drift, distance: float, length: int) -> float:
    """V = E_q[w^2] for q = theta + distance * drift, by equations (5) and (7)."""
    moved = distance * drift
    # p^2/q has the logits 2 z - (z + D d) = z - D d, and sums to the exponential of (5).
    m = numpy.exp(log_moments(theta, moved))[:, None] * numpy.exp(log_softmax(theta - moved))
    total = numpy.ones(theta.shape[1])
    for _ in range(length - 1):
        total = m[:-1] @ total
    return float(m[-1] @ total)


def growth_rates(theta, drift, length: int) -> tuple[float, float]:
    """(k, beta) of `length` tokens: log V = k D^2 near 0, and log V <= beta D everywhere."""
    p = numpy.exp(log_softmax(theta))
    fisher = (p * drift**2).sum(axis=1) - (p * drift).sum(axis=1) ** 2  # (M + 1,) Var_p(d)
    widest = numpy.ptp(drift, axis=1)  # (M + 1,) max d - min d
    reached, k = numpy.eye(len(theta))[-1], 0.0  # (M + 1,) probability of each context
    for _ in range(length):
        k += float(reached @ fisher)
        reached = numpy.append(reached @ p, 0.0)
    return k, float(widest[-1] + (length - 1) * widest[:-1].max())


def gradients(theta, drift, distance: float, tokens, advantage):
    """Two gradients per sequence, each (N, parameters) and divided by T.

    The first has the sequence's weight, equation (1); the second a weight per token, as in
    NPO. `tokens` is (N, T), `advantage` (N,).
    """
    length, before = tokens.shape[1], contexts(tokens, theta.shape[1])
    p = numpy.exp(log_softmax(theta))
    scores = numpy.zeros((*tokens.shape, *theta.shape))  # (N, T, M + 1, M) every token's u
    n, j = numpy.indices(tokens.shape)
    scores[n, j, before] -= p[before]
    scores[n, j, before, tokens] += 1
    scores = scores.reshape(len(tokens), length, -1)
    guide = theta + distance * drift
    log_ratio = token_logprobs(theta, tokens) - token_logprobs(guide, tokens)  # (N, T)
    whole = numpy.exp(log_ratio.sum(axis=1))[:, None] * scores.sum(axis=1) / length
    by_token = (numpy.exp(log_ratio)[:, :, None] * scores).sum(axis=1) / length
    return advantage[:, None] * whole, advantage[:, None] * by_token


def total_variance(gradient, probability) -> float:
    """tr Cov of gradients (N, parameters) that occur with `probability` (N,)."""
    mean = probability @ gradient
    return float(probability @ (gradient**2).sum(axis=1) - mean @ mean)


def enumerated(theta, drift, distance: float, length: int) -> dict[str, float]:
    """E_q[w^2] and the variance of both gradients, summed over all M^T sequences.

    A sequence is right if the sum of its tokens is a multiple of 3. Its advantage is its
    reward (1 or 0) minus the policy's mean reward.
    """
    tokens = numpy.array(list(product(range(theta.shape[1]), repeat=length)))  # (M^T, T)
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


def small_policy(vocabulary: int = 4, seed: int = 0):
    """(theta, drift per step), both random; 30 steps of this drift are far."""
    random = numpy.random.default_rng(seed)
    theta, drift = random.normal(size=(2, vocabulary + 1, vocabulary))
    return theta, 0.05 * drift


# ---- What a slot is worth: the law of decisive tokens --------


def group_pull(p, L: int, n: int = 8):
    """`guided_pull` of a plain GRPO group."""
    return guided_pull(p, p, L, n, m=0)


def guided_pull(p, q, L: int, n=8, m=8, gate=0.6, clip_high=0.28, ratio="token"):
    """The expected pull of a group on the decisive logit, enumerated; gate and slot as in npo.py.

    A right answer needs L decisive tokens, each of probability p under the policy and q under its
    guide (in (0, 1), arrays too); the others are certain. With u the decisive tokens' mean score, g
    the guide's chance of a right answer among m, and rho the weight of u in the guide's slot,

        (10)  u = L (1 - p) in right answers, -p^L / (1 - p^L) times that in wrong ones;
        (11)  g(q) = 1 - (1 - q^L)^m;  rho = p/q (token), (p/q)^L (sequence: the product), 1 (none);
        (12)  pull / GRPO's = 1 - g + g (rho + p^L) / (n p^L) + g (1 - 1/n) sqrt((n-2) / (2 n - 2));
        (13)  d log g / d log q = 1 at the best q: far enough to know, near enough to be believed.

    (12) if n p^L << 1: then at most one own answer of a group is right. (13) with a token ratio and
    L > 1: the middle term counts, S = Q / V with Q = g and V = q/p, and one q is best for every p.
    If L = 1, or with a sequence ratio, g rho <= m p^L: nothing beats asking the policy itself
    (q = p) m times more. Without a ratio (no IS) the pull rises with q.
    """
    rho, success = {"token": p / q, "sequence": (p / q) ** L, "none": 1.0}[ratio], p**L
    rho, total = numpy.where(rho > 1 + clip_high, 0.0, rho), 0.0  # the clip stops the gradient

    # Rewards are 0 and 1. With 0.1 and 1, only the 1e-6 would count differently.
    def pull(right, rho):  # of n slots, where one of the right ones weighs rho
        advantage = (1 - right / n) / (math.sqrt(right * (n - right) / n / (n - 1)) + 1e-6)
        return advantage * (right - 1 + rho + right * success / (1 - success))

    for right in range(n):  # own right answers; n of n have no advantage
        lost = right / n  # chance that the last slot was right, which the guide's answer takes
        mixed = lost * pull(right, rho) + (1 - lost) * pull(right + 1, rho)
        g = 1 - (1 - q**L) ** m if right / n <= gate else 0.0
        chance = math.comb(n, right) * success**right * (1 - success) ** (n - right)
        total += chance * ((1 - g) * pull(right, 1.0) + g * mixed)
    return L * (1 - p) * total / n


# ---- The tables and the pictures -----------------------------

EARLY, MIDDLE = (0.0400, 0.0326), (0.0100, 0.0099)  # (alpha, beta): D* about 20, 70
DISTANCES, LENGTH = (0, 2, 4, 8, 16, 32, 64, 256), 5


def print_growth(theta, drift) -> None:
    """V, both laws, and the gradients' variance relative to D = 0, by distance."""
    k, beta = growth_rates(theta, drift, LENGTH)
    print(f"V = E_q[w^2] over {theta.shape[1]}^{LENGTH} sequences; k {k:.2e}", end="")
    print(f", beta {beta:.3f}: the laws cross at D = {beta / k:.0f}")
    print("  D  closed form  enumerated  exp(beta D)  exp(k D^2)  closer", end="")
    print("  gradient variance: sequence, token")
    start = enumerated(theta, drift, 0, LENGTH)
    for distance in DISTANCES:
        exact, closed = (f(theta, drift, distance, LENGTH) for f in (enumerated, closed_form))
        bound, local = variance(distance, beta), local_variance(distance, k)
        is_local = abs(math.log(local / closed)) <= math.log(bound / closed)
        closer = ("local" if is_local else "bound") if distance else ""
        whole, by_token = (exact[key] / start[key] for key in ("gradient", "gradient_by_token"))
        print(f"{distance:3d}  {closed:11.5g}  {exact['second_moment']:10.5g}", end="")
        print(f"  {bound:11.4g}  {local:10.4g}  {closer:6}  {whole:9.4g}, {by_token:.4g}")


def print_optimum() -> None:
    """D* by equation (9) and on a grid; then the counter-examples."""
    settings = {
        "early": EARLY,
        "slower learning": (MIDDLE[0], EARLY[1]),
        "hardly any learning": (0.0001, EARLY[1]),
        "slower drift": (EARLY[0], MIDDLE[1]),
        "much slower drift": (EARLY[0], 0.00259),
        "mid-training": MIDDLE,
    }
    grid = numpy.arange(0.1, 500, 0.1)
    print("\nD* = ln(1 + alpha/beta)/alpha                closed form  grid of 0.1  S(D*)")
    for name, (alpha, beta) in settings.items():
        best = optimal_distance(alpha, beta)
        on_grid = grid[numpy.argmin(variance(grid, beta) / quality(grid, alpha))]
        peak = signal(quality(best, alpha), variance(best, beta))
        print(f"{name:19}  alpha {alpha:.4f}  beta {beta:.5f}", end="")
        print(f"  {best:9.2f}  {on_grid:11.1f}  {peak:.3f}")
    for name, (distance, curve) in counter_examples().items():
        peaks = " and ".join(f"{distance[i]:.0f}" for i in local_maxima(curve))
        found = f"maxima at D = {peaks}" if peaks else "no interior maximum, S rises to the end"
        print(f"{name}: {found}")


def measured(run: Path) -> list[dict]:
    """An AutoNPO run's log lines that hold Q, V and S; SystemExit without any."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise SystemExit(f"error: --run {run}: no metrics.jsonl; give a run of AutoNPO")
    complete = path.read_text().split("\n")[:-1]  # the last line may be half written
    found = [line for line in map(json.loads, complete) if line.get("autonpo/table")]
    if not found:
        raise SystemExit(f"error: --run {run}: no Q and V; give a run with a confirmed warning")
    return found


def print_law() -> dict[str, dict]:
    """Pulls by L, and where each S peaks; returns ratio -> L -> (q, relative pull), to be drawn."""
    curves = {"token": {}, "sequence": {}, "none": {}}
    print("\nPull / GRPO's at p^L = .001 token ratio      sequence  no IS    g/q    Q/V of (3)")
    print("L     16    D=0   near   at q    far   near    far    far   at q   at q   pull")
    for L in (1, 2, 3, 5):
        p = 0.001 ** (1 / L)
        q, own = numpy.linspace(p, 1, 2001), group_pull(p, L)
        for ratio, found in curves.items():
            found[L] = q, guided_pull(p, q, L, ratio=ratio) / own
        (token, whole, none), good = (found[L][1] for found in curves.values()), 1 - (1 - q**L) ** 8
        paper = good / [second_moment([p, 1 - p], [x, 1 - x]) ** L for x in q]
        near, theirs = token.argmax(), paper.argmax()
        row = [group_pull(p, L, 16) / own, token[0], token[near], q[near], token[-1], whole.max()]
        row += [whole[-1], none[-1], q[(good / q).argmax()], q[theirs], token[theirs]]
        print(L, *(f"{cell:6.2f}" for cell in row))
    return curves


def theory_curves(theta, drift) -> tuple[tuple, tuple]:
    """For the picture: D, both laws, V, every 8th V enumerated; D, and twice Q, V and D*."""
    near, far = numpy.arange(65), numpy.linspace(0.5, 200, 400)
    k, beta = growth_rates(theta, drift, LENGTH)
    closed = [closed_form(theta, drift, d, LENGTH) for d in near]
    summed = [enumerated(theta, drift, d, LENGTH)["second_moment"] for d in near[::8]]
    both = [(quality(far, a), variance(far, b), optimal_distance(a, b)) for a, b in (EARLY, MIDDLE)]
    return (near, variance(near, beta), local_variance(near, k), closed, summed), (far, *both)


def main(run: Path | None = None, out: Path = Path("signal_theory.png")) -> None:
    """Checks the theory of Q, V and S on a policy small enough to enumerate.

    Args:
        run: an AutoNPO run directory; adds the Q, V and S that it measured.
        out: the picture; the law's is named *_law.png.
    """
    if not out.resolve().parent.is_dir():
        raise SystemExit(f"error: --out {out}: create the folder {out.parent} first")
    decisions = measured(run) if run else []
    theta, drift = small_policy()
    print_growth(theta, drift)
    print_optimum()
    curves, law = print_law(), out.with_stem(f"{out.stem}_law")
    for decision in decisions:
        print(f"\nMeasured at step {decision['autonpo/step']}: {decision['autonpo/reason']}")
        print("  D   Q      V      S")
        for row in decision["autonpo/table"]:
            print("{distance:4d}  {quality:.3f}  {variance:.3f}  {signal:.3f}".format(**row))
    from plumbing import figures  # so late because all above stands on its own

    figures.draw_theory(*theory_curves(theta, drift), decisions, out)
    figures.draw_law(curves, law)
    print(f"\npicture: {out}\npicture: {law}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
