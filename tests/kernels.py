"""Compiles the kernels of policies and predictors ahead of the tests, one process a core.

python -m tests.kernels, which `make test` begins with: in a clean checkout the tests would wait for them one after the
other, for minutes. They are kept on disk, where the tests find them; where they are already, it takes two seconds.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from flashmoe.cache import policies
from flashmoe.cache.residency import make_residency
from flashmoe.hub import DEMO, default_policy
from flashmoe.prefetch import create_all

LAYERS, EXPERTS, K = 8, 32, 4  # the bundled model's, for its trained policy
PREDICTORS = ("table", "moe-infinity")  # those that need no file


def compile_policy(spec: str) -> None:
    """All entry points of a policy."""
    policy = policies.create(spec)
    policy.bind(make_residency(LAYERS, EXPERTS, np.full(LAYERS, K, np.int32)))
    policy.replay(np.zeros((1, LAYERS, K), np.int16))
    if policy.oracle:
        return
    ids, out = np.zeros(1, np.int32), np.zeros((3, 1), np.int32)
    policy.begin_sequence()
    policy.access(0, ids, out[0], out[1], out[2])
    policy.access_each(0, ids[np.newaxis], out[0], out[1], out[2])
    policy.window(1, 1)
    policy.ranking()
    policy.release(0, 0)


def compile_predictor(spec: str) -> None:
    """What a predictor compiles when it is fitted to a model."""
    for predictor in create_all(spec):
        predictor.bind(LAYERS, EXPERTS, K)


def main() -> None:
    """The longest first, so that all cores end at about the same time."""
    untrained = [name for name in policies.BUILTIN if not name.startswith("flashmoe")]
    order = sorted([*untrained, default_policy(DEMO)], key=lambda name: name not in ("adaptive", "arc"))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        running = [pool.submit(compile_policy, spec) for spec in order]
        running += [pool.submit(compile_predictor, spec) for spec in PREDICTORS]
        for future in running:
            future.result()


if __name__ == "__main__":
    main()
