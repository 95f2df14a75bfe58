"""An eviction policy as a plug-in: first in, first out.

Another package registers it in its pyproject.toml, and then `--policy fifo` finds it, in the simulator as well:

    [project.entry-points."flashmoe.policies"]
    fifo = "fifo_policy:Fifo"

`python examples/fifo_policy.py` checks it against what a policy promises.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.kernels import entries as loops
from flashmoe.cache.policies import EvictionPolicy
from flashmoe.cache.residency import check_residency, make_residency


class FifoState(NamedTuple):
    """The name must be unique: numba names compiled code after it."""

    inserted: NDArray[np.float64]  # [L, E] step in which an expert came in


# numba compiles these two, which have no annotations and exactly these arguments; there are two more, see
# flashmoe.cache.kernels.entries
def record(st, res, layer, ids, n):
    """The distinct experts ids[:n] are requested; residency is still as before: slot_of >= 0 is a hit."""
    for i in range(n):
        if res.slot_of[layer, ids[i]] < 0:
            st.inserted[layer, ids[i]] = res.step[0]


def victim(st, res, layer, g):
    """The slot to evict: of this layer, or with layer < 0 of any layer in size group g."""
    return loops.lowest(st.inserted, res, layer, g)


class Fifo(EvictionPolicy):
    """First in, first out."""

    name = "fifo"
    kernels = loops.compiled(FifoState, record, victim)

    def make_state(self, n_layers: int, n_experts: int) -> FifoState:
        return FifoState(np.zeros((n_layers, n_experts)))


def main() -> None:
    policy = Fifo()
    policy.bind(make_residency(n_layers=1, n_experts=8, quota=[2]))
    requests = np.array([0, 1, 0, 2, 0, 1], np.int16).reshape(-1, 1, 1)
    outcomes = policy.replay(requests, want_bits=True).bits.ravel().tolist()
    assert outcomes == [1, 1, 2, 1, 1, 1]  # 1 a miss, 2 a hit: expert 0 goes first although it was just used
    check_residency(policy.residency)
    print("fifo: as a policy should be")


if __name__ == "__main__":
    main()
