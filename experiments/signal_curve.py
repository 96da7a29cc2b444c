"""Q, V and S measured on checkpoints of real runs, and whether training gains peak where S does.

    python experiments/signal_curve.py           # about 50 minutes on two cores; resumes where it was stopped
    python experiments/signal_curve.py figure    # tables, and assets/signal_curve.png, from experiments/signal_curve.jsonl alone

For each of five seeds, a plain GRPO run with a checkpoint every 10 steps; t is its base, its step 60 or 100; a guide is its checkpoint t + D.
Prompts are the 256 that the steps after t ask. Of each, the policy samples G = 8 answers and the guide 8. The policy *fails* a prompt
where none of its 8 is right.

    Q      share of the failed prompts of which the guide has a right answer. D = 0 is the policy asked again: a control, not a guide
    V (a)  second moments of the sequence's weight w = p/q. `whole`: E_q[w^2], the theory's V, by tilted sampling (signal_theory.monte_carlo;
           unbiased, never below 1). `right`: the mean of w^2 over the guide's right answers to failed prompts, which are those that a slot
           can take; its lower bound is not 1 but (p(right)/q(right))^2. `along`: over the same answers the mean of prod_t sum_v p(v)^2/q(v),
           each token's moment over the whole vocabulary given the answer so far: what the weights would be if p chose at every
           token, no estimate of either of the two. Each has an effective sample size; below 10 it counts as not resolved
    V (b)  tr Cov of NPO's gradient at t from one group: advantages, token ratios and clip as trained; a batch of P independent groups has
           1/P of it. Over groups whose 8 answers failed and whose last slot is the guide's. As it is, and relative to the squared norm of
           its mean: noise to signal, which is what an optimizer that normalises its gradient sees
    V (c)  exp of the mean per-token KL(guide || policy), over the guide's answers to all prompts and the whole vocabulary (AutoNPO's V^ is the
           sampled-token estimate of it on its mistakes)
    S      Q / V for each

Intervals: bootstrap over runs and, within each, over prompts. Training: NPO from t for 30 steps, guided throughout by the guide at
each D (so that a guide at D < 30 is behind the policy towards the end; npo.py would let go of it there), against GRPO at the same step.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from tqdm import tqdm

HERE = Path(__file__).parent
ROOT, RUNS, RESULTS = HERE.parent, HERE / "runs", HERE / "signal_curve.jsonl"
sys.path.insert(0, str(ROOT))
import grpo
import verifier
from command import load_config_prompts, model_path
from npo import NPOConfig, replace_slot
from policy import Policy
from run import checkpoint_path, derived_seed, evaluations, read_jsonl, rows_of_step
from signal_theory import optimal_distance, quality

SEEDS, STARTS, DISTANCES = range(5), (0, 60, 100), (10, 20, 30, 40, 60, 80, 100, 140, 200, 300)
STEPS, WINDOW, PROMPTS, CHUNK, RESAMPLED = 400, 30, 256, 32, 200
PATHS = 4  # tilted samples a prompt


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def sample(policy: Policy, prompts: list, config: NPOConfig, *key) -> list:
    groups = []
    for first in range(0, len(prompts), CHUNK):
        seed, some = derived_seed(config.seed, *key, first), prompts[first : first + CHUNK]
        groups += policy.sample(some, config.group_size, config.max_new_tokens, config.temperature, seed)
    verifier.score(groups)
    return groups


@torch.no_grad()
def distributions(policy: Policy, rows: list[tuple]) -> list[torch.Tensor]:
    """Of each (inputs, token ids) the log-probs (T, V) of every token that could have stood there."""
    found = []
    for first in range(0, len(rows), CHUNK * 4):
        some = rows[first : first + CHUNK * 4]
        ids, attention, positions, cache = policy._read([inputs for inputs, _ in some])
        targets = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens) for _, tokens in some], batch_first=True)
        steps = torch.arange(targets.shape[1])
        mask = steps < torch.tensor([len(tokens) for _, tokens in some])[:, None]
        hidden = policy.model.base_model(
            input_ids=torch.cat([ids[:, -1:], targets[:, :-1]], dim=1),
            attention_mask=torch.cat([attention, mask[:, :-1].to(attention.dtype)], dim=1),
            position_ids=positions[:, :, -1:] + steps,
            past_key_values=cache,
        ).last_hidden_state
        values = policy.adjust(policy.model.get_output_embeddings()(hidden), 1.0)
        found += [row[: len(tokens)] for row, (_, tokens) in zip(values, some)]
    return found


def log_tilt(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """log p^2/q of log-probs (..., V); tokens that neither can draw stay impossible."""
    return torch.where(p == float("-inf"), p, 2 * p - q)


@torch.no_grad()
def tilted(policy: Policy, guide: Policy, groups: list, config: NPOConfig, seed: int) -> numpy.ndarray:
    """(prompts, PATHS): log of the product of normalisers along answers drawn from p^2/q, token by token."""
    torch.manual_seed(seed)
    found = []
    for first in range(0, len(groups), CHUNK):
        rows = [group.inputs for group in groups[first : first + CHUNK] for _ in range(PATHS)]
        read = [[one, *one._read(rows)] for one in (policy, guide)]
        last, total = read[0][1][:, -1:], torch.zeros(len(rows), dtype=torch.float64)
        running = torch.ones(len(rows), dtype=torch.bool)
        for step in range(config.max_new_tokens):
            logprobs = []
            for one, _, attention, positions, cache in read:
                hidden = one.model.base_model(
                    input_ids=last, attention_mask=torch.cat([attention, attention.new_ones(len(rows), step)], dim=1),
                    position_ids=positions[:, :, -1:] + step, past_key_values=cache,
                ).last_hidden_state[:, -1]  # fmt: skip
                logprobs.append(one.adjust(one.model.get_output_embeddings()(hidden), 1.0))
            tilt = log_tilt(*logprobs)
            log_moment = torch.logsumexp(tilt, dim=-1)  # (B,)
            total += torch.where(running, log_moment, 0.0)
            last = torch.multinomial((tilt - log_moment[:, None]).exp(), 1)
            running &= ~torch.isin(last[:, 0], torch.tensor(policy.eos_token_ids))
            if not running.any():
                break
        found.append(total.view(-1, PATHS).numpy())
    return numpy.concatenate(found)


def group_gradient(policy: Policy, group, config: NPOConfig) -> torch.Tensor:
    """NPO's gradient from one group, flat."""
    rewards = torch.tensor([[c.reward for c in group.completions]])
    logprobs, mask = policy.logprobs([(group.inputs, c.token_ids) for c in group.completions], config.temperature)
    behavior = torch.zeros_like(logprobs)
    behavior[mask] = torch.tensor([lp for c in group.completions for lp in c.behavior_logprobs])
    loss, _ = grpo.clipped_policy_loss(logprobs, behavior, grpo.group_advantages(rewards)[0], mask)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.parameters())])


