"""The expert maps of FineMoE (arXiv 2502.05370): how past steps were routed, and which of them the present one is like.

A map is what the routers of all layers said in one step: a share of the gate's probability for each expert. A store of
up to SIZE maps keeps each with the mean of the embeddings of its step's tokens. For the first FIRST layers the map
whose embedding is nearest speaks, for those after them the one whose layers so far are most like the present ones; both
by cosine. A full store gives up the map that the new one makes superfluous: the most similar, FIRST / L of it by
embedding and the rest by map, as the paper does.

What the routers say of all experts is known where an engine shows it (llama.cpp, decoded tokens) or a trace holds it
(`trace record --ranked`: of the best 2k); elsewhere the experts that were picked share equally. Embeddings are
projected onto WIDTH fixed directions; where no model is at hand, a token stands for itself, as a direction of its own.

Shares are whole numbers, of 255: sums and products are exact in any order, so that a run and its simulation agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.kernels.slots import lean
from flashmoe.cache.saved import Limits
from flashmoe.common.kept import kept

Float32 = NDArray[np.float32]
#: Embeddings of tokens, float32 [n, d], by their ids.
Embed = Callable[[Sequence[int]], Float32]

SIZE = 1000  # maps
FIRST = 3  # layers that the embedding speaks for: the paper's distance of prefetching
WIDTH = 64  # of an embedding, projected
WHOLE = 255  # of a probability
LARGEST = 64 << 20  # bytes of maps; with more layers and experts, fewer of them

BY_EMBEDDING, BY_PREFIX = 0, 1  # MapState.nearest, MapState.similarity
STORED, LAYER = 0, 1  # MapState.number


class MapState(NamedTuple):
    """The store and the step under way. L layers, E experts, M maps."""

    past: NDArray[np.uint8]  # [L, E, M] the maps
    inverse: Float32  # [L, M] 1 / length of a map's layers up to this one, 0 where that is 0
    embedding: Float32  # [M, WIDTH] of unit length, or 0
    number: NDArray[np.int64]  # [2] maps that are stored; the last layer that has spoken, -1 before the first
    now: NDArray[np.int32]  # [L, E] the step's shares, summed over its tokens
    tokens: NDArray[np.int32]  # [L] that the layer saw
    dot: NDArray[np.int64]  # [M] products of the layers so far with those of each map
    length: NDArray[np.int64]  # [1] square of the length of the layers so far
    vector: Float32  # [WIDTH] the step's embedding, of unit length, or 0
    told: NDArray[np.uint8]  # [L] whether `share` is known of the layer's next token
    share: NDArray[np.uint8]  # [L, E]
    nearest: NDArray[np.int64]  # [2] maps, by embedding and by prefix; -1: none
    similarity: Float32  # [2] of these, 0 to 1


def make_state(n_layers: int, n_experts: int, size: int) -> MapState:
    """An empty store for at most `size` maps."""
    maps = max(1, min(size, LARGEST // (n_layers * n_experts)))
    return MapState(
        past=np.zeros((n_layers, n_experts, maps), np.uint8),
        inverse=np.zeros((n_layers, maps), np.float32),
        embedding=np.zeros((maps, WIDTH), np.float32),
        number=np.array([0, -1]),
        now=np.zeros((n_layers, n_experts), np.int32),
        tokens=np.zeros(n_layers, np.int32),
        dot=np.zeros(maps, np.int64),
        length=np.zeros(1, np.int64),
        vector=np.zeros(WIDTH, np.float32),
        told=np.zeros(n_layers, np.uint8),
        share=np.zeros((n_layers, n_experts), np.uint8),
        nearest=np.full(2, -1),
        similarity=np.zeros(2, np.float32),
    )


def limits(st: MapState) -> dict[str, Limits]:
    """Of the arrays that are used as indices, and of sums that must not overflow."""
    n_layers, _, maps = st.past.shape
    return {
        "number": (np.array([0, -1]), np.array([maps, n_layers - 1])),
        "nearest": (-1, maps - 1),
        "now": (0, 1 << 24),
        "tokens": (0, 1 << 24),
        "dot": (0, 1 << 60),
        "length": (0, 1 << 60),
    }


@kept()
def begin(st: Any, vector: Any) -> None:
    """A step begins: the one before becomes a map. vector: float32 [WIDTH], the mean of its tokens' embeddings."""
    keep(st)
    length = np.float32(0)
    for i in range(vector.shape[0]):
        length += vector[i] * vector[i]
    scale = np.float32(1) / np.sqrt(length) if length > 0 else np.float32(0)
    for i in range(vector.shape[0]):
        st.vector[i] = vector[i] * scale
    st.nearest[BY_EMBEDDING], st.similarity[BY_EMBEDDING] = -1, 0
    for m in range(st.number[STORED]):
        likeness = alike(st, m)
        if likeness > st.similarity[BY_EMBEDDING]:
            st.nearest[BY_EMBEDDING], st.similarity[BY_EMBEDDING] = m, likeness


@lean
def alike(st, m):  # type: ignore[no-untyped-def]
    """The cosine of a map's embedding and the step's."""
    total = np.float32(0)
    for i in range(st.vector.shape[0]):
        total += st.embedding[m, i] * st.vector[i]
    return min(total, np.float32(1))


