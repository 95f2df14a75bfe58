"""How fast this machine computes: the engine's own products of matrices, for a tensor type.

Of a matrix and a vector for `flashmoe plan`, and of experts for the choice between kernels.
"""

from __future__ import annotations

import ctypes as C
import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.engines.llamacpp.abi import CONSTANTS, InitParams, Tensor
from flashmoe.engines.llamacpp.compute import CpuBackend, aligned
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.repack import Repacker
from flashmoe.storage.gguf import TYPES, type_number

_COLUMNS = 2048
_BYTES = 192 << 20  # beyond the caches: weights come from memory, as they do when a model runs
_RUNS = 3
_F32, _I32 = CONSTANTS["GGML_TYPE_F32"], CONSTANTS["GGML_TYPE_I32"]
_VALUE = 0x11  # of every byte of weights: small numbers in every type
# of the products that kernels are compared by: OLMoE's experts
_EXPERTS, _TOP_K, _ROWS, _PROMPT = 64, 8, 1024, 128


class Rates(NamedTuple):
    """1e9 bytes of weights that are multiplied with a token per second: one token at a time, and 128 of a prompt."""

    decode: float
    prompt: float


def product_rate(lib: Library, type_name: str, threads: int) -> float:
    """1e9 bytes of weights of a type that are multiplied per second, as one token is decoded. About 0.1 s."""
    with _Products(lib, threads) as products:
        number = type_number(type_name)
        _, block, block_bytes = TYPES[number]
        matrix = products.weights(number, _COLUMNS, _BYTES // (_COLUMNS // block * block_bytes), 1)
        vector = products.numbers(_COLUMNS, 1, 1)
        return matrix.nbytes / products.seconds([("ggml_mul_mat", matrix.address, vector)]) / 1e9


def expert_rates(lib: Library, type_name: str, threads: int, *, repack: bool) -> Rates:
    """Of experts of a type, each token picking 8 of 64. repack: in the layout that the kernels want. About a second."""
    with _Products(lib, threads) as products:
        experts = products.weights(type_number(type_name), _COLUMNS, _ROWS, _EXPERTS, repack=repack)
        order = np.random.default_rng(0).permuted(
            np.tile(np.arange(_EXPERTS, dtype=np.int32), (_PROMPT, 1)), axis=1
        )
        each = np.arange(_EXPERTS, dtype=np.int32).reshape(-1, 1, _TOP_K)  # every expert once: from memory
        vector = products.numbers(_COLUMNS, 1, 1)
        decode = products.seconds(
            [("ggml_mul_mat_id", experts.address, vector, products.ids(ids)) for ids in each]
        )
        batch = products.numbers(_COLUMNS, 1, _PROMPT)
        prompt = products.seconds(
            [("ggml_mul_mat_id", experts.address, batch, products.ids(order[:, :_TOP_K]))]
        )
        active = experts.nbytes * _TOP_K / _EXPERTS * _PROMPT
        return Rates(experts.nbytes / decode / 1e9, active / prompt / 1e9)


class _Weights(NamedTuple):
    address: int
    nbytes: int


class _Products:
    """Graphs of products on the CPU device that is in use, over arrays of numpy's. A context manager."""

    def __init__(self, lib: Library, threads: int) -> None:
        self._lib = lib
        self._keep: list[NDArray[Any]] = []
        self._context = lib.ggml_init(InitParams(1 << 20, None, True))
        self._repacker = Repacker(lib)
        self._backend = CpuBackend(lib, threads)

    def _array(self, nbytes: int, value: int = 0) -> int:
        """The address of an array."""
        self._keep.append(aligned(nbytes, value))
        return int(self._keep[-1].ctypes.data)

    def weights(
        self, number: int, columns: int, rows: int, experts: int, *, repack: bool = False
    ) -> _Weights:
        """A matrix of a type, or of several experts."""
        address = self._lib.ggml_new_tensor_3d(self._context, number, columns, rows, experts)
        tensor = Tensor.from_address(address)
        nbytes = int(tensor.nb[2]) * experts
        if repack and self._repacker.adopt(tensor):
            tensor.data = self._array(nbytes)
            self._lib.ggml_backend_tensor_set(address, self._array(nbytes, _VALUE), 0, nbytes)
        else:
            tensor.data = self._array(nbytes, _VALUE)
        return _Weights(address, nbytes)

    def numbers(self, *shape: int) -> int:
        """A tensor of zeros."""
        address: int = self._lib.ggml_new_tensor_3d(self._context, _F32, *shape)
        Tensor.from_address(address).data = self._array(4 * int(np.prod(shape)))
        return address

    def ids(self, chosen: NDArray[np.int32]) -> int:
        """A tensor of experts, [tokens, top_k]."""
        address: int = self._lib.ggml_new_tensor_2d(self._context, _I32, chosen.shape[1], chosen.shape[0])
        Tensor.from_address(address).data = place = self._array(chosen.nbytes)
        C.memmove(place, chosen.tobytes(), chosen.nbytes)
        return address

    def seconds(self, products: list[tuple[Any, ...]]) -> float:
        """The shortest time of a graph of products: (name of the function, address of each argument)."""
        graph = self._lib.ggml_new_graph(self._context)
        for name, *arguments in products:
            made = getattr(self._lib, name)(self._context, *arguments)
            tensor = Tensor.from_address(made)
            tensor.data = self._array(4 * int(np.prod(tensor.ne[:])))
            self._lib.ggml_build_forward_expand(graph, made)
        best = float("inf")
        for _ in range(_RUNS):
            began = time.perf_counter()
            self._backend.compute(graph)
            best = min(best, time.perf_counter() - began)
        return best

    def __enter__(self) -> _Products:
        return self

    def __exit__(self, *_: object) -> None:
        self._backend.close()
        self._repacker.close()
        self._lib.ggml_free(self._context)
