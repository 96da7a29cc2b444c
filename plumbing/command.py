"""The process: flags in, one clear last line and an exit code out."""

import dataclasses
import errno
import inspect
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

from tqdm import tqdm

import verifier
from plumbing import UsageError
from plumbing.files import LOCK, lock, make_directory, write_aside
from plumbing.fingerprints import fingerprints
from plumbing.own_code import is_function, load_function
from plumbing.settings import MAY_CHANGE_ON_RESUME


def command_line(config_class, entry) -> None:
    """Reads the flags and runs `entry(config)`. What the user can mend ends in one line."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # answers hold characters that a terminal may lack
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    config = None
    try:
        config = read_flags(config_class, sys.modules["__main__"].__doc__)
        config.check()
        if config.dry_run:
            from plumbing import memory

            memory.show(config)
            return
        if config.fresh:
            start_over(config)
        tqdm.write(config.where)
        entry(config)
    except (UsageError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        tqdm.write(f"interrupted; {how_to_resume(config)} resumes")
        raise SystemExit(130) from None
    except OSError as error:
        what, remedy = f"{error.filename}: {error.strerror}", "mend that"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what, remedy = f"no space left on the disk of --out {config.out}", "free some"
        elif not error.filename:
            what = (str(error) or type(error).__name__).splitlines()[0]
        raise SystemExit(
            f"error: {what}; nothing finished is lost: {remedy}, then {how_to_resume(config)} "
            "resumes"
        ) from None


def how_to_resume(config) -> str:
    return "the same command" + (" without --fresh" if config and config.fresh else "")


def read_flags(config_class, description: str | None, arguments: list[str] | None = None):
    """The configuration from the command line, with --help in groups under their headings."""
    import tyro

    helps, groups = flag_comments(config_class), {}
    for field in dataclasses.fields(config_class):
        heading, text = helps[field.name]
        hint = "" if field.default is None else f"(default: {field.default})"
        shown = tyro.conf.arg(help=text, help_behavior_hint=hint)
        flag = (field.name, Annotated[field.type, shown], field.default)
        groups.setdefault(heading, []).append(flag)
    sections = {name: dataclasses.make_dataclass(name, flags) for name, flags in groups.items()}
    every_flag = dataclasses.make_dataclass(
        "Flags", [(n, s, dataclasses.field(default_factory=s)) for n, s in sections.items()]
    )
    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    parsed = tyro.cli(every_flag, description=description, config=markers, args=arguments)
    values = {}
    for section in sections:
        values |= vars(getattr(parsed, section))
    return config_class(**values)


def flag_comments(config_class) -> dict[str, tuple[str, str]]:
    """{field: (heading, help)} from the comments in the source of a class and its bases."""
    found = {}
    for cls in reversed(config_class.__mro__[:-1]):
        heading = "options"
        for line in inspect.getsource(cls).splitlines():
            if alone := re.fullmatch(r"    # (\w+)", line):
                heading = alone[1].lower()
            elif flag := re.fullmatch(r"    (\w+): .*?  # (.+)", line):
                name, text = flag.groups()
                found[name] = (found.get(name, (heading,))[0], text)
    return found


def open_directory(config, out: Path) -> None:
    """Makes the directory, or checks that it holds a run of the same configuration, data, model.

    From then on no other process writes there, and answers are paid by --reward.
    """
    if config.reward:
        verifier.reward = load_function("--reward", config.reward, "prompt", "completion")
    mine, theirs = json.loads(json.dumps(dataclasses.asdict(config))), stored_config(out)
    make_directory(out)
    inside = {path.name for path in out.iterdir()} - {"config.json.tmp", LOCK}
    if theirs is None and inside:
        raise UsageError(f"--out {out}: holds files but no run; choose another directory")
    lock(out)
    known = out / "fingerprints.json"
    written = {path.name.removesuffix(".tmp") for path in out.rglob("*") if path.is_file()}
    begun = written - {LOCK, "config.json", "code.diff", known.name}  # else all may change
    if begun:
        differ = differing(theirs, mine)
        differ = {name: both for name, both in differ.items() if name not in MAY_CHANGE_ON_RESUME}
        if "steps" in differ and type(theirs["steps"]) is int and theirs["steps"] < mine["steps"]:
            del differ["steps"]  # a run may go on for longer
        moved = {"dataset"} if known.is_file() else set()  # the same data by another path may go on
        if differ.keys() - moved or theirs.keys() != mine.keys():
            raise another_run(out, differ)
    prints = fingerprints(config)
    if begun and (differ := differing(stored_json(known), prints)):
        raise another_run(out, differ)
    write_aside(out / "config.json", json.dumps(mine, indent=2) + "\n")
    write_aside(known, json.dumps(prints, indent=2) + "\n")
    keep_code(config, out, bool(begun))


def keep_code(config, out: Path, begun: bool) -> None:
    """Writes code.diff: the commit, what differs from it, and the files of --reward and --dataset.

    Tells a run that goes on with other code. Without git the commit is left out.
    """

    def git(*words: str) -> str:
        here = {"cwd": Path(__file__).parent.parent, "capture_output": True, "text": True}
        return subprocess.run(["git", *words], **here).stdout if shutil.which("git") else ""

    commit, path = git("rev-parse", "HEAD"), out / "code.diff"
    before = path.read_text() if path.is_file() else ""
    now = f"commit {commit}{git('diff', 'HEAD', '--', '*.py')}" if commit else ""
    for spec in filter(is_function, (config.reward or "", config.dataset)):
        file = Path(spec.rpartition(":")[0])
        now += f"--- {file}\n{file.read_text()}"
    if now and not before.endswith(now):
        write_aside(path, before + now)
        if begun:
            tqdm.write(f"{out}: goes on with other code than it began with; code.diff has both")


def differing(theirs: dict, mine: dict) -> dict[str, tuple]:
    return {n: (theirs[n], value) for n, value in mine.items() if theirs.get(n, value) != value}


def another_run(out: Path, differ: dict[str, tuple]) -> UsageError:
    values = (f"{name} {there} there and {here} here" for name, (there, here) in differ.items())
    return UsageError(
        f"--out {out}: holds a run with another configuration "
        f"({', '.join(values) or 'of another method or version'}); choose another --out, "
        "or start over with --fresh"
    )


def stored_config(out: Path) -> dict | None:
    """The configuration of the run in a directory; a model's config.json is none."""
    stored = stored_json(Path(out) / "config.json")
    return stored if "prompts_per_step" in stored else None


def stored_json(path: Path) -> dict:
    """The object in a file; none of its names if there is no file."""
    try:
        stored = json.loads(path.read_text()) if path.is_file() else {}
        if not isinstance(stored, dict):
            raise ValueError("it is no object")
        return stored
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: is not JSON ({error}); mend it, or choose another --out"
        ) from error


def start_over(config) -> None:
    """--fresh: the run in --out becomes --out.old, or .old1 and so on: nothing is removed."""
    out = Path(config.out).resolve()
    if stored_config(out) is None:
        return
    for inside in (out, *(path.parent for path in out.rglob(LOCK))):
        lock(inside)  # nobody writes there, nor in its scout
    for flag in ("model", "dataset", "guide", "start"):
        path = Path(getattr(config, flag, None) or ".").resolve()
        if out == path or out in path.parents:
            raise UsageError(
                f"--fresh: --{flag} {getattr(config, flag)} lies in --out {out}, "
                "the run that would be moved away"
            )
    names = (f"{out.name}.old{number or ''}" for number in itertools.count())
    out.rename(next(out.with_name(name) for name in names if not out.with_name(name).exists()))
