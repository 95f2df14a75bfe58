"""Turning HTML and hard-wrapped text into clean paragraphs."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_BLOCKS = {
    "p",
    "li",
    "dd",
    "dt",
    "h1",
    "h2",
    "h3",
    "h4",
    "blockquote",
    "pre",
    "div",
    "section",
    "body",
    "td",
    "tr",
}
_SKIPPED = {"script", "style", "nav", "table", "head", "footer", "form", "svg"}
_VOID = {"br", "img", "hr", "meta", "link", "input"}
_PLAIN = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": " - ",
        "\u2026": "...",
        "\u00a0": " ",
        "\u2212": "-",
        "\u00b6": "",
        "\u2010": "-",
        "\u2011": "-",
        "\ufeff": "",
    }
)


class _Paragraphs(HTMLParser):
    """Collects the text of block elements; preformatted text keeps its lines."""

    def __init__(self, skipped_classes: tuple[str, ...]) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._parts: list[str] = []
        self._skip: list[str] = []
        self._pre = 0
        self._skipped_classes = skipped_classes

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            self._parts.append(" " if tag == "br" else "")
            return
        classes = (dict(attrs).get("class") or "").split()
        if self._skip or tag in _SKIPPED or any(name in self._skipped_classes for name in classes):
            self._skip.append(tag)
            return
        if tag in _BLOCKS:
            self._flush()
        if tag == "pre":
            self._pre += 1

    def handle_endtag(self, tag: str) -> None:
        if self._skip:
            if tag in self._skip:
                while self._skip and self._skip.pop() != tag:
                    pass
            return
        if tag in _BLOCKS:
            self._flush()
        if tag == "pre":
            self._pre = max(0, self._pre - 1)

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self._parts.append(data)

    def _flush(self) -> None:
        text = "".join(self._parts)
        self._parts = []
        text = text.strip("\n").rstrip() if self._pre else " ".join(text.split())
        if text.strip():
            self.paragraphs.append(text)


def html_paragraphs(html: str, skipped_classes: tuple[str, ...] = ()) -> list[str]:
    """The paragraphs of a page in reading order, navigation and tables left out."""
    parser = _Paragraphs(skipped_classes)
    parser.feed(html)
    parser.close()
    return [plain(text) for text in parser.paragraphs]


def plain(text: str) -> str:
    """Typographic characters as their ASCII likes, so that the small vocabulary is well used."""
    return text.translate(_PLAIN)


def prose(paragraphs: list[str], shortest: int = 60) -> str:
    """Only the paragraphs that look like sentences, joined by blank lines."""
    kept = [text for text in paragraphs if len(text) >= shortest and is_sentence(text)]
    return "\n\n".join(kept)


def is_sentence(text: str) -> bool:
    """True for text that reads like prose: mostly letters, starts like a sentence, ends like one."""
    letters = sum(char.isalpha() or char == " " for char in text)
    return (
        letters > 0.85 * len(text)
        and text[-1:] in ".!?:;\"')"
        and text[:1] in "\"'("
        or (letters > 0.85 * len(text) and text[-1:] in ".!?:;\"')" and text[:1].isalnum())
    )


def unwrap(text: str) -> list[str]:
    """Paragraphs of hard-wrapped text: lines joined, blank lines separating."""
    return [" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if block.strip()]


def mostly_ascii(text: str, share: float = 0.995) -> bool:
    """False for text with many characters outside ASCII."""
    return sum(char < "\x80" for char in text) >= share * max(1, len(text))