@lean
def keep(st):  # type: ignore[no-untyped-def]
    """Store the step under way, if any layer has spoken, and forget it."""
    n_layers, n_experts, maps = st.past.shape
    last = st.number[LAYER]
    if last < 0:
        return
    at = st.number[STORED]
    if at < maps:
        st.number[STORED] = at + 1
    else:
        at, most = 0, np.float32(-2)
        by_embedding = min(FIRST, n_layers) / np.float32(n_layers)
        own = np.float32(1) / np.sqrt(np.float32(max(st.length[0], 1)))
        for m in range(maps):
            prefix = np.float32(st.dot[m]) * own * st.inverse[last, m]
            likeness = by_embedding * alike(st, m) + (np.float32(1) - by_embedding) * prefix
            if likeness > most:
                at, most = m, likeness
    total = np.int64(0)
    for layer in range(n_layers):
        seen = max(np.int64(1), np.int64(st.tokens[layer]))
        for e in range(n_experts):
            share = (st.now[layer, e] + seen // 2) // seen
            st.past[layer, e, at] = share
            total += share * share
            st.now[layer, e] = 0
        st.inverse[layer, at] = np.float32(1) / np.sqrt(np.float32(total)) if total > 0 else np.float32(0)
        st.tokens[layer] = 0
        st.told[layer] = 0
    for i in range(st.vector.shape[0]):
        st.embedding[at, i] = st.vector[i]
        st.vector[i] = 0
    st.dot[:] = 0
    st.length[0] = 0
    st.number[LAYER] = -1
    for by in range(2):
        st.nearest[by] = -1
        st.similarity[by] = 0


@lean
def add(st, layer, e, share):  # type: ignore[no-untyped-def]
    """Add a share to the step's map, and to its products with all maps."""
    before = np.int64(st.now[layer, e])
    st.now[layer, e] = before + share
    st.length[0] += share * (2 * before + share)
    row = st.past[layer, e]
    for m in range(st.number[STORED]):
        st.dot[m] += share * np.int64(row[m])


@lean
def note(st, layer, ids, n):  # type: ignore[no-untyped-def]
    """The router of a layer has picked ids[:n] for a token. Where nobody has told that a step begins, it is seen by the
    layers, which begin anew."""
    if layer < st.number[LAYER]:
        keep(st)
    st.number[LAYER] = layer
    st.tokens[layer] += 1
    if st.told[layer]:
        st.told[layer] = 0
        for e in range(st.share.shape[1]):
            if st.share[layer, e] > 0:
                add(st, layer, e, np.int64(st.share[layer, e]))
    else:
        for i in range(n):
            add(st, layer, ids[i], np.int64(WHOLE) // max(1, n))
    best, most = np.int64(-1), np.float32(0)
    for m in range(st.number[STORED]):
        likeness = np.float32(st.dot[m]) * st.inverse[layer, m]
        if likeness > most:
            best, most = np.int64(m), likeness
    st.nearest[BY_PREFIX] = best
    st.similarity[BY_PREFIX] = min(np.float32(1), most / np.sqrt(np.float32(max(st.length[0], 1))))


@lean
def guide(st, layer):  # type: ignore[no-untyped-def]
    """Which map speaks for a layer: BY_EMBEDDING or BY_PREFIX."""
    early = layer < FIRST or st.nearest[BY_PREFIX] < 0
    return BY_EMBEDDING if early and st.nearest[BY_EMBEDDING] >= 0 else BY_PREFIX


def rank(st: MapState, layer: int, ids: NDArray[Any], scores: NDArray[Any]) -> None:
    """What the router of a layer says of its best experts ids [n], for the next token that it sees.

    scores: logarithms of theirs, less the best one's, as a trace holds them (rounded to 16 bits).
    """
    chosen = ids >= 0
    if not chosen.any():
        return
    shares = np.exp(np.maximum(scores[chosen], -1e4).astype(np.float16).astype(np.float64))
    st.share[layer] = 0
    st.share[layer, ids[chosen]] = np.rint(WHOLE * shares / shares.sum())
    st.told[layer] = 1


class Embedder:
    """The mean embedding of a step's tokens, projected onto WIDTH directions."""

    def __init__(self) -> None:
        self._embed: Embed = directions
        self._onto: Float32 | None = None

    def use(self, embed: Embed) -> None:
        """A model's own embeddings, instead of a direction for every token."""
        self._embed = embed

    def __call__(self, tokens: Sequence[int]) -> Float32:
        """float32 [WIDTH]; 0 where a token is not known (-1)."""
        if not len(tokens) or min(tokens) < 0:
            return np.zeros(WIDTH, np.float32)
        found = self._embed(tokens)
        mean = found.mean(axis=0, dtype=np.float32)
        if self._embed is directions:
            return mean
        if self._onto is None or len(self._onto) != len(mean):
            self._onto = directions(range(len(mean)))
        return mean @ self._onto


def directions(numbers: Sequence[int]) -> Float32:
    """Of each number a vector of signs, float32 [n, WIDTH], always the same: the bits of splitmix64 (Steele, Lea,
    Flood: Fast splittable pseudorandom number generators, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        mixed = (np.asarray(numbers, np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    bits = (mixed[:, np.newaxis] >> np.arange(WIDTH, dtype=np.uint64)) & np.uint64(1)
    return (2 * bits.astype(np.float32)) - 1
