"""A thread that lets a reader go on while nothing else calls it.

A prompt's layer computes for tens of milliseconds, and more reads of the next one are queued by then than a drive's
queue is deep. While single tokens are decoded, reads are few, and a thread would cost more than it brings.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_PAUSE = 0.001  # seconds: a drive reads a few MB meanwhile


class Pump:
    """Calls `step` again and again, from `start` until it says that nothing is left to do."""

    def __init__(self, step: Callable[[], bool]) -> None:
        self._step = step
        self._wanted = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """There is something to do. From one thread at a time."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="flashmoe-pump", daemon=True)
            self._thread.start()
        self._wanted.set()

    def close(self) -> None:
        """End; `step` is not called any more."""
        self._closed = True
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while self._wanted.wait() and not self._closed:
            self._wanted.clear()
            while not self._closed and self._step():
                time.sleep(_PAUSE)
