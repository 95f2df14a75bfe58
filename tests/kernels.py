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
from flashmoe.prefetch import create_all
from flashmoe.runtime.load import compile_policy
from flashmoe.storage.hub import DEMO, default_policy

LAYERS, EXPERTS, K = 8, 32, 4  # the bundled model's, for its trained policy
PREDICTORS = ("table", "moe-infinity")  # those that need no file


def compile_all(spec: str) -> None:
    """All entry points of a policy: the runtime's and the simulator's."""
    policy = policies.create(spec)
    if not policy.oracle:
        compile_policy(policy, LAYERS, EXPERTS, ranking=True)
    policy.bind(make_residency(LAYERS, EXPERTS, np.full(LAYERS, K, np.int32)))
    policy.replay(np.zeros((1, LAYERS, K), np.int16))


def compile_predictor(spec: str) -> None:
    """What a predictor compiles when it is fitted to a model."""
    for predictor in create_all(spec):
        predictor.bind(LAYERS, EXPERTS, K)


def main() -> None:
    """The longest first, so that all cores end at about the same time."""
    untrained = [name for name in policies.BUILTIN if not name.startswith("flashmoe")]
    order = sorted([*untrained, default_policy(DEMO)], key=lambda name: name not in ("adaptive", "arc"))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        running = [pool.submit(compile_all, spec) for spec in order]
        running += [pool.submit(compile_predictor, spec) for spec in PREDICTORS]
        for future in running:
            future.result()


if __name__ == "__main__":
    main()
