"""Overlap inside a layer: its resident experts are multiplied while the missing ones are read.

A product of the engine's graph computes all experts of a token at once, so it waits for the last of them. Where a layer
has missing experts, its products (up and gate, the activation between, down) are therefore made to do nothing, and
computed at the last one's place by two graphs of our own, with the engine's kernels: of the residents at once, and of
the others when their bytes are in. Each expert's rows are what they were, to the last bit: a product by ids computes
the rows of one expert as if there were no other.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
from numba import carray
from numpy.typing import NDArray

from flashmoe.common.compiled import int32_at, int64_at
from flashmoe.common.kept import kept
from flashmoe.engines.llamacpp.abi import CONSTANTS, InitParams, Tensor
from flashmoe.engines.llamacpp.compute import CpuBackend, aligned, floats
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import ModelError
from flashmoe.storage.catalog import ExpertCatalog

WORTH = 1 << 20  # bytes of an expert from which on its products take longer than calling them apart
_ACTIVATIONS = {b"SWIGLU", b"GEGLU", b"REGLU", b"SWIGLU_OAI", b"GEGLU_ERF", b"GEGLU_QUICK"}
_VIEWS = {b"NONE", b"RESHAPE", b"VIEW", b"PERMUTE", b"TRANSPOSE"}
_NOTHING, _F32, _I32 = (CONSTANTS[f"GGML_{name}"] for name in ("OP_NONE", "TYPE_F32", "TYPE_I32"))
_OP, _SOURCE0, _SOURCE2 = Tensor.op.offset, Tensor.src.offset, Tensor.src.offset + 16
_PRODUCTS = 3  # up and gate, in either order, and down
_IDS, _PRODUCT, _ACTIVATION, _FIRST, _SECOND, _BETWEEN, _LAST, _SIZE = range(8)
_CONTEXT_BYTES, _GRAPH_NODES = 64 << 10, 16


class Forms:
    """How the layers of a graph multiply, as its nodes show: `look` at each, in their order.

    A layer whose experts can be multiplied apart has two products of the same input, an activation of the two, and a
    product of that. Nothing else looks at what is between them, and nothing else is computed there: it might be put
    where the input was, which the engine takes for used.
    """

    def __init__(self, catalog: ExpertCatalog) -> None:
        self._sizes = [sum(w.nbytes for w in layer.weights) for layer in catalog.layers]
        self._products: dict[int, list[int]] = {}  # of a layer
        self._between: dict[int, int] = {}  # address of an activation -> its layer
        self._layer_of: dict[int, int] = {}  # of every product
        self._others: set[int] = set()  # layers that do anything else
        self._ids: dict[int, int] = {}  # address of what holds each layer's
        #: The numbers of the two operations.
        self.product = self.activation = -1

    def rename(self, ids: int, layer: int) -> None:
        """The address of the tensor that holds a layer's ids."""
        self._ids[layer] = ids

    def look(self, address: int, operation: bytes, layer: int | None) -> None:
        """A node, what it does, and the layer whose expert tensor it multiplies by, if it does."""
        node = Tensor.from_address(address)
        sources = [source for source in node.src if source]
        inner = {self._layer_of.get(s, self._between.get(s)) for s in sources} - {None}
        if layer is not None and operation == b"MUL_MAT_ID":
            found = self._products.setdefault(layer, [])
            found.append(address)
            self._layer_of[address], self.product = layer, node.op
            given = _node(node.src[1])
            last = len(found) == _PRODUCTS and self._between.get(node.src[1]) == layer
            first = len(found) < _PRODUCTS and not inner and node.src[1] == _node(found[0]).src[1]
            if (
                not (last or (first and given.ne[1] == 1))
                or node.src[2] != self._ids.get(layer)
                or given.ne[2] != 1
            ):
                self._others.add(layer)
            elif last:  # what follows may use it as it likes
                del self._layer_of[address]
        elif layer is not None:
            self._others.add(layer)
        elif inner and operation in _ACTIVATIONS and self.activation in (-1, node.op):
            of = self._layer_of.get(node.src[0], -1)
            pair = sorted(sources) == sorted(self._products.get(of, ()))
            if pair and len(sources) == 2:  # noqa: PLR2004
                self._between[address], self.activation = of, node.op
            else:
                self._others |= inner  # type: ignore[arg-type]
        else:
            self._others |= inner  # type: ignore[arg-type]
            if operation not in _VIEWS:
                self._others |= {of for of, found in self._products.items() if len(found) < _PRODUCTS}

    @property
    def layers(self) -> frozenset[int]:
        """Layers whose experts can be multiplied apart, and are large enough."""
        whole = {layer for layer, found in self._products.items() if len(found) == _PRODUCTS}
        return frozenset(
            layer
            for layer in whole & set(self._between.values()) - self._others
            if self._sizes[layer] >= WORTH
        )


