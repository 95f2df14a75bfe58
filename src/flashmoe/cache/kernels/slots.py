"""What the kernels of all policies do to a pool's `Residency`: take, give and free slots, and find the lowest score.

Compiled code counts references to each array that it touches, with atomic instructions, unless told otherwise:
that took three quarters of a replay's time. The arrays here outlive every call and nothing is allocated, so these
kernels are compiled without (`lean`, `inlined`). What allocates says so (`allocating`).

Layers, groups, slots and counts are int64 in calls: numba compiles a function for each type that it is called with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba.extending import register_jitable

from flashmoe.cache import residency

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

#: Options of numba. What would let C call these functions is left out, as is what would let Python: it takes longer to
#: compile than they do.
LEAN: Any = {"_nrt": False, "no_cfunc_wrapper": True}
INLINED: Any = {"forceinline": True, **LEAN}


def _decorator(**options: Any) -> Callable[[Kernel], Kernel]:
    """For functions that compiled code calls; Python runs them as they are written."""

    def decorate(function: Kernel) -> Kernel:
        function.targetoptions = options  # type: ignore[attr-defined]  # as numba names them, for common.kept
        return register_jitable(**options)(function)

    return decorate


lean = _decorator(**LEAN)
inlined = _decorator(**INLINED)
loose = _decorator(fastmath=True, **LEAN)  # sums in any order, so that they use vector instructions
allocating = _decorator(**{**LEAN, "_nrt": True})
centre = inlined(residency.centre)


@inlined
def evictable(res, slot):
    """True when the slot's expert may go: owned and not pinned."""
    return res.owner[slot] >= 0 and res.pin[slot] != res.step[0]


@inlined
def lowest(score, res, layer, g):
    """Slot with the lowest score[L, E] among the evictable ones of a layer (of group g if layer < 0), or -1.

    Equal scores: the lowest (layer, expert) goes.
    """
    best = -1
    best_layer = -1
    worst = np.inf
    step = res.step[0]
    first = max(layer, 0)
    last = layer + 1 if layer >= 0 else res.used.shape[0]
    for m in range(first, last):
        if res.group[m] != g:
            continue
        for i in range(res.used[m]):
            e = res.members[m, i]
            value = score[m, e]
            if value < worst or (value == worst and m == best_layer and e < best):
                slot = res.slot_of[m, e]
                if res.pin[slot] != step:
                    worst = value
                    best = e
                    best_layer = m
    return res.slot_of[best_layer, best] if best >= 0 else -1


@lean
def nearest_free(res, layer):
    """The free slot that lies best for a layer, which comes to the top of its group's stack; there must be one."""
    start = res.group_start[res.group[layer]]
    top = start + res.free_count[res.group[layer]] - 1
    middle = centre(res, layer)
    share = res.quota[layer] + res.lent[layer]
    best = top
    for i in range(top, start - 1, -1):
        if abs(res.free[i] - middle) < abs(res.free[best] - middle):
            best = i
        if 0 <= res.free[i] - middle + share // 2 < share:
            best = i  # its own: no need to look on
            break
    slot = res.free[best]
    res.free[best] = res.free[top]
    res.free[top] = slot
    return np.int64(slot)


@inlined
def pop_free(res, g):
    """Take the slot on top of group g's free stack, or -1."""
    n = res.free_count[g]
    if n == 0:
        return np.int64(-1)
    res.free_count[g] = n - 1
    return np.int64(res.free[res.group_start[g] + n - 1])


@inlined
def put(res, layer, expert, slot):
    """Give a slot (without an owner, on no stack) to an expert."""
    res.slot_of[layer, expert] = slot
    res.owner[slot] = layer * res.slot_of.shape[1] + expert
    res.members[layer, res.used[layer]] = expert
    res.place[slot] = res.used[layer]
    res.used[layer] += 1


@inlined
def drop(res, slot):
    """Take a slot from its expert; the slot then has no owner and is on no stack."""
    key = res.owner[slot]
    layer = key // res.slot_of.shape[1]
    res.slot_of[layer, key % res.slot_of.shape[1]] = -1
    res.owner[slot] = -1
    res.used[layer] -= 1
    other = res.members[layer, res.used[layer]]  # the last member closes the gap
    res.members[layer, res.place[slot]] = other
    if res.slot_of[layer, other] >= 0:
        res.place[res.slot_of[layer, other]] = res.place[slot]


@inlined
def push_free(res, slot):
    """Put a slot without an owner on the free stack of its group."""
    g = 0
    while slot >= res.group_start[g + 1]:
        g += 1
    res.free[res.group_start[g] + res.free_count[g]] = slot
    res.free_count[g] += 1


@inlined
def enough_room(res, layer, misses):
    """True when `misses` experts of `layer` can be placed beside what is pinned in this step."""
    g = res.group[layer]
    room = res.free_count[g]
    if room >= misses:
        return True
    for slot in range(res.group_start[g], res.group_start[g + 1]):
        if res.owner[slot] >= 0 and res.pin[slot] != res.step[0]:
            room += 1
            if room >= misses:
                return True
    return False
