"""Q, V and S measured on checkpoints of real runs, and whether training gains peak where S does.

    python experiments/signal_curve.py           # about 50 minutes on two cores; resumes where it was stopped
    python experiments/signal_curve.py figure    # tables, and assets/signal_curve.png, from experiments/signal_curve.jsonl alone

For each of five seeds, a plain GRPO run with a checkpoint every 10 steps; t is its base, its step 60 or 100; a guide is its checkpoint t + D.
Prompts are the 256 that the steps after t ask. Of each, the policy samples G = 8 answers and the guide 8. The policy *fails* a prompt
where none of its 8 is right.

    Q      share of the failed prompts of which the guide has a right answer. D = 0 is the policy asked again: a control, not a guide
    V (a)  mean over right guide answers to failed prompts of prod_t sum_v p(v)^2/q(v), the second moment of each token's weight over the
           whole vocabulary, along the answer: never below 1. Beside it its effective sample size; the naive estimate, mean w^2, with its
           own; and the unconditional E_q[w^2] by tilted sampling (signal_theory.monte_carlo), with its own
    V (b)  tr Cov of NPO's gradient at t from one group: advantages, token ratios and clip as trained; a batch of P independent groups has
           1/P of it. Over groups whose 8 answers failed and whose last slot is the guide's. As it is, and relative to the squared norm of
           its mean: noise to signal, which is what an optimizer that normalises its gradient sees
    V (c)  exp of the mean per-token KL(guide || policy) along the guide's answers: what AutoNPO measures
    S      Q / V for each

Intervals: bootstrap over prompts. Training: NPO from t for 30 steps, guided throughout by the guide at each D.
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
from npo import NPOConfig, replace_slot
from policy import Policy
from run import checkpoint_path, derived_seed, evaluations, load_config_prompts, model_path, read_jsonl, rows_of_step
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


def gradient_variance(gram: numpy.ndarray, weight: numpy.ndarray) -> tuple[float, float]:
    """tr Cov of gradients with this Gram matrix and these resampling counts, and the squared norm of their mean, unbiased."""
    n = weight.sum()
    mean = weight @ gram @ weight / n**2
    spread = (weight @ gram.diagonal() / n - mean) * n / (n - 1)
    return spread, mean - spread / n


def effective(values) -> float:
    """Effective sample size of a mean of positive numbers: how many of them carry it."""
    values = numpy.asarray(values) / max(values)
    return float(values.sum() ** 2 / (values**2).sum())


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
    draws = numpy.random.default_rng(derived_seed(seed, "bootstrap", start))
    counts = [numpy.ones(PROMPTS)] + [
        numpy.bincount(draws.integers(PROMPTS, size=PROMPTS), minlength=PROMPTS) for _ in range(RESAMPLED)
    ]
    for distance in tqdm((0, *DISTANCES), desc=f"seed {seed} t {start}"):
        guide = Policy(checkpoint_path(run, start + distance), "cpu") if distance else policy
        answers = sample(guide, prompts, config, "signal guide", start, distance)
        right = [[c for c in group.completions if c.accuracy == 1 and c.finished] for group in answers]
        solved = numpy.array([bool(found) for found in right])

        # along the guide's answers: (a) on right ones to failed prompts, (c) on all
        chosen = [(i, c) for i, group in enumerate(answers) for c in group.completions]
        rows = [(groups[i].inputs, c.token_ids) for i, c in chosen]
        moment, weights, kl, tokens = (numpy.zeros(PROMPTS) for _ in range(4))
        moments, w = [], []  # of each right answer to a failed prompt
        for (i, completion), p, q in zip(chosen, distributions(policy, rows), distributions(guide, rows)):
            ids = torch.tensor(completion.token_ids)[:, None]
            kl[i] += torch.where(q == float("-inf"), 0.0, q.exp() * (q - p)).sum().item()
            tokens[i] += len(ids)
            if failed[i] and completion.accuracy == 1 and completion.finished:
                moments.append(torch.logsumexp(log_tilt(p, q), dim=-1).double().sum().exp().item())
                w.append((p - q).gather(-1, ids).sum().exp().item())
                moment[i] += moments[-1]
                weights[i] += 1
        use = [i for i in range(PROMPTS) if failed[i]]
        tilt = numpy.zeros((PROMPTS, PATHS))  # logs
        if use:
            tilt[use] = tilted(policy, guide, [groups[i] for i in use], config, derived_seed(seed, "tilted", start, distance))

        # (b) the gradient of groups whose 8 answers failed and whose last slot is the guide's
        mixed = {i: replace_slot(groups[i], dataclasses.replace(right[i][0], source=f"guide@{start + distance}"), config.gate)
                 for i in use if right[i]}  # fmt: skip
        flat = torch.stack([group_gradient(policy, group, config) for group in mixed.values()]) if mixed else torch.zeros(0, 1)
        gram, places = (flat @ flat.T).double().numpy(), list(mixed)

        replicates = []
        for count in counts:
            line = {"quality": (count @ (failed & solved)) / (count @ failed)}
            line["moment"] = (count @ moment) / (count @ weights) if count @ weights else None
            line["tilted"] = float(count[failed] @ numpy.exp(tilt[failed]).mean(axis=1) / count[failed].sum())
            line["kl"] = float(numpy.exp((count @ kl) / (count @ tokens)))
            enough = count[places].sum() > 2 if places else False
            spread, mean = gradient_variance(gram, count[places]) if enough else (None, 0)
            line["gradient"], line["gradient_relative"] = spread, spread / mean if mean > 0 else None
            replicates.append(line)
        point, *resampled = [{k: v if v is None else float(f"{v:.{digits}g}") for k, v in line.items()}
                             for line, digits in zip(replicates, [5] + [3] * RESAMPLED)]  # fmt: skip
        write({
            "kind": "measured", "seed": seed, "t": start, "distance": distance, "failed": int(failed.sum()),
            **point, "moment_ess": effective(moments), "answers": len(moments), "naive": float(numpy.mean(numpy.square(w))),
            "naive_ess": effective(w), "tilted_ess": effective(numpy.exp(tilt[failed]).ravel()), "paths": int(failed.sum()) * PATHS,
            "guided_groups": len(mixed),
            "bootstrap": {key: [line[key] for line in resampled] for key in point},
        })  # fmt: skip


def fit(distances, qualities, variances) -> tuple[float, float, float]:
    """(alpha, beta, D*) of measured points: Q = c (1 - exp(-alpha D)) by least squares, log V = beta D through the origin.

    D* is nan where a fit does not fall inside (beta <= 0: the variance did not grow), 1 / beta in the limit of a straight Q.
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
        if done.count((seed, start)) < 1 + len(DISTANCES):
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
    "moment": "(a) second moment",
    "gradient_relative": "(b) gradient, noise to signal",
    "gradient": "(b) gradient, raw",
    "kl": "(c) exp KL",
}
RESOLVED = 10  # an effective sample size below which a mean is a handful of answers: shown, marked, and not fitted


