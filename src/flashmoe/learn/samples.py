"""Training samples from a trace: what a policy sees at each step, and what happens next.

The trace is walked token by token with the runtime's own `observe` kernels. Snapshots of the state at every
SEGMENT tokens let training draw segments in any order without keeping all features in memory. T tokens, L
layers, E experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.policies import flashmoe, flashmoe_plus
from flashmoe.common.kept import kept
from flashmoe.routing.trace import RoutingTrace

SEGMENT = 64
NEVER = 1 << 40  # next use of an expert that is not used again

Float = NDArray[np.float32]


class Batch(NamedTuple):
    """Samples of some segments: B tokens, in order within a segment."""

    inputs: Float  # flashmoe: [L, B, 2E]; flashmoe+: [L, B, E, D] moving averages
    recency: Float  # [L, B, E] 1 / (age + 1); flashmoe: size 0
    picked: Float  # [L, B, E] 1 where the token asked for the expert; flashmoe: size 0
    distance: NDArray[np.int64]  # [L, B, E] steps of the layer to the next use
    present: NDArray[np.bool_]  # [L, B] the layer saw the token
    first: NDArray[np.bool_]  # [B] first row of its segment


@kept(nogil=True)
def _take(ids, t, layer, buffer):  # type: ignore[no-untyped-def]
    n = 0
    for j in range(ids.shape[2]):
        if ids[t, layer, j] >= 0:
            buffer[n] = ids[t, layer, j]
            n += 1
    return n


@kept(nogil=True)
def _next_uses(ids, clocks, segment, out):  # type: ignore[no-untyped-def]
    """Fill out [S, L, E] with the layer step of each expert's first use after a segment."""
    following = np.full(out.shape[1:], NEVER, np.int64)
    buffer = np.empty(ids.shape[2], np.int32)
    for t in range(ids.shape[0] - 1, -1, -1):
        if t % segment == segment - 1 or t == ids.shape[0] - 1:
            out[t // segment] = following
        for layer in range(ids.shape[1]):
            for i in range(_take(ids, t, layer, buffer)):
                following[layer, buffer[i]] = clocks[t, layer]


@kept(nogil=True)
def _distances(ids, clocks, a, b, following, out, row):  # type: ignore[no-untyped-def]
    """Fill out [L, B, E] from `row` on with the steps from each token a..b-1 to the next use of each
    expert."""
    buffer = np.empty(ids.shape[2], np.int32)
    for t in range(b - 1, a - 1, -1):
        for layer in range(ids.shape[1]):
            for e in range(out.shape[2]):
                out[layer, row + t - a, e] = following[layer, e] - clocks[t, layer]
            for i in range(_take(ids, t, layer, buffer)):
                following[layer, buffer[i]] = clocks[t, layer]


@kept(nogil=True)
def walk_plus(ids, clocks, a, b, average, last, decay, inputs, recency, picked, row):  # type: ignore[no-untyped-def]
    """Observe tokens a..b-1; where inputs has rows, write those after each token from `row` on."""
    buffer = np.empty(ids.shape[2], np.int32)
    for t in range(a, b):
        for layer in range(ids.shape[1]):
            n = _take(ids, t, layer, buffer)
            now = clocks[t, layer]
            if n > 0:
                flashmoe_plus.observe(average, last, decay, layer, buffer, n, now)
            if inputs.shape[1] == 0:
                continue
            at = row + t - a
            for e in range(average.shape[1]):
                recency[layer, at, e] = 1.0 / (now - last[layer, e] + 1.0)
                for d in range(decay.shape[0]):
                    inputs[layer, at, e, d] = average[layer, e, d]
            for i in range(n):
                picked[layer, at, buffer[i]] = 1.0


@kept(nogil=True)
def walk_paper(ids, clocks, starts, a, b, last, count, inputs, row):  # type: ignore[no-untyped-def]
    """The same for the paper's features [L, B, 2E]."""
    buffer = np.empty(ids.shape[2], np.int32)
    for t in range(a, b):
        if starts[t]:
            last[:] = -1
            count[:] = 0.0
        for layer in range(ids.shape[1]):
            n = _take(ids, t, layer, buffer)
            if n > 0:
                flashmoe.observe(last, count, layer, buffer, n, clocks[t, layer])
            if inputs.shape[1] > 0:
                flashmoe.features(last, count, layer, clocks[t, layer], inputs[layer, row + t - a])


class Samples:
    """Segments of a trace as batches of training samples, for one kind of policy.

    decays: [D] of the moving averages (flashmoe+), or None for the paper's features.
    """

    def __init__(self, trace: RoutingTrace, decays: Sequence[float] | None) -> None:
        self.ids, self.n_experts = trace.expert_ids, trace.num_experts
        self.decay = None if decays is None else np.array(decays, np.float32)
        n_tokens, n_layers, _ = self.ids.shape
        self.starts: NDArray[np.bool_] = trace.begins()
        self.present: NDArray[np.bool_] = np.any(self.ids >= 0, axis=2)
        self.clocks = np.cumsum(self.present, axis=0).astype(np.int64)  # [T, L] accesses of the layer so far
        self.n_segments = -(-n_tokens // SEGMENT)
        shape = (n_layers, self.n_experts)
        self._following = np.empty((self.n_segments, *shape), np.int64)
        _next_uses(self.ids, self.clocks, SEGMENT, self._following)
        self._snapshots: list[tuple[NDArray[np.float32], NDArray[np.int64]]] = []
        state = self._cold()
        for s in range(self.n_segments):
            self._snapshots.append((state[0].copy(), state[1].copy()))
            self._walk(s, state, None, 0)

    def _cold(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        shape = (self.ids.shape[1], self.n_experts)
        if self.decay is None:
            return np.zeros(shape, np.float32), np.full(shape, -1, np.int64)
        return np.zeros((*shape, len(self.decay)), np.float32), np.full(shape, -100_000, np.int64)

    def _walk(self, s: int, state: tuple[Float, NDArray[np.int64]], out: Batch | None, row: int) -> int:
        a, b = s * SEGMENT, min((s + 1) * SEGMENT, len(self.ids))
        if self.decay is None:
            inputs = np.empty((0, 0, 0), np.float32) if out is None else out.inputs
            walk_paper(self.ids, self.clocks, self.starts, a, b, state[1], state[0], inputs, row)
        else:
            none = np.empty((0, 0, 0), np.float32)
            inputs = np.empty((0, 0, 0, 0), np.float32) if out is None else out.inputs
            recency, picked = (none, none) if out is None else (out.recency, out.picked)
            walk_plus(
                self.ids, self.clocks, a, b, state[0], state[1], self.decay, inputs, recency, picked, row
            )
        return b - a

    def batch(self, segments: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Samples of the given segments, one after another."""
        bounds = [(s * SEGMENT, min((s + 1) * SEGMENT, len(self.ids))) for s in segments]
        n = sum(b - a for a, b in bounds)
        n_layers, e = self.ids.shape[1], self.n_experts
        plus = self.decay is not None
        out = Batch(
            inputs=np.empty(
                (n_layers, n, e, len(self.decay)) if self.decay is not None else (n_layers, n, 2 * e),
                np.float32,
            ),
            recency=np.empty((n_layers, n if plus else 0, e), np.float32),
            picked=np.zeros((n_layers, n if plus else 0, e), np.float32),
            distance=np.empty((n_layers, n, e), np.int64),
            present=np.concatenate([self.present[a:b] for a, b in bounds]).T,  # type: ignore[index]
            first=np.concatenate([np.arange(b - a) == 0 for a, b in bounds]),
        )
        row = 0
        for s, (a, b) in zip(segments, bounds, strict=True):
            snapshot = self._snapshots[s]
            self._walk(int(s), (snapshot[0].copy(), snapshot[1].copy()), out, row)
            _distances(self.ids, self.clocks, a, b, self._following[s].copy(), out.distance, row)
            row += b - a
        return out


def ahead(make: Callable[[NDArray[np.int64]], Batch], order: NDArray[np.int64]) -> Iterator[Batch]:
    """Batches of the rows of `order`, each made in a second thread while the one before is worked on."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(make, order[0])
        for row in order[1:]:
            batch, waiting = waiting.result(), pool.submit(make, row)
            yield batch
        yield waiting.result()
