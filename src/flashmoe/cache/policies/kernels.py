"""The loops that every eviction policy shares: one access, and the replay of a trace.

A policy is four kernels over its own state (a NamedTuple class of arrays) and the pool's `Residency`:

    record(st, res, layer, ids, n)   the distinct experts ids[:n] of a layer are requested; residency is still
                                     as before the access (slot_of >= 0: a hit). Called once per access.
    victim(st, res, layer, g)        slot to evict: of this layer, or with layer < 0 of any layer in size
                                     group g; -1 where `evictable` allows none.
    evicted(st, res, layer, expert)  the expert is about to lose its slot.
    begin(st)                        a sequence begins.

They return numbers, never raise, and allocate nothing; what must allocate goes into a function of its own, which
`allocating` decorates. `compiled(State, ...)` makes the entry points of a policy of them: the loops find the four
kernels by the type of the state they are given, which numba resolves while compiling: no pointers, no Python.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.extending import overload

from flashmoe.cache import residency
from flashmoe.cache.policies.slots import (
    allocating,
    drop,
    enough_room,
    evictable,
    inlined,
    lean,
    lowest,
    pop_free,
    push_free,
    put,
)
from flashmoe.cache.residency import GLOBAL

__all__ = ["Kernels", "allocating", "compiled", "evictable", "lean", "lowest"]

# What happened to a request, in the bits that replay writes.
NOT_COUNTED, MISS, HIT = 0, 1, 2

_RULES: dict[type, dict[str, Callable[..., Any]]] = {}


class Kernels(NamedTuple):
    """The compiled entry points of a policy."""

    access: Callable[..., int]  # (state, res, layer, ids, slots_out, miss_expert, miss_slot) -> misses or -1
    release: Callable[..., int]  # (state, res, layer, expert) -> slot or -1
    replay: Callable[..., int]  # (state, res, ids, first, starts, bits, requests, hits) -> -1 or failed step
    begin: Callable[..., None]  # (state) -> None


def compiled(
    state: type,
    record: Callable[..., Any],
    victim: Callable[..., Any],
    evicted: Callable[..., Any],
    begin: Callable[..., Any],
) -> Kernels:
    """The entry points of a policy from its four kernels (plain functions with the argument names above).

    They are kept on disk: a second start compiles nothing, and a change of the sources compiles afresh. The name
    of the state's class must be its own: numba names compiled code after it.
    """
    for other in _RULES:
        if other is not state and other.__name__ == state.__name__:
            raise ValueError(f"{other} has the same name: numba's symbols would clash, choose another")
    _RULES[state] = {"record": record, "victim": victim, "evicted": evicted, "begin": begin}
    version = _version(state)  # numba keeps compiled code by what a function closes over

    def keep(function: Callable[..., Any]) -> Any:
        function.__qualname__ = f"{state.__name__}.{function.__name__}"  # a file of its own on disk
        return njit(cache=True)(function)

    def access(st, res, layer, ids, slots_out, miss_expert, miss_slot):
        _ = version
        return access_loop(st, res, layer, ids, slots_out, miss_expert, miss_slot)

    def release(st, res, layer, expert):
        _ = version
        return release_loop(st, res, layer, expert)

    def replay(st, res, ids, first, starts, bits, requests, hits):
        _ = version
        longest = 1
        for s in range(first.shape[0] - 1):
            longest = max(longest, first[s + 1] - first[s])
        scratch = np.empty((6, longest * ids.shape[2]), np.int32)
        return replay_loop(st, res, ids, first, starts, bits, requests, hits, scratch)

    def start(st):
        _ = version
        begin_rule(st)

    return Kernels(keep(access), keep(release), keep(replay), keep(start))


def _version(state: type) -> int:
    """Of the sources that a policy is compiled from: this folder, the pool's arrays, the module of its state."""
    own = getattr(sys.modules[state.__module__], "__file__", None)
    files = [*Path(__file__).parent.glob("*.py"), Path(residency.__file__), *([Path(own)] if own else [])]
    digest = hashlib.sha256()
    for file in sorted(set(files)):
        try:
            digest.update(file.read_bytes())
        except OSError:  # sources that are not files of their own do not change either
            continue
    return int.from_bytes(digest.digest()[:7], "little")


