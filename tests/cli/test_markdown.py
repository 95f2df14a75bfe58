"""Streamed Markdown: what is on the screen in the end, however the text came."""

from __future__ import annotations

import io

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from flashmoe.cli import markdown
from flashmoe.cli.markdown import StreamedMarkdown

WIDTH, HEIGHT = 60, 12
TEXT = """# Title

Some *text* with `code`, and #include <stdio.h> in a line that is longer than the screen is wide.

1. first
   and more of it
2. second

   with a paragraph
3. third

- x
- y

| a | b |
|---|---|
| 1 | 2 |

```python
def f(x):
    return x
```

> quote

Last.
"""
SHOWN = """\
Title

Some text with code, and #include <stdio.h> in a line that
is longer than the screen is wide.

1 first and more of it
2 second
with a paragraph
3 third
• x
• y

a  b
────
1  2


def f(x):
return x


▌ quote

Last."""


@pytest.fixture(autouse=True)
def always_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "_REDRAWN_EVERY", 0.0)


def screen(pieces: list[str], height: int = HEIGHT) -> list[str]:
    """What a terminal shows after `pieces`, with what has scrolled away."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=WIDTH, height=height)
    with StreamedMarkdown(console) as stream:
        for piece in pieces:
            stream.add(piece)
    terminal = pyte.HistoryScreen(WIDTH, height, history=1000)
    pyte.Stream(terminal).feed(out.getvalue().replace("\n", "\r\n"))
    gone = ["".join(line[x].data for x in range(WIDTH)) for line in terminal.history.top]
    return "\n".join(line.strip() for line in [*gone, *terminal.display]).strip().split("\n")


def test_all_of_it() -> None:
    assert screen([TEXT]) == SHOWN.split("\n")


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, len(TEXT)), max_size=60).map(sorted))
def test_in_any_pieces(cuts: list[int]) -> None:
    edges = [0, *cuts, len(TEXT)]
    pieces = [TEXT[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    assert screen(pieces) == SHOWN.split("\n")


def test_block_that_is_taller_than_the_screen() -> None:
    lines = [f"line {n}" for n in range(40)]
    text = "```\n" + "\n".join(lines) + "\n```\nafter\n"
    shown = screen(list(text))
    assert [line for line in shown if line] == [*lines, "after"]


def test_thoughts_are_set_off() -> None:
    text = "<think>\nIs *this* so?\n\nYes.\n</think>\n\nIt *is* so."
    for pieces in ([text], list(text)):
        assert screen(pieces) == ["Is *this* so?", "", "Yes.", "", "It is so."]


def test_nothing_at_all() -> None:
    assert screen([]) == [""]
    assert screen(["", "\n"]) == [""]
