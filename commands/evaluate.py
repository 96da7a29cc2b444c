"""A checkpoint on the paper's eight benchmarks, an embedded world by difficulty, or your data.

    python -m commands.evaluate  # the cards world's base, by number of cards and carries
    python -m commands.evaluate --model runs/npo/checkpoints/step_000100 --benchmarks cards
    python -m commands.evaluate --model Qwen/Qwen3-VL-8B-Instruct --benchmarks mmstar --limit 100
    python -m commands.evaluate --model PATH --data-dir DATA  # DATA/mmstar.parquet and so on
    python -m commands.evaluate --model PATH --benchmarks my.jsonl  # all rows, asked as npo.py asks

These numbers are not comparable with those of papers. Our prompts are our own, and every answer is
judged by rule, while MathVista, MathVerse and MMBench are officially scored with the help of a
language model. For comparable numbers use lmms-eval, in an environment of its own. The paper's rows
are printed beside ours, labelled "paper", for orientation only.

predictions.jsonl in --out gets one line per item: its K answers and what they are judged by. The
same command resumes an interrupted evaluation; once everything is answered it only scores, without
loading a model. Items that cannot be asked (an unreadable image, no gold answer) are counted, and
are not scored as wrong.

avg@K is the mean over the K answers to each item and then over items, pass@K the share of items
with at least one right answer (the unbiased estimator of Chen et al., arXiv 2107.03374, for k = K).
The interval is 1.96 standard errors over items; it says nothing about seeds of training.
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import verifier
from commands.benchmarks import BENCHMARKS, EIGHT, PAPER, Item, all_right, items_of
from plumbing import Unusable, UsageError, vllm_sampler
from plumbing.checkpoints import checked
from plumbing.command import command_line
from plumbing.data import dataset_prompts, world_prompts
from plumbing.encode import image_parts, load_tokenizer, special_token
from plumbing.files import append, json_lines, lock, make_directory, read_jsonl, write_aside
from plumbing.lora import base_model_of
from plumbing.model import Policy
from plumbing.own_code import is_function
from plumbing.rollout import Prompt, batched
from plumbing.rows import BOXED
from plumbing.run import derived_seed
from plumbing.settings import WORLDS, ModelConfig, within
from plumbing.vllm_sampler import SUBMISSION


@dataclass
class EvaluateConfig(ModelConfig):
    # Data
    benchmarks: str | None = None  # as in mmstar,my.jsonl; or a world [the model's, else eight]
    columns: str = ""  # of a data set of your own, as in npo.py
    instruction: str = BOXED  # what its questions end with
    limit: int | None = None  # the first so many problems of each [all]
    data_dir: str | None = None  # folder of NAME.parquet files or of copies NAME/ [the hub]
    out: str | None = None  # for predictions.jsonl, scores.json, table.md [runs/evaluate/MODEL]
    # Sampling
    samples: int = 1  # K answers to each item
    temperature: float = 1.0  # as in training; that of the paper is not in our sources
    max_new_tokens: int | None = None  # longest answer [worlds 80, else 4096]
    batch_size: int | None = None  # answers at a time [worlds 64, else 16; with vllm 1024]
    seed: int = 0  # of sampling

    dry_run = fresh = False  # of training; `command_line` asks for them

    def __post_init__(self):
        if self.benchmarks is None:
            self.benchmarks = self.model if self.model in WORLDS else ",".join(BENCHMARKS)
        super().__post_init__()
        self.out = self.out or f"runs/evaluate/{Path(self.model).name}"
        if self.max_new_tokens is None:
            self.max_new_tokens = 80 if self.in_world else 4096
        if self.batch_size is None:
            self.batch_size = 64 if self.in_world else SUBMISSION if self.sampler == "vllm" else 16

    @property
    def names(self) -> list[str]:
        named = (name.strip() for name in self.benchmarks.split(","))
        return list(dict.fromkeys(name for name in named if name))

    @property
    def in_world(self) -> bool:
        return all(name in WORLDS for name in self.names)

    def check(self) -> None:
        super().check()
        known = [*WORLDS, *BENCHMARKS]
        unknown = [n for n in self.names if n not in known and not is_own(n)]
        if unknown or not self.names:
            problem = f"no benchmark is called {unknown[0]!r}" if unknown else "names none"
            raise UsageError(
                f"--benchmarks {self.benchmarks}: {problem}; known: {', '.join(known)}, a data "
                "file, a folder, and FILE.py:NAME"
            )
        for name in ("samples", "max_new_tokens", "batch_size"):
            within(self, name, least=1)
        within(self, "temperature", above=0)
        if self.limit is not None:
            within(self, "limit", least=1)


# ---- Asking ---------------------------------------------------------------------------


def is_own(name: str) -> bool:
    """Whether it names a data set of the user's own."""
    return name not in [*WORLDS, *BENCHMARKS] and (is_function(name) or Path(name).exists())


