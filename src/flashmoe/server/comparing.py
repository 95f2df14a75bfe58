"""Compares the hit rate of the last minutes with LRU's and Belady's, by replay, while a client asks."""

from __future__ import annotations

import threading
import time
from typing import Any

from flashmoe.runtime.model import Model
from flashmoe.server.broadcast import Broadcast
from flashmoe.simulate.recent import Comparison, RecentSteps, compare

EVERY_SECONDS = 10.0  # between two comparisons, at least
WANTED_SECONDS = 60.0  # after it was last asked for
SHARE = 0.005  # of a core, while a comparison is under way and tokens are evaluated
_LOOK = 0.05  # seconds between looks whether they still are


class Comparing:
    """Notes what is routed and compares, from the first `look` to a minute after the last one.

    The thread has the priority of all others: it holds Python's lock, which the engine's thread needs, while it works.
    It works for a few milliseconds and then rests 200 times as long, unless nothing is evaluated.
    """

    def __init__(self, model: Model, broadcast: Broadcast) -> None:
        self._model, self._broadcast = model, broadcast
        self._group = model.cache.policy.residency.group.copy()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wanted_until = self._worked = 0.0
        self._latest: Comparison | None = None
        self.advice: dict[str, Any] | None = None  # of a report, as new as the latest comparison

    def look(self) -> Comparison | None:
        """The latest comparison, None where there is none yet; it is kept up to date for a minute."""
        with self._lock:
            self._wanted_until = time.monotonic() + WANTED_SECONDS
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="flashmoe-comparing", daemon=True)
                self._thread.start()
            return self._latest

    def _run(self) -> None:
        steps = RecentSteps(self._model.cache, self._model.catalog.top_k)
        self._broadcast.join(steps)
        seen = None
        while self._wanted():
            blocks = steps.blocks()
            if not blocks or blocks[-1] is seen:
                time.sleep(1)
                continue
            seen = blocks[-1]
            self._worked = time.thread_time()
            residency = self._model.cache.policy.residency
            quota = residency.quota + residency.lent  # a prompt borrows from it
            for found in compare(blocks, quota, self._group):
                self._rest()
                self._latest = found or self._latest
            self.advice = self._model.report(pause=self._rest).advice
            time.sleep(EVERY_SECONDS)
        self._broadcast.leave(steps)

    def _rest(self) -> None:
        end = time.monotonic() + (time.thread_time() - self._worked) / SHARE
        while self._model.cache.stepping and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK))
        self._worked = time.thread_time()

    def _wanted(self) -> bool:
        with self._lock:
            if time.monotonic() < self._wanted_until:
                return True
            self._thread = self._latest = self.advice = None
            return False
