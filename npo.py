"""Near-Future Policy Optimization (arXiv 2604.20733): GRPO, but a policy also learns from its own near future.

The loop is grpo.py's with two lines more. They need a *guide*, a later checkpoint of the same run:

1. A short GRPO run goes ahead (the *scout*); its last checkpoint is the guide.
2. Offline, the guide answers the prompts of the steps ahead several times. One verified-correct answer a prompt is kept
   in the guide cache, with its token ids and the guide's log-probs; no correct one, no entry.
3. The policy goes back to the earlier checkpoint and takes the same steps again. Where its pass-rate on a prompt is at most
   the gate tau, the last of the group's n slots becomes the guide's answer:          replace_slot
4. Advantages are computed over the mixed group, and the guide's slot has the importance ratio of what really produced it,
   rho = pi_theta / pi_guide, from the recorded log-probs. The clip bounds it as it does every other.

Nothing else changes: same loss, same clip, same optimizer. There is no KL term, no reference model, and no averaged
teacher; the guide is a frozen file of answers. Where the guide is far ahead its tokens' ratios are small, what it says
fades (variance, V); where it is close it solves few new prompts (quality, Q). Near is where Q / V is high.

Interventions, both the same act of going ahead, going back, and replaying guided:
    early        the scout starts at the base, and so does the replay
    late         the scout is a whole run that ends in a plateau; the replay starts where the plateau began
    early+late   late, where the run that plateaus was itself started by early

    python npo.py                                           # the embedded cards world, on a laptop
    python npo.py --intervention late --out runs/late
    python npo.py --guide runs/grpo/checkpoints/step_000040 --out runs/guided    # or any guide.jsonl
    python npo.py --model Qwen/Qwen3-VL-8B-Instruct --out runs/8b
"""

import dataclasses
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import report
import verifier
from command import command_line, load_config_prompts, model_path, open_directory, say
from grpo import GRPOConfig, update
from grpo import train as train_grpo
from policy import Completion, Group, Policy, load_tokenizer, tokenizer_fingerprint
from run import Run, checkpoint_path, checkpoint_state, derived_seed, read_jsonl, rows_of_step, sampler_of
from tasks import UsageError


