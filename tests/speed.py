"""How long compiled code takes against limits: `python -m tests.speed`, on a machine without other work.

The limits are several times what is usual, so that what exceeds one has been compiled differently or calls Python.
These are no tests: how long a thing takes depends on what else the machine does. Exit status 1: a limit is exceeded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from flashmoe.cache.policies import create
from flashmoe.cache.residency import equal_quota, make_residency
from tests.learn.test_learned import policy_of, untrained
from tests.prefetch.test_predictors import make
from tests.simulate.traces import VALIDATION, folder, made_up, real


class Speed(NamedTuple):
    """Microseconds of CPU time: of the fastest round, and the limit."""

    name: str
    taken: float
    limit: float


def fastest(work: Callable[[], object], calls: int = 1, rounds: int = 10) -> float:
    """Microseconds of CPU time of a call, in the fastest of some rounds of `calls`; the first may compile."""
    times = []
    for _ in range(rounds + 1):
        began = time.process_time()
        work()
        times.append((time.process_time() - began) / calls * 1e6)
    return min(times[1:])


def replays() -> Iterator[Speed]:
    """Four million requests of a real trace, by LRU."""
    if not (folder() / VALIDATION).is_file():
        return
    trace, policy = real(VALIDATION), create("lru")

    def replay() -> None:
        policy.bind(make_residency(26, 64, equal_quota(416, 26, 64)))
        policy.replay(trace.expert_ids, trace.steps(), trace.starts())

    yield Speed("replay of a real trace, LRU", fastest(replay, rounds=3), 1e6)


def policies() -> Iterator[Speed]:
    """A request of a layer of the policies with networks, called from Python as the cache calls it."""
    for experts, limit in ((64, 60), (128, 100)):
        trace = made_up(60, 16, experts, 8)
        ids = np.ascontiguousarray(trace.expert_ids, np.int32)
        for kind in ("flashmoe", "flashmoe+"):
            policy = policy_of(untrained(kind, 16, experts, 8))
            policy.bind(make_residency(16, experts, equal_quota(4 * experts, 16, experts)))
            wanted, *out = (np.zeros(8, np.int32) for _ in range(4))
            request = policy.request(wanted, *out)

            def decode(ids=ids, wanted=wanted, request=request) -> None:  # type: ignore[no-untyped-def]
                for token in ids:
                    for layer in range(16):
                        wanted[:] = token[layer]
                        request(layer, 8)

            yield Speed(f"request, {kind}, {experts} experts", fastest(decode, 60 * 16), limit)


def predictors() -> Iterator[Speed]:
    """The calls of `table` for a layer."""
    predictor = make("table", 26, 64, 6)
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(64)[:6] for _ in range(26)]).astype(np.int32)
    out = np.zeros(64, np.float32)

    def observe() -> None:
        for token in range(40):
            predictor.begin_step(token % 7)
            for layer in range(25):
                predictor.observe(layer, ids[layer])

    def predict() -> None:
        for _ in range(40):
            for layer in range(25):
                predictor.predict(layer, layer + 1, out)

    yield Speed("table, observing a layer", fastest(observe, 40 * 25), 60)
    yield Speed("table, predicting a layer", fastest(predict, 40 * 25), 25)


def main() -> None:
    slow = False
    for part in (replays, policies, predictors):
        for name, taken, limit in part():
            print(f"{name}: {taken:,.1f} us, limit {limit:,.0f}{'' if taken < limit else ': TOO SLOW'}")
            slow |= taken >= limit
    sys.exit(slow)


if __name__ == "__main__":
    main()
