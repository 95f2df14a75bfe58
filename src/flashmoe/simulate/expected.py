"""What hit rates a model's routing lets one expect: LRU's, the default policy's, and the oracle's."""

from __future__ import annotations

import numpy as np

from flashmoe.common.plugins import DEFAULT
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate.curve import MOST_TOKENS
from flashmoe.simulate.replay import simulate

CAPACITIES = (0.125, 0.25, 0.5)


def slots_of(trace: RoutingTrace) -> dict[str, int]:
    """Slots of CAPACITIES, by name; without those that do not hold the experts of a token in every layer."""
    total = trace.n_layers * trace.num_experts
    slots = {f"{100 * share:g}%": round(share * total) for share in CAPACITIES}
    return {name: n for name, n in slots.items() if n >= trace.layer_top_k.sum()}


def expected_hit_rates(trace: RoutingTrace) -> dict[str, dict[str, float]]:
    """{capacity: {policy: hit rate}} over the first MOST_TOKENS tokens, at the capacities of `slots_of`."""
    if trace.n_tokens > MOST_TOKENS:
        trace = trace.rows(np.arange(MOST_TOKENS))
    slots, total = slots_of(trace), trace.n_layers * trace.num_experts
    if not slots:
        return {}
    rows = simulate(trace, ("lru", DEFAULT, "belady"), list(slots.values()))
    return {
        name: {row.policy: round(row.hit_rate, 4) for row in rows if row.capacity == n / total}
        for name, n in slots.items()
    }
