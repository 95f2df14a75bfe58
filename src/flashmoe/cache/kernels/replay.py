"""The replay of a trace through a policy, and what it counts."""

from __future__ import annotations

import numpy as np

from flashmoe.cache.kernels.loops import access_loop, evict, window_loop
from flashmoe.cache.kernels.rules import begin_rule
from flashmoe.cache.kernels.slots import inlined, lean, push_free

# What happened to a request, in the bits that replay writes.
NOT_COUNTED, MISS, HIT = 0, 1, 2


@lean
def replay_loop(st, res, ids, first, starts, bits, requests, hits, scratch, once):
    """Run a whole trace through a policy.

    ids: int16 [T, L, k], -1 where a layer did not see the token; first: int64 [N+1] token offsets of the N
    steps (a decode step is one token, a prefill step a micro-batch); starts: uint8 [N], 1 where a sequence
    begins, 2 where the pool must be emptied first (cold start); bits: uint8 [T, L, k] for
    NOT_COUNTED/MISS/HIT per request, or size 0; requests, hits: int64 [N, L] counts of distinct experts;
    scratch: int32 [6, experts of the longest step];
    once: int64 [E], zeros. A step of several tokens is served through the window (see
    EvictionPolicy.window); without one as a whole, or token by token if it does not fit into the pool. Returns -1, or
    the number of a step that does not even fit so.
    """
    n_layers = ids.shape[1]
    k = ids.shape[2]
    batch, slots, miss_expert, miss_slot = scratch[0], scratch[1], scratch[2], scratch[3]
    fill = scratch[4:6]
    windowed = False
    for s in range(first.shape[0] - 1):
        if starts[s] == 2:
            for slot in range(res.owner.shape[0]):
                if res.owner[slot] >= 0:
                    evict(st, res, slot)
                    push_free(res, slot)
        if starts[s] > 0:
            begin_rule(st)
        if first[s + 1] - first[s] > 1 or windowed:
            window_loop(st, res, first[s + 1] - first[s], k)
            windowed = first[s + 1] - first[s] > 1
        for layer in range(n_layers):
            if res.window_count[res.group[layer]] > 0:
                step = ids[first[s] : first[s + 1], layer]
                count_batch(res, s, layer, step, once, bits[first[s] : first[s + 1]], requests, hits)
                for t in range(step.shape[0]):
                    n = 0
                    for j in range(k):
                        if step[t, j] >= 0:
                            batch[n] = step[t, j]
                            n += 1
                    if n > 0 and access_loop(st, res, layer, batch[:n], slots, miss_expert, miss_slot) < 0:
                        return s
                continue
            lo = first[s]
            hi = first[s + 1]
            whole = True
            while lo < first[s + 1]:
                n = np.int64(0)
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


@inlined
def count_batch(res, s, layer, step, once, bits, requests, hits):
    """Count the distinct experts of a layer in a step, ids [tokens, k], as residency is before it."""
    mark = s * res.slot_of.shape[0] + layer + 1
    for t in range(step.shape[0]):
        for j in range(step.shape[1]):
            e = step[t, j]
            if e < 0 or once[e] == mark:
                continue
            once[e] = mark
            hit = res.slot_of[layer, e] >= 0
            requests[s, layer] += 1
            hits[s, layer] += 1 if hit else 0
            if bits.size > 0:
                bits[t, layer, j] = HIT if hit else MISS