def gradient_variance(gram: numpy.ndarray, count: numpy.ndarray, resampled: bool = False) -> tuple[float | None, float | None]:
    """Of gradients with this Gram matrix, each counted so often: tr Cov, and the squared norm of their mean, both unbiased.

    In a bootstrap resample the norm is too large by tr Cov / n once more: what is resampled has itself been drawn.
    """
    n = count.sum()
    if n < 3:
        return None, None
    norm = count @ gram @ count / n**2
    spread = (count @ gram.diagonal() / n - norm) * n / (n - 1)
    return float(spread), float(norm - (2 if resampled else 1) * spread / n)


def effective(values) -> float:
    """Effective sample size of a mean of positive numbers: how many of them carry it."""
    values = numpy.asarray(values, float)
    return float((values / values.max()).sum() ** 2 / ((values / values.max()) ** 2).sum()) if len(values) else 0.0


def ratio(count: numpy.ndarray, total: numpy.ndarray, number: numpy.ndarray) -> float | None:
    """A mean over answers from each prompt's total and number of them, prompts counted as resampled; None without any."""
    return float(count @ total / (count @ number)) if count @ number else None


def measure(seed: int, start: int) -> None:
    """One seed and t: a result line for each distance, and D = 0."""
    config = NPOConfig(seed=seed)
    run = RUNS / f"signal-grpo-{seed}"
    train_prompts, _ = load_config_prompts(config)
    steps = range(start + 1, start + PROMPTS // config.prompts_per_step + 1)
    prompts = [train_prompts[row] for step in steps for row in rows_of_step(len(train_prompts), step, config)]
    policy = Policy(checkpoint_path(run, start) if start else model_path(config), "cpu")
    groups = sample(policy, prompts, config, "signal policy", start)
    failed = numpy.array([not any(c.accuracy for c in group.completions) for group in groups])
    failures = [i for i in range(PROMPTS) if failed[i]]
    draws = numpy.random.default_rng(derived_seed(seed, "bootstrap", start))
    counts = [numpy.bincount(draws.integers(PROMPTS, size=PROMPTS), minlength=PROMPTS) for _ in range(RESAMPLED)]
    lines = []
    for distance in tqdm((0, *DISTANCES), desc=f"seed {seed} t {start}"):
        guide = Policy(checkpoint_path(run, start + distance), "cpu") if distance else policy
        answers = sample(guide, prompts, config, "signal guide", start, distance)
        right = [[c for c in group.completions if c.accuracy == 1 and c.finished] for group in answers]
        solved = numpy.array([bool(found) for found in right])

        # along the guide's answers: (a) on right ones to failed prompts, (c) on all
        chosen = [(i, c) for i, group in enumerate(answers) for c in group.completions]
        rows = [(groups[i].inputs, c.token_ids) for i, c in chosen]
        along, squares, number, kl, tokens = (numpy.zeros(PROMPTS) for _ in range(5))  # a prompt's sums
        every_along, every_square = [], []
        for (i, completion), p, q in zip(chosen, distributions(policy, rows), distributions(guide, rows)):
            kl[i] += torch.where(q == float("-inf"), 0.0, q.exp() * (q - p)).sum().item()
            tokens[i] += len(p)
            if failed[i] and completion.accuracy == 1 and completion.finished:
                log_w = (p - q).gather(-1, torch.tensor(completion.token_ids)[:, None]).double().sum()
                every_along.append(torch.logsumexp(log_tilt(p, q), dim=-1).double().sum().exp().item())
                every_square.append((2 * log_w).exp().item())
                along[i], squares[i], number[i] = along[i] + every_along[-1], squares[i] + every_square[-1], number[i] + 1
        whole = numpy.zeros((PROMPTS, PATHS))
        seed_of_paths = derived_seed(seed, "tilted", start, distance)
        whole[failures] = numpy.exp(tilted(policy, guide, [groups[i] for i in failures], config, seed_of_paths))

        # (b) the gradient of groups whose 8 answers failed and whose last slot is the guide's
        mixed = {i: replace_slot(groups[i], dataclasses.replace(right[i][0], source=f"guide@{start + distance}"), config.gate)
                 for i in failures if right[i]}  # fmt: skip
        flat = torch.stack([group_gradient(policy, group, config) for group in mixed.values()]) if mixed else torch.zeros(0, 1)
        gram, places = (flat @ flat.T).double().numpy(), list(mixed)

        values = []
        for number_of, count in enumerate([numpy.ones(PROMPTS), *counts]):
            spread, norm = gradient_variance(gram, count[places], resampled=number_of > 0)
            values.append({
                "quality": ratio(count, failed & solved, failed), "whole": ratio(count, whole.mean(axis=1) * failed, failed),
                "right": ratio(count, squares, number), "along": ratio(count, along, number),
                "kl": float(numpy.exp(ratio(count, kl, tokens))), "gradient": spread,
                "gradient_relative": spread / norm if norm and norm > 0 else None,
            })  # fmt: skip
        point, *resampled = [{k: v if v is None else float(f"{v:.{digits}g}") for k, v in line.items()}
                             for line, digits in zip(values, [5] + [3] * RESAMPLED)]  # fmt: skip
        lines.append({
            "kind": "measured", "seed": seed, "t": start, "distance": distance, "failed": len(failures), "right_answers": len(every_along),
            "guided_groups": len(mixed), **point,
            "ess": {"whole": effective(whole[failures].ravel()), "right": effective(every_square), "along": effective(every_along)},
            "bootstrap": {key: [line[key] for line in resampled] for key in point},
        })  # fmt: skip
    for line in lines:  # all of them or none
        write(line)


def fit(distances, qualities, variances) -> tuple[float, float, float]:
    """(alpha, beta, D*) of measured points: Q = c (1 - exp(-alpha D)) by least squares, log V = beta D through the origin.

    D* is nan where V did not grow.
    """
    distances, qualities = numpy.asarray(distances, float), numpy.asarray(qualities, float)
    beta = float(distances @ numpy.log(variances) / (distances @ distances))
    errors = {}
    for alpha in numpy.geomspace(1e-4, 1, 2000):
        shape = quality(distances, alpha)
        scale = shape @ qualities / (shape @ shape)
        errors[float(alpha)] = float(((qualities - scale * shape) ** 2).sum())
    alpha = min(errors, key=errors.get)
    return alpha, beta, optimal_distance(alpha, beta) if beta > 0 else numpy.nan


# ---------------------------------------------------------------------------------------------------------------------
# Running everything
# ---------------------------------------------------------------------------------------------------------------------


def write(line: dict) -> None:
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")


def command(words: str, log: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two at a time on two cores
    with open(RUNS / f"{log}.log", "w") as file:
        subprocess.run([sys.executable, *words.split()], cwd=ROOT, env=environment, stdout=file, stderr=file, check=True)


def train_from(seed: int, start: int, distance: int) -> None:
    runs = RUNS.relative_to(ROOT)
    name, end = f"signal-{start}-{distance}-{seed}", start + WINDOW
    back = f"--intervention late --plateau-start {start}" if start else ""
    guide = checkpoint_path(runs / f"signal-grpo-{seed}", start + distance)
    words = (f"npo.py --seed {seed} {back} --guide {guide} --steps {end} "
             f"--guided-until {end} --eval-every 1000 --out {runs}/{name}")  # fmt: skip
    command(words, name)
    write({"kind": "trained", "seed": seed, "t": start, "distance": distance, "command": words,
           "eval/accuracy": evaluations(RUNS / name)[-1]["eval/accuracy"]})  # fmt: skip


def main() -> None:
    RUNS.mkdir(exist_ok=True)
    lock, bar = threading.Lock(), tqdm(total=len(SEEDS) * (1 + len(STARTS) * (1 + len(DISTANCES))), desc="runs")

    def work(job, *args) -> None:
        job(*args)
        with lock:
            bar.update()

    def plain(seed: int) -> None:
        name = f"signal-grpo-{seed}"
        command(f"grpo.py --seed {seed} --steps {STEPS} --save-every 10 --eval-every 10 --out experiments/runs/{name}", name)
        lines = [line for line in read_jsonl(RESULTS) if line["kind"] == "grpo"]
        if seed not in [line["seed"] for line in lines]:
            found = [[line["step"], round(line["eval/accuracy"], 5)] for line in evaluations(RUNS / name)]
            write({"kind": "grpo", "seed": seed, "evaluations": found})

    def measured(seed: int, start: int) -> None:
        done = [(line["seed"], line["t"]) for line in read_jsonl(RESULTS) if line["kind"] == "measured"]
        if (seed, start) not in done:
            command(f"experiments/signal_curve.py measure {seed} {start}", f"measure-{seed}-{start}")

    def trained(seed: int, start: int, distance: int) -> None:
        if not any(line["kind"] == "trained" and (line["seed"], line["t"], line["distance"]) == (seed, start, distance)
                   for line in read_jsonl(RESULTS)):  # fmt: skip
            train_from(seed, start, distance)

    stages = [
        [(plain, seed) for seed in SEEDS],
        [(measured, seed, start) for seed in SEEDS for start in STARTS],
        [(trained, seed, start, distance) for seed in SEEDS for start in STARTS for distance in DISTANCES],
    ]
    for stage in stages:
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(work, *job) for job in stage]:
                future.result()


# ---------------------------------------------------------------------------------------------------------------------
# Tables and the picture
# ---------------------------------------------------------------------------------------------------------------------

VARIANCES = {
    "whole": "(a) whole", "right": "(a) right", "along": "(a) along",
    "gradient_relative": "(b) noise to signal", "gradient": "(b) variance", "kl": "(c) exp KL",
}  # fmt: skip
RESOLVED = 10  # an effective sample size below which a mean is a handful of answers: shown, marked, and not fitted


def pooled(lines: list[dict], key: str, runs: numpy.ndarray) -> numpy.ndarray:
    """Of one t and D, the mean over runs (of a variance: the geometric mean); then that of each resampling, whose `runs` (R, runs) are
    drawn too. A noise-to-signal ratio whose signal is not above 0 is infinite."""
    missing = numpy.inf if key == "gradient_relative" else numpy.nan
    values = numpy.array([[missing if v is None else v for v in (line[key], *line["bootstrap"][key])] for line in lines])
    with numpy.errstate(divide="ignore"):
        values = values if key == "quality" else numpy.log(values)  # (runs, 1 + R)
    drawn = [values[of_runs, 1 + number].mean() for number, of_runs in enumerate(runs)]
    mean = numpy.array([values[:, 0].mean(), *drawn])
    return mean if key == "quality" else numpy.exp(mean)


def rank_correlation(signals, gains) -> float:
    first, second = (numpy.argsort(numpy.argsort(values)) for values in (signals, gains))
    return float(numpy.corrcoef(first, second)[0, 1])


def figure() -> None:
    from tables import T_975, finish, interval, pyplot

    lines = read_jsonl(RESULTS)
    plain = {line["seed"]: dict(line["evaluations"]) for line in lines if line["kind"] == "grpo"}
    runs = numpy.random.default_rng(0).integers(len(SEEDS), size=(RESAMPLED, len(SEEDS)))
    picture, grid = pyplot.subplots(len(STARTS), 4, figsize=(15, 3.6 * len(STARTS)), layout="constrained", squeeze=False)
    for start, (q_axes, v_axes, s_axes, gain_axes) in zip(STARTS, grid):
        measured = {d: [line for line in lines if line["kind"] == "measured" and (line["t"], line["distance"]) == (start, d)]
                    for d in (0, *DISTANCES)}  # fmt: skip
        gains = {d: [line["eval/accuracy"] - plain[line["seed"]][start + WINDOW] for line in lines
                     if line["kind"] == "trained" and (line["t"], line["distance"]) == (start, d)] for d in DISTANCES}  # fmt: skip
        assert all(len(found) == len(SEEDS) for found in (*measured.values(), *gains.values())), (
            f"t = {start}: runs are missing"
        )
        for found in measured.values():
            found.sort(key=lambda line: line["seed"])
        again = pooled(measured[0], "quality", runs)
        q = numpy.array([pooled(measured[d], "quality", runs) for d in DISTANCES])  # (D, 1 + R)
        v = {key: numpy.array([pooled(measured[d], key, runs) for d in DISTANCES]) for key in VARIANCES}
        s = {key: numpy.nan_to_num(q / value) for key, value in v.items()}
        ess = {key: [min(line["ess"].get(key, RESOLVED) for line in measured[d]) for d in DISTANCES] for key in VARIANCES}
        mean_gain = [statistics.fmean(found) for found in gains.values()]

        failures = ", ".join(str(line["failed"]) for line in measured[0])
        accuracy = statistics.fmean(curve[start] for curve in plain.values())
        print(f"\n#### t = {start}\n\nHeld-out accuracy {accuracy:.3f}; failed prompts of {PROMPTS}, by seed: {failures}; asked again, the policy "
              f"solves {again[0]:.2f} of them.\n")  # fmt: skip
        print(
            f"| D | Q | {' | '.join('V ' + name for name in VARIANCES.values())} | gain of training |\n|{'---|' * (len(VARIANCES) + 3)}"
        )
        for i, d in enumerate(DISTANCES):
            low, high = numpy.percentile(q[i, 1:], [2.5, 97.5])
            cells = [f"{v[key][i, 0]:.3g}{'' if ess[key][i] >= RESOLVED else ' *'}" for key in VARIANCES]
            print(f"| {d} | {q[i, 0]:.2f} [{low:.2f}, {high:.2f}] | {' | '.join(cells)} | {interval(gains[d], 3)} |")
        print(
            "\n| | S largest at D [95 %] | of fitted D* (alpha, beta) | log V grows as | rank correlation with the gain |\n|---|---|---|---|---|"
        )
        for key, name in VARIANCES.items():
            best = numpy.array(DISTANCES)[numpy.argmax(s[key], axis=0)]
            low, high = numpy.percentile(best[1:], [2.5, 97.5])
            use = [i for i in range(len(DISTANCES)) if ess[key][i] >= RESOLVED and v[key][i, 0] > 1]
            fitted = law = ""
            if key in ("whole", "along", "kl") and len(use) > 2:
                at = numpy.array(DISTANCES, float)[use]
                alpha, beta, d_star = fit(at, q[use, 0] - again[0], v[key][use, 0])
                fitted = f"{d_star:.0f} ({alpha:.4f}, {beta:.4f}; {len(use)} points)"
                law = f"D^{numpy.polyfit(numpy.log(at), numpy.log(numpy.log(v[key][use, 0])), 1)[0]:.1f}"
            print(
                f"| Q / V {name} | {best[0]} [{low:.0f}, {high:.0f}] | {fitted} | {law} | {rank_correlation(s[key][:, 0], mean_gain):.2f} |"
            )
        print(f"| Q alone | {DISTANCES[int(q[:, 0].argmax())]} | | | {rank_correlation(q[:, 0], mean_gain):.2f} |")
        drawn = numpy.array([[found[run] for run in range(len(SEEDS))] for found in gains.values()])  # (D, runs)
        tops = [DISTANCES[int(drawn[:, of_runs].mean(axis=1).argmax())] for of_runs in runs]
        low, high = numpy.percentile(tops, [2.5, 97.5])
        print(f"| the gain | {DISTANCES[int(numpy.argmax(mean_gain))]} [{low:.0f}, {high:.0f}] | | | |")

        low, high = numpy.percentile(q[:, 1:], [2.5, 97.5], axis=1)
        q_axes.fill_between(DISTANCES, low, high, alpha=0.3)
        q_axes.plot(DISTANCES, q[:, 0], "o-", ms=3)
        q_axes.axhline(again[0], color="grey", ls=":", label="the policy asked again")
        q_axes.set(ylim=(0, 1), ylabel=f"t = {start} (accuracy {accuracy:.2f})", title="Q")
        for color, (key, name) in enumerate(VARIANCES.items()):
            for axes, values in ((v_axes, v[key]), (s_axes, s[key] / s[key][:, 0].max())):
                low, high = numpy.nanpercentile(values[:, 1:], [2.5, 97.5], axis=1, method="nearest")  # some are infinite
                axes.fill_between(DISTANCES, low, high, color=f"C{color}", alpha=0.1, lw=0)
                axes.plot(DISTANCES, values[:, 0], "-", color=f"C{color}", label=name)
                for i, d in enumerate(DISTANCES):
                    axes.plot(d, values[i, 0], "o" if ess[key][i] >= RESOLVED else "x", ms=4, color=f"C{color}")
        v_axes.set(yscale="log", ylim=(1e-5, 1e12), title="V (x: not resolved)")
        s_axes.set(ylim=(0, 1.3), title="S = Q / V, as a share of its largest")
        half = [T_975[len(found)] * statistics.stdev(found) / len(found) ** 0.5 for found in gains.values()]
        gain_axes.errorbar(DISTANCES, mean_gain, half, fmt="o-", ms=3, capsize=3, color="black")
        gain_axes.axhline(0, color="grey", lw=0.8)
        gain_axes.set(title=f"gain of training over GRPO, {WINDOW} steps")
    for axes in grid.flat:
        axes.set(xscale="log", xlabel="D (steps)", xticks=[10, 20, 40, 100, 300], xticklabels=["10", "20", "40", "100", "300"])
    grid[0, 0].legend(fontsize=7)
    finish(picture, [grid[0, 1], *(axes for axes in grid.flat if axes is not grid[0, 1])], "signal_curve.png")


if __name__ == "__main__":
    what, *numbers = sys.argv[1:] or ["all"]
    {"all": main, "measure": measure, "figure": figure}[what](*map(int, numbers))
