"""What an eviction policy is, to the runtime and to the simulator alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numba import types
from numpy.typing import NDArray

from flashmoe.cache.kernels.entries import REQUEST, Kernels, access_each
from flashmoe.cache.kernels.loops import window_size
from flashmoe.cache.residency import Residency
from flashmoe.cache.saved import Limits, load_state
from flashmoe.common.compiled import Pinned, address_of
from flashmoe.errors import PolicyError

Int32 = NDArray[np.int32]

_REQUEST_SIGNATURE = types.int64(types.int64, types.int64, types.int64, types.int64)
MISSES = (1 << 32) - 1  # the misses in what `EvictionPolicy.request` returns; the hits are above


class Replay(NamedTuple):
    """What a replay counted: N steps, L layers."""

    requests: NDArray[np.int64]  # [N, L] distinct experts asked for
    hits: NDArray[np.int64]  # [N, L] of those, resident
    bits: NDArray[
        np.uint8
    ]  # [T, L, k] 0 not counted (repeated in its step), 1 miss, 2 hit; size 0 if not asked for

    @property
    def hit_rate(self) -> float:
        """Hits over requests, 0 where nothing was requested."""
        return float(self.hits.sum() / max(1, self.requests.sum()))


class CompiledRequest(NamedTuple):
    """`EvictionPolicy.request` for compiled callers: int64 function(pool, arrays, layer, n), all int64."""

    function: int  # its address
    pool: int
    arrays: int
    kept: tuple[Any, ...]  # what must live as long as it is used


class EvictionPolicy:
    """Decides which expert leaves when another needs its slot.

    A policy is bound to one pool (`bind`), told of each sequence (`begin_sequence`) and each request
    (`access`), and changes the pool's arrays itself. Subclasses set `name` and `kernels` and build their
    state in `make_state`. One thread at a time; each call is one call into compiled code.
    """

    name: ClassVar[str] = ""
    kernels: ClassVar[Kernels]
    #: True for policies that are made from a trained file (NAME:FILE).
    needs_file: ClassVar[bool] = False
    #: True for policies that a run's report tries on its last requests: without training they lead on some real trace.
    suggested: ClassVar[bool] = False
    #: True for policies that learn weights while they run, which other sessions can go on from: see `learnt`.
    learns: ClassVar[bool] = False
    #: True for policies that want each step's tokens, and what routers say of experts that they do not pick: see
    #: `begin_step` and `rank`.
    needs_ranking: ClassVar[bool] = False
    #: True for policies that know the future: simulator only.
    oracle: ClassVar[bool] = False
    #: Arrays of the state that an option or a trained file sets: no part of what is saved.
    fixed: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._res: Residency | None = None
        self._state: Any = None
        self._pool: Pinned | None = None

    # What subclasses give ---------------------------------------------------------------------------------

    def make_state(self, n_layers: int, n_experts: int) -> Any:
        """A NamedTuple of arrays for L layers of E experts, as at the start of a session."""
        raise NotImplementedError

    def prepare(self, ids: NDArray[np.int16], requests: NDArray[np.int64]) -> None:
        """Look at the whole trace before a replay (only oracles do); requests: see `requests`."""

    def check_model(self, model: Mapping[str, Any]) -> None:
        """Raise PolicyError where the policy was trained for another model than this identity says."""

    # What callers use -------------------------------------------------------------------------------------

    @property
    def residency(self) -> Residency:
        """The pool that this policy is bound to."""
        if self._res is None:
            raise PolicyError(f"policy {self.name!r} is not bound to a pool: call bind(residency) first")
        return self._res

    def bind(self, residency: Residency) -> None:
        """Attach to a pool and start from nothing. Raises PolicyError where the policy does not fit its
        shape."""
        self._res = residency
        self._state = self.make_state(residency.n_layers, residency.n_experts)
        self._pool = Pinned(type(self._state).__name__, (self._state, residency))

    def begin_sequence(self) -> None:
        """A new prompt or conversation begins: what counts "in this sequence" starts again. Slots stay as
        they are."""
        self.kernels.begin(self._state)

    def use_embeddings(self, embed: Callable[[Sequence[int]], NDArray[np.float32]]) -> None:
        """The embeddings of the model's tokens, float32 [n, d], by their ids; of policies with `needs_ranking`."""

    def begin_step(self, tokens: Sequence[int]) -> None:
        """Tokens are about to be evaluated at once: their ids, -1 where unknown. Of policies with `needs_ranking`."""

    def rank(self, layer: int, ids: NDArray[Any], scores: NDArray[Any]) -> None:
        """What a layer's router says of its best experts, for the token of its next access, where that is known.

        ids: [n], -1: none; scores: [n], logarithms of theirs, less the best one's. Of policies with `needs_ranking`.
        """

    def access(self, layer: int, ids: Int32, slots_out: Int32, miss_expert: Int32, miss_slot: Int32) -> int:
        """One request of a layer: hits are pinned, misses get slots. Returns the number of misses m.

        ids: int32 [n] experts, may repeat (micro-batch) and may hold -1 (skipped); slots_out: int32 [n], slot
        of each;
        miss_expert, miss_slot: int32 [>= n], of which [:m] are filled with what must be read, and into which
        slot. The pins hold until the next access of any layer. Returns -1 where there are more distinct
        misses than slots that can be evicted in the layer's size group; then nothing has been evicted or
        counted.
        """
        done = self.request(ids, slots_out, miss_expert, miss_slot)(layer, len(ids))
        return done if done < 0 else done & MISSES

    def request(
        self, ids: Int32, slots_out: Int32, miss_expert: Int32, miss_slot: Int32
    ) -> Callable[[int, int], int]:
        """`access` on these arrays, again and again: call it with (layer, n) for the experts ids[:n].

        The call returns hits << 32 | misses, or -1, and costs little where a model's weights fill the processor's
        caches.
        """
        assert self._pool is not None
        access, pool = self.kernels.access, self._pool
        arrays = Pinned(REQUEST, (ids, slots_out, miss_expert, miss_slot))
        # both live as long as the function does, whatever the policy is bound to later
        return lambda layer, n: access(pool.address, arrays.address, layer, n)

    def compiled_request(
        self, ids: Int32, slots_out: Int32, miss_expert: Int32, miss_slot: Int32
    ) -> CompiledRequest:
        """`request` as an address, for compiled code that makes it without Python."""
        assert self._pool is not None
        arrays = Pinned(REQUEST, (ids, slots_out, miss_expert, miss_slot))
        address = address_of(self.kernels.access, _REQUEST_SIGNATURE)
        return CompiledRequest(address, self._pool.address, arrays.address, (self._pool, arrays))

    def access_each(
        self, layer: int, ids: Int32, slots_out: Int32, miss_expert: Int32, miss_slot: Int32
    ) -> int:
        """One request per token, ids int32 [tokens, k], one after the other; -1 where one does not fit, else 0.

        The other arrays, int32 [>= k], are scratch: what stays is in the pool's arrays.
        """
        wanted = np.empty(ids.shape[1], np.int32)
        one = self.compiled_request(wanted, slots_out, miss_expert, miss_slot)
        return int(access_each(one.function, one.pool, one.arrays, layer, ids, wanted))

    def window(self, tokens: int, k: int) -> None:
        """Call before a step: lend slots to a step of several tokens (prefill), take them back for a single one.

        A layer's experts that a micro-batch needs and that the policy would not keep pass through the window, so that
        prefill does not empty the other layers' shares. What stays resident is what would have stayed had the tokens
        been decoded one by one (`access_each`). The window is residency.window, empty where it is not needed or too
        small to be of use: then a micro-batch is one request (`access`).
        """
        self.kernels.window(self._state, self._res, tokens, k)

    def release(self, layer: int, expert: int) -> int:
        """Free the slot of an expert whose read failed; the slot, or -1 where the expert is not resident."""
        return self.kernels.release(self._state, self.residency, layer, expert)

    def replay(
        self,
        expert_ids: NDArray[Any],
        first: NDArray[np.int64] | None = None,
        starts: NDArray[Any] | None = None,
        want_bits: bool = False,
    ) -> Replay:
        """Run a trace through the policy, from the state it is in.

        expert_ids: [T, L, k], -1 where a layer did not see the token; first: int64 [N+1] token offsets of the
        steps (default: one token each); starts: [N] 1 where a sequence begins, 2 to empty the pool as well
        (default: one sequence). Raises PolicyError where shapes do not fit or a single token does not fit
        into the pool.
        """
        res = self.residency
        if expert_ids.ndim != 3 or expert_ids.shape[1] != res.n_layers:
            raise PolicyError(f"expert ids must be [tokens, {res.n_layers}, k], got {list(expert_ids.shape)}")
        ids = np.ascontiguousarray(expert_ids, np.int16)
        if ids.size and (ids.max() >= res.n_experts or ids.min() < -1):
            raise PolicyError(f"expert ids must lie in 0..{res.n_experts - 1}, got {ids.min()}..{ids.max()}")
        steps = np.arange(len(ids) + 1) if first is None else np.ascontiguousarray(first, np.int64)
        marks = (
            np.zeros(len(steps) - 1, np.uint8) if starts is None else np.ascontiguousarray(starts, np.uint8)
        )
        if starts is None and len(marks):
            marks[0] = 1
        if self.oracle:
            self.prepare(ids, self.requests(steps, ids.shape[2]))
        requests = np.zeros((len(steps) - 1, res.n_layers), np.int64)
        hits = np.zeros_like(requests)
        bits = np.zeros(ids.shape if want_bits else (0, 0, 0), np.uint8)
        longest = int(np.diff(steps).max(initial=1))
        scratch = np.empty((6, longest * ids.shape[2]), np.int32), np.zeros(res.n_experts, np.int64)
        failed = self.kernels.replay(self._state, res, ids, steps, marks, bits, requests, hits, *scratch)
        if failed >= 0:
            raise PolicyError(
                f"step {failed} of the trace needs more experts at once than the pool holds: raise the capacity"
            )
        return Replay(requests, hits, bits)

    def requests(self, steps: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        """The first token of the request that each token is part of, int64 [G, T], in a replay of `steps` [N+1].

        In layers of a size group a step is one request, or one for each of its tokens where it is served through the
        window.
        """
        res, sizes = self.residency, np.diff(steps)
        token = np.arange(int(steps[-1]))
        step = np.repeat(steps[:-1], sizes)
        found = np.empty((len(res.window_count), len(token)), np.int64)
        for group, lent in enumerate(res.window_count.tolist()):
            own = res.group == group
            slots, layers = int(res.quota[own].sum()) + lent, int(own.sum())
            size = partial(window_size, slots, layers, res.n_experts, k)
            windowed = [n for n in np.unique(sizes).tolist() if size(n) > 0]
            found[group] = np.where(np.repeat(np.isin(sizes, windowed), sizes), token, step)
        return found

    def ranking(self) -> Int32:
        """The resident experts in the order in which they would go, int32 [L, E]: the last to go first, then -1."""
        residency, state = deepcopy((self.residency, self._for_victims()))
        order = np.empty(residency.n_slots, np.int32)
        keys = order[: self.kernels.rank(state, residency, order)]
        ranked = np.full((residency.n_layers, residency.n_experts), -1, np.int32)
        for layer in range(residency.n_layers):
            own = keys[keys // residency.n_experts == layer][::-1] % residency.n_experts
            ranked[layer, : len(own)] = own
        return ranked

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of what the policy has learned and observed, for a warm start."""
        return {name: np.array(value) for name, value in self._changing().items()}

    def load_state(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take back what `state` gave. Raises PolicyError for arrays of another policy or shape, or such as it would
        never give, and then changes nothing."""
        if wrong := load_state(self._changing(), arrays, self.limits()):
            raise PolicyError(f"saved state does not fit policy {self.name!r} ({wrong})")

    def learnt(self) -> dict[str, NDArray[Any]]:
        """What is worth keeping for sessions of any pool: weights, no observations. Of policies that `learns` says so
        of."""
        raise NotImplementedError

    def recall(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `learnt` gave, at every `bind` from here on; from nothing with no arrays.

        `make_state` raises PolicyError for arrays of another shape, or such as `learnt` would never give.
        """
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Memory that the state takes when all of it is in use."""
        return sum(array.nbytes for array in _arrays(self._state))

    def limits(self) -> dict[str, Limits]:
        """Least and largest values of the arrays of the state that are used as indices."""
        return {}

    def _for_victims(self) -> Any:
        """The state, without large arrays that `victim` and `evicted` do not read."""
        return self._state

    def _changing(self) -> dict[str, NDArray[Any]]:
        return {name: value for name, value in self._state._asdict().items() if name not in self.fixed}


def _arrays(state: Any) -> Iterator[NDArray[Any]]:
    """Those of a (nested) state."""
    if isinstance(state, np.ndarray):
        yield state
    else:
        for part in state or ():
            yield from _arrays(part)
