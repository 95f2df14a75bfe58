"""The compiled functions behind the import slots: the server gets our model and context, and gives them back.

They are compiled because the server's constructor waits for its loading thread with Python's lock held: whatever that
thread calls must not be Python.

- llama_model_load_from_file and llama_init_from_model return what is offered, for as long as a server starts.
- llama_model_free and llama_free leave what is lent alone, and free everything else.
- llama_sampler_accept keeps end tokens from a grammar, which ends the process at one that it does not expect. A text
  that an answer goes on from may hold one, some templates write them, and the library feeds the grammar all of it.
  Where a grammar expects the end, the answer is over anyway.
- ggml_backend_sched_graph_compute_async evaluates; where the graph's hook has failed, so does the step. llama.cpp's
  scheduler itself reports success when a callback ends an evaluation, and a server would sample from what was never
  computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import carray, types
from numba.extending import intrinsic

from flashmoe.common.compiled import function_at, int64_at
from flashmoe.common.kept import kept_callback
from flashmoe.engines.llamacpp.abi import CONSTANTS
from flashmoe.engines.llamacpp.callback import end_graph
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.serving.imports import ImportSlot, import_slots
from flashmoe.errors import LibraryError

_GIVE_MODEL, _GIVE_CONTEXT = "llama_model_load_from_file", "llama_init_from_model"
_FREE_MODEL, _FREE_CONTEXT = "llama_model_free", "llama_free"
_COMPUTE, _ACCEPT = "ggml_backend_sched_graph_compute_async", "llama_sampler_accept"
_NAMES = {_GIVE_MODEL, _GIVE_CONTEXT, _FREE_MODEL, _FREE_CONTEXT, _COMPUTE, _ACCEPT}
_SAMPLER_NAME, _IS_END = "llama_sampler_name", "llama_vocab_is_eog"  # called, not replaced

_FAILED = CONSTANTS["GGML_STATUS_FAILED"]
_MOST = 32  # models lent at once, in one process
# What the compiled functions share: what is offered, the library's own functions, and by row what is lent
_OFFERED_MODEL, _OFFERED_CONTEXT, _OWN_FREE_MODEL, _OWN_FREE_CONTEXT, _OWN_COMPUTE = range(5)
_OWN_ACCEPT, _OWN_NAME, _OWN_IS_END, _END_GRAPH, _LENT = range(5, 10)
_ROW = 3  # model, context, the Control of its hook
_cells = np.zeros(_LENT + _ROW * _MOST, np.int64)
# by address: numba would keep what is compiled into this file's functions when only the other file has changed
_cells[_END_GRAPH] = end_graph.address or 0
_SYMBOL = "flashmoe_lent"
# by name, so that compiled code can be kept for other processes
binding.add_symbol(_SYMBOL, _cells.ctypes.data)
_GRAMMAR = int.from_bytes(b"grammar\0", "little")  # the name of the library's sampler, as eight bytes
_pthread_self = types.ExternalFunction("pthread_self", types.int64())


@intrinsic
def _lent(_typing: Any) -> Any:
    """The address of the cells."""

    def generate(_context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        number = ir.IntType(64)
        known = builder.module.globals.get(_SYMBOL)
        return builder.ptrtoint(known or ir.GlobalVariable(builder.module, number, _SYMBOL), number)

    return types.int64(), generate


_free = function_at(types.void, types.int64)
_status = function_at(types.int32, types.int64, types.int64)
_accept_at = function_at(types.void, types.int64, types.int32)  # llama_sampler_accept
_name_at = function_at(types.int64, types.int64)  # llama_sampler_name
_is_end_at = function_at(types.uint8, types.int64, types.int32)  # llama_vocab_is_eog


@kept_callback(types.int64())
def _give_model() -> Any:
    return carray(int64_at(_lent()), _LENT)[_OFFERED_MODEL]  # type: ignore[call-arg]


@kept_callback(types.int64())
def _give_context() -> Any:
    return carray(int64_at(_lent()), _LENT)[_OFFERED_CONTEXT]  # type: ignore[call-arg]


@kept_callback(types.void(types.int64))
def _free_model(model: Any) -> None:
    cells = carray(int64_at(_lent()), _LENT + _ROW * _MOST)  # type: ignore[call-arg]
    for i in range(_MOST):
        if cells[_LENT + _ROW * i] == model:
            return
    _free(cells[_OWN_FREE_MODEL], model)


@kept_callback(types.void(types.int64))
def _free_context(context: Any) -> None:
    cells = carray(int64_at(_lent()), _LENT + _ROW * _MOST)  # type: ignore[call-arg]
    for i in range(_MOST):
        if cells[_LENT + _ROW * i + 1] == context:
            return
    _free(cells[_OWN_FREE_CONTEXT], context)


@kept_callback(types.void(types.int64, types.int32))
def _accept(sampler: Any, token: Any) -> None:
    cells = carray(int64_at(_lent()), _LENT)  # type: ignore[call-arg]
    name: Any = _name_at(cells[_OWN_NAME], sampler)
    if carray(int64_at(name), 1)[0] == _GRAMMAR:
        # llama_sampler: interface, state; a grammar's begins with the vocabulary
        state = carray(int64_at(sampler), 2)[1]
        vocabulary = carray(int64_at(state), 1)[0]
        if _is_end_at(cells[_OWN_IS_END], vocabulary, token) & 1:
            return
    _accept_at(cells[_OWN_ACCEPT], sampler, token)


@kept_callback(types.int32(types.int64, types.int64))
def _compute(scheduler: Any, graph: Any) -> Any:
    cells = carray(int64_at(_lent()), _LENT + _ROW * _MOST)  # type: ignore[call-arg]
    status = _status(cells[_OWN_COMPUTE], scheduler, graph)
    thread = _pthread_self()
    for i in range(_MOST):
        control = cells[_LENT + _ROW * i + 2]
        if control != 0 and _status(cells[_END_GRAPH], control, thread) < 0:
            return _FAILED
    return status


class _Slots:
    """The import slots of the one library in this process whose server is used."""

    def __init__(self, lib: Library) -> None:
        self.path = lib.path
        self._slots = import_slots(lib.handle, _NAMES)
        self.lock = threading.Lock()
        _cells[_OWN_NAME], _cells[_OWN_IS_END] = lib.address(_SAMPLER_NAME), lib.address(_IS_END)
        for name, function, cell in (
            (_FREE_MODEL, _free_model, _OWN_FREE_MODEL),
            (_FREE_CONTEXT, _free_context, _OWN_FREE_CONTEXT),
            (_COMPUTE, _compute, _OWN_COMPUTE),
            (_ACCEPT, _accept, _OWN_ACCEPT),
        ):
            _cells[cell] = lib.address(name)
            self._slots[name].address = function.address or 0

    @contextmanager
    def offering(self, model: int, context: int) -> Iterator[None]:
        """What asks for a model and a context meanwhile gets these."""
        with self.lock:
            slots: list[tuple[ImportSlot, Any]] = [
                (self._slots[_GIVE_MODEL], _give_model),
                (self._slots[_GIVE_CONTEXT], _give_context),
            ]
            before = [slot.address for slot, _ in slots]
            _cells[_OFFERED_MODEL], _cells[_OFFERED_CONTEXT] = model, context
            for slot, function in slots:
                slot.address = function.address or 0
            try:
                yield
            finally:
                for (slot, _), address in zip(slots, before, strict=True):
                    slot.address = address


_slots: _Slots | None = None
_first = threading.Lock()


def lend(
    lib: Library, model: int, context: int, control: int, start: Callable[[], Any]
) -> tuple[Any, Callable[[], None]]:
    """Call `start`, which makes a server of the library's, that gets `model` and `context` and leaves them alive.

    control: see `RouterHook.serve`. Returns what `start` returned, and what to call when the server has gone.
    Raises LibraryError where the library cannot be made to borrow, and what `start` raises.
    """
    global _slots
    with _first:
        if _slots is None:
            _slots = _Slots(lib)
    if _slots.path != lib.path:
        raise LibraryError(f"{lib.path}: the server of another library is used already: {_slots.path}")
    rows = _cells[_LENT:].reshape(_MOST, _ROW)
    with _slots.lock:
        free = np.flatnonzero(rows[:, 0] == 0)
        if not len(free):
            raise LibraryError(f"{_MOST} models are being served already in this process")
        row = rows[free[0]]
        row[:] = model, context, control

    def give_back() -> None:
        row[:] = 0

    try:
        with _slots.offering(model, context):
            return start(), give_back
    except BaseException:
        give_back()
        raise
