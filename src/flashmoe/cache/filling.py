"""Fills slots: reads the bytes of admitted experts, or takes them from prefetches, and waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.pool import SlotPool
from flashmoe.cache.staging import Staged
from flashmoe.cache.stats import CacheStats
from flashmoe.common.signals import let_through
from flashmoe.storage.reader import ExpertReader, Ticket

#: Called with an expert and its slot (numbered in the layer's size group) when its bytes are in.
Each = Callable[[int, int], None]


@dataclass
class Demand:
    """Experts of a layer whose bytes are to come into their slots, which are numbered over all size groups."""

    layer: int
    admitted: list[int]  # resident from now on, and only if everything succeeds
    absent: list[tuple[int, int]] = field(default_factory=list)  # (expert, slot), to be read
    staged: list[tuple[int, Staged]] = field(default_factory=list)  # prefetched, perhaps not to the end
    tickets: list[Ticket] = field(default_factory=list)  # of the absent
    late: frozenset[int] = frozenset()  # experts whose bytes were not in when their reads were left under way

    @property
    def placed(self) -> list[tuple[int, int]]:
        """Every expert and its slot."""
        return [*self.absent, *((expert, entry.slot) for expert, entry in self.staged)]


class Filling:
    """Reads what a demand names. Not thread-safe: its owner is the ExpertCache."""

    def __init__(self, pool: SlotPool, reader: ExpertReader, policy: EvictionPolicy) -> None:
        self._pool, self._reader, self._policy = pool, reader, policy
        residency = policy.residency
        #: The first slot of each layer's size group.
        self.first_slots = [int(residency.group_start[group]) for group in residency.group]
        self._bytes = [sum(w.weight.nbytes for w in windows) for windows in pool.windows]
        # with tickets that are still to be waited for: of all tensors but the last, and of that
        self._under_way: tuple[Demand, list[Ticket], list[Ticket]] | None = None

    @property
    def pending(self) -> int | None:
        """The layer of which reads have been left under way."""
        return self._under_way[0].layer if self._under_way else None

    @property
    def late(self) -> frozenset[int]:
        """Its experts of which more than the last tensor may have been left under way."""
        return self._under_way[0].late if self._under_way else frozenset()

    @contextmanager
    def releasing(self, demand: Demand) -> Iterator[None]:
        """Where anything is raised before the experts are complete, settle their reads and free their slots again."""
        try:
            yield
        except BaseException:  # also what a signal's handler raises
            for _, entry in demand.staged:
                self._reader.settle(entry.first)
                self._reader.settle(entry.last)
            for ticket in demand.tickets:
                self._reader.settle(ticket)
            for expert in demand.admitted:
                self._policy.release(demand.layer, expert)
            raise

    def read(
        self,
        demand: Demand,
        stats: CacheStats,
        leave_last: bool,
        meanwhile: Callable[[], None] | None,
        leave_all: bool = False,
    ) -> None:
        """Read tensor by tensor over all experts: what is needed first comes first.

        `leave_last`: the last tensor is left under way, for `finish`, and with `leave_all` every one; `meanwhile` is
        called before any wait.
        """
        layer, first = demand.layer, self.first_slots[demand.layer]
        incomplete = [entry for _, entry in demand.staged if not entry.complete]
        now = [entry.first for entry in incomplete]
        later = [entry.last for entry in incomplete]
        reads = [self._pool.reads(layer, expert, slot - first) for expert, slot in demand.absent]
        weights = list(zip(*reads, strict=True))
        if weights:
            first_weights = [read for weight in weights[:-1] for read in weight]
            began = time.perf_counter()
            demanded = self._reader.demand_in_order([first_weights, weights[-1]], demand.tickets)
            # starting reads can mean waiting for the drive
            stats.stall_seconds += time.perf_counter() - began
            now, later = [*now, demanded[0]], [*later, demanded[1]]
        for expert, slot in demand.placed:
            self._pool.fill_tables(layer, expert, slot - first)
        if meanwhile:
            meanwhile()
        if leave_all:
            late = [expert for expert, entry in demand.staged if not entry.complete]
            demand.late = frozenset(late + [expert for expert, _ in demand.absent])
        else:
            began = time.perf_counter()
            for ticket in now if leave_last else now + later:
                self._reader.wait(ticket)
            stats.stall_seconds += time.perf_counter() - began
        self._count(demand, stats, len(incomplete))
        if leave_last or leave_all:
            self._under_way = demand, now if leave_all else [], later

    def read_each(
        self,
        demand: Demand,
        stats: CacheStats,
        slots: dict[int, int],
        each: Each,
        meanwhile: Callable[[], None] | None,
    ) -> None:
        """Read expert by expert: each is handed over when its own reads have ended, those that are resident first.

        slots: of all experts that were asked for.
        """
        layer, first = demand.layer, self.first_slots[demand.layer]
        incomplete = [(expert, entry) for expert, entry in demand.staged if not entry.complete]
        late = {expert: [entry.first, entry.last] for expert, entry in incomplete}
        began = time.perf_counter()
        for expert, slot in demand.absent:
            reads = self._pool.reads(layer, expert, slot - first)
            late[expert] = self._reader.demand_in_order([reads], demand.tickets)
        # starting reads can mean waiting for the drive
        stats.stall_seconds += time.perf_counter() - began
        for expert, slot in demand.placed:
            self._pool.fill_tables(layer, expert, slot - first)
        if meanwhile:
            meanwhile()
        for expert in [*(e for e in slots if e not in late), *late]:
            let_through()
            began = time.perf_counter()
            for ticket in late.get(expert, ()):
                self._reader.wait(ticket)
            self._reader.poll()
            stats.stall_seconds += time.perf_counter() - began
            each(expert, slots[expert] - first)
        self._count(demand, stats, len(incomplete))

    def _count(self, demand: Demand, stats: CacheStats, incomplete: int) -> None:
        """`incomplete`: of the prefetched experts, those that had not come to the end."""
        absent, staged, nbytes = len(demand.absent), len(demand.staged), self._bytes[demand.layer]
        stats.hits += staged - incomplete
        stats.prefetch_hits += staged - incomplete
        stats.late_hits += incomplete
        stats.prefetch_bytes += staged * nbytes
        stats.misses += absent
        stats.bytes += absent * nbytes

    def finish(self, stats: CacheStats, *, leave_last: bool = False) -> None:
        """Wait for what `read` has left under way; for all but the last tensor with `leave_last`."""
        if not self._under_way:
            return
        demand, now, later = self._under_way
        self._under_way = None
        began = time.perf_counter()
        with self.releasing(demand):
            for ticket in now if leave_last else now + later:
                self._reader.wait(ticket)
        stats.stall_seconds += time.perf_counter() - began
        if leave_last:
            demand.late = frozenset()
            self._under_way = demand, [], later
