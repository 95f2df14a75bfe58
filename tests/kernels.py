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
from flashmoe.cache.policies import EvictionPolicy
from flashmoe.cache.residency import make_residency
from flashmoe.routing.trace import RoutingTrace
from flashmoe.runtime.chosen import compile_policy
from flashmoe.storage.hub import DEMO, default_policy

LAYERS, EXPERTS, K = 8, 32, 4  # the bundled model's, for its trained policy


def policy_of(name: str) -> EvictionPolicy:
    """A policy; those that learn with the bundled weights, or with random ones."""
    if name == "flashmoe":
        from tests.learn.test_learned import policy_of, untrained

        return policy_of(untrained(name, LAYERS, EXPERTS, K))
    trained = default_policy(DEMO)
    specs = {"flashmoe+": trained, "adaptive:FILE": trained.replace("flashmoe+", "adaptive")}
    return policies.create(specs.get(name, name))


def compile_policies(name: str) -> None:
    """All entry points of a policy: the runtime's and the simulator's."""
    policy = policy_of(name)
    if not policy.oracle:
        compile_policy(policy, LAYERS, EXPERTS, ranking=True)
    policy.bind(make_residency(LAYERS, EXPERTS, np.full(LAYERS, K, np.int32)))
    policy.replay(np.zeros((1, LAYERS, K), np.int16))


def compile_predictor(name: str) -> None:
    """What a predictor compiles, in prompts and while decoding, and what judges it."""
    from flashmoe.simulate.prefetch import judge
    from tests.prefetch.test_predictors import make

    ids = np.arange(4 * LAYERS * K, dtype=np.int16).reshape(4, LAYERS, K) % EXPERTS
    steps, tokens = np.array([0, 0, 1, 2], np.int32), np.arange(4, dtype=np.int32)
    trace = RoutingTrace(ids, EXPERTS, token_id=tokens, step=steps)
    judge(trace, make(name, LAYERS, EXPERTS, K), [LAYERS * EXPERTS])


def compile_callback() -> None:
    """The compiled half of the eval callback, and what llama.cpp's server calls: compiled when they are imported."""
    import flashmoe.engines.llamacpp.serving.borrow  # noqa: F401
    from flashmoe.engines.llamacpp import rewriting

    rewriting.compile_kernels()


def main() -> None:
    """The longest first, so that all cores end at about the same time."""
    longest = ("adaptive:FILE", "adaptive", "arc")
    order = [*longest, *(name for name in policies.BUILTIN if name not in longest)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        running = [pool.submit(compile_callback), *(pool.submit(compile_policies, name) for name in order)]
        running += [
            pool.submit(compile_predictor, name)
            for name in ("table", "gate", "moe-infinity", "finemoe", "promoe")
        ]
        for future in running:
            future.result()


if __name__ == "__main__":
    main()
