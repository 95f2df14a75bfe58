"""The eval callback: the router has spoken, the experts are made resident, their ids become slot numbers.

llama.cpp asks for every node of a graph whether its data is wanted. One node per layer is: `ffn_moe_weights-<block>`,
the gathering of the router's weights by the true ids. It runs before any expert product, and nothing reads true ids
after it, so its second source is where ids are renamed. The asking, about a thousand times per token, is compiled
(numba); Python runs once per layer.
"""

from __future__ import annotations

import ctypes as C
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.engines.llamacpp.abi import Tensor
from flashmoe.engines.llamacpp.interrupts import hold_interrupts
from flashmoe.engines.llamacpp.loader import LoadedModel
from flashmoe.errors import FlashMoEError, ModelError
from flashmoe.routing.recorder import Recorder

_PREFIX = b"ffn_moe_weights-"
_IDS_PREFIX = b"ffn_moe_topk-"
_NAME = np.frombuffer(_PREFIX, np.uint8)
_NAME_OFFSET = Tensor.name.offset
_NAME_END = _NAME_OFFSET + Tensor.name.size
_RETURNED, _NOT_RETURNED = 0, 1
_PYTHON_CALLBACK = C.CFUNCTYPE(C.c_uint8, C.c_void_p, C.c_uint8)
_bytes_pointer = types.CPointer(types.uint8)


@intrinsic
def _call(_typing: Any, _function: Any, _node: Any, _ask: Any) -> Any:
    """_call(function, node, ask): call the C function at an address; numba has no other way to call an address."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        byte = ir.IntType(8)
        kind = ir.FunctionType(byte, [byte.as_pointer(), byte])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], args[2]])

    return types.uint8(types.intp, _bytes_pointer, types.uint8), generate


@cfunc(types.uint8(_bytes_pointer, types.uint8, types.CPointer(types.intp)), cache=True)
def _on_node(node: Any, ask: Any, control: Any) -> Any:  # pragma: no cover - compiled
    """control[0]: address of the Python callback; [1]: whether it wants to see every node; [2]: its last outcome."""
    settings = carray(control, 3)
    if settings[2] == _NOT_RETURNED:
        return ask  # it has failed: want this node, and end the evaluation at it
    if ask == 0 or settings[1] != 0:
        settings[2] = _NOT_RETURNED
        answer: Any = _call(settings[0], node, ask)  # type: ignore[call-arg]
        return ask if settings[2] == _NOT_RETURNED else answer
    name = carray(node, _NAME_END)
    for i in range(len(_NAME)):
        if name[_NAME_OFFSET + i] != _NAME[i]:
            return 0
    for i in range(_NAME_OFFSET + len(_NAME), _NAME_END):  # digits to the end: not its reshaped view
        if name[i] == 0:
            return 1
        if name[i] < 48 or name[i] > 57:
            return 0
    return 0


def _is_numbered(name: bytes, prefix: bytes) -> bool:
    """Whether `name` is the prefix and a block number, not a view of such a node ("... (reshaped)")."""
    return name.startswith(prefix) and name[len(prefix) :].isdigit()


class RouterHook:
    """Connects a graph under evaluation with an ExpertCache.

    An exception inside (a failed read, Ctrl-C) ends the evaluation; it is kept in `error` for the caller to raise.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._layer_of_block = {layer.block: i for i, layer in enumerate(model.catalog.layers)}
        self._model = model
        self._experts: dict[int, int] = {}
        self._renamed: dict[int, int] = {}
        self._python = _PYTHON_CALLBACK(self._on_python)
        self._control = (C.c_ssize_t * 3)(C.cast(self._python, C.c_void_p).value or 0, 0, _RETURNED)
        self.cache: ExpertCache | None = None
        self.recorder: Recorder | None = None
        #: Called with (layer, ids [tokens, top_k]) to put other experts in place of the router's.
        self.override: Callable[[int, NDArray[np.int32]], None] | None = None
        self.error: BaseException | None = None

    @property
    def function(self) -> int:
        """Address for llama_context_params.cb_eval."""
        return _on_node.address or 0

    @property
    def data(self) -> int:
        """Address for llama_context_params.cb_eval_user_data."""
        return C.addressof(self._control)

    def inspect(self, enable: bool) -> None:
        """Check, node by node, that the next graph uses expert tensors only with ids that were renamed."""
        if enable:
            self._experts = self._model.layer_of_tensor()
            self._renamed = {}
        self._control[1] = int(enable)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around an evaluation: afterwards `error` has whatever went wrong inside."""
        self.error, self._control[2] = None, _RETURNED
        with hold_interrupts(self):
            yield
        if self._control[2] == _NOT_RETURNED and not self.error:
            # a signal handler has raised before the callback's first line: ctypes swallows that
            self.error = FlashMoEError("the evaluation was interrupted")

    def _on_python(self, address: int, ask: int) -> int:
        try:
            self._control[2] = _RETURNED
            if self.error:
                return ask
            node = Tensor.from_address(address)
            wanted = _is_numbered(node.name, _PREFIX)
            if ask:
                self._inspect(node)
                return int(wanted)
            if wanted:
                self._timed_rename(node)
            return int(self.error is None)
        except BaseException as error:  # nothing may leave a C callback
            self.error = self.error or error
            return ask  # asked: want this node, so that the evaluation can be ended when its data is ready

    def _timed_rename(self, node: Tensor) -> None:
        assert self.cache is not None
        stats = self.cache.stats[self.cache.phase]
        began, stalled = time.perf_counter(), stats.stall_seconds
        self._rename(node, self.cache)
        stats.overhead_seconds += time.perf_counter() - began - (stats.stall_seconds - stalled)

    def _rename(self, node: Tensor, cache: ExpertCache) -> None:
        tensor = Tensor.from_address(node.src[1])
        top_k, tokens, row = tensor.ne[0], tensor.ne[1], tensor.nb[1] // 4
        # no token left: the last layer of a micro-batch without outputs; another name: a second, dense set of experts
        if tokens == 0 or not _is_numbered(tensor.name, _IDS_PREFIX):
            return
        layer = self._layer_of_block[int(node.name[len(_PREFIX) :])]
        # [tokens, top_k] inside rows of all experts' ids, sorted by the router: the tensor is a view
        memory = np.frombuffer((C.c_int32 * (row * (tokens - 1) + top_k)).from_address(tensor.data), np.int32)
        ids = np.lib.stride_tricks.as_strided(memory, (tokens, top_k), (4 * row, 4), writeable=True)
        if self.override is not None:
            self.override(layer, ids)
        if self.recorder is not None:
            weights = np.frombuffer((C.c_float * (top_k * tokens)).from_address(node.data), np.float32)
            self.recorder.add(layer, ids, weights.reshape(tokens, top_k))
        flat = ids.reshape(-1) if tokens > 1 else ids[0]
        ids[...] = cache.ensure(layer, flat).reshape(tokens, top_k)
        if self._control[1]:
            self._renamed[node.src[1]] = layer

    def _inspect(self, node: Tensor) -> None:
        """Raise ModelError where a node uses expert tensors in a way that renaming does not cover."""
        for source in (node.src[0], node.src[1]):
            layer = self._experts.get(source) if source else None
            if layer is None or node.view_src == source:  # a reshaped table keeps its slots
                continue
            if self._renamed.get(node.src[2] or 0) != layer:
                raise ModelError(
                    f"the architecture {self._model.catalog.gguf.architecture!r} routes its experts in a way that "
                    f"FlashMoE does not know (node {node.name.decode()!r}); please report it"
                )
