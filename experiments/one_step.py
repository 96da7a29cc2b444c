"""docs/one_step.md: one guided step of the main job, seen closely, with the numbers of a real run.

    python -m experiments.one_step    # about three minutes on one core

It makes scout and guide cache of `python npo.py` in experiments/runs/one_step/COMMIT (the same
command resumes there), replays up to the first *telling* group, and takes that step three times
from the same weights and moments. The numbers go to experiments/replaced_slot.json; the page,
docs/figures/method.svg and README.md's table of the slot are written from it.
"""

import copy
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import torch

import npo
import verifier
from experiments.method_figure import method_figure
from experiments.runs import HERE, ROOT, RUNS, commit
from experiments.sections import table
from grpo import clipped_policy_loss, group_advantages, update
from npo import NPOConfig
from plumbing.command import open_directory
from plumbing.model import Policy
from plumbing.rollout import Group
from plumbing.run import Run

SLOT, PAGE = HERE / "replaced_slot.json", ROOT / "docs" / "one_step.md"
TEMPLATE = HERE / "one_step_template.md"
FAR, MOST = 0.05, 4  # a decisive token's p/q differs from 1 by more; how many are shown
LABELS = {"guide": "with the guide", "own": "without it", "no_is": "with it, without IS"}
SILENT = "What changes without it, if anything, comes from AdamW's moments and weight decay alone."
OTHERS = "What changes without it comes from those groups, and from AdamW's moments."


# --------------------------------------------------------------------------------------- the run


def telling(asked: Group, trained: Group) -> bool:
    """The rule: a slot was replaced, and all of the policy's own answers are boxed and wrong."""
    own = asked.completions
    return trained is not asked and all(c.answer is not None and not c.accuracy for c in own)


def replayed(config: NPOConfig, out: Path) -> tuple[Run, int, list[Group], list[Group], int]:
    """npo.py up to the update of the first step with a telling group.

    Returns:
        the run with the policy before that update; the step; its groups before and after slot
        replacement; the place of the telling group among them.
    """
    open_directory(config, out)
    guide = config.guide or npo.go_ahead(config, out / "scout")
    cache = npo.ask_guide(config, guide, 1, out / "guide.jsonl")
    with Run(config, out, None, cache.spent_tokens) as run:
        for step in run.steps():
            groups = run.sample(step)
            verifier.score(groups)
            guides = npo.answers_for(groups, step, cache, run)
            mixed = [npo.replace_slot(g, guide, config.gate) for g, guide in zip(groups, guides)]
            for place, (asked, trained) in enumerate(zip(groups, mixed)):
                if telling(asked, trained):
                    return run, step, groups, mixed, place
            stats = update(run.policy, run.optimizer, mixed, config)
            run.end_step(step, groups, stats, mixed)
    raise SystemExit(f"error: {out}: no step has a group of wrong answers and a guide's answer")


def without_is(group: Group) -> Group:
    """As with --no-is-correction: the guide's log-probs are left out, its ratios start at 1."""
    changed = [
        c if c.source == "policy" else replace(c, behavior_logprobs=None) for c in group.completions
    ]
    return replace(group, completions=changed)


@torch.no_grad()
def probabilities(policy: Policy, group: Group, temperature: float) -> list[float]:
    """Of each token of the answer in a group's last slot."""
    logprobs, _ = policy.logprobs([(group.encoded, group.completions[-1].token_ids)], temperature)
    return logprobs[0].exp().tolist()


def three_updates(run: Run, groups: list[Group], mixed: list[Group], place: int) -> dict:
    """How the step on all groups moves the guide's answer: with the guide, without it, without IS.

    Each update changes a copy of policy and optimizer; the run's own stay as they are.
    """
    group, heat = mixed[place], run.config.temperature
    found = {"p": probabilities(run.policy, group, heat), "after": {}, "live": {}}
    for name, batch in zip(LABELS, (mixed, groups, [without_is(group) for group in mixed])):
        policy, optimizer = copy.deepcopy((run.policy, run.optimizer))
        stats = update(policy, optimizer, batch, run.config)
        found["live"][name] = round((1 - stats["frac_reward_zero_std"]) * len(batch))
        found["after"][name] = probabilities(policy, group, heat)
    return found


def measured(config: NPOConfig, out: Path) -> dict:
    """All numbers of the page."""
    run, step, groups, mixed, place = replayed(config, out)
    asked, answer = groups[place], mixed[place].completions[-1]
    return {
        "command": "python npo.py",
        "commit": commit(),
        "step": step,
        "place": place + 1,
        "question": asked.prompt.question.removeprefix("<image>"),
        "gold": asked.prompt.gold,
        "texts": [c.text for c in asked.completions],
        "boxed": [c.answer for c in asked.completions],
        "rewards": [c.reward for c in asked.completions],
        "policy": asked.completions[-1].text,
        "source": answer.source,
        "guide": answer.text,
        "guide_boxed": answer.answer,
        "guide_reward": answer.reward,
        "tokens": run.policy.tokenizer.convert_ids_to_tokens(answer.token_ids),
        "q": [math.exp(value) for value in answer.behavior_logprobs],
    } | three_updates(run, groups, mixed, place)


# -------------------------------------------------------------------------------------- the page


def carried(pieces: list[str]) -> list[bool]:
    """For each token: is it a digit, but not the last, of a total that a carry has changed?"""
    marks, places, total, added = [False] * len(pieces), [], None, None
    for i, piece in enumerate([*pieces, " "]):
        if piece.isdigit():
            places.append(i)
            continue
        if places:  # a number has ended
            if added is not None and total % 10 + added > 9:
                for place in places[:-1]:
                    marks[place] = True
            total, places = int("".join(pieces[place] for place in places)), []
        added = int(piece[2]) if piece.startswith(" +") else None
    return marks


