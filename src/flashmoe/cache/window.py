"""Prefill: how a micro-batch's experts find slots without emptying the shares of the other layers.

A micro-batch asks a layer for far more experts than its share holds, often for all. They are read once each: those
that the policy would keep take the slots of those that it gives up, the others pass through the window, slots that the
policy lends for the time of the prompt (EvictionPolicy.window). An expert that is given up but needed in this very
step keeps its slot until the step is done: its successor is read into the window, and the two slots change places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.residency import renumber
from flashmoe.cache.staging import Staged, Staging
from flashmoe.errors import BudgetError

Int32 = NDArray[np.int32]


@dataclass
class Placement:
    """Where the experts of one layer of a micro-batch are, or will be."""

    slots: Int32  # [n] of the requested ids
    requests: int  # distinct experts
    absent: list[tuple[int, int]]  # (expert, slot), to be read
    staged: list[tuple[int, Staged]]  # prefetched, perhaps still under way
    admitted: list[int]  # experts that are resident from now on, once their bytes are in


class PrefillWindow:
    """The slots that `policy` lends to prefill; `staging` keeps them. Not thread-safe: its owner is the ExpertCache."""

    def __init__(self, policy: EvictionPolicy, staging: Staging) -> None:
        self._policy, self._staging = policy, staging
        self._passing: list[int] = []  # slots of experts that leave when the step is done
        self._passing_group = 0
        #: of each layer, whether its requests are to be served by `place`
        self.serves = [False] * policy.residency.n_layers
        self.serves_any = False

    def resize(self, tokens: int, k: int) -> None:
        """Before a step of `tokens` tokens: take slots from the policy, or give them back where it needs none."""
        res = self._policy.residency
        if tokens == 1 and not self.serves_any:
            return
        self.step_done()
        before = res.window_count.copy()
        self._policy.window(tokens, k)
        for group, (old, new) in enumerate(zip(before.tolist(), res.window_count.tolist(), strict=True)):
            start = int(res.group_start[group])
            if new > old:
                self._staging.give(group, res.window[start + old : start + new].tolist())
            elif new < old:
                # not the slots that were lent: experts have changed places with them
                top = start + int(res.free_count[group])
                res.free[top - old : top] = self._staging.claim(group, old)
        self.serves = (res.window_count[res.group] > 0).tolist()
        self.serves_any = any(self.serves)

    def step_done(self) -> None:
        """The engine has computed the layer that was served last."""
        self._staging.give(self._passing_group, self._passing)
        self._passing = []

    def place(self, layer: int, ids: Int32) -> Placement:
        """Find slots for the experts of a layer, ids int32 [tokens, k].

        Raises BudgetError where one token's do not fit.
        """
        res, staging = self._policy.residency, self._staging
        group = int(res.group[layer])
        before = res.slot_of[layer].copy()
        scratch = np.empty((3, ids.shape[1]), np.int32)
        if self._policy.access_each(layer, ids, *scratch) < 0:
            raise BudgetError(
                f"{ids.shape[1]} experts of one layer do not fit into the pool: give more memory"
            )
        distinct = np.unique(ids)
        missing = distinct[before[distinct] < 0]
        resident = res.resident(layer)
        admitted = resident[before[resident] < 0].tolist()
        # the layer's slots that no expert keeps; where the old one is needed in this step, it stays until that is done
        left = set(res.slot_of[layer, resident].tolist()) - set(before[resident].tolist())
        busy = left & set(before[distinct].tolist())
        clean = sorted(left - busy)

        slots = before  # of every expert, from here on
        entries = ((int(e), staging.take(layer, int(e))) for e in missing)
        staged = {expert: entry for expert, entry in entries if entry is not None}
        staging.served(layer)
        for expert, entry in staged.items():
            slots[expert] = entry.slot
        for expert in admitted:
            if slots[expert] < 0 and clean:
                slots[expert] = clean.pop()
        staging.give(group, clean)
        # those that stay first: what is nearest is claimed first
        rest = sorted(missing[slots[missing] < 0].tolist(), key=lambda expert: expert not in admitted)
        slots[rest] = staging.claim(group, len(rest), layer)
        renumber(res, layer, resident, slots[resident])
        passing = set(missing.tolist()) - set(admitted)
        self._passing_group, self._passing = group, [*busy, *(int(slots[e]) for e in passing)]
        return Placement(
            slots=slots[ids.ravel()],
            requests=len(distinct),
            absent=[(e, int(slots[e])) for e in missing.tolist() if e not in staged],
            staged=list(staged.items()),
            admitted=admitted,
        )
