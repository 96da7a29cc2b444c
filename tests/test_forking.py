"""docs/forking.md: every diff applies to a copy of the code, and every command runs."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL

PAGE = (ROOT / "docs/forking.md").read_text()
RECIPES = {  # title: its text
    title: text
    for title, text in re.findall(r"^## \d+\. (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.S)


def test_ten_recipes_of_at_most_five_lines():
    assert len(RECIPES) == 10
    for text in RECIPES.values():
        for diff in blocks(text, "diff"):
            assert len(re.findall(r"^\+(?!\+\+ )", diff, re.M)) <= 5


def apply(diff: str, folder) -> None:
    """Each group of "-" lines, which must stand there once, becomes the "+" lines after it."""
    path = folder / re.search(r"^\+\+\+ b/(.+)", diff, re.M)[1]
    text, body = path.read_text(), diff.split("\n", 2)[2]
    for old, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", body, re.M):
        old, new = (re.sub("^[-+]", "", part, flags=re.M) for part in (old, new))
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_runs(title, tmp_path, folder):
    here = tmp_path / "copy"  # of the code alone: a checkout may hold environments and runs
    ignored = shutil.ignore_patterns("__pycache__", "staircase_at")
    for package in ("commands", "experiments", "plumbing", "worlds"):
        shutil.copytree(ROOT / package, here / package, ignore=ignored)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, here)
    for diff in blocks(RECIPES[title], "diff")[-1:]:
        apply(diff, here)
    for code in blocks(RECIPES[title], "python"):
        (here / re.match(r"# ([\w.]+).*\n", code)[1]).write_text(code)
    *before, words = blocks(RECIPES[title], "bash")[-1].splitlines()[0].split(" && ")
    for made in before:
        subprocess.run([sys.executable, *made.split()[1:]], cwd=here, check=True)
    words = words.replace("PATH", str(folder("qwen3"))).replace('"Answer in \\boxed{}."', "Box.")
    script, *flags = words.split()[1:]
    small = dict(zip(SMALL[::2], SMALL[1::2])) | {"--steps": "2"}
    small |= {"--scout-steps": "2"} if script == "npo.py" else {}
    small |= {"--max-new-tokens": "80"} if "worlds/cards_teacher" in flags else {}  # it is wordy
    given = {word for word in flags if word.startswith("--")}
    more = [word for pair in small.items() if pair[0] not in given for word in pair]
    done = subprocess.run(
        [sys.executable, script, *flags, *more], cwd=here, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (out,) = (here / "runs").iterdir()
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and "loss" in last
