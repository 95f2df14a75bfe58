"""Slots of the pool that no policy owns: where prefetched experts wait, and what a prompt needs only in passing.

A prefetched expert becomes resident only when its router asks for it. Then it changes places with the slot that the
policy has named for it, and that slot is free for the next prefetch. So a wrong prediction evicts nothing, and the
policy sees the same requests, hits and victims as it would without prefetching.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.cache.pool import SlotPool
from flashmoe.cache.residency import Residency, middle
from flashmoe.storage.reader import ExpertReader, Ticket

_log = logging.getLogger(__name__)


@dataclass
class Staged:
    """A prefetched expert: complete, under way or still queued."""

    slot: int
    first: Ticket  # all weights but the last
    last: Ticket  # the last weight (down)

    @property
    def complete(self) -> bool:
        return self.first.done and self.last.done

    @property
    def started(self) -> bool:
        return self.first.started

    @property
    def bytes_read(self) -> int:
        return self.first.bytes + self.last.bytes

    @property
    def failed(self) -> bool:
        return bool(self.first.error or self.last.error)


class Staging:
    """The spare slots of every size group. Not thread-safe: its owner is the ExpertCache."""

    def __init__(
        self, residency: Residency, pool: SlotPool, reader: ExpertReader, spare: Sequence[int]
    ) -> None:
        self._pool, self._reader = pool, reader
        self._wasted = 0
        self.dropped = 0  # prefetches that were stopped before their end
        self._group = residency.group.tolist()
        self._first_slot = residency.group_start.tolist()
        self._staged: list[dict[int, Staged]] = [{} for _ in self._group]
        #: int64 [L + 1]: how many experts of each layer are prefetched or about to be; then 0. For compiled code.
        self.held = np.zeros(len(self._group) + 1, np.int64)
        self._residency = residency
        #: Of each size group, in ascending order.
        self._free = [list(range(end - n, end)) for end, n in zip(self._first_slot[1:], spare, strict=True)]
        self._ending: list[deque[Staged]] = [
            deque() for _ in spare
        ]  # cancelled; a read may still be under way
        #: (layer, expert) complete and not asked for, the oldest first
        self._stale: list[dict[tuple[int, int], None]] = [{} for _ in spare]

    @property
    def slots(self) -> list[int]:
        """Numbers of all spare slots at present."""
        entries = [entry.slot for layer in self._staged for entry in layer.values()]
        ending = [entry.slot for group in self._ending for entry in group]
        return entries + ending + [slot for group in self._free for slot in group]

    def plan(self, layer: int, experts: Sequence[int]) -> None:
        """Prefetch `experts` of a layer, the likeliest first, as far as there are slots; forget others not begun.

        Experts that only larger layers have are left out.
        """
        experts = [expert for expert in experts if expert < self._pool.n_experts[layer]]
        staged = self._staged[layer]
        near = middle(self._residency, layer) if experts else 0
        for expert in [e for e, entry in staged.items() if e not in experts and not entry.started]:
            self._cancel(layer, expert)
        for expert in experts:
            if expert in staged:
                self._stale[self._group[layer]].pop((layer, expert), None)
            else:
                slot = self._slot(self._group[layer], layer, near)
                if slot < 0:
                    return
                local = slot - self._first_slot[self._group[layer]]
                *first, last = self._pool.reads(layer, expert, local)
                staged[expert] = Staged(slot, self._reader.prefetch(first), self._reader.prefetch([last]))
                self.held[layer] += 1

    def holds(self, layer: int) -> bool:
        """Whether anything of a layer is prefetched or about to be."""
        return bool(self._staged[layer])

    def take(self, layer: int, expert: int) -> Staged | None:
        """The router has asked for an expert: give it away, its reads made urgent. None where it is not staged."""
        entry = self._staged[layer].get(expert)
        if entry is None:
            return None
        if entry.failed:  # the request reads again, and gets the error
            _log.warning("a prefetch of expert %d of layer %d failed: reading it on demand", expert, layer)
            self._cancel(layer, expert)
            return None
        self._forget(layer, expert)
        self._stale[self._group[layer]].pop((layer, expert), None)
        if not entry.complete:
            self._reader.promote(entry.first)
            self._reader.promote(entry.last)
        return entry

    def give(self, group: int, slots: Iterable[int]) -> None:
        """Slots that the policy's residency does not use (any more), to read into."""
        self._free[group] = sorted([*self._free[group], *slots])

    def claim(self, group: int, n: int, layer: int = 0) -> list[int]:
        """Take `n` slots away; what was prefetched gives way, and reads that are under way are waited for.

        layer: that they lie best for, where there is a choice.
        """
        near = middle(self._residency, layer)
        return [self._claim(group, near) for _ in range(n)]

    def served(self, layer: int) -> None:
        """The router of a layer has spoken: what it did not ask for is stopped, or may be overwritten."""
        staged = self._staged[layer]
        for expert in list(staged):
            if staged[expert].complete:
                self._stale[self._group[layer]][layer, expert] = None
            else:
                self._cancel(layer, expert)

    def take_waste(self) -> int:
        """Bytes that were read, never asked for and given up since the last call."""
        wasted, self._wasted = self._wasted, 0
        return wasted

    def _claim(self, group: int, near: int) -> int:
        while (slot := self._slot(group, -1, near)) < 0:
            waiting = [
                layer for layer, staged in enumerate(self._staged) if staged and self._group[layer] == group
            ]
            if waiting:
                self._cancel(waiting[0], next(iter(self._staged[waiting[0]])))
            elif not self._ending[group]:
                raise RuntimeError(f"size group {group} has no slot left; please report it")
            else:
                entry = self._ending[group].popleft()
                self._reader.settle(entry.first)
                self._reader.settle(entry.last)
                self._wasted += entry.bytes_read
                return entry.slot
        return slot

    def _cancel(self, layer: int, expert: int) -> None:
        entry = self._forget(layer, expert)
        self.dropped += not entry.complete
        self._stale[self._group[layer]].pop((layer, expert), None)
        self._reader.cancel(entry.first)
        self._reader.cancel(entry.last)
        self._ending[self._group[layer]].append(entry)

    def _forget(self, layer: int, expert: int) -> Staged:
        self.held[layer] -= 1
        return self._staged[layer].pop(expert)

    def _slot(self, group: int, layer: int, near: int) -> int:
        """A slot to read into, the free one that is nearest to `near`, or -1."""
        free, ending, stale = self._free[group], self._ending[group], self._stale[group]
        for _ in range(len(ending)):
            entry = ending.popleft()
            if entry.complete:
                self._wasted += entry.bytes_read
                insort(free, entry.slot)
            else:
                ending.append(entry)
        if not free:
            oldest = next((key for key in stale if key[0] != layer), None)
            if oldest is None:
                return -1
            del stale[oldest]
            entry = self._forget(*oldest)
            self._wasted += entry.bytes_read
            return entry.slot
        at = bisect_left(free, near)
        if at == len(free) or (at and near - free[at - 1] < free[at] - near):
            at -= 1
        return free.pop(at)