def decisive(ratios: list[float]) -> list[int]:
    """Places of the tokens on which policy and guide differ most: the farthest, at most MOST."""
    far = [place for place, ratio in enumerate(ratios) if abs(ratio - 1) > FAR]
    return sorted(sorted(far, key=lambda place: -abs(math.log(ratios[place])))[:MOST])


def gradient_left(ratios: list[float], advantage: float, config: NPOConfig) -> list[float]:
    """The share of each token's gradient that ratio and clip leave; 1 where the ratio is 1."""
    logprobs = torch.tensor([ratios], dtype=torch.float64).log().requires_grad_()
    given = torch.zeros_like(logprobs), torch.tensor([advantage]), torch.ones_like(logprobs) > 0
    loss, _ = clipped_policy_loss(logprobs, *given, config.clip_low, config.clip_high)
    loss.backward()
    return (logprobs.grad[0].abs() * len(ratios) / abs(advantage)).tolist()


def advantages(rewards: list[float]) -> list[float]:
    return group_advantages(torch.tensor([rewards]))[0].tolist()


def slot_rows(slot: dict, mixed: list[float]) -> list[list[str]]:
    """Slot, answer, reward, advantage without and with the guide, whose answer comes last."""
    own = zip(slot["texts"], slot["rewards"], advantages(slot["rewards"]), mixed)
    rows = [
        [f"{i}", f"`{t}`", f"{r}", f"{a:g}", f"{b:+.3f}"] for i, (t, r, a, b) in enumerate(own, 1)
    ]
    rows[-1][0], rows[-1][-1] = f"{len(rows)}, sampled", "discarded"
    guide = f"`{slot['guide']}`", f"{slot['guide_reward']}", "", f"{mixed[-1]:+.3f}"
    return [*rows, [f"{len(rows)}, the guide's", *guide]]


def page(slot: dict) -> str:
    """All of docs/one_step.md."""
    config, tokens, p, q = NPOConfig(), slot["tokens"], slot["p"], slot["q"]
    rewards, ratios = [*slot["rewards"][:-1], slot["guide_reward"]], [a / b for a, b in zip(p, q)]
    mixed, carries = advantages(rewards), carried(tokens)
    left, chosen = gradient_left(ratios, mixed[-1], config), decisive(ratios)
    columns = [p, *(slot["after"][name] for name in LABELS)]
    told, moved = [], []
    for t in chosen:
        seen = f"`{tokens[t].strip()}` after `{''.join(tokens[max(0, t - 3) : t]).strip()}`"
        clip = "stopped" if left[t] == 0 else "not stopped"
        told.append(
            [seen, f"{p[t]:.4f}", f"{q[t]:.4f}", f"{ratios[t]:.3f}", clip, f"{left[t]:.1%}"]
        )
        moved.append([seen, *(f"{column[t]:.4f}" for column in columns)])
    whole = [math.prod(column) for column in columns]
    moved.append(["the whole answer", *(f"{value:.3g}" for value in whole)])
    moved.append(["the same, times *before*", *(f"{value / whole[0]:.2f}" for value in whole)])
    cards = re.findall(r"\+(\d)", slot["gold"])
    shown = {
        "cards": len(cards),
        "digits": ", ".join(cards),
        "slots": table(
            "slot | answer | reward | A without the guide | A with it",
            slot_rows(slot, mixed),
        ),
        "right": sum(answer == slot["gold"] for answer in slot["boxed"]),
        "count": len(mixed),
        "mean": statistics.fmean(rewards),
        "std": statistics.stdev(rewards),
        "first": mixed[0],
        "last": mixed[-1],
        "length": len(tokens),
        "ratios": " · ".join(f"`{token.strip()}` {r:.3f}" for token, r in zip(tokens, ratios)),
        "most": MOST,
        "far": FAR,
        "chosen": len(chosen),
        "carried": sum(carries[t] for t in chosen),
        "carries": sum(carries),
        "decisive": table("token | p | q | p/q | clip | gradient left", told),
        "limit": 1 + config.clip_high,
        "stopped": left.count(0),
        "groups": config.prompts_per_step,
        "moved": table(" | ".join(["probability of", "before", *LABELS.values()]), moved),
        "without": OTHERS if slot["live"]["own"] else SILENT,
    }
    return TEMPLATE.read_text().format(**slot | shown)


def readme(text: str, slot: dict) -> str:
    """README.md's text with this slot."""
    rows = slot_rows(slot, advantages([*slot["rewards"][:-1], slot["guide_reward"]]))
    own, count = rows[0], len(slot["rewards"])
    short = [f"1 to {count - 1}", "wrong answers in a box", f"{own[2]} each", "", f"{own[4]} each"]
    cells = [[*row[:3], row[4]] for row in (short, *rows[-2:])]
    shown = f"""One replaced slot of its step {slot["step"]}, where
all {count} answers are wrong ([seen closely](docs/one_step.md)):

{table("slots | answer | reward | advantage", cells)}
"""
    block = re.compile(r"One replaced slot of .*?\n(?=\nWithout the guide)", re.DOTALL)
    return block.sub(lambda _: shown, text)


def main() -> None:
    torch.set_num_threads(1)  # more would round differently
    out = ROOT / RUNS / "one_step" / commit()
    slot = measured(NPOConfig(out=str(out), device="cpu", eval_every=1000), out)
    SLOT.write_text(json.dumps(slot, indent=1) + "\n")
    PAGE.write_text(page(slot))
    (ROOT / "docs" / "figures" / "method.svg").write_text(method_figure())
    (ROOT / "README.md").write_text(readme((ROOT / "README.md").read_text(), slot))


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
