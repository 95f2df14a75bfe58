"""Approximate routing in llama.cpp's graph (see routing.rewrite): the compiled function that the eval callback calls.

It is called twice for each layer. At `ffn_moe_topk` ids are exchanged, before anything is gathered by them: so a
substitute comes with its own true weight, and is normalised as the model normalises. At `ffn_moe_weights` experts are
left out: what was gathered for them becomes 0, or -inf where it is a logit and the softmax comes afterwards.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numba import carray, types
from numpy.typing import NDArray

from flashmoe.common.compiled import (
    Pinned,
    address_of,
    float32_at,
    int32_at,
    layout,
    pinned,
)
from flashmoe.common.kept import kept
from flashmoe.engines.llamacpp.abi import CONSTANTS, Tensor
from flashmoe.engines.llamacpp.callback import block_of
from flashmoe.engines.llamacpp.control import CHOSEN, TO_RANK
from flashmoe.engines.llamacpp.overlap import read
from flashmoe.routing.approximation import Approximation
from flashmoe.routing.rewrite import LEAST, Rewriter, leave_out, substitute

_REFUSED = -1

_PINNED = "RewriteState"
Ranked = Callable[[int, NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]], None]
_SIGNATURE = types.int64(types.int64, types.int64, types.int64, types.int64)
_F32, _I32 = CONSTANTS["GGML_TYPE_F32"], CONSTANTS["GGML_TYPE_I32"]
_PROBABILITIES = np.frombuffer(b"ffn_moe_probs-", np.uint8)
_STEPS = 12  # at most, from the scores back to the probabilities: bias, groups
_DATA, _NE0, _NE1, _NB1, _TYPE, _VIEW = (
    Tensor.data.offset, Tensor.ne.offset, Tensor.ne.offset + 8, Tensor.nb.offset + 8, Tensor.type.offset,
    Tensor.view_src.offset,
)  # fmt: skip
_SOURCE0, _SOURCE1 = Tensor.src.offset, Tensor.src.offset + 8


class GraphRewriter:
    """A Rewriter for compiled code: call `function` with (state, layer, node, CHOSEN or GATHERED), all int64.

    It returns how many experts it has replaced or left out, or -1 for a form of routing that is not known.
    """

    def __init__(self, rewriter: Rewriter, slot_of: NDArray[np.int32]) -> None:
        """slot_of: [L, E] of the pool's residency, which does not move."""
        #: Calls so far, of either kind: each choice is gathered by once.
        self._calls = np.zeros(3, np.int64)  # and whether rankings are recorded
        self._pinned = Pinned(_PINNED, (rewriter.state, slot_of, self._calls))
        self.state = self._pinned.address
        self._told: list[Ranked] = []
        self._layer_of: Mapping[int, int] = {}
        self._n = 0
        self.function = address_of(_rewrite, _SIGNATURE)

    def begin(self) -> None:
        """A graph begins; the last one may have failed in the middle."""
        self._calls[:2] = 0

    def record_rankings(self, told: Ranked, layer_of: Mapping[int, int], n: int) -> None:
        """Let `told` be called for every choice, with the layer and what `ranking` gives. layer_of: of every block."""
        self._told.append(told)
        self._layer_of, self._n = layer_of, n
        self._calls[2] = 1

    def tell_ranking(self, node: int) -> None:
        """Experts of a layer are about to be chosen, and what the router says of them is to be told."""
        block = int(Tensor.from_address(node).name.rpartition(b"-")[2])
        found = ranking(node, self._n)
        for told in self._told:
            told(self._layer_of[block], *found)


