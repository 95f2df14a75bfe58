"""The self-test of a library with the slot pool: the bundled model's logits, pooled, equal the stock engine's.

python -m flashmoe.tools.self_test LIBRARY, which `engines.llamacpp.tested` runs once per library file, in a child
process, because a wrong layout crashes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashmoe.engines.base import Engine, SamplingParams
from flashmoe.engines.llamacpp.context import Context
from flashmoe.engines.llamacpp.library import Library, open_library
from flashmoe.engines.llamacpp.repack import repacks_slice_by_slice
from flashmoe.engines.llamacpp.stock import StockModel
from flashmoe.runtime.layout import PLAIN
from flashmoe.runtime.load import load
from flashmoe.runtime.model import Model
from flashmoe.storage.hub import demo_model

_PROMPT = list(range(300, 324))
_CONTEXT = 128
_ROWS = 64  # libraries with a GPU send products of 32 rows and more to it
_TOKENS = 12  # made by the server


def compare(library: Path) -> bool:
    """Whether logits are equal, byte for byte, with pools of 12 % and of all experts, with few rows and many, and the
    server's text is the engine's.

    The bundled model may have nothing that this processor repacks: of repacked layouts only the slices are compared.
    """
    lib = open_library(library)
    if not repacks_slice_by_slice(lib):
        return False
    few, many = _steps(4), [list(range(300, 300 + _ROWS)), [7]]
    with _loaded(lib, "12%", 4) as model:
        pooled = [_decode(model.engine, tokens) for tokens in few]
        if model.engine.n_ubatch != 4 or not _serves(model):
            return False
    with _loaded(lib, "100%", _ROWS) as model:
        pooled += [_decode(model.engine, tokens) for tokens in many]
    stock = StockModel(lib, demo_model())
    expected = []
    for steps, n_ubatch in ((few, 4), (many, _ROWS)):
        context = stock.context(n_ctx=_CONTEXT, n_ubatch=n_ubatch, threads=1)
        expected += [_decode(context, tokens) for tokens in steps]
        context.close()
    return all(np.array_equal(ours, theirs) for ours, theirs in zip(pooled, expected, strict=True))


def _loaded(lib: Library, cache: str, n_ubatch: int) -> Model:
    return load("demo", cache=cache, n_ctx=_CONTEXT, threads=1, n_ubatch=n_ubatch, layout=PLAIN, library=lib)


def _serves(model: Model) -> bool:
    """Whether llama.cpp's server over the pool makes the tokens that the engine alone makes, where there is one."""
    if not model.engine.has_server:
        return True
    greedy = SamplingParams(temperature=0)
    alone = "".join(model.start(_PROMPT, max_tokens=_TOKENS, sampling=greedy).stream())
    return "".join(model.generate(_PROMPT, max_tokens=_TOKENS, sampling=greedy)) == alone


def _steps(size: int) -> list[list[int]]:
    prompt, rest = _PROMPT[:16], _PROMPT[16:]
    return [prompt[i : i + size] for i in range(0, len(prompt), size)] + [[token] for token in rest]


def _decode(engine: Engine | Context, tokens: list[int]) -> NDArray[np.float32]:
    engine.decode(tokens)
    return engine.logits()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m flashmoe.tools.self_test LIBRARY")
    sys.exit(0 if compare(Path(sys.argv[1])) else "logits differ from the stock engine's")
