"""FineMoE (arXiv 2502.05370): the map of the past step that the present one is like says what comes.

Of the map's row for a layer the likeliest experts are guessed, k at least, until their probabilities sum up to more
than 1 - similarity; the others get no chance. The paper orders prefetches of several layers by probability over
distance: that is the scheduler's business, here are chances. See `cache.maps` for the store of maps."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache import maps
from flashmoe.cache.maps import Embed, MapState
from flashmoe.cache.saved import Limits
from flashmoe.common.kept import kept
from flashmoe.prefetch.base import Float32, Int32, Predictor


@kept()
def observe(st, layer, ids):
    """The picks of a layer for tokens one after the other, int32 [tokens, k], -1: none."""
    valid = np.empty(ids.shape[1], np.int32)
    for t in range(ids.shape[0]):
        n = 0
        for i in range(ids.shape[1]):
            if 0 <= ids[t, i] < st.now.shape[1]:
                valid[n] = ids[t, i]
                n += 1
        if n > 0:
            maps.note(st, layer, valid, n)


@kept()
def predict(st, target, k, out):
    """Fill out [E] with chances of a layer."""
    out[:] = 0
    by = maps.guide(st, target)
    nearest = st.nearest[by]
    if nearest < 0:
        return
    total = 0
    for e in range(out.shape[0]):
        total += np.int64(st.past[target, e, nearest])
    enough, so_far = (1.0 - st.similarity[by]) * total, 0.0
    for found in range(out.shape[0]):
        best, most = -1, 0
        for e in range(out.shape[0]):
            if out[e] == 0 and np.int64(st.past[target, e, nearest]) > most:
                best, most = e, np.int64(st.past[target, e, nearest])
        if best < 0 or (found >= k and so_far >= enough):
            break
        so_far += most
        out[best] = min(1.0, k * most / total)


class FineMoE(Predictor):
    """Follows the map of the most similar past step.

    size: maps that are kept (the paper: 1,000).
    """

    name: ClassVar[str] = "finemoe"
    needs_ranking: ClassVar[bool] = True

    def __init__(self, size: int = maps.SIZE) -> None:
        super().__init__()
        self.size = size
        self._embedder = maps.Embedder()

    def make_state(self, n_layers: int, n_experts: int, top_k: int) -> MapState:
        compiled = maps.make_state(1, 1, 1)
        maps.begin(compiled, np.zeros(maps.WIDTH, np.float32))
        observe(compiled, 0, np.zeros((1, 1), np.int32))
        predict(compiled, 0, 1, np.zeros(1, np.float32))
        return maps.make_state(n_layers, n_experts, self.size)

    def use_embeddings(self, embed: Embed) -> None:
        self._embedder.use(embed)

    def begin_sequence(self) -> None:
        """See Predictor. Steps are compared, not sequences."""

    def begin_step(self, token: int) -> None:
        self._begin([token])

    def _begin(self, tokens: Sequence[int]) -> None:
        maps.begin(self._state, self._embedder(tokens))

    def rank(self, layer: int, ids: NDArray[Any], scores: NDArray[Any]) -> None:
        maps.rank(self._state, layer, ids, scores)

    def observe(self, layer: int, ids: Int32) -> None:
        observe(self._state, layer, ids[np.newaxis])

    def observe_many(self, layer: int, ids: Int32, tokens: Int32) -> None:
        last = self._state.number[maps.LAYER]
        if last < 0 or layer <= last:
            self._begin(tokens.tolist())
        observe(self._state, layer, np.ascontiguousarray(ids))

    def predict(self, layer: int, target: int, out: Float32) -> None:
        predict(self._state, target, self.top_k, out)

    def limits(self) -> dict[str, Limits]:
        return maps.limits(self._state)
