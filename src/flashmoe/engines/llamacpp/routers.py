"""Reads a layer's router out of the graph, so that it can be applied ahead of time (see prefetch.gate)."""

from __future__ import annotations

import ctypes as C
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.engines.llamacpp.abi import Tensor
from flashmoe.engines.llamacpp.library import Library
from flashmoe.prefetch.gate import Router

_F32 = 0
_CHAIN = 8  # nodes to look back at most


def read_router(lib: Library, weights: int, logits: int, ids: int) -> Router | None:
    """The router between a layer's hidden state and its choice; None where it has a form that is not known.

    weights, logits, ids: addresses of the layer's nodes `ffn_moe_weights`, `ffn_moe_logits` and `ffn_moe_topk`. The
    arrays are the engine's own memory: valid as long as the model.
    """
    product = Tensor.from_address(logits)
    matrix, hidden = Tensor.from_address(product.src[0]), Tensor.from_address(product.src[1])
    n, experts = matrix.ne[0], matrix.ne[1]
    table = _floats(matrix, n * experts)
    if table is None or hidden.type != _F32 or matrix.nb[1] != 4 * n:
        return None
    norm = None
    if lib.ggml_op_desc(C.addressof(hidden)) == b"MUL":
        norm = _floats(Tensor.from_address(hidden.src[1]), n)
    return Router(
        table.reshape(experts, n),
        np.ones(n, np.float32) if norm is None else norm,
        _added(weights, b"ffn_moe_logits_biased-", experts, np.zeros(experts, np.float32)),
        _added(ids, b"ffn_moe_probs_biased-", experts, np.zeros(0, np.float32)),
    )


def _added(node: int, prefix: bytes, n: int, otherwise: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the node of a name, somewhere behind `node`, adds: float32 [n]; `otherwise` where there is none."""
    for _ in range(_CHAIN):
        tensor = Tensor.from_address(node)
        if tensor.name.startswith(prefix) and tensor.src[1]:
            found = _floats(Tensor.from_address(tensor.src[1]), n)
            return otherwise if found is None else found
        if not tensor.src[0]:
            break
        node = tensor.src[0]
    return otherwise


def _floats(tensor: Any, n: int) -> NDArray[np.float32] | None:
    """The data of an f32 tensor of `n` numbers; None for any other."""
    count = tensor.ne[0] * tensor.ne[1] * tensor.ne[2] * tensor.ne[3]
    if tensor.type != _F32 or count != n or not tensor.data:
        return None
    return np.ctypeslib.as_array((C.c_float * n).from_address(tensor.data))
