"""FineMoE's maps: the store against a plain model of it, in numpy, and what is told of tokens and routers."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashmoe.cache import maps
from flashmoe.cache.policies import create
from flashmoe.cache.residency import make_residency
from flashmoe.prefetch import create as create_predictor
from flashmoe.prefetch.base import Predictor

EXPERTS, K = 6, 2


class Plain:
    """The store as the paper describes it: everything is computed anew each time, in float64."""

    def __init__(self, layers: int, size: int) -> None:
        self.size, self.layers = size, layers
        self.maps: list[NDArray[Any]] = []  # [L, E]
        self.vectors: list[NDArray[Any]] = []
        self.now: list[list[NDArray[Any]]] = [[] for _ in range(layers)]
        self.vector = np.zeros(maps.WIDTH)

    def begin(self, vector: NDArray[Any]) -> None:
        seen = [layer for layer in range(self.layers) if self.now[layer]]
        if seen:
            sums = np.array([sum(rows, np.zeros(EXPERTS)) for rows in self.now])
            counts = np.array([max(1, len(rows)) for rows in self.now])[:, np.newaxis]
            made = (sums + counts // 2) // counts
            if len(self.maps) < self.size:
                self.maps.append(made)
                self.vectors.append(self.vector)
            else:
                share = min(maps.FIRST, self.layers) / self.layers
                last = seen[-1] + 1
                alike = [
                    share * (own @ self.vector) + (1 - share) * cosine(other[:last], sums[:last])
                    for own, other in zip(self.vectors, self.maps, strict=True)
                ]
                at = int(np.argmax(np.round(alike, 5)))
                self.maps[at], self.vectors[at] = made, self.vector
        self.now = [[] for _ in range(self.layers)]
        self.vector = vector / (np.linalg.norm(vector) or 1)

    def prefix(self, layer: int) -> list[float]:
        sums = np.array([sum(rows, np.zeros(EXPERTS)) for rows in self.now[: layer + 1]])
        return [cosine(own[: layer + 1], sums) for own in self.maps]

    def tokens(self) -> list[float]:
        return [float(own @ self.vector) for own in self.vectors]


def cosine(one: NDArray[Any], other: NDArray[Any]) -> float:
    lengths = np.linalg.norm(one) * np.linalg.norm(other)
    return float((one * other).sum() / lengths) if lengths else 0.0


def told(draw: np.random.Generator) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """What a router says of its best 2k experts."""
    ids = draw.permutation(EXPERTS)[: 2 * K].astype(np.int32)
    scores = -np.sort(draw.exponential(1.5, 2 * K)).astype(np.float32)
    return ids, scores - scores[0]


@given(seed=st.integers(0, 10_000), layers=st.integers(2, 5), size=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_store_is_the_paper_s(seed: int, layers: int, size: int) -> None:
    """Steps of one token and of several, with and without what the routers say; the store overflows."""
    draw = np.random.default_rng(seed)
    policy = create("finemoe", size=size)
    policy.bind(make_residency(layers, EXPERTS, np.full(layers, 3, np.int32)))
    plain, own = Plain(layers, size), policy._state.maps
    out = np.zeros((3, K), np.int32)
    for _ in range(9):
        tokens = draw.integers(0, 5, draw.integers(1, 4)).tolist()
        policy.begin_step(tokens)
        plain.begin(maps.directions(tokens).mean(axis=0).astype(np.float64))
        assert_nearest(own, maps.BY_EMBEDDING, plain.tokens())
        for layer in range(layers):
            for _ in tokens:
                ids, scores = told(draw)
                row = np.zeros(EXPERTS)
                if len(tokens) == 1 and draw.random() < 0.7:
                    policy.rank(layer, ids, scores)
                    shares = np.exp(scores.astype(np.float16).astype(np.float64))
                    row[ids] = np.rint(maps.WHOLE * shares / shares.sum())
                else:
                    row[ids[:K]] = maps.WHOLE // K
                policy.access(layer, ids[:K], *out)
                plain.now[layer].append(row)
            assert_nearest(own, maps.BY_PREFIX, plain.prefix(layer))
    assert own.number[maps.STORED] == min(size, 8)
    assert [own.past[:, :, m].tolist() for m in range(len(plain.maps))] == [m.tolist() for m in plain.maps]


def assert_nearest(own: maps.MapState, by: int, alike: list[float]) -> None:
    """The one of the largest cosine, none where all are 0 or less; of equal ones any."""
    best = max(alike, default=0.0)
    at = int(own.nearest[by])
    assert at >= 0 or best < 1e-6
    assert abs(float(own.similarity[by]) - max(0.0, best)) < 1e-4
    assert at < 0 or abs(alike[at] - best) < 1e-4


def predictor(layers: int, size: int = 10) -> Predictor:
    made = create_predictor("finemoe", size=size)
    assert made is not None
    made.bind(layers, EXPERTS, K)
    return made


def step(made: Predictor, token: int, picks: list[list[int]], scores: list[float]) -> None:
    made.begin_step(token)
    for layer, ids in enumerate(picks):
        made.rank(layer, np.array(ids, np.int32), np.array(scores, np.float32))
        made.observe(layer, np.array(ids[:K], np.int32))


def chances(made: Predictor, layer: int, target: int) -> NDArray[np.float32]:
    out = np.full(EXPERTS, 7, np.float32)
    made.predict(layer, target, out)
    return out


def test_the_embedding_speaks_first_and_the_layers_so_far_afterwards() -> None:
    made, scores = predictor(5), [0.0, -0.5, -3.0]
    step(made, 11, [[0, 1, 2]] * 5, scores)
    step(made, 22, [[3, 4, 5]] * 5, scores)
    made.begin_step(22)
    for target in range(5):
        assert np.flatnonzero(chances(made, -1, target)).tolist() == [3, 4]
    for layer in range(2):  # the token is 22's, its layers are those of 11
        made.observe(layer, np.array([0, 1], np.int32))
    assert np.flatnonzero(chances(made, 1, 2)).tolist() == [3, 4]
    assert np.flatnonzero(chances(made, 1, 3)).tolist() == [0, 1]
    shares = np.exp([0, -0.5, -3])
    assert np.allclose(chances(made, 1, 3)[:2], np.minimum(1, K * shares[:2] / shares.sum()), atol=0.01)


def test_the_less_alike_the_more_is_guessed() -> None:
    """Experts are taken until 1 - similarity is passed; k at least."""
    made, scores = predictor(4), [0.0, -0.1, -0.2, -0.3]
    step(made, 1, [[0, 1, 2, 3]] * 4, scores)
    made.begin_step(1)
    made.observe(0, np.array([0, 1], np.int32))
    assert np.count_nonzero(chances(made, 0, 3)) == K
    made.begin_step(1)
    for layer, ids in enumerate(([4, 5], [4, 5], [5, 3])):
        made.observe(layer, np.array(ids, np.int32))
    assert np.count_nonzero(chances(made, 2, 3)) == 4


def test_victims_have_the_smallest_probability_times_visits() -> None:
    policy = create("finemoe")
    policy.bind(make_residency(1, EXPERTS, np.array([4], np.int32)))
    out = np.zeros((3, K), np.int32)

    def access(token: int, ids: list[int], scores: list[float]) -> None:
        policy.begin_step([token])
        policy.rank(0, np.array(ids, np.int32), np.array(scores, np.float32))
        policy.access(0, np.array(ids[:K], np.int32), *out)

    access(1, [0, 1, 2, 3], [0, 0, -0.5, -4])
    access(2, [2, 3, 4, 5], [0, 0, -4, -4])
    access(2, [2, 3, 4, 5], [0, 0, -4, -4])
    access(1, [0, 4, 2, 3], [0, 0, -0.5, -4])  # the first map: of 1, 2 and 3 the last has hardly a chance
    assert set(np.flatnonzero(policy.residency.slot_of[0] >= 0).tolist()) == {0, 1, 2, 4}


def test_unknown_tokens_are_like_none() -> None:
    embedder = maps.Embedder()
    assert not embedder([3, -1]).any()
    assert not embedder([]).any()
    embedder.use(lambda tokens: np.ones((len(tokens), 8), np.float32))
    assert np.array_equal(embedder([3]), maps.directions(range(8)).sum(axis=0))
