"""The compiled half of the eval callback (numba): what runs for every node of every graph.

It answers "do you want this node?" by comparing a name. When a router's choice is ready it copies the ids out of the
engine's tensors, has them made resident, and copies the slots back. While every expert is resident that is compiled
too (`_hit`); else it calls Python. Where reads for a layer's last product (down) were left under way, it calls Python
once more when that product's input is ready. Python touches no struct: after a layer's products the processor's caches
hold weights, and every line of Python costs several times more than in a loop.

Where the library's own server evaluates (serving/), graphs are not announced: the gathering of the tokens' embeddings,
the first thing in it, does.
"""

from __future__ import annotations

import ctypes as C
from typing import Any

import numpy as np
from numba import carray, types

from flashmoe.common.compiled import bytes_at, call4, call5, function_at, int16_at, int32_at, int64_at
from flashmoe.common.kept import kept, kept_callback
from flashmoe.engines.llamacpp.abi import Tensor
from flashmoe.engines.llamacpp.control import (
    APART,
    BEGIN,
    CHOSEN,
    END,
    GATHER,
    GATHERED,
    LOOK,
    MOST_QUIET,
    NOT_RETURNED,
    RANKED,
    READY,
    REFUSED,
    RETURNED,
    SERVED,
    TO_RANK,
    Control,
)
from flashmoe.engines.llamacpp.overlap import is_last, read, take
from flashmoe.engines.llamacpp.routing_log import note
from flashmoe.engines.llamacpp.spans import show

ROUTER_WEIGHTS = (
    b"ffn_moe_weights-"  # gathers the router's weights by the true ids, before any expert product
)
ROUTER_IDS = b"ffn_moe_topk-"
VALUE_IDS = (
    b"v_moe_topk-"  # the choice of experts for values: a product, and only then weights by the true ids
)
ROUTER_LOGITS = b"ffn_moe_logits-"  # the router's product with the layer's hidden state
INPUT_TOKENS = b"inp_tokens"  # the token ids that a graph gathers embeddings by

