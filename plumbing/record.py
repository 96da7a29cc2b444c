"""Every rollout of a step: rollouts/step_000012.parquet, for the first --rollouts prompts of it.

A row for each answer that was trained on or displaced. Columns are TRL's first, then ours. After a
rollback (AutoNPO's) a step is taken again: its file is then step_000012_rollback1.parquet, beside
the one that was undone.
"""

import itertools
import re
from pathlib import Path

from plumbing.files import on_disk
from plumbing.rollout import Group


def rollouts_path(out: str | Path, step: int, rollbacks: int = 0) -> Path:
    again = f"_rollback{rollbacks}" if rollbacks else ""
    return Path(out) / "rollouts" / f"step_{step:06d}{again}.parquet"


def drop_rollouts_after(out: Path, last: tuple[int, int]) -> None:
    """Removes those after (rollbacks, step), and what a kill left of one that was being written."""
    for path in out.glob("rollouts/step_*.parquet*"):
        found = re.fullmatch(r"step_(\d{6})(?:_rollback(\d+))?\.parquet(\.tmp)?", path.name)
        if found and (found[3] or (int(found[2] or 0), int(found[1])) > last):
            path.unlink()


def rollout_rows(step: int, groups: list[Group], mixed: list[Group]) -> list[dict]:
    """Of each group what was trained, then the sampled answers that a guide's displaced.

    `slot` is where an answer was sampled; a guide's is that of the answer which it displaced.

    Args:
        groups: as sampled.
        mixed: as trained, the same prompts in the same order.
    """
    rows = []
    for number, (asked, trained) in enumerate(zip(groups, mixed)):
        kept = {id(completion) for completion in trained.completions}
        sampled = {id(completion): slot for slot, completion in enumerate(asked.completions)}
        freed = [slot for key, slot in sampled.items() if key not in kept]
        free = itertools.chain(freed, itertools.count(len(sampled)))
        slots = [
            (sampled[id(c)] if id(c) in sampled else next(free), c, True)
            for c in trained.completions
        ]
        slots += [(slot, asked.completions[slot], False) for slot in freed]
        for slot, c, is_trained in slots:
            rows.append(
                {
                    "step": step,
                    "prompt": asked.prompt.question,
                    "completion": c.text,
                    "reward": c.reward,
                    "advantage": c.advantage if is_trained else None,
                    "group": number,
                    "prompt_id": asked.prompt.id,
                    "gold": asked.prompt.gold,
                    "slot": slot,
                    "trained": is_trained,
                    "source": c.source,
                    "accuracy": c.accuracy,
                    "finished": c.finished,
                    "token_ids": c.token_ids,
                    "logprobs": c.behavior_logprobs,
                    "ratios": c.ratios if is_trained else None,
                }
            )
    return rows


def write_rollouts(path: Path, rows: list[dict]) -> None:
    """In one act: a kill leaves all of the file or nothing."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    parquet.write_table(pyarrow.Table.from_pylist(rows), aside)
    on_disk(aside)
    aside.rename(path)
