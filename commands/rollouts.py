"""One page about one step: every prompt with its picture, every slot with its tokens.

The page is a single HTML file that needs no network and no server. What a model said is shown as
text: nothing of it is ever markup.

    python -m commands.rollouts runs/npo --step 12  # writes runs/npo/rollouts/step_000012.html
    python -m commands.rollouts runs/autonpo --step 140 --rollback 2  # taken after two rollbacks
"""

import base64
import dataclasses
import html
import io
import math
from collections.abc import Iterator
from pathlib import Path

from plumbing import UsageError
from plumbing.command import stored_config
from plumbing.data import load_prompts
from plumbing.encode import load_tokenizer
from plumbing.record import rollouts_path
from plumbing.rollout import Prompt
from plumbing.settings import RunConfig

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem }
article { border-top: 2px solid #888; padding: 0.5rem 0 }
img { max-width: 100%; height: auto }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.2rem 0 }
section { border-left: 6px solid #bbb; margin: 0.5rem 0; padding: 0 0.6rem }
.right { border-color: #2a8c4a } .discarded { opacity: 0.55 } .guide { background: #fff6dd }
small { color: #555 } span { border-radius: 2px }
"""


def page(rows: list[dict], prompts: dict[str, Prompt], tokenizer, title: str) -> str:
    """The HTML text of a step's rows, as plumbing.record writes them."""
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        "<p>Green: right. Yellow: a guide's answer, in place of the faded one above it. A ",
        "token is red where the update found it less likely than who wrote it did (importance ",
        "ratio below 1), and blue where likelier; point at it for the numbers.</p>",
    ]
    for slots in groups.values():
        prompt_id = slots[0]["prompt_id"]
        images = prompts[prompt_id].images if prompt_id in prompts else []
        shown = "".join(f"<p><img src='{picture(image)}' alt=''></p>" for image in images)
        question, gold = (html.escape(slots[0][name]) for name in ("prompt", "gold"))
        parts.append(
            f"<article><small>{html.escape(prompt_id)}</small>{shown}<pre>{question}</pre>"
        )
        parts.append(f"<p>Gold: <code>{gold}</code></p>")
        slots = sorted(slots, key=lambda row: (row["slot"], row["trained"]))
        parts += [section(row, tokenizer) for row in slots]
        parts.append("</article>")
    return "\n".join(parts)


def section(row: dict, tokenizer) -> str:
    """One slot: what it was worth, and its tokens."""
    kind = ["right"] if row["accuracy"] else []
    kind += [] if row["source"] == "policy" else ["guide"]
    kind += [] if row["trained"] else ["discarded"]
    facts = [f"slot {row['slot'] + 1}", row["source"], f"reward {row['reward']:.3g}"]
    facts.append(f"advantage {row['advantage']:+.3f}" if row["trained"] else "discarded")
    facts += [] if row["finished"] else ["cut off"]
    words = html.escape(" · ".join(facts))
    tokens = "".join(spans(row, tokenizer))
    return f"<section class='{' '.join(kind)}'><small>{words}</small><pre>{tokens}</pre></section>"


def spans(row: dict, tokenizer) -> Iterator[str]:
    """The completion's tokens; those that make up one letter of several bytes come together."""
    first, ids = 0, row["token_ids"]
    for last in range(len(ids)):
        text = tokenizer.decode(ids[first : last + 1])
        if text.endswith("\ufffd") and last + 1 < len(ids):
            continue
        notes, color = [], ""
        if row["logprobs"]:
            notes.append(f"log-prob {sum(row['logprobs'][first : last + 1]):.3f}")
        if row["ratios"]:
            ratio = math.prod(row["ratios"][first : last + 1])
            notes.append(f"ratio {ratio:.3f}")
            strength = min(1.0, abs(math.log(max(ratio, 1e-9))))
            hue = "60, 110, 220" if ratio > 1 else "220, 70, 50"
            color = f"background: rgba({hue}, {strength:.2f})"
        yield f'<span title="{", ".join(notes)}" style="{color}">{html.escape(text)}</span>'
        first = last + 1


def picture(image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def prompts_of(config: dict, wanted: set[str]) -> dict[str, Prompt]:
    """{id: prompt} of a run's configuration, without those that its data no longer has."""
    names = {field.name for field in dataclasses.fields(RunConfig)}
    train, _ = load_prompts(RunConfig(**{k: v for k, v in config.items() if k in names}))
    rows = {f"{train.fingerprint}:{row}": place for place, row in enumerate(train.kept)}
    return {id: train[rows[id]] for id in wanted & rows.keys()}


def main(run: Path, /, step: int, rollback: int = 0) -> None:
    """Writes the page of one step.

    Args:
        run: Directory of a run.
        step: Which step.
        rollback: AutoNPO: as taken after so many rollbacks.
    """
    from pyarrow import parquet

    path, config = rollouts_path(run, step, rollback), stored_config(run)
    if config is None or not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.parquet"))
        known = f"there are {there[0]} to {there[-1]}" if there else "it has none; see --rollouts"
        raise SystemExit(f"error: {run}: no rollouts of step {step} ({known})")
    rows = parquet.read_table(path).to_pylist()
    try:
        prompts = prompts_of(config, {row["prompt_id"] for row in rows})
        tokenizer = load_tokenizer(
            RunConfig(model=config["model"], dataset=config["dataset"]).model_path
        )
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
    target = path.with_suffix(".html")
    target.write_text(page(rows, prompts, tokenizer, f"{run}, step {step}"), encoding="utf-8")
    print(target)


if __name__ == "__main__":
    import tyro

    tyro.cli(main, description=__doc__)