class _Graph(NamedTuple):
    address: int
    input: Any
    ids: Any
    first: Any
    second: Any
    between: Any
    last: Any


class Overlap:
    """Computes the products of one layer after the other apart. `close` it."""

    def __init__(self, lib: Library, threads: int) -> None:
        self._lib, self._threads = lib, threads
        #: Layers whose experts can be multiplied apart, and the operations, see Forms.
        self.layers: frozenset[int] = frozenset()
        self._state = np.zeros(_SIZE, np.int64)
        self._parts: tuple[list[int], list[int]] = [], []
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._memory: dict[tuple[int, ...], list[NDArray[np.uint8]]] = {}  # of all graphs of a shape
        self._undo = ExitStack()
        self._backend: CpuBackend | None = None

    def learn(self, forms: Forms) -> None:
        """Take note of what the graph of one token has shown. Nothing is apart where threads are not OpenMP's: the
        graphs of our own would need a second team."""
        if self._lib.openmp and forms.layers:
            self.layers = forms.layers
            self._state[_PRODUCT], self._state[_ACTIVATION] = forms.product, forms.activation
            if not self._backend:
                self._backend = CpuBackend(self._lib, self._threads)
                self._undo.callback(self._backend.close)

    def divert(self, ids: int, late: Sequence[bool]) -> int:
        """The products with `ids` (a tensor's address) are to do nothing; `late` says which experts are missing.

        Returns the address that `take` needs.
        """
        self._state[_IDS], self._state[_FIRST:] = ids, 0
        self._parts = (
            [i for i, absent in enumerate(late) if not absent],
            [i for i, absent in enumerate(late) if absent],
        )
        return int(self._state.ctypes.data)

    def restore(self) -> None:
        """The library may use its graph again: let its nodes compute."""
        for place in (_FIRST, _SECOND, _BETWEEN, _LAST):
            if address := int(self._state[place]):
                activation = place == _BETWEEN
                _node(address).op = int(self._state[_ACTIVATION if activation else _PRODUCT])

    def compute(self, wait: Callable[[], None]) -> None:
        """Compute the layer's products: of the residents, then `wait`, then of the others. Raises what `wait` does."""
        self.restore()
        if not self._state[_FIRST:].all():
            raise ModelError("a layer's products are not those of the first token; please report it")
        first, second, between, last = (_node(int(address)) for address in self._state[_FIRST:_SIZE])
        ids = _node(int(self._state[_IDS]))
        slots = np.ctypeslib.as_array((C.c_int32 * ids.ne[0]).from_address(ids.data))
        # the result may lie where the products' input does: it is written when all is computed
        rows = np.empty((ids.ne[0], last.ne[0]), np.float32)
        nodes = first, second, between, last
        residents, others = self._parts
        if residents:
            rows[residents] = self._multiply(nodes, slots[residents])
        wait()
        rows[others] = self._multiply(nodes, slots[others])
        C.memmove(last.data, rows.ctypes.data, rows.nbytes)

    def _multiply(self, nodes: tuple[Any, Any, Any, Any], slots: NDArray[np.int32]) -> NDArray[np.float32]:
        """Rows of the last of `nodes` for experts in `slots`, float32 [n, n_embd]; valid until the next call."""
        first, second, between, last = nodes
        shape = len(slots), _node(first.src[1]).ne[0], first.ne[0], last.ne[0]
        graph = self._graphs.get(shape) or self._make(shape, nodes, _node(first.src[2]).ne[0])
        graph.input.data = _node(first.src[1]).data
        for mine, node in zip((graph.first, graph.second, graph.between, graph.last), nodes, strict=True):
            mine.src[0], mine.op_params[:] = node.src[0], node.op_params[:]
        swapped = between.src[0] != C.addressof(first)
        pair = (graph.second, graph.first) if swapped else (graph.first, graph.second)
        graph.between.src[0], graph.between.src[1] = map(C.addressof, pair)
        C.memmove(graph.ids.data, slots.ctypes.data, slots.nbytes)
        assert self._backend is not None
        if not self._backend.compute(graph.address):
            raise ModelError("the engine failed to multiply a layer's experts; please report it")
        return floats(graph.last.data, len(slots), last.ne[0])

    def _make(self, shape: tuple[int, ...], nodes: tuple[Any, Any, Any, Any], most: int) -> _Graph:
        """A graph for so many experts, of (inputs, hidden numbers, outputs); its memory is enough for `most`."""
        lib, (n, inputs, hidden, outputs) = self._lib, shape
        context = lib.ggml_init(InitParams(_CONTEXT_BYTES, None, True))
        self._undo.callback(lib.ggml_free, context)
        columns = inputs, most, hidden, hidden, hidden, outputs
        memory = self._memory.setdefault(shape[1:], [aligned(4 * n * most) for n in columns])
        places = (one.ctypes.data for one in memory)

        def tensor(kind: int, columns: int, rows: int, op: int = _NOTHING, *sources: int) -> Any:
            made = _node(lib.ggml_new_tensor_3d(context, kind, columns, rows, 1))
            made.op = op
            for i, source in enumerate(sources):
                made.src[i] = source
            made.data = next(places)
            return made

        first, second, between, last = nodes
        at = C.addressof
        given, ids = tensor(_F32, inputs, 1), tensor(_I32, n, 1)
        a = tensor(_F32, hidden, n, first.op, first.src[0], at(given), at(ids))
        b = tensor(_F32, hidden, n, second.op, second.src[0], at(given), at(ids))
        middle = tensor(_F32, hidden, n, between.op, at(a), at(b))
        result = tensor(_F32, outputs, n, last.op, last.src[0], at(middle), at(ids))
        address = lib.ggml_new_graph_custom(context, _GRAPH_NODES, False)
        lib.ggml_build_forward_expand(address, C.addressof(result))
        graph = self._graphs[shape] = _Graph(address, given, ids, a, b, middle, result)
        return graph

    def close(self) -> None:
        """Free the graphs."""
        self._graphs.clear()
        self.layers = frozenset()
        self._undo.close()


