"""Ctrl-C while C code runs that calls back into Python."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Interruptible(Protocol):
    """Something whose callbacks stop what is going on when `error` is set."""

    error: BaseException | None


@contextmanager
def hold_interrupts(target: Interruptible) -> Iterator[None]:
    """Let Ctrl-C set `target.error` instead of raising KeyboardInterrupt.

    Python raises it at the first line of whatever Python code runs next. That is the callback, before its own `try`
    begins; ctypes prints and drops such an exception, and the C code goes on as if nothing had happened. Does nothing
    where Ctrl-C cannot arrive (another thread) or is not Python's own.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return

    def keep(*_: Any) -> None:
        target.error = target.error or KeyboardInterrupt()

    signal.signal(signal.SIGINT, keep)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
