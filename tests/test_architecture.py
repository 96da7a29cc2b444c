"""Where a file belongs and what it may import, so that the five concepts can be read in order."""

import ast
import graphlib
import importlib
import inspect
import re
import tomllib

import pytest
from conftest import ROOT

TOP = {"verifier", "signal_theory", "grpo", "npo", "autonpo"}
PACKAGES = ("plumbing", "worlds", "commands", "experiments")
FILES = {p.stem: p for p in ROOT.glob("*.py")} | {
    f"{name}.{p.stem}": p for name in PACKAGES for p in (ROOT / name).glob("*.py")
}


def imported(path) -> set[str]:
    """Names of modules, our own with their package, also of imports inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: import by full names, as in plumbing.rollout"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & FILES.keys() or {node.module}
    return found


IMPORTS = {name: imported(path) for name, path in FILES.items()}


def forbidden(who: str, allowed: str, what: str = "|".join([*TOP, *PACKAGES, "tests"])) -> list:
    """Imports by modules that match `who`, from `what`, that do not match `allowed`."""
    return [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if re.fullmatch(who, name)
        and re.fullmatch(rf"({what})(\..*)?", other)
        and not re.fullmatch(rf"({allowed})(\..*)?", other)
    ]


def test_the_top_holds_the_five_concepts_alone():
    extra = sorted({p.stem for p in ROOT.glob("*.py")} ^ TOP)
    assert not extra, f"{extra}: a run's machinery goes to plumbing/, a new method to commands/"


def test_verifier_theory_and_worlds_stand_on_their_own():
    parts = r"plumbing\.(notation|sympy_process)"
    found = (
        forbidden("verifier", rf"plumbing$|{parts}")
        + forbidden(parts, "")
        + forbidden(r"worlds\..*", "worlds")
    )
    # only its pictures need a hand, and only once all numbers are there: it is read without them
    found += forbidden("signal_theory", r"plumbing\.figures") + forbidden(r"plumbing\.figures", "")
    assert not found, f"{found}: pass it as an argument, or move it up to what calls it"
    assert "\nfrom plumbing" not in FILES["signal_theory"].read_text(), "import pictures in main"


def test_plumbing_knows_no_method():
    found = forbidden(r"plumbing\..*", "verifier|worlds|plumbing")
    found += forbidden(r"plumbing\.rollout", "")
    assert not found, f"{found}: plumbing takes what it needs of a method as an argument"


def test_imports_run_downwards():
    order = list(graphlib.TopologicalSorter(IMPORTS).static_order())  # CycleError names the circle
    assert {"numpy", "torch"} < set(order)  # so imports were found at all
    found = forbidden("grpo", "", "npo|autonpo") + forbidden("npo", "", "autonpo")
    assert not found, f"{found}: a concept must be readable without what builds on it"


def test_tools_stay_where_they_are():
    found = forbidden(r"(?!commands|experiments).*", "", "commands") + forbidden(".*", "", "tests")
    found += forbidden(r"(?!experiments).*", "", "experiments")
    found += forbidden(r"(?!plumbing\.vllm_sampler).*", "", "vllm")
    known = r"plumbing\.(data|sources|trl_data)|commands\.(benchmarks|evaluate)"
    found += forbidden(f"(?!{known}).*", "", "datasets")
    assert not found, f"{found}: move what is shared to plumbing, and vllm or datasets behind it"


def test_a_model_folders_own_code_never_runs():
    """transformers asks on the terminal, unless it is told no."""
    calls = [
        (name, ast.unparse(node))
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and re.search(r"(Auto\w+\.from_pretrained|\bLLM)$", ast.unparse(node.func))
    ]
    found = [call for call in calls if "trust_remote_code=False" not in call[1]]
    assert len(calls) > 7 and not found, f"{found}: say trust_remote_code=False"


def test_packages_say_what_is_in_them():
    for name in PACKAGES:
        words = ast.get_docstring(ast.parse(FILES[f"{name}.__init__"].read_text()))
        assert words, f"{name}/__init__.py: say in a docstring what belongs here"
    listed = re.findall(r"^(\w+)  ", importlib.import_module("plumbing").__doc__, re.M)
    there = [name.removeprefix("plumbing.") for name in FILES if name.startswith("plumbing.")]
    differ = sorted({*listed} ^ {*there} - {"__init__"})
    assert not differ, f"{differ}: list every file of plumbing/ in its docstring, and no other"


def test_an_installed_copy_has_the_models_of_the_worlds():
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {f"{path.parent.name}/*" for path in (ROOT / "worlds").glob("*/config.json")}
    assert {*found["package-data"]["worlds"]} == there and len(there) == 4


def test_files_are_short_and_mark_where_to_experiment():
    texts = {name: path.read_text() for name, path in FILES.items() if "experiments" not in name}
    long = [name for name, text in texts.items() if len(text.splitlines()) > 400]
    assert not long, f"{long}: over 400 lines; split it by what a reader looks for"
    marks = {name: text.count("# EXPERIMENT HERE") for name, text in texts.items()}
    expected = {"verifier": 1, "grpo": 2, "npo": 1, "autonpo": 2}
    assert {name: count for name, count in marks.items() if count} == expected


FORKED = {
    "npo.replace_slot": "group, guide, gate=0.6",
    "grpo.group_advantages": "rewards",
    "grpo.clipped_policy_loss": "logprobs, old_logprobs, advantages, mask, clip_low=0.2, "
    "clip_high=0.28, num_sequences=None, weights=1.0, num_tokens=None",
    "autonpo.select_rollback": "quality, variance",
    "signal_theory.quality": "distance, alpha",
    "signal_theory.variance": "distance, beta",
    "signal_theory.signal": "quality, variance",
    "signal_theory.optimal_distance": "alpha, beta",
    "signal_theory.second_moment": "p, q",
    "plumbing.rollout.Prompt": "id, messages, images, gold, choices=None, working=None, row=None",
    "plumbing.rollout.Completion": "prompt_id, token_ids, behavior_logprobs, text, finished, "
    "source='policy', exact=True, accuracy=None, reward=None, answer=None, too_dear=False, "
    "advantage=None, ratios=None",
    "plumbing.rollout.Group": "prompt, encoded, completions",
}


@pytest.mark.parametrize(("name", "parameters"), FORKED.items())
def test_what_forks_import_keeps_its_signature(name, parameters):
    module, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(module), attribute)
    found = inspect.signature(thing).parameters.values()
    found = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in found)
    assert found == parameters, f"forks rely on {name}({parameters}); add a new name beside it"
