"""One changed file given to its reader, with what it cost."""

from __future__ import annotations

import signal
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from flashmoe.errors import FlashMoEError
from tests.fuzz.targets import Target

MOST_BYTES = 32 << 20  # the files have a few KB to a few hundred
MOST_SECONDS = 10


class Outcome(NamedTuple):
    refused: bool  # else the file was good enough
    peak: int  # bytes allocated at once
    seconds: float


class Hang(BaseException):
    """A reader took longer than it may. No Exception: no reader shall catch it."""


@contextmanager
def _time_limit() -> Iterator[None]:
    def late(_signal: int, _frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(target: Target, data: bytes, folder: Path) -> Outcome:
    """Read `data`. Raises AssertionError for a large allocation or a message of more than a line; whatever the reader
    raises that is no FlashMoEError comes through."""
    path = folder / target.name
    path.write_bytes(data)
    for name, content in target.others.items():
        (folder / name).write_bytes(content)
    refused = False
    tracemalloc.start()
    began = time.perf_counter()
    try:
        with _time_limit(), warnings.catch_warnings(action="error"):
            target.read(path)
    except FlashMoEError as error:
        refused = True
        assert 0 < len(str(error)) < 1000, f"a message of {len(str(error))} characters"  # noqa: PT017
    finally:
        seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_BYTES, f"{peak} bytes allocated"
    return Outcome(refused, peak, seconds)
