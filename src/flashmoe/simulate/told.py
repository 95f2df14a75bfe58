"""Replays for policies that follow a step's tokens and what routers say (`EvictionPolicy.needs_ranking`).

A trace has tokens, and of decoded ones the best 2k experts where it was recorded with `--ranked`. What a run tells its
policy is told here too, and then the step is replayed by the simulator's loop: the hits are the run's.
"""

from __future__ import annotations

import numpy as np

from flashmoe.cache.policies.base import EvictionPolicy, Replay
from flashmoe.prefetch.base import Predictor
from flashmoe.routing.trace import RoutingTrace


def replay_told(
    trace: RoutingTrace, policy: EvictionPolicy, cold: bool = False, want_bits: bool = False
) -> Replay:
    """`EvictionPolicy.replay` of a whole trace, step by step; cold: every sequence begins with an empty pool."""
    steps, starts = trace.steps(), trace.starts(cold=cold)
    tokens = trace.token_id.tolist()
    parts, windowed = [], False
    for start, a, b in zip(starts, steps[:-1].tolist(), steps[1:].tolist(), strict=True):
        if windowed or b - a > 1:
            policy.window(b - a, trace.top_k)  # each replay begins without one
        windowed = b - a > 1
        policy.begin_step(tokens[a:b])
        if b - a == 1:
            for layer in range(trace.n_layers):
                tell(trace, a, layer, policy)
        first = np.array([0, b - a])
        parts.append(policy.replay(trace.expert_ids[a:b], first, np.array([start]), want_bits))
    return Replay(*(np.concatenate([part[i] for part in parts]) for i in range(3)))


def tell(trace: RoutingTrace, token: int, layer: int, follower: EvictionPolicy | Predictor) -> None:
    """What a layer's router said of a decoded token, where the trace holds it."""
    if trace.ranked_ids is not None and trace.ranked_scores is not None:
        follower.rank(layer, trace.ranked_ids[token, layer], trace.ranked_scores[token, layer])
