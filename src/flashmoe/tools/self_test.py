"""Proof that the slot pool works with a library: the bundled model's logits, pooled, equal the stock engine's.

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
from flashmoe.engines.llamacpp.library import open_library
from flashmoe.engines.llamacpp.repack import repacks_slice_by_slice
from flashmoe.engines.llamacpp.stock import StockModel
from flashmoe.runtime.layout import PLAIN
from flashmoe.runtime.load import load
from flashmoe.runtime.model import Model
from flashmoe.storage.hub import demo_model

_PROMPT = list(range(300, 324))
_CONTEXT = 64
_TOKENS = 12  # made by the server


def compare(library: Path) -> bool:
    """Whether prompt and decode logits are equal, byte for byte, with a pool of 12 % of the experts, and the server's
    text is the engine's.

    The bundled model may have nothing that this processor repacks: of repacked layouts only the slices are compared.
    """
    lib = open_library(library)
    if not repacks_slice_by_slice(lib):
        return False
    with load("demo", cache="12%", n_ctx=_CONTEXT, threads=1, n_ubatch=4, layout=PLAIN, library=lib) as model:
        pooled = [_decode(model.engine, tokens) for tokens in _steps(model.engine.n_ubatch)]
        if not _serves(model):
            return False
    stock = StockModel(lib, demo_model())
    context = stock.context(n_ctx=_CONTEXT, n_ubatch=4, threads=1)
    return all(
        np.array_equal(theirs, _decode(context, tokens))
        for theirs, tokens in zip(pooled, _steps(4), strict=True)
    )


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
