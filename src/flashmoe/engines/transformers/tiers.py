"""Experts on a device, behind them the pool in RAM, behind that the drive.

The tier on the device is an ExpertCache like the one in RAM, with slots and a policy of its own; what it would read
from a drive are copies from the tier below. What it lacks of a layer's experts is asked of the cache in RAM at once:

1. the reads of those that RAM lacks too begin;
2. the layer's experts that the device has are queued for computing;
3. those that RAM has are copied, on a stream of their own, and queued for computing as they come; or the CPU computes
   them, where that is faster (see latency);
4. as reads end, the others follow.

Copies wait for what was queued for computing before the request: it may use the slots that they fill. RAM is asked
again only when all copies have left it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.pool import SlotPool
from flashmoe.engines.transformers.device import Device
from flashmoe.engines.transformers.latency import Latency, Where
from flashmoe.engines.transformers.slots import Copy, DeviceSlots, Each, HostSlots, Weights
from flashmoe.errors import BudgetError
from flashmoe.storage.reader import ExpertReader, Ticket

Int32 = NDArray[np.int32]


class CopyQueue:
    """To an ExpertCache it is the reader: keeps what is asked for until `Tiers` copies it."""

    hangs = False  # no copy is given up

    def __init__(self) -> None:
        self.demanded: list[tuple[Ticket, Copy]] = []
        self.ahead: list[tuple[Ticket, Copy]] = []

    def demand_in_order(self, batches: Sequence[Sequence[Copy]], tickets: list[Ticket]) -> list[Ticket]:
        asked = [self._add(self.demanded, reads) for reads in batches]
        tickets += asked
        return asked

    def prefetch(self, reads: Sequence[Copy]) -> Ticket:
        return self._add(self.ahead, reads)

    def promote(self, ticket: Ticket) -> None:
        self.demanded += [item for item in self.ahead if item[0] is ticket]
        self.ahead = [item for item in self.ahead if item[0] is not ticket]

    def cancel(self, ticket: Ticket) -> None:
        """What has not been copied never will be."""
        for items in (self.demanded, self.ahead):
            items[:] = [item for item in items if item[0] is not ticket]
        ticket.pending = 0

    settle = cancel

    def poll(self) -> None:
        """Nothing goes on by itself."""

    go_on = poll

    def wait(self, ticket: Ticket) -> None:
        """All has been copied while the request was made: see `Tiers`."""
        assert ticket.done

    def _add(self, items: list[tuple[Ticket, Copy]], reads: Sequence[Copy]) -> Ticket:
        ticket = Ticket(cast(Any, reads))
        items += [(ticket, copy) for copy in reads]
        return ticket


class Tiers:
    """Implements `slots.Residents` with a device's slots over those of a pool in RAM, and `engines.base.Tiers`."""

    def __init__(
        self,
        device: Device,
        slots: DeviceSlots,
        policy: EvictionPolicy,
        ram: ExpertCache,
        ram_slots: HostSlots,
        latency: Latency | None,
    ) -> None:
        """policy: bound to a residency of the device's slots. latency: without, experts are always copied."""
        self._device, self._slots, self._ram, self._ram_slots = device, slots, ram, ram_slots
        self._latency = latency
        self._queue = CopyQueue()
        self._cache = ExpertCache(cast(SlotPool, slots), cast(ExpertReader, self._queue), policy)
        self._first = [int(policy.residency.group_start[g]) for g in policy.residency.group]
        self._ram_first = [int(ram.policy.residency.group_start[g]) for g in ram.policy.residency.group]
        self._paid: dict[tuple[int, int], float] = {}  # by (layer, expert): see latency
        self._copies = self._computed = 0
        self.waited = 0.0

    @property
    def computes(self) -> bool:
        return self._latency is not None

    def begin_sequence(self) -> None:
        self._cache.begin_sequence()

    def begin_step(self, tokens: int, top_k: int) -> None:
        self._device.settle()  # what comes may be read ahead into slots that copies are leaving
        self._ram.begin_step(tokens, top_k)
        self._cache.begin_step(tokens, top_k)

    @property
    def policy(self) -> EvictionPolicy:
        """Of the cache in RAM, for a Prefetcher."""
        return self._ram.policy

    @property
    def seconds_per_miss(self) -> float:
        """Of the cache in RAM, for a Prefetcher."""
        return self._ram.seconds_per_miss

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Read experts into RAM ahead of time, those aside that the device has."""
        here = self._cache.policy.residency.slot_of[layer]
        self._ram.prefetch(layer, [expert for expert in experts if here[expert] < 0])

    def ensure(
        self, layer: int, ids: Int32, meanwhile: Callable[[], None], each: Each, *, anywhere: bool
    ) -> None:
        self._device.use()  # what was copied ahead
        self._cache.phase = self._ram.phase
        stats = self._cache.stats[self._ram.phase]
        hits = stats.hits
        apart = self._to_compute(layer, ids) if anywhere else {}
        left = ids[~np.isin(ids, list(apart))][:, None] if apart else ids
        done = set()

        def run(expert: int, weights: Weights) -> None:
            done.add(expert)
            each(expert, weights)

        def run_here(expert: int, slot: int) -> None:
            if expert not in done:
                run(expert, self._slots.of(layer, slot))

        def run_residents() -> None:
            meanwhile()
            slots = self._cache.policy.residency.slot_of[layer]
            for expert in np.setdiff1d(left, list(coming)).tolist():
                if slots[expert] >= 0:  # else it gives way after this step, and comes last
                    run_here(expert, int(slots[expert]) - self._first[layer])

        def run_from_ram(expert: int, slot: int) -> None:
            weights = self._ram_slots.of(layer, slot)
            if expert in coming:
                ticket, target = coming[expert]
                weights = self._copy(layer, expert, target, weights)
                ticket.pending = 0
                self._device.use()
            else:
                self._paid[layer, expert] = apart[expert]
                self._computed += 1
            run(expert, weights)

        coming: dict[int, tuple[Ticket, int]] = {}

        def bring() -> None:
            coming.update({copy.expert: (ticket, copy.slot) for ticket, copy in self._queue.demanded})
            self._queue.demanded.clear()
            self._device.follow()
            self._from_ram(layer, sorted({*coming, *apart}), run_residents, run_from_ram)
            self._look_ahead()

        if left.size:
            self._cache.ensure(layer, left, meanwhile=bring, each=run_here)
        else:
            bring()
        self._ram.stats[self._ram.phase].hits += stats.hits - hits

    def figures(self) -> dict[str, float]:
        device, ram = self._cache.stats["decode"], self._ram.stats["decode"]
        self._device.settle()
        seconds, nbytes = self._device.copy_seconds, self._device.copied_bytes
        return {
            "vram_slots": self._cache.policy.residency.n_slots,
            "vram_hits": device.hits,
            "ram_hits": ram.hits - device.hits,
            "ssd_misses": ram.misses + ram.late_hits,
            "computed_on_cpu": self._computed,
            "copies": self._copies,
            "copied_bytes": nbytes,
            "pcie_bytes_per_second": nbytes / seconds if seconds else 0.0,
        }

    def close(self) -> None:
        self._device.unpin()

    def _to_compute(self, layer: int, ids: Int32) -> dict[int, float]:
        """The experts that the CPU is to compute, and what it will have spent on each: RAM has them, the device not."""
        residency = self._cache.policy.residency
        if self._latency is None or residency.free_count[residency.group[layer]]:
            return {}
        found = {}
        here, below = residency.slot_of[layer], self._ram.policy.residency.slot_of[layer]
        experts, counts = np.unique(ids, return_counts=True)
        for expert, n in zip(experts.tolist(), counts.tolist(), strict=True):
            paid = self._paid.get((layer, expert), 0.0)
            if here[expert] < 0 <= below[expert] and self._latency.choose(n, paid) is Where.COMPUTE:
                found[expert] = paid + self._latency.host_seconds(n)
        return found

    def _from_ram(
        self, layer: int, experts: list[int], meanwhile: Callable[[], None], each: Callable[[int, int], None]
    ) -> None:
        """Ask RAM for experts; for some after the others where they do not fit into it at once."""
        if not experts:
            meanwhile()
            return
        began = time.perf_counter()
        self._device.settle()
        self.waited += time.perf_counter() - began
        try:
            self._ram.ensure(layer, np.array(experts, np.int32)[:, None], meanwhile=meanwhile, each=each)
        except BudgetError:
            if len(experts) == 1:
                raise
            middle = len(experts) // 2
            self._from_ram(layer, experts[:middle], meanwhile, each)
            self._from_ram(layer, experts[middle:], lambda: None, each)

    def _look_ahead(self) -> None:
        """Copy what a prompt's next layer will ask for, as far as RAM has it, while this one computes."""
        below = self._ram.policy.residency.slot_of
        waiting, self._queue.ahead = self._queue.ahead, []
        for ticket, (layer, expert, target) in waiting:
            slot = int(below[layer, expert])
            if slot < 0:
                self._queue.ahead.append((ticket, Copy(layer, expert, target)))
                continue
            self._copy(layer, expert, target, self._ram_slots.of(layer, slot - self._ram_first[layer]))
            ticket.pending = 0

    def _copy(self, layer: int, expert: int, slot: int, weights: Weights) -> Weights:
        """An expert's weights on the device, once `use` has been called."""
        began = time.perf_counter()
        there = self._slots.of(layer, slot)
        self._device.copy([(there[name], weight) for name, weight in weights.items()])
        self._paid.pop((layer, expert), None)
        self._copies += 1
        self.waited += time.perf_counter() - began
        return there
