"""The time line of one token: where its time went, layer by layer, and what was read meanwhile.

For the length of one evaluation the methods of one model's cache and reader are wrapped; nothing of it is there at any
other time. When a read has ended is known when the reader looks: at the next wait, or the next layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.storage.aio import Done, Read, ReadQueue
from flashmoe.storage.catalog import ExpertCatalog

#: What a span is: the engine computes, waits for reads, or runs Python; a read, urgent or ahead of time.
COMPUTE, STALL, PYTHON, DEMAND, PREFETCH = "compute", "stall", "python", "demand", "prefetch"


class Timeline:
    """Spans of one evaluation, in milliseconds from its start. A read's layer is the one it is for."""

    def __init__(self, cache: ExpertCache, catalog: ExpertCatalog) -> None:
        self.spans: list[dict[str, Any]] = []
        self._cache = cache
        self._ranges = [
            (plane.file, plane.offset, plane.offset + plane.nbytes * layer.n_experts, number)
            for number, layer in enumerate(catalog.layers)
            for plane in layer.planes
        ]
        self._began = self._computing = 0.0
        self._layer = 0

    def record(self, evaluate: Callable[[], Any]) -> dict[str, Any]:
        """Call `evaluate`; the layout of "timeline" in `flashmoe bench --json`."""
        with self._wrapped():
            self._began = self._computing = time.perf_counter()
            evaluate()
            self._add(COMPUTE, self._layer, self._computing, time.perf_counter())
        total = max(span["end_ms"] for span in self.spans)
        return {"token_ms": total, "spans": sorted(self.spans, key=lambda span: span["start_ms"])}

    @contextmanager
    def _wrapped(self) -> Iterator[None]:
        cache, reader = self._cache, self._cache.reader
        ensure, finish, wait, queue = cache.ensure, cache.finish, reader.wait, reader._queue

        def timed_ensure(layer: int, *args: Any, **options: Any) -> Any:
            return self._called(layer, lambda: ensure(layer, *args, **options))

        def timed_wait(ticket: Any) -> None:
            started = time.perf_counter()
            try:
                wait(ticket)
            finally:
                self._add(STALL, self._layer, started, time.perf_counter())

        methods: list[tuple[Any, str, Any]] = [
            (cache, "ensure", timed_ensure),
            (cache, "finish", lambda: self._called(self._layer, finish)),
            (reader, "wait", timed_wait),
        ]
        for owner, name, method in methods:
            setattr(owner, name, method)  # the instance's own, in front of the class's
        reader._queue = _TimedQueue(queue, self._read, reader._urgent)
        try:
            yield
        finally:
            reader._queue = queue
            for owner, name, _ in methods:
                delattr(owner, name)

    def _called(self, layer: int, call: Callable[[], Any]) -> Any:
        """The engine has called back: what was before was computing."""
        entered = time.perf_counter()
        self._add(COMPUTE, self._layer, self._computing, entered)
        self._layer = layer
        try:
            return call()
        finally:
            self._computing = time.perf_counter()
            self._add(PYTHON, layer, entered, self._computing)  # stalls lie within

    def _read(self, read: Read, urgent: bool, started: float, ended: float) -> None:
        layer = next(
            (n for file, first, end, n in self._ranges if file == read.file and first <= read.offset < end),
            -1,
        )
        self._add(DEMAND if urgent else PREFETCH, layer, started, ended, bytes=read.nbytes)

    def _add(self, kind: str, layer: int, started: float, ended: float, **more: int) -> None:
        start, end = (round(1e3 * (moment - self._began), 4) for moment in (started, ended))
        self.spans.append({"kind": kind, "layer": layer, "start_ms": start, "end_ms": end, **more})


class _TimedQueue:
    """A ReadQueue that tells when each read was started and seen to have ended."""

    def __init__(
        self, queue: ReadQueue, tell: Callable[[Read, bool, float, float], None], urgent: set[int]
    ) -> None:
        self.depth = queue.depth
        self._queue, self._tell, self._urgent = queue, tell, urgent
        self._started: dict[int, tuple[Read, bool, float]] = {}

    def start(self, reads: list[tuple[int, Read]]) -> None:
        """See ReadQueue."""
        now = time.perf_counter()
        self._started |= {number: (read, number in self._urgent, now) for number, read in reads}
        self._queue.start(reads)

    def collect(self, timeout: float, least: int = 1) -> list[Done]:
        """See ReadQueue."""
        ended = self._queue.collect(timeout, least)
        now = time.perf_counter()
        for number, _ in ended:
            if number in self._started:
                read, urgent, started = self._started.pop(number)
                self._tell(read, urgent, started, now)
        return ended

    def close(self) -> None:
        """See ReadQueue."""
        self._queue.close()


def draw(axes: Any, timeline: dict[str, Any]) -> None:
    """Draw a recorded time line: a row per layer, the engine's time above, reads for that layer below."""
    styles = {
        COMPUTE: ("tab:blue", -0.05, 0.4, "computes"),
        PYTHON: ("black", -0.05, 0.4, "Python"),
        STALL: ("tab:red", -0.05, 0.4, "waits for reads"),
        DEMAND: ("tab:orange", 0.35, 0.18, "read on demand"),
        PREFETCH: ("tab:green", 0.35, 0.18, "prefetched"),
    }
    for kind, (color, offset, height, label) in styles.items():
        spans = [span for span in timeline["spans"] if span["kind"] == kind and span["layer"] >= 0]
        axes.barh(
            [span["layer"] + offset - 0.2 for span in spans],
            [span["end_ms"] - span["start_ms"] for span in spans],
            left=[span["start_ms"] for span in spans],
            height=height,
            color=color,
            label=label if spans else None,
        )
    axes.invert_yaxis()
    axes.set_xlabel("ms from the start of the token")
    axes.set_ylabel("layer")
    axes.legend(loc="lower left")
