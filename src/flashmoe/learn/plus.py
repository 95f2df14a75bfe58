"""The network of `flashmoe+` in numpy: its loss, the gradients, and the training, for machines without torch.

The same numbers as `networks.PlusNet` (tests compare them). Shapes: L layers, E experts, B rows of a batch, N of them
with a row before, D time scales, C channels of context of R numbers, H hidden units, K numbers of context for each
expert, I = D + 1 + K inputs of the expert network, M hidden units of it, J horizons.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flashmoe.common.kept import kept
from flashmoe.learn.plus_shape import CHANNEL_DECAYS, DECAYS, DROPOUT, HORIZONS, Sizes
from flashmoe.learn.samples import Batch, Samples, ahead

Float = NDArray[np.float32]
Arrays = dict[str, Float]

EPOCHS = 5
PER_BATCH = 2  # segments
RATE = 5e-3
RISE = 0.1  # share of the steps in which the rate rises
DECAY = 0.01  # of the weights (AdamW: Loshchilov, Hutter: Decoupled weight decay regularization, 2019)
BETAS = 0.9, 0.999
_CONTEXT = np.float32(0.2)  # scale of the context, so that the first steps are of the right size

#: Called after each step with (steps done, of how many, mean loss of the last ones).
Progress = Callable[[int, int, float], None]


def start(n_layers: int, n_experts: int, sizes: Sizes, rng: np.random.Generator) -> Arrays:
    """Random weights."""
    c, i, j = len(CHANNEL_DECAYS) + 1, sizes.inputs, len(HORIZONS)
    r, h, k, m = sizes.r, sizes.h, sizes.k, sizes.m

    def normal(*shape: int, scale: float) -> Float:
        return rng.standard_normal((n_layers, *shape), np.float32) * np.float32(scale)

    def zeros(*shape: int) -> Float:
        return np.zeros((n_layers, *shape), np.float32)

    return {
        "embed": normal(n_experts, r, scale=0.3),
        "w1": normal(c * r, h, scale=(c * r) ** -0.5),
        "b1": zeros(h),
        "w2": normal(h, n_experts * k, scale=0.5 * h**-0.5),
        "b2": zeros(n_experts * k),
        "v1": normal(i, m, scale=i**-0.5),
        "c1": zeros(m),
        "v2": normal(m, j, scale=m**-0.5),
        "v0": zeros(i, j),
        "c2": zeros(j) - np.float32(2.0),
    }


def gradients(weights: Arrays, batch: Batch, out: Arrays, rng: np.random.Generator | None = None) -> float:
    """Binary cross-entropy of "used within h steps", mean over experts and horizons; its gradients go to `out`.

    rng: of the hidden units that are left out; None: none is.
    """
    n_layers = len(batch.picked)
    now = np.flatnonzero(~batch.first)
    present = batch.present[:, now]
    share = np.float32(1 / max(1, present.sum()))
    parts = np.stack([_encode(weights["embed"][layer], batch, layer) for layer in range(n_layers)])
    before, here = parts[:, now - 1], parts[:, now]
    # a layer knows the current token from itself and those behind, and the token before from those ahead
    context = before.sum(0) + np.cumsum(here - before, axis=0)
    d_context = np.empty_like(context)
    loss = 0.0
    for layer in range(n_layers):
        own = {name: value[layer] for name, value in weights.items()}
        into = {name: value[layer] for name, value in out.items()}
        weight = present[layer] * share
        kept_units = None
        if rng is not None:
            random = rng.random((len(now), own["b1"].shape[0]), np.float32)
            kept_units = (random >= DROPOUT) * np.float32(1 / (1 - DROPOUT))
        loss += _layer(own, into, batch, layer, now, context[layer], weight, kept_units, d_context[layer])
    d_here = np.cumsum(d_context[::-1], axis=0)[::-1]
    d_parts = np.zeros_like(parts)
    d_parts[:, now] = d_here
    d_parts[:, now - 1] += d_here[0] - d_here
    for layer in range(n_layers):
        _encoded(batch, layer, d_parts[layer], out["embed"][layer])
    return loss


def _channels(batch: Batch, layer: int) -> list[Float]:
    """What the context follows, C arrays [B, E]."""
    return [batch.picked[layer], *(2 * batch.inputs[layer, :, :, d] for d in CHANNEL_DECAYS)]


def _encode(embed: Float, batch: Batch, layer: int) -> Float:
    """The layer's part of the context, [B, C * R]."""
    return np.concatenate([channel @ embed for channel in _channels(batch, layer)], axis=1)


def _encoded(batch: Batch, layer: int, d_part: Float, out: Float) -> None:
    """Gradient of `_encode` for the vectors of the experts, into out [E, R]."""
    out[...] = 0
    for c, channel in enumerate(_channels(batch, layer)):
        out += channel.T @ d_part[:, c * out.shape[1] : (c + 1) * out.shape[1]]


