"""Counters of an expert cache, and the interface of its observers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass
class CacheStats:
    """Counters of one phase (prefill or decode). A request is a distinct expert of a layer in one step."""

    hits: int = 0  # resident and complete, prefetched ones among them
    late_hits: int = 0  # the prefetch was queued or under way
    misses: int = 0
    prefetch_hits: int = 0  # of the hits: through a prefetch that was complete
    bytes: int = 0  # read for misses
    prefetch_bytes: int = 0  # of hits and late hits that were prefetched
    wasted_bytes: int = 0  # prefetched, never asked for, and overwritten
    stall_seconds: float = 0.0  # the engine waited for reads, and did nothing else
    overhead_seconds: float = 0.0  # Python in the engine's way, reads aside; the engine's hook adds it up

    @property
    def requests(self) -> int:
        return self.hits + self.late_hits + self.misses

    @property
    def bytes_read(self) -> int:
        """All of them: asked for, prefetched in time, and prefetched in vain."""
        return self.bytes + self.prefetch_bytes + self.wasted_bytes

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.requests)


class CacheObserver(Protocol):
    """Observes requests for experts: when the engine makes one, and when it goes on."""

    def enter(self, layer: int) -> None:
        """The engine asks for a layer's experts, or waits for those that `ensure` has left under way."""

    def leave(self) -> None:
        """It goes on computing, or has failed."""
