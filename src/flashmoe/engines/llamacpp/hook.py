"""The eval callback: after a layer's router, its experts are made resident and their ids become slot numbers.

llama.cpp asks for every node of a graph whether its data is wanted. One node per layer is: `ffn_moe_weights-<block>`,
the gathering of the router's weights by the true ids. It runs before any expert product, and nothing reads true ids
after it, so its second source is where ids are renamed. The asking, about a thousand times per token, is compiled (see
callback.py); Python runs once per layer.
"""

from __future__ import annotations

import ctypes as C
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.common.memory import major_faults
from flashmoe.engines.layer_step import LayerStep
from flashmoe.engines.llamacpp.abi import Tensor
from flashmoe.engines.llamacpp.callback import on_node
from flashmoe.engines.llamacpp.compute import floats
from flashmoe.engines.llamacpp.control import (
    APART,
    BEGIN,
    END,
    GATHER,
    LOOK,
    MOST_QUIET,
    NOT_RETURNED,
    PYTHON_CALLBACK,
    RANKED,
    REFUSED,
    RETURNED,
    SERVED,
    Control,
)
from flashmoe.engines.llamacpp.counts import Counts
from flashmoe.engines.llamacpp.inspection import Inspection
from flashmoe.engines.llamacpp.loader import LoadedModel
from flashmoe.engines.llamacpp.overlap import Overlap
from flashmoe.engines.llamacpp.rewriting import GraphRewriter
from flashmoe.engines.llamacpp.routers import GraphRouters
from flashmoe.engines.llamacpp.routing_log import TOKENS, RoutingLog
from flashmoe.engines.llamacpp.served import ServedGraphs
from flashmoe.errors import FlashMoEError, ModelError
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.routing.recorder import RoutingObserver

_QUIET = 3  # milliseconds


