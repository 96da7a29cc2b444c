"""Q, V and S measured on checkpoints of real runs: does training gain most where S peaks?

    python -m experiments.signal_curve        # about an hour on two cores; resumes
    python -m experiments.signal_curve table  # from experiments/signal_curve.jsonl alone

For each of five seeds a plain GRPO run saves a checkpoint every 10 steps. The policy is its base
or its step 60 or 100 (t), a guide is its checkpoint t + D. Both answer the 256 prompts that the
steps after t ask, 8 times each. The policy *fails* a prompt if none of its 8 answers is right.

Q is the share of the failed prompts to which the guide has a right answer (at D = 0 the policy is
asked again: a control). S is Q / V, and V one of these:

    whole     E_q[w^2] of an answer's weight w = p/q, the V of signal_theory.py, on failed prompts
    right     mean w^2 of the guide's right answers to failed prompts, those that a slot can hold;
              at least (p(right)/q(right))^2, so it may lie below 1
    gradient  tr Cov of NPO's gradient from one group whose 8 answers failed and whose last slot is
              the guide's; also relative to the squared norm of the mean gradient
    kl        exp of the mean KL(guide || policy) per token, over all answers of the guide

The gain of training is the held-out accuracy after 30 steps of NPO from t, all guided by the guide
at D, minus that of GRPO at the same step. "bootstrap" holds the values in 200 resamplings of the
prompts, "ess" effective sample sizes.
"""

import json
import os
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import numpy
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import grpo
import verifier
from experiments import runs
from experiments.student import interval
from npo import NPOConfig, replace_slot
from plumbing.checkpoints import checkpoint_path
from plumbing.data import load_prompts
from plumbing.model import Policy, longer
from plumbing.rollout import Completion, Group, Prompt, batched, samples_with_signal
from plumbing.run import derived_seed, read_jsonl, rows_of_step

RESULTS, RUNS = runs.HERE / "signal_curve.jsonl", f"{runs.RUNS}/signal"
FIRST_BASE = "e3310138ddab"  # of the lines that do not name theirs
SEEDS, STARTS = range(5), (0, 60, 100)
DISTANCES = (10, 20, 30, 40, 60, 80, 100, 140, 200, 300)
STEPS, WINDOW, PROMPTS = 400, 30, 256
RESAMPLED, PATHS = 200, 4  # bootstrap resamplings; tilted samples per prompt
CHUNK = 32  # prompts that are answered at a time
RESOLVED = 10  # a mean with a smaller effective sample size rests on a handful of answers
VARIANCES = ("whole", "right", "gradient", "gradient_relative", "kl")


# ---- Measuring -----------------------------------------------------------------------------------


def sample(policy: Policy, prompts: list[Prompt], config: NPOConfig, *key) -> list[Group]:
    groups = []
    for number, chunk in enumerate(batched(prompts, CHUNK)):
        seed = derived_seed(config.seed, *key, number * CHUNK)
        groups += policy.sample(chunk, config.group_size, config.max_new_tokens, 1.0, seed)
    verifier.score(groups)
    return groups


def usable(completion: Completion) -> bool:
    """Whether a guide cache would keep the answer: it is right, and not cut off."""
    return completion.accuracy == 1 and completion.finished


def forward(policy: Policy, prefilled: tuple, ids, first: int = 0) -> torch.Tensor:
    """Log-probs (B, T, V) of the token after each of `ids` (B, T), after `first` calls with one."""
    _, attention, positions, cache = prefilled
    hidden = policy.model.base_model(
        input_ids=ids,
        attention_mask=longer(attention, first + ids.shape[1] - 1),
        position_ids=positions[:, :, -1:] + first + torch.arange(ids.shape[1]),
        past_key_values=cache,
    ).last_hidden_state
    return policy.sampling_logprobs(policy.model.get_output_embeddings()(hidden), 1.0)


@torch.no_grad()
def distributions(policy: Policy, rows: list[tuple]) -> Iterator[torch.Tensor]:
    """For each encoded prompt with an answer's ids, log-probs (T, V) of every possible token."""
    for chunk in batched(rows, 4 * CHUNK):
        prefilled = policy.prefill_prompts([prompt for prompt, _ in chunk])
        tokens = pad_sequence([torch.tensor(answer) for _, answer in chunk], batch_first=True)
        ids = torch.cat([prefilled[0][:, -1:], tokens[:, :-1]], dim=1)
        values = forward(policy, prefilled, ids)
        yield from (row[: len(answer)] for row, (_, answer) in zip(values, chunk))


