"""Hit rates of approximate routing, on a trace that holds what the router ranked next (`trace record --ranked`).

The kernels are those of the runtime (routing.rewrite), and so are the policies. A run's later tokens and layers see
what an approximation has changed; a trace does not, so the hit rates are close to a run's, not equal. With a large
LAMBDA, which takes experts that are not recorded, they are too low. What they cost, only `flashmoe quality` tells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashmoe.cache.policies import create
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.errors import PolicyError, TraceError, UsageError
from flashmoe.routing.approximation import Approximation, parse
from flashmoe.routing.rewrite import Rewriter, leave_out, substitute
from flashmoe.routing.trace import DECODE, RoutingTrace
from flashmoe.simulate.partition import pool_for
from flashmoe.simulate.replay import Row

EXACT = "exact"


def simulate_approximately(
    trace: RoutingTrace,
    policies: Sequence[str],
    approximations: Sequence[str],
    slots: Sequence[int],
    partition: str = "per-layer",
) -> list[Row]:
    """A row for every policy, exact and with each approximation, at every capacity; of decoded tokens only.

    Raises UsageError, PolicyError and TraceError.
    """
    if trace.ranked_ids is None:
        raise TraceError("the trace does not hold what the router ranked next: record it with --ranked")
    rows = []
    for size in slots:
        for spec in policies:
            for text in dict.fromkeys((EXACT, *approximations)):
                policy = create(spec)
                if policy.oracle:
                    raise UsageError(f"{spec} knows the future of an exact run only: leave it out")
                policy.check_model(trace.model)
                policy.bind(pool_for(trace, size, partition))
                approximation = None if text == EXACT else parse(text)
                requests, hits = replay_approximately(trace, policy, approximation)
                rate = hits / max(1, requests)
                name = f"{spec}, {text}"
                capacity = size / (trace.n_layers * trace.num_experts)
                rows.append(Row(name, partition, capacity, requests, hits, rate, None, 0.0))
    return rows


def replay_approximately(
    trace: RoutingTrace, policy: EvictionPolicy, approximation: Approximation | None
) -> tuple[int, int]:
    """Requests and hits of the decoded tokens; a prompt's are asked for one after the other, uncounted."""
    assert trace.ranked_ids is not None
    assert trace.ranked_scores is not None
    assert trace.score_range is not None
    n_layers, n_experts, k = trace.n_layers, trace.num_experts, trace.top_k
    made = Rewriter(approximation or Approximation(EXACT), n_layers, n_experts, k)
    slot_of = policy.residency.slot_of
    scratch = np.empty((3, k), np.int32)
    scores = np.empty(n_experts, np.float32)
    requests = hits = 0
    begins = trace.begins()
    for token in range(trace.n_tokens):
        if begins[token]:
            policy.begin_sequence()
        decoded = trace.phase[token] == DECODE
        for layer in range(n_layers):
            ids = trace.expert_ids[token, layer].astype(np.int32)
            ids = ids[ids >= 0]
            ranked = trace.ranked_ids[token, layer]
            ranked = ranked[ranked >= 0]
            if decoded and approximation and len(ranked):
                scores.fill(-trace.score_range[token, layer])  # all others as the worst
                scores[ranked] = trace.ranked_scores[token, layer, : len(ranked)]
                substitute(made.state, slot_of, layer, scores, True, scores, True, ids)
                leave_out(made.state, slot_of, layer, scores, True, ids, scores[ids])
            if not len(ids):
                continue
            missed = policy.access(layer, ids, *scratch)
            if missed < 0:
                raise PolicyError(f"token {token} needs more experts than the pool holds: raise the capacity")
            if decoded:
                requests, hits = requests + len(ids), hits + len(ids) - missed
    return requests, hits
