"""Text of any origin: encodings of files and arguments, and names that every terminal can print."""

from __future__ import annotations

import codecs
import os
import unicodedata
from pathlib import Path
from typing import IO

from flashmoe.common.units import format_bytes
from flashmoe.errors import UsageError

# The longer mark first: UTF-32's begins with UTF-16's
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


MOST_BYTES = 256 << 20  # of a text that a user names: more than any context holds; a device may never end


def read_text(file: IO[bytes], source: str) -> str:
    """The rest of a file, as `decode` reads it. Raises OSError, and UsageError where it is no text or never ends."""
    data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UsageError(f"{source}: texts of more than {format_bytes(MOST_BYTES)} are not read")
    return decode(data, source)


def read_text_file(path: Path, source: str) -> str:
    """The same of a file by name."""
    with open(path, "rb") as file:
        return read_text(file, source)


def decode(data: bytes, source: str) -> str:
    """Text in UTF-8, or in what its byte-order mark says, without the mark. Raises UsageError: `source` is none."""
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at position {error.start}"
        raise UsageError(
            f"{source} is not UTF-8 text ({found}): convert it, for example with iconv -f LATIN1 -t UTF-8"
        ) from None


def argument(text: str, source: str) -> str:
    """What a user has typed as an argument. Where Python could not decode it (another encoding than the locale's, or
    UTF-8 in the locale C), it is UTF-8. Raises UsageError."""
    return decode(os.fsencode(text), source) if _has_surrogates(text) else text


def split_list(text: str) -> list[str]:
    """The items of a comma-separated list, empty ones left out."""
    return [item.strip() for item in text.split(",") if item.strip()]


def printable(name: str) -> str:
    """A name that any terminal shows and any encoder takes: no control characters, no halves of characters."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in name)


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)
