"""The compiled part of the predictor `gate`: logits of those experts that matter, and what a logit has meant so far."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray
from numpy.typing import NDArray

from flashmoe.common.compiled import float32_at, int16_at, int32_at, layout, pinned, uint16_at
from flashmoe.common.halves import float32_of
from flashmoe.common.kept import kept

_FORGET = 0.99  # of what was learned of a layer, per token
_COOL = 0.97  # of how often an expert was picked
LATELY = 256  # tokens that a mean shift is of, about; those that count as none at the start:
DOUBT = 8
TRUST = 1.0  # what the fit that a layer begins with counts for
KIND = "GateCalls"
SEEN, ASKED, ABSENT, HIDDEN, TOP_K, HOT, FOLLOWED = range(7)  # GateCalls.number
TYPES = (np.float32, np.int16, np.uint16)  # of a router's matrix


class GateCalls(NamedTuple):
    """The arrays of `gate`'s kernels: L layers of E experts, a hidden state of n numbers."""

    fit: NDArray[np.float64]  # [L, 5] what a margin means, `learn`
    picked: NDArray[np.float32]  # [L, E] how often, `count`
    slot_of: NDArray[np.int32]  # [L, E] of the pool: -1 where absent
    experts: NDArray[np.int32]  # [E] of the last answer, and their margins
    scores: NDArray[np.float32]  # [E]
    scaled: NDArray[np.float32]  # [n] scratch
    shift: NDArray[np.float32]  # [L, n] mean of how a layer's state differs from the one before: `follow`
    before: NDArray[np.float32]  # [n] the state of the layer that was seen last
    steps: NDArray[np.int64]  # [L] that `shift` is the mean of
    #: [7] layers seen and asked about, absent experts in the answer, the hidden state, ...
    number: NDArray[np.int64]
    #: [L or 0, 5] addresses of matrix, norm, bias, choice_bias or 0; the matrix's type
    routers: NDArray[np.int64]


@kept(fastmath=True, nogil=True)
def products(
    weights: Any,
    slot_of: Any,
    picked: Any,
    hot: Any,
    scaled: Any,
    experts: Any,
    out: Any,
) -> Any:
    """The products of a router's rows with a hidden state, of absent experts and of up to `hot` residents.

    weights [E, n] (see Router); slot_of: int32 [E], -1 where absent; picked: float32 [E], residents with the largest
    are taken; scaled: float32 [n], the state as the router would see it. Fills experts int32 [E] and out float32 [E] as
    far as returned: how many are absent, and how many there are with the residents, which come after them.
    """
    n = scaled.shape[0]
    absent, last = 0, weights.shape[0]
    for e in range(weights.shape[0]):
        if slot_of[e] < 0:
            experts[absent] = e
            absent += 1
        else:
            last -= 1
            experts[last] = e
    found = min(absent + hot, weights.shape[0])
    for i in range(absent, found):
        best = i
        for j in range(i + 1, weights.shape[0]):
            if picked[experts[j]] > picked[experts[best]]:
                best = j
        experts[i], experts[best] = experts[best], experts[i]
    done = 0
    while done + 4 <= found:  # four streams from memory are faster than one
        one, two = weights[experts[done]], weights[experts[done + 1]]
        three, four = weights[experts[done + 2]], weights[experts[done + 3]]
        a = b = c = d = np.float32(0)
        for i in range(n):
            a += float32_of(one[i]) * scaled[i]
            b += float32_of(two[i]) * scaled[i]
            c += float32_of(three[i]) * scaled[i]
            d += float32_of(four[i]) * scaled[i]
        out[done], out[done + 1], out[done + 2], out[done + 3] = a, b, c, d
        done += 4
    while done < found:
        one = weights[experts[done]]
        a = np.float32(0)
        for i in range(n):
            a += float32_of(one[i]) * scaled[i]
        out[done] = a
        done += 1
    return absent, found


@kept(nogil=True)
def chances(
    scores: Any,
    experts: Any,
    absent: Any,
    found: Any,
    top_k: Any,
    bias: Any,
    choice_bias: Any,
    fit: Any,
    out: Any,
) -> None:
    """Turn products into margins, and those of absent experts into chances.

    A margin is the distance to the k-th best of all that were found, in standard deviations. scores: float32 [E], of
    experts[:found], changed in place; bias, choice_bias: see Router; fit: of the layer, see `learn`; out: float32 [E].
    """
    total, squares = 0.0, 0.0
    for i in range(found):
        score = scores[i] + bias[experts[i]]
        if choice_bias.shape[0] > 0:
            score = 1 / (1 + np.exp(-score)) + choice_bias[experts[i]]
        scores[i] = score
        total += score
        squares += score * score
    mean = total / found
    deviation = np.sqrt(max(squares / found - mean * mean, 1e-12))
    best = np.sort(scores[:found])
    cut = best[max(0, found - top_k)]
    for i in range(found):
        scores[i] = (scores[i] - cut) / deviation
    for i in range(absent):
        out[experts[i]] = 1 / (1 + np.exp(-(fit[0] * scores[i] + fit[1])))


