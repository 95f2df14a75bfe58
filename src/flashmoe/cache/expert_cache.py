"""The expert cache: the only place that knows slots, policy and reader together."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.pool import SlotPool
from flashmoe.errors import BudgetError
from flashmoe.storage.reader import ExpertReader, Ticket

Int32 = NDArray[np.int32]


@dataclass
class CacheStats:
    """Counters of one phase (prefill or decode). A request is a distinct expert of a layer in one step."""

    hits: int = 0
    misses: int = 0
    bytes: int = 0  # read for misses
    stall_seconds: float = 0.0  # the engine waited for reads
    overhead_seconds: float = 0.0  # Python in the engine's way, reads aside; the engine's hook adds it up

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


class ExpertCache:
    """Makes experts resident. `ensure` returns slots whose bytes are in, whatever happens (see `leave_last`).

    Thread-safe; the slots that `ensure` returns are one caller's until the next call.
    """

    def __init__(self, pool: SlotPool, reader: ExpertReader, policy: EvictionPolicy) -> None:
        self.pool, self.reader, self.policy = pool, reader, policy
        self.stats: dict[str, CacheStats] = {"prefill": CacheStats(), "decode": CacheStats()}
        self.phase = "prefill"
        residency = policy.residency
        self._first_slot = [int(residency.group_start[g]) for g in residency.group]
        self._bytes = [sum(w.plane.nbytes for w in windows) for windows in pool.windows]
        self._lock = threading.Lock()
        self._under_way: tuple[Ticket, int, list[int]] | None = None  # reads, layer, experts
        self._resize(64)

    def _resize(self, n: int) -> None:
        self._slots, self._miss_expert, self._miss_slot = (np.empty(n, np.int32) for _ in range(3))

    def begin_sequence(self) -> None:
        """Tell the policy that a new prompt or conversation begins."""
        with self._lock:
            self.policy.begin_sequence()

    def ensure(self, layer: int, ids: Int32, *, leave_last: bool = False) -> Int32:
        """Make the experts `ids` (int32 [n], may repeat) of a layer resident and complete.

        With `leave_last` the last plane (down) may still be under way: call `finish` before it is used.
        Returns their slots, int32 [n], numbered in the layer's size group; valid until the next call. Raises ReadError
        (the failed experts are then absent and the cache is consistent) and BudgetError (they cannot fit at once).
        """
        with self._lock:
            self._finish()
            if len(ids) > len(self._slots):
                self._resize(2 * len(ids))
            slots = self._slots[: len(ids)]
            misses = self.policy.access(layer, ids, slots, self._miss_expert, self._miss_slot)
            if misses < 0:
                raise BudgetError(
                    f"{len(np.unique(ids))} experts of one layer do not fit into the pool at once: "
                    "give more memory, or a smaller micro-batch (-ub)"
                )
            first = self._first_slot[layer]
            stats = self.stats[self.phase]
            if misses:
                self._fill(layer, first, misses, leave_last)
            if first:
                slots -= first
            stats.hits += len(set(ids.tolist())) - misses
            stats.misses += misses
            stats.bytes += misses * self._bytes[layer]
        return slots

    @property
    def pending(self) -> bool:
        """Whether `ensure` has left reads under way."""
        return self._under_way is not None

    def finish(self) -> None:
        """Wait for what `ensure` has left under way. Raises ReadError; the experts are then absent."""
        with self._lock:
            self._finish()

    def _fill(self, layer: int, first: int, misses: int, leave_last: bool) -> None:
        """Read `misses` experts into their slots, plane by plane over all of them: what is needed first comes first."""
        experts, tickets = self._miss_expert[:misses].tolist(), []
        try:
            slots = (self._miss_slot[:misses] - first).tolist()
            reads = [self.pool.reads(layer, e, s) for e, s in zip(experts, slots, strict=True)]
            planes = list(zip(*reads, strict=True))
            now, later = (planes[:-1], planes[-1:]) if leave_last and len(planes) > 1 else (planes, [])
            began = time.perf_counter()
            tickets.append(self.reader.demand([read for plane in now for read in plane]))
            if later:
                tickets.append(self.reader.demand(later[0]))
            for expert, slot in zip(experts, slots, strict=True):
                self.pool.fill_tables(layer, expert, slot)
            tickets[0].wait()
        except BaseException:  # also what a signal's handler raises
            self._give_back(tickets, layer, experts)
            raise
        self.stats[self.phase].stall_seconds += time.perf_counter() - began
        if later:
            self._under_way = tickets[1], layer, experts

    def _finish(self) -> None:
        if not self._under_way:
            return
        (ticket, layer, experts), self._under_way = self._under_way, None
        began = time.perf_counter()
        try:
            ticket.wait()
        except BaseException:
            self._give_back([ticket], layer, experts)
            raise
        self.stats[self.phase].stall_seconds += time.perf_counter() - began

    def _give_back(self, tickets: list[Ticket], layer: int, experts: list[int]) -> None:
        """Free the slots of experts that are not complete; before, let no thread write into them any more."""
        for ticket in tickets:
            ticket.done.wait()
        for expert in experts:
            self.policy.release(layer, expert)
