"""Beyond the paper: chances of the next uses, from several time scales and from what all layers routed.

Two parts, both small enough for every layer and step:

- Context. Each expert of each layer has a learned vector of R numbers. Summed over what a token picked they
describe
  the token; kept per layer as of now and as moving averages (C channels), and summed over layers, they
  describe the text near and far. The layers behind have seen the current token, those ahead only the one
  before: as it is when the choice is made. One hidden layer per layer turns this into K numbers for each
  expert.
- Expert. For each candidate: the logarithms of its moving averages (D time scales), recency, and its K
context numbers
  go through a tiny network (I -> M -> J and a linear shortcut) to J logits: used within 1, 2, 4, ... steps.

The score is a weighted mean of the J chances; the lowest goes. It means the same in all layers, so that a
global pool can compare them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.kernels import entries as loops
from flashmoe.cache.kernels.slots import allocating, lean, loose
from flashmoe.cache.policies.learned import LearnedPolicy, PolicyFile
from flashmoe.cache.residency import GLOBAL
from flashmoe.cache.saved import Limits
from flashmoe.common.halves import float32_of
from flashmoe.errors import PolicyError

FEATURES = ["log_average[0:D]", "recency", "context[0:K]"]
CHANNELS = "now, averages[channel_decays]"
NEVER = -100_000
_LARGEST = float(np.finfo(np.float16).max)


class FlashmoePlusState(NamedTuple):
    """History, context, networks and scores. I = D + 1 + K inputs of the expert network."""

    score: NDArray[np.float32]  # [L, E] weighted chances of the next uses
    scored: NDArray[np.int64]  # [L] access that the scores are of
    average: NDArray[np.float32]  # [L, E, D] moving averages of the requests
    last: NDArray[np.int64]  # [L, E] access of the layer with the last request, far back if none
    part: NDArray[np.float32]  # [L, C, R] context of each layer alone
    context: NDArray[np.float32]  # [C, R] sum over the layers
    current: NDArray[np.int32]  # [L, E + 1] experts of the layer's last access; their number at the end
    decay: NDArray[np.float32]  # [D]
    channel: NDArray[np.int32]  # [C - 1] which decays the channels after the first use
    top_k: NDArray[np.int32]  # [1] experts per token
    embed: NDArray[np.float32]  # [L, E, R]
    w1: NDArray[np.int16]  # [L, C * R, H] bits of float16, as in the file: half as much to read from memory
    b1: NDArray[np.float32]  # [L, H]
    w2: NDArray[np.int16]  # [L, E, K, H] likewise
    b2: NDArray[np.float32]  # [L, E, K]
    v1: NDArray[np.float32]  # [L, I, M]
    c1: NDArray[np.float32]  # [L, M]
    v2: NDArray[np.float32]  # [L, M, J]
    v0: NDArray[np.float32]  # [L, I, J]
    c2: NDArray[np.float32]  # [L, J]
    mean: NDArray[np.float32]  # [J] weights of the horizons


@loose
def observe(average, last, decay, layer, ids, n, now):
    """Note the requests ids[:n] of a layer at its access `now`. Shared by runtime and training."""
    n_scales = decay.shape[0]
    for e in range(average.shape[1]):
        for d in range(n_scales):
            average[layer, e, d] *= decay[d]
    for i in range(n):
        last[layer, ids[i]] = now
        for d in range(n_scales):
            average[layer, ids[i], d] += np.float32(1.0) - decay[d]


@allocating
def follow(st, layer, n):
    """Bring the layer's part of the context, and the sum over the layers, up to date."""
    n_channels, width = st.context.shape
    if layer == 0:  # once a token: sum up afresh, so that rounding does not add up
        st.context[:] = np.float32(0.0)
        for m in range(st.part.shape[0]):
            for c in range(n_channels):
                for r in range(width):
                    st.context[c, r] += st.part[m, c, r]
    token = np.zeros(width, np.float32)
    for i in range(n):
        e = st.current[layer, i]
        for r in range(width):
            token[r] += st.embed[layer, e, r]
    if n > st.top_k[0]:  # a micro-batch of many tokens counts as one
        for r in range(width):
            token[r] *= st.top_k[0] / np.float32(n)
    for c in range(n_channels):
        keep = np.float32(0.0) if c == 0 else st.decay[st.channel[c - 1]]
        gain = np.float32(1.0) if c == 0 else np.float32(2.0) * (np.float32(1.0) - keep)
        for r in range(width):
            new = keep * st.part[layer, c, r] + gain * token[r]
            st.context[c, r] += new - st.part[layer, c, r]
            st.part[layer, c, r] = new


