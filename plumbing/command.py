"""The process: flags in, one clear last line and an exit code out."""

import dataclasses
import errno
import inspect
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Annotated

from tqdm import tqdm

from plumbing import UsageError
from plumbing.checkpoints import write_aside
from plumbing.settings import MAY_CHANGE_ON_RESUME


def command_line(config_class, entry) -> None:
    """Reads the flags and runs `entry(config)`. What the user can mend ends in one line."""
    config = read_flags(config_class, sys.modules["__main__"].__doc__)
    try:
        config.check()
        if config.dry_run:
            from plumbing import memory

            memory.show(config)
            return
        if config.fresh:
            start_over(config)
        entry(config)
    except (UsageError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        tqdm.write(f"interrupted; {how_to_resume(config)} resumes")
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SystemExit(
            f"error: no space left on the disk of --out {config.out}; nothing finished is lost: "
            f"free some, then {how_to_resume(config)} resumes"
        ) from None


def how_to_resume(config) -> str:
    return "the same command without --fresh" if config.fresh else "the same command"


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
    """Makes the directory, or checks that it holds a run of the same configuration."""
    mine, theirs = json.loads(json.dumps(dataclasses.asdict(config))), stored_config(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError) as error:
        raise UsageError(f"--out {out}: is a file, not a directory; choose another one") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UsageError(f"--out {out}: {error.strerror}; choose another one") from error
    inside = {path.name for path in out.iterdir()} - {"config.json.tmp"}
    if theirs is None and inside:
        raise UsageError(f"--out {out}: holds files but no run; choose another directory")
    written = {path.name for path in out.rglob("*") if path.is_file()}
    if written - {"config.json", "config.json.tmp"}:  # else it never began: all may change
        differ = [
            name
            for name in mine
            if name not in MAY_CHANGE_ON_RESUME and theirs.get(name, mine[name]) != mine[name]
        ]
        if "steps" in differ and theirs["steps"] < mine["steps"]:
            differ.remove("steps")  # a run may go on for longer
        if differ or theirs.keys() != mine.keys():
            values = (f"{name} {theirs[name]} there and {mine[name]} here" for name in differ)
            raise UsageError(
                f"--out {out}: holds a run with another configuration "
                f"({', '.join(values) or 'of another method or version'}); choose another --out, "
                "or start over with --fresh"
            )
    write_aside(out / "config.json", json.dumps(mine, indent=2) + "\n")


def stored_config(out: Path) -> dict | None:
    """The configuration of the run in a directory; a model's config.json is none."""
    path = Path(out) / "config.json"
    try:
        stored = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UsageError(
            f"{path}: is not JSON ({error}); mend it, or choose another --out"
        ) from error
    return stored if isinstance(stored, dict) and "prompts_per_step" in stored else None


def start_over(config) -> None:
    """--fresh: the run in --out becomes --out.old, or .old1 and so on: nothing is removed."""
    out = Path(config.out).resolve()
    if stored_config(out) is None:
        return
    for flag in ("model", "dataset", "guide", "start"):
        path = Path(getattr(config, flag, None) or ".").resolve()
        if out == path or out in path.parents:
            raise UsageError(
                f"--fresh: --{flag} {getattr(config, flag)} lies in --out {out}, "
                "the run that would be moved away"
            )
    names = (f"{out.name}.old{number or ''}" for number in itertools.count())
    out.rename(next(out.with_name(name) for name in names if not out.with_name(name).exists()))
