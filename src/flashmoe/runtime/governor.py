"""Keeps the process to its memory budget by what it really has, where estimates were made while it was loaded."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.common import memory
from flashmoe.common.units import format_bytes

_log = logging.getLogger(__name__)

_EVERY = 1.0  # seconds between two looks, once a second token is decoded
_CALM = 5.0  # seconds without shrinking after which the pool may grow again
_MARGIN = 32 << 20  # bytes left free by growing: what is given back and taken again at once costs reads


class Governor:
    """Looks at the process between steps: the pool gives slots back where there is too much, and takes them again.

    What a look counts is the resident set, and the memory of the pool's slots in use that is not committed yet. In all
    there are never more slots than the pool was made with.
    """

    def __init__(self, cache: ExpertCache, budget: int, least: Sequence[int]) -> None:
        """budget: bytes of the whole process. least[g]: slots of size group g that the engine needs in any case."""
        self._cache, self._least = cache, list(least)
        #: Bytes that the process may have at present.
        self.allowed = budget
        self._tokens_seen = 0  # steps of decoding that have begun
        self._begun = self._warned = False
        self._next = 0.0
        self._last_shrunk = float("-inf")

    def before_step(self) -> None:
        """A step is about to begin: look at the process, if it is time to."""
        begun, self._begun = self._begun, True
        if not begun:
            return
        decoding = self._cache.phase == "decode"
        if self._tokens_seen < 2:  # after each part of the first prompt, and after the first token
            self._tokens_seen += decoding
            self.look()
        elif time.monotonic() >= self._next:
            self.look()

    def look(self) -> None:
        """Compare what the process has with what it may have, and ask the cache for another number of slots."""
        self._next = time.monotonic() + _EVERY
        cache = self._cache
        has = memory.status_bytes("VmRSS") + cache.pool.absent
        slots = self._fitting(self.allowed - has)
        if self._tokens_seen <= 2 or slots != cache.elastic.slots:
            _log.info(
                "memory %s of %s: %d of %d slots in use",
                format_bytes(has),
                format_bytes(self.allowed),
                sum(slots),
                sum(cache.elastic.most),
            )
        cache.resize(slots)

    def _fitting(self, room: int) -> list[int]:
        """Slots of each size group with which `room` bytes more are taken, or fewer where it is negative."""
        elastic, sizes = self._cache.elastic, self._cache.pool.slot_bytes
        slots = elastic.slots
        if room >= 0:
            if slots == elastic.most or time.monotonic() - self._last_shrunk < _CALM:
                return slots
            missing = [most - n for most, n in zip(elastic.most, slots, strict=True)]
            share = (room - _MARGIN) / _bytes(missing, sizes)
            return [n + int(max(0.0, min(1.0, share)) * more) for n, more in zip(slots, missing, strict=True)]
        self._last_shrunk = time.monotonic()
        surplus = [max(0, n - least) for n, least in zip(slots, self._least, strict=True)]
        share = -room / max(1, _bytes(surplus, sizes))
        if share > 1 and not self._warned:
            self._warned = True
            _log.warning(
                "the process has %s more than its budget, and the pool cannot give as much back: raise --ram",
                format_bytes(-room),
            )
        return [n - min(less, math.ceil(share * less)) for n, less in zip(slots, surplus, strict=True)]


def _bytes(slots: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(n * size for n, size in zip(slots, sizes, strict=True))
