"""The time line of one token: where its time went, layer by layer, and what was read meanwhile.

It observes one model's cache and reader for the length of one evaluation. When a read has ended is known when the
reader looks: at the next wait, or the next layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.reader import Read

#: What a span is: the engine computes, waits for reads, or runs Python; a read, urgent or ahead of time.
COMPUTE, STALL, PYTHON, DEMAND, PREFETCH = "compute", "stall", "python", "demand", "prefetch"


class Timeline:
    """Spans of one evaluation, in seconds from its start. A read's layer is the one it is for.

    Implements `CacheObserver` and `ReadObserver`.
    """

    def __init__(self, cache: ExpertCache, catalog: ExpertCatalog) -> None:
        self.spans: list[dict[str, Any]] = []
        self._cache = cache
        self._ranges = [
            (weight.file, weight.offset, weight.offset + weight.nbytes * layer.n_experts, number)
            for number, layer in enumerate(catalog.layers)
            for weight in layer.weights
        ]
        self._reads: dict[int, tuple[Read, bool, float]] = {}
        self._began = self._computing = self._entered = self._waiting = 0.0
        self._layer = 0

    def record(self, evaluate: Callable[[], Any]) -> dict[str, Any]:
        """Call `evaluate`; the layout of "timeline" in `flashmoe bench --json`."""
        self._cache.observer = self._cache.reader.observer = self
        try:
            self._began = self._computing = time.perf_counter()
            evaluate()
            self._add(COMPUTE, self._layer, self._computing, time.perf_counter())
        finally:
            self._cache.observer = self._cache.reader.observer = None
        total = max(span["end_seconds"] for span in self.spans)
        return {"token_seconds": total, "spans": sorted(self.spans, key=lambda span: span["start_seconds"])}

    def enter(self, layer: int) -> None:
        self._entered = time.perf_counter()
        self._add(COMPUTE, self._layer, self._computing, self._entered)
        self._layer = layer

    def leave(self) -> None:
        self._computing = time.perf_counter()
        self._add(PYTHON, self._layer, self._entered, self._computing)  # stalls lie within

    def waits(self) -> None:
        self._waiting = time.perf_counter()

    def waited(self) -> None:
        self._add(STALL, self._layer, self._waiting, time.perf_counter())

    def started(self, number: int, read: Read, urgent: bool) -> None:
        self._reads[number] = read, urgent, time.perf_counter()

    def ended(self, number: int) -> None:
        if number not in self._reads:  # it began before
            return
        read, urgent, started = self._reads.pop(number)
        layer = next(
            (n for file, first, end, n in self._ranges if file == read.file and first <= read.offset < end),
            -1,
        )
        kind = DEMAND if urgent else PREFETCH
        self._add(kind, layer, started, time.perf_counter(), read_bytes=read.nbytes)

    def _add(self, kind: str, layer: int, started: float, ended: float, **more: int) -> None:
        start, end = (round(moment - self._began, 7) for moment in (started, ended))
        self.spans.append({"kind": kind, "layer": layer, "start_seconds": start, "end_seconds": end, **more})


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
            [1e3 * (span["end_seconds"] - span["start_seconds"]) for span in spans],
            left=[1e3 * span["start_seconds"] for span in spans],
            height=height,
            color=color,
            label=label if spans else None,
        )
    axes.invert_yaxis()
    axes.set_xlabel("ms from the start of the token")
    axes.set_ylabel("layer")
    axes.legend(loc="lower left")
