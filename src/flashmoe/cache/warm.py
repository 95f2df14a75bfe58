"""A warm start: the experts of an earlier session, read in the background while nothing else wants the drive.

An expert becomes resident when its bytes are in, if it is still absent and its layer still has a slot for it. To the
policy it is a pool that fills by itself, with experts that it knows already.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.pool import SlotPool
from flashmoe.cache.residency import Residency, admit, free_slot, take_free_slot
from flashmoe.common.signals import SafeLock
from flashmoe.storage.reader import ExpertReader, Ticket

Int32 = NDArray[np.int32]

_log = logging.getLogger(__name__)

_PAUSE = 0.002  # seconds between two looks at the drive
_UNDER_WAY = 8 << 20  # most bytes queued: what a drive reads in two pauses, and all that a demand waits for


class _Arrival(NamedTuple):
    """An expert on its way into a slot that is neither free nor owned by an expert."""

    layer: int
    expert: int
    slot: int
    ticket: Ticket
    nbytes: int


class WarmStart:
    """Fills free slots with experts of an earlier session. Its owner is the ExpertCache, whose lock it takes."""

    def __init__(
        self, residency: Residency, pool: SlotPool, reader: ExpertReader, lock: SafeLock, ranked: Int32
    ) -> None:
        """ranked: see EvictionPolicy.ranking."""
        self._residency, self._pool, self._reader, self._lock = residency, pool, reader, lock
        layers, ranks = np.nonzero(ranked >= 0)
        best_first = np.argsort(ranks, kind="stable")
        self._wanted = deque(
            (int(layer), int(ranked[layer, rank]))
            for layer, rank in zip(layers[best_first], ranks[best_first], strict=True)
        )
        self._under_way: list[_Arrival] = []
        self.experts = self.bytes = 0  # brought back so far
        self._paused = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flashmoe-warm", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether more may come."""
        return self._thread.is_alive()

    @property
    def slots(self) -> list[int]:
        """Slots that are being filled."""
        return [arrival.slot for arrival in self._under_way]

    def give_way(self) -> bool:
        """Give back the slots that are being filled, for now; whether there were any. Called under the lock."""
        arrivals, self._under_way = self._under_way, []
        for arrival in arrivals:
            self._reader.cancel(arrival.ticket)
            self._reader.settle(arrival.ticket)
            free_slot(self._residency, arrival.layer, arrival.slot)
        self._wanted.extendleft((arrival.layer, arrival.expert) for arrival in reversed(arrivals))
        return bool(arrivals)

    def pause(self, wanted: bool) -> None:
        """Give way for as long as that is wanted. Called under the lock."""
        self._paused = wanted
        if wanted:
            self.give_way()

    def close(self) -> None:
        """Stop; no read is under way afterwards."""
        self._stop.set()
        self._thread.join()
        with self._lock:
            self.give_way()

    def _run(self) -> None:
        while not self._stop.wait(_PAUSE):
            with self._lock:
                if not self._go_on():
                    return

    def _go_on(self) -> bool:
        """See what has arrived and start more; whether anything is left to do."""
        if self._paused:
            return True
        self._reader.poll()
        ended = [arrival for arrival in self._under_way if arrival.ticket.done]
        self._under_way = [arrival for arrival in self._under_way if not arrival.ticket.done]
        for arrival in ended:
            self._arrive(arrival)
        queued = sum(arrival.nbytes for arrival in self._under_way)
        while self._wanted and queued < _UNDER_WAY:
            layer, expert = self._wanted.popleft()
            if not self._has_room(layer, expert) or not self._residency.free_count[self._group(layer)]:
                continue
            slot = take_free_slot(self._residency, layer)
            reads = self._pool.reads(layer, expert, self._local(layer, slot))
            nbytes = sum(read.nbytes for read in reads)
            self._under_way.append(_Arrival(layer, expert, slot, self._reader.prefetch(reads), nbytes))
            queued += nbytes
        return bool(self._under_way)

    def _arrive(self, arrival: _Arrival) -> None:
        """Its reads have ended. Where one has failed, the expert's next request reads again, and gets the error."""
        layer, expert, slot, ticket, nbytes = arrival
        self.bytes += ticket.bytes
        if ticket.error:
            _log.warning("warm start: expert %d of layer %d: %s", expert, layer, ticket.error)
        if ticket.error or not self._has_room(layer, expert):
            free_slot(self._residency, layer, slot)
            return
        self._pool.fill_tables(layer, expert, self._local(layer, slot))
        admit(self._residency, layer, expert, slot)
        self.experts += 1

    def _has_room(self, layer: int, expert: int) -> bool:
        """Whether an expert is absent, and its layer's share is larger than what it has and what comes."""
        residency = self._residency
        coming = sum(arrival.layer == layer for arrival in self._under_way)
        return bool(
            residency.slot_of[layer, expert] < 0 and residency.used[layer] + coming < residency.quota[layer]
        )

    def _group(self, layer: int) -> int:
        return int(self._residency.group[layer])

    def _local(self, layer: int, slot: int) -> int:
        """A slot's number in its size group."""
        return slot - int(self._residency.group_start[self._group(layer)])
