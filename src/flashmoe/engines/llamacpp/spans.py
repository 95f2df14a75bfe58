"""Which slots a layer's expert tensors show while its products are computed: no more than those in use.

ggml's products by id walk over every matrix of a tensor, also over those that no token picked, and take scratch memory
for each. Over the whole pool a token would cost more with every slot and every layer. So before a layer's products its
tensors begin at the lowest slot in use and end at the highest, and ids count from there.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numba import carray

from flashmoe.cache.pool import SlotPool
from flashmoe.common.compiled import int32_at, int64_at
from flashmoe.common.kept import kept
from flashmoe.engines.llamacpp.abi import Tensor
from flashmoe.storage.catalog import ExpertCatalog

_HEAD, _ROW = 3, 5  # numbers of a block: its first row, its rows, its slots; and of a row, see Spans
_NE, _DATA = Tensor.ne.offset, Tensor.data.offset


class Spans:
    """Where the expert tensors of every layer begin in the pool: a table for compiled code, at `address`, by the
    layers' places (see ExpertCatalog)."""

    def __init__(
        self,
        catalog: ExpertCatalog,
        tensors: Mapping[str, Tensor],
        pool: SlotPool,
        slots: Sequence[int],
    ) -> None:
        """tensors: of the engine, by name; `slots[g]`: the slots of size group g."""
        heads = np.zeros((max(catalog.places) + 1, _HEAD), np.int64)
        rows: list[tuple[int, ...]] = []
        for layer, group in enumerate(catalog.groups):
            windows = (*pool.windows[layer], *pool.tables(layer))
            heads[catalog.places[layer]] = heads.size + _ROW * len(rows), len(windows), slots[group]
            for window in windows:
                tensor, axis = tensors[window.weight.tensor.name], len(window.weight.tensor.shape) - 1
                least = fewest_slots(tensor)
                rows.append((C.addressof(tensor), _NE + 8 * axis, least, window.address, window.stride))
        self._table = np.concatenate([heads.ravel(), np.array(rows, np.int64).ravel()])
        self.address = int(self._table.ctypes.data)


def fewest_slots(tensor: Tensor) -> int:
    """How many slots a tensor must show: the kernels for repacked experts insist on a third dimension."""
    return 2 if tensor.extra else 1


@kept()
def show(table: Any, block: Any, ids: Any, n: Any, whole: Any) -> Any:
    """Let a block's tensors show the slots from the lowest to the highest of its ids, or all; renumber the ids.

    table: `Spans.address`; ids: address of int32 [n], slots numbered in the block's size group.
    """
    head = carray(int64_at(table + 8 * _HEAD * block), _HEAD)
    slots = carray(int32_at(ids), n)
    lowest, count = 0, head[2]
    if not whole:
        lowest, highest = slots[0], slots[0]
        for i in range(1, n):
            lowest, highest = min(lowest, slots[i]), max(highest, slots[i])
        for i in range(n):
            slots[i] -= lowest
        count = highest - lowest + 1
    rows = carray(int64_at(table + 8 * head[0]), _ROW * head[1])
    for at in range(0, _ROW * head[1], _ROW):
        tensor = rows[at]
        carray(int64_at(tensor + rows[at + 1]), 1)[0] = max(count, rows[at + 2])
        carray(int64_at(tensor + _DATA), 1)[0] = rows[at + 3] + lowest * rows[at + 4]
