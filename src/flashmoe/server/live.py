"""Live telemetry for dashboards: `GET /flashmoe/info`, `/flashmoe/live` (one frame), `/flashmoe/live/stream` (SSE).

A frame has counters since the start, so that whoever reads two of them has the rates between, and the map of the pool:
one byte for each expert, layer after layer, base64. Bit 0: resident; bit 1: used since the last frame of this stream;
bit 2: missed since then. What is used is noted only while somebody watches.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from numpy.typing import NDArray

from flashmoe.budget import status_bytes
from flashmoe.cache.expert_cache import CacheStats
from flashmoe.server.audience import Audience
from flashmoe.server.comparing import Comparing
from flashmoe.server.scheduler import Scheduler
from flashmoe.storage.disk import read_ceiling

RESIDENT, USED, MISSED = 1, 2, 4


class Activity:
    """Notes which experts are asked for: when last used, and when last missed, [layers, experts], in ticks."""

    def __init__(self, slot_of: NDArray[np.int32]) -> None:
        self._slot_of = slot_of
        self.used = np.zeros(slot_of.shape, np.int64)
        self.missed = np.zeros(slot_of.shape, np.int64)
        self.tick = 1

    def add(self, layer: int, ids: NDArray[Any], _weights: NDArray[Any] | None = None) -> None:
        """The engine's hook calls this before experts are made resident."""
        experts = ids.ravel()
        self.used[layer, experts] = self.tick
        self.missed[layer, experts[self._slot_of[layer, experts] < 0]] = self.tick


class Live:
    """Frames of what a scheduler's model is doing."""

    def __init__(self, scheduler: Scheduler, audience: Audience, comparing: Comparing) -> None:
        self._scheduler, self._model = scheduler, scheduler.model
        self._audience, self._comparing = audience, comparing
        self._activity = Activity(self._model.cache.policy.residency.slot_of)
        self._watchers, self._lock = 0, threading.Lock()

    def info(self) -> dict[str, Any]:
        """What does not change."""
        model = self._model
        catalog = model.catalog
        return {
            "model": catalog.label,
            "layers": len(catalog.layers),
            "first_moe_layer": catalog.layers[0].block,
            "experts": catalog.n_experts,
            "top_k": catalog.top_k,
            "slots": model.cache.policy.residency.n_slots,
            "expert_bytes": max(layer.expert_bytes for layer in catalog.layers),
            "policy": model.cache.policy.name,
            "context": model.engine.n_ctx,
            "parallel": model.engine.sequences,
            "budget_bytes": model.budget_bytes,
            "ceiling_bytes_per_s": 1e9 * read_ceiling(model.cache.reader, catalog.read_bytes),
        }

    def frame(self, since: int | None = None) -> dict[str, Any]:
        """The present state; `since`: the `tick` of an earlier frame, for what was used and missed after it."""
        model, stats = self._model, self._model.cache.stats
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
            "memory": {"resident_bytes": status_bytes("VmRSS"), "peak_bytes": status_bytes("VmHWM")},
            "requests": {"running": self._scheduler.running, "waiting": self._scheduler.waiting},
            "map": base64.b64encode(cells.tobytes()).decode(),
        }

    async def frames(self, hz: float) -> AsyncIterator[dict[str, Any]]:
        """A frame every 1/hz seconds, until the server shuts down."""
        self._watch(1)
        try:
            frame = self.frame()
            while self._scheduler.accepting:
                yield frame
                await asyncio.sleep(1 / hz)
                frame = self.frame(frame["tick"])
        finally:
            self._watch(-1)

    def _watch(self, change: int) -> None:
        with self._lock:
            before, self._watchers = self._watchers, self._watchers + change
            if not before:
                self._audience.join(self._activity)
            elif not self._watchers:
                self._audience.leave(self._activity)


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


def live_routes(scheduler: Scheduler, audience: Audience, comparing: Comparing) -> APIRouter:
    """The routes."""
    router, live = APIRouter(), Live(scheduler, audience, comparing)

    @router.get("/flashmoe/info")
    def info() -> dict[str, Any]:
        """The model and its pool: what does not change."""
        return live.info()

    @router.get("/flashmoe/live")
    async def frame() -> dict[str, Any]:
        """Counters and the map of the pool, once."""
        return live.frame()

    @router.get("/flashmoe/live/stream")
    async def stream(hz: Annotated[float, Query(ge=0.1, le=30)] = 10) -> StreamingResponse:
        """The same as server-sent events, `hz` times a second."""

        async def events() -> AsyncIterator[str]:
            async for frame in live.frames(hz):
                yield f"data: {json.dumps(frame)}\n\n"

        return StreamingResponse(
            events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    return router
