"""How many of a pool's slots are in use: fewer where memory is short, and as many as before when it is there again.

The engine's tensors keep their shapes. The slots at the end of each size group are those that go: what the policy keeps
of their experts moves to slots further in front, and their memory is given back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.pool import SlotPool
from flashmoe.cache.residency import exchange, set_free
from flashmoe.cache.sizing import quotas
from flashmoe.cache.staging import Staging


class ElasticPool:
    """The slots in use of every size group. Not thread-safe: its owner is the ExpertCache.

    Call `resize` while nothing is computed with slots, no slot is lent to a prompt, and no read is under way but those
    of `staging`.
    """

    def __init__(
        self, pool: SlotPool, policy: EvictionPolicy, staging: Staging, spare: Sequence[int]
    ) -> None:
        """spare[g]: slots of size group g that are staging's; they stay so many."""
        self._pool, self._policy, self._staging = pool, policy, staging
        self._spare = list(spare)
        #: Slots of each size group: those there are, and those in use.
        self.most: list[int] = np.diff(policy.residency.group_start).tolist()
        self.slots = list(self.most)
        self.most_unused_bytes = 0  # so far

    @property
    def unused_bytes(self) -> int:
        """What the slots that are not in use would take."""
        unused = [most - n for most, n in zip(self.most, self.slots, strict=True)]
        return sum(n * size for n, size in zip(unused, self._pool.slot_bytes, strict=True))

    def resize(self, slots: Sequence[int]) -> None:
        """Use `slots[g]` slots of each size group: at least the spare ones and one, at most those there are."""
        residency = self._policy.residency
        left = [n - spare for n, spare in zip(slots, self._spare, strict=True)]
        residency.quota[:] = quotas(left, residency.group.tolist(), self._pool.top_k, residency.n_experts)
        for group, (before, wanted) in enumerate(zip(self.slots, slots, strict=True)):
            if wanted == before:
                continue
            self._evict(np.flatnonzero(residency.group == group), left[group])
            self._move(group, wanted)
            self._pool.use(group, wanted)
            if wanted > before:
                self._pool.prefault()
        self.slots = list(slots)  # at once: other threads read it
        self.most_unused_bytes = max(self.most_unused_bytes, self.unused_bytes)

    def _evict(self, members: np.ndarray, most: int) -> None:
        """Let the layers have `most` experts together; those furthest above their share give theirs up."""
        residency = self._policy.residency
        surplus = int(residency.used[members].sum()) - most
        if surplus <= 0:
            return
        ranked = self._policy.ranking()
        for _ in range(surplus):
            layer = int(members[(residency.used - residency.quota)[members].argmax()])
            self._policy.release(layer, int(ranked[layer, residency.used[layer] - 1]))

    def _move(self, group: int, slots: int) -> None:
        """Let nothing be in slots beyond the first `slots` ones, and hand out anew those of them without an expert."""
        residency, spare = self._policy.residency, self._spare[group]
        start, end = residency.group_start[group : group + 2].tolist()
        self._staging.claim(group, spare)
        beyond = start + slots
        empty = (start + np.flatnonzero(residency.owner[start:beyond] < 0)).tolist()
        for slot in (beyond + np.flatnonzero(residency.owner[beyond:end] >= 0)).tolist():
            layer, expert = divmod(int(residency.owner[slot]), residency.n_experts)
            target = empty.pop(0)
            self._pool.move(group, slot - start, target - start)
            exchange(residency, layer, expert, target)
        set_free(residency, group, empty[: len(empty) - spare])
        self._staging.give(group, empty[len(empty) - spare :])
