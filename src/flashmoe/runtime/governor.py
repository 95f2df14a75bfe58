"""Keeps the process to its memory budget by what it really has, and gives way to other programs where it may.

A budget rests on estimates made while the model was loaded. So between steps the process is looked at, and the pool
gives slots back where there is too much, and takes them again later. Where no budget was asked for, the memory that is
left is watched as well, in a thread: other programs may want it at any time.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.common import memory
from flashmoe.common.units import format_bytes

_log = logging.getLogger(__name__)

_EVERY = 1.0  # seconds between two looks, once a second token is decoded
_CALM = 5.0  # seconds without giving anything back after which the pool may grow again
_MARGIN = 32 << 20  # bytes left free by growing: what is given back and taken again at once costs reads
# Of what the process has and what is left for all: more is given back, down to the second share
_TOO_MUCH, _ENOUGH = 0.85, 0.75
_STALLED = 0.1  # of the time that programs wait for memory: then there is less left than it seems
_STEP = 1 / 16  # of the pool, given back each time that they do
_FASTEST = 4e9  # bytes per second that another program takes, at most
_SHORTEST, _LONGEST = 0.02, 0.5  # seconds between two looks at the memory that is left


class Governor:
    """Looks at the process before steps, and with `gives_way` at the machine all the time, until `close`.

    What a look counts is the resident set, and the memory of the pool's slots in use that is not committed yet. There
    are never more slots than the pool was made with.
    """

    def __init__(
        self, cache: ExpertCache, budget: int, least: Sequence[int], *, gives_way: bool = False
    ) -> None:
        """budget: bytes of the whole process. least[g]: slots of size group g that the engine needs in any case."""
        self._cache, self._least, self._budget = cache, list(least), budget
        self._reserved = 0  # bytes of the budget that another process of ours has
        self._tokens_seen = 0  # steps of decoding that have begun
        self._begun = self._warned = False
        self._next = 0.0
        self._last_shrunk = float("-inf")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        cache.before_step = self._before_step
        if gives_way:
            self._thread = threading.Thread(target=self._watch, name="flashmoe-memory", daemon=True)
            self._thread.start()

    def reserve(self, nbytes: int) -> bool:
        """Let another process have `nbytes` of the budget, until the next call: the pool gives back what is too much.

        False, and nothing has changed, where it cannot give as much. From a thread that evaluates nothing.
        """
        room = self._budget - self._has() + self._reserved
        if nbytes > room + _bytes(self._surplus(), self._cache.pool.slot_bytes):
            return False
        self._reserved = nbytes
        self._cache.resize_now(self.look())
        return True

    def close(self) -> None:
        """End."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _before_step(self) -> None:
        begun, self._begun = self._begun, True
        if not begun:
            return
        if self._tokens_seen < 2:  # after each part of the first prompt, and after the first token
            self._tokens_seen += self._cache.phase == "decode"
            self._cache.resize(self.look(0 if self._thread else None, level=logging.INFO))
        elif self._thread is None and time.monotonic() >= self._next:
            self._cache.resize(self.look())

    def look(self, spare: int | None = None, *, level: int = logging.DEBUG) -> list[int]:
        """The slots of each size group that are to be in use: compares what the process has with what it may have.

        spare: bytes that the machine can do without, negative where it needs some; None where that does not count.
        level: of the log; a change is told anyway.
        """
        self._next = time.monotonic() + _EVERY
        elastic = self._cache.elastic
        has = self._has()
        room = self._budget - has
        if spare is not None:
            room = min(room, spare)
        slots = self._fitting(room)
        _log.log(
            level if slots == elastic.slots else logging.INFO,
            "memory %s, budget %s, room for %s: %d of %d slots in use",
            format_bytes(has),
            format_bytes(self._budget),
            format_bytes(room) if room >= 0 else f"-{format_bytes(-room)}",
            sum(slots),
            sum(elastic.most),
        )
        return slots

    def _has(self) -> int:
        """What counts against the budget."""
        return memory.status_bytes("VmRSS") + self._cache.pool.absent + self._reserved

    def _surplus(self) -> list[int]:
        """Slots of each size group in use that the engine does not need in any case."""
        return [max(0, n - least) for n, least in zip(self._cache.elastic.slots, self._least, strict=True)]

    def _fitting(self, room: int) -> list[int]:
        """Slots of each size group with which `room` bytes more are taken, or fewer where it is negative."""
        elastic, sizes = self._cache.elastic, self._cache.pool.slot_bytes
        slots = elastic.slots
        if room >= 0:
            missing = [most - n for most, n in zip(elastic.most, slots, strict=True)]
            if not any(missing) or time.monotonic() - self._last_shrunk < _CALM:
                return slots
            share = max(0.0, min(1.0, (room - _MARGIN) / _bytes(missing, sizes)))
            return [n + int(share * more) for n, more in zip(slots, missing, strict=True)]
        self._last_shrunk = time.monotonic()
        surplus = self._surplus()
        share = -room / max(1, _bytes(surplus, sizes))
        if share > 1 and not self._warned:
            self._warned = True
            _log.warning(
                "%s of memory are missing, and the pool cannot give as much back: end other programs, or see --ram",
                format_bytes(-room),
            )
        return [n - min(less, math.ceil(share * less)) for n, less in zip(slots, surplus, strict=True)]

    def _watch(self) -> None:
        stalled, since = memory.stalled_seconds(), time.monotonic()
        left = memory.memory_left()
        while not self._stop.wait(min(_LONGEST, max(_SHORTEST, left / _FASTEST / 4))):
            before, begun = stalled, since
            stalled, since = memory.stalled_seconds(), time.monotonic()
            left = memory.memory_left()
            self._cache.resize_now(self.look(self._spare(left, (stalled - before) / (since - begun))))

    def _spare(self, left: int, stalled: float) -> int:
        """Bytes that the machine can spare, with `left` of them free; stalled: share of the time that programs wait."""
        own = memory.status_bytes("RssAnon")
        whole = left + own
        if own > _TOO_MUCH * whole:
            return int(_ENOUGH * whole) - own
        if stalled > _STALLED and left < (1 - _ENOUGH) * whole:
            return -int(_STEP * _bytes(self._cache.elastic.slots, self._cache.pool.slot_bytes))
        return max(0, int(memory.DEFAULT_SHARE * whole) - own - self._cache.pool.absent)


def _bytes(slots: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(n * size for n, size in zip(slots, sizes, strict=True))
