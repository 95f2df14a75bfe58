"""Reads a layer's router out of the graph, so that it can be applied ahead of time (see prefetch.gate)."""

from __future__ import annotations

import ctypes as C
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.engines.llamacpp.abi import CONSTANTS, Tensor
from flashmoe.engines.llamacpp.compute import floats
from flashmoe.engines.llamacpp.library import Library
from flashmoe.prefetch.gate import Router

_F32 = CONSTANTS["GGML_TYPE_F32"]
#: By type: how a Router has the weights.
_BITS: dict[int, np.dtype[Any]] = {
    CONSTANTS[f"GGML_TYPE_{kind}"]: np.dtype(bits)
    for kind, bits in (("F32", "f4"), ("F16", "i2"), ("BF16", "u2"))
}
_CHAIN = 8  # nodes to look back at most


class GraphRouters:
    """The routers of a model, as graphs of one token show them, and their inputs while graphs are evaluated."""

    def __init__(self, lib: Library, layers: int) -> None:
        self._lib, self._layers = lib, layers
        self._met: dict[int, Router | None] = {}
        self._inputs: dict[int, NDArray[np.float32]] = {}  # of single tokens
        #: Of all layers in their order; none until every layer was met, and where any has a form that is not known.
        self.known: list[Router] = []

    def meet(self, layer: int, weights: int, logits: int, ids: int) -> None:
        """A layer's nodes in a graph that is inspected; see `read_router`."""
        self._met[layer] = read_router(self._lib, weights, logits, ids)

    def take(self) -> list[Router]:
        """The routers of all layers, once: when they have become known."""
        if self.known:
            return []
        routers = [router for _, router in sorted(self._met.items()) if router]
        if len(routers) == self._layers:
            self.known = routers
        return self.known

    def input(self, address: int, tokens: int) -> NDArray[np.float32] | None:
        """A router's input, float32 [tokens, n], at an address of the engine's; None for 0 or unknown routers."""
        if not address or not self.known:
            return None
        if tokens > 1:
            return floats(address, tokens, len(self.known[0].norm))
        if address not in self._inputs:
            self._inputs[address] = floats(address, 1, len(self.known[0].norm))
        return self._inputs[address]


def read_router(lib: Library, weights: int, logits: int, ids: int) -> Router | None:
    """The router between a layer's hidden state and its choice; None where it has a form that is not known.

    weights, logits, ids: addresses of the layer's nodes `ffn_moe_weights`, `ffn_moe_logits` and `ffn_moe_topk`. The
    arrays are the engine's own memory: valid as long as the model.
    """
    product = Tensor.from_address(logits)
    matrix, hidden = Tensor.from_address(product.src[0]), Tensor.from_address(product.src[1])
    n, experts = matrix.ne[0], matrix.ne[1]
    kind = _BITS.get(matrix.type)
    if kind is None or not matrix.data or matrix.nb[1] != kind.itemsize * n:
        return None
    if hidden.type != _F32 or hidden.nb[1] != 4 * n:
        return None
    table = np.frombuffer((C.c_char * (kind.itemsize * n * experts)).from_address(matrix.data), kind)
    norm = None
    if lib.ggml_op_desc(C.addressof(hidden)) == b"MUL":
        norm = _floats(Tensor.from_address(hidden.src[1]), n)
    bias = choice_bias = None
    for node in _chain(weights):
        if node.src[0] == logits:
            bias = _added(lib, node, experts)
    for node in _chain(ids):
        if node.src[0] != logits and choice_bias is None:
            choice_bias = _added(lib, node, experts)
    return Router(
        table.reshape(experts, n),
        np.ones(n, np.float32) if norm is None else norm,
        np.zeros(experts, np.float32) if bias is None else bias,
        np.zeros(0, np.float32) if choice_bias is None else choice_bias,
    )


def _chain(address: int) -> Iterator[Tensor]:
    """A node, its first source, that one's first source, and so on."""
    for _ in range(_CHAIN):
        node = Tensor.from_address(address)
        if not node.src[0]:
            return
        yield node
        address = node.src[0]


def _added(lib: Library, node: Tensor, n: int) -> NDArray[np.float32] | None:
    """What an addition adds, float32 [n]; None for any other node."""
    return (
        _floats(Tensor.from_address(node.src[1]), n)
        if lib.ggml_op_desc(C.addressof(node)) == b"ADD"
        else None
    )


def _floats(tensor: Any, n: int) -> NDArray[np.float32] | None:
    """The data of an f32 tensor of `n` numbers; None for any other."""
    count = tensor.ne[0] * tensor.ne[1] * tensor.ne[2] * tensor.ne[3]
    if tensor.type != _F32 or count != n or not tensor.data:
        return None
    return floats(tensor.data, 1, n)[0]