@kept(nogil=True)
def learn(margins: Any, experts: Any, absent: Any, ids: Any, fit: Any) -> None:
    """A step of a layer's logistic regression from the margins of absent experts to picks, by Newton's method.

    ids: int32 [k], what the router has picked; fit: float64 [5], slope and offset, and the second derivatives of the
    error by both (slope twice, mixed, offset twice), summed up and slowly forgotten.
    """
    by_slope, by_offset = 0.0, 0.0
    fit[2] = _FORGET * fit[2] + (1 - _FORGET) * TRUST
    fit[3] = _FORGET * fit[3]
    fit[4] = _FORGET * fit[4] + (1 - _FORGET) * TRUST
    for i in range(absent):
        picked = 0.0
        for j in range(ids.shape[0]):
            if ids[j] == experts[i]:
                picked = 1.0
        margin = margins[i]
        chance = 1 / (1 + np.exp(-(fit[0] * margin + fit[1])))
        by_slope += (chance - picked) * margin
        by_offset += chance - picked
        fit[2] += chance * (1 - chance) * margin * margin
        fit[3] += chance * (1 - chance) * margin
        fit[4] += chance * (1 - chance)
    determinant = fit[2] * fit[4] - fit[3] * fit[3]
    if determinant > 1e-9:
        fit[0] -= (fit[4] * by_slope - fit[3] * by_offset) / determinant
        fit[1] -= (fit[2] * by_offset - fit[3] * by_slope) / determinant


@kept(fastmath=True, nogil=True)
def expect(hidden: Any, old_norm: Any, new_norm: Any, shift: Any, scaled: Any) -> None:
    """Fill scaled [n] with what a router ahead would see, were its state the present one but for the mean shift.

    hidden: float32 [n], normalised and multiplied with old_norm [n], which new_norm [n] replaces; shift: float32
    [layers between, n] (DALI, arXiv 2602.03495).
    """
    for i in range(hidden.shape[0]):
        if old_norm[i] == 0:
            scaled[i] = hidden[i]  # nothing is known of that number without its norm
            continue
        value = hidden[i] / old_norm[i]
        for layer in range(shift.shape[0]):
            value += shift[layer, i]
        scaled[i] = value * new_norm[i]


@kept(fastmath=True, nogil=True)
def follow(hidden: Any, norm: Any, before: Any, shift: Any, steps: Any, known: Any) -> Any:
    """Take a layer's state, hidden [n] as in `expect`, into before [n]; known: whether the one before is there, so that
    the mean shift [n] of `steps` tokens learns. Returns of how many tokens it is then."""
    rate = np.float32(1.0 / min(steps + 1 + DOUBT, LATELY))
    for i in range(hidden.shape[0]):
        state = hidden[i] / norm[i] if norm[i] != 0 else np.float32(0)
        if known:
            shift[i] += rate * (state - before[i] - shift[i])
        before[i] = state
    return steps + 1 if known else steps


@kept(nogil=True)
def count(ids: Any, picked: Any) -> None:
    """Add picks of a layer, int32 [tokens, k], to how often each expert was picked lately, float32 [E]."""
    for t in range(ids.shape[0]):
        for e in range(picked.shape[0]):
            picked[e] *= np.float32(_COOL)
        for i in range(ids.shape[1]):
            picked[ids[t, i]] += np.float32(1)


def _reached() -> tuple[Any, ...]:
    return (layout(KIND),)


@kept(also=_reached, nogil=True)
def observe_at(address: Any, layer: Any, ids: Any, n: Any, hidden: Any) -> Any:
    """Compiled.observe, of pinned GateCalls."""
    st = pinned(address, KIND)
    if hidden != 0:
        st.number[SEEN], st.number[HIDDEN] = layer, hidden
    if layer == st.number[SEEN] and layer != st.number[FOLLOWED] and st.routers.shape[0] > 0:
        width, last = st.scaled.shape[0], max(layer - 1, 0)
        state = carray(float32_at(st.number[HIDDEN]), width)
        norm = carray(float32_at(st.routers[layer, 1]), width)
        known = layer > 0 and st.number[FOLLOWED] == layer - 1
        st.steps[last] = follow(state, norm, st.before, st.shift[last], st.steps[last], known)
        st.number[FOLLOWED] = layer
    picks = carray(int32_at(ids), (1, n))
    if layer == st.number[ASKED]:
        learn(st.scores, st.experts, st.number[ABSENT], picks[0], st.fit[layer])
    count(picks, st.picked[layer])
    return 0


@kept(nogil=True)
def _score(st: Any, layer: Any, target: Any, weights: Any) -> Any:
    """`products` of the router of layer `target` with the router's input of `layer`."""
    n = st.scaled.shape[0]
    hidden = carray(float32_at(st.number[HIDDEN]), n)
    norm, next_norm = (
        carray(float32_at(st.routers[layer, 1]), n),
        carray(float32_at(st.routers[target, 1]), n),
    )
    expect(hidden, norm, next_norm, st.shift[layer:target], st.scaled)
    slots, picked = st.slot_of[target], st.picked[target]
    return products(weights, slots, picked, st.number[HOT], st.scaled, st.experts, st.scores)


@kept(also=_reached, nogil=True)
def predict_at(address: Any, layer: Any, target: Any, out: Any) -> Any:
    """Compiled.predict, of pinned GateCalls."""
    st = pinned(address, KIND)
    n_experts, n = st.slot_of.shape[1], st.scaled.shape[0]
    answer = carray(float32_at(out), n_experts)
    answer[:] = 0
    if layer < 0 or layer != st.number[SEEN] or st.routers.shape[0] == 0:
        return 0
    router = st.routers[target]
    if router[4] == 0:
        absent, found = _score(st, layer, target, carray(float32_at(router[0]), (n_experts, n)))
    elif router[4] == 1:
        absent, found = _score(st, layer, target, carray(int16_at(router[0]), (n_experts, n)))
    else:
        absent, found = _score(st, layer, target, carray(uint16_at(router[0]), (n_experts, n)))
    st.number[ASKED], st.number[ABSENT] = target, absent
    choice_bias = carray(float32_at(router[3]), n_experts if router[3] != 0 else 0)
    bias = carray(float32_at(router[2]), n_experts)
    chances(st.scores, st.experts, absent, found, st.number[TOP_K], bias, choice_bias, st.fit[target], answer)
    return 0
