"""Who may evaluate with a model: the process that has loaded it, one thread at a time, until it is closed."""

from __future__ import annotations

import os
import threading

from flashmoe.errors import ClosedError, UsageError


class Access:
    """`alone` is held while the engine's context is used or handed over; `check` says whether it may be used at all."""

    def __init__(self) -> None:
        # not a SafeLock: an evaluation in the main thread is to be interrupted. CPython runs no signal handler between
        # the acquisition of a lock in C by `with` and the block.
        self.alone = threading.RLock()
        self.closed = False
        self._process = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether this process has a copy of a model of another one: its threads and its drive's queue are not here."""
        return os.getpid() != self._process

    def check(self) -> None:
        """Raises UsageError where nothing may be evaluated any more."""
        if self.forked:
            raise UsageError("this model was loaded before the process was forked: load it in this one")
        if self.closed:
            raise ClosedError
