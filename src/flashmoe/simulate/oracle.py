"""Belady's oracle for what counts while decoding: evict the expert that a decode step will ask for last.

A prompt reads most experts anyhow, and its requests do not count here; what Belady would keep for their sake (see
policies/belady.py) are hits lost to the tokens after it. Without prompts the two are the same. Like Belady's, it is the
best within a layer's share; what layers lend each other around prompts is not planned by it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.policies.belady import Belady, BeladyState, requests_of

_NEVER = 1 << 40  # later than any request


class DecodeOracle(Belady):
    """Replays what it was told by `set_future`, in one go or in pieces, from whatever its pool holds."""

    oracle = False  # a replay does not look at its trace itself

    def set_future(self, ids: NDArray[np.int16], first: NDArray[np.int64], decode: NDArray[np.bool_]) -> None:
        """All that will be replayed: ids [T, L, k], its steps [N+1], and which of them decode [N]."""
        n_layers, n_experts = self.residency.n_layers, self.residency.n_experts
        requests, group = self.requests(first, ids.shape[2]), self.residency.group
        counts = np.repeat(decode, np.diff(first))
        uses = np.zeros(ids.size, np.int64)
        begin = np.zeros(n_layers * n_experts + 1, np.int64)
        uses = uses[: requests_of(ids, requests, group, n_experts, uses, begin)]
        # of each use, the next one from there that counts: a running minimum from the end, each expert's for itself
        own = np.repeat(np.arange(n_layers * n_experts), np.diff(begin)) * _NEVER
        when = own + np.where(counts[uses // n_layers], uses, _NEVER - 1)
        following = np.append(np.minimum.accumulate(when[::-1])[::-1] - own, _NEVER)
        next_use = begin[:-1].reshape(n_layers, n_experts).copy()
        asked = np.diff(begin).reshape(n_layers, n_experts) > 0
        score = np.where(asked, -following[next_use].astype(np.float64), -np.inf)
        self._state = BeladyState(score, following, begin, next_use)
