import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two tests at a time on two cores

import cards  # noqa: E402
import tasks  # noqa: E402
from policy import Completion, Group, Inputs, Policy  # noqa: E402

SMALL = ["--prompts-per-step", "2", "--group-size", "4", "--eval-prompts", "4", "--eval-samples", "1", "--eval-every", "2",
         "--save-every", "2", "--max-new-tokens", "40", "--micro-batch-size", "8"]  # fmt: skip


@pytest.fixture(scope="session")
def base() -> Policy:
    """The tiny base, for tests that do not change it."""
    return Policy(cards.BASE, device="cpu")


@pytest.fixture
def fresh() -> Policy:
    return Policy(cards.BASE, device="cpu")


@pytest.fixture(scope="session")
def prompts() -> tasks.PromptSet:
    return tasks.load_prompts("cards")[0]


@pytest.fixture
def command():
    """Runs `python SCRIPT FLAGS…` from the repository root."""

    def run(*words, check: bool = True, **options) -> subprocess.CompletedProcess:
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, **options)
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    return run


def cards_file(path: Path, count: int, changes: dict[int, dict] | None = None) -> None:
    """Cards as a data set in geometry3k's schema (images, problem, answer), some rows with other values."""
    import datasets

    rows = [{"images": [cards.draw(hand)], "problem": f"<image>{cards.question(hand)}", "answer": str(hand.total)}
            | (changes or {}).get(number, {}) for number, hand in enumerate(cards.hands("train")[:count])]  # fmt: skip
    kinds = datasets.Features(
        images=datasets.List(datasets.Image()), problem=datasets.Value("string"), answer=datasets.Value("string")
    )
    datasets.Dataset.from_list(rows, features=kinds).to_parquet(path)


def group_of(accuracies: list[float], prompt_id: str = "p") -> Group:
    """A group with made-up completions, one token each, whose rewards are 0.1 + 0.9 accuracy."""
    prompt = tasks.Prompt(prompt_id, [], [], "0")
    completions = [
        Completion(prompt_id, [7, i], [-0.5, -0.25], f"answer {i}", True, accuracy=a, reward=0.1 + 0.9 * a)
        for i, a in enumerate(accuracies)
    ]
    return Group(prompt, Inputs([1, 2]), completions)
