"""The expert cache: the only place that knows slots, policy, staging and reader together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.elastic import ElasticPool
from flashmoe.cache.filling import Demand, Each, Filling
from flashmoe.cache.history import History
from flashmoe.cache.policies.base import MISSES, CompiledRequest, EvictionPolicy
from flashmoe.cache.pool import SlotPool
from flashmoe.cache.recent import RecentRouting
from flashmoe.cache.residency import exchange
from flashmoe.cache.staging import Staging
from flashmoe.cache.stats import CacheObserver, CacheStats
from flashmoe.cache.warm import WarmStart
from flashmoe.cache.window import PrefillWindow
from flashmoe.common.signals import SafeLock
from flashmoe.errors import BudgetError
from flashmoe.storage.reader import ExpertReader

Int32 = NDArray[np.int32]

_NOTICED = 0.001  # seconds after which what one thread has written is seen by compiled code in another one
SURE = 0.7  # of a layer's experts asked for by a micro-batch: then the next layer's are read ahead


class ExpertCache:
    """Makes experts resident. `ensure` returns slots whose bytes are in, whatever happens (see `leave_last`).

    Thread-safe; the slots that `ensure` returns are one caller's until the next call. Residency is updated before the
    reads are made: whatever is raised meanwhile, experts whose bytes are not in are released. Handlers of signals run
    only where reads are waited for (see common.signals).
    """

    def __init__(
        self, pool: SlotPool, reader: ExpertReader, policy: EvictionPolicy, spare: Sequence[int] = ()
    ) -> None:
        """`spare[g]`: slots of size group g that the policy's residency leaves to prefetching."""
        self.pool, self.reader, self.policy = pool, reader, policy
        self.stats: dict[str, CacheStats] = {"prefill": CacheStats(), "decode": CacheStats()}
        self.phase = "prefill"
        residency = policy.residency
        self.staging = Staging(residency, pool, reader, spare or [0] * len(residency.free_count))
        self._prefetching = any(spare)
        self._window = PrefillWindow(policy, self.staging)
        #: How many of the pool's slots are in use.
        self.elastic = ElasticPool(pool, policy, self.staging, spare or [0] * len(residency.free_count))
        self._wanted: Sequence[int] | None = None  # slots, where others are to be in use
        #: Called before every step; it may call `resize`.
        self.before_step: Callable[[], None] = lambda: None
        #: The engine's, for any thread: has its next step announced and the next layer come to `ensure`, come what
        #: may; whether it computes none now.
        self.on_resize: Callable[[], bool] = lambda: True
        #: Whether a graph is being evaluated.
        self.stepping = False
        self._filling = Filling(pool, reader, policy)
        #: The first slot of each layer's size group.
        self.first_slots = self._filling.first_slots
        self.warm: WarmStart | None = None
        self.recent = RecentRouting(pool.top_k, residency.n_experts)
        #: Takes over what `recent` notes, where it is to be kept.
        self.history: History | None = None
        self._lock = SafeLock()
        #: Of benchmarks. While there is one, every request comes to `ensure`.
        self.observer: CacheObserver | None = None
        self._step = 1, 1  # tokens of the present one that pass through the window, and their experts
        self._note_least_group()
        self._make_room(64)

    def _note_least_group(self) -> None:
        """Take note of the slots that the policy has of the smallest size group."""
        residency = self.policy.residency
        self._least_group = int(np.bincount(residency.group, residency.quota).min())
        self._holds_a_layer = self._least_group >= residency.n_experts

    def _make_room(self, n: int) -> None:
        """Have room for requests of `n` ids."""
        #: Where a compiled request finds its ids and leaves their slots, numbered over all size groups; int32 [n].
        self.ids, self.slots, self._miss_expert, self._miss_slot = (np.empty(n, np.int32) for _ in range(4))
        arrays = self.ids, self.slots, self._miss_expert, self._miss_slot
        self._request, self._compiled = self.policy.request(*arrays), self.policy.compiled_request(*arrays)

    def begin_sequence(self) -> None:
        """Tell the policy that a new prompt or conversation begins."""
        with self._lock:
            self.policy.begin_sequence()
            self.recent.begin_sequence()

    def begin_step(self, tokens: int, top_k: int) -> None:
        """Call before `tokens` tokens are evaluated at once: prefill gets slots to work in, decode gets them back.

        Decoding one token of each of several sequences is one request of each layer: what its share cannot hold takes
        slots that other layers need last (`find_victim`), for as long as it is asked for.
        """
        with self._lock:
            self.stepping = True
            self._filling.finish(self.stats[self.phase])
            self.before_step()
            if self._wanted is not None:
                self._adjust()
            if self.history:
                self.history.look()
            decode = self.phase == "decode"
            if decode:
                self.recent.begin_step(tokens)
            together = decode and 1 < tokens <= self.served_together(top_k)
            if self.warm:
                self.warm.pause(tokens > 1)  # slots are lent: none may be away
            self._step = 1 if together else tokens, top_k
            self._window.resize(*self._step)

    def end_step(self) -> None:
        """What `begin_step` has announced is computed, or has failed."""
        self.stepping = False

    def take_history(self) -> tuple[NDArray[np.int16], NDArray[np.int32]] | None:
        """The routing since the last call (see `History.routing`); None where there is none, or a step is under way.

        From any thread.
        """
        with self._lock:
            return self.history.routing() if self.history and not self.stepping else None

    def resize(self, slots: Sequence[int]) -> None:
        """Have `slots[g]` slots of each size group in use (see ElasticPool), from the next step or layer on.

        From any thread.
        """
        self._wanted = list(slots)

    def resize_now(self, slots: Sequence[int]) -> None:
        """`resize`, at once where no step is under way. From a thread that evaluates nothing."""
        if list(slots) == self.elastic.slots:
            self._wanted = None
            return
        self.resize(slots)
        self.on_resize()
        time.sleep(_NOTICED)
        with self._lock:
            if not self.stepping and self.on_resize():
                self._adjust()

    def _adjust(self) -> None:
        """Have as many slots in use as are wanted; while none is used."""
        if self.reader.hangs:  # late bytes would come upon experts that have moved
            return
        wanted, self._wanted = self._wanted, None
        if wanted is None or wanted == self.elastic.slots:
            return
        self._window.resize(1, self._step[1])  # what is lent comes back
        if self.warm:
            self.warm.give_way()
        self.elastic.resize(wanted)
        self._note_least_group()

    def compiled_request(self, n: int) -> CompiledRequest | None:
        """The policy's request of up to `n` ids for compiled code, on `ids` and `slots`.

        None where a request is more than the policy's affair in the step that has begun: slots are lent to prefill, a
        warm start is under way, or an observer is to see it. What misses is left to `ensure`; where nothing does,
        `served` is to follow if anything of the layer is `held`.
        """
        warm = self.warm is not None and self.warm.running
        if warm or self.observer or self._window.serves_any or n > len(self.ids):
            return None
        return self._compiled

    def served_together(self, top_k: int) -> int:
        """How many sequences' tokens are one request of each layer while decoding, see `begin_step`."""
        return (len(self.ids) if self._holds_a_layer else self._least_group) // top_k

    def withdraw(self, layer: int, requested: int) -> None:
        """Forget what a compiled request has let in, where `ensure` did not come to read it."""
        with self._lock:
            for expert in self._miss_expert[: requested & MISSES].tolist():
                self.policy.release(layer, expert)

    @property
    def held(self) -> NDArray[np.int64]:
        """int64 [L + 1]: how many experts of each layer are prefetched or about to be; then 0."""
        return self.staging.held

    def served(self, layer: int) -> None:
        """A compiled request has found all experts of a layer: what else was prefetched is not needed."""
        with self._lock:
            self.staging.served(layer)

    def reserve(self, n: int) -> None:
        """Have room for requests of `n` ids, so that `ids` and `slots` stay where they are."""
        if n > len(self.ids):
            self._make_room(n)

    def warm_start(self, ranked: Int32) -> None:
        """Read experts of an earlier session in the background, the best first, as far as slots are free.

        ranked: see EvictionPolicy.ranking.
        """
        self.warm = WarmStart(self.policy.residency, self.pool, self.reader, self._lock, ranked)

    def close(self) -> None:
        """End what runs in the background."""
        if self.warm:
            self.warm.close()

    def ensure(
        self,
        layer: int,
        ids: Int32,
        *,
        leave_last: bool = False,
        leave_all: bool = False,
        meanwhile: Callable[[], None] | None = None,
        each: Each | None = None,
        requested: int = -1,
    ) -> Int32:
        """Make the experts `ids` (int32 [n] or [tokens, top_k], may repeat) of a layer resident and complete.

        With `leave_last` the last weight (down) may still be under way: call `finish` before it is used. With
        `leave_all` all weights of the experts in `late` may, except in a step that passes through the window.
        `meanwhile` is called once the reads are queued, before they are waited for. `each` is called with every expert
        and its slot as soon as its bytes are in, the residents first: what it does happens while the others are read.
        `requested`: what the `compiled_request` for these ids has returned, where it was made.
        Returns their slots, int32 [n], numbered in the layer's size group; valid until the next call. Raises ReadError
        (the failed experts are then absent and the cache is consistent) and BudgetError (they cannot fit at once).
        """
        with self._lock:
            observer = self.observer
            if observer:
                observer.enter(layer)
            try:
                return self._ensure(layer, ids, leave_last, leave_all, meanwhile, each, requested)
            finally:
                if observer:
                    observer.leave()

    def _ensure(
        self,
        layer: int,
        ids: Int32,
        leave_last: bool,
        leave_all: bool,
        meanwhile: Callable[[], None] | None,
        each: Each | None,
        requested: int,
    ) -> Int32:
        self._filling.finish(self.stats[self.phase])
        # not where a compiled request has let experts in: they are not complete yet
        if self._wanted is not None and requested < 0:
            self._adjust()
            self._window.resize(*self._step)
        if self._window.serves[layer]:
            return self._ensure_batch(layer, np.atleast_2d(ids), leave_last, meanwhile, each)
        ids = ids.ravel()
        if len(ids) > len(self.slots):
            self._make_room(2 * len(ids))
        slots = self.slots[: len(ids)]
        self.ids[: len(ids)] = ids
        done = self._request(layer, len(ids)) if requested < 0 else requested
        if done < 0 and self.warm and self.warm.give_way():
            done = self._request(layer, len(ids))
        if done < 0:
            raise BudgetError(
                f"{len(np.unique(ids))} experts of one layer do not fit into the pool at once: "
                "give more memory, or a smaller micro-batch (-ub)"
            )
        first = self.first_slots[layer]
        misses = done & MISSES
        self.stats[self.phase].hits += done >> 32
        settle = partial(self._settle, layer, ids, meanwhile)
        if misses:
            self._fill(layer, ids, slots, misses, leave_last, leave_all, settle, each)
        else:
            settle()
            if each:
                for expert, slot in _pairs(ids, slots).items():
                    each(expert, slot - first)
        if first:
            slots -= first
        return slots

    def _settle(self, layer: int, ids: Int32, meanwhile: Callable[[], None] | None) -> None:
        """What can wait until a request's reads have begun."""
        self.staging.served(layer)
        if self.phase == "decode":
            self.recent.add(layer, ids)
        if meanwhile:
            meanwhile()

    def _ensure_batch(
        self,
        layer: int,
        ids: Int32,
        leave_last: bool,
        meanwhile: Callable[[], None] | None,
        each: Each | None,
    ) -> Int32:
        """`ensure` for a micro-batch; while it computes, the next layer's experts are read."""
        self._window.step_done()
        self.reader.poll()
        if self.phase == "decode":
            self.recent.add(layer, ids.ravel())
        placed = self._window.place(layer, ids)
        stats = self.stats[self.phase]
        stats.hits += placed.requests - len(placed.absent) - len(placed.staged)

        def look_ahead() -> None:
            residency = self.policy.residency
            if placed.requests >= SURE * residency.n_experts and layer + 1 < residency.n_layers:
                self._plan(layer + 1, np.flatnonzero(residency.slot_of[layer + 1] < 0).tolist())
            if meanwhile:
                meanwhile()
            self.reader.go_on()

        demand = Demand(layer, placed.admitted, placed.absent, placed.staged)
        with self._filling.releasing(demand):
            if each is None:
                self._filling.read(demand, stats, leave_last, look_ahead)
            else:
                self._filling.read_each(demand, stats, _pairs(ids.ravel(), placed.slots), each, look_ahead)
        return placed.slots - self.first_slots[layer]

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Read experts that a layer will probably ask for, the likeliest first, while no demand read is under way.

        Earlier wishes for the same layer that have not begun are forgotten. Does nothing without spare slots.
        """
        with self._lock:
            if self._prefetching:
                self._plan(layer, experts)

    @property
    def seconds_per_miss(self) -> float:
        """What an expert that is missing while decoding has been waited for, on average."""
        stats = self.stats["decode"]
        return stats.stall_seconds / max(1, stats.misses + stats.late_hits)

    def _plan(self, layer: int, experts: Sequence[int]) -> None:
        self.staging.plan(layer, experts)
        self.stats[self.phase].wasted_bytes += self.staging.take_waste()

    @property
    def pending(self) -> bool:
        """Whether `ensure` has left reads under way."""
        return self._filling.pending is not None

    @property
    def late(self) -> frozenset[int]:
        """Experts that `ensure` was allowed to leave under way with all weights (`leave_all`), and has."""
        return self._filling.late

    def finish(self, *, leave_last: bool = False) -> None:
        """Wait for what `ensure` has left under way, or for all but the last weight.

        Raises ReadError; the experts are then absent.
        """
        with self._lock:
            layer, observer = self._filling.pending, self.observer
            if observer and layer is not None:
                observer.enter(layer)
            try:
                self._filling.finish(self.stats[self.phase], leave_last=leave_last)
            finally:
                if observer and layer is not None:
                    observer.leave()

    def _fill(
        self,
        layer: int,
        ids: Int32,
        slots: Int32,
        misses: int,
        leave_last: bool,
        leave_all: bool,
        meanwhile: Callable[[], None] | None,
        each: Each | None,
    ) -> None:
        """Let in what `access` missed: staged experts change places with the slots meant for them, others are read."""
        experts = self._miss_expert[:misses].tolist()
        missed = zip(experts, self._miss_slot[:misses].tolist(), strict=True)
        demand, stats = Demand(layer, experts), self.stats[self.phase]
        with self._filling.releasing(demand):
            if self.staging.holds(layer):
                self.reader.poll()
                self._take_staged(demand, missed, slots)
            else:
                demand.absent += missed
            if each is None:
                self._filling.read(demand, stats, leave_last, meanwhile, leave_all)
            else:
                self._filling.read_each(demand, stats, _pairs(ids, slots), each, meanwhile)

    def _take_staged(self, demand: Demand, missed: Iterable[tuple[int, int]], slots: Int32) -> None:
        """Of the missed experts and their slots: those to be read, and those that were prefetched, where they are."""
        residency, layer = self.policy.residency, demand.layer
        for expert, slot in missed:
            entry = self.staging.take(layer, expert)
            if entry is None:
                demand.absent.append((expert, slot))
                continue
            demand.staged.append((expert, entry))
            self.staging.give(int(residency.group[layer]), [exchange(residency, layer, expert, entry.slot)])
            slots[slots == slot] = entry.slot


def _pairs(ids: Int32, slots: Int32) -> dict[int, int]:
    """The slot of each distinct expert, experts in ascending order."""
    return dict(sorted(zip(ids.tolist(), slots.tolist(), strict=True)))
