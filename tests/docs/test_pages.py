"""The form of the documentation: short pages, working links of the files outside the site, each figure once."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    page
    for page in sorted(DOCS.rglob("*.md"))
    if page.parent.name != "lab-notes" and page != DOCS / "reference/cli.md"  # made by a script
]
PROSE_WORDS = 600
_NO_PROSE = (
    re.compile(r"^ *```.*?^ *```$", re.M | re.S),
    re.compile(r"<!--.*?-->", re.S),
    re.compile(r"^ *(?:\||#|:::).*$", re.M),  # tables, headings, what mkdocstrings fills in
)


def prose_words(text: str) -> int:
    """Words outside code, comments, tables and headings."""
    for pattern in _NO_PROSE:
        text = pattern.sub("", text)
    return len(text.split())


def rows_of_figures(text: str) -> list[str]:
    """Rows of tables in which at least three cells hold a figure, without headers."""
    body = re.sub(r"^ *\|.*\n(?= *\|---)", "", text, flags=re.M)
    rows = re.findall(r"^ *\|(.*)\|$", body, re.M)
    tidy = (" | ".join(cell.strip() for cell in row.split("|")) for row in rows)
    return [row for row in tidy if sum(bool(re.search(r"\d", cell)) for cell in row.split("|")) >= 3]


def test_what_counts_as_prose() -> None:
    assert prose_words("# A heading\n\nTwo words\n\n| a | table |\n|---|---|\n\n```\ncode here\n```\n") == 2
    header = "| policy | 12.5 % | 25 % | 50 % |\n|---|---|---|---|\n"
    assert rows_of_figures(f"{header}| `lru` | 0.31 | 0.47 | 0.72 |\n| `lfu` | counts | 1 |\n") == [
        "`lru` | 0.31 | 0.47 | 0.72"
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_pages_are_short(page: Path) -> None:
    assert prose_words(page.read_text()) <= PROSE_WORDS


@pytest.mark.parametrize(("name", "words"), [("README.md", 650), ("CONTRIBUTING.md", 220)])
def test_files_of_the_root(name: str, words: int) -> None:
    """They are short, and their links, which the site's builder does not see, lead to files."""
    text = (ROOT / name).read_text()
    assert len(text.split()) <= words
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_figures_are_there_once() -> None:
    """A measured row is on one page; others link to it."""
    where = defaultdict(list)
    for page in sorted(DOCS.rglob("*.md")):
        for row in rows_of_figures(page.read_text()):
            where[row].append(str(page.relative_to(DOCS)))
    assert {row: pages for row, pages in where.items() if len(pages) > 1} == {}
