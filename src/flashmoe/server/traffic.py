"""Requests in flight: how many run and wait, and how long, whether more are taken, and how they ended."""

from __future__ import annotations

import logging
import math
import time
from asyncio import Task
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flashmoe.server.errors import Refusal, shutting_down

MOST_WAITING = 256  # requests; the backend's queue has no end of its own
BEHIND_SECONDS = 30.0  # a server whose requests wait longer says so in the log,
AGAIN_SECONDS = 60.0  # once in this time
_RETRY_SECONDS = (5, 60)  # at least and at most, before a client that found the queue full tries again
_log = logging.getLogger("flashmoe.server")

_ROUTES = (
    "/completion",
    "/completions",
    "/chat/completions",
    "/responses",
    "/messages",
    "/infill",
    "/embedding",
    "/embeddings",
    "/rerank",
    "/reranking",
    "/audio/transcriptions",
)
#: Routes whose requests take a slot of the backend.
GENERATING = frozenset(prefix + route for route in _ROUTES for prefix in ("", "/v1"))


class Traffic:
    """Counts requests on generating routes. It lives in the event loop; its figures may be read from any thread."""

    def __init__(self, parallel: int) -> None:
        self.parallel = parallel
        self._began: dict[object, float] = {}  # counted requests, and when they came, the oldest first
        self._entered = 0
        self._said = -math.inf  # when the log was last told that requests wait
        self._tasks: set[Task[None]] = set()
        self.accepting = True
        #: Called with "ok", "client_error", "server_error" or "cancelled" when a counted request has ended.
        self.on_end: Callable[[str], None] = lambda _: None
        #: Called with True when a counted request comes and none was running, with False when the last one has ended.
        self.on_requests: Callable[[bool], None] = lambda _: None
        #: Called with the seconds from a counted request to the first byte of its response's body.
        self.on_first_byte: Callable[[float], None] = lambda _: None

    @property
    def running(self) -> int:
        """Requests that have a slot. The backend gives slots first come, first served."""
        return min(len(self._began), self.parallel)

    @property
    def waiting(self) -> int:
        return len(self._began) - self.running

    @property
    def waiting_seconds(self) -> float:
        """How long the request that waits longest has waited; 0.0 where none does."""
        began = list(self._began.values())  # at once: other threads ask
        return max(0.0, time.monotonic() - began[self.parallel]) if len(began) > self.parallel else 0.0

    @property
    def busy(self) -> bool:
        """Whether a request that was taken has not ended."""
        return bool(self._entered or self._tasks)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """For the time of a request on a generating route. Raises Refusal where too many wait."""
        if self.waiting >= MOST_WAITING:
            message = f"{MOST_WAITING} requests are waiting already: try again later"
            least, most = _RETRY_SECONDS
            seconds = max(least, min(most, math.ceil(self.waiting_seconds)))
            raise Refusal(503, message, headers={"Retry-After": str(seconds)})
        self._began[request := object()] = time.monotonic()
        if len(self._began) == 1:
            self.on_requests(True)
        self._say_if_behind()
        try:
            yield
        finally:
            self._say_if_behind()
            del self._began[request]
            if not self._began:
                self.on_requests(False)

    def _say_if_behind(self) -> None:
        seconds = self.waiting_seconds
        if seconds > BEHIND_SECONDS and time.monotonic() > self._said + AGAIN_SECONDS:
            self._said = time.monotonic()
            _log.warning(
                "%d requests wait, one for %.0f s: more come than this machine answers", self.waiting, seconds
            )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """For the time of a request that is to come to its end before the server does. Raises Refusal when no new
        requests are taken.
        """
        self.check_open()
        self._entered += 1
        try:
            yield
        finally:
            self._entered -= 1

    @contextmanager
    def stoppable(self, task: Task[None]) -> Iterator[None]:
        """`task` is cancelled where the time to drain ends before the block does."""
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    def check_open(self) -> None:
        """Raises Refusal when no new requests are taken."""
        if not self.accepting:
            raise shutting_down()

    def drain(self) -> None:
        """From here on take no new requests; those in flight go on."""
        self.accepting = False

    def stop(self) -> None:
        """End the requests that are still in flight."""
        self.drain()
        for task in list(self._tasks):
            task.cancel()
