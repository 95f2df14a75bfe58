"""Markdown on a terminal while it is being written."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

_REDRAWN_EVERY = 0.1  # seconds
_THINK, _THOUGHT = "<think>", "</think>"
_ITEM = re.compile(r"\s*([-*+]|\d+[.)])\s")
# HTML stays text: rich would drop it, and with it "<stdio.h>"
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


class StreamedMarkdown:
    """Prints blocks that are complete for good, and redraws the one that is being written. A context manager.

    So a long answer scrolls as text does, and drawing costs the same however long it gets. Text in <think> is dim, and
    not read as Markdown.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._text = ""  # not printed for good yet
        self._thinking = False
        self._above = ""  # the block printed last
        self._drawn = 0.0

    def add(self, piece: str) -> None:
        """Show more text."""
        self._text += piece
        now = time.monotonic()
        if now - self._drawn >= _REDRAWN_EVERY:
            self._print_complete()
            self._live.update(self._block(self._text, last_lines=True), refresh=True)
            self._drawn = now

    def __enter__(self) -> StreamedMarkdown:
        self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._print_complete()
        self._live.stop()
        self._print(self._text)

    def _print_complete(self) -> None:
        text = self._text.lstrip()
        if not self._above and text.startswith(_THINK):
            self._text, self._thinking = text.removeprefix(_THINK), True
        if self._thinking:
            thoughts, end, rest = self._text.partition(_THOUGHT)
            if not end:
                thoughts, _, rest = self._text.rpartition("\n\n")
            self._print(thoughts)
            self._text, self._thinking = rest, not end
        while not self._thinking and (n := _lines_of_first_block(self._text)):
            lines = self._text.splitlines(keepends=True)
            self._print("".join(lines[:n]))
            self._text = "".join(lines[n:])

    def _print(self, text: str) -> None:
        if text.strip():
            self._console.print(self._block(text), end="")
            self._above = text

    def _block(self, text: str, last_lines: bool = False) -> _Block:
        content: RenderableType = Text(text.strip(), style="dim")
        if not self._thinking:
            content = markdown = Markdown("")
            markdown.parsed = _PARSER.parse(text)
        items = _ITEM.match(text) and _ITEM.match(self._above)
        return _Block(content, gap=bool(self._above and not items), last_lines=last_lines)


@dataclass
class _Block:
    """A block of text, below an empty line where there is to be a `gap`; `last_lines`: as many as the screen has."""

    content: RenderableType
    gap: bool
    last_lines: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.content, options, pad=False)
        while lines and _is_blank(lines[0]):
            lines.pop(0)
        while lines and _is_blank(lines[-1]):
            lines.pop()
        if self.gap and lines:
            lines.insert(0, [])
        for line in lines[1 - console.height :] if self.last_lines else lines:
            yield from _trimmed(line)
            yield Segment.line()


def _trimmed(line: list[Segment]) -> list[Segment]:
    """`line` without the spaces that fill it up: a window made narrower would break it."""
    while line and _is_blank(line[-1:]):
        line = line[:-1]
    if line and not (line[-1].style and line[-1].style.bgcolor):
        line = [*line[:-1], Segment(line[-1].text.rstrip(), line[-1].style)]
    return line


def _is_blank(line: list[Segment]) -> bool:
    return all(not s.text.strip() and not (s.style and s.style.bgcolor) for s in line)


def _lines_of_first_block(text: str) -> int:
    """Lines up to the second block, or list item, that has begun; 0 where there is none: the first may still grow."""
    starts = []
    for token in _PARSER.parse(text[: text.rfind("\n") + 1]):
        block = token.level == 0 and token.type not in ("bullet_list_open", "ordered_list_open")
        item = token.level == 1 and token.type == "list_item_open"
        if token.map and (block or item):
            starts.append(token.map[0])
    return starts[1] if len(starts) > 1 else 0
