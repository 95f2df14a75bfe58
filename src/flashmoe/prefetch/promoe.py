"""ProMoE (arXiv 2410.22134, section 4): a small trained network per layer, with stride.

In the paper a two-layer network maps the hidden state at layer l to the experts of layer l + stride. Traces have no
hidden states, so a learned stand-in takes its place: a vector per token plus a vector for each expert picked so far,
summed up from layer to layer as the residual stream is, and its moving averages over the tokens before. Two-layer
networks, one per target layer and distance (0: from the token alone, 1, 2, 4), read it. This is therefore not the
paper's predictor but its form with what routing alone shows; with hidden states it would see more.

Trained by `flashmoe train prefetch --kind promoe`; fixed while running."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.common.kept import kept
from flashmoe.prefetch.base import AHEAD, Float32, Int32, PredictorError
from flashmoe.prefetch.batch import MicroBatch, TextPredictor
from flashmoe.prefetch.files import PredictorFile

RECENT = 64  # tokens of a micro-batch that the averages need


class ProMoEState(NamedTuple):
    """L layers, E experts, R numbers of the stand-in, H hidden units, A averages, V vectors of tokens."""

    stream: NDArray[np.float32]  # [L + 1, R] the token's vector, then after each layer
    average: NDArray[np.float32]  # [A, R] over the tokens before
    now: NDArray[np.int64]  # [1] layers observed in this step, up to the last one; -1 before the first step
    decay: NDArray[np.float32]  # [A]
    token: NDArray[np.float32]  # [V, R]
    embed: NDArray[np.float32]  # [L, E, R]
    w1: NDArray[np.float32]  # [C, L, (1 + A) * R, H]
    b1: NDArray[np.float32]  # [C, L, H]
    w2: NDArray[np.float32]  # [C, L, H, E]
    b2: NDArray[np.float32]  # [C, L, E]


@kept(fastmath=True)
def begin(st, token):
    """A step begins: the token before joins the averages."""
    if st.now[0] > 0:
        for a in range(st.average.shape[0]):
            for r in range(st.average.shape[1]):
                gain = np.float32(1.0) - st.decay[a]
                st.average[a, r] += gain * (st.stream[st.now[0], r] - st.average[a, r])
    st.now[0] = 0
    if token >= 0:
        st.stream[0] = st.token[token % st.token.shape[0]]
    else:
        st.stream[0] = np.float32(0.0)


@kept(fastmath=True)
def observe(st, layer, ids):
    """Predictor.observe; ids int32 [n], -1: none."""
    n = 0
    for e in ids:
        n += 0 <= e < st.embed.shape[1]
    if n == 0:
        return
    for m in range(max(st.now[0], 0), layer):  # layers that were not observed
        st.stream[m + 1] = st.stream[m]
    st.stream[layer + 1] = st.stream[layer]
    for e in ids:
        if 0 <= e < st.embed.shape[1]:
            for r in range(st.embed.shape[2]):
                st.stream[layer + 1, r] += st.embed[layer, e, r]
    st.now[0] = layer + 1


@kept(fastmath=True)
def predict(st, layer, target, out):
    """Predictor.predict."""
    c = 0
    if layer >= 0:
        for i in range(len(AHEAD) - 1, 0, -1):
            if AHEAD[i] >= target - layer and target >= AHEAD[i]:
                c = i
    at = target - AHEAD[c] + 1 if c > 0 else 0
    width = st.stream.shape[1]
    hidden = st.b1[c, target].copy()
    for i in range(st.w1.shape[2]):
        x = st.stream[at, i] if i < width else st.average[i // width - 1, i % width]
        row = st.w1[c, target, i]
        for h in range(hidden.shape[0]):
            hidden[h] += x * row[h]
    out[:] = st.b2[c, target]
    for h in range(hidden.shape[0]):
        if hidden[h] > 0.0:
            row = st.w2[c, target, h]
            for e in range(out.shape[0]):
                out[e] += hidden[h] * row[e]
    for e in range(out.shape[0]):
        z = min(max(out[e], np.float32(-20.0)), np.float32(20.0))
        out[e] = np.float32(1.0) / (np.float32(1.0) + math.exp(-z))


@kept()
def reset(st):
    """A sequence begins: there are no tokens before."""
    st.average[:] = np.float32(0.0)
    st.now[0] = -1


@kept()
def observe_text(st, ids, tokens):
    """Follow text: ids int32 [T, L, k], tokens int32 [T]."""
    for t in range(ids.shape[0]):
        begin(st, tokens[t])
        for layer in range(ids.shape[1]):
            observe(st, layer, ids[t, layer])


class ProMoE(TextPredictor):
    """A network per layer and distance, from a trained file."""

    name: ClassVar[str] = "promoe"
    needs_file: ClassVar[bool] = True

    def __init__(self, file: str | Path | None = None, trained: PredictorFile | None = None) -> None:
        super().__init__()
        if trained is None:
            if file is None:
                raise PredictorError(
                    "predictor 'promoe' needs a trained file: write promoe:FILE, or train one with "
                    "`flashmoe train prefetch TRACE -o FILE --kind promoe`"
                )
            trained = PredictorFile.load(file, self.name)
        self.trained = trained
        try:
            self.decays = [float(d) for d in trained.constants["decays"]]
            r, h, v = (int(trained.constants[name]) for name in ("R", "H", "V"))
            if trained.constants["ahead"] != list(AHEAD):
                raise ValueError(f"ahead {trained.constants['ahead']}")
            if min(r, h, v) < 1 or not all(0 <= decay < 1 for decay in self.decays):
                raise ValueError("R, H, V or decays out of range")
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise PredictorError(
                f"predictor file is damaged or too old: constant {error}; train it again"
            ) from None
        n, e, c, i = trained.n_layers, trained.n_experts, len(AHEAD), (1 + len(self.decays)) * r
        shapes = {
            "token": (v, r), "embed": (n, e, r), "w1": (c, n, i, h), "b1": (c, n, h), "w2": (c, n, h, e),
            "b2": (c, n, e),
        }  # fmt: skip
        self.weights = {name: trained.array(name, *shape) for name, shape in shapes.items()}

    def check_model(self, model: Mapping[str, Any]) -> None:
        self.trained.check_model(model)

    def make_state(self, n_layers: int, n_experts: int, top_k: int) -> ProMoEState:
        self.trained.check_shape(n_layers, n_experts, top_k)
        r = self.weights["embed"].shape[2]
        state = ProMoEState(
            stream=np.zeros((n_layers + 1, r), np.float32),
            average=np.zeros((len(self.decays), r), np.float32),
            now=np.array([-1], np.int64),
            decay=np.array(self.decays, np.float32),
            **self.weights,
        )
        none = np.full((1, n_layers, top_k), -1, np.int32)
        observe_text(state, none, none[:, 0, 0])  # compile before the first token waits for it
        observe(state, 0, none[0, 0])
        begin(state, -1)
        predict(state, -1, 0, np.zeros(n_experts, np.float32))
        reset(state)
        return state

    def begin_sequence(self) -> None:
        self._settle()
        reset(self._state)

    def begin_step(self, token: int) -> None:
        self._settle()
        begin(self._state, token)

    def observe(self, layer: int, ids: Int32) -> None:
        observe(self._state, layer, ids)

    def follow(self, batch: MicroBatch) -> None:
        observe_text(self._state, *batch.take(RECENT))

    def predict(self, layer: int, target: int, out: Float32) -> None:
        predict(self._state, layer, target, out)

    def state(self) -> dict[str, NDArray[Any]]:
        """See Predictor; the networks stay in their file."""
        self._settle()
        return {name: value for name, value in super().state().items() if name not in self.weights}

    def load_state(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        super().load_state({**arrays, **self.weights})
        self._state.now[0] = -1
