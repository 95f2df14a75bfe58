"""Graphs of our own, computed with the kernels in use: the backend that computes them, and memory for their tensors."""

from __future__ import annotations

import ctypes as C
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.engines.llamacpp.library import CPU_DEVICE, Library

_ALIGN = 64


class CpuBackend:
    """A backend of the CPU device that is in use. `close` it."""

    def __init__(self, lib: Library, threads: int) -> None:
        self._lib, self._undo = lib, ExitStack()
        device = lib.ggml_backend_dev_by_type(CPU_DEVICE)
        self._pointer = lib.ggml_backend_dev_init(device, None)
        registry = lib.ggml_backend_dev_backend_reg(device)

        def tell(name: str, kind: Any, value: Any) -> None:
            address = lib.ggml_backend_reg_get_proc_address(registry, name.encode())
            C.CFUNCTYPE(None, C.c_void_p, kind)(address)(self._pointer, value)

        tell("ggml_backend_set_n_threads", C.c_int, threads)
        if not lib.openmp:
            params = lib.ggml_threadpool_params_default(threads)
            pool = lib.ggml_threadpool_new(C.byref(params))
            self._undo.callback(lib.ggml_threadpool_free, pool)
            tell("ggml_backend_cpu_set_threadpool", C.c_void_p, pool)
        self._undo.callback(lib.ggml_backend_free, self._pointer)

    def compute(self, graph: int) -> bool:
        """Compute the graph at an address; whether that succeeded."""
        return not self._lib.ggml_backend_graph_compute(self._pointer, graph)

    def close(self) -> None:
        """Free it, and its threads."""
        self._undo.close()


def aligned(nbytes: int, value: int = 0) -> NDArray[np.uint8]:
    """Memory as the kernels want it, every byte with a value."""
    memory = np.full(nbytes + _ALIGN, value, np.uint8)
    start = -memory.ctypes.data % _ALIGN
    return memory[start : start + nbytes]


def floats(address: int, rows: int, columns: int) -> NDArray[np.float32]:
    """What a tensor's memory holds, float32 [rows, columns], not copied."""
    return np.ctypeslib.as_array((C.c_float * (rows * columns)).from_address(address)).reshape(rows, columns)
