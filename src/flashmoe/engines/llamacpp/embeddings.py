"""Embeddings of tokens, as numbers: rows of the model's table, read from its file and converted by the library."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flashmoe.engines.llamacpp.abi import CONSTANTS, InitParams, Tensor
from flashmoe.engines.llamacpp.compute import CpuBackend, aligned
from flashmoe.engines.llamacpp.library import Library
from flashmoe.storage.gguf import GGUF, TensorInfo, type_number

_TABLE = "token_embd.weight"
_MEMORY = 1 << 20  # of a graph with one node


def table_of(gguf: GGUF) -> TensorInfo | None:
    """A model's table of embeddings, None where it has none."""
    table = gguf.tensors.get(_TABLE)
    return table if table is not None and len(table.shape) == 2 else None


class TokenEmbeddings:
    """float32 [n, d] of n token ids; rows of zeros for those that the table does not have."""

    def __init__(self, lib: Library, table: TensorInfo) -> None:
        self._lib, self._table = lib, table
        self._row_bytes = table.nbytes // table.shape[1]
        self._backend = CpuBackend(lib, 1)

    def __call__(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        width, rows = self._table.shape
        wanted = np.asarray(tokens, np.int64)
        known = (wanted >= 0) & (wanted < rows)
        distinct, place = np.unique(wanted[known], return_inverse=True)
        found = np.zeros((len(wanted), width), np.float32)
        if len(distinct):
            found[known] = self._converted(self._read(distinct.tolist()), len(distinct))[place]
        return found

    def _read(self, rows: list[int]) -> bytes:
        with self._table.file.open("rb", buffering=0) as file:
            return b"".join(
                os.pread(file.fileno(), self._row_bytes, self._table.offset + row * self._row_bytes)
                for row in rows
            )

    def _converted(self, data: bytes, n: int) -> NDArray[np.float32]:
        """Rows in the table's type, as numbers [n, d]."""
        lib, width = self._lib, self._table.shape[0]
        context = lib.ggml_init(InitParams(_MEMORY, None, True))
        try:
            source = lib.ggml_new_tensor_2d(context, type_number(self._table.type), width, n)
            ids = lib.ggml_new_tensor_2d(context, CONSTANTS["GGML_TYPE_I32"], n, 1)
            made = lib.ggml_get_rows(context, source, ids)
            numbers = aligned(4 * width * n)
            kept = [aligned(len(data)), aligned(4 * n), numbers]
            kept[0][:], kept[1][:] = (
                np.frombuffer(data, np.uint8),
                np.arange(n, dtype=np.int32).view(np.uint8),
            )
            for address, memory in zip((source, ids, made), kept, strict=True):
                Tensor.from_address(address).data = memory.ctypes.data
            graph = lib.ggml_new_graph(context)
            lib.ggml_build_forward_expand(graph, made)
            self._backend.compute(graph)
            return numbers.view(np.float32).reshape(n, width)
        finally:
            lib.ggml_free(context)

    def close(self) -> None:
        """Free what computes."""
        self._backend.close()

    __del__ = close