@dataclass
class NPOConfig(GRPOConfig):
    out: str = "runs/npo"  # run directory (the scout's is scout/ in it); the same command resumes it
    steps: int = 0  # training steps [100; with a late intervention --plateau-end]
    # Near-future guidance
    intervention: Literal["early", "late", "early+late"] = "early"  # where the policy goes ahead and comes back to
    scout_steps: int = 40  # early: steps the scout goes ahead; not specified by the paper
    plateau_start: int = 240  # late: step to roll back to, a multiple of --save-every; not specified by the paper
    plateau_end: int = 320  # late: step up to which the scout goes ahead; not specified by the paper
    guide: str = ""  # learn from this checkpoint folder or guide.jsonl instead of from a scout
    guide_samples: int = 8  # the guide's answers to a prompt, of which one correct is kept; not specified by the paper
    guided_until: int = 0  # last guided step [the guide's own: beyond it, it is no future]
    gate: float = 0.6  # tau: a slot is replaced where the pass-rate is at most this
    is_correction: bool = True  # the guide slot's ratio is pi_theta / pi_guide; False: it starts at 1

    def __post_init__(self):
        if self.intervention.endswith("late"):  # the scout has to save where the replay starts
            self.save_every = self.save_every or max(n for n in range(1, 21) if self.plateau_start % n == 0)
        self.keep = self.keep or ("all" if self.model == "cards" else "needed")
        super().__post_init__()
        self.steps = self.steps or (100 if self.intervention == "early" else self.plateau_end)

    def check(self) -> None:
        super().check()
        if not 0 <= self.gate <= 1:
            raise UsageError(f"--gate {self.gate}: it is compared with a pass-rate, so it lies between 0 and 1")
        for name, least in (("scout_steps", 1), ("guide_samples", 1), ("guided_until", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        start, end = self.plateau_start, self.plateau_end
        if self.intervention.endswith("late") and not (0 < start < min(end, self.steps) and start % self.save_every == 0):
            raise UsageError(f"--plateau-start {start}: must be a multiple of --save-every {self.save_every}, and lie before "
                             f"--plateau-end {end} and --steps {self.steps}")  # fmt: skip


def pass_rate(group: Group) -> float:
    """Mean accuracy (not reward) of a group's completions."""
    return statistics.fmean(completion.accuracy for completion in group.completions)


# EXPERIMENT HERE: whose answer takes a slot, which slot, and when.
def replace_slot(group: Group, guide: Completion | None, gate: float = 0.6) -> Group:
    """The group with its last slot given to the guide, if its pass-rate is at most `gate` and the guide has an answer.

    The pass-rate is that of all n on-policy slots. The argument is never changed.
    """
    if guide is None or pass_rate(group) > gate:
        return group
    return dataclasses.replace(group, completions=[*group.completions[:-1], guide])


def train(
    config: NPOConfig, out: Path, cache: dict[str, Completion], until: int, start: Path | None, spent_tokens: int
) -> None:
    with Run(config, out, start, spent_tokens) as run:
        for step in run.steps():
            groups = run.sample(step)  # P groups of G completions
            verifier.score(groups)
            guides = [cache.get(group.prompt.id) if step <= until else None for group in groups]
            mixed = [replace_slot(group, guide, config.gate) for group, guide in zip(groups, guides)]
            if not config.is_correction:
                mixed = without_is_correction(mixed, run.policy, config)
            stats = update(run.policy, run.optimizer, mixed, config)
            run.end_step(step, groups, stats | guide_use(step, mixed), mixed)


@torch.no_grad()
def without_is_correction(mixed: list[Group], policy: Policy, config: GRPOConfig) -> list[Group]:
    """The groups with the guide's log-probs replaced by the policy's own, so that the guide slot's ratio starts at 1."""
    guided = [(group.inputs, c) for group in mixed for c in group.completions if c.source != "policy"]
    own = {}
    for first in range(0, len(guided), config.micro_batch_size):
        chunk = guided[first : first + config.micro_batch_size]
        logprobs, mask = policy.logprobs([(inputs, c.token_ids) for inputs, c in chunk], config.temperature)  # (B, T)
        for (_, guide), values, real in zip(chunk, logprobs, mask):
            own[id(guide)] = dataclasses.replace(guide, behavior_logprobs=values[real].tolist())
    return [dataclasses.replace(group, completions=[own.get(id(c), c) for c in group.completions])
            if any(id(c) in own for c in group.completions) else group for group in mixed]  # fmt: skip


def guide_use(step: int, mixed: list[Group]) -> dict:
    """Of the groups that are trained: the share with a guide, and how many steps ahead of the policy their guides are."""
    sources = [[c.source for c in group.completions if c.source != "policy"] for group in mixed]
    use = {"npo/guide_frac": sum(map(bool, sources)) / len(mixed)}
    if ahead := [int(source.partition("@")[2]) - step for of_group in sources for source in of_group if "@" in source]:
        use["npo/distance"] = statistics.fmean(ahead)
    return use


# ---------------------------------------------------------------------------------------------------------------------
# The guide cache, guide.jsonl: a header, then one line a prompt
# ---------------------------------------------------------------------------------------------------------------------


def build_cache(
    config: NPOConfig, guide: str | Path, first_step: int, until: int, path: Path,
    rows: list[int] | None = None, sampler=None, line_of=None,
) -> None:  # fmt: skip
    """Lets the guide answer the prompts of steps `first_step` to `until`; resumes where a kill stopped it.

    Of its answers to a prompt the first that is correct and finished is kept. A prompt without one has a line too, with
    its pass-rate but no completion: the file is also a measurement of the guide's quality.

    Args:
        rows: only these rows of the data set.
        sampler: what samples for the guide, where it is loaded already.
        line_of: (group, guide's step) -> a prompt's line, where it keeps more than `cache_line` does.
    """
    if until < first_step:
        raise UsageError(f"the guide has no step to help with: guided from step {first_step} until step {until}; take a later "
                         "guide, or a larger --guided-until")  # fmt: skip
    prompt_set, _ = load_config_prompts(config)
    if rows is None:
        steps = range(first_step, until + 1)
        rows = list(dict.fromkeys(row for step in steps for row in rows_of_step(len(prompt_set), step, config)))
    state = checkpoint_state(guide)
    header = {
        "guide": str(guide), "guide_step": state["step"], "guide_sampled_tokens": state["sampled_tokens"],
        "first_step": first_step, "until": until,
        "dataset": prompt_set.fingerprint, "tokenizer": tokenizer_fingerprint(load_tokenizer(model_path(config))),
        "prompts": len(rows), "rows": f"{derived_seed(rows):x}", "samples": config.guide_samples, "temperature": config.temperature,
    }  # fmt: skip
    if (theirs := tokenizer_fingerprint(load_tokenizer(guide))) != header["tokenizer"]:
        raise UsageError(f"--guide {guide}: its tokenizer ({theirs}) is not that of the policy {config.model} "
                         f"({header['tokenizer']}); token ids would mean other words. Take a checkpoint of the same model")  # fmt: skip
    if read_jsonl(path)[:1] == [header]:
        return  # it is there
    partial, size = path.with_name(path.name + ".partial"), config.prompts_per_step
    lines = read_jsonl(partial)
    lines = lines[: 1 + (len(lines) - 1) // size * size] if lines[:1] == [header] else [header]
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sampler = sampler or sampler_of(Policy(guide, config.device, config.dtype), config, prompt_set)
    name = f"guide@{state['step']} answers {config.guide_samples} times"
    with open(partial, "a") as file, tqdm(total=len(rows), initial=len(lines) - 1, desc=name, unit="prompt") as bar:
        for first in range(len(lines) - 1, len(rows), size):
            seed = derived_seed(config.seed, "guide", first)
            prompts = [prompt_set[row] for row in rows[first : first + size]]
            groups = sampler.sample(prompts, config.guide_samples, config.max_new_tokens, config.temperature, seed)
            verifier.score(groups)
            file.writelines(json.dumps((line_of or cache_line)(group, state["step"])) + "\n" for group in groups)
            file.flush()
            bar.update(len(groups))
    partial.rename(path)


def cache_line(group: Group, guide_step: int) -> dict:
    right = next((c for c in group.completions if c.accuracy == 1 and c.finished), None)
    return {
        "prompt_id": group.prompt.id,
        "pass_rate": pass_rate(group),
        "sampled_tokens": sum(len(c.token_ids) for c in group.completions),
        "completion": right and asdict(dataclasses.replace(right, source=f"guide@{guide_step}")),
    }


def load_cache(config: NPOConfig, path: Path) -> tuple[dict, dict[str, Completion], int]:
    """The header, the completions by prompt id, and the tokens that the guide sampled for the cache."""
    try:
        text = path.read_text()
        header, *lines = [json.loads(line) for line in text.splitlines()]
        whole = text.endswith("\n") and len(lines) == header["prompts"] > 0
        cache = {line["prompt_id"]: Completion(**line["completion"]) for line in lines if line["completion"]}
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UsageError(f"guide cache {path}: cut short, damaged, or no guide cache; move it away, or give the guide's "
                         "checkpoint folder, and it will be made anew")  # fmt: skip
    prompt_set, _ = load_config_prompts(config)
    mine = {"dataset": prompt_set.fingerprint, "tokenizer": tokenizer_fingerprint(load_tokenizer(model_path(config)))}
    for what, value in mine.items():
        if header[what] != value:
            raise UsageError(f"guide cache {path}: made for another {what} ({header[what]}; this run has {value}); pass the "
                             "checkpoint itself as --guide, and a new cache will be made")  # fmt: skip
    return header, cache, sum(line["sampled_tokens"] for line in lines)


# ---------------------------------------------------------------------------------------------------------------------


def intervene(config: NPOConfig, out: Path) -> None:
    """Goes ahead, builds the cache, goes back, replays guided; a directory that has any of it done goes on from there."""
    open_directory(config, out)
    guide, start, cache_path = config.guide, None, out / "guide.jsonl"
    if guide.endswith(".jsonl"):
        cache_path = Path(guide)
        if not cache_path.is_file():
            raise UsageError(f"--guide {guide}: no such file")
        if config.intervention != "early":
            raise UsageError(f"--guide {guide}: --intervention {config.intervention} goes back to a checkpoint of the guide's "
                             "own run; give the guide's checkpoint folder")  # fmt: skip
    elif not guide:
        go_ahead(config, out / "scout")
        guide = str(
            checkpoint_path(out / "scout", config.scout_steps if config.intervention == "early" else config.plateau_end)
        )
    if config.intervention != "early":
        start = Path(guide).with_name(checkpoint_path(out, config.plateau_start).name)
        if not start.is_dir():
            raise UsageError(f"--plateau-start {config.plateau_start}: {start} does not exist; give a step that was saved")
    first_step = 1 + (checkpoint_state(start)["step"] if start else 0)
    if not guide.endswith(".jsonl"):
        until = config.guided_until or checkpoint_state(guide)["step"] or config.steps  # a model of no run has step 0
        if not cache_path.is_file() or load_cache(config, cache_path)[0]["until"] < until:
            build_cache(config, guide, first_step, until, cache_path)
    header, cache, tokens = load_cache(config, cache_path)
    say(f"{cache_path}: guide@{header['guide_step']} solved {len(cache)} of {header['prompts']} prompts "
        f"({len(cache) / header['prompts']:.0%}) within {header['samples']} answers, {tokens:,} tokens")  # fmt: skip
    until = config.guided_until or header["until"]
    train(config, out, cache, until, start, header["guide_sampled_tokens"] + tokens)


def go_ahead(config: NPOConfig, out: Path) -> None:
    """The scout: plain GRPO from the base; for early+late the run that plateaus is an early one."""
    steps, keep = config.scout_steps if config.intervention == "early" else config.plateau_end, config.keep
    if config.intervention != "early" and keep != "all":  # where the replay starts, and its guide
        keep = f"{config.plateau_start},{steps}" + (f",{keep}" if keep != "needed" else "")
    if config.intervention == "early+late":
        scout = dataclasses.replace(config, intervention="early", steps=config.plateau_end, out=str(out), keep=keep)
        intervene(scout, out)
        return
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(GRPOConfig)}
    train_grpo(GRPOConfig(**shared | {"steps": steps, "out": str(out), "keep": keep}), out)


def main(config: NPOConfig) -> None:
    intervene(config, Path(config.out))
    report.npo(Path(config.out))


if __name__ == "__main__":
    command_line(NPOConfig, main)