def own_items(name: str, config: EvaluateConfig) -> list[Item]:
    """All rows of a data set, each a prompt as npo.py makes it."""
    parts = load_tokenizer(config.model_path), *image_parts(config.model_path)
    (prompts,) = dataset_prompts(name, config.columns, config.instruction, 0, 0, parts)

    def item(row: int) -> Item:
        id = f"{prompts.fingerprint}:{row}"
        return Item(id, id, "", lambda: prompts.make(id, prompts.rows[row]))

    return [item(row) for row in prompts.kept]


def asked_items(config: EvaluateConfig) -> dict[str, list[Item]]:
    """All items of each benchmark; those beyond --limit are left out later."""
    items = {}
    for name in config.names:
        if name in WORLDS:
            prompts = world_prompts(name, config.borrows, "held_out")
            items[name] = [Item(p.id, p.id, "", lambda p=p: p) for p in prompts]
        elif is_own(name):
            items[name] = own_items(name, config)
        else:
            items[name] = items_of(name, config.data_dir)
    return items


def open_predictions(config: EvaluateConfig, items: dict[str, list[Item]]) -> dict[str, dict]:
    """The lines of predictions.jsonl by the items' ids; starts the file if there is none.

    Raises:
        UsageError: it is of another model, another sampling or another data set.
    """
    path = Path(config.out) / "predictions.jsonl"
    make_directory(path.parent)
    lock(path.parent)
    kept = ("model", "borrow_rate", "samples", "temperature", "max_new_tokens", "seed")
    header = {name: getattr(config, name) for name in kept}
    stored, *lines = read_jsonl(path) or [header]
    differ = [name for name in header | stored if header.get(name) != stored.get(name)]
    differ = differ if lines else []  # nothing was answered yet: the model may have been misspelt
    values = [f"{name} {stored.get(name)} there and {header.get(name)} here" for name in differ]
    known = {item.id for some in items.values() for item in some}
    other = {line["benchmark"] for line in lines if line.get("id") not in known}
    values += [f"another data set for {name}" for name in sorted(other & items.keys())]
    if values:
        raise UsageError(
            f"--out {config.out}: holds other predictions ({', '.join(values)}); "
            "choose another --out"
        )
    # also drops what a kill left of a last line
    write_aside(path, json_lines([header, *lines]))
    return {line["id"]: line for line in lines}


def load_sampler(config: EvaluateConfig) -> Policy | vllm_sampler.VLLMSampler:
    model = checked(config.model_path)
    whole, pictured = base_model_of(model), [name for name in config.names if not is_own(name)]
    if pictured and image_parts(whole)[0] is None:
        raise UsageError(
            f"--benchmarks {pictured[0]}: asks about pictures, and {config.model} reads text only; "
            "give a data set of texts, as in --benchmarks my.jsonl"
        )
    if config.sampler == "hf":
        return Policy(model, config.device, config.dtype)
    engine = vllm_sampler.VLLMSampler(whole, config.max_new_tokens, config.dtype)
    if whole != model:  # adapters are merged on the CPU: vLLM has taken the GPU's memory
        content = [{"type": "text", "text": "Start at 27 and add the cards."}]
        probe = Prompt("probe", [{"role": "user", "content": content}], [], "27")
        engine.sync(Policy(model, "cpu", config.dtype), [probe], config.temperature)
    return engine


