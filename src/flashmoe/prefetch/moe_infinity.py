"""MoE-Infinity (arXiv 2401.14361, section 4): the most similar past sequence says what this one will ask for.

The activation matrix of the sequence so far is matched by cosine with those of past ones, once a token; the row of
the nearest for a layer, scaled to sum up to k, gives the chances of its experts. Collection and matching are the
eviction policy's own code. The paper orders prefetches of several layers by chance * (1 - distance / L): that is the
scheduler's business, here are chances. Before the first sequence has ended, the sequence itself is its own guide."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numba import njit

from flashmoe.cache.policies import moe_infinity as policy
from flashmoe.cache.policies.moe_infinity import MoEInfinityState
from flashmoe.cache.saved import Limits
from flashmoe.common.kept import kept
from flashmoe.prefetch.base import Float32, Int32, Predictor

note = njit(policy.record)
start = njit(policy.begin)


@kept()
def observe(st, layer, ids):
    """Count requests of a layer, ids int32 [n], -1: none."""
    n = 0
    valid = np.empty(ids.shape[0], np.int32)
    for e in ids:
        if 0 <= e < st.eam.shape[1]:
            valid[n] = e
            n += 1
    note(st, None, layer, valid, n)


@kept()
def reset(st):
    """A sequence begins: the one that ended joins the collection."""
    start(st)
    st.nearest[0] = -1


@kept()
def predict(st, target, k, out):
    """Fill out [E] with chances of a layer."""
    nearest = st.nearest[0]
    total = 0.0
    for e in range(out.shape[0]):
        total += st.past[nearest, target, e] if nearest >= 0 else st.eam[target, e]
    for e in range(out.shape[0]):
        p = st.past[nearest, target, e] if nearest >= 0 else st.eam[target, e]
        out[e] = min(1.0, k * p / total) if total > 0.0 else 0.0


class MoEInfinity(Predictor):
    """Follows the activation matrix of the most similar past sequence.

    size: entries of the collection (the paper: about 120).
    """

    name: ClassVar[str] = "moe-infinity"

    def __init__(self, size: int = 120) -> None:
        super().__init__()
        self.size = size

    def make_state(self, n_layers: int, n_experts: int, top_k: int) -> MoEInfinityState:
        state: Any = policy.MoEInfinity(self.size).make_state(n_layers, n_experts)
        compiled = policy.MoEInfinity(1).make_state(1, 1)
        observe(compiled, 0, np.zeros(1, np.int32))
        reset(compiled)
        predict(compiled, 0, 1, np.zeros(1, np.float32))
        return state

    def begin_sequence(self) -> None:
        reset(self._state)

    def begin_step(self, token: int) -> None:
        """See Predictor. Tokens say nothing here."""

    def observe(self, layer: int, ids: Int32) -> None:
        observe(self._state, layer, ids)

    def observe_many(self, layer: int, ids: Int32, tokens: Int32) -> None:
        observe(self._state, layer, np.ascontiguousarray(ids).ravel())

    def predict(self, layer: int, target: int, out: Float32) -> None:
        predict(self._state, target, self.top_k, out)

    def limits(self) -> dict[str, Limits]:
        return policy.limits(self.size)