@loose
def rate(st, layer, e, hidden, x, y, z, now):
    """Score of one expert; x float32 [I], y float32 [M], z float32 [J] are scratch."""
    n_scales, n_context, width = st.decay.shape[0], st.b2.shape[2], hidden.shape[0]
    for d in range(n_scales):
        x[d] = math.log(st.average[layer, e, d] + np.float32(1e-3)) * np.float32(0.3) + np.float32(1.0)
    x[n_scales] = 1.0 / (now - st.last[layer, e] + 1.0)
    for k in range(n_context):
        total = np.float32(0.0)
        for h in range(width):
            total += float32_of(st.w2[layer, e, k, h]) * hidden[h]
        x[n_scales + 1 + k] = total + st.b2[layer, e, k]
    for m in range(y.shape[0]):
        y[m] = st.c1[layer, m]
    for i in range(x.shape[0]):
        for m in range(y.shape[0]):
            y[m] += x[i] * st.v1[layer, i, m]
    for j in range(z.shape[0]):
        z[j] = st.c2[layer, j]
    for m in range(y.shape[0]):
        unit = max(y[m], np.float32(0.0))
        for j in range(z.shape[0]):
            z[j] += unit * st.v2[layer, m, j]
    for i in range(x.shape[0]):
        for j in range(z.shape[0]):
            z[j] += x[i] * st.v0[layer, i, j]
    score = np.float32(0.0)
    for j in range(z.shape[0]):
        score += st.mean[j] / (np.float32(1.0) + math.exp(-z[j]))
    return score


@loose
def read_context(st, layer, hidden):
    """Fill hidden float32 [H] from the context, as the layer reads it."""
    n_channels, width = st.context.shape
    for h in range(hidden.shape[0]):
        hidden[h] = st.b1[layer, h]
    for c in range(n_channels):
        seen, rows = st.context[c], st.w1[layer, c * width : (c + 1) * width]
        r = 0
        while r + 4 <= width:  # four rows at a time: sums are loaded and stored less often
            one, two, three, four = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
            for h in range(hidden.shape[0]):
                hidden[h] += (
                    seen[r] * float32_of(one[h])
                    + seen[r + 1] * float32_of(two[h])
                    + seen[r + 2] * float32_of(three[h])
                    + seen[r + 3] * float32_of(four[h])
                )
            r += 4
        while r < width:
            for h in range(hidden.shape[0]):
                hidden[h] += seen[r] * float32_of(rows[r, h])
            r += 1
    for h in range(hidden.shape[0]):
        hidden[h] = max(hidden[h], np.float32(0.0))


@allocating
def infer(st, res, layer, now):
    """Score what can be a victim before the layer's next access: residents, and what was just requested."""
    hidden = np.empty(st.b1.shape[1], np.float32)
    x = np.empty(st.v1.shape[1], np.float32)
    y, z = np.empty(st.v1.shape[2], np.float32), np.empty(st.mean.shape[0], np.float32)
    read_context(st, layer, hidden)
    for i in range(res.used[layer]):
        e = res.members[layer, i]
        st.score[layer, e] = rate(st, layer, e, hidden, x, y, z, now)
    for i in range(st.current[layer, st.current.shape[1] - 1]):
        e = st.current[layer, i]
        if res.slot_of[layer, e] < 0:
            st.score[layer, e] = rate(st, layer, e, hidden, x, y, z, now)
    st.scored[layer] = now


