"""Imports run downwards only, so that a reader can open the files in the README's order."""

import ast
import re

import pytest
from conftest import ROOT

PLUMBING = {"verifier", "tasks", "command", "large", "policy", "vllm_sampler", "run", "report"}
ALLOWED = {
    "verifier": set(),
    "signal_theory": set(),
    "cards": set(),
    "large": {"tasks"},
    "tasks": {"cards", "verifier"},
    "policy": {"tasks", "large"},
    "memory_plan": {"cards", "tasks", "policy"},
    "command": {"cards", "tasks", "policy", "memory_plan"},
    "vllm_sampler": {"tasks", "policy", "large"},
    "run": {"verifier", "tasks", "command", "large", "policy", "vllm_sampler"},
    "report": {"command", "run"},
    "grpo": PLUMBING,
    "npo": PLUMBING | {"grpo"},
    "autonpo": PLUMBING | {"grpo", "npo", "signal_theory"},
    "baselines": PLUMBING | {"cards", "grpo", "npo"},
    "benchmarks": {"verifier", "tasks"},
    "evaluate": PLUMBING | {"cards", "benchmarks"},
    "npo_trl": PLUMBING | {"npo"},
}


def imported(name: str) -> set[str]:
    tree, found = ast.parse((ROOT / f"{name}.py").read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & ALLOWED.keys()


def test_every_module_is_listed():
    assert {path.stem for path in ROOT.glob("*.py")} == ALLOWED.keys()


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_run_downwards(name):
    assert imported(name) <= ALLOWED[name]


def test_four_edit_points():
    marks = {p.stem: len(re.findall(r"^# EXPERIMENT HERE", p.read_text(), re.M)) for p in ROOT.glob("*.py")}
    assert {name: count for name, count in marks.items() if count} == {"verifier": 1, "grpo": 2, "npo": 1}


def test_one_concept_a_file():
    assert all(len(path.read_text().splitlines()) <= 400 for path in ROOT.glob("*.py"))
