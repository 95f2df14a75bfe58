"""Resident experts are multiplied while others of their layer are read: to the last bit, and whatever fails."""

from __future__ import annotations

import ctypes as C
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import flashmoe
from flashmoe.engines.llamacpp import overlap
from flashmoe.engines.llamacpp.abi import CONSTANTS, Tensor
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.overlap import Forms, Overlap
from flashmoe.engines.llamacpp.stock import StockModel
from flashmoe.errors import ReadError
from flashmoe.runtime.layout import PLAIN, REPACKED
from flashmoe.storage import reader as reader_module
from flashmoe.storage.aio import ThreadQueue
from flashmoe.storage.direct import DirectFile
from tests.conftest import Tiny
from tests.engines.reference import CONTEXT

TOKENS = list(range(3, 35))


@pytest.fixture(autouse=True)
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "WORTH", 0)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Overlap]:
    """Grows by one for each layer whose experts are multiplied apart."""
    seen: list[Overlap] = []
    compute = Overlap.compute

    def noted(self: Overlap, wait: object) -> None:
        seen.append(self)
        compute(self, wait)  # type: ignore[arg-type]

    monkeypatch.setattr(Overlap, "compute", noted)
    return seen


def load(tiny: Tiny, name: str, lib: Library, **options: object) -> flashmoe.Model:
    return flashmoe.load(
        tiny(name),
        cache="60%",
        n_ctx=CONTEXT,
        prefetch="none",
        library=lib,
        **options,  # type: ignore[arg-type]
    )


def decode(model: flashmoe.Model, tokens: list[int]) -> None:
    for token in tokens:
        model.engine.decode([token])


@pytest.mark.parametrize("layout", [PLAIN, REPACKED])
@pytest.mark.parametrize("threads", [1, 3])
def test_logits_equal_stock(
    layout: str, threads: int, lib: Library, tiny: Tiny, computed: list[Overlap]
) -> None:
    stock = StockModel(lib, tiny("olmoe"), repack=layout == REPACKED)
    context = stock.context(n_ctx=CONTEXT, n_ubatch=32, threads=threads)
    try:
        with load(tiny, "olmoe", lib, threads=threads, layout=layout) as model:
            for token in TOKENS:
                assert context.decode([token]) == 0
                model.engine.decode([token])
                assert np.array_equal(model.engine.logits(), context.logits())
        assert computed
    finally:
        context.close()
        stock.close()


@pytest.mark.parametrize(
    ("name", "apart"),
    [("olmoe", True), ("qwen3moe", True), ("deepseek2", True), ("gpt-oss", False), ("nvfp4", False)],
)
def test_layers_that_multiply_as_is_known(name: str, apart: bool, lib: Library, tiny: Tiny) -> None:
    """Not those with biases or scales between their products."""
    with load(tiny, name, lib, threads=1) as model:
        for token in TOKENS[:3]:
            model.engine.decode([token])
        layers = model.engine._hook._overlap.layers  # type: ignore[attr-defined]
        assert layers == (set(range(len(model.catalog.layers))) if apart else set())


def test_small_experts_are_left_alone(
    lib: Library, tiny: Tiny, computed: list[Overlap], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "WORTH", 1 << 20)
    with load(tiny, "olmoe", lib, threads=1) as model:
        for token in TOKENS:
            model.engine.decode([token])
    assert not computed


def test_failed_read_between_the_products(
    lib: Library, tiny: Tiny, computed: list[Overlap], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation fails, and the library's graph computes again afterwards."""
    monkeypatch.setattr(reader_module, "open_queue", ThreadQueue)  # which can be made to fail
    with load(tiny, "olmoe", lib, threads=1) as model, load(tiny, "olmoe", lib, threads=1) as other:
        for token in TOKENS[:4]:
            model.engine.decode([token])
            other.engine.decode([token])
        computed.clear()

        def bad(*_: object) -> None:
            raise ReadError("bad sector")

        with monkeypatch.context() as patch:
            patch.setattr(DirectFile, "read_enclosing", bad)
            with pytest.raises(ReadError, match="bad sector"):
                decode(model, TOKENS)
        assert computed
        for node in computed[-1]._state[4:8]:
            assert Tensor.from_address(int(node)).op != CONSTANTS["GGML_OP_NONE"]
        model.engine.rewind(0)
        other.engine.rewind(0)
        for token in TOKENS:
            model.engine.decode([token])
            other.engine.decode([token])
            assert np.array_equal(model.engine.logits(), other.engine.logits())


@pytest.mark.parametrize(("between", "apart"), [("", True), ("VIEW", True), ("ADD", False)])
def test_nothing_else_is_computed_between_the_products(between: str, apart: bool) -> None:
    """It might be put where the engine takes the products' input for used."""
    catalog: Any = SimpleNamespace(layers=[SimpleNamespace(weights=[SimpleNamespace(nbytes=1)])])
    forms, (given, ids, other), nodes = Forms(catalog), (Tensor(), Tensor(), Tensor()), []
    given.ne[:] = 8, 1, 1, 1

    def look(operation: str, layer: int | None, *sources: Tensor) -> Tensor:
        nodes.append(node := Tensor())
        for i, source in enumerate(sources):
            node.src[i] = C.addressof(source)
        node.ne[:] = 8, 2, 1, 1
        forms.look(C.addressof(node), operation.encode(), layer)
        return node

    forms.rename(C.addressof(ids), 0)
    up = look("MUL_MAT_ID", 0, other, given, ids)
    gate = look("MUL_MAT_ID", 0, other, given, ids)
    middle = look("SWIGLU", None, gate, up)
    if between:
        look(between, None, other)
    look("MUL_MAT_ID", 0, other, middle, ids)
    assert forms.layers == ({0} if apart else frozenset())