class RouterHook:
    """Connects a graph under evaluation with an ExpertCache.

    An exception inside (a failed read, Ctrl-C) ends the evaluation; it is kept in `error` for the caller to raise.
    """

    def __init__(self, model: LoadedModel, n_ubatch: int, threads: int) -> None:
        """threads: that compute."""
        self._layer_at = {place: i for i, place in enumerate(model.catalog.places)}
        self._model = model
        self._inspection = Inspection(model)
        self._overlap = Overlap(model.lib, threads)
        self._step = LayerStep(model.catalog.top_k)
        self._late = C.create_string_buffer(256)
        self._n_ids = n_ubatch * model.catalog.top_k
        self._ids = np.zeros(0, np.int32)
        self._true_ids = np.zeros(self._n_ids, np.int32)
        self._python = PYTHON_CALLBACK(self._on_python)
        self._control = Control(
            python=C.cast(self._python, C.c_void_p).value,
            outcome=RETURNED,
            late=C.addressof(self._late),
            values=model.catalog.first_value_place,
            true_ids=self._true_ids.ctypes.data,
        )
        self._tables = np.array([*model.tables, 0], np.int64)
        if model.tables:
            self._control.tables = self._tables.ctypes.data
        self._blocks = np.zeros((2, max(self._layer_at) + 1), np.int64)
        self._routers = GraphRouters(model.lib, len(self._layer_at))
        self.error: BaseException | None = None
        self._blank = False  # see `meet_routers`
        self._served = ServedGraphs()
        self._log: RoutingLog | None = None
        self._counts = Counts(self._control)
        #: Where decoded tokens' routes are rewritten.
        self.rewriter: GraphRewriter | None = None

    @property
    def cache(self) -> ExpertCache | None:
        """Who makes experts resident."""
        return self._step.cache

    @cache.setter
    def cache(self, cache: ExpertCache) -> None:
        cache.reserve(self._n_ids)
        cache.on_resize = self._look_in
        self._step.cache, self._ids = cache, cache.ids
        for place, layer in self._layer_at.items():
            self._blocks[:, place] = layer, cache.first_slots[layer]
        control = self._control
        control.buffer, control.capacity = self._ids.ctypes.data, len(self._ids)
        control.slots, control.spans = cache.slots.ctypes.data, self._model.spans.address
        control.held = cache.held.ctypes.data
        control.layers, control.first_slots = (row.ctypes.data for row in self._blocks)
        control.recent_at, control.recent_size = cache.recent.at.ctypes.data, cache.recent.ids.shape[1]

    def _look_in(self) -> bool:
        """Let the next layer and the next graph call Python, from any thread; whether no graph is under way."""
        self._control.look_in, self._control.quiet = 1, 0
        return self._control.thread == 0

    def record(self, recorder: RoutingObserver | None) -> None:
        """Let `recorder` see every layer's routing from here on."""
        self._step.recorder, self._control.quiet = recorder, 0

    def prefetch(self, prefetcher: Prefetcher) -> None:
        """Let `prefetcher` see every layer's routing from here on, and read ahead."""
        self._step.prefetcher, self._control.quiet = prefetcher, 0

    def meet_routers(self, evaluation: Callable[[], int]) -> None:
        """Learn what a graph of one token shows, before the first prompt: experts are neither chosen nor read.

        evaluation: of a token, to be forgotten; its products see what slots happen to hold.
        """
        control = self._control
        self._inspection.begin(1, False)
        control.inspect = control.whole = control.begun = 1
        control.request = control.quiet = 0
        self._blank = True
        try:
            self.evaluate(evaluation)
        finally:
            self._blank = False

    def override(self, override: Callable[[int, NDArray[np.int32]], None]) -> None:
        """Let `override`, called with (layer, ids [tokens, top_k]), put other experts in place of the router's."""
        self._step.override, self._control.quiet = override, 0

    @property
    def function(self) -> int:
        """Address for llama_context_params.cb_eval."""
        return on_node.address or 0

    @property
    def data(self) -> int:
        """Address for llama_context_params.cb_eval_user_data."""
        return C.addressof(self._control)

    def ignore(self, wanted: bool) -> None:
        """Let graphs end at their first node, and count nothing: what a server tries while it starts."""
        self._control.ignore = int(wanted)

    def wait_until_idle(self) -> None:
        """Until no thread of a server's evaluates a graph. While graphs are ignored, none begins after that."""
        quiet = 0
        while quiet < _QUIET:
            time.sleep(0.001)  # a graph may be just about to be noticed
            quiet = 0 if self._control.thread else quiet + 1

    def serve(self, served: ServedGraphs) -> int:
        """Graphs come unannounced from here on, see `ServedGraphs`; the address of what `callback.end_graph` takes."""
        self._served = served
        self.ready()
        self._control.quiet = 0  # what is true of the engine's own graphs need not be of the server's
        return self.data

    def begin(self, tokens: Sequence[int], *, embed: bool = False) -> None:
        """A graph of `tokens` is about to be evaluated: have what it needs before its first layer. Raises ReadError.

        tokens: their ids, none where only their number is known (images): -1.
        """
        cache, step, control = self.cache, self._step, self._control
        top_k = self._model.catalog.top_k
        again = control.quiet & 2 and len(tokens) == 1 and not embed and self.rewriter is None
        if cache and again and cache.phase == "decode" and cache.compiled_request(top_k):
            # as the last one, and nothing has changed since
            cache.begin_step(1, top_k)
            control.begun = 1
            return
        inspect = self._inspection.begin(len(tokens), embed)
        self._use_what_is_known()
        control.inspect, control.whole = int(inspect), int(self._inspection.whole)
        control.request = control.recent = control.quiet = control.turn = control.log = 0
        control.begun = 1
        control.rewrite = control.diverted = 0
        if cache is None:
            return
        if self.rewriter is not None and cache.phase == "decode" and step.override is None:
            self.rewriter.begin()
            control.rewrite, control.rewriting = self.rewriter.function, self.rewriter.state
        step.begin(tokens)
        compiled = cache.compiled_request(len(tokens) * top_k)
        # weights of experts for values come later
        at_once = step.override is None and not control.values and len(tokens) <= TOKENS
        if step.recorder is not None and at_once:
            self._log = self._log or RoutingLog(len(self._model.catalog.layers), top_k)
            control.log = self._log.address
        turn, observed = step.compiled, step.observed and not control.log
        if compiled and not control.inspect and not observed and (turn or not step.predicts):
            if turn:
                control.turn, control.guesses = turn.function, turn.state
            control.pool, control.arrays, control.request = compiled.pool, compiled.arrays, compiled.function
            if cache.phase == "decode":
                control.recent = cache.recent.ids.ctypes.data
                if step.prefetcher is None and not control.log and not cache.policy.needs_ranking:
                    most = min(self._served.parallel, cache.served_together(top_k), MOST_QUIET)
                    control.quiet = sum(1 << n for n in range(1, most + 1) if self._inspection.knows(n))
                    if step.observed:  # since then, by another thread
                        control.quiet = 0

    def _use_what_is_known(self) -> None:
        """Use what the graphs that were inspected have shown: routers, the input of every layer's last product, and
        which layers multiply in a way that can be done apart."""
        if forms := self._inspection.take_forms():
            self._overlap.learn(forms)
        prefetcher = self._step.prefetcher
        if prefetcher is not None and (routers := self._routers.take()):
            self._step.ask(lambda: prefetcher.use_routers(routers))
        late = b"\0".join(self._inspection.take_late_inputs())
        if late and len(late) + 2 <= len(self._late):
            self._late.raw = late.ljust(len(self._late), b"\0")
            self._control.late_length = len(late)

    def ready(self) -> None:
        """An evaluation may begin: what `interrupt` asked for concerned an earlier one."""
        self._control.stop = 0

    def interrupt(self) -> None:
        """Let the evaluation under way end soon; from any thread."""
        self._control.stop = 1

    def evaluate(self, evaluation: Callable[[], int]) -> int:
        """Returns what it does; afterwards `error` has what went wrong inside."""
        self.error, self._control.outcome = None, RETURNED
        status = evaluation()
        # ctypes swallows what is raised before the callback's first line; the library takes such an end for a success
        if (self._control.stop or self._control.outcome == NOT_RETURNED) and not self.error:
            self.error = FlashMoEError("the evaluation was interrupted")
        self._control.thread = self._control.begun = 0
        self._settle()
        if not self.error:
            self._inspection.end()
        return status

    def _settle(self) -> None:
        """An evaluation has ended. No read may be under way then; only one that failed leaves any."""
        if self._control.diverted:
            self._overlap.restore()
        self._control.pending = self._control.chosen = self._control.diverted = 0
        self._inspection.restore()
        if not self._step.cache:
            return
        self._counts.add_hits(self._step.cache)
        if self._log is not None:
            for layer, ids, weights in self._log.take():
                self._step.record(layer, ids, lambda weights=weights: weights)  # type: ignore[misc]
        if self._control.done > 0:  # misses of a compiled request that were never read
            self._step.cache.withdraw(self._layer_at[self._control.block], self._control.done)
            self._control.done = -1
        if self._step.cache.pending:
            self.error = self.error or ModelError(
                "an expert product ran before its reads had ended; please report it"
            )
            with suppress(FlashMoEError):
                self._step.cache.finish()
        self._step.end()

    def collect(self) -> None:
        """Count the graphs of the server's that needed no Python. From any thread."""
        if self._step.cache is not None:
            self._counts.collect(self._step.cache, self._served.on_graph)

    def _on_python(self, address: int, why: int) -> int:
        """Goes on if it ends with outcome RETURNED; else the evaluation ends and `error` says why."""
        control = self._control
        try:
            if why == END:
                if not self._end_graph(failed=bool(address)):
                    return 0
            elif self.error is None:
                if why == BEGIN:
                    self._begin_graph(control, address)
                elif why == LOOK:
                    self._inspection.look(address)
                elif why == GATHER:
                    self._gather(Tensor.from_address(address))
                elif why == REFUSED:
                    raise self._inspection.not_rewritten(address)
                elif why == RANKED:
                    assert self.rewriter is not None
                    self.rewriter.tell_ranking(address)
                elif why == SERVED:
                    self._step.read_ahead(self._layer_at[control.block])
                elif why == APART:
                    self._multiply_apart(control)
                elif control.block >= 0:
                    self._rename(control, address)
                else:
                    self._finish(control)
            if self.error is None:
                # last: what a signal's handler raises before this ends the evaluation
                control.outcome = RETURNED
        except BaseException as error:  # nothing may leave a C callback
            self.error = self.error or error
            if why == END:  # no caller is left to raise it
                self._served.on_error(error)
                self.error = None
        return int(self.error is None)

    def _begin_graph(self, control: Control, node: int) -> None:
        """The library's server evaluates: the first node of its graph is ready to be computed."""
        self._announce(self._served.token_ids(control))
        if control.inspect:
            self._inspection.look(node)

    def _gather(self, node: Any) -> None:
        """Rows of a table are about to be gathered: have them in memory."""
        rows = Tensor.from_address(node.src[1])
        self._model.tables[node.src[0]].fetch(
            np.frombuffer(C.string_at(rows.data, 4 * rows.ne[0]), np.int32).tolist()
        )

    def _announce(self, tokens: list[int]) -> None:
        assert self._step.cache is not None
        self.collect()
        self._step.cache.phase = self._served.phase(len(tokens))
        self._served.begin(tokens)
        self._counts.faults = major_faults()
        self.begin(tokens)

    def _end_graph(self, failed: bool) -> bool:
        """Whether it has been evaluated to its end."""
        self._settle()
        error, self.error = self.error, None
        if failed or error or self._control.ignore:
            self._served.on_error(error or FlashMoEError("the evaluation was interrupted"))
            return False
        self._inspection.end()
        if self._control.begun:
            self._served.end(major_faults() - self._counts.faults)
        return True

    def _rename(self, control: Control, node: int) -> None:
        if not control.begun:
            self._announce([-1] * control.tokens)
            control.log = 0  # this layer is not in it
        step, cache = self._step, self._step.cache
        assert cache is not None
        tokens, top_k = control.tokens, control.top_k
        layer = self._layer_at[control.block]
        # then weights come later, and nothing before the product
        values = self._model.catalog.layers[layer].values
        if control.inspect:
            self._inspection.rename(control.ids, layer)
        if control.done < 0:  # no compiled request: `ensure` does what is wanted
            control.look_in = 0
        ids = self._ids[: tokens * top_k]
        picked = ids.reshape(tokens, top_k)
        if self._blank:
            self._routers.meet(layer, node, control.logits, control.ids)
            picked[:] = range(top_k)
            return
        if step.override is not None:
            step.override(layer, picked)
        if not control.log:
            weights = partial(floats, control.weights, tokens, top_k)
            step.record(layer, picked, (lambda: np.zeros(picked.shape, np.float32)) if values else weights)
        if cache.pending:
            raise ModelError(
                f"the last product of layer {layer - 1} did not wait for its reads; please report it"
            )
        if step.predicts and control.inspect and tokens == 1 and control.logits:
            self._routers.meet(layer, node, control.logits, control.ids)
        leave_last = control.late_length > 0 and not values
        apart = tokens == 1 and not control.inspect and layer in self._overlap.layers
        wanted = ids.tolist() if apart else []
        ensure = partial(
            cache.ensure,
            layer,
            ids if tokens == 1 else picked,
            leave_last=leave_last,
            leave_all=apart,
            requested=control.done,
        )
        ids[:] = step.serve(
            layer,
            picked,
            lambda meanwhile: ensure(meanwhile=meanwhile),
            lambda: self._routers.input(control.hidden, tokens),
        )
        control.done = -1
        late = cache.late
        if 0 < len(late) < top_k:
            control.diverted = self._overlap.divert(control.ids, [expert in late for expert in wanted])
        elif apart:
            cache.finish(leave_last=leave_last)
        control.pending = cache.pending

    def _multiply_apart(self, control: Control) -> None:
        assert self._step.cache is not None
        self._overlap.compute(self._step.cache.finish)
        control.pending = control.diverted = 0

    def close(self) -> None:
        """Free what products apart take; no graph is evaluated any more."""
        self._overlap.close()

    def _finish(self, control: Control) -> None:
        assert self._step.cache is not None
        control.pending = False
        self._step.cache.finish()
