"""A layer's expert tensors show the slots that a step uses, and where that cannot be, the whole pool."""

from __future__ import annotations

import pytest

import flashmoe
from flashmoe.engines.llamacpp.abi import Tensor
from flashmoe.runtime.layout import PLAIN, REPACKED
from tests.conftest import Tiny


def tensors(model: flashmoe.Model, layer: int) -> list[tuple[Tensor, int, int, int]]:
    """Of a layer's expert tensors: the tensor, its last axis, and where slot 0 is and how long a slot."""
    loaded, pool = model.engine._model, model.cache.pool  # type: ignore[attr-defined]
    return [
        (
            loaded._buffer.tensors[window.weight.tensor.name],
            len(window.weight.tensor.shape) - 1,
            window.address,
            window.stride,
        )
        for window in (*pool.windows[layer], *pool.tables(layer))
    ]


@pytest.mark.parametrize("layout", [PLAIN, REPACKED])
@pytest.mark.parametrize("name", ["olmoe", "gpt-oss"])
def test_tensors_show_what_is_used(tiny: Tiny, name: str, layout: str) -> None:
    with flashmoe.load(tiny(name), cache="90%", threads=1, n_ctx=256, layout=layout) as model:
        slots = model.cache.policy.residency.n_slots
        for tokens in ([5, 6], [7], [8, 9], [10]):  # the first of each length shows everything
            model.engine.decode(tokens)
        last = len(model.catalog.layers) - 1
        ids = model.cache.ids[: model.catalog.top_k]  # of the last layer, as its tensors number them
        assert ids.min() == 0
        for tensor, axis, base, stride in tensors(model, last):
            lowest, misplaced = divmod(tensor.data - base, stride)
            assert not misplaced
            assert lowest >= 0
            assert tensor.ne[axis] == max(ids.max() + 1, 2 if tensor.extra else 1) < slots


def test_tensors_with_views_show_the_whole_pool(tiny: Tiny) -> None:
    """nvfp4 has scales per expert, which graphs gather from a view."""
    with flashmoe.load(tiny("nvfp4"), cache="60%", threads=1, n_ctx=256) as model:
        for _ in range(3):
            model.engine.decode([5])
        for tensor, axis, base, _ in tensors(model, 0):
            assert tensor.data == base
            assert tensor.ne[axis] == model.cache.policy.residency.group_start[1]
