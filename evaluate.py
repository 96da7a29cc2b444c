"""Any checkpoint on the paper's eight benchmarks (benchmarks.py), or on the cards world by difficulty.

    python evaluate.py                                                        # the cards world: by cards and carries
    python evaluate.py --model runs/8b/checkpoints/step_000100 --out runs/8b-eval          # all eight, from the hub
    python evaluate.py --model Qwen/Qwen3-VL-8B-Instruct --benchmarks mmstar,mathvista --limit 100 --samples 4
    python evaluate.py --model PATH --data-dir benchmarks                     # benchmarks/mmstar.parquet, benchmarks/mmmu_pro/*.parquet
    python evaluate.py --predictions runs/8b-eval/predictions.jsonl           # scores again, without a model

predictions.jsonl in --out is the truth: a header, then a line an item, with its K answers and all that scoring needs. The same command
resumes it; another --model or sampling asks for another --out. An item that cannot be asked (no image, options that cannot be
read, no gold answer) is counted and shown, never scored as wrong.

Scores are avg@K, the mean over the K answers to each item, in percent, with a 95 % interval over items: 1.96 standard errors (too narrow
for a handful of items), which says nothing of training seeds. Numbers by rule, with our own prompts, are not comparable with
papers': the footnotes say why.
"""

import contextlib
import json
import math
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from tqdm import tqdm

import cards
import verifier
import vllm_sampler
from benchmarks import BENCHMARKS, PAPER, PAPER_ORDER, Malformed, item
from command import command_line, model_path, say
from policy import Policy, whole_model
from run import derived_seed, read_jsonl
from tasks import FILE_TYPES, Prompt, UsageError, fingerprint, load_prompts, open_dataset

PROBE = Prompt("probe", [{"role": "user", "content": [{"type": "text", "text": "Start at 27 and add the cards."}]}], [], "27")


