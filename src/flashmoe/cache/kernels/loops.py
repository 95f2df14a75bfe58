"""The loops that every policy shares: an access, a release, a ranking, and the window that prefill works in."""

from __future__ import annotations

import numpy as np

from flashmoe.cache.kernels.rules import evicted_rule, record_rule, victim_rule
from flashmoe.cache.kernels.slots import (
    drop,
    enough_room,
    inlined,
    lean,
    nearest_free,
    pop_free,
    push_free,
    put,
)
from flashmoe.cache.residency import GLOBAL


@inlined
def evict(st, res, slot):
    """Tell the policy and take the slot from its expert."""
    key = np.int64(res.owner[slot])
    layer = key // res.slot_of.shape[1]
    evicted_rule(st, res, layer, key - layer * res.slot_of.shape[1])
    drop(res, slot)


@lean
def donor_above_quota(st, res, g, layer):
    """Victim among the layers of group g other than `layer` that are above their quota, the most indebted first;
    slot or -1."""
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
            return np.int64(-1)
        slot = np.int64(victim_rule(st, res, best_layer, g))
        if slot >= 0:
            return slot
        bound, bound_layer = best, best_layer


@lean
def borrow_from_others(st, res, layer):
    """Slot for a layer whose own slots are all pinned: a free one, one above quota, or of the layers just
    behind."""
    g = np.int64(res.group[layer])
    if res.free_count[g] > 0:
        return nearest_free(res, layer)
    slot = donor_above_quota(st, res, g, layer)
    n_layers = res.quota.shape[0]
    for back in range(1, n_layers):
        if slot >= 0:
            break
        other = (layer - back + n_layers) % n_layers  # just served, so needed last
        if res.group[other] == g:
            slot = np.int64(victim_rule(st, res, other, g))
    return slot


@lean
def find_victim(st, res, layer):
    """Slot that `layer` may take for a new expert, without taking it; on top of the free ones (owner < 0) or owned, -1
    if none.

    Global partition: a free slot, else any layer's victim. Otherwise a layer below its quota takes a free
    slot, else a victim of the layer most above quota; a layer at its quota takes its own victim, and one whose
    own slots are all pinned goes on to free slots and to other layers.
    """
    g = np.int64(res.group[layer])
    everyone = res.partition[0] == GLOBAL
    if everyone or res.used[layer] < res.quota[layer]:
        if res.free_count[g] > 0:
            return nearest_free(res, layer)
        if not everyone:
            slot = donor_above_quota(st, res, g, layer)
            if slot >= 0:
                return slot
    slot = np.int64(victim_rule(st, res, -1 if everyone else layer, g))
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
        return pop_free(res, np.int64(res.group[layer]))
    evict(st, res, slot)
    return slot


@lean
def access_loop(st, res, layer, ids, slots_out, miss_expert, miss_slot):
    """One request step of a layer: see EvictionPolicy.access. ids int32 [n], may repeat; -1 in ids is
    skipped."""
    res.step[0] += 1
    step = res.step[0]
    n = ids.shape[0]
    n_distinct = np.int64(0)
    misses = np.int64(0)
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
    slot = np.int64(res.slot_of[layer, expert])
    if slot < 0:
        return -1
    evict(st, res, slot)
    push_free(res, slot)
    return slot


@lean
def rank_loop(st, res, order):
    """Empty the pool as the policy would, layer by layer: order int32 [S] is filled with layer * E + expert, of each
    layer what goes first in front. Returns how many."""
    res.step[0] += 1  # nothing is pinned
    n = 0
    for layer in range(res.used.shape[0]):
        while res.used[layer] > 0:
            slot = np.int64(victim_rule(st, res, layer, np.int64(res.group[layer])))
            if slot < 0:
                break
            order[n] = res.owner[slot]
            n += 1
            evict(st, res, slot)
            push_free(res, slot)
    return n


@lean
def window_size(slots, n_layers, n_experts, k, tokens):
    """Slots that a size group of `slots` slots and `n_layers` layers lends to a step of `tokens` tokens.

    What one layer may need beside its own, twice, so that the next layer is read meanwhile; at most half of the slots
    where that is enough for one layer. 0 where every expert has a slot, where not even one layer's would fit beside
    one token's, and for single tokens.
    """
    need = min(n_experts, tokens * k)
    if tokens <= 1 or slots >= n_layers * n_experts or need > slots - k:
        return 0
    return min(slots - k, min(2 * need, max(need, slots // 2)))


@lean
def window_loop(st, res, tokens, k):
    """Before a step of `tokens` tokens: make the window as large as it needs (it never shrinks, but it closes)."""
    n_layers = res.quota.shape[0]
    res.step[0] += 1  # nothing is pinned between steps
    for g in range(res.free_count.shape[0]):
        members = np.int64(0)
        slots = np.int64(res.window_count[g])
        for layer in range(n_layers):
            if res.group[layer] == g:
                members += 1
                slots += res.quota[layer]
        want = window_size(slots, members, res.slot_of.shape[1], k, tokens)
        start = res.group_start[g]
        if want == 0:
            for i in range(res.window_count[g]):
                push_free(res, np.int64(res.window[start + i]))
            for layer in range(n_layers):
                if res.group[layer] == g:
                    res.quota[layer] += res.lent[layer]
                    res.lent[layer] = 0
            res.window_count[g] = 0
        while res.window_count[g] < want:
            lender = -1
            for layer in range(n_layers):
                if res.group[layer] == g and (lender < 0 or res.quota[layer] > res.quota[lender]):
                    lender = layer
            res.quota[lender] -= 1
            res.lent[lender] += 1
            slot = pop_free(res, g)
            if slot < 0:
                slot = donor_above_quota(st, res, g, np.int64(-1))
                evict(st, res, slot)
            res.window[start + res.window_count[g]] = slot
            res.window_count[g] += 1