_FIELDS = C.sizeof(Control) // 8
(
    _PYTHON, _INSPECT, _OUTCOME, _BUFFER, _CAPACITY, _BLOCK, _TOKENS, _TOP_K, _IDS, _WEIGHTS, _PENDING,
    _LATE, _LATE_LENGTH, _LOGITS, _HIDDEN, _BEGUN, _THREAD, _IGNORE, _INPUTS, _REQUEST, _POOL, _ARRAYS,
    _SLOTS, _LAYERS, _FIRST_SLOTS, _DONE, _HITS, _RECENT, _RECENT_AT, _RECENT_SIZE, _QUIET, _IS_QUIET,
    _GRAPHS, _GRAPH_TOKENS, _NANOSECONDS, _BEGAN, _ENDED, _STOP, _SPANS, _WHOLE, _VALUES, _CHOSEN,
    _TRUE_IDS, _TURN, _GUESSES, _HELD, _AHEAD, _LOG, _TABLES, _LOOK_IN, _REWRITE, _REWRITING, _DIVERTED,
) = (getattr(Control, name).offset // 8 for name, *_ in Control._fields_)  # fmt: skip
_WEIGHTS_NAME, _IDS_NAME = np.frombuffer(ROUTER_WEIGHTS, np.uint8), np.frombuffer(ROUTER_IDS, np.uint8)
_LOGITS_NAME, _TOKENS_NAME = np.frombuffer(ROUTER_LOGITS, np.uint8), np.frombuffer(INPUT_TOKENS, np.uint8)
_VALUES_NAME = np.frombuffer(VALUE_IDS, np.uint8)
_STEPS_TO_LOGITS = 12  # at most, from the gathered weights back: reshape, softmax, bias, groups
_NAME, _NAME_END = Tensor.name.offset, Tensor.name.offset + Tensor.name.size
_DATA, _NE0, _NE1, _NB1 = (
    Tensor.data.offset,
    Tensor.ne.offset,
    Tensor.ne.offset + 8,
    Tensor.nb.offset + 8,
)
_SOURCE0, _SOURCE1, _SOURCE2 = (Tensor.src.offset + 8 * i for i in range(3))


_pthread_self = types.ExternalFunction("pthread_self", types.int64())
_clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_MONOTONIC = 1  # CLOCK_MONOTONIC


_call = function_at(types.uint8, types.int64, types.uint8)  # a callback of Python's: (node, why)


@kept()
def block_of(tensor: Any, prefix: Any) -> Any:
    """The number that follows `prefix` in a tensor's name, -1 for any other name ("... (reshaped)" among them)."""
    name = carray(bytes_at(tensor), _NAME_END)
    for i in range(len(prefix)):
        if name[_NAME + i] != prefix[i]:
            return -1
    block = 0
    for i in range(_NAME + len(prefix), _NAME_END):
        if name[i] == 0:
            return block if i > _NAME + len(prefix) else -1
        if name[i] < 48 or name[i] > 57:
            return -1
        block = 10 * block + name[i] - 48
    return -1


@kept()
def _copy_ids(ids: Any, buffer: Any, back: Any) -> Any:
    """Copy the ids between their tensor, whose rows lie apart (it is a view), and the buffer."""
    top_k, tokens, stride = read(ids + _NE0), read(ids + _NE1), read(ids + _NB1)
    packed = carray(int32_at(buffer), tokens * top_k)
    for token in range(tokens):
        row = carray(int32_at(read(ids + _DATA) + token * stride), top_k)
        for i in range(top_k):
            if back:
                row[i] = packed[token * top_k + i]
            else:
                packed[token * top_k + i] = row[i]


@kept()
def ask_python(control: Any, node: Any, why: Any) -> Any:
    """Call Python's half; whether it has succeeded."""
    control[_OUTCOME] = NOT_RETURNED
    _call(control[_PYTHON], node, why)
    return control[_OUTCOME] == RETURNED


@kept_callback(types.int32(types.int64, types.int64))
def end_graph(address: Any, thread: Any) -> Any:
    """A thread has evaluated a graph: 0 where it is not this Control's, 1 where it succeeded, -1 where it failed."""
    control = carray(int64_at(address), _FIELDS)
    if control[_THREAD] != thread:
        return 0
    failed = control[_OUTCOME] == NOT_RETURNED
    if control[_IS_QUIET] != 0:
        tokens, control[_IS_QUIET] = control[_IS_QUIET], 0
        if not failed and control[_PENDING] == 0 and control[_DONE] <= 0 and control[_IGNORE] == 0:
            _clock_gettime(_MONOTONIC, address + 8 * _ENDED)
            seconds = control[_ENDED] - control[_BEGAN]
            control[_NANOSECONDS] += 1000000000 * seconds + control[_ENDED + 1] - control[_BEGAN + 1]
            control[_GRAPH_TOKENS] += tokens
            control[_GRAPHS] += 1
            control[_BEGUN] = control[_THREAD] = 0
            return 1
    succeeded = ask_python(control, types.int64(failed), END)
    control[_BEGUN], control[_OUTCOME] = 0, RETURNED
    control[_THREAD] = 0  # last: Python is not needed any more
    return 1 if succeeded and not failed else -1


@kept()
def _gathers_tokens(node: Any) -> Any:
    """Whether a node gathers rows by the graph's token ids."""
    ids = read(node + _SOURCE1)
    if ids == 0:
        return False
    name = carray(bytes_at(ids), _NAME_END)
    for i in range(len(_TOKENS_NAME)):
        if name[_NAME + i] != _TOKENS_NAME[i]:
            return False
    return name[_NAME + len(_TOKENS_NAME)] == 0


@kept()
def _is_table(control: Any, tensor: Any) -> Any:
    """Whether a tensor's rows are read as they are gathered."""
    if tensor == 0 or control[_TABLES] == 0:
        return False
    at = control[_TABLES]
    while read(at) != 0:
        if read(at) == tensor:
            return True
        at += 8
    return False


@kept()
def _begin(control: Any, address: Any, node: Any) -> Any:
    """The graph that begins gathers its tokens' embeddings at `node`: tell Python, unless it has nothing to say."""
    ids = read(node + _SOURCE1)
    control[_INPUTS], control[_TOKENS] = read(ids + _DATA), read(ids + _NE0)
    if control[_TOKENS] <= MOST_QUIET and (control[_QUIET] >> control[_TOKENS]) & 1 != 0:
        control[_BEGUN], control[_IS_QUIET] = 1, control[_TOKENS]
        _clock_gettime(_MONOTONIC, address + 8 * _BEGAN)
        return True
    return ask_python(control, node, BEGIN)


@kept()
def _hit(control: Any, n: Any) -> Any:
    """Have a layer's `n` ids in the buffer made resident without Python: whether they all are.

    Where some are not, slots have been found for them: Control.done has the request's answer, for Python to go on.
    """
    block = control[_BLOCK]
    layer = carray(int64_at(control[_LAYERS]), block + 1)[block]
    done: Any = call4(control[_REQUEST], control[_POOL], control[_ARRAYS], layer, n)
    control[_DONE] = done
    if done & 0xFFFFFFFF != 0:  # misses, or -1
        return False
    control[_HITS] += done >> 32
    control[_DONE] = -1
    buffer, slots = carray(int32_at(control[_BUFFER]), n), carray(int32_at(control[_SLOTS]), n)
    if control[_RECENT] != 0:
        size = control[_RECENT_SIZE]
        places = carray(int64_at(control[_RECENT_AT]), layer + 1)
        at = places[layer] if places[layer] + n <= size else 0
        recent = carray(int16_at(control[_RECENT] + 2 * size * layer), size)
        for i in range(n):
            recent[at + i] = buffer[i]
        places[layer] = at + n
    control[_AHEAD] = 0
    if control[_TURN] != 0:
        ids, hidden = control[_BUFFER], control[_HIDDEN]
        worth: Any = call5(control[_TURN], control[_GUESSES], layer, ids, n, hidden)
        held = carray(int64_at(control[_HELD]), layer + 2)
        control[_AHEAD] = worth > 0 or held[layer] + held[layer + 1] > 0
    first = carray(int64_at(control[_FIRST_SLOTS]), block + 1)[block]
    for i in range(n):
        buffer[i] = slots[i] - first
    return True


@kept()
def _place(control: Any, block: Any, ids: Any, n: Any) -> Any:
    """Let a block's tensors show what the slots in the buffer are of, and write these in the place of its ids."""
    if control[_SPANS] != 0:  # stock's experts stay where they are, whatever is routed to them
        show(control[_SPANS], block, control[_BUFFER], n, control[_WHOLE] != 0)
    _copy_ids(ids, control[_BUFFER], True)


@kept()
def _is_late(control: Any, node: Any) -> Any:
    """Whether a node is the input of the last product of a layer whose reads are still under way."""
    if control[_PENDING] == 0 or control[_LATE_LENGTH] == 0:
        return False
    prefixes = carray(bytes_at(control[_LATE]), control[_LATE_LENGTH] + 1)
    first = 0
    for i in range(len(prefixes)):
        if prefixes[i] == 0:
            if block_of(node, prefixes[first:i]) >= 0:
                return True
            first = i + 1
    return False


@kept()
def _find_logits(control: Any, node: Any) -> Any:
    """From the gathered weights back to the router's product and its input."""
    for _ in range(_STEPS_TO_LOGITS):
        node = read(node + _SOURCE0)
        if node == 0:
            return
        if block_of(node, _LOGITS_NAME) >= 0:
            if read(node + _SOURCE1) != 0:
                control[_LOGITS], control[_HIDDEN] = node, read(read(node + _SOURCE1) + _DATA)
            return


@kept()
def _rewrite(control: Any, node: Any, block: Any, where: Any) -> Any:
    """Let the routes of a block be rewritten; whether the evaluation goes on."""
    layer = carray(int64_at(control[_LAYERS]), block + 1)[block]
    done: Any = call4(control[_REWRITE], control[_REWRITING], layer, node, where)
    if done < 0:
        return ask_python(control, node, REFUSED)
    return done < TO_RANK or ask_python(control, node, RANKED)


@kept_callback(types.uint8(types.int64, types.uint8, types.int64))
def on_node(node: Any, ask: Any, address: Any) -> Any:
    """ggml_backend_sched_eval_callback; its user data is the address of a Control."""
    control = carray(int64_at(address), _FIELDS)
    if control[_IGNORE] != 0 or control[_STOP] != 0 or control[_OUTCOME] == NOT_RETURNED:
        return ask  # it has failed, or is not to be: want this node, and end the evaluation at it
    block, values = block_of(node, _WEIGHTS_NAME), False
    if block < 0 and control[_VALUES] != 0:
        block = block_of(node, _VALUES_NAME)
        if block >= 0:
            block, values = block + control[_VALUES], True
    used = control[_CHOSEN] != 0 and read(node + _SOURCE2) == control[_CHOSEN]
    approximate = control[_REWRITE] != 0 and control[_BEGUN] != 0
    routed = block_of(node, _IDS_NAME) if approximate and block < 0 else -1
    if ask != 0:
        if control[_THREAD] == 0:
            control[_THREAD] = _pthread_self()
        if control[_BEGUN] == 0 and _gathers_tokens(node) and not _begin(control, address, node):
            return 1
        if control[_INSPECT] != 0 and not ask_python(control, node, LOOK):
            return 1
        if _is_table(control, read(node + _SOURCE0)) and not ask_python(control, node, GATHER):
            return 1
        if control[_DIVERTED] != 0 and block < 0:
            return take(control[_DIVERTED], node)
        return block >= 0 or used or routed >= 0 or _is_late(control, node)
    if control[_DIVERTED] != 0 and block < 0:
        return is_last(control[_DIVERTED], node) and ask_python(control, node, APART)
    if routed >= 0:
        return _rewrite(control, node, routed, CHOSEN)
    if used:
        _copy_ids(control[_CHOSEN], control[_TRUE_IDS], True)
        control[_CHOSEN] = 0
        return 1
    control[_BLOCK] = -1
    ids = node if values else read(node + _SOURCE1) if block >= 0 else 0
    if block >= 0:
        control[_BLOCK], control[_IDS], control[_WEIGHTS] = block, ids, read(node + _DATA)
        control[_TOKENS], control[_TOP_K] = read(ids + _NE1), read(ids + _NE0)
        # no token left: the last layer of a micro-batch without outputs; another name: a second, dense set of experts
        if control[_TOKENS] == 0 or (not values and block_of(ids, _IDS_NAME) < 0):
            return 1
        n = control[_TOKENS] * control[_TOP_K]
        if n > control[_CAPACITY]:
            return 0
        if approximate and not _rewrite(control, node, block, GATHERED):
            return 0
        _copy_ids(ids, control[_BUFFER], False)
        if values:
            _copy_ids(ids, control[_TRUE_IDS], False)
            control[_CHOSEN] = ids
        control[_DONE] = -1
        if control[_LOG] != 0 and control[_BEGUN] != 0:
            layer = carray(int64_at(control[_LAYERS]), block + 1)[block]
            tokens, top_k = control[_TOKENS], control[_TOP_K]
            note(control[_LOG], layer, control[_BUFFER], control[_WEIGHTS], tokens, top_k)
        control[_LOGITS] = control[_HIDDEN] = 0
        if not values and (control[_TURN] != 0 or control[_REQUEST] == 0):
            _find_logits(control, node)
        compiled = control[_REQUEST] != 0 and control[_BEGUN] != 0 and control[_LOOK_IN] == 0
        if compiled and _hit(control, n):
            _place(control, block, ids, n)
            return control[_AHEAD] == 0 or ask_python(control, node, SERVED)
    if not ask_python(control, node, READY):
        return 0
    if block >= 0:
        _place(control, block, ids, control[_TOKENS] * control[_TOP_K])
    return 1
