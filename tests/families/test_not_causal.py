"""Encoders and diffusion models: what stock llama.cpp does with them is done, and what it does not is said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import flashmoe
from flashmoe.engines.base import SamplingParams
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import UsageError
from flashmoe.runtime.embedding import normalized
from tests.engines.reference import prompt
from tests.engines.test_embeddings import stock
from tests.models.library import families

NAMES = {
    "nomic-bert-moe": "encoder",
    "qwen3moe-not-causal": "encoder",  # with a cache of tokens
    "llada-moe": "diffusion",
    "rnd1": "diffusion",
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return families(list(NAMES), tmp_path_factory.mktemp("not-causal"))


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_are_stock_s_and_text_is_refused(name: str, paths: dict[str, Path], lib: Library) -> None:
    path = paths[name]
    with flashmoe.load(
        path, cache="60%", pooling="mean", layout="plain", n_ctx=64, n_ubatch=32, threads=1, library=lib
    ) as model:
        step = model.engine.n_ubatch
        for n in (1, step, step // 2 + 1):
            tokens = prompt(model.engine.n_vocab, n)
            expected = normalized(stock(lib, path, tokens, "mean", step))
            assert model.embed(tokens).tobytes() == expected.tobytes()
        with pytest.raises(UsageError, match=f"{NAMES[name]}.*--pooling mean"):
            list(model.generate("the sky", max_tokens=4, sampling=SamplingParams(temperature=0)))
        with pytest.raises(UsageError, match=NAMES[name]):
            model.start([1, 2, 3])
    with flashmoe.load(path, cache="60%", n_ctx=64, threads=1, library=lib) as model:
        model.engine.decode([1, 2])  # all of its tokens are outputs, whatever was asked for
        assert model.engine.rewind(1) == 0


def test_an_assertion_of_the_library_ends_the_process_with_a_line() -> None:
    program = """
from flashmoe.engines.llamacpp.last_words import arrange
from flashmoe.engines.llamacpp.library import find_library, open_library
lib = open_library(find_library())
arrange(lib)
lib.handle.ggml_abort(b"graph.cpp", 7, b"GGML_ASSERT(%s) failed", b"false")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode < 0
    assert done.stderr == (
        "error: llama.cpp has ended this process (graph.cpp:7: GGML_ASSERT(false) failed); "
        "the model may be damaged: if llama.cpp itself runs it, please report it, with the command\n"
    )
