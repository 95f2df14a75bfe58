"""Scratch memory of ggml's products: taken for a graph's largest node, and kept until a larger one comes.

A product converts its input to the type that its weights are multiplied with. A product with ids also notes, for each
slot of the expert tensor, which tokens have chosen it: a row that is long enough for all of them, of which as much is
touched as there are tokens that have.
"""

from __future__ import annotations

from collections.abc import Sequence
from mmap import PAGESIZE

from flashmoe.storage.addresses import huge_pages_everywhere
from flashmoe.storage.catalog import ExpertCatalog

_CONVERTED = 2  # bytes of a number at most: of an input that is converted to 16 bits
_NOTE = 8  # bytes of a token's note: its position and which of its experts it is
_CACHE_LINE = 64  # a slot's counter has one of its own


def scratch_bytes(catalog: ExpertCatalog, slots: Sequence[int], n_ubatch: int) -> int:
    """Addresses that the products of a micro-batch of `n_ubatch` tokens take, with `slots[g]` slots in size group g."""
    return _scratch(catalog, slots, n_ubatch, _NOTE * n_ubatch * catalog.top_k)


def touched_bytes(catalog: ExpertCatalog, slots: Sequence[int], n_ubatch: int) -> int:
    """How much memory they take of that in the end, at most: a token chooses an expert once."""
    row = _NOTE * n_ubatch * catalog.top_k
    if not huge_pages_everywhere():
        row = min(row, -(-_NOTE * n_ubatch // PAGESIZE) * PAGESIZE + PAGESIZE)
    return _scratch(catalog, slots, n_ubatch, row)


def _scratch(catalog: ExpertCatalog, slots: Sequence[int], n_ubatch: int, row: int) -> int:
    no_products = {p.tensor.name for layer in catalog.layers for p in layer.weights}
    no_products.update(table.tensor.name for table in catalog.gathered)
    widest = max(
        t.shape[0]
        for name, t in catalog.source.tensors.items()
        if name not in no_products and len(t.shape) == 2
    )
    # each of a token's experts has an input of its own in the last product
    inputs = max(layer.weights[-1].tensor.shape[0] * catalog.top_k for layer in catalog.layers)
    converted = _CONVERTED * n_ubatch * max(widest, inputs)
    return converted + max(slots) * (row + _NOTE + _CACHE_LINE)