@torch.no_grad()
def tilted(policy: Policy, guide: Policy, groups: list[Group], length: int, seed: int):
    """Estimates of log E_q[w^2], an array (prompts, PATHS).

    A path is drawn token by token from p^2/q, normalised. Its estimate is the product of all
    normalisers sum_v p(v)^2/q(v). Their mean is sum_o p(o)^2/q(o), and none is below 1.
    """
    torch.manual_seed(seed)
    stop, found = torch.tensor(policy.eos_token_ids), []
    for chunk in batched(groups, CHUNK):
        rows = [group.encoded for group in chunk for _ in range(PATHS)]
        both = [(model, model.prefill_prompts(rows)) for model in (policy, guide)]
        last = both[0][1][0][:, -1:]  # (B, 1)
        total = torch.zeros(len(rows), dtype=torch.float64)
        running = torch.ones(len(rows), dtype=torch.bool)
        for step in range(length):
            p, q = (forward(model, read, last, step)[:, -1] for model, read in both)
            tilt = torch.where(p == float("-inf"), p, 2 * p - q)  # (B, V)
            log_moment = torch.logsumexp(tilt, dim=-1)  # (B,)
            total += torch.where(running, log_moment, 0.0)
            last = torch.multinomial((tilt - log_moment[:, None]).exp(), 1)
            running &= ~torch.isin(last[:, 0], stop)
            if not running.any():
                break
        found.append(total.view(-1, PATHS).numpy())
    return numpy.concatenate(found)


def along_answers(policy: Policy, guide: Policy, groups, answers, failed) -> tuple:
    """(4, P) sums per prompt over the guide's answers: KL, tokens, and w^2 and the number of the
    usable answers to failed prompts. Then the list of all these w^2."""
    kl, tokens, squares, number = sums = numpy.zeros((4, len(groups)))
    every_square = []
    chosen = [(i, c) for i, group in enumerate(answers) for c in group.completions]
    rows = [(groups[i].encoded, c.token_ids) for i, c in chosen]
    pairs = zip(distributions(policy, rows), distributions(guide, rows))
    for (i, completion), (p, q) in zip(chosen, pairs):  # (T, V) each
        kl[i] += torch.where(q == float("-inf"), 0.0, q.exp() * (q - p)).sum().item()
        tokens[i] += len(p)
        if failed[i] and usable(completion):
            log_w = (p - q).gather(-1, torch.tensor(completion.token_ids)[:, None]).double().sum()
            every_square.append((2 * log_w).exp().item())
            squares[i] += every_square[-1]
            number[i] += 1
    return sums, every_square


def group_gradient(policy: Policy, group: Group, config: NPOConfig) -> torch.Tensor:
    """NPO's gradient from one group, flat."""
    rewards = torch.tensor([[c.reward for c in group.completions]])
    samples = samples_with_signal([group], grpo.group_advantages(rewards))
    loss, _ = grpo.policy_loss(policy, samples, config, len(samples), 0)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.parameters())])


def gradient_variance(gram, count, resampled: bool = False) -> tuple[float | None, float | None]:
    """tr Cov and the squared norm of the mean of gradients, unbiased; None for fewer than three.

    `gram` (N, N) is their Gram matrix, `count` (N,) how often each of them counts. In a resampling
    the norm is too large by tr Cov / n twice: what is drawn from was drawn itself.
    """
    n = count.sum()
    if n < 3:
        return None, None
    norm = count @ gram @ count / n**2
    spread = (count @ gram.diagonal() / n - norm) * n / (n - 1)
    return float(spread), float(norm - (2 if resampled else 1) * spread / n)


def effective(values) -> float:
    """Effective sample size of a mean of positive numbers: how many of them carry it."""
    shares = numpy.array(values, float) / max(values, default=1.0)
    return float(shares.sum() ** 2 / (shares**2).sum()) if len(shares) else 0.0


def ratio(count, total, number) -> float | None:
    """sum(total) / sum(number) over prompts that count so often; None without any number."""
    return float(count @ total / (count @ number)) if count @ number else None


