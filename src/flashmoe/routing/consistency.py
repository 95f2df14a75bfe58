"""Local routing consistency: how far the tokens of a stretch of text ask for the same experts.

Segment routing performance of arXiv 2505.16056: for every segment of m consecutive tokens a fixed set of experts is
chosen for all of them, those that are asked for at least a times in it; the F1 of that choice against what the tokens
ask for, at the best threshold a, one for the whole model. 1: the tokens of a segment all ask for the same experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashmoe.common.kept import kept
from flashmoe.routing.trace import RoutingTrace

SEGMENT = 16  # tokens: m


@kept()
def segment_histogram(
    ids: NDArray[np.int16], begins: NDArray[np.bool_], n_experts: int, length: int
) -> NDArray[np.int64]:
    """Over all segments and experts, how often an expert is asked for 0 .. `length` times in a segment, int64
    [length + 1].

    ids: [T, k] of a layer, -1 for none; segments lie within a sequence, and hold no token that the layer did not see.
    """
    histogram = np.zeros(length + 1, np.int64)
    count = np.zeros(n_experts, np.int64)
    run = 0
    for t in range(len(ids)):
        if begins[t] or ids[t, 0] < 0:
            count[:] = 0
            run = 0
        if ids[t, 0] < 0:
            continue
        run += 1
        for e in ids[t]:
            if e >= 0:
                count[e] += 1
        if run > length:
            for e in ids[t - length]:
                if e >= 0:
                    count[e] -= 1
        if run >= length:
            for e in range(n_experts):
                histogram[count[e]] += 1
    return histogram


def best_performance(histogram: NDArray[np.int64]) -> float:
    """The F1 at the best threshold, of a `segment_histogram`; NaN where there is no segment."""
    length = len(histogram) - 1
    asked = histogram * np.arange(length + 1)
    right = np.cumsum(asked[::-1])[::-1]  # by threshold: requests for chosen experts,
    chosen = np.cumsum(histogram[::-1])[::-1] * length  # and what their choice stands for
    if not asked.sum():
        return float("nan")
    return float((2 * right / (chosen + asked.sum())).max())


def by_chance(top_k: int, n_experts: int) -> float:
    """`best_performance` of a router that picks each time at random, all experts alike."""
    p = top_k / n_experts
    chances = np.ones(1)
    for _ in range(SEGMENT):  # binomial
        chances = np.convolve(chances, (1 - p, p))
    return best_performance(np.rint(chances * 1e15).astype(np.int64))


def routing_consistency(trace: RoutingTrace, length: int = SEGMENT) -> tuple[float, list[float]]:
    """Of the whole model, and of each layer alone; NaN where no sequence has `length` tokens."""
    begins = trace.begins()
    histograms = [
        segment_histogram(np.ascontiguousarray(ids), begins, trace.num_experts, length)
        for ids in np.moveaxis(trace.expert_ids, 1, 0)
    ]
    whole = np.sum(histograms, axis=0)
    return best_performance(whole), [best_performance(own) for own in histograms]
