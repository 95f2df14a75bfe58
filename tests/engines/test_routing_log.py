"""What compiled code notes of a graph's routing comes out as it went in, once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashmoe.engines.llamacpp.routing_log import TOKENS, RoutingLog, note


@pytest.mark.parametrize("tokens", [1, 5, TOKENS])
def test_noted_and_taken(tokens: int) -> None:
    draw = np.random.default_rng(0)
    log = RoutingLog(4, 3)
    noted: list[tuple[int, NDArray[Any], NDArray[Any]]] = []
    for layer, top_k in ((3, 3), (0, 2), (2, 3)):  # layer 1 sees no token, layer 0 picks fewer
        ids = draw.integers(0, 9, (tokens, top_k)).astype(np.int32)
        weights = draw.random((tokens, top_k)).astype(np.float32)
        note(log.address, layer, ids.ctypes.data, weights.ctypes.data, tokens, top_k)
        noted.append((layer, ids, weights))
    taken = [(layer, ids.copy(), weights.copy()) for layer, ids, weights in log.take()]
    assert [layer for layer, _, _ in taken] == [0, 2, 3]
    for (_, *found), (_, *wanted) in zip(taken, sorted(noted, key=lambda entry: entry[0]), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert list(log.take()) == []
