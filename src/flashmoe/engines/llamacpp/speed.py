"""How fast this machine computes: the engine's own product of a matrix and a vector, for a tensor type."""

from __future__ import annotations

import ctypes as C
import time
from typing import Any

from flashmoe.engines.llamacpp.abi import CONSTANTS, InitParams
from flashmoe.engines.llamacpp.library import Library
from flashmoe.storage.gguf import TYPES, type_number

_COLUMNS = 2048
_BYTES = 192 << 20  # beyond the caches: weights come from memory, as they do when a model runs
_RUNS = 3


def product_rate(lib: Library, type_name: str, threads: int) -> float:
    """1e9 bytes of weights of a type that are multiplied per second, as one token is decoded. About 0.1 s."""
    number = type_number(type_name)
    _, block, block_bytes = TYPES[number]
    rows = _BYTES // (_COLUMNS // block * block_bytes)
    weights = rows * (_COLUMNS // block) * block_bytes
    void, size = C.c_void_p, C.c_size_t

    def function(name: str, result: Any, *arguments: Any) -> Any:
        found = lib._find(name)
        found.restype, found.argtypes = result, list(arguments)
        return found

    init = function("ggml_init", void, InitParams)
    new = function("ggml_new_tensor_2d", void, void, C.c_int, C.c_int64, C.c_int64)
    data = function("ggml_get_data", void, void)
    nbytes = function("ggml_nbytes", size, void)
    context = init(InitParams(weights + (64 << 20), None, False))
    try:
        matrix, vector = (
            new(context, number, _COLUMNS, rows),
            new(context, CONSTANTS["GGML_TYPE_F32"], _COLUMNS, 1),
        )
        C.memset(data(matrix), 0x11, nbytes(matrix))  # small numbers in every type
        C.memset(data(vector), 0, nbytes(vector))
        product = function("ggml_mul_mat", void, void, void, void)(context, matrix, vector)
        graph = function("ggml_new_graph", void, void)(context)
        function("ggml_build_forward_expand", None, void, void)(graph, product)
        compute = function("ggml_graph_compute_with_ctx", C.c_int, void, void, C.c_int)
        best = 0.0
        for _ in range(_RUNS):
            began = time.perf_counter()
            compute(context, graph, threads)
            best = max(best, weights / (time.perf_counter() - began) / 1e9)
        return best
    finally:
        function("ggml_free", None, void)(context)
