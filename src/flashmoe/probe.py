"""Proof that the slot pool works with a library: the bundled model's logits, pooled, equal the stock engine's.

Run once per library file, in a child process, because a wrong layout crashes. By hand:
python -m flashmoe.probe LIBRARY
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flashmoe.engines.llamacpp import abi
from flashmoe.engines.llamacpp.library import Library, find_library, open_library
from flashmoe.errors import LibraryError
from flashmoe.layout import PLAIN
from flashmoe.storage.files import cache_folder, write_atomically

if TYPE_CHECKING:
    from flashmoe.engines.base import Engine
    from flashmoe.engines.llamacpp.context import Context

_TIMEOUT = 120
_PROOF = 2  # counts what is proven: a library that has shown less is proven again
_PROMPT = list(range(300, 324))
_CONTEXT = 64


def prove(library: Path) -> None:
    """Run the proof for this library file unless it has been run before. Raises LibraryError where it fails."""
    stat = library.stat()
    fact = f"{library}:{stat.st_size}:{stat.st_mtime_ns}:{_PROOF}"
    notes = cache_folder() / "libraries.json"
    try:
        proven = list(json.loads(notes.read_text()))
    except (OSError, ValueError, TypeError):
        proven = []
    if fact in proven:
        return
    command = [sys.executable, "-m", "flashmoe.probe", str(library)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
        lines = child.stderr.strip().splitlines() or [f"ended by signal {-child.returncode}"]
        failure = lines[-1] if child.returncode else None
    except subprocess.TimeoutExpired:
        failure = "no answer"
    if failure:
        known = ", ".join(sorted({build.name for build in abi.KNOWN_BUILDS.values()}))
        raise LibraryError(
            f"{library}: this llama.cpp library does not work with the slot pool ({failure}); builds that do: {known}"
        )
    with suppress(OSError):  # a home that cannot be written: proven again next time
        write_atomically(notes, json.dumps([*proven, fact], indent=1).encode())


def proven_library() -> Library:
    """The llama.cpp library, after it has shown once that the pool works with it. Raises LibraryError."""
    path = find_library()
    prove(path)
    return open_library(path)


def compare(library: Path) -> bool:
    """Whether prompt and decode logits are equal, byte for byte, with a pool of 12 % of the experts.

    The bundled model may have nothing that this processor repacks: of repacked layouts only the slices are compared.
    """
    from flashmoe.api import load
    from flashmoe.engines.llamacpp.repack import repacks_slice_by_slice
    from flashmoe.engines.llamacpp.stock import StockModel
    from flashmoe.hub import demo_model

    lib = open_library(library)
    if not repacks_slice_by_slice(lib):
        return False
    with load("demo", cache="12%", n_ctx=_CONTEXT, threads=1, n_ubatch=4, layout=PLAIN, library=lib) as model:
        pooled = [_decode(model.engine, tokens) for tokens in _steps(model.engine.n_ubatch)]
    stock = StockModel(lib, demo_model())
    context = stock.context(n_ctx=_CONTEXT, n_ubatch=4, threads=1)
    return all(
        np.array_equal(theirs, _decode(context, tokens))
        for theirs, tokens in zip(pooled, _steps(4), strict=True)
    )


def _steps(size: int) -> list[list[int]]:
    prompt, rest = _PROMPT[:16], _PROMPT[16:]
    return [prompt[i : i + size] for i in range(0, len(prompt), size)] + [[token] for token in rest]


def _decode(engine: Engine | Context, tokens: list[int]) -> NDArray[np.float32]:
    engine.decode(tokens)
    return engine.logits()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m flashmoe.probe LIBRARY")
    sys.exit(0 if compare(Path(sys.argv[1])) else "logits differ from the stock engine's")