def record_rule(st, res, layer, ids, n):
    raise NotImplementedError


def victim_rule(st, res, layer, g):
    raise NotImplementedError


def evicted_rule(st, res, layer, expert):
    raise NotImplementedError


def begin_rule(st):
    raise NotImplementedError


_LEAN: Any = {"_nrt": False}  # numba's types do not know this option
_INLINED: Any = {"_nrt": False, "forceinline": True}


@overload(record_rule, jit_options=_INLINED)
def _record(st, res, layer, ids, n):
    return _RULES[st.instance_class]["record"]


@overload(victim_rule, jit_options=_LEAN)
def _victim(st, res, layer, g):
    return _RULES[st.instance_class]["victim"]


@overload(evicted_rule, jit_options=_INLINED)
def _evicted(st, res, layer, expert):
    return _RULES[st.instance_class]["evicted"]


@overload(begin_rule, jit_options=_INLINED)
def _begin(st):
    return _RULES[st.instance_class]["begin"]


@inlined
def evict(st, res, slot):
    """Tell the policy and take the slot from its expert."""
    key = res.owner[slot]
    layer = key // res.slot_of.shape[1]
    evicted_rule(st, res, layer, key - layer * res.slot_of.shape[1])
    drop(res, slot)


@lean
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
        slot = victim_rule(st, res, best_layer, g)
        if slot >= 0:
            return slot
        bound, bound_layer = best, best_layer


@lean
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
            slot = victim_rule(st, res, other, g)
    return slot


@lean
def find_victim(st, res, layer):
    """Slot that `layer` may take for a new expert, without changing anything; free (owner < 0) or owned, -1
    if none.

    Global partition: a free slot, else any layer's victim. Otherwise a layer below its quota takes a free
    slot, else a victim of the layer most above quota; a layer at its quota takes its own victim, and one whose
    own slots are all pinned goes on to free slots and to other layers.
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
    slot = victim_rule(st, res, -1 if everyone else layer, g)
    if slot < 0 and not everyone:
        slot = borrow_from_others(st, res, layer)
    return slot


@lean
def take(st, res, layer):
    """Slot for a demanded expert of `layer`, freed from its owner; -1 where the whole group is pinned."""
    slot = find_victim(st, res, layer)
    if slot < 0:
        return -1
    if res.owner[slot] < 0:
        return pop_free(res, res.group[layer])
    evict(st, res, slot)
    return slot


@lean
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
    record_rule(st, res, layer, miss_expert, n_distinct)
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


@lean
def release_loop(st, res, layer, expert):
    """Free the slot of an expert whose read failed; the slot, or -1 where the expert is not resident."""
    slot = res.slot_of[layer, expert]
    if slot < 0:
        return -1
    evict(st, res, slot)
    push_free(res, slot)
    return slot


@lean
def replay_loop(st, res, ids, first, starts, bits, requests, hits, scratch):
    """Run a whole trace through a policy.

    ids: int16 [T, L, k], -1 where a layer did not see the token; first: int64 [N+1] token offsets of the N
    steps (a decode step is one token, a prefill step a micro-batch); starts: uint8 [N], 1 where a sequence
    begins, 2 where the pool must be emptied first (cold start); bits: uint8 [T, L, k] for
    NOT_COUNTED/MISS/HIT per request, or size 0; requests, hits: int64 [N, L] counts of distinct experts;
    scratch: int32 [6, experts of the longest step]. A step that does not fit into the pool is served token by
    token. Returns -1, or the number of a step that does not even fit so.
    """
    n_layers = ids.shape[1]
    k = ids.shape[2]
    batch, slots, miss_expert, miss_slot = scratch[0], scratch[1], scratch[2], scratch[3]
    fill = scratch[4:6]
    for s in range(first.shape[0] - 1):
        if starts[s] == 2:
            for slot in range(res.owner.shape[0]):
                if res.owner[slot] >= 0:
                    evict(st, res, slot)
                    push_free(res, slot)
        if starts[s] > 0:
            begin_rule(st)
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
                            fill[0, n] = t
                            fill[1, n] = j
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


@inlined
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
                bits[fill[0, i], layer, fill[1, i]] = MISS if missed else HIT
    requests[s, layer] += distinct
    hits[s, layer] += distinct - m
