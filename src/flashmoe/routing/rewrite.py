"""Rewriting of routes: a missing expert is replaced by a resident one, or left out. Lossy, and off by default.

Kernels (numba) for one token of one layer, called by the engines' compiled code and by the simulator. Both see the
router's scores of all experts, the chosen ids, and which experts are resident.

- `substitute` is cache-conditional routing (arXiv 2412.00099): residents and the token's first expert get LAMBDA times
  the running mean range of the layer's scores, and the top-k of that is taken. SMoE's bound (2508.18983) keeps to
  experts near the best one that was not chosen: with its score S, only a missing expert below (1 + LAMBDA) S is
  replaced, and only by one of at least (1 - LAMBDA) S.
- `leave_out` is expert skipping (2402.14800; HOBBIT, 2411.01433, skips by the weight too): a missing expert whose share
  of the weights is below F / top-k gets no weight, and a resident expert stands in its place in the products.

Scores are compared as logarithms, in which a softmax's probabilities are its logits but for a constant.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.common.kept import kept
from flashmoe.routing.approximation import Approximation

LEAST = 1e-30  # scores below count as this; their logarithm is finite

_BOOST, _DROP, _OPTIONS = range(3)
_ROUTED, _REPLACED, _DROPPED, _TOKENS, _COUNTS = range(5)


class RewriteState(NamedTuple):
    """What the kernels know and count: L layers, E experts."""

    options: NDArray[np.float64]  # [2]
    mean_range: NDArray[np.float64]  # [L] of the layer's scores, over the tokens so far
    seen: NDArray[np.int64]  # [L] tokens so far
    counts: NDArray[np.int64]  # [4] experts routed, replaced, dropped; tokens of layers
    mass: NDArray[np.float64]  # [1] shares of the router's weights that were lost
    scores: NDArray[np.float64]  # [E] scratch: logarithms
    chosen: NDArray[np.bool_]  # [E] scratch


@dataclass(frozen=True)
class Rewritten:
    """How much a run differs from an exact one; of decoded tokens."""

    approx: str  # as it was asked for
    rule: str
    routed: int  # experts that the router has chosen
    replaced: int
    dropped: int
    mass: float  # sum over tokens and layers of the share of the weights that was lost
    tokens: int  # of layers

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return {
            "approx": self.approx,
            "rule": self.rule,
            "routed": self.routed,
            "replaced": self.replaced,
            "dropped": self.dropped,
            "replaced_share": self.replaced / max(1, self.routed),
            "dropped_share": self.dropped / max(1, self.routed),
            "mass_lost_share": self.mass / max(1, self.tokens),
        }


class Rewriter:
    """An approximation at work on one model: the state of the kernels, and what they have counted."""

    def __init__(self, approximation: Approximation, n_layers: int, n_experts: int, top_k: int) -> None:
        self.approximation = approximation
        options = np.zeros(_OPTIONS)
        options[_BOOST], options[_DROP] = approximation.boost, approximation.drop
        self._options, self._held, self._lock = options.copy(), 0, threading.Lock()
        self.state = RewriteState(
            options=options,
            mean_range=np.zeros(n_layers),
            seen=np.zeros(n_layers, np.int64),
            counts=np.zeros(_COUNTS, np.int64),
            mass=np.zeros(1),
            scores=np.zeros(n_experts),
            chosen=np.zeros(n_experts, np.bool_),
        )

    @property
    def rewritten(self) -> Rewritten:
        """The counts so far."""
        routed, replaced, dropped, tokens = self.state.counts.tolist()
        asked, mass = self.approximation, float(self.state.mass[0])
        return Rewritten(asked.text, asked.rule, routed, replaced, dropped, mass, tokens)

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """No route is rewritten meanwhile; from any thread."""
        with self._lock:
            self._held += 1
            self.state.options[[_BOOST, _DROP]] = 0
        try:
            yield
        finally:
            with self._lock:
                self._held -= 1
                if not self._held:
                    self.state.options[:] = self._options

    def forget(self) -> None:
        """Count anew; the mean ranges stay."""
        self.state.counts[:] = 0
        self.state.mass[:] = 0


@kept()
def _log(score: Any, logits: Any) -> Any:
    return np.float64(score) if logits else math.log(max(np.float64(score), LEAST))


@kept()
def _log_total(gathered: Any, logits: Any) -> Any:
    """The logarithm of the sum of weights."""
    highest, total = -np.inf, 0.0
    for i in range(len(gathered)):
        highest = max(highest, _log(gathered[i], logits))
    for i in range(len(gathered)):
        total += math.exp(_log(gathered[i], logits) - highest)
    return highest + math.log(total)


@kept()
def substitute(
    st: Any, slot_of: Any, layer: Any, scores: Any, logits: Any, weights: Any, weights_logits: Any, ids: Any
) -> Any:
    """Rewrite one token's ids, int32 [k], in place; returns how many were replaced.

    slot_of: int32 [L, E], -1 where an expert is absent. scores: float32 [E], by which the router has chosen, -inf for
    what it may not choose; weights: float32 [E], from which the experts' weights will be gathered. logits: whether the
    scores are logits (else their logarithms are compared, and where a negative bias leaves the best one that was not
    chosen without one, nothing is replaced); weights_logits: the same of weights.
    """
    boost = st.options[_BOOST]
    n, k = len(scores), len(ids)
    highest, lowest = -np.inf, np.inf
    for e in range(n):
        if scores[e] > -np.inf:
            highest, lowest = max(highest, scores[e]), min(lowest, scores[e])
    st.seen[layer] += 1
    spread = _log(highest, logits) - _log(lowest, logits)
    st.mean_range[layer] += (spread - st.mean_range[layer]) / st.seen[layer]
    st.counts[_ROUTED] += k
    st.counts[_TOKENS] += 1
    missing = 0
    for i in range(k):
        missing += slot_of[layer, ids[i]] < 0
    if missing == 0 or boost <= 0.0:
        return 0
    score, chosen = st.scores, st.chosen
    for e in range(n):
        score[e] = _log(scores[e], logits) if scores[e] > -np.inf else -np.inf
        chosen[e] = False
    first = 0
    for i in range(k):
        chosen[ids[i]] = True
        if score[ids[i]] > score[ids[first]]:
            first = i
    threshold = -np.inf  # the score of rank k + 1
    for e in range(n):
        if not chosen[e]:
            threshold = max(threshold, score[e])
    most = threshold + math.log1p(boost)
    least = threshold + math.log(1.0 - boost) if boost < 1.0 else -np.inf
    advantage = boost * st.mean_range[layer]
    total = _log_total(weights[ids], weights_logits)
    replaced = 0
    for _ in range(missing):
        # the worst missing expert that may go, and the best resident that may come
        worst, best = -1, -1
        for i in range(k):
            if i == first or slot_of[layer, ids[i]] >= 0 or score[ids[i]] >= most:
                continue
            if worst < 0 or score[ids[i]] < score[ids[worst]]:
                worst = i
        for e in range(n):
            if chosen[e] or slot_of[layer, e] < 0 or score[e] < least or score[e] == -np.inf:
                continue
            if best < 0 or score[e] > score[best]:
                best = e
        if worst < 0 or best < 0 or score[best] + advantage <= score[ids[worst]]:
            break
        st.mass[0] += math.exp(_log(weights[ids[worst]], weights_logits) - total)
        st.mass[0] -= math.exp(_log(weights[best], weights_logits) - total)
        chosen[ids[worst]], chosen[best] = False, True
        ids[worst] = best
        replaced += 1
    st.counts[_REPLACED] += replaced
    return replaced


@kept()
def leave_out(st: Any, slot_of: Any, layer: Any, weights: Any, logits: Any, ids: Any, gathered: Any) -> Any:
    """Leave missing experts out of one token's ids, int32 [k], in place; returns how many.

    gathered: float32 [k], the experts' weights before they are normalised; 0 (-inf where they are logits) afterwards
    for those left out, in whose places are resident experts, so that ids stay distinct. Others as in `substitute`.
    """
    n, k, drop = len(weights), len(ids), st.options[_DROP]
    if drop <= 0.0:
        return 0
    dropped, total = 0, _log_total(gathered, logits)
    for _ in range(k - 1):
        # the missing expert of the smallest weight; the first is never left out
        at, first = -1, 0
        for i in range(k):
            if gathered[i] > gathered[first]:
                first = i
        for i in range(k):
            absent = slot_of[layer, ids[i]] < 0
            if absent and i != first and (at < 0 or gathered[i] < gathered[at]):
                at = i
        if at < 0:
            break
        share = math.exp(_log(gathered[at], logits) - total)
        if share >= drop / k:
            break
        stand_in = -1
        for e in range(n):
            if slot_of[layer, e] < 0 or (stand_in >= 0 and weights[e] <= weights[stand_in]):
                continue
            free = True
            for i in range(k):
                if ids[i] == e:
                    free = False
            if free:
                stand_in = e
        if stand_in < 0:
            break
        st.mass[0] += share
        ids[at] = stand_in
        gathered[at] = -np.inf if logits else 0.0
        dropped += 1
    st.counts[_DROPPED] += dropped
    return dropped
