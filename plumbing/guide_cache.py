"""The guide cache, guide.jsonl: the guide's verified answers, sampled offline.

A header, then one line per prompt with its pass-rate, the tokens that were sampled for it, and the
right answers that are kept: token ids, EOS included, and the guide's log-probs. A prompt that the
guide does not solve has a line without answers, so the file also measures the guide's quality.
It is whole when it has as many lines as its header says; a file cut short by a kill is continued.
"""

import dataclasses
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

import verifier
from plumbing import UsageError
from plumbing.checkpoints import checked, checkpoint_state
from plumbing.command import stored_config
from plumbing.data import PromptSet, load_prompts
from plumbing.encode import (
    config_of,
    load_tokenizer,
    stop_ids,
    tokenizer_fingerprint,
    vision_token_ids,
)
from plumbing.files import append, is_sealed, json_lines, read_jsonl, seal_of, write_aside
from plumbing.model import Policy
from plumbing.rollout import Completion, EncodedPrompt, Group, Prompt
from plumbing.run import derived_seed, sampled_tokens
from plumbing.vllm_sampler import at_once, sampler_of

VERSION = 3  # of the file's format


@dataclass
class GuideCache:
    """The answers by prompt id, and what they cost. An empty one guides nobody."""

    answers: dict[str, list[Completion]] = field(default_factory=dict)
    until: int = 0  # last step that they guide
    sampled_tokens: int = 0  # for the cache
    header: dict = field(default_factory=dict)  # of the file

    @property
    def spent_tokens(self) -> int:
        """With those of the guide's own training."""
        return self.sampled_tokens + self.header.get("guide_sampled_tokens", 0)

    def answers_to(self, prompt: Prompt, step: int, slots: int = 1) -> list[Completion]:
        """The guide's first `slots` answers to a prompt that are right, paid by this run's reward.

        None after the last guided step.
        """
        kept = self.answers.get(prompt.id, []) if step <= self.until else []
        found = [dataclasses.replace(answer) for answer in kept]  # a prompt may be asked twice
        for answer in found:
            verifier.set_reward(prompt, answer)  # which may judge by a scorer of its own
        return [answer for answer in found if answer.accuracy][:slots]

    def reach(self, prompts: PromptSet, rows: list[int], first: int, last: int) -> str:
        """How many of the prompts of steps `first` to `last`, in `rows`, it can guide."""
        known = [row for row in rows if prompts.id_of(row) in self.answers]
        known = tqdm(known, desc="looking for prompts to guide", delay=3, leave=False)
        have = sum(bool(self.answers_to(prompts[row], first)) for row in known)
        return f"{have} of the {len(rows)} prompts of steps {first}-{last}"

    def __str__(self) -> str:
        solved, prompts = len(self.answers), self.header["prompts"]
        if "skipped" in self.header:  # of texts
            skipped = [f", {count} {reason}" for reason, count in self.header["skipped"].items()]
            return f"a right text for {solved} of {prompts} prompts" + "".join(skipped)
        return (
            f"guide@{self.header['guide_step']} solved {solved} of {prompts} prompts "
            f"({solved / prompts:.0%}) within {self.header['samples']} answers, "
            f"{self.sampled_tokens:,} tokens"
        )


def kind_of_guide(guide: str) -> tuple[str, Path]:
    """What --guide names, by its content: "checkpoint", "cache" or "texts", and where that is.

    Raises:
        UsageError: it is none of them.
    """
    path = Path(guide)
    if stored_config(path) and (path / "guide.jsonl").is_file():
        path = path / "guide.jsonl"  # of a run
    model = {"config.json", "adapter_config.json"} & {p.name for p in path.glob("*config.json")}
    if model and not stored_config(path):
        return "checkpoint", path
    if path.is_file():
        with open(path, "rb") as file:
            first = file.read(1 << 20).lstrip().split(b"\n")[0]
        for word, kind in ((b'"text"', "texts"), (b'"version"', "cache")):
            if word in first:
                return kind, path
    raise UsageError(
        f"--guide {guide}: is no guide; give self, a checkpoint's folder, the directory of a run "
        "with a guide.jsonl, a guide.jsonl, or a .jsonl of answers, lines of "
        '{"row": 7, "text": "..."}'
    )


