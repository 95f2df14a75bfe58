"""FineMoE (arXiv 2502.05370): evict by the map of the past step that the present one is like.

The victim is the resident of the smallest probability in that map, times its visits in this sequence. See
`cache.maps` for the store of maps, and for what is known of probabilities and embeddings where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache import maps
from flashmoe.cache.kernels import entries as loops
from flashmoe.cache.maps import Embed, MapState
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.saved import Limits

LEAST = 1 / maps.WHOLE  # of either factor: where one is 0, the other decides


class FineMoEState(NamedTuple):
    """Scores, what they are made of, and the store."""

    score: NDArray[np.float64]  # [L, E] probability * visits
    visits: NDArray[np.float64]  # [L, E] in this sequence
    maps: MapState


def record(st, res, layer, ids, n):
    maps.note(st.maps, layer, ids, n)
    for i in range(n):
        st.visits[layer, ids[i]] += 1.0
    nearest = st.maps.nearest[maps.guide(st.maps, layer)]
    for e in range(st.score.shape[1]):
        share = np.int64(st.maps.past[layer, e, nearest]) if nearest >= 0 else 0
        st.score[layer, e] = (share / maps.WHOLE + LEAST) * (st.visits[layer, e] + LEAST)


def victim(st, res, layer, g):
    return loops.lowest(st.score, res, layer, g)


def begin(st):
    st.visits[:] = 0.0


class FineMoE(EvictionPolicy):
    """Evicts the smallest probability x visits by the most similar past step's map.

    size: maps that are kept (the paper: 1,000).
    """

    name = "finemoe"
    kernels = loops.compiled(FineMoEState, record, victim, begin=begin)
    needs_ranking = True

    def __init__(self, size: int = maps.SIZE) -> None:
        super().__init__()
        self.size = size
        self._embedder = maps.Embedder()

    def make_state(self, n_layers: int, n_experts: int) -> FineMoEState:
        shape = n_layers, n_experts
        state = FineMoEState(np.zeros(shape), np.zeros(shape), maps.make_state(*shape, self.size))
        maps.begin(maps.make_state(1, 1, 1), np.zeros(maps.WIDTH, np.float32))  # compiles it now
        return state

    def use_embeddings(self, embed: Embed) -> None:
        self._embedder.use(embed)

    def begin_step(self, tokens: Sequence[int]) -> None:
        maps.begin(self._state.maps, self._embedder(tokens))

    def rank(self, layer: int, ids: NDArray[Any], scores: NDArray[Any]) -> None:
        maps.rank(self._state.maps, layer, ids, scores)

    def limits(self) -> dict[str, Limits]:
        return maps.limits(self._state.maps)

    def _for_victims(self) -> FineMoEState:
        return self._state._replace(maps=maps.make_state(1, 1, 1))

    def _changing(self) -> dict[str, NDArray[Any]]:
        own = {"score": self._state.score, "visits": self._state.visits}
        return own | self._state.maps._asdict()
