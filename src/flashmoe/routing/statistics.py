"""What a routing trace says about caching: skew, overlap of neighbours, reuse distances."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashmoe.common.kept import kept
from flashmoe.common.plotting import new_figure, save_figure
from flashmoe.routing.trace import PREFILL, RoutingTrace

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@kept()
def reuse_histogram(ids: NDArray[np.int16], n_experts: int) -> NDArray[np.int64]:
    """Histogram int64 [E] of the LRU stack distances in ids [n] (-1: none); first uses are left out.

    An LRU cache of c slots hits what is below c.
    """
    stack = np.empty(n_experts, np.int64)
    height = 0
    histogram = np.zeros(n_experts, np.int64)
    for e in ids:
        if e < 0:
            continue
        position = -1
        for i in range(height):
            if stack[i] == e:
                position = i
                break
        if position >= 0:
            histogram[position] += 1
        else:
            position = height
            height += 1
        for i in range(position, 0, -1):
            stack[i] = stack[i - 1]
        stack[0] = e
    return histogram


@dataclass(frozen=True)
class LayerStatistics:
    """Routing of one MoE layer over a trace."""

    layer: int  # 0..L-1
    requests: int  # (token, expert) pairs
    experts_used: int  # experts asked for at least once
    top_tenth: float  # share of requests that go to the most popular tenth of the experts (0.1 if uniform)
    entropy: float  # of the popularity, 1 if uniform, 0 if one expert gets all
    overlap: float  # share of a token's experts that the token before asked for too
    reuse: tuple[
        float, ...
    ]  # quantiles (QUANTILES) of the reuse distance: other experts asked for in between


def overlap(ids: NDArray[np.int16], begins: NDArray[np.bool_]) -> float:
    """Share of experts [T, k] that the token before asked for too, over tokens that are not a sequence's
    first."""
    same = (ids[1:, :, None] == ids[:-1, None, :]) & (ids[1:, :, None] >= 0)
    inside = ~begins[1:]
    asked = int((ids[1:][inside] >= 0).sum())
    return float(same.any(axis=2)[inside].sum() / asked) if asked else 0.0


def layer_statistics(trace: RoutingTrace) -> list[LayerStatistics]:
    """Statistics of each layer, in order."""
    begins = trace.begins()
    rows = []
    for layer in range(trace.n_layers):
        ids = np.ascontiguousarray(trace.expert_ids[:, layer])
        counts = np.bincount(ids[ids >= 0], minlength=trace.num_experts)
        total = max(1, int(counts.sum()))
        tenth = max(1, round(trace.num_experts / 10))
        p = counts[counts > 0] / total
        entropy = float(-(p * np.log(p)).sum() / np.log(trace.num_experts)) if trace.num_experts > 1 else 0.0
        histogram = reuse_histogram(ids.ravel(), trace.num_experts)
        cumulative = np.cumsum(histogram)
        reuse = tuple(
            float(np.searchsorted(cumulative, q * cumulative[-1])) if cumulative[-1] else float("nan")
            for q in QUANTILES
        )
        rows.append(
            LayerStatistics(
                layer=layer,
                requests=int(counts.sum()),
                experts_used=int((counts > 0).sum()),
                top_tenth=float(np.sort(counts)[-tenth:].sum() / total),
                entropy=entropy + 0.0,
                overlap=overlap(ids, begins),
                reuse=reuse,
            )
        )
    return rows


def summary(trace: RoutingTrace) -> dict[str, object]:
    """The trace as a whole: shape, phases, sequences, whose routing it is."""
    lengths = np.bincount(np.cumsum(trace.begins()) - 1)
    return {
        "model": dict(trace.model),
        "tokens": trace.n_tokens,
        "layers": trace.n_layers,
        "top_k": trace.top_k,
        "experts": trace.num_experts,
        "first_moe_layer": trace.first_moe_layer,
        "sequences": trace.n_sequences,
        "median_sequence_tokens": float(np.median(lengths)),
        "prefill_tokens": int((trace.phase == PREFILL).sum()),
        "steps": len(trace.steps()) - 1,
        "router_weights": trace.router_weights is not None,
    }


def plot(trace: RoutingTrace, path: str | Path) -> None:
    """Draw popularity, overlap and LRU hit rate by capacity to a .png, .svg or .pdf. Needs matplotlib."""
    rows = layer_statistics(trace)
    figure = new_figure(13, 3.6)
    axes = figure.subplots(1, 3)
    counts = np.stack(
        [
            np.bincount(ids[ids >= 0], minlength=trace.num_experts)
            for ids in np.moveaxis(trace.expert_ids, 1, 0)
        ]
    )
    share = -np.sort(-counts, axis=1) / np.maximum(1, counts.sum(axis=1, keepdims=True))
    image = axes[0].imshow(share, aspect="auto", origin="lower", cmap="magma")
    axes[0].set(title="popularity", xlabel="expert, most popular first", ylabel="MoE layer")
    figure.colorbar(image, ax=axes[0], label="share of requests")
    axes[1].plot([row.layer for row in rows], [row.overlap for row in rows], marker=".")
    axes[1].set(title="overlap of neighbouring tokens", xlabel="MoE layer", ylabel="share", ylim=(0, None))
    for layer in np.unique(np.linspace(0, trace.n_layers - 1, 4).astype(int)):
        histogram = reuse_histogram(
            np.ascontiguousarray(trace.expert_ids[:, layer]).ravel(), trace.num_experts
        )
        axes[2].plot(
            np.arange(1, trace.num_experts + 1) / trace.num_experts,
            np.cumsum(histogram) / max(1, counts[layer].sum()),
            label=f"layer {layer}",
        )
    axes[2].set(
        title="reuse within that many experts", xlabel="share of the layer's experts", ylabel="requests"
    )
    axes[2].legend()
    save_figure(figure, path)
