"""The self-test of a library with the slot pool: pooled logits equal the stock engine's.

python -m flashmoe.tools.self_test LIBRARY [MODULE], which `engines.llamacpp.tested` runs once per library file and per
module of kernels, in a child process, because a wrong layout crashes. It prints the name of each layout that has
passed. Its exit status is NOT_TESTED where there is no room for its model.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashmoe.common.files import temporary_folders
from flashmoe.engines.base import Engine, SamplingParams
from flashmoe.engines.llamacpp.context import Context
from flashmoe.engines.llamacpp.library import Library, open_library
from flashmoe.engines.llamacpp.repack import repacks_slice_by_slice
from flashmoe.engines.llamacpp.stock import StockModel
from flashmoe.engines.llamacpp.tested import NOT_TESTED
from flashmoe.errors import FlashMoEError
from flashmoe.runtime.layout import PLAIN, REPACKED
from flashmoe.runtime.load import load
from flashmoe.runtime.model import Model
from flashmoe.storage.hub import demo_model
from flashmoe.tools.mixed_model import write_mixed_model

_PROMPT = list(range(300, 324))
_CONTEXT = 128
_ROWS = 64  # libraries with a GPU send products of 32 rows and more to it
_TOKENS = 12  # made by the server
_PART = "60%"  # of the mixed model's experts: its layers share no slots, and four tokens pick up to half of a layer's
# Between kernels logits differ by their rounding, up to a token whose experts change by that; between a module of
# another numbering of operations and the right results there is no likeness
_LIKE = 0.1
_AMX = "AMX_INT8"  # as ggml names it


class Failed(FlashMoEError):
    """The self-test has failed; the message says how."""


class NoRoom(FlashMoEError):
    """No folder takes the model; the message says why."""


@contextmanager
def mixed_model(lib: Library) -> Iterator[Path]:
    """The model with many types, in a temporary folder that has room for it. Raises NoRoom."""
    reason = "no temporary folder can be written"
    for base in temporary_folders():
        with tempfile.TemporaryDirectory(prefix="flashmoe-", dir=base, ignore_cleanup_errors=True) as folder:
            try:
                mixed = write_mixed_model(lib, Path(folder) / "mixed.gguf")
            except OSError as error:
                reason = f"{base}: {os.strerror(error.errno or 0)}"
                continue
            yield mixed
            return
    raise NoRoom(reason)


def run(lib: Library, module: Path | None, mixed: Path) -> None:
    """Test what can be tested, plain layouts first. Raises Failed, and LibraryError; some failures end the process."""
    if module:
        own = _stock(lib, mixed, PLAIN)
        lib.exchange_kernels(module)
        if not _alike(_stock(lib, mixed, PLAIN), own):
            raise Failed("results are not those of the library's own kernels")
    for path, part in ((demo_model(), "12%"), (mixed, _PART)):
        if not compare(lib, path, PLAIN, part):
            raise Failed("logits differ from the stock engine's")
    print(PLAIN, flush=True)
    if _AMX in lib.features:
        # of repacked weights they take the dense ones; seen: an abort as a DeepSeek model loads, SIGILL on a virtual
        # machine, and neither with the models of this test
        raise Failed("llama.cpp's AMX kernels crash on some models")
    if not repacks_slice_by_slice(lib):
        raise Failed("an expert alone is repacked in another way than all together")
    if not compare(lib, mixed, REPACKED, _PART):
        raise Failed("logits differ from the stock engine's with repacked weights")
    print(REPACKED, flush=True)


def compare(lib: Library, path: Path, layout: str, part: str) -> bool:
    """Whether logits are equal, byte for byte, with pools of a part of the experts and of all, with few rows and many,
    and the server's text is the engine's."""
    few, many = _steps(4), [list(range(300, 300 + _ROWS)), [7]]
    with _loaded(lib, path, layout, part, 4) as model:
        pooled = [_decode(model.engine, tokens) for tokens in few]
        if model.engine.n_ubatch != 4 or not _serves(model):
            return False
    with _loaded(lib, path, layout, "100%", _ROWS) as model:
        pooled += [_decode(model.engine, tokens) for tokens in many]
    expected = _stock(lib, path, layout)
    return all(np.array_equal(ours, theirs) for ours, theirs in zip(pooled, expected, strict=True))


def _stock(lib: Library, path: Path, layout: str) -> list[NDArray[np.float32]]:
    """The stock engine's logits of the same steps."""
    stock = StockModel(lib, path, repack=layout == REPACKED)
    made = []
    for steps, n_ubatch in ((_steps(4), 4), ([list(range(300, 300 + _ROWS)), [7]], _ROWS)):
        context = stock.context(n_ctx=_CONTEXT, n_ubatch=n_ubatch, threads=1)
        made += [_decode(context, tokens) for tokens in steps]
        context.close()
    stock.close()
    return made


def _alike(ours: list[NDArray[np.float32]], theirs: list[NDArray[np.float32]]) -> bool:
    """Whether most logits differ by no more than rounding does."""
    apart = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, theirs, strict=True)]
    return bool(np.median(apart) < _LIKE)


def _loaded(lib: Library, path: Path, layout: str, cache: str, n_ubatch: int) -> Model:
    return load(path, cache=cache, n_ctx=_CONTEXT, threads=1, n_ubatch=n_ubatch, layout=layout, library=lib)


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


def main(arguments: list[str]) -> None:
    """The command line; see above."""
    if len(arguments) not in (1, 2):
        sys.exit("usage: python -m flashmoe.tools.self_test LIBRARY [MODULE]")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is an answer, not to be looked into
    library, *module = map(Path, arguments)
    try:
        lib = open_library(library)
        with mixed_model(lib) as mixed:
            run(lib, module[0] if module else None, mixed)
    except NoRoom as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_TESTED)
    except FlashMoEError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
