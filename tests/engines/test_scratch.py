"""Scratch of the library: what is counted for it is what it takes."""

from __future__ import annotations

import mmap
from types import SimpleNamespace
from typing import Any

import pytest

import flashmoe
from flashmoe.common.memory import status_bytes
from flashmoe.engines.llamacpp import scratch
from flashmoe.engines.llamacpp.library import Library
from tests.conftest import Tiny
from tests.engines.reference import prompt
from tests.models import ARCHITECTURES

TOKENS = 256  # twice of them is what the models were trained for
EPSILON = 1 << 20


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_no_more_is_taken_than_counted(name: str, tiny: Tiny, lib: Library) -> None:
    with flashmoe.load(
        tiny(name), cache="100%", n_ctx=2 * TOKENS, n_ubatch=TOKENS, threads=1, prefetch="none", library=lib
    ) as model:
        slots = model.cache.elastic.slots
        counted = scratch.scratch_bytes(model.catalog, slots, TOKENS)
        assert scratch.touched_bytes(model.catalog, slots, TOKENS) <= counted
        tokens = prompt(model.engine.n_vocab, TOKENS)
        model.engine.decode(tokens[:1])  # what else a first evaluation takes
        before = status_bytes("VmData")
        model.engine.decode(tokens)
        taken = status_bytes("VmData") - before
    assert taken <= counted + EPSILON
    if counted > 4 * EPSILON:
        assert taken > counted / 4  # nothing else is counted


def test_rows_are_touched_as_far_as_tokens_choose_an_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """6,000 slots, 8 of 128 experts a token: addresses for 8 notes a token and slot, and memory for one."""
    tensor = SimpleNamespace(shape=(64, 64))
    weight = SimpleNamespace(tensor=SimpleNamespace(name="down", shape=(64, 64, 128)))
    catalog: Any = SimpleNamespace(
        source=SimpleNamespace(tensors={"dense": tensor}),
        layers=[SimpleNamespace(weights=[weight])],
        top_k=8,
        gathered=(),
    )
    monkeypatch.setattr(scratch, "huge_pages_everywhere", lambda: False)
    whole = scratch.scratch_bytes(catalog, [6000], 512)
    touched = scratch.touched_bytes(catalog, [6000], 512)
    assert whole - touched == 6000 * (8 * 8 * 512 - 8 * 512 - mmap.PAGESIZE)
    monkeypatch.setattr(scratch, "huge_pages_everywhere", lambda: True)
    assert scratch.touched_bytes(catalog, [6000], 512) == whole