@lean
def note(st, layer, ids, n, now):
    """Everything that an access changes but the scores."""
    observe(st.average, st.last, st.decay, layer, ids, n, now)
    for i in range(n):
        st.current[layer, i] = ids[i]
    st.current[layer, st.current.shape[1] - 1] = n
    follow(st, layer, n)


def record(st, res, layer, ids, n):
    now = res.accesses[layer]
    note(st, layer, ids, n, now)
    if res.partition[0] == GLOBAL:
        infer(st, res, layer, now)


def victim(st, res, layer, g):
    if layer >= 0 and st.scored[layer] != res.accesses[layer]:
        infer(st, res, layer, res.accesses[layer])
    return loops.lowest(st.score, res, layer, g)


class FlashmoePlus(LearnedPolicy):
    """Evicts the lowest chance of use within 1 to 32 steps, from a trained file."""

    name = "flashmoe+"
    kernels = loops.compiled(FlashmoePlusState, record, victim)

    def __init__(self, file: str | Path | None = None, trained: PolicyFile | None = None) -> None:
        super().__init__(file, trained)
        known = self.trained.constants
        if self.trained.features != FEATURES:
            raise PolicyError(
                f"the policy file was trained with features {self.trained.features}, not {FEATURES}"
            )
        try:
            decays, channels = known["decays"], known["channel_decays"]
            r, h, k, m = (int(known[name]) for name in ("R", "H", "K", "M"))
            mean = known["horizon_weights"]
            self.decay, self.channel = np.array(decays, np.float32), np.array(channels, np.int32)
            self.mean = np.array(mean, np.float32) / np.float32(sum(mean))
            if not np.isfinite(self.mean).all() or not ((self.decay >= 0) & (self.decay < 1)).all():
                raise ValueError("horizon_weights or decays out of range")
            if not ((self.channel >= 0) & (self.channel < len(self.decay))).all():
                raise ValueError("channel_decays out of range")
        except (KeyError, ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
            raise PolicyError(f"policy file is damaged: constant {error}; train it again") from None
        n_layers, e = self.trained.n_layers, self.trained.n_experts
        c, i, j = len(channels) + 1, len(decays) + 1 + k, len(mean)
        shapes: dict[str, tuple[int, ...]] = {
            "embed": (e, r), "w1": (c * r, h), "b1": (h,), "w2": (e, k, h), "b2": (e, k),
            "v1": (i, m), "c1": (m,), "v2": (m, j), "v0": (i, j), "c2": (j,),
        }  # fmt: skip
        self.weights = {name: self.trained.array(name, n_layers, *shape) for name, shape in shapes.items()}
        for name in ("w1", "w2"):
            self.weights[name] = (
                self.weights[name].clip(-_LARGEST, _LARGEST).astype(np.float16).view(np.int16)
            )
        self.fixed = frozenset({*self.weights, "decay", "channel", "top_k", "mean"})

    def make_state(self, n_layers: int, n_experts: int) -> FlashmoePlusState:
        self.trained.check_shape(n_layers, n_experts)
        shape = (n_layers, n_experts)
        channels, r = len(self.channel) + 1, self.weights["embed"].shape[2]
        return FlashmoePlusState(
            score=np.zeros(shape, np.float32),
            scored=np.full(n_layers, -1, np.int64),
            average=np.zeros((*shape, len(self.decay)), np.float32),
            last=np.full(shape, NEVER, np.int64),
            part=np.zeros((n_layers, channels, r), np.float32),
            context=np.zeros((channels, r), np.float32),
            current=np.zeros((n_layers, n_experts + 1), np.int32),
            decay=self.decay,
            channel=self.channel,
            top_k=np.array([self.trained.top_k], np.int32),
            mean=self.mean,
            **self.weights,
        )

    def limits(self) -> dict[str, Limits]:
        experts = self._state.current.shape[1] - 1
        return {
            "last": (NEVER, self.residency.accesses[:, None]),
            "average": (0.0, 2.0),
            "current": (0, np.array([experts - 1] * experts + [experts])),
        }