def pooled(lines: list[dict], key: str) -> numpy.ndarray:
    """Of one t and D, the mean over seeds (of a variance: the geometric mean), and the same of each bootstrap replicate."""
    values = numpy.array([[line[key], *line["bootstrap"][key]] for line in lines], float)  # (seeds, 1 + replicates)
    with numpy.errstate(invalid="ignore"):
        return numpy.nanmean(values, axis=0) if key == "quality" else numpy.exp(numpy.nanmean(numpy.log(values), axis=0))


def ranks(values) -> numpy.ndarray:
    return numpy.argsort(numpy.argsort(values)).astype(float)


def figure() -> None:
    from tables import finish, interval, pyplot

    lines = read_jsonl(RESULTS)
    plain = {line["seed"]: dict(line["evaluations"]) for line in lines if line["kind"] == "grpo"}
    picture, grid = pyplot.subplots(len(STARTS), 4, figsize=(15, 3.4 * len(STARTS)), layout="constrained", squeeze=False)
    for start, (q_axes, v_axes, s_axes, gain_axes) in zip(STARTS, grid):
        by_distance = {d: sorted((line for line in lines if line["kind"] == "measured" and (line["t"], line["distance"]) == (start, d)),
                                 key=lambda line: line["seed"]) for d in (0, *DISTANCES)}  # fmt: skip
        assert all(len(found) == len(SEEDS) for found in by_distance.values()), f"t = {start}: not all measured yet"
        q = numpy.array([pooled(by_distance[d], "quality") for d in DISTANCES])  # (D, 1 + replicates)
        gains = {d: [line["eval/accuracy"] - plain[line["seed"]][start + WINDOW] for line in lines
                     if line["kind"] == "trained" and (line["t"], line["distance"]) == (start, d)] for d in DISTANCES}  # fmt: skip
        assert all(len(found) == len(SEEDS) for found in gains.values()), f"t = {start}: not all trained yet"
        mean_gain = [statistics.fmean(found) for found in gains.values()]
        resolved = [min(line["moment_ess"] for line in by_distance[d]) >= RESOLVED for d in DISTANCES]
        v = {key: numpy.array([pooled(by_distance[d], key) for d in DISTANCES]) for key in VARIANCES}
        s = {key: q / value for key, value in v.items()}

        failed = statistics.fmean(line["failed"] for line in by_distance[0])
        asked_again = pooled(by_distance[0], "quality")[0]
        accuracy = statistics.fmean(curve[start] for curve in plain.values())
        print(
            f"\n### t = {start}: accuracy {accuracy:.3f}, {failed:.0f} of {PROMPTS} prompts failed; asked again the policy solves {asked_again:.2f} of them\n"
        )
        print(
            "| D | Q | V (a) | ESS (a) | naive (a), ESS | tilted E[w^2], ESS | V (b) noise/signal | V (b) raw | V (c) | S (a) | S (b) | S (c) | gain of training [95 %] |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
        for i, d in enumerate(DISTANCES):
            found = by_distance[d]
            least = {key: min(line[key] for line in found) for key in ("moment_ess", "naive_ess", "tilted_ess")}
            naive, tilt = (statistics.geometric_mean(line[key] for line in found) for key in ("naive", "tilted"))
            low, high = numpy.percentile(q[i, 1:], [2.5, 97.5])
            print(f"| {d} | {q[i, 0]:.2f} [{low:.2f}, {high:.2f}] | {v['moment'][i, 0]:.3g}{'' if resolved[i] else ' *'} | {least['moment_ess']:.0f} "
                  f"| {naive:.2g}, {least['naive_ess']:.0f} | {tilt:.2g}, {least['tilted_ess']:.0f} | {v['gradient_relative'][i, 0]:.1f} "
                  f"| {v['gradient'][i, 0]:.3f} | {v['kl'][i, 0]:.3f} | {s['moment'][i, 0]:.2g} | {s['gradient_relative'][i, 0]:.3f} "
                  f"| {s['kl'][i, 0]:.3f} | {interval(gains[d], 3)} |")  # fmt: skip
        print(
            "\n| S of | largest at D [95 % of resamplings] | fitted alpha, beta | fitted D* | log V grows as D^ | rank correlation of S with the gain |"
        )
        print("|---|---|---|---|---|---|")
        for key, name in VARIANCES.items():
            best = numpy.array(DISTANCES)[numpy.nanargmax(s[key], axis=0)]
            low, high = numpy.percentile(best[1:], [2.5, 97.5])
            use = [i for i in range(len(DISTANCES)) if (key != "moment" or resolved[i]) and v[key][i, 0] > 1]
            fitted, law = "", ""
            if key in ("moment", "kl") and len(use) > 1:
                at = numpy.array(DISTANCES, float)[use]
                alpha, beta, d_star = fit(at, q[use, 0], v[key][use, 0])
                fitted = f"{alpha:.4f}, {beta:.4f} | {d_star:.0f}"
                law = f"{numpy.polyfit(numpy.log(at), numpy.log(numpy.log(v[key][use, 0])), 1)[0]:.1f} ({len(use)} points)"
            rank = numpy.corrcoef(ranks(s[key][:, 0]), ranks(mean_gain))[0, 1]
            print(f"| {name} | {best[0]} [{low:.0f}, {high:.0f}] | {fitted or '|'} | {law} | {rank:.2f} |")
        print(f"| Q alone | | | | | {numpy.corrcoef(ranks(q[:, 0]), ranks(mean_gain))[0, 1]:.2f} |")
        top = DISTANCES[int(numpy.argmax(mean_gain))]
        print(f"\nGain largest at D = {top}: {interval(gains[top], 3)}")

        low, high = numpy.percentile(q[:, 1:], [2.5, 97.5], axis=1)
        q_axes.fill_between(DISTANCES, low, high, alpha=0.3)
        q_axes.plot(DISTANCES, q[:, 0], "o-", ms=3)
        q_axes.set(ylim=(0, 1), ylabel=f"t = {start} (accuracy {accuracy:.2f})", title="Q")
        for color, (key, name) in enumerate(VARIANCES.items()):
            for axes, values in ((v_axes, v[key]), (s_axes, s[key] / s[key][:, :1].max())):
                low, high = numpy.nanpercentile(values[:, 1:], [2.5, 97.5], axis=1)
                axes.fill_between(DISTANCES, low, high, color=f"C{color}", alpha=0.15, lw=0)
                axes.plot(DISTANCES, values[:, 0], "o-", ms=3, color=f"C{color}", label=name)
        far = [i for i, known in enumerate(resolved) if not known]
        v_axes.plot(
            numpy.array(DISTANCES)[far], v["moment"][far, 0], "C0x", ms=8, label="(a) not resolved: few answers carry it"
        )
        v_axes.set(yscale="log", ylim=(0.02, 1e12), title="V")
        s_axes.set(ylim=(0, 1.3), title="S = Q / V, as a share of its largest")
        half = [2.776 * statistics.stdev(found) / len(found) ** 0.5 for found in gains.values()]  # Student's t, 5 seeds
        gain_axes.errorbar(DISTANCES, mean_gain, half, fmt="o-", ms=3, capsize=3, color="C4")
        gain_axes.axhline(0, color="grey", lw=0.8)
        gain_axes.set(title=f"gain over GRPO after {WINDOW} guided steps")
    v_axes.legend(fontsize=7)
    for axes in grid.flat:
        axes.set(xscale="log", xlabel="D (steps)", xticks=[10, 20, 40, 100, 300], xticklabels=["10", "20", "40", "100", "300"])
    for axes in list(grid.flat)[1:]:
        axes.grid(alpha=0.3)
    finish(picture, [v_axes], "signal_curve.png")


if __name__ == "__main__":
    what, *numbers = sys.argv[1:] or ["all"]
    {"all": main, "measure": measure, "figure": figure}[what](*map(int, numbers))
