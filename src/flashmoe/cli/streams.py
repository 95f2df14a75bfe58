"""Standard streams as the caller has left them: closed, or in an encoding that does not have every character."""

from __future__ import annotations

import codecs
import os
import re
import sys
from io import TextIOWrapper

from flashmoe.common.text import read_text
from flashmoe.errors import UsageError

_LEAST_SIZE = 20  # of columns: narrower tables lose their text


def prepare() -> None:
    """Call it first: afterwards no character is an error, and a file that is opened is no standard stream."""
    _open_closed_ones()
    _forget_sizes_that_are_none()
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, TextIOWrapper):
            continue
        ascii_only = codecs.lookup(stream.encoding).name == "ascii" and "PYTHONIOENCODING" not in os.environ
        # what the locale C says of encodings is that nothing was said; terminals and files have UTF-8
        stream.reconfigure(
            encoding="utf-8" if ascii_only else None,
            errors="replace" if stream is sys.stdout else "backslashreplace",
        )


def _forget_sizes_that_are_none() -> None:
    """An editor or a serial line may say that it has no columns, and tables would have none either."""
    for name in ("COLUMNS", "LINES"):
        size = os.environ.get(name, "")
        if not re.fullmatch("[0-9]{1,4}", size) or int(size) < _LEAST_SIZE:
            os.environ.pop(name, None)


def read_stdin() -> str:
    """All that there is. Raises UsageError where it is no text, or cannot be read."""
    if not isinstance(sys.stdin, TextIOWrapper):
        return sys.stdin.read()
    try:
        return read_text(sys.stdin.buffer, "standard input")
    except OSError as error:  # opened for writing only, or the terminal of a job in the background
        raise UsageError(f"standard input cannot be read ({error.strerror})") from None


def _open_closed_ones() -> None:
    """Where the caller has closed one, the next file opened would be taken for it, and printed into."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
