"""Embeddings: stock llama.cpp's, byte for byte, whatever the pool's size."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import flashmoe
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.stock import StockModel
from flashmoe.errors import UsageError
from flashmoe.runtime.embedding import choose_pooling, normalized
from flashmoe.storage.gguf import read_gguf
from tests.conftest import Tiny
from tests.engines.reference import prompt


def stock(lib: Library, path: Path, tokens: Sequence[int], pooling: str, step: int) -> NDArray[np.float32]:
    """As its own tools get it: all tokens are outputs, the library pools."""
    model = StockModel(lib, path)
    context = model.context(n_ctx=64, n_ubatch=step, threads=1, pooling=pooling)
    try:
        for start in range(0, len(tokens), step):
            assert context.decode(tokens[start : start + step], embed=True) == 0
        return context.embedding()
    finally:
        context.close()
        model.close()


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("cache", ["60%", "100%"])
@pytest.mark.parametrize("name", ["olmoe", "qwen3moe", "deepseek2", "gpt-oss"])
def test_equal_to_stock(lib: Library, tiny: Tiny, name: str, cache: str, pooling: str) -> None:
    path = tiny(name)
    with flashmoe.load(
        path, cache=cache, pooling=pooling, layout="plain", n_ctx=64, n_ubatch=32, threads=1
    ) as model:
        step = model.engine.n_ubatch
        assert step == 32 or cache != "100%"
        for n in (1, 20, step + 9) if pooling == "last" else {1, min(20, step)}:
            tokens = prompt(model.engine.n_vocab, n)
            expected = normalized(stock(lib, path, tokens, pooling, step))
            assert model.embed(tokens).tobytes() == expected.tobytes()


def test_generation_is_not_disturbed(demo: Path) -> None:
    """Text before and after an embedding is what it is without one, and so is the embedding."""
    with flashmoe.load(demo, cache="50%", pooling="mean", prefetch="none", threads=1) as model:
        sampling = flashmoe.SamplingParams(temperature=0)
        before = "".join(model.generate("The sea", max_tokens=12, sampling=sampling))
        first = model.embed("The sea")
        assert "".join(model.generate("The sea", max_tokens=12, sampling=sampling)) == before
        assert model.embed("The sea").tobytes() == first.tobytes()
        assert np.linalg.norm(first) == pytest.approx(1)
        assert first @ model.embed("The sea is deep") > first @ model.embed("{1: 2, 3: 4}")
    with flashmoe.load(demo, cache="50%", prefetch="none", threads=1) as model:
        assert "".join(model.generate("The sea", max_tokens=12, sampling=sampling)) == before


def test_length_is_rounded_as_the_library_does(lib: Library) -> None:
    name = "_Z21common_embd_normalizePKfPfii"
    library = ctypes.CDLL(str(lib.path))
    if not hasattr(library, name):
        pytest.skip("this library does not export llama.cpp's common functions")
    rng = np.random.default_rng(5)
    for n in (1, 7, 64, 2048):
        vector = rng.normal(0, 3, n).astype(np.float32)
        out = np.empty_like(vector)
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (vector, out))
        getattr(library, name)(*pointers, ctypes.c_int(n), ctypes.c_int(2))
        assert normalized(vector).tobytes() == out.tobytes()
    assert not normalized(np.zeros(3, np.float32)).any()


def test_mistakes(demo: Path) -> None:
    with pytest.raises(UsageError, match="unknown pooling"):
        flashmoe.load(demo, pooling="best")
    with (
        flashmoe.load(demo, cache="50%", pooling="auto", threads=1) as model,
        pytest.raises(UsageError, match="its file names no pooling"),
    ):
        model.embed("The sea")
    with flashmoe.load(demo, cache="50%", pooling="mean", n_ubatch=16, threads=1) as model:
        with pytest.raises(UsageError, match="raise -ub"):
            model.embed("word " * 40)
        with pytest.raises(UsageError, match="token ids"):
            model.embed([10**6])
        with pytest.raises(UsageError, match="empty"):
            model.embed([])


@pytest.mark.parametrize(
    ("said", "pooling"), [(None, "none"), (1, "mean"), (3, "last"), (4, "none"), ([1], "none")]
)
def test_the_file_says_how(demo: Path, said: object, pooling: str) -> None:
    gguf = read_gguf(demo)
    gguf = replace(gguf, metadata={**gguf.metadata, f"{gguf.architecture}.pooling_type": said})
    assert choose_pooling("auto", gguf) == pooling
    assert choose_pooling("cls", gguf) == "cls"