def measure(seed: int, start: int) -> list[dict]:
    """The result lines of one seed and t: D = 0, then every distance."""
    config, run = NPOConfig(seed=seed, device="cpu"), runs.ROOT / RUNS / f"grpo-{seed}"
    train_prompts, _ = load_prompts(config)
    steps = range(start + 1, start + PROMPTS // config.prompts_per_step + 1)
    rows = [row for step in steps for row in rows_of_step(len(train_prompts), step, config)]
    prompts = [train_prompts[row] for row in rows]
    policy = Policy(checkpoint_path(run, start) if start else config.model_path, "cpu")
    groups = sample(policy, prompts, config, "signal policy", start)
    failed = numpy.array([not any(c.accuracy for c in group.completions) for group in groups])
    failures = numpy.flatnonzero(failed)
    draws = numpy.random.default_rng(derived_seed(seed, "bootstrap", start))
    counts = [draws.integers(PROMPTS, size=PROMPTS) for _ in range(RESAMPLED)]
    counts = [numpy.ones(PROMPTS), *(numpy.bincount(c, minlength=PROMPTS) for c in counts)]
    lines = []
    for distance in (0, *DISTANCES):
        guide = Policy(checkpoint_path(run, start + distance), "cpu") if distance else policy
        answers = sample(guide, prompts, config, "signal guide", start, distance)
        sums, squares = along_answers(policy, guide, groups, answers, failed)
        kl, tokens, right, number = sums
        whole = numpy.zeros((PROMPTS, PATHS))
        paths, asked = derived_seed(seed, "tilted", start, distance), [groups[i] for i in failures]
        whole[failures] = numpy.exp(tilted(policy, guide, asked, config.max_new_tokens, paths))
        solved = numpy.array([any(map(usable, group.completions)) for group in answers])
        places, gradients = numpy.flatnonzero(failed & solved), []
        for i in places:  # failed groups whose last slot is the guide's
            answer = next(filter(usable, answers[i].completions))
            mixed = replace_slot(groups[i], answer, config.gate)
            gradients.append(group_gradient(policy, mixed, config))
        flat = torch.stack(gradients) if gradients else torch.zeros(0, 1)
        gram, values = (flat @ flat.T).double().numpy(), []
        for draw, count in enumerate(counts):
            spread, norm = gradient_variance(gram, count[places], resampled=draw > 0)
            found = {
                "quality": ratio(count, failed & solved, failed),
                "whole": ratio(count, whole.mean(axis=1) * failed, failed),
                "right": ratio(count, right, number),
                "kl": float(numpy.exp(ratio(count, kl, tokens))),
                "gradient": spread,
                "gradient_relative": spread / norm if norm and norm > 0 else None,
            }
            digits = 3 if draw else 5
            values.append({k: v and float(f"{v:.{digits}g}") for k, v in found.items()})
        sizes = dict(failed=len(failures), right_answers=len(squares), guided_groups=len(places))
        ess = {"whole": effective(whole[failures].ravel()), "right": effective(squares)}
        bootstrap = {key: [line[key] for line in values[1:]] for key in values[0]}
        line = {"kind": "measured", "seed": seed, "t": start, "distance": distance} | sizes
        lines.append(line | values[0] | {"ess": ess, "bootstrap": bootstrap})
    return lines


# ---- Running everything --------------------------------------------------------------------------


class Job(NamedTuple):
    kind: str  # "grpo", "measured" or "trained"
    seed: int
    start: int = 0  # t
    distance: int = 0  # D; of "measured" the last one, whose line is written last


def job_of(line: dict) -> Job:
    return Job(line["kind"], line["seed"], line.get("t", 0), line.get("distance", 0))


def stages(done) -> list[list[Job]]:
    """What is still to be done. The second stage needs the checkpoints of the first."""
    places = [(seed, start) for seed in SEEDS for start in STARTS]
    later = [Job("measured", *place, DISTANCES[-1]) for place in places]
    later += [Job("trained", *place, distance) for place in places for distance in DISTANCES]
    later = [job for job in later if job not in done]
    needed = {job.seed for job in later}  # the command of a finished run returns at once
    plain = [Job("grpo", seed) for seed in SEEDS]
    return [[job for job in plain if job not in done or job.seed in needed], later]


def do(job: Job) -> list[dict]:
    """The job's result lines; none if its command failed."""
    kind, seed, start, distance = job
    if kind == "measured":
        torch.set_num_threads(1)  # more would round differently
        return measure(seed, start)
    out = plain = f"{RUNS}/grpo-{seed}"
    words = f"grpo.py --steps {STEPS} --save-every 10 --eval-every 10"
    if kind == "trained":
        out, end = f"{RUNS}/{start}-{distance}-{seed}", start + WINDOW
        words = f"npo.py --guide {checkpoint_path(plain, start + distance)}"
        words += f" --intervention late --plateau-start {start}" if start else ""
        words += f" --steps {end} --guided-until {end} --eval-every 1000"
    command = f"python {words} --seed {seed} --out {out}"
    if not (made := runs.make(runs.Run(kind, command, seed=seed, out=out))):
        return []
    line = {"kind": kind, "seed": seed, "command": made["command"], "commit": made["commit"]}
    if kind == "grpo":
        return [line | {"evaluations": [evaluation[:2] for evaluation in made["evals"]]}]
    return [line | {"t": start, "distance": distance, "eval/accuracy": made["evals"][-1][1]}]


def main() -> None:
    lines, base = read_jsonl(RESULTS), runs.base_model(runs.Run("grpo", "grpo.py"))
    if any(line.get("base", FIRST_BASE) != base for line in lines):
        sys.exit(f"error: {RESULTS} was measured from another base; remove it (it is in git)")
    # Without the half line that a kill may have left
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = set(map(job_of, lines))
    os.environ["OMP_NUM_THREADS"] = "1"  # two jobs at a time on two cores
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for stage in stages(done):
            failed, results = [], pool.map(do, stage)
            for job, found in tqdm(zip(stage, results), total=len(stage), desc="jobs"):
                failed += [] if found else [job]
                text = "".join(json.dumps(line | {"base": base}) + "\n" for line in found)
                with open(RESULTS, "a") as file:
                    file.write("" if job in done else text)
            if failed:
                sys.exit(f"error: not done: {', '.join(map(str, failed))}")
    print_tables()


# ---- Tables --------------------------------------------------------------------------------------


def print_tables() -> None:
    """For every t: Q, each V and the gain by distance; then where each S is largest."""
    lines = {job_of(line): line for line in read_jsonl(RESULTS)}
    curves = {seed: dict(lines["grpo", seed, 0, 0]["evaluations"]) for seed in SEEDS}
    for start in STARTS:
        again = interval([lines["measured", seed, start, 0]["quality"] for seed in SEEDS])
        print(f"\nt = {start}; the policy, asked again, solves {again} of its failures")
        shown = [f"{name.removeprefix('gradient_'):>8} " for name in VARIANCES]
        print("  D  Q                ", *shown, " gain of training")
        columns = []
        for distance in DISTANCES:
            measured = [lines["measured", seed, start, distance] for seed in SEEDS]
            trained = [lines["trained", seed, start, distance]["eval/accuracy"] for seed in SEEDS]
            gain = [trained[seed] - curves[seed][start + WINDOW] for seed in SEEDS]
            quality, values, cells = [line["quality"] for line in measured], [], []
            for name in VARIANCES:
                few = min(line["ess"].get(name, RESOLVED) for line in measured) < RESOLVED
                of_seeds = numpy.array([line[name] for line in measured], float)  # None: nan
                values.append(numpy.exp(numpy.log(of_seeds).mean()))
                cells.append(f"{values[-1]:8.3g}{'*' if few else ' '}")
            print(f"{distance:3}  {interval(quality):17}", *cells, f" {interval(gain, 3)}")
            columns.append([statistics.fmean(quality), *values, statistics.fmean(gain)])
        quality, *variances, gain = numpy.array(columns).T
        for name, value in zip(("1", *VARIANCES), (1.0, *variances)):
            signal = numpy.nan_to_num(quality / value)
            ranks = [numpy.argsort(numpy.argsort(values)) for values in (signal, gain)]
            print(f"Q / {name} is largest at D = {DISTANCES[signal.argmax()]}; its rank", end="")
            print(f" correlation with the gain is {numpy.corrcoef(*ranks)[0, 1]:.2f}")
    print(f"\nV: geometric means over seeds; *: effective sample size below {RESOLVED}")


if __name__ == "__main__":
    print_tables() if sys.argv[1:] == ["table"] else main()