def ranking(node: int, n: int) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """The `n` best experts of each token at a node `ffn_moe_topk`, [tokens, n], their scores' logarithms less the best
    one's, and the range of all of them, [tokens]."""
    ids = Tensor.from_address(node)
    scores = Tensor.from_address(Tensor.from_address(ids.view_src or node).src[0])
    tokens, experts = scores.ne[1], scores.ne[0]
    table = np.stack(
        [
            np.ctypeslib.as_array((C.c_float * experts).from_address(scores.data + t * scores.nb[1]))
            for t in range(tokens)
        ]
    )
    if not _is_plain(scores):  # what may not be chosen has -inf
        table = np.where(table > -np.inf, np.log(np.maximum(table, np.float32(LEAST))), -np.inf)
    best = np.argsort(-table, axis=1, kind="stable")[:, :n]
    ranked = np.take_along_axis(table, best, axis=1)
    lowest = np.where(np.isfinite(table), table, np.inf).min(axis=1)
    return best.astype(np.int32), ranked - ranked[:, :1], ranked[:, 0] - lowest


def _is_plain(scores: Any) -> bool:
    """Whether scores are logits: a product, or a sum with the router's bias."""
    while scores.src[0] and not scores.name.startswith(b"ffn_moe_probs-"):
        scores = Tensor.from_address(scores.src[0])
    return bool(scores.src[1])


@kept()
def _type(tensor: Any) -> Any:
    return carray(int32_at(tensor + _TYPE), 1)[0]


@kept()
def _are_logits(tensor: Any) -> Any:
    """Whether the probabilities are none yet, but a product or a sum: their softmax comes after the gathering."""
    return read(tensor + _SOURCE1) != 0


@kept()
def _probabilities(node: Any, experts: Any, tokens: Any) -> Any:
    """What the experts' weights are gathered from, float32 [tokens, experts], going back from a node; 0 if unknown."""
    for _ in range(_STEPS):
        if node == 0 or block_of(node, _PROBABILITIES) >= 0:
            break
        node = read(node + _SOURCE0)
    if node == 0 or block_of(node, _PROBABILITIES) < 0:
        return 0
    fits = read(node + _NE0) == experts and read(node + _NE1) == tokens
    return node if fits and _type(node) == _F32 else 0


def _kept_with() -> Any:
    return (layout(_PINNED),)


@kept(also=_kept_with)
def _rewrite(state: Any, layer: Any, node: Any, stop: Any) -> Any:
    st, slot_of, calls = pinned(state, _PINNED)
    ids = node if stop == CHOSEN else read(node + _SOURCE1)
    tokens, k, stride = read(ids + _NE1), read(ids + _NE0), read(ids + _NB1)
    if tokens == 0:
        return 0
    if calls[0] != calls[1] + stop:
        return _REFUSED
    calls[stop] += 1
    order = read(ids + _VIEW)  # mostly ids are the first columns of all experts' order
    scores = read((order if order != 0 else ids) + _SOURCE0)
    if scores == 0 or _type(ids) != _I32:
        return _REFUSED
    experts = read(scores + _NE0)
    weights = _probabilities(scores if stop == CHOSEN else read(node + _SOURCE0), experts, tokens)
    if weights == 0 or _type(scores) != _F32 or experts > slot_of.shape[1]:
        return _REFUSED
    logits = _are_logits(weights)
    done = 0
    for token in range(tokens):
        its = carray(int32_at(read(ids + _DATA) + token * stride), k)
        row = carray(float32_at(read(weights + _DATA) + token * read(weights + _NB1)), experts)
        if stop == CHOSEN:
            score = carray(float32_at(read(scores + _DATA) + token * read(scores + _NB1)), experts)
            done += substitute(st, slot_of, layer, score, logits and scores == weights, row, logits, its)
        else:
            gathered = carray(float32_at(read(node + _DATA) + 4 * k * token), k)
            done += leave_out(st, slot_of, layer, row, logits, its, gathered)
    return done | TO_RANK if stop == CHOSEN and calls[2] != 0 else done


def compile_kernels() -> None:
    """Let numba compile what an approximation needs, before memory is counted."""
    GraphRewriter(Rewriter(Approximation(""), 1, 1, 1), np.zeros((1, 1), np.int32))
