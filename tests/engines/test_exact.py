"""The heart of it: whatever the pool's size, the logits are stock llama.cpp's, byte for byte."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import flashmoe
from flashmoe.cache.sizing import group_top_k
from flashmoe.engines.llamacpp import overlap
from flashmoe.engines.llamacpp.library import Library
from flashmoe.runtime.layout import PLAIN, REPACKED
from flashmoe.storage import catalog
from tests.conftest import Tiny
from tests.engines.reference import CONTEXT, PROMPT_TOKENS, Reference, closing, evaluate, prompt
from tests.models import ARCHITECTURES, split

ONE_TOKEN, PART, ALL = "1", "60%", "100%"  # of the experts; "1" is raised to one token's experts of a layer
POOLS = (ONE_TOKEN, PART, ALL)
DEMO = "demo"
POLICIES = ("lru", "lfu")


class Case(NamedTuple):
    cache: str
    policy: str
    threads: int
    layout: str = PLAIN


def cases(name: str) -> list[Case]:
    """Every pool size; the policies in turn; two threads, slow on a busy machine, in every other architecture."""
    if name == "gpt-oss":
        return [Case(*values) for values in product(POOLS, POLICIES, (1, 2))]
    if name == DEMO:
        return [Case(*values, 1 + i % 2) for i, values in enumerate(product(POOLS, POLICIES))]
    number = list(ARCHITECTURES).index(name)
    return [
        Case(cache, POLICIES[(number + i) % 2], 1 + (number % 6 == 2 * i)) for i, cache in enumerate(POOLS)
    ]


@pytest.fixture(scope="module")
def llama(lib: Library, tiny: Tiny) -> Iterator[Reference]:
    yield from closing(Reference(lib, tiny("llama")))


@contextmanager
def streaming_tables_from(nbytes: int) -> Iterator[None]:
    """Token embeddings of this size on are not kept in memory, where the model allows it; and experts are multiplied
    while others are read, however small they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "_WORTH_STREAMING", nbytes)
        patch.setattr(overlap, "WORTH", 0)
        yield


def assert_exact(
    path: Path, lib: Library, reference: Reference, case: Case, **options: int
) -> flashmoe.Model:
    """Compare a pooled run with the stock one; the closed model, for a look at its counters.

    Part of the experts in memory: then the rows of the token embedding are read on demand too.
    """
    with (
        streaming_tables_from(0 if case.cache == PART else 1 << 40),
        flashmoe.load(
            path,
            cache=case.cache,
            policy=case.policy,
            threads=case.threads,
            layout=case.layout,
            n_ctx=CONTEXT,
            all_logits=True,
            library=lib,
            **options,  # type: ignore[arg-type]
        ) as model,
    ):
        n_ubatch = model.engine.n_ubatch
        expected = reference.run(n_ubatch, case.threads)
        tokens = prompt(expected.logits.shape[1])
        got = evaluate(model.engine, tokens, n_ubatch, expected.decoded)
        differing = np.flatnonzero((got.logits.view(np.int32) != expected.logits.view(np.int32)).any(axis=1))
        assert not len(differing), f"{case}: logits differ from token {differing[0]} on"
        assert np.isfinite(got.logits).all()
    return model


@pytest.mark.parametrize("layout", [PLAIN, REPACKED])
@pytest.mark.parametrize("name", [DEMO, *ARCHITECTURES])
def test_logits_equal_stock(
    name: str, layout: str, lib: Library, tiny: Tiny, request: pytest.FixtureRequest
) -> None:
    if (name, layout) == ("grovemoe", REPACKED):
        pytest.skip("llama.cpp computes wrong results: see tests/engines/test_repack.py")
    path = request.getfixturevalue("demo") if name == DEMO else tiny(name)
    reference = Reference(lib, path, layout)
    try:
        for case in cases(name):
            model = assert_exact(path, lib, reference, case._replace(layout=layout))
            stats, slots = model.cache.stats["prefill"], model.cache.policy.residency.n_slots
            one_token = sum(group_top_k(model.catalog))
            if case.cache == ONE_TOKEN:
                assert slots == one_token
                assert stats.misses > slots  # it had to evict
            elif case.cache == ALL:
                assert slots == model.catalog.n_experts * len(model.catalog.layers)
                assert stats.misses <= slots  # no expert is read twice
                assert stats.hits > 0
            else:
                assert one_token <= slots < model.catalog.total_experts
    finally:
        reference.close()


def test_comparison_notices_one_wrong_byte(lib: Library, tiny: Tiny, llama: Reference) -> None:
    with flashmoe.load(
        tiny("llama"), cache=ALL, n_ctx=CONTEXT, all_logits=True, threads=1, library=lib
    ) as model:
        expected = llama.run(model.engine.n_ubatch, 1)
        tokens = prompt(expected.logits.shape[1])
        model.engine.decode(tokens)
        assert np.array_equal(model.engine.logits(), expected.logits[PROMPT_TOKENS - 1])
        residency, layer = model.cache.policy.residency, 0
        for expert in residency.resident(layer):
            read = model.cache.pool.reads(layer, int(expert), int(residency.slot_of[layer, expert]))[0]
            block = (ctypes.c_uint8 * read.nbytes).from_address(read.address)
            np.frombuffer(block, np.uint8)[2] ^= 0x7F
        model.engine.rewind(0)
        model.engine.decode(tokens)
        assert not np.array_equal(model.engine.logits(), expected.logits[PROMPT_TOKENS - 1])


@pytest.mark.parametrize(
    ("name", "parts", "metadata_only_first"),
    [
        ("olmoe", 2, False),
        ("gpt-oss", 3, True),
        ("nvfp4", 4, False),
        ("deepseek4", 4, True),
        ("aligned", 2, False),
    ],
)
def test_split_models(
    name: str, parts: int, metadata_only_first: bool, lib: Library, tiny: Tiny, tmp_path: Path
) -> None:
    whole = tmp_path / "m.gguf"
    whole.write_bytes(tiny(name).read_bytes())
    files = split(whole, parts, metadata_only_first=metadata_only_first)
    whole.unlink()  # nothing but the parts is read
    reference = Reference(lib, tiny(name))
    try:
        for case in (Case(ONE_TOKEN, "lru", 1), Case(ALL, "lfu", 1)):
            model = assert_exact(files[0], lib, reference, case)
            assert len(model.catalog.gguf.files) == parts
    finally:
        reference.close()


@pytest.mark.parametrize(("cache", "n_ubatch"), [(ALL, 7), (ALL, 1), (PART, 3)])
def test_prompt_longer_than_the_micro_batch(
    cache: str, n_ubatch: int, lib: Library, tiny: Tiny, llama: Reference
) -> None:
    assert_exact(tiny("llama"), lib, llama, Case(cache, "lru", 1), n_ubatch=n_ubatch)


def test_micro_batch_shrinks_to_what_the_pool_holds(lib: Library, tiny: Tiny) -> None:
    reference = Reference(lib, tiny("phimoe"))  # two layers of 16 experts, top 2, each its own size group
    try:
        for cache, expected in (("1", 1), ("25%", 2), ("60%", 4), ("100%", CONTEXT)):
            model = assert_exact(tiny("phimoe"), lib, reference, Case(cache, "lru", 1))
            assert model.engine.n_ubatch == expected
    finally:
        reference.close()