def guide_of_texts(path: Path, config, until: int) -> GuideCache:
    """Answers that somebody wrote, one or more to a prompt: those that are right guide it.

    A line has "text", and "row" (as the file counts, from 0) or "prompt_id". Nobody recorded
    log-probs, so the ratios start at 1.
    """
    prompts, tokenizer = load_prompts(config)[0], load_tokenizer(config.model_path)
    places = {prompts.id_of(place): place for place in range(len(prompts))}
    end, answers, skipped = stop_ids(config.model_path, tokenizer)[0], {}, Counter()
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    for number, text in enumerate(tqdm(lines, desc=f"reading {path}", delay=3), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            said, row = line["text"], line.get("row")
            id = line.get("prompt_id", f"{prompts.fingerprint}:{row}")
            ids = tokenizer(said, add_special_tokens=False).input_ids + [end]
            prompt = prompts[places[id]] if id in places else None
        except (ValueError, TypeError, KeyError) as error:
            wanted = 'a line is {"row": 7, "text": "..."}'
            raise UsageError(f"--guide {path}: line {number}: {error!r}; {wanted}") from error
        if prompt is None:
            skipped["to no training prompt"] += 1
        elif len(ids) > config.max_new_tokens:
            skipped["longer than --max-new-tokens"] += 1
        elif {*tokenizer.all_special_ids} & {*ids[:-1]}:
            skipped["with a special token"] += 1
        else:
            answer = Completion(id, ids, None, said, True, source="guide")
            verifier.score([Group(prompt, EncodedPrompt([]), [answer])])
            if answer.accuracy:
                answers.setdefault(id, []).append(answer)
            else:
                skipped["wrong"] += 1
    return GuideCache(answers, until, 0, {"prompts": len(prompts), "skipped": skipped})


def build_guide_cache(
    path: Path,
    config,
    guide: str | Path,
    rows: list[int],
    until: int,
    keep: int = 1,
    sampler=None,
    processes=None,
) -> None:
    """Lets the guide answer the prompts in `rows`; a file that a kill cut short is continued.

    Args:
        rows: of the training prompts.
        until: the last step that the answers guide.
        keep: how many right answers to a prompt are kept, the first ones sampled.
        sampler: what samples for the guide, if it is loaded already.
        processes: accelerate's Accelerator, where several processes sample together and call this.
            All of them see the file; the main one writes it.
    """
    writes = processes is None or processes.is_main_process
    prompts, _ = load_prompts(config)
    state, own = checkpoint_state(guide), cache_fingerprints(config)
    theirs = tokenizer_fingerprint(load_tokenizer(guide))
    if theirs != own["tokenizer"]:
        raise UsageError(
            f"--guide {guide}: its tokenizer ({theirs}) is not that of the policy {config.model} "
            f"({own['tokenizer']}), so its token ids mean other words; take a checkpoint of the "
            "same model"
        )
    header = {
        "version": VERSION,
        **own,
        "guide_step": state["step"],
        "guide_sampled_tokens": state["sampled_tokens"],
        "until": until,
        "prompts": len(rows),
        "samples": config.guide_samples,
        "keep": keep,
        "temperature": config.temperature,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
    }
    header["seal"] = seal_of(header, rows)
    lines = read_jsonl(path)
    if lines[:1] != [header] or len(lines) > 1 + len(rows):
        lines = [header]
    if len(lines) == 1 + len(rows):
        return  # it is whole
    count = config.guide_samples
    size = max(1, at_once(config, config.prompts_per_step * count) // count)  # prompts
    done = (len(lines) - 1) // size * size  # whole batches
    if writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, json_lines(lines[: 1 + done]))
    if sampler is None:
        sampler = sampler_of(Policy(checked(guide), config.device, config.dtype), config, prompts)
    name = f"guide@{state['step']} answers {config.guide_samples} times"
    with tqdm(total=len(rows), initial=done, desc=name, disable=not writes) as bar:
        for first in range(done, len(rows), size):
            asked = [prompts[row] for row in rows[first : first + size]]
            seed = derived_seed(config.seed, "guide", first)
            groups = sampler.sample(asked, count, config.max_new_tokens, config.temperature, seed)
            verifier.score(groups)
            some = zip(rows[first:], groups)
            if writes:
                append(path, [line_of(row, group, state["step"], keep) for row, group in some])
            bar.update(len(groups))
    if config.sampler == "vllm":
        sampler.sleep()  # whatever is loaded next has the GPU's memory
    if processes:
        processes.wait_for_everyone()  # until it is written


def line_of(row: int, group: Group, guide_step: int, keep: int) -> dict:
    name = f"guide@{guide_step}" if guide_step else "guide"  # of no run's checkpoint
    source = {"source": name, "exact": True}  # its recorded log-probs are its own
    line = {
        "row": row,
        "prompt_id": group.prompt.id,  # another row's, if this one's picture is broken
        "pass_rate": group.pass_rate,
        "sampled_tokens": sampled_tokens([group]),
        "answers": [asdict(c) | source for c in group.verified[:keep]],
    }
    return line | {"seal": seal_of(line)}


def load_guide_cache(
    path: str | Path, config, until: int | None = None, with_logprobs: bool = True
) -> GuideCache:
    """Reads a guide cache that was made for this run's prompts and tokenizer.

    Args:
        until: last guided step, where it is not the file's own.
        with_logprobs: False leaves the recorded log-probs out, so that ratios start at 1.
    """
    if not Path(path).is_file():
        raise UsageError(f"guide cache {path}: there is no such file")
    header, *lines = read_jsonl(path) or [{}]
    remedy = "move it away, or give the guide's checkpoint folder as --guide: it will be made anew"
    if (
        header.get("version") != VERSION
        or not {"prompts", "dataset", "tokenizer", "until"} <= header.keys()
    ):
        raise UsageError(f"guide cache {path}: is none of format version {VERSION}; {remedy}")
    if len(lines) != header["prompts"]:
        raise UsageError(
            f"guide cache {path}: cut short, {len(lines)} of {header['prompts']} prompts; {remedy}"
        )
    for what, value in cache_fingerprints(config).items():
        if header[what] != value:
            raise UsageError(
                f"guide cache {path}: made for another {what} ({header[what]}; this run has "
                f"{value}); {remedy}"
            )
    prompts, shape = load_prompts(config)[0], config_of(config.model_path)
    known = {f"{prompts.fingerprint}:{row}" for row in prompts.kept}
    tokens = {*range(shape.get_text_config().vocab_size)} - {*vision_token_ids(shape)}
    answers, rows = {}, []
    for number, line in enumerate(lines, 2):
        try:
            answers[line["prompt_id"]] = answers_of(line, known, tokens, config.max_new_tokens)
            rows.append(line["row"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"guide cache {path}: line {number} is damaged ({error}); {remedy}"
            ) from error
    if len({*rows}) < len(rows) or not is_sealed(header, rows):
        raise UsageError(
            f"guide cache {path}: its header was changed, or whose answers they are; {remedy}"
        )
    cost = sum(line["sampled_tokens"] for line in lines)
    answers = {prompt_id: found for prompt_id, found in answers.items() if found}
    if not with_logprobs:
        for answer in (answer for of_prompt in answers.values() for answer in of_prompt):
            answer.behavior_logprobs = None
    return GuideCache(answers, until or header["until"], cost, header)


def answers_of(line: dict, known: set[str], tokens: set[int], longest: int) -> list[Completion]:
    """The answers in a line, once it is sure that they were sampled, verified and not changed.

    Args:
        known: ids of prompts.
        tokens: ids that can be sampled.
        longest: the most tokens in an answer.
    """
    prompt_id, found = line["prompt_id"], [Completion(**answer) for answer in line["answers"]]
    if prompt_id not in known:
        raise ValueError(f"prompt {prompt_id} is unknown")
    for answer in found:
        ids, logprobs = answer.token_ids, answer.behavior_logprobs
        if not 0 < len(ids) <= longest:
            raise ValueError(f"an answer of {len(ids)} tokens, with --max-new-tokens {longest}")
        if not all(type(id) is int and id in tokens for id in ids):
            raise ValueError("a token id that is never sampled")
        if len(logprobs) != len(ids) or not all(-math.inf < value <= 0 for value in logprobs):
            raise ValueError("log-probs that are not one per token, finite and at most 0")
        if (answer.prompt_id, answer.accuracy, answer.finished) != (prompt_id, 1, True):
            raise ValueError("an answer that is not a right one to its prompt")
        if not math.isfinite(answer.reward):
            raise ValueError(f"the reward {answer.reward}")
    if not is_sealed(line) or line["sampled_tokens"] < sum(len(c.token_ids) for c in found):
        raise ValueError("it was changed")
    return found


def cache_fingerprints(config) -> dict[str, str]:
    """What a cache and a run must share, so that its token ids answer this run's prompts."""
    prompts, _ = load_prompts(config)
    tokenizer = load_tokenizer(config.model_path)
    return {"dataset": prompts.fingerprint, "tokenizer": tokenizer_fingerprint(tokenizer)}
