"""Live telemetry for dashboards: `GET /flashmoe/info`, `/flashmoe/live` (one frame), `/flashmoe/live/stream` (SSE).

A frame has counters since the start, so that the difference of two frames gives rates, and the map of the pool:
one byte for each expert, layer after layer, base64. Bit 0: resident; bit 1: used since the last frame of this stream;
bit 2: missed since then. What is used is noted only while a client is connected.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flashmoe.cache.stats import CacheStats
from flashmoe.common.memory import status_bytes
from flashmoe.runtime.model import Model
from flashmoe.server.broadcast import Broadcast
from flashmoe.server.comparing import Comparing
from flashmoe.server.errors import Refusal
from flashmoe.server.traffic import Traffic
from flashmoe.server.upstream import InnerServer
from flashmoe.storage.disk import read_ceiling

RESIDENT, USED, MISSED = 1, 2, 4
SLOWEST, FASTEST = 0.1, 30.0  # frames a second


class Activity:
    """A `RoutingObserver`: when experts were last asked for, and when last missed, [layers, experts], in ticks."""

    def __init__(self, slot_of: NDArray[np.int32]) -> None:
        self._slot_of = slot_of
        self.used = np.zeros(slot_of.shape, np.int64)
        self.missed = np.zeros(slot_of.shape, np.int64)
        self.tick = 1
        self._absent = slot_of < 0  # before the present step

    def begin_step(self) -> None:
        np.less(self._slot_of, 0, out=self._absent)

    def add(self, layer: int, ids: NDArray[Any], _weights: NDArray[Any] | None = None) -> None:
        experts = ids.ravel()
        self.used[layer, experts] = self.tick
        self.missed[layer, experts[self._absent[layer, experts]]] = self.tick


class Live:
    """Frames of what a model is doing."""

    def __init__(
        self,
        model: Model,
        inner: InnerServer,
        traffic: Traffic,
        broadcast: Broadcast,
        comparing: Comparing,
        name: str,
    ) -> None:
        self._model, self._inner, self._traffic, self._name = model, inner, traffic, name
        self._broadcast, self._comparing = broadcast, comparing
        self._activity = Activity(self._model.cache.policy.residency.slot_of)
        self._watchers, self._lock = 0, threading.Lock()

    def info(self) -> dict[str, Any]:
        """What does not change."""
        model = self._model
        catalog = model.catalog
        return {
            "model": catalog.label,
            "name": self._name,
            "layers": len(catalog.layers),
            "first_moe_layer": catalog.layers[0].block,
            "experts": catalog.n_experts,
            "top_k": catalog.top_k,
            "slots": model.cache.policy.residency.n_slots,
            "expert_bytes": max(layer.expert_bytes for layer in catalog.layers),
            "policy": model.cache.policy.name,
            "approx": model.rewritten.approx if model.rewritten else "",
            "layout": model.layout,
            "kernels": model.engine.kernels,
            "context": self._inner.n_ctx,
            "parallel": self._inner.parallel,
            "budget_bytes": model.budget_bytes,
            "ceiling_bytes_per_second": 1e9 * read_ceiling(model.cache.reader, catalog.read_bytes),
        }

    def frame(self, since: int | None = None) -> dict[str, Any]:
        """The present state; `since`: the `tick` of an earlier frame, for what was used and missed after it."""
        model, stats = self._model, self._model.cache_stats
        tick = self._activity.tick
        self._activity.tick = tick + 1
        resident = model.cache.policy.residency.slot_of >= 0
        cells = resident * np.uint8(RESIDENT)
        if since is not None:
            cells |= (self._activity.used > since) * np.uint8(USED)
            cells |= (self._activity.missed > since) * np.uint8(MISSED)
        prefetcher, compared = model.prefetcher, self._comparing.look()
        return {
            "time": time.time(),
            "tick": tick,
            "prefill": _phase(
                model.telemetry.prefill.tokens, model.telemetry.prefill.seconds, stats["prefill"]
            ),
            "decode": _phase(model.telemetry.decode.tokens, model.telemetry.decode.seconds, stats["decode"]),
            "compared": compared.as_dict() if compared else None,
            "advice": self._comparing.advice,
            "prefetch": prefetcher.predictor.name if prefetcher else "",
            "approximate": model.rewritten.as_dict() if model.rewritten else None,
            "memory": {"resident_bytes": status_bytes("VmRSS"), "peak_bytes": status_bytes("VmHWM")},
            "requests": {"running": self._traffic.running, "waiting": self._traffic.waiting},
            "map": base64.b64encode(cells.tobytes()).decode(),
        }

    async def frames(self, hz: float) -> AsyncIterator[dict[str, Any]]:
        """A frame every 1/hz seconds, until the server shuts down."""
        self._watch(1)
        try:
            frame = self.frame()
            while self._traffic.accepting:
                yield frame
                await asyncio.sleep(1 / hz)
                frame = self.frame(frame["tick"])
        finally:
            self._watch(-1)

    def _watch(self, change: int) -> None:
        with self._lock:
            before, self._watchers = self._watchers, self._watchers + change
            if not before:
                self._broadcast.join(self._activity)
            elif not self._watchers:
                self._broadcast.leave(self._activity)


def _phase(tokens: int, seconds: float, stats: CacheStats) -> dict[str, float]:
    """Counters since the start. seconds: of evaluation, in which stall and overhead are contained."""
    return {
        "tokens": tokens,
        "seconds": seconds,
        "hits": stats.hits,
        "late_hits": stats.late_hits,
        "misses": stats.misses,
        "prefetch_hits": stats.prefetch_hits,
        "read_bytes": stats.bytes + stats.prefetch_bytes + stats.wasted_bytes,
        "stall_seconds": stats.stall_seconds,
        "overhead_seconds": stats.overhead_seconds,
    }


def live_routes(live: Live) -> list[Route]:
    """The routes."""

    def info(_: Request) -> Response:
        """The model and its pool: what does not change."""
        return JSONResponse(live.info())

    async def frame(_: Request) -> Response:
        """Counters and the map of the pool, once."""
        return JSONResponse(live.frame())

    async def stream(request: Request) -> Response:
        """The same as server-sent events, `hz` times a second."""
        hz = _rate(request.query_params.get("hz", "10"))

        async def events() -> AsyncIterator[str]:
            async for frame in live.frames(hz):
                yield f"data: {json.dumps(frame)}\n\n"

        return StreamingResponse(
            events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    return [
        Route("/flashmoe/info", info),
        Route("/flashmoe/live", frame),
        Route("/flashmoe/live/stream", stream),
    ]


def _rate(text: str) -> float:
    try:
        hz = float(text)
    except ValueError:
        hz = 0.0
    if not SLOWEST <= hz <= FASTEST:
        raise Refusal(400, f"hz: a number from {SLOWEST} to {FASTEST:g} (frames a second), not {text!r}")
    return hz
