"""What README.md prints from the code, and the commands it gives."""

import difflib
import importlib
import inspect
import re
from pathlib import Path

import pytest

import grpo
import npo
from plumbing.command import flag_comments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def loop(module) -> list[str]:
    """The lines of a module's `train`, from its `for` on."""
    source = inspect.getsource(module.train)
    return source[source.index("        for step in run.steps()") :].rstrip("\n").split("\n")


def test_the_diff_of_the_loops_is_the_files():
    shown = re.search(r"```diff\n(.*?)\n```", README, re.DOTALL)[1].split("\n")
    real = list(difflib.unified_diff(loop(grpo), loop(npo), lineterm="", n=9))[3:]
    assert shown == real, "\n".join(["print this in README.md:", *real])


def test_the_lines_of_each_file_are_right():
    rows = re.findall(r"^\| \[(\S+)\].* \| (\d+) \|$", README, re.MULTILINE)
    assert len(rows) == 6
    for path, lines in rows:
        assert (path, int(lines)) == (path, len((ROOT / path).read_text().splitlines()))


def commands() -> list[tuple[str, list[str]]]:
    """(module, flags) of each of our commands in README.md and docs/."""
    texts = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
    texts = [text for text in texts if "3a69156" not in text.split("\n## ")[0]]  # frozen
    found = re.findall(r"python (\w+\.py|-m commands\.\w+)([^`|#\n]*)", "\n".join(texts))
    return [(name.removeprefix("-m ").removesuffix(".py"), rest.split()) for name, rest in found]


CONFIGS = {
    "grpo": "GRPOConfig",
    "npo": "NPOConfig",
    "autonpo": "AutoNPOConfig",
    "commands.luffy": "LUFFYConfig",
    "commands.evaluate": "EvaluateConfig",
}


@pytest.mark.parametrize("module, words", [(m, w) for m, w in commands() if m in CONFIGS])
def test_every_flag_that_is_shown_exists(module, words):
    config = getattr(importlib.import_module(module), CONFIGS[module])
    flags = [word.split("=")[0].replace("--no-", "--") for word in words if word[:2] == "--"]
    known = {"--" + name.replace("_", "-") for name in flag_comments(config)}
    assert set(flags) <= known, (module, set(flags) - known)


def test_the_commands_were_found():
    assert {"npo", "grpo", "autonpo", "commands.evaluate"} <= {module for module, _ in commands()}
