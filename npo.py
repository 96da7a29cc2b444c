"""Near-Future Policy Optimization (arXiv 2604.20733): GRPO in which a policy
also learns from its own near future.

1. Go ahead: a short GRPO run, the *scout*, trains the policy for D more steps.
   Its last checkpoint is the *guide*.                              go_ahead
2. Ask the guide: offline it answers the prompts of the coming steps several
   times. One verified-correct answer per prompt is kept in the *guide cache*,
   with its token ids and the guide's log-probs.                    ask_guide
3. Go back to the earlier checkpoint and take the same steps again. Where the
   policy's pass-rate on a prompt is at most the gate tau, the guide's answer
   takes the last of the group's slots.                             replace_slot
4. Train on the mixed group as before: advantages over all of its rewards, and
   for the guide's slot the ratio pi_theta / pi_guide, from the recorded
   log-probs, under the same clip.                                  grpo.update

Nothing else changes. The guide is a file of answers: no KL reference, no
averaged teacher. Three interventions are the same act at different times:

    early        scout and replay start at the base
    late         the scout runs from the base through a plateau; the replay
                 starts from its checkpoint at the plateau's start
    early+late   like late, but the scout is itself an early NPO run

    python npo.py                                     # the cards world
    python npo.py --intervention late --out runs/late
    python npo.py --guide runs/grpo/checkpoints/step_000040 --out runs/guided
    python npo.py --guide self --out runs/self        # D = 0: the control, no future at all
    python npo.py --model Qwen/Qwen3-VL-8B-Instruct --out runs/8b
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

import grpo
import verifier
from grpo import GRPOConfig, update
from plumbing import UsageError
from plumbing.checkpoints import checkpoint_beside, checkpoint_path, checkpoint_state
from plumbing.command import command_line, open_directory
from plumbing.data import load_prompts
from plumbing.guide_cache import (
    GuideCache,
    build_guide_cache,
    guide_of_texts,
    kind_of_guide,
    load_guide_cache,
)
from plumbing.report import report
from plumbing.rollout import Completion, Group
from plumbing.run import Run, rows_of_steps, sampled_tokens
from plumbing.settings import within


@dataclass
class GuidedConfig(GRPOConfig):
    # Guide
    gate: float = 0.6  # tau: a slot is replaced if the pass-rate is at most this
    guide_samples: int = 8  # the guide's answers to a prompt; not in our sources
    slots: int = 1  # K: the guide's first K verified answers take the last K slots
    is_correction: bool = True  # ratio pi_theta / pi_guide; off: it starts at 1

    def check(self) -> None:
        super().check()
        within(self, "gate", least=0, most=1)
        within(self, "guide_samples", least=1)
        within(self, "slots", least=1, below=self.group_size, of="--group-size")


@dataclass
class NPOConfig(GuidedConfig):
    out: str = "runs/npo"  # run directory, the scout's is scout/ in it
    steps: int | None = None  # training steps [100; if late: --plateau-end]
    # Intervention
    intervention: Literal["early", "late", "early+late"] = "early"  # back to base or plateau
    scout_steps: int = 40  # early, early+late: steps ahead; not in our sources
    plateau_start: int = 240  # late, early+late: step to go back to; not in our sources
    plateau_end: int = 320  # late, early+late: last step of the scout; not in our sources
    guide: str | None = None  # no scout: checkpoint (late: of a run), guide.jsonl, run, texts, self
    guided_until: int | None = None  # last guided step [the guide's own; --steps if it has none]

    def __post_init__(self):
        super().__post_init__()
        if self.steps is None:
            self.steps = self.plateau_end if self.late else 100

    @property
    def late(self) -> bool:
        return self.intervention.endswith("late")

    def check(self) -> None:
        super().check()
        within(self, "scout_steps", least=1)
        if self.late and (self.guide == "self" or self.start):
            flag = "--guide self" if self.guide == "self" else f"--start {self.start}"
            raise UsageError(
                f"{flag}: a {self.intervention} replay starts at --plateau-start and has a later "
                "checkpoint as its guide; leave --intervention out"
            )
        if self.late:
            end, of = min(self.plateau_end, self.steps), "--plateau-end, --steps"
            within(self, "plateau_start", least=1, below=end, of=of)
        if self.guided_until is not None:
            start = self.plateau_start if self.late else self.start_step
            within(self, "guided_until", above=start, of="where the replay starts" if start else "")


# EXPERIMENT HERE: whose answer takes a slot, which slot, and when.
def replace_slot(
    group: Group, guide: Completion | list[Completion] | None, gate: float = 0.6
) -> Group:
    """Gives the last slot to the guide's answer, even if that slot was right,
    where there is one and at most `gate` of all G answers are right.

    A list of K answers takes the last K slots, by one decision of the gate. Returns the group
    itself or a changed copy; the argument stays as it is.
    """
    guides = guide if isinstance(guide, list) else [guide] if guide else []
    if not guides or group.pass_rate > gate:
        return group
    return dataclasses.replace(group, completions=[*group.completions[: -len(guides)], *guides])


def answers_for(
    groups: list[Group], step: int, cache: GuideCache, run: Run
) -> list[list[Completion]]:
    """The guide's verified answers to each group's prompt, at most `--slots` of them.

    With `--guide self` the policy is its own guide, D = 0: where the gate opens, it is asked
    `--guide-samples` more times.
    """
    config = run.config
    if config.guide != "self":
        return [cache.answers_to(group.prompt, step, config.slots) for group in groups]
    if step > (config.guided_until or config.steps):
        return [[] for _ in groups]
    rows = [row for row, g in zip(run.rows(step), groups) if g.pass_rate <= config.gate]
    asked = list(run.ask(run.train_prompts, rows, config.guide_samples, "ask again", step))
    run.sampled_tokens += sampled_tokens(asked)
    found = {group.prompt.id: group.verified[: config.slots] for group in asked}
    for answer in (answer for answers in found.values() for answer in answers):
        answer.source = f"guide@{step}"
    return [found.get(group.prompt.id, []) for group in groups]


def train(config: NPOConfig, out: Path, cache: GuideCache, start: str | Path | None) -> None:
    spent = cache.spent_tokens
    if config.start and config.guide:
        of_start = checkpoint_state(config.start)["sampled_tokens"]
        runs = {Path(path).resolve().parent for path in (config.start, config.guide)}
        of_guide = spent - cache.sampled_tokens  # one run's later step includes the earlier one's
        spent += of_start if len(runs) > 1 else max(0, of_start - of_guide)
    with Run(config, out, start, spent) as run:
        for step in run.steps():
            groups = run.sample(step)  # P groups of G completions
            verifier.score(groups)
            guides = answers_for(groups, step, cache, run)
            mixed = [replace_slot(g, guide, config.gate) for g, guide in zip(groups, guides)]
            stats = update(run.policy, run.optimizer, mixed, config)
            run.end_step(step, groups, stats, mixed)


def intervene(config: NPOConfig, out: Path) -> None:
    """Goes ahead, asks the guide, goes back, replays. Resumes where it was stopped."""
    open_directory(config, out)
    cache, start = GuideCache(), config.start  # None: the base
    if config.guide != "self":
        guide = config.guide or go_ahead(config, out / "scout")
        if config.late:
            start = checkpoint_beside(guide, config.plateau_start)
        first_step = checkpoint_state(start)["step"] + 1 if start else 1
        cache = ask_guide(config, guide, first_step, out / "guide.jsonl")
    train(config, out, cache, start)


def go_ahead(config: NPOConfig, out: Path) -> str:
    """Runs the scout and returns its last checkpoint.

    It is plain GRPO, which ignores the flags of the guide; for early+late it is
    an early NPO run with a scout of its own.
    """
    steps = config.plateau_end if config.late else config.start_step + config.scout_steps
    keep = f"{config.keep},{config.plateau_start}" if config.late else config.keep
    changes = {"intervention": "early", "guided_until": None, "steps": steps, "keep": keep}
    scout = dataclasses.replace(config, out=str(out), **changes)
    if config.intervention == "early+late":
        intervene(scout, out)
    else:
        grpo.train(scout, out)
    return str(checkpoint_path(out, steps))


def ask_guide(
    config: NPOConfig, guide: str, first_step: int, path: Path, sampler=None, processes=None
) -> GuideCache:
    """The guide's answers to the prompts of the steps that it guides.

    `sampler` and `processes` are build_guide_cache's.
    """
    kind, source = kind_of_guide(guide)
    until, prompts = config.guided_until or config.steps, load_prompts(config)[0]
    if kind == "cache":
        cache = load_guide_cache(source, config, config.guided_until, config.is_correction)
        until = cache.until
    elif kind == "texts":
        cache = guide_of_texts(source, config, until)
    else:
        # a guide that is no checkpoint of a run has step 0, and guides to the end
        until = config.guided_until or checkpoint_state(source)["step"] or config.steps
    if until < first_step:
        raise UsageError(
            f"--guide {guide}: has no step to guide, from step {first_step} until step "
            f"{until}; take a later checkpoint, or a larger --guided-until"
        )
    rows = rows_of_steps(config, first_step, until)
    if kind == "checkpoint":
        build_guide_cache(path, config, source, rows, until, config.slots, sampler, processes)
        cache = load_guide_cache(path, config, config.guided_until, config.is_correction)
    reach = cache.reach(prompts, rows, first_step, until)
    if config.guide and reach.startswith("0 "):
        remedy = {
            "checkpoint": "take a later one, or more --guide-samples",
            "cache": "was it made with another --seed, or for other steps? Give its checkpoint: "
            "the answers are made anew",
            "texts": f"it has {cache}",
        }
        raise UsageError(f"--guide {guide}: has right answers to {reach}; {remedy[kind]}")
    tqdm.write(f"{source if config.guide else path}: {cache}; answers to {reach}")
    return cache


def main(config: NPOConfig) -> None:
    intervene(config, Path(config.out))
    report(config.out, "NPO")


if __name__ == "__main__":
    command_line(NPOConfig, main)
