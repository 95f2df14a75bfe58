"""The baseline and the reference: the same library without the pool, as its own tools run it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flashmoe.engines.llamacpp.context import Context
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import ModelError


class StockModel:
    """A model loaded by llama.cpp itself. `repack`: its default layouts; else the file's own, which the pool uses."""

    def __init__(self, lib: Library, path: Path, *, mmap: bool = True, repack: bool = False) -> None:
        self._lib = lib
        params = lib.llama_model_default_params()
        lib.build.layout.map_file(params, mmap)
        params.use_extra_bufts = repack
        params.n_gpu_layers = 0
        lib.listen()
        self._pointer: int | None = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._pointer:
            raise ModelError(f"{path}: llama.cpp cannot load this model ({' '.join(lib.messages[-2:])})")

    def context(self, *, n_ctx: int, n_ubatch: int, threads: int, **more: Any) -> Context:
        """A context to evaluate tokens in; close it before the model. more: see `Context`."""
        assert self._pointer
        return Context(self._lib, self._pointer, n_ctx=n_ctx, n_ubatch=n_ubatch, threads=threads, **more)

    def close(self) -> None:
        if self._pointer:
            self._lib.llama_model_free(self._pointer)
            self._pointer = None