@dataclass
class EvaluateConfig:
    model: str = "cards"  # "cards" (the tiny base in assets/), a hub id, or a checkpoint folder
    benchmarks: str = ""  # as in mmstar,mathvista [cards with model cards, else all eight]
    limit: int = 0  # ask only the first so many of each (questions, or problems where several items count together) [all]
    samples: int = 1  # K answers to each item
    data_dir: str = ""  # local files NAME.parquet, or folders NAME/ of them, instead of the hub
    out: str = ""  # where predictions.jsonl, scores.json and table.md go [runs/evaluate/MODEL; beside --predictions]
    predictions: str = ""  # score this file again instead; no model is loaded
    temperature: float = 1.0  # of sampling, as in training; not specified by the paper
    max_new_tokens: int = 0  # longest answer [64 for cards, else 4096]
    sampler: Literal["auto", "hf", "vllm"] = "auto"  # [vllm on cuda where it is installed, else hf]
    batch_size: int = 0  # answers sampled together; decides the samples, too [64 for cards, else 16; with vllm 256]
    seed: int = 0  # of sampling
    device: str = "auto"  # "cpu", "cuda", "cuda:1" [cuda where there is one]
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the weights [bf16 on cuda, else fp32]

    def __post_init__(self):
        on_cards = self.model == "cards"
        self.out = self.out or str(
            Path(self.predictions).parent if self.predictions else Path("runs/evaluate") / Path(self.model).name
        )
        self.benchmarks = self.benchmarks or ("cards" if on_cards else ",".join(BENCHMARKS))
        self.max_new_tokens = self.max_new_tokens or (64 if on_cards else 4096)
        if self.sampler == "auto":
            here = torch.cuda.is_available() and self.device != "cpu" and vllm_sampler.available()
            self.sampler = "vllm" if here else "hf"
        self.batch_size = self.batch_size or (64 if on_cards else 256 if self.sampler == "vllm" else 16)

    def check(self) -> None:
        """Raises UsageError for the first value that makes no sense."""
        if not self.names():
            raise UsageError(f"--benchmarks {self.benchmarks}: names none; known are cards, {', '.join(BENCHMARKS)}")
        for name in ("samples", "max_new_tokens", "batch_size", "temperature"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")
        if self.limit < 0:
            raise UsageError(f"--limit {self.limit}: must not be negative")
        if unknown := [name for name in self.names() if name not in (*BENCHMARKS, "cards")]:
            raise UsageError(
                f"--benchmarks {self.benchmarks}: no benchmark is called {unknown[0]!r}; known are cards, {', '.join(BENCHMARKS)}"
            )

    def names(self) -> list[str]:
        return [name.strip() for name in self.benchmarks.split(",") if name.strip()]


# ---------------------------------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One line of predictions.jsonl before it is answered."""

    id: str
    unit: str  # what counts together, and the part of it that this is
    part: str
    row: int
    rotation: int = 0


def rows_of(name: str, data_dir: str):
    """The rows of a benchmark, from the hub or from local files; one clear line where they cannot be had."""
    benchmark = BENCHMARKS[name]
    folder = Path(data_dir) / name
    files = sorted(path for path in Path(data_dir).glob(f"{name}.*") if path.suffix in FILE_TYPES)
    shards = sorted(str(path) for path in folder.glob(f"**/{benchmark.split}[-.]*") if path.suffix in FILE_TYPES)
    try:
        if not data_dir:
            rows = open_dataset(benchmark.hub, benchmark.split, benchmark.config)
        elif len(files) == 1:
            rows = open_dataset(str(files[0]), benchmark.split)
        elif (folder / "README.md").is_file():  # a clone of the hub's, which tells configurations and splits there
            rows = open_dataset(str(folder), benchmark.split, benchmark.config)
        elif shards:
            rows = open_dataset(shards, benchmark.split)
        else:
            raise UsageError(f"--data-dir {data_dir}: holds neither one {name}.parquet (or .json, .jsonl, .csv), nor a clone {name}/, nor "
                             f"{name}/{benchmark.split}-*.parquet, for {benchmark.title}")  # fmt: skip
    except UsageError as error:
        if error.__cause__ is None:
            raise
        reason = (str(error.__cause__).strip() or type(error.__cause__).__name__).splitlines()[0]
        where = f"--data-dir {data_dir}" if data_dir else f"the hub, {benchmark.hub}"
        raise UsageError(f"--benchmarks {name}: {benchmark.title}, split {benchmark.split}, cannot be had from {where} ({reason}). With a copy "
                         f"of it give --data-dir, the folder above {name}.parquet or {name}/") from error  # fmt: skip
    try:
        row = without_pictures(rows)[0]
        for read in (benchmark.question, benchmark.options, benchmark.together or str):
            with contextlib.suppress(Malformed):
                read(row)
        _ = [row[column] for column in (benchmark.gold, *benchmark.facts)]
    except (KeyError, IndexError) as error:
        raise UsageError(f"--benchmarks {name}: its rows have no {error}; is this {benchmark.hub}? It has "
                         f"{', '.join(rows.column_names)}") from error  # fmt: skip
    return rows


def without_pictures(rows):
    return rows.remove_columns([column for column, kind in rows.features.items() if "Image" in repr(kind)])


def asked_of(name: str, rows, limit: int) -> list[Asked]:
    """All items to be asked, in order; `limit` counts units."""
    benchmark, found = BENCHMARKS[name], []
    for number, row in enumerate(without_pictures(rows)):  # none needs decoding here
        unit, part = benchmark.together(row) if benchmark.together else (str(number), "")
        found.append((unit, part, number, row))
    units = list(dict.fromkeys(unit for unit, *_ in found))
    kept = set(units[:limit] if limit else units)
    rotated = benchmark.rotate and all(part == "0" for _, part, *_ in found)
    asked = []
    for unit, part, number, row in found:
        turns = max(1, len(benchmark.options(row) or [])) if rotated else 1
        id = f"{name}:{number}:{fingerprint(sorted(row.items()))}"  # another data set's items have other ids
        asked += [Asked(id + (f"/{turn}" if rotated else ""), unit, str(turn) if rotated else part, number, turn)
                  for turn in range(turns) if unit in kept]  # fmt: skip
    return asked


def card_items(limit: int) -> list[tuple[Prompt, dict]]:
    hands = cards.hands("held_out")
    _, prompts = load_prompts("cards")
    return [(prompt, {"benchmark": "cards", "id": prompt.id, "unit": prompt.id, "part": "", "gold": prompt.gold, "choices": None,
                      "facts": {"cards": len(hand.digits), "carries": hand.carries}})
            for prompt, hand in list(zip(prompts, hands))[: limit or None]]  # fmt: skip


def ask(config: EvaluateConfig, name: str, path: Path, sampler) -> None:
    """Appends a benchmark's lines to predictions.jsonl, a batch at a time; batches that are there are not asked again.

    A batch and its seed are the same whether a run was stopped or not, so its answers are, too.
    """
    if name == "cards":
        rows, asked = None, card_items(config.limit)
    else:
        rows = rows_of(name, config.data_dir)
        asked = asked_of(name, rows, config.limit)
    size = max(1, config.batch_size // config.samples)
    batches = [asked[first : first + size] for first in range(0, len(asked), size)]
    ids = [[one[0].id if rows is None else one.id for one in batch] for batch in batches]
    mine = [line for line in read_jsonl(path)[1:] if line["benchmark"] == name]
    done = {line["id"] for line in mine if "id" in line}
    if not mine:
        with open(path, "a") as file:
            file.write(json.dumps({"benchmark": name, "asked": len(asked)}) + "\n")
    if done - {id for some in ids for id in some}:
        raise UsageError(f"--out {config.out}: its predictions for {name} are of another data set; choose another --out")
    with tqdm(total=len(asked), desc=name, unit="item") as bar:
        for number, batch in enumerate(batches):
            if not done.issuperset(ids[number]):
                ready, lines = (batch, []) if rows is None else prepare(name, rows, batch)
                seed = derived_seed(config.seed, "benchmark", name, number)
                prompts = [prompt for prompt, _ in ready]
                sampling = config.samples, config.max_new_tokens, config.temperature, seed
                groups = sampler.sample(prompts, *sampling) if ready else []
                for (_, line), group in zip(ready, groups):
                    lines.append(line | {"responses": [c.text for c in group.completions],
                                         "finished": [c.finished for c in group.completions]})  # fmt: skip
                with open(path, "a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
            bar.update(len(batch))


def prepare(name: str, rows, batch: list[Asked]) -> tuple[list[tuple[Prompt, dict]], list[dict]]:
    """Prompts with their lines; and the lines of items that cannot be asked."""
    ready, malformed = [], []
    for one in batch:
        line = {"benchmark": name, "id": one.id, "unit": one.unit, "part": one.part}
        try:
            prompt, more = item(BENCHMARKS[name], one.id, rows[one.row], one.rotation)
            ready.append((prompt, line | more))
        except Malformed as error:
            malformed.append(line | {"malformed": str(error)})
        except (OSError, Image.DecompressionBombError):  # Pillow's, for what is no picture, or far too large a one
            malformed.append(line | {"malformed": "an image cannot be read"})
    return ready, malformed


def open_predictions(config: EvaluateConfig, path: Path) -> None:
    """Starts predictions.jsonl, or checks that it is of the same model and sampling; drops what a kill left unfinished."""
    kept = ("model", "sampler", "samples", "temperature", "max_new_tokens", "batch_size", "limit", "seed")
    files = sorted(Path(model_path(config)).glob("*.safetensors"))  # a checkpoint that was trained anew has the same path
    header = {name: getattr(config, name) for name in kept}
    header["weights"] = (
        fingerprint((file.name, file.stat().st_size, int(file.stat().st_mtime)) for file in files) if files else None
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = read_jsonl(path) or [header]
    if differ := [key for key in header if lines[0].get(key) != header[key]]:
        there = ", ".join(f"{key} {lines[0].get(key)} there and {header[key]} here" for key in differ)
        raise UsageError(f"--out {config.out}: holds predictions of another run ({there}); choose another --out")
    aside = path.with_name(path.name + ".tmp")
    aside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    aside.rename(path)


# ---------------------------------------------------------------------------------------------------------------------
# What it scores
# ---------------------------------------------------------------------------------------------------------------------


def score(name: str, lines: list[dict]) -> dict:
    """A benchmark's scores from its lines: {"", and what else its rule gives: [mean, half width]} in percent, and counts."""
    benchmark, units, malformed, reasons = BENCHMARKS[name], {}, set(), {}
    asked = [line for line in lines if "responses" in line]
    for line in lines:
        if "malformed" in line:
            malformed.add(line["unit"])
            reasons[line["malformed"]] = reasons.get(line["malformed"], 0) + 1
    for line in asked:
        units.setdefault(line["unit"], []).append(line)
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:  # what takes time is math-verify, a process for each thread
        rights = pool.map(lambda line: [benchmark.right(line, response) for response in line["responses"]], asked)
        rights = list(tqdm(rights, f"scoring {name}", len(asked), delay=3, unit="item"))
    verdicts_of = {line["id"]: right for line, right in zip(asked, rights)}
    means = {}  # score -> a value for each unit, mean over the K answers
    for unit, parts in units.items():
        if unit in malformed or len(parts) < benchmark.parts(unit, parts[0]["choices"]):
            malformed.add(unit)
            continue
        verdicts = {line["part"]: verdicts_of[line["id"]] for line in parts}
        samples = [benchmark.score(dict(zip(verdicts, answers))) for answers in zip(*verdicts.values())]
        for key in samples[0]:
            means.setdefault(key, []).append(statistics.fmean(sample[key] for sample in samples))
    answers = [response for line in asked for response in line["responses"]]
    return {
        "scores": {key: [100 * statistics.fmean(values), half_width(values)] for key, values in means.items()},
        "scored": len(next(iter(means.values()), [])), "malformed": len(malformed), "reasons": reasons,
        "items": sum("id" in line for line in lines), "asked": next((line["asked"] for line in lines if "asked" in line), None),
        "unanswered": sum(verifier.extract_answer(response) is None for response in answers), "answers": len(answers),
        "cut": sum(not finished for line in asked for finished in line["finished"]),
    }  # fmt: skip


def half_width(values: list[float]) -> float | None:
    """Of a 95 % interval of the mean over items, in percent; None of a single one."""
    return 100 * 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def percent(mean: float, half: float | None, digits: int = 2) -> str:
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def table(name: str, found: dict[str, dict]) -> str:
    """The row in the paper's order, beside the paper's, with footnotes."""
    lines = ["| model | " + " | ".join(f"{b.title} [{n}]" for n, b in enumerate(BENCHMARKS.values(), 1)) + " | avg |",
             "|---" * (len(BENCHMARKS) + 2) + "|"]  # fmt: skip
    for row, values in PAPER.items():
        paper = {key: f"{value:.2f}" for key, value in zip(PAPER_ORDER, values)}
        lines.append(f"| paper: {row} | " + " | ".join(paper.get(key, "") for key in (*BENCHMARKS, "avg")) + " |")
    scores = {key: one["scores"][""] for key, one in found.items() if one["scores"]}
    mine = {key: "nothing scored" for key in found} | {key: percent(*value) for key, value in scores.items()}
    if scores.keys() >= set(PAPER_ORDER[:-1]):
        mine["avg"] = f"{statistics.fmean(scores[key][0] for key in PAPER_ORDER[:-1]):.2f}"
    lines.append(f"| {name} | " + " | ".join(mine.get(key, "") for key in (*BENCHMARKS, "avg")) + " |\n")
    lines.append(
        "By rule, with our prompts: not comparable with the paper's rows, whose prompts and judges are not known in full.\n"
    )
    for number, (key, benchmark) in enumerate(BENCHMARKS.items(), 1):
        counts = ""
        if key in found:
            one = found[key]
            extra = "".join(f" ({what}: {percent(*value)})" for what, value in one["scores"].items() if what)
            partial = f"PARTIAL, {one['items']} of {one['asked']} items asked: " if one["items"] != one["asked"] else ""
            counts = f". Here: {partial}{one['scored']} scored{extra}, {one['malformed']} malformed"
            counts += "".join(f" ({count} x {reason})" for reason, count in one["reasons"].items())
            counts += f"; of {one['answers']} answers {one['unanswered']} without a box, {one['cut']} cut"
        lines.append(f"[{number}] {benchmark.title}: {benchmark.note}{counts}.")
    return "\n".join(lines)


def cards_table(lines: list[dict], out: Path) -> tuple[dict, str]:
    """Accuracy in the cards world by number of cards and of carries, in percent, as numbers, as a table, and as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = [
        (line["facts"], statistics.fmean(verifier.is_correct(r, line["gold"]) for r in line["responses"])) for line in lines
    ]
    every = [value for _, value in values]
    found = {"all": [100 * statistics.fmean(every), half_width(every)]}
    text = [f"cards: {percent(*found['all'], 1)} % of {len(values)} hands", ""]
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for axes, fact in zip(panels, ("cards", "carries")):
        groups = {n: [v for facts, v in values if facts[fact] == n] for n in sorted({facts[fact] for facts, _ in values})}
        found[fact] = {n: [100 * statistics.fmean(some), half_width(some)] for n, some in groups.items()}
        text += ["| " + " | ".join([fact, *map(str, groups)]) + " |", "|---" * (len(groups) + 1) + "|",
                 "| hands | " + " | ".join(str(len(some)) for some in groups.values()) + " |",
                 "| accuracy, % | " + " | ".join(percent(*value, 1) for value in found[fact].values()) + " |", ""]  # fmt: skip
        means, halves = zip(*found[fact].values())
        axes.bar(list(groups), means, yerr=[half or 0 for half in halves], capsize=3)
        axes.set(xlabel=f"number of {fact}", xticks=list(groups), ylim=(0, 100))
    panels[0].set_ylabel("held-out accuracy, %")
    figure.savefig(out / "cards.png", dpi=110)
    pyplot.close(figure)
    return found, "\n".join([*text, f"picture: {out / 'cards.png'}"])


def main(config: EvaluateConfig) -> None:
    out = Path(config.out)
    path = Path(config.predictions) if config.predictions else out / "predictions.jsonl"
    if config.predictions:
        if not read_jsonl(path)[1:]:
            raise UsageError(f"--predictions {path}: no such file, or nothing in it")
        out.mkdir(parents=True, exist_ok=True)
    else:
        for name in config.names():
            if name != "cards":
                rows_of(name, config.data_dir)  # what cannot be had is said before anything is asked
        open_predictions(config, path)
        if config.sampler == "vllm":
            model = model_path(config)
            sampler = vllm_sampler.VLLMSampler(whole_model(model), config.max_new_tokens, config.dtype)
            if whole_model(model) != model:  # of adapters: to be merged, not on the card, which vLLM has taken
                merged = Policy(
                    model, "cpu", ("bf16" if torch.cuda.is_available() else "fp32") if config.dtype == "auto" else config.dtype
                )
                sampler.sync(merged, [PROBE], config.temperature)
        else:
            sampler = Policy(model_path(config), config.device, config.dtype)
        for name in config.names():
            ask(config, name, path, sampler)
    header, *lines = read_jsonl(path)
    by_name = {}
    for line in {line.get("id", line["benchmark"]): line for line in lines}.values():  # a batch that a kill cut was asked again
        by_name.setdefault(line["benchmark"], []).append(line)
    found, text = {}, []
    if cards_lines := [line for line in by_name.pop("cards", []) if "id" in line]:
        cards_found, shown = cards_table(cards_lines, out)
        text.append(shown)
    if by_name:
        found = {name: score(name, some) for name, some in by_name.items()}
        text.append(table(header["model"], found))
    found |= {"cards": cards_found} if cards_lines else {}
    (out / "scores.json").write_text(json.dumps({"predictions": str(path), **header, "benchmarks": found}, indent=2) + "\n")
    (out / "table.md").write_text("\n\n".join(text) + "\n")
    say("\n" + "\n\n".join(text))


if __name__ == "__main__":
    command_line(EvaluateConfig, main)
