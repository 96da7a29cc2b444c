"""The documents hold together: frozen numbers, links, sizes, and the width of the code."""

import hashlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PRODUCT = [
    path
    for folder in (".", "plumbing", "worlds", "commands")
    for path in ROOT.glob(f"{folder}/*.py")
]
CODE = PRODUCT + [
    path for folder in ("experiments", "tests") for path in (ROOT / folder).rglob("*.py")
]


def table_numbers(text: str) -> list[str]:
    """Every number in the rows of the Markdown tables, in order, as it is written."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [number for row in rows for number in re.findall(r"-?\d[\d.,]*(?:e[+-]?\d+)?", row)]


def prose(text: str) -> str:
    """Markdown without code, which may hold anything."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(text: str) -> set[str]:
    """The headings' anchors, as GitHub makes them; of equal ones the second ends in -1."""
    found = []
    headings = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for heading in re.findall(r"^#+ +(.+?) *$", headings, re.M):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{count}" if (count := found.count(slug)) else slug)
    return set(found)


def broken_links(page: Path) -> list[str]:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text()))
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


def test_results_before_keeps_every_number_of_the_old_tables():
    """Count and digest were computed once, from the README at commit 3a69156."""
    numbers = table_numbers((ROOT / "docs" / "results_before.md").read_text())
    assert len(numbers) == 1674
    digest = hashlib.sha256(" ".join(numbers).encode()).hexdigest()
    assert digest == "69e6962302bb2a060f4aa8eb0ab39ac101695ba82a7adfdcc1551ebbfb1c1e32"


def test_table_numbers():
    text = "1 outside\n| seed 0 | -0.071 [-0.259, 0.118] | 68,623 |\n|---|---|---|\n| 6.13e+18 * |"
    assert table_numbers(text) == ["0", "-0.071", "-0.259,", "0.118", "68,623", "6.13e+18"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not broken_links(page)


def test_broken_links_are_found(tmp_path):
    (tmp_path / "there.md").write_text(
        "# Is `S` what matters?\n## A\n## A\n```\n# no heading\n```\n"
    )
    page = tmp_path / "page.md"
    page.write_text(
        "# Top\n[a](there.md) [b](there.md#is-s-what-matters) [c](#top) [d](https://x.org/y) "
        "[e](there.md#a-1) `[f](gone)`\n```\n[g](gone)\n```\n"
        "[h](gone.md) [i](there.md#no-heading) ![j](figures/k.png) [l](#Top)\n"
    )
    expected = ["gone.md", "there.md#no-heading", "figures/k.png", "#Top"]
    assert broken_links(page) == expected


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 18_000


def test_figures_are_shown_somewhere():
    text = "".join(page.read_text() for page in PAGES)
    unused = [path.name for path in (ROOT / "docs" / "figures").iterdir() if path.name not in text]
    assert unused in ([], ["method.svg"])  # README's


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_is_at_most_100_columns_wide(path):
    text = path.read_text()
    assert not [line for line in text.splitlines() if len(line) > 100]
    assert "fmt: " + "skip" not in text


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400
