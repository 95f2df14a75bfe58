"""How many slots each layer should have: as the runtime shares them, or as a trace says that they are worth most."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache import sizing
from flashmoe.cache.residency import PARTITIONS, Residency, make_residency
from flashmoe.common.kept import kept
from flashmoe.errors import TraceError, UsageError
from flashmoe.routing.trace import RoutingTrace


def pool_for(
    trace: RoutingTrace, slots: int, partition: str = "per-layer", guide: RoutingTrace | None = None
) -> Residency:
    """An empty pool of `slots` for the model of a trace, as the runtime makes it.

    Shares of the layers are equal, or with partition "weighted" learned from `guide` (default: the trace itself).
    Raises UsageError.
    """
    if partition not in PARTITIONS:
        raise UsageError(f"unknown partition {partition!r}: use one of {', '.join(PARTITIONS)}")
    groups, top_k = size_groups(trace), trace.layer_top_k.tolist()
    if partition == "weighted":
        quota = weighted_quota(guide or trace, slots)
    else:
        if slots < min(top_k):
            raise UsageError(f"{slots} slots do not hold one token's {min(top_k)} experts of a layer")
        split = sizing.split_slots(slots, groups, top_k, trace.num_experts)
        quota = sizing.quotas(split, groups, top_k, trace.num_experts)
    return make_residency(trace.n_layers, trace.num_experts, quota, groups, partition)


def size_groups(trace: RoutingTrace) -> list[int]:
    """The size group of each layer (see catalog), [L], as the trace's model says; one where it does not."""
    said = str(trace.model.get("groups", ""))
    try:
        groups = [int(number) for number in said.split(",")] if said else [0] * trace.n_layers
    except ValueError:
        groups = []
    if len(groups) != trace.n_layers or sorted(set(groups)) != list(range(max(groups) + 1)):
        raise TraceError(f"the trace has damaged metadata (size groups {said!r}): record it again")
    return groups


@kept()
def _lru_hits(ids, n_experts, hits):
    """Fill hits[c] with the LRU hits of one layer's ids [T, k] at capacity c, 0..E (Mattson's stack
    algorithm).

    The experts of one token count as requested together: all are looked up before any of them moves to the
    front."""
    stack = np.empty(n_experts, np.int64)
    position = np.full(n_experts, -1, np.int64)
    height = 0
    for t in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            e = ids[t, j]
            if e >= 0 and position[e] >= 0:
                hits[position[e] + 1] += 1  # found at depth d: a hit from capacity d + 1 on
        for j in range(ids.shape[1]):
            e = ids[t, j]
            if e < 0:
                continue
            depth = position[e]
            if depth < 0:
                depth = height
                height += 1
            for i in range(depth, 0, -1):
                stack[i] = stack[i - 1]
                position[stack[i]] = i
            stack[0] = e
            position[e] = 0
    for c in range(1, n_experts + 1):
        hits[c] += hits[c - 1]


def lru_curves(trace: RoutingTrace) -> NDArray[np.int64]:
    """LRU hits [L, E + 1] of each layer by its number of slots."""
    hits = np.zeros((trace.n_layers, trace.num_experts + 1), np.int64)
    for layer in range(trace.n_layers):
        _lru_hits(np.ascontiguousarray(trace.expert_ids[:, layer]), trace.num_experts, hits[layer])
    return hits


def weighted_quota(trace: RoutingTrace, slots: int) -> NDArray[np.int32]:
    """Shares int32 [L] summing to `slots`, by marginal gain: each slot goes where LRU gains most hits from
    it.

    Every layer gets at least top-k slots. Gains are taken along the upper hull of each layer's curve, so that
    a step that pays only together with later ones is not missed. Raises UsageError for fewer than top-k slots
    a layer."""
    least, most = trace.top_k, trace.num_experts
    if slots < least * trace.n_layers:
        raise UsageError(
            f"{slots} slots are too few: {trace.n_layers} layers of {least} experts per token need "
            f"{least * trace.n_layers}"
        )
    quota = np.full(trace.n_layers, least, np.int32)
    left = min(slots, most * trace.n_layers) - int(quota.sum())
    curves = lru_curves(trace)

    def best_step(layer: int) -> tuple[float, int, int]:
        now = int(quota[layer])
        ahead = np.arange(now + 1, most + 1)
        slope = (curves[layer, ahead] - curves[layer, now]) / (ahead - now)
        return -float(slope.max()), layer, int(ahead[slope.argmax()]) - now

    heap = [best_step(layer) for layer in range(trace.n_layers) if quota[layer] < most]
    heapq.heapify(heap)
    while left > 0 and heap:
        _, layer, step = heapq.heappop(heap)
        step = min(step, left)
        quota[layer] += step
        left -= step
        if quota[layer] < most:
            heapq.heappush(heap, best_step(layer))
    return quota
