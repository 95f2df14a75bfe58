"""Arrays that compiled code finds by an address."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from numba import njit
from numpy.typing import NDArray

from flashmoe.common.compiled import Pinned, pinned

KIND = "tests of native"


class State(NamedTuple):
    table: NDArray[np.float64]  # [2, 3]
    count: NDArray[np.int32]  # [n]


@njit
def add(address, i):  # type: ignore[no-untyped-def]
    state, out = pinned(address, KIND)
    out[i] += state.table[1, i] + state.count[i] + 1000 * state.count.shape[0]
    state.count[i] += 1


def make(n: int, dtype: type = np.int32) -> tuple[State, NDArray[np.float32]]:
    return State(np.arange(6.0).reshape(2, 3), np.arange(n, dtype=dtype)), np.zeros(3, np.float32)


def test_compiled_code_reads_and_writes_the_arrays() -> None:
    few, many = make(4), make(7)
    pins = [Pinned(KIND, few), Pinned(KIND, many)]
    for _ in range(2):
        add(pins[0].address, 2)
    add(pins[1].address, 1)
    assert few[0].count.tolist() == [0, 1, 4, 3]
    assert few[1].tolist() == [0, 0, (5 + 2 + 4000) + (5 + 3 + 4000)]
    assert many[1].tolist() == [0, 4 + 1 + 7000, 0]


def test_a_kind_has_one_type() -> None:
    Pinned(KIND, make(1))
    with pytest.raises(TypeError, match="tests of native"):
        Pinned(KIND, make(1, np.int64))