def ask(config, name: str, items: list[Item], sampler, lines: dict[str, dict]) -> None:
    """Asks, one batch at a time, and appends a line for each item that has none yet.

    A batch that was interrupted is sampled again as a whole, from its own seed. So the answers are
    the same as without the interruption.

    Args:
        lines: what predictions.jsonl holds, by the items' ids; the new lines are added.
    """
    bar = tqdm(total=len(items), desc=name, unit="item")
    for number, batch in enumerate(batched(items, max(1, config.batch_size // config.samples))):
        missing = {item.id for item in batch} - lines.keys()
        if missing:
            seed = derived_seed(config.seed, "benchmark", name, number)
            new = answers(config, name, batch, sampler, seed)
            new = [line for line in new if line["id"] in missing]
            append(Path(config.out) / "predictions.jsonl", new)
            lines |= {line["id"]: line for line in new}
        bar.update(len(batch))
    bar.close()


def answers(config, name: str, batch: list[Item], sampler, seed: int) -> list[dict]:
    """One line per item: its K answers, or why it cannot be asked."""
    lines, prompts = {item.id: {"benchmark": name, "id": item.id} for item in batch}, []
    for item in batch:
        try:
            prompt = item.prompt()
            if token := special_token(prompt.messages, sampler.tokenizer):
                raise Unusable(f"the special token {token} in its text")
            prompts.append(prompt)
        except Unusable as error:
            lines[item.id]["not_asked"] = str(error)
    sampling = config.samples, config.max_new_tokens, config.temperature, seed
    for group in sampler.sample(prompts, *sampling) if prompts else []:
        lines[group.prompt.id] |= {
            "gold": group.prompt.gold,
            "choices": group.prompt.choices,
            "responses": [completion.text for completion in group.completions],
            "finished": [completion.finished for completion in group.completions],
        }
    return list(lines.values())


# ---- Scoring --------------------------------------------------------------------------


def verdicts(line: dict) -> list[bool]:
    """Whether each of an item's K answers is right; one that was cut off is not."""
    return [
        finished and verifier.is_correct(text, line["gold"], line["choices"])
        for text, finished in zip(line["responses"], line["finished"])
    ]


def score(name: str, items: list[Item], lines: dict[str, dict]) -> tuple[list[list[float]], dict]:
    """The K scores of each unit that could be asked as a whole, and counts for the footnote."""
    rule = BENCHMARKS[name].score if name in BENCHMARKS else all_right
    units, scores = {}, []
    for item in items:
        units.setdefault(item.unit, {})[item.part] = lines[item.id]
    for parts in tqdm(units.values(), f"scoring {name}", delay=3, unit="item"):
        if not any("not_asked" in line for line in parts.values()):
            samples = zip(*map(verdicts, parts.values()))  # K times a verdict on each part
            values = [rule(dict(zip(parts, right))) for right in samples]
            scores += [values] if None not in values else []
    asked = [lines[item.id] for item in items if "not_asked" not in lines[item.id]]
    texts = [text for line in asked for text in line["responses"]]
    return scores, {
        "items": len(units),
        "not_asked": len(units) - len(scores),
        "answers": len(texts),
        "without_box": sum(verifier.extract_answer(text) is None for text in texts),
        "cut_off": sum(line["finished"].count(False) for line in asked),
    }


def summary(scores: list[list[float]]) -> dict:
    """avg@K, half the width of its 95 % interval, and pass@K, in percent; None where undefined."""
    means = [statistics.fmean(values) for values in scores]
    solved = [max(values) == 1 for values in scores]
    half = 1.96 * statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return {
        "avg": 100 * statistics.fmean(means) if means else None,
        "half": None if half is None else 100 * half,
        "pass": 100 * statistics.fmean(solved) if solved else None,
    }


def cell(found: dict, key: str) -> str:
    if found[key] is None:
        return "nothing scored"
    interval = key == "avg" and found["half"] is not None
    return f"{found[key]:.2f}" + (f" ± {found['half']:.2f}" if interval else "")


def table_row(*cells: str) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(model: str, samples: int, found: dict[str, dict]) -> str:
    """Our row beside the paper's, and a footnote for each benchmark."""
    titles = [f"{benchmark.title} [{n}]" for n, benchmark in enumerate(BENCHMARKS.values(), 1)]
    rows = {}
    for name, values in PAPER.items():
        rows[f"paper: {name}"] = dict(zip((*EIGHT, "avg"), (f"{value:.2f}" for value in values)))
    for key in ("avg", "pass") if samples > 1 else ("avg",):
        cells = {name: cell(one, key) for name, one in found.items()}
        eight = [found.get(name, {}).get(key) for name in EIGHT]
        if None not in eight:
            cells["avg"] = f"{statistics.fmean(eight):.2f}"
        rows[f"{model}, {key}@{samples}"] = cells
    lines = [table_row("model", *titles, "avg"), "|---" * (len(BENCHMARKS) + 2) + "|"]
    for label, cells in rows.items():
        lines.append(table_row(label, *(cells.get(name, "") for name in [*BENCHMARKS, "avg"])))
    lines.append("\nBy rule, with our own prompts: not comparable with the paper's rows.\n")
    for number, (name, benchmark) in enumerate(BENCHMARKS.items(), 1):
        note = f"[{number}] {benchmark.title}: {benchmark.note}."
        if one := found.get(name):
            note += (
                f" Here {one['not_asked']} of {one['items']} items could not be asked; of "
                f"{one['answers']} answers {one['without_box']} have no box and {one['cut_off']} "
                "were cut off."
            )
        lines.append(note)
    return "\n".join(lines)


def own_table(name: str, config: EvaluateConfig, scores: list[list[float]]) -> str:
    """A world by number of cards and of carries, the staircase also of borrows; else all in one."""
    samples, hands = config.samples, range(len(scores))
    keys = ("avg", "pass") if samples > 1 else ("avg",)
    titles = [f"{key}@{samples}, %" for key in keys]
    lines = [table_row(name, "prompts", *titles), "|---" * (len(keys) + 2) + "|"]
    groupings = [lambda hand: "all"]
    if name in WORLDS:
        hands = world_prompts(name, config.borrows, "held_out").rows[: len(scores)]
        groupings.append(lambda hand: f"{len(hand.digits)} cards")
        groupings.append(lambda hand: f"{hand.carries} carries")
    if name == "staircase":
        groupings.append(lambda hand: f"{hand.borrows} borrows")
    for label_of in groupings:
        labels = [label_of(hand) for hand in hands]
        for label in sorted({*labels}):
            some = [of_hand for of_hand, its in zip(scores, labels) if its == label]
            cells = [cell(summary(some), key) for key in keys]
            lines.append(table_row(label, len(some), *cells))
    return "\n".join(lines)


def main(config: EvaluateConfig) -> None:
    items = asked_items(config)  # opens all data sets before a model is loaded
    lines = open_predictions(config, items)
    for name, every in items.items():
        units = set(list(dict.fromkeys(item.unit for item in every))[: config.limit])
        items[name] = [item for item in every if item.unit in units]
    if {item.id for some in items.values() for item in some} - lines.keys():
        sampler = load_sampler(config)
        for name, some in items.items():
            ask(config, name, some, sampler, lines)
    found, texts = {}, []
    for name, some in items.items():
        scores, counts = score(name, some, lines)
        found[name] = summary(scores) | counts
        texts += [] if name in BENCHMARKS else [own_table(name, config, scores)]
    if found.keys() & BENCHMARKS.keys():
        texts.append(table(config.model, config.samples, found))
    kept = {"model": config.model, "samples": config.samples, "benchmarks": found}
    write_aside(Path(config.out) / "scores.json", json.dumps(kept, indent=2) + "\n")
    write_aside(Path(config.out) / "table.md", "\n\n".join(texts) + "\n")
    tqdm.write("\n" + "\n\n".join(texts))


if __name__ == "__main__":
    command_line(EvaluateConfig, main)
