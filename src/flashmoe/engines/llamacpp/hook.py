"""The eval callback: the router has spoken, the experts are made resident, their ids become slot numbers.

llama.cpp asks for every node of a graph whether its data is wanted. One node per layer is: `ffn_moe_weights-<block>`,
the gathering of the router's weights by the true ids. It runs before any expert product, and nothing reads true ids
after it, so its second source is where ids are renamed. The asking, about a thousand times per token, is compiled (see
callback.py); Python runs once per layer.
"""

from __future__ import annotations

import ctypes as C
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.engines.llamacpp.abi import Tensor
from flashmoe.engines.llamacpp.callback import NOT_RETURNED, PYTHON_CALLBACK, RETURNED, Control, on_node
from flashmoe.engines.llamacpp.interrupts import hold_interrupts
from flashmoe.engines.llamacpp.loader import LoadedModel
from flashmoe.engines.llamacpp.routers import read_router
from flashmoe.errors import FlashMoEError, ModelError
from flashmoe.prefetch.gate import Router
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.routing.recorder import RoutingObserver

INDICES = 26  # GGML_TYPE_I32


class RouterHook:
    """Connects a graph under evaluation with an ExpertCache.

    An exception inside (a failed read, Ctrl-C) ends the evaluation; it is kept in `error` for the caller to raise.
    """

    def __init__(self, model: LoadedModel, n_ubatch: int) -> None:
        self._layer_of_block = {layer.block: i for i, layer in enumerate(model.catalog.layers)}
        self._model = model
        self._experts: dict[int, int] = {}
        self._renamed: dict[int, int] = {}
        self._late_inputs: set[bytes] = set()
        self._late = C.create_string_buffer(64)
        self._ids = np.zeros(n_ubatch * model.catalog.top_k, np.int32)
        self._python = PYTHON_CALLBACK(self._on_python)
        self._control = Control(
            python=C.cast(self._python, C.c_void_p).value,
            outcome=RETURNED,
            buffer=self._ids.ctypes.data,
            capacity=len(self._ids),
            late=C.addressof(self._late),
        )
        self.cache: ExpertCache | None = None
        self.recorder: RoutingObserver | None = None
        self.prefetcher: Prefetcher | None = None
        self._met: dict[int, Router | None] = {}
        self._routers: list[Router] = []  # of all layers, once a graph of one token was inspected
        self._hidden: dict[int, NDArray[np.float32]] = {}
        #: Called with (layer, ids [tokens, top_k]) to put other experts in place of the router's.
        self.override: Callable[[int, NDArray[np.int32]], None] | None = None
        self.error: BaseException | None = None

    @property
    def function(self) -> int:
        """Address for llama_context_params.cb_eval."""
        return on_node.address or 0

    @property
    def data(self) -> int:
        """Address for llama_context_params.cb_eval_user_data."""
        return C.addressof(self._control)

    def inspect(self, enable: bool) -> None:
        """Check, node by node, that the next graph uses expert tensors only with ids that were renamed."""
        routers = [router for _, router in sorted(self._met.items()) if router]
        if self.prefetcher is not None and not self._routers and len(routers) == len(self._layer_of_block):
            self._routers = routers
            self.prefetcher.use_routers(routers)
        if enable:
            self._experts = self._model.layer_of_tensor()
            self._renamed = {}
            self._late_inputs.clear()
        elif len(self._late_inputs) == 1:  # every layer's last product has the same kind of input
            self._late.value = self._late_inputs.pop()
            self._control.late_length = len(self._late.value)
        self._control.inspect = int(enable)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around an evaluation: afterwards `error` has whatever went wrong inside."""
        self.error, self._control.outcome = None, RETURNED
        with hold_interrupts(self):
            yield
        if self._control.outcome == NOT_RETURNED and not self.error:
            # a signal handler has raised before the callback's first line: ctypes swallows that
            self.error = FlashMoEError("the evaluation was interrupted")
        self._settle()

    def _settle(self) -> None:
        """No read may be under way when an evaluation has ended; only one that failed leaves any."""
        self._control.pending = False
        if self.cache and self.cache.pending:
            self.error = self.error or ModelError(
                "an expert product ran before its reads had ended; please report it"
            )
            with suppress(FlashMoEError):
                self.cache.finish()

    def _on_python(self, address: int, ask: int) -> int:
        """Goes on if it ends with outcome RETURNED; else the evaluation ends and `error` says why."""
        control = self._control
        try:
            if self.error is None:
                if ask:
                    self._inspect(Tensor.from_address(address))
                elif control.block >= 0:
                    self._rename(control, address)
                else:
                    self._finish(control)
            if self.error is None:
                # last: what a signal's handler raises before this ends the evaluation
                control.outcome = RETURNED
        except BaseException as error:  # nothing may leave a C callback
            self.error = self.error or error
        return int(self.error is None)

    def _rename(self, control: Control, node: int) -> None:
        began = time.perf_counter()
        assert self.cache is not None
        stats = self.cache.stats[self.cache.phase]
        stalled = stats.stall_seconds
        tokens, top_k = control.tokens, control.top_k
        layer = self._layer_of_block[control.block]
        ids = self._ids[: tokens * top_k]
        if self.override is not None:
            self.override(layer, ids.reshape(tokens, top_k))
        recorder = self.recorder  # another thread may take it away
        if recorder is not None:
            weights = np.ctypeslib.as_array((C.c_float * len(ids)).from_address(control.weights))
            recorder.add(layer, ids.reshape(tokens, top_k), weights.reshape(tokens, top_k))
        if self.cache.pending:
            raise ModelError(
                f"the last product of layer {layer - 1} did not wait for its reads; please report it"
            )
        meanwhile = None
        if self.prefetcher is not None:
            if control.inspect and tokens == 1 and control.logits:
                self._met[layer] = read_router(self._model.lib, node, control.logits, control.ids)
            meanwhile = partial(self._look_ahead, self.prefetcher, control, layer)
        wanted = ids if tokens == 1 else ids.reshape(tokens, top_k)
        slots = self.cache.ensure(layer, wanted, leave_last=control.late_length > 0, meanwhile=meanwhile)
        ids[:] = slots
        control.pending = self.cache.pending
        if control.inspect:
            self._renamed[control.ids] = layer
        stats.overhead_seconds += time.perf_counter() - began - (stats.stall_seconds - stalled)

    def _look_ahead(self, prefetcher: Prefetcher, control: Control, layer: int) -> None:
        """Let the prefetcher see this layer's routing, while its reads are under way."""
        tokens, top_k = control.tokens, control.top_k
        ids = self._ids[: tokens * top_k]
        if tokens > 1:
            prefetcher.routed_many(layer, ids.reshape(tokens, top_k))
            return
        if control.hidden and self._routers:
            hidden = self._hidden.get(control.hidden)
            if hidden is None:
                n = len(self._routers[0].norm)
                hidden = np.ctypeslib.as_array((C.c_float * n).from_address(control.hidden))
                self._hidden[control.hidden] = hidden
            prefetcher.predictor.see(layer, hidden)
        prefetcher.routed(layer, ids)

    def _finish(self, control: Control) -> None:
        assert self.cache is not None
        control.pending = False
        self.cache.finish()

    def _inspect(self, node: Tensor) -> None:
        """Raise ModelError where a node uses tensors of ours in a way that is not provided for."""
        table = self._model.table_address
        if table and table in (node.src[0], node.src[1]):
            indices = node.src[1] if node.src[0] == table else None
            if not indices or Tensor.from_address(indices).type != INDICES:
                raise ModelError(
                    f"the architecture {self._model.catalog.gguf.architecture!r} does more with its token embedding "
                    f"than to gather rows (node {node.name.decode()!r}); please report it"
                )
        for source in (node.src[0], node.src[1]):
            layer = self._experts.get(source) if source else None
            if layer is None or node.view_src == source:  # a reshaped table keeps its slots
                continue
            if self._renamed.get(node.src[2] or 0) != layer:
                raise ModelError(
                    f"the architecture {self._model.catalog.gguf.architecture!r} routes its experts in a way that "
                    f"FlashMoE does not know (node {node.name.decode()!r}); please report it"
                )
            if source == self._model.last_plane(layer):
                name, _, number = Tensor.from_address(node.src[1]).name.rpartition(b"-")
                self._late_inputs.add(name + b"-" if number.isdigit() else b"")
