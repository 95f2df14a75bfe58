"""The loops that every eviction policy shares: one access, room for a prefetch, the replay of a trace.

A policy is four kernels over its own state (a NamedTuple class of arrays) and the pool's `Residency`:

    record(st, res, layer, ids, n)   the distinct experts ids[:n] of a layer are requested; residency is still
                                     as before the access (slot_of >= 0: a hit). Called once per access.
    victim(st, res, layer, g)        slot to evict: of this layer, or with layer < 0 of any layer in size
                                     group g; -1 where `evictable` allows none.
    evicted(st, res, layer, expert)  the expert is about to lose its slot.
    begin(st)                        a sequence begins.

`rules(State, ...)` registers them, and the loops find them by the type of the state they are given (numba
resolves
that while compiling: no pointers, no Python). Each policy module wraps the loops in cached module-level
functions, so that a second start compiles nothing. Kernels return numbers and never raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload

from flashmoe.cache.residency import GLOBAL

# What happened to a request, in the bits that replay writes.
NOT_COUNTED, MISS, HIT = 0, 1, 2


_RULES: dict[type, dict[str, Callable[..., Any]]] = {}


def rules(
    state: type,
    record: Callable[..., Any],
    victim: Callable[..., Any],
    evicted: Callable[..., Any],
    begin: Callable[..., Any],
) -> None:
    """Register the four kernels (plain functions or njit ones, with the argument names above) of a state
    class. The name of the class must be its own: numba names compiled code after it."""
    for other in _RULES:
        if other is not state and other.__name__ == state.__name__:
            raise ValueError(f"{other} has the same name: numba's symbols would clash, choose another")
    kernels = {"record": record, "victim": victim, "evicted": evicted, "begin": begin}
    _RULES[state] = {name: getattr(kernel, "py_func", kernel) for name, kernel in kernels.items()}


def record(st, res, layer, ids, n):
    raise NotImplementedError


def victim(st, res, layer, g):
    raise NotImplementedError


def evicted(st, res, layer, expert):
    raise NotImplementedError


def begin(st):
    raise NotImplementedError


@overload(record, jit_options={"forceinline": True})
def _record(st, res, layer, ids, n):
    return _RULES[st.instance_class]["record"]


@overload(victim, jit_options={"forceinline": True})
def _victim(st, res, layer, g):
    return _RULES[st.instance_class]["victim"]


@overload(evicted, jit_options={"forceinline": True})
def _evicted(st, res, layer, expert):
    return _RULES[st.instance_class]["evicted"]


@overload(begin, jit_options={"forceinline": True})
def _begin(st):
    return _RULES[st.instance_class]["begin"]


@njit(forceinline=True)
def evictable(res, slot):
    """True when the slot's expert may go: owned, not pinned, not locked, not a prefetch that still waits."""
    key = res.owner[slot]
    if key < 0 or res.pin[slot] == res.step[0] or res.locked[slot] != 0:
        return False
    return res.fresh[slot] != res.accesses[key // res.slot_of.shape[1]] + 1


@njit(forceinline=True)
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
        waits = res.accesses[m] + 1
        for i in range(res.used[m]):
            e = res.members[m, i]
            value = score[m, e]
            if value < worst or (value == worst and m == best_layer and e < best):
                slot = res.slot_of[m, e]
                if res.pin[slot] != step and res.locked[slot] == 0 and res.fresh[slot] != waits:
                    worst = value
                    best = e
                    best_layer = m
    return res.slot_of[best_layer, best] if best >= 0 else -1


@njit(forceinline=True)
def pop_free(res, g):
    """Take the slot on top of group g's free stack, or -1."""
    n = res.free_count[g]
    if n == 0:
        return -1
    res.free_count[g] = n - 1
    return res.free[res.group_start[g] + n - 1]


@njit(forceinline=True)
def put(res, layer, expert, slot):
    """Give a slot (owned by nobody, on no stack) to an expert."""
    res.slot_of[layer, expert] = slot
    res.owner[slot] = layer * res.slot_of.shape[1] + expert
    res.members[layer, res.used[layer]] = expert
    res.place[slot] = res.used[layer]
    res.used[layer] += 1


@njit(forceinline=True)
def drop(res, slot):
    """Take a slot from its expert; the slot is then owned by nobody and on no stack."""
    key = res.owner[slot]
    layer = key // res.slot_of.shape[1]
    res.slot_of[layer, key % res.slot_of.shape[1]] = -1
    res.owner[slot] = -1
    res.fresh[slot] = 0
    res.used[layer] -= 1
    other = res.members[layer, res.used[layer]]  # the last member closes the gap
    res.members[layer, res.place[slot]] = other
    if res.slot_of[layer, other] >= 0:
        res.place[res.slot_of[layer, other]] = res.place[slot]


@njit(forceinline=True)
def push_free(res, slot):
    """Put a slot that nobody owns on the free stack of its group."""
    g = 0
    while slot >= res.group_start[g + 1]:
        g += 1
    res.free[res.group_start[g] + res.free_count[g]] = slot
    res.free_count[g] += 1


@njit(forceinline=True)
def evict(st, res, slot):
    """Tell the policy and take the slot from its expert."""
    key = res.owner[slot]
    layer = key // res.slot_of.shape[1]
    evicted(st, res, layer, key - layer * res.slot_of.shape[1])
    drop(res, slot)


@njit
def donor_above_quota(st, res, layer):
    """Victim among the other layers of the group that are above their quota, the most indebted first; slot or
    -1."""
    g = res.group[layer]
    bound, bound_layer = np.int64(1) << 40, -1
    while True:
        best, best_layer = np.int64(0), -1
        for other in range(res.quota.shape[0]):
            excess = np.int64(res.used[other]) - res.quota[other]
            if res.group[other] != g or other == layer or excess <= best:
                continue
            if excess < bound or (excess == bound and other > bound_layer):
                best, best_layer = excess, other
        if best_layer < 0:
            return -1
        slot = victim(st, res, best_layer, g)
        if slot >= 0:
            return slot
        bound, bound_layer = best, best_layer


@njit
def borrow_from_others(st, res, layer):
    """Slot for a layer whose own slots are all pinned: a free one, one above quota, or of the layers just
    behind."""
    g = res.group[layer]
    if res.free_count[g] > 0:
        return res.free[res.group_start[g] + res.free_count[g] - 1]
    slot = donor_above_quota(st, res, layer)
    n_layers = res.quota.shape[0]
    for back in range(1, n_layers):
        if slot >= 0:
            break
        other = (layer - back + n_layers) % n_layers  # just served, so needed last
        if res.group[other] == g:
            slot = victim(st, res, other, g)
    return slot


@njit(forceinline=True)
def find_victim(st, res, layer, borrow):
    """Slot that `layer` may take for a new expert, without changing anything; free (owner < 0) or owned, -1
    if none.

    Global partition: a free slot, else any layer's victim. Otherwise a layer below its quota takes a free
    slot, else a victim of the layer most above quota; a layer at its quota takes its own victim. With
    `borrow` a layer whose own slots are all pinned goes on to free slots and to other layers.
    """
    g = res.group[layer]
    everyone = res.partition[0] == GLOBAL
    if everyone or res.used[layer] < res.quota[layer]:
        if res.free_count[g] > 0:
            return res.free[res.group_start[g] + res.free_count[g] - 1]
        if not everyone:
            slot = donor_above_quota(st, res, layer)
            if slot >= 0:
                return slot
    slot = victim(st, res, -1 if everyone else layer, g)
    if slot < 0 and borrow and not everyone:
        slot = borrow_from_others(st, res, layer)
    return slot


@njit(forceinline=True)
def take(st, res, layer):
    """Slot for a demanded expert of `layer`, freed from its owner; -1 where the whole group is pinned or
    locked."""
    slot = find_victim(st, res, layer, True)
    if slot < 0:  # only prefetches that still wait are left: a demand goes first
        g = res.group[layer]
        for s in range(res.group_start[g], res.group_start[g + 1]):
            res.fresh[s] = 0
        slot = find_victim(st, res, layer, True)
        if slot < 0:
            return -1
    if res.owner[slot] < 0:
        return pop_free(res, res.group[layer])
    evict(st, res, slot)
    return slot


@njit(forceinline=True)
def enough_room(res, layer, misses):
    """True when `misses` experts of `layer` can be placed beside what is pinned in this step and locked."""
    g = res.group[layer]
    room = res.free_count[g]
    if room >= misses:
        return True
    for slot in range(res.group_start[g], res.group_start[g + 1]):
        if res.owner[slot] >= 0 and res.pin[slot] != res.step[0] and res.locked[slot] == 0:
            room += 1
            if room >= misses:
                return True
    return False


@njit
def access_loop(st, res, layer, ids, slots_out, miss_expert, miss_slot):
    """One request step of a layer: see EvictionPolicy.access. ids int32 [n], may repeat; -1 in ids is
    skipped."""
    res.step[0] += 1
    step = res.step[0]
    n = ids.shape[0]
    n_distinct = 0
    misses = 0
    # Distinct experts go to miss_expert[:n_distinct] for the moment; hits are pinned at once.
    for i in range(n):
        e = ids[i]
        if e < 0 or res.seen[e] == step:
            continue
        res.seen[e] = step
        miss_expert[n_distinct] = e
        n_distinct += 1
        slot = res.slot_of[layer, e]
        if slot >= 0:
            res.pin[slot] = step
        else:
            misses += 1
    if misses > 0 and not enough_room(res, layer, misses):
        return -1
    res.accesses[layer] += 1
    record(st, res, layer, miss_expert, n_distinct)
    done = 0
    if misses > 0:
        for i in range(n_distinct):  # compacts in place: done <= i
            e = miss_expert[i]
            if res.slot_of[layer, e] >= 0:
                continue
            slot = take(st, res, layer)
            if slot < 0:
                return -1
            put(res, layer, e, slot)
            res.pin[slot] = step
            miss_expert[done] = e
            miss_slot[done] = slot
            done += 1
    for i in range(n):
        slots_out[i] = res.slot_of[layer, ids[i]] if ids[i] >= 0 else -1
    return done


@njit
def room_loop(st, res, layer):
    """Make sure that `layer` has a free slot for a prefetch and return it, or -1. The slot stays on the free
    stack."""
    slot = find_victim(st, res, layer, False)
    if slot < 0 or res.owner[slot] < 0:
        return slot
    evict(st, res, slot)
    push_free(res, slot)
    return slot


@njit(cache=True)
def place_free(res, layer, expert, slot):
    """Give a free slot to a prefetched expert; 0, or -1 where the slot is not free or the expert is
    resident."""
    g = res.group[layer]
    if res.slot_of[layer, expert] >= 0:
        return -1
    first = res.group_start[g]
    top = first + res.free_count[g] - 1
    for i in range(top, first - 1, -1):
        if res.free[i] == slot:
            res.free[i] = res.free[top]
            res.free_count[g] -= 1
            put(res, layer, expert, slot)
            res.fresh[slot] = res.accesses[layer] + 1
            return 0
    return -1


@njit
def release_loop(st, res, layer, expert):
    """Free the slot of an expert whose read failed; the slot, or -1 where the expert is not resident."""
    slot = res.slot_of[layer, expert]
    if slot < 0:
        return -1
    evict(st, res, slot)
    push_free(res, slot)
    return slot


@njit
def replay_loop(st, res, ids, first, starts, bits, requests, hits):
    """Run a whole trace through a policy.

    ids: int16 [T, L, k], -1 where a layer did not see the token; first: int64 [N+1] token offsets of the N
    steps (a decode step is one token, a prefill step a micro-batch); starts: uint8 [N], 1 where a sequence
    begins, 2 where the pool must be emptied first (cold start); bits: uint8 [T, L, k] for
    NOT_COUNTED/MISS/HIT per request, or size 0;
    requests, hits: int64 [N, L] counts of distinct experts. A step that does not fit into the pool is served
    token by token. Returns -1, or the number of a step that does not even fit so.
    """
    n_layers = ids.shape[1]
    k = ids.shape[2]
    widest = 1
    for s in range(first.shape[0] - 1):
        widest = max(widest, first[s + 1] - first[s])
    batch = np.empty(widest * k, np.int32)
    slots = np.empty(widest * k, np.int32)
    miss_expert = np.empty(widest * k, np.int32)
    miss_slot = np.empty(widest * k, np.int32)
    fill = np.empty((widest * k, 2), np.int32)
    for s in range(first.shape[0] - 1):
        if starts[s] == 2:
            for slot in range(res.owner.shape[0]):
                if res.owner[slot] >= 0:
                    evict(st, res, slot)
                    push_free(res, slot)
        if starts[s] > 0:
            begin(st)
        for layer in range(n_layers):
            lo = first[s]
            hi = first[s + 1]
            whole = True
            while lo < first[s + 1]:
                n = 0
                for t in range(lo, hi):
                    for j in range(k):
                        e = ids[t, layer, j]
                        if e >= 0:
                            batch[n] = e
                            fill[n, 0] = t
                            fill[n, 1] = j
                            n += 1
                if n > 0:
                    m = access_loop(st, res, layer, batch[:n], slots, miss_expert, miss_slot)
                    if m < 0:
                        if not whole or hi - lo == 1:
                            return s
                        whole = False
                        hi = lo + 1
                        continue
                    count_step(res, s, layer, batch, n, miss_expert, m, fill, bits, requests, hits)
                lo = hi
                hi = first[s + 1] if whole else lo + 1
    return -1


@njit(forceinline=True)
def count_step(res, s, layer, batch, n, miss_expert, m, fill, bits, requests, hits):
    """Add one access to the counts [N, L] and, where wanted, to the bits [T, L, k]."""
    step = res.step[0]
    distinct = 0
    for i in range(n):
        e = batch[i]
        if res.seen[e] == step:  # first occurrence: count it, and unmark it for the rest of the loop
            res.seen[e] = step - 1
            distinct += 1
            if bits.size > 0:
                missed = False
                for j in range(m):
                    if miss_expert[j] == e:
                        missed = True
                        break
                bits[fill[i, 0], layer, fill[i, 1]] = MISS if missed else HIT
    requests[s, layer] += distinct
    hits[s, layer] += distinct - m