def _layer(
    w: Arrays,
    out: Arrays,
    batch: Batch,
    layer: int,
    now: NDArray[np.int64],
    context: Float,
    share: Float,
    kept_units: Float | None,
    d_context: Float,
) -> float:
    """Loss of a layer; gradients into `out` and d_context [N, C * R]. share: what each row counts, [N]."""
    n, d, e = len(now), len(DECAYS), batch.picked.shape[2]
    seen = context * _CONTEXT
    hidden = np.maximum(seen @ w["w1"] + w["b1"], 0)
    if kept_units is not None:
        hidden *= kept_units
    k = w["w2"].shape[1] // e
    for_expert = (hidden @ w["w2"] + w["b2"]).reshape(n, e, k)
    x = np.empty((d + 1 + k, n, e), np.float32)
    x[:d] = (np.log(batch.inputs[layer, now] + np.float32(1e-3)) * np.float32(0.3) + 1).transpose(2, 0, 1)
    x[d] = batch.recency[layer, now]
    x[d + 1 :] = for_expert.transpose(2, 0, 1)
    x = x.reshape(d + 1 + k, n * e)
    y = np.maximum(w["v1"].T @ x + w["c1"][:, None], 0)
    logits = w["v2"].T @ y + w["v0"].T @ x + w["c2"][:, None]
    near = (batch.distance[layer, now].reshape(-1) <= np.array(HORIZONS)[:, None]).astype(np.float32)
    each = np.repeat(share / np.float32(len(HORIZONS) * e), e)
    chances = 1 / (1 + np.exp(-logits))
    loss = float(((np.logaddexp(0, logits) - near * logits) * each).sum())
    d_logits = (chances - near) * each
    d_y = (w["v2"] @ d_logits) * (y > 0)
    out["v2"][...], out["v0"][...], out["c2"][...] = y @ d_logits.T, x @ d_logits.T, d_logits.sum(1)
    out["v1"][...], out["c1"][...] = x @ d_y.T, d_y.sum(1)
    d_for_expert = w["v0"][d + 1 :] @ d_logits + w["v1"][d + 1 :] @ d_y
    d_for_expert = d_for_expert.reshape(k, n, e).transpose(1, 2, 0).reshape(n, e * k)
    out["w2"][...], out["b2"][...] = hidden.T @ d_for_expert, d_for_expert.sum(0)
    d_hidden = (d_for_expert @ w["w2"].T) * (hidden > 0)
    if kept_units is not None:
        d_hidden *= kept_units
    out["w1"][...], out["b1"][...] = seen.T @ d_hidden, d_hidden.sum(0)
    d_context[...] = (d_hidden @ w["w1"].T) * _CONTEXT
    return loss


@kept(fastmath=True, nogil=True)
def _adam(weight, gradient, first, second, rate, beta1, beta2, correction1, correction2, shrink):  # type: ignore[no-untyped-def]
    """A step of AdamW on flat arrays."""
    for i in range(weight.size):
        g = gradient[i]
        first[i] += (np.float32(1.0) - beta1) * (g - first[i])
        second[i] += (np.float32(1.0) - beta2) * (g * g - second[i])
        weight[i] *= shrink
        weight[i] -= rate * (first[i] * correction1) / (np.sqrt(second[i] * correction2) + np.float32(1e-8))


def train(
    data: Samples, sizes: Sizes, seed: int = 0, epochs: int = EPOCHS, progress: Progress | None = None
) -> tuple[Arrays, list[float]]:
    """Weights after so many epochs, with a learning rate that rises and falls to zero; the mean loss of each epoch."""
    rng = np.random.default_rng(seed)
    weights = start(data.ids.shape[1], data.n_experts, sizes, rng)
    slope = {name: np.empty_like(value) for name, value in weights.items()}
    moments = {name: (np.zeros_like(value), np.zeros_like(value)) for name, value in weights.items()}
    per_batch = min(PER_BATCH, data.n_segments)
    steps = data.n_segments // per_batch
    done, history = 0, []
    for _ in range(epochs):
        losses: list[float] = []
        order = rng.permutation(data.n_segments)[: steps * per_batch].reshape(steps, per_batch)
        for batch in ahead(data.batch, order):
            losses.append(gradients(weights, batch, slope, rng))
            done += 1
            rate = rate_at(done / (epochs * steps))
            corrections = [1 / (1 - beta**done) for beta in BETAS]
            for name, value in weights.items():
                numbers = (rate, *BETAS, *corrections, 1 - rate * DECAY)
                arrays = (value, slope[name], *moments[name])
                _adam(*(a.reshape(-1) for a in arrays), *(np.float32(x) for x in numbers))
            if progress:
                progress(done, epochs * steps, float(np.mean(losses[-50:])))
        history.append(float(np.mean(losses)))
    return weights, history


def rate_at(share: float) -> float:
    """The learning rate when this share of the steps is done: half a cosine up, and half a one down to zero."""
    if share < RISE:
        return RATE * (0.04 + 0.96 * 0.5 * (1 - np.cos(np.pi * share / RISE)))
    return RATE * 0.5 * (1 + np.cos(np.pi * min(1.0, (share - RISE) / (1 - RISE))))


def export(weights: Arrays, sizes: Sizes) -> dict[str, NDArray[np.float16]]:
    """Arrays as policies.flashmoe_plus reads them; the context's scale goes into w1."""
    n_layers, h = weights["b1"].shape
    arrays = dict(weights, w1=weights["w1"] * _CONTEXT)
    arrays["w2"] = arrays["w2"].reshape(n_layers, h, -1, sizes.k).transpose(0, 2, 3, 1)
    arrays["b2"] = arrays["b2"].reshape(n_layers, -1, sizes.k)
    return {name: np.ascontiguousarray(value, np.float16) for name, value in arrays.items()}
