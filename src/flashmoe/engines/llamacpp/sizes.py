"""The memory of a context, asked of the library for a model without weights, and without allocating it.

The model is read from its header, all tensors are addresses without contents, and while a context is made, the
library's own memory for the CPU is too. So every kind of attention and of recurrent state counts as the library has it.
"""

from __future__ import annotations

import ctypes as C
import mmap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from flashmoe.engines.llamacpp.abi import BufferInterface, ptr
from flashmoe.engines.llamacpp.allocations import allocating
from flashmoe.engines.llamacpp.buffer import ExpertBuffer
from flashmoe.engines.llamacpp.context import Context
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.loader import load_through
from flashmoe.engines.llamacpp.vfile import VirtualFile, segments
from flashmoe.storage.addresses import reserve_uncounted
from flashmoe.storage.gguf import GGUF


class ContextSizes:
    """Sizes of a known model's contexts. A context manager; not while other contexts are made in this process."""

    def __init__(self, lib: Library, gguf: GGUF) -> None:
        """Raises ModelError where the library does not load such a model."""
        self._lib = lib
        self._buffer = ExpertBuffer(lib)
        with ExitStack() as undo:
            headers = [part.header() for part in gguf.parts]
            file = VirtualFile(segments(gguf, headers, gguf.tensors.keys()), lambda _: None)
            self._model = load_through(lib, file, self._buffer, ".", gguf)
            undo.callback(lib.llama_model_free, self._model)
            self._buffer.seal()
            for name, shape in self._buffer.shapes.items():
                self._buffer.tensors[name].ne[:] = shape
            self._close = undo.pop_all()
        self.nbytes = cache(self._nbytes)

    def _nbytes(self, n_ctx: int, n_ubatch: int) -> int:
        """Of a context of `n_ctx` tokens: state and compute buffers of micro-batches of `n_ubatch`.

        Raises ModelError where the library does not make it.
        """
        with _addresses_alone(self._lib):
            context = Context(self._lib, self._model, n_ctx=n_ctx, n_ubatch=min(n_ubatch, n_ctx), threads=1)
            context.close()
        return context.tensor_bytes

    def __enter__(self) -> ContextSizes:
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()


@contextmanager
def _addresses_alone(lib: Library) -> Iterator[None]:
    """Let the library have addresses in place of the CPU's memory."""
    address = lib.ggml_backend_cpu_buffer_type()
    kept: list[Any] = []

    def function(body: Callable[..., Any], result: Any, *arguments: Any) -> int:
        kept.append(C.CFUNCTYPE(result, *arguments)(body))
        return C.cast(kept[-1], ptr).value or 0

    def nothing(*arguments: Any) -> int:
        return function(lambda *_: None, None, ptr, *arguments)

    def allocate(_type: int, size: int) -> int | None:
        try:
            memory, base = reserve_uncounted(size)
        except Exception:  # nothing may leave a C callback; the library says that it has no memory
            return None
        kept.append(memory)
        own = BufferInterface(
            free_buffer=function(lambda _: memory.madvise(mmap.MADV_DONTNEED), None, ptr),
            get_base=function(lambda _: base, ptr, ptr),
            set_tensor=nothing(ptr, ptr, C.c_size_t, C.c_size_t),
            get_tensor=nothing(ptr, ptr, C.c_size_t, C.c_size_t),
            memset_tensor=nothing(ptr, C.c_uint8, C.c_size_t, C.c_size_t),
            clear=nothing(C.c_uint8),
        )
        found: int = lib.ggml_backend_buffer_init(address, own, None, size)
        return found

    with allocating(lib, lambda _: allocate):
        yield
