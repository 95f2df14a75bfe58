"""The engine's own repacked layouts in slots: which expert tensors it repacks, and how one slice is repacked.

By default llama.cpp interleaves the rows of quantised weights as its fastest kernels for this processor want them. Such
a tensor lies in a buffer of one of the CPU device's extra buffer types, which at initialisation gives it the kernels
(`extra`) and repacks what is written to it. A slice of one expert is a tensor too: written to a slot, it is repacked
there.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from flashmoe.engines.llamacpp.abi import CONSTANTS, InitParams, Tensor
from flashmoe.engines.llamacpp.library import CPU_DEVICE, Library
from flashmoe.errors import LibraryError
from flashmoe.storage.aio import Place
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.gguf import TYPES, type_number

_WEIGHTS = CONSTANTS["GGML_BACKEND_BUFFER_USAGE_WEIGHTS"]
_F32, _I32 = CONSTANTS["GGML_TYPE_F32"], CONSTANTS["GGML_TYPE_I32"]
_GET_EXTRA_BUFFER_TYPES = C.CFUNCTYPE(C.POINTER(C.c_void_p), C.c_void_p)
_SLICES = "CPU_REPACK"  # the buffer type whose layouts keep every expert's bytes together


class Repacker:
    """Makes expert tensors repacked ones. Must live as long as the model; `close` it afterwards."""

    def __init__(self, lib: Library) -> None:
        self._lib = lib
        self._device = lib.ggml_backend_dev_by_type(CPU_DEVICE)
        self._buffers = [lib.ggml_backend_buft_alloc_buffer(kind, 64) for kind in self._buffer_types()]
        for buffer in self._buffers:
            lib.ggml_backend_buffer_set_usage(buffer, _WEIGHTS)

    def _buffer_types(self) -> Iterator[int]:
        """The CPU device's extra buffer types, in the order in which the engine's loader tries them."""
        registry = self._lib.ggml_backend_dev_backend_reg(self._device)
        function = self._lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if function:
            for kind in _GET_EXTRA_BUFFER_TYPES(function)(self._device):
                if not kind:
                    return
                yield kind

    def adopt(self, tensor: Tensor) -> bool:
        """Make a repacked tensor of an expert tensor, if the engine's default is to repack it. Say whether it is.

        Raises LibraryError where the engine would use a layout that slots do not know.
        """
        for buffer in self._buffers:
            if not self._supports(tensor, buffer):
                continue
            kind = self._lib.ggml_backend_buffer_get_type(buffer)
            name = self._lib.ggml_backend_buft_name(kind).decode()
            if name != _SLICES:
                raise LibraryError(f"{self._lib.path}: keeps experts in a layout of its own ({name})")
            tensor.buffer = buffer
            self._lib.ggml_backend_buffer_init_tensor(buffer, C.addressof(tensor))
            return True
        return False

    def _supports(self, tensor: Tensor, buffer: int) -> bool:
        """The question that the engine's loader asks: can the device multiply by this tensor in such a buffer?"""
        lib, kept = self._lib, tensor.buffer
        context = lib.ggml_init(InitParams(8 * lib.ggml_tensor_overhead(), None, True))
        try:
            vector = lib.ggml_new_tensor_3d(context, _F32, tensor.ne[0], 1, 1)
            ids = lib.ggml_new_tensor_2d(context, _I32, 1, 1)
            product = lib.ggml_mul_mat_id(context, C.addressof(tensor), vector, ids)
            tensor.buffer = buffer
            return bool(lib.ggml_backend_dev_supports_op(self._device, product))
        finally:
            tensor.buffer = kept
            lib.ggml_free(context)

    def place(self, tensor: Tensor) -> Place:
        """How a slice of an adopted tensor gets into a slot: (address of its bytes, address of the slot)."""
        one = Tensor.from_buffer_copy(tensor)
        one.ne[2], one.nb[3] = 1, one.nb[2]
        address, nbytes, write = C.addressof(one), int(one.nb[2]), self._lib.ggml_backend_tensor_set

        def place(source: int, slot: int) -> None:
            one.data = slot
            write(address, source, 0, nbytes)

        return place

    def close(self) -> None:
        for buffer in self._buffers:
            self._lib.ggml_backend_buffer_free(buffer)
        self._buffers = []


@contextmanager
def placed(lib: Library, catalog: ExpertCatalog) -> Iterator[ExpertCatalog]:
    """A catalog that knows what the engine would repack, and how, without loading the model."""
    repacker = Repacker(lib)
    tensors = [p.tensor for layer in catalog.layers for p in layer.weights]
    context = lib.ggml_init(InitParams((len(tensors) + 1) * lib.ggml_tensor_overhead(), None, True))
    try:
        places = {}
        for info in tensors:
            address = lib.ggml_new_tensor_3d(context, type_number(info.type), *info.shape)
            tensor = Tensor.from_address(address)
            if repacker.adopt(tensor):
                places[info.name] = repacker.place(tensor)
        yield catalog.placed(places)
    finally:
        lib.ggml_free(context)
        repacker.close()


def repacks_slice_by_slice(lib: Library) -> bool:
    """Whether a tensor of experts repacked at once has the same bytes as its slices repacked one by one."""
    experts, rows, columns = 3, 64, 512
    repacker = Repacker(lib)
    context = lib.ggml_init(InitParams(128 * lib.ggml_tensor_overhead(), None, True))
    try:
        known = lib.build.layout.constants["GGML_TYPE_COUNT"]
        for number in (n for n, (_, block, _) in TYPES.items() if block > 1 and n < known):
            address = lib.ggml_new_tensor_3d(context, number, columns, rows, experts)
            tensor = Tensor.from_address(address)
            if not repacker.adopt(tensor):
                continue
            size = int(tensor.nb[2])
            plain = np.random.default_rng(0).integers(0, 256, experts * size, np.uint8)
            whole, slices = np.zeros_like(plain), np.zeros_like(plain)
            tensor.data = whole.ctypes.data
            lib.ggml_backend_tensor_set(address, plain.ctypes.data, 0, plain.nbytes)
            place = repacker.place(tensor)
            for start in range(0, plain.nbytes, size):
                place(plain.ctypes.data + start, slices.ctypes.data + start)
            if not np.array_equal(whole, slices) or np.array_equal(whole, plain):
                return False
    finally:
        lib.ggml_free(context)
        repacker.close()
    return True
