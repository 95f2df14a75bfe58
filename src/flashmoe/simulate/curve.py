"""Hit rate by pool size: of a trace, and of the traces whose figures come with the package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from flashmoe.cache.policies import create
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate.partition import pool_for

CAPACITIES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
MOST_TOKENS = 20_000


@dataclass(frozen=True)
class HitCurve:
    """Hit rates of a policy on a trace; at capacity[i] (slots / experts) the hit rate is hit_rate[i]."""

    trace: str
    model: str
    experts: int
    top_k: int
    tokens: int
    policy: str
    capacity: tuple[float, ...]
    hit_rate: tuple[float, ...]

    def at(self, capacity: float) -> float:
        """The hit rate at a capacity: 0 at 0, straight between the points."""
        return float(np.interp(capacity, (0.0, *self.capacity), (0.0, *self.hit_rate)))


def hit_curve(trace: RoutingTrace, name: str, policy: str) -> HitCurve:
    """Replay the first MOST_TOKENS tokens at every capacity that holds a token's experts; first uses are left out."""
    if trace.n_tokens > MOST_TOKENS:
        trace = trace.rows(np.arange(MOST_TOKENS))
    layers, experts = trace.n_layers, trace.num_experts
    cold = sum(len(np.unique(ids[ids >= 0])) for ids in np.moveaxis(trace.expert_ids, 1, 0))
    points = []
    for capacity in CAPACITIES:
        slots = round(capacity * layers * experts)
        if slots < layers * trace.top_k:
            continue
        made = create(policy)
        made.bind(pool_for(trace, slots))
        replayed = made.replay(trace.expert_ids, starts=trace.starts()[: trace.n_tokens])
        hits, requests = int(replayed.hits.sum()), int(replayed.requests.sum())
        points.append((capacity, min(1.0, round(hits / max(1, requests - cold), 4))))
    model = str(trace.model.get("name", name))
    rates = tuple(rate for _, rate in points)
    return HitCurve(
        name, model, experts, trace.top_k, trace.n_tokens, policy, tuple(c for c, _ in points), rates
    )


def shipped() -> list[HitCurve]:
    """The curves that come with the package (scripts/hit_rates.py makes them)."""
    rows = json.loads(Path(str(files("flashmoe") / "data" / "hit_rates.json")).read_text())
    return [
        HitCurve(**{**row, "capacity": tuple(row["capacity"]), "hit_rate": tuple(row["hit_rate"])})
        for row in rows
    ]


def nearest(curves: Sequence[HitCurve], name: str, experts: int, top_k: int) -> HitCurve:
    """The curve of the model itself, by its name, else of the one whose share of experts per token is nearest."""

    def distance(curve: HitCurve) -> tuple[bool, float]:
        own = curve.model.lower().replace("-", "")[:8] in name.lower().replace("-", "")
        return not own, abs(np.log(curve.top_k / curve.experts / (top_k / experts)))

    return min(curves, key=distance)


def dump(curves: Sequence[HitCurve]) -> str:
    """The text of hit_rates.json."""
    return json.dumps([asdict(curve) for curve in curves], indent=1) + "\n"
