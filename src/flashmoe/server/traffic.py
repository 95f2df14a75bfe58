"""Requests in flight: how many run and wait, whether more are taken, and how they ended."""

from __future__ import annotations

from asyncio import Task
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flashmoe.server.errors import Refusal, shutting_down

MOST_WAITING = 256  # requests; the backend's queue has no end of its own

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
        self._parallel, self._in_flight = parallel, 0
        self._tasks: set[Task[None]] = set()
        self.accepting = True
        #: Called with "ok", "client_error", "server_error" or "cancelled" when a counted request has ended.
        self.on_end: Callable[[str], None] = lambda _: None
        #: Called with the seconds from a counted request to the first byte of its response's body.
        self.on_first_byte: Callable[[float], None] = lambda _: None

    @property
    def running(self) -> int:
        """Requests that have a slot. The backend gives slots first come, first served."""
        return min(self._in_flight, self._parallel)

    @property
    def waiting(self) -> int:
        return self._in_flight - self.running

    @contextmanager
    def counted(self) -> Iterator[None]:
        """For the time of a request on a generating route. Raises Refusal where too many wait."""
        if self.waiting >= MOST_WAITING:
            message = f"{MOST_WAITING} requests are waiting already: try again later"
            raise Refusal(503, message, headers={"Retry-After": "5"})
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    @contextmanager
    def stoppable(self, task: Task[None]) -> Iterator[None]:
        """`task` is cancelled where the time of grace ends before the block does."""
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