def _node(address: int) -> Any:
    return Tensor.from_address(address)


@kept()
def read(address: Any) -> Any:
    """The int64 at an address."""
    return carray(int64_at(address), 1)[0]


@kept()
def take(diverted: Any, node: Any) -> Any:
    """Before a node is computed: let it do nothing if it is one of the layer's products, or between them.

    diverted: what `Overlap.divert` has returned. Whether it is the last one, in whose place the others are computed.
    """
    state, op = carray(int64_at(diverted), _SIZE), carray(int32_at(node + _OP), 1)
    if op[0] == state[_PRODUCT] and read(node + _SOURCE2) == state[_IDS]:
        place = _FIRST if state[_FIRST] == 0 else _SECOND if state[_SECOND] == 0 else _LAST
    elif op[0] == state[_ACTIVATION] and state[_SECOND] != 0 and _is_of(state, read(node + _SOURCE0)):
        place = _BETWEEN
    else:
        return False
    state[place], op[0] = node, _NOTHING
    return place == _LAST


@kept()
def _is_of(state: Any, source: Any) -> Any:
    return source == state[_FIRST] or source == state[_SECOND]  # noqa: PLR1714


@kept()
def is_last(diverted: Any, node: Any) -> Any:
    """Whether the products are to be computed at a node."""
    return carray(int64_at(diverted), _SIZE)[_LAST] == node
