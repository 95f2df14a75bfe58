"""Routing taken from a trace: a model of random weights then shows the locality of a real one.

The router still runs and its weights are used; only the choice of experts is replaced, after the weights were gathered
and before the experts are fetched.
"""

from __future__ import annotations

import ctypes as C
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashmoe.engines.llamacpp.callback import on_node
from flashmoe.engines.llamacpp.control import PYTHON_CALLBACK, RETURNED, Control
from flashmoe.routing.files import read
from flashmoe.routing.trace import RoutingTrace
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.gguf import read_gguf

Int32 = NDArray[np.int32]
_LAYER_STRIDE = 997  # tokens between the uses of one trace layer for two layers of the model


class ForcedRouting:
    """Overwrites the router's choice with a trace's, row by row. Call `at` before every evaluation."""

    def __init__(self, table: Int32) -> None:
        """table: experts [positions, layers, top_k], distinct within a token."""
        self.table = table
        self._end = 0

    @classmethod
    def for_model(cls, catalog: ExpertCatalog, trace: str, start: int, positions: int) -> ForcedRouting:
        """The first `positions` tokens of a run that begins at token `start` of a trace file. Raises TraceError."""
        experts = [layer.n_experts for layer in catalog.layers]
        return cls(expert_table(read(trace), experts, catalog.top_k, start, positions))

    def at(self, position: int, tokens: int) -> None:
        """The next evaluation has `tokens` tokens from `position` on."""
        self._end = position + tokens

    def __call__(self, layer: int, ids: Int32) -> None:
        """Overwrite `ids` [tokens, top_k] of a layer; a layer that sees fewer tokens sees the last ones."""
        ids[...] = self.table[self._end - len(ids) : self._end, layer, : ids.shape[1]]


def expert_table(trace: RoutingTrace, experts: list[int], top_k: int, start: int, positions: int) -> Int32:
    """Experts [positions, layers, top_k] for a model of `experts[l]` experts per layer, from a trace of any shape.

    Tokens are taken from `start` on, round and round. Layers map by index; a trace with fewer layers is used again
    for the layers beyond, from other tokens. Ids are taken modulo the layer's experts; where that or a smaller top-k
    leaves a token with too few distinct experts, those of the following tokens fill up, then the lowest unused.
    """
    rows = np.maximum(trace.expert_ids[_usable(trace)], 0)
    n = len(rows)
    table = np.empty((positions, len(experts), top_k), np.int32)
    for layer, n_experts in enumerate(experts):
        again, source = divmod(layer, trace.n_layers)
        first = start + again * _LAYER_STRIDE
        for position in range(positions):
            chosen: dict[int, None] = {}
            for ahead in range(min(n, top_k)):
                row = rows[(first + position + ahead) % n, source]
                chosen.update(dict.fromkeys((row % n_experts).tolist()))
                if len(chosen) >= top_k:
                    break
            else:
                chosen.update(dict.fromkeys(range(n_experts)))
            table[position, layer] = list(chosen)[:top_k]
    return table


def trace_tokens(trace: RoutingTrace, start: int, positions: int) -> Int32:
    """The tokens that belong to `expert_table`'s rows, int32 [positions]; -1 where the trace does not know them."""
    known = trace.token_id[_usable(trace)]
    return np.take(known, np.arange(start, start + positions), mode="wrap").astype(np.int32)


def _usable(trace: RoutingTrace) -> NDArray[np.bool_]:
    """The tokens that every layer has seen; all where there are none."""
    seen = np.asarray(trace.expert_ids >= 0).reshape(len(trace.expert_ids), -1)
    complete = seen.min(axis=1)
    return complete if complete.any() else np.ones_like(complete)


class StockRouting:
    """The same for stock llama.cpp, whose experts stay where they are: an eval callback that only overwrites ids.

    `callback` is what a Context takes; keep this object while it is in use. `error` is what went wrong inside.
    """

    def __init__(self, model: str, trace: str, start: int, positions: int, n_ubatch: int) -> None:
        catalog = ExpertCatalog.from_gguf(read_gguf(Path(model)))
        self.forced = ForcedRouting.for_model(catalog, trace, start, positions)
        self.error: BaseException | None = None
        self._layer_of_block = {layer.block: i for i, layer in enumerate(catalog.layers)}
        self._ids = np.zeros(n_ubatch * catalog.top_k, np.int32)
        self._python = PYTHON_CALLBACK(self._on_python)
        self._control = Control(
            python=C.cast(self._python, C.c_void_p).value,
            outcome=RETURNED,
            buffer=self._ids.ctypes.data,
            capacity=len(self._ids),
        )

    @property
    def callback(self) -> tuple[int, int]:
        """cb_eval and its user data."""
        return on_node.address or 0, C.addressof(self._control)

    def _on_python(self, _node: int, _ask: int) -> int:
        control = self._control
        try:
            ids = self._ids[: control.tokens * control.top_k].reshape(control.tokens, control.top_k)
            self.forced(self._layer_of_block[control.block], ids)
            control.outcome = RETURNED
        except BaseException as error:  # nothing may leave a C callback
            self.error = error
        return int(self.error is None)
