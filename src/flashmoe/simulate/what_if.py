"""What a run's last requests would have missed with a larger pool, or under other policies.

Replays through the policies' own kernels, access by access, from an empty pool. Nothing is compiled for it: a policy
whose kernels are not on disk yet, because no run has had it, is left out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from copy import copy

import numpy as np

from flashmoe.cache.policies import create
from flashmoe.cache.policies.base import MISSES, EvictionPolicy
from flashmoe.cache.recent import RecentRouting
from flashmoe.cache.residency import make_residency
from flashmoe.cache.sizing import quotas, split_slots
from flashmoe.common.numba_internals import event

MOST_REQUESTS = 8192  # replayed: 512 tokens of 16 layers, in 30 to 60 ms
MOST_SECONDS = 0.5  # after which no other policy is begun
PIECE = 256  # requests: a millisecond


class _NotCompiled(Exception):
    """A replay would have to wait for the compiler."""


class _Refuse(event.Listener):
    """Keeps this thread from compiling; what is on disk is loaded."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def on_start(self, event: event.Event) -> None:
        if threading.get_ident() == self._thread:
            raise _NotCompiled

    def on_end(self, event: event.Event) -> None: ...


class WhatIf:
    """Misses of the last requests of a run. A first use is no miss here: no pool and no policy can change it."""

    def __init__(
        self,
        recent: RecentRouting,
        policy: EvictionPolicy,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        """policy: the run's own, bound to its pool; pause: called after every millisecond of work."""
        ids, begins = recent.last()
        tokens = MOST_REQUESTS // ids.shape[1]
        self._ids, self._begins = ids[-tokens:].astype(np.int32), begins[-tokens:]
        self._first_uses = sum(len(np.unique(own[own >= 0])) for own in np.moveaxis(self._ids, 1, 0))
        self._policy, self._pause = policy, pause
        self._slots = int(policy.residency.quota.sum() + policy.residency.lent.sum())
        self._n_experts, self._top_k = recent.n_experts, recent.top_k

    def larger(self, factor: float) -> int:
        """Misses of the run's own policy with `factor` times the slots; 1: its own pool."""
        return self._misses(copy(self._policy), factor)

    def others(self, specs: Sequence[str]) -> dict[str, int]:
        """Misses of other policies with the same slots, by spec, as far as they are compiled and time allows."""
        began, found = time.thread_time(), {}
        for spec in dict.fromkeys(specs):
            if time.thread_time() - began > MOST_SECONDS:
                break
            policy = create(spec)
            if policy.name != self._policy.name:
                try:
                    with event.install_listener("numba:compile", _Refuse()):
                        found[spec] = self._misses(policy)
                except _NotCompiled:
                    continue
        return found

    def _misses(self, policy: EvictionPolicy, factor: float = 1.0) -> int:
        k = self._ids.shape[2]
        groups = self._policy.residency.group.tolist()
        split = split_slots(int(self._slots * factor), groups, self._top_k, self._n_experts)
        quota = quotas(split, groups, self._top_k, self._n_experts)
        policy.bind(make_residency(len(groups), self._n_experts, quota, groups))
        wanted, slots, miss_expert, miss_slot = (np.empty(k, np.int32) for _ in range(4))
        request = policy.request(wanted, slots, miss_expert, miss_slot)
        misses = done = 0
        for begins, token in zip(self._begins, self._ids, strict=True):
            if begins:
                policy.begin_sequence()
            for layer, ids in enumerate(token):
                wanted[:] = ids
                misses += request(layer, k) & MISSES
            done += len(groups)
            if done >= PIECE:
                self._pause()
                done = 0
        return misses - self._first_uses
