"""The policy and the predictors that a model is loaded with: made, checked against it, and compiled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from flashmoe.cache.policies import create
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.remembered import Remembered
from flashmoe.cache.residency import make_residency
from flashmoe.common import memory
from flashmoe.engines.llamacpp import rewriting
from flashmoe.prefetch import Predictor, scheduler
from flashmoe.prefetch import create_all as create_predictors
from flashmoe.routing.approximation import parse as parse_approx
from flashmoe.runtime.options import LLAMACPP, LoadOptions
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.hub import default_policy

MOST_FOR_PREDICTING = 0.02  # of the budget: slots are worth more


class Chosen:
    """`check` them when the model's experts are known, and `prepare` them before memory is counted."""

    def __init__(self, model: str | Path, options: LoadOptions) -> None:
        """Raises PolicyError and PredictorError for names that are not known."""
        self._options = options
        #: Whether the policy goes on from what earlier sessions have learnt, and leaves that to the next ones.
        self.learns = options.learn and options.engine == LLAMACPP
        #: Makes another policy of the kind that was asked for.
        self.make_policy = partial(create, options.policy or default_policy(model))
        self.policy = self.make_policy()  # names are known to be good before anything is downloaded
        self.predictors = create_predictors(options.prefetch)

    def check(self, catalog: ExpertCatalog) -> None:
        """Take what was learnt of the model. Raises PolicyError where the policy is not for it."""
        if self.learns:
            remembered = Remembered(catalog.identity)
            if self._options.policy is None and (learnt := remembered.trained()):
                self.make_policy = partial(create, learnt)
                self.policy = self.make_policy()
            remembered.recall(self.policy, len(catalog.layers), catalog.n_experts)
        self.policy.check_model(catalog.identity)

    def prepare(self, catalog: ExpertCatalog, limit: int) -> int:
        """Compile what is compiled; the bytes that policy and predictors take of a budget of `limit`, 0 for none."""
        ranking = bool(limit or self._options.save_cache)
        compile_policy(self.policy, len(catalog.layers), catalog.n_experts, ranking=ranking)
        if self.predictors:
            scheduler.compile_kernels()
        if self._options.engine == LLAMACPP:
            import flashmoe.engines.llamacpp.serving.borrow  # noqa: F401 - compiles what the server borrows

            if parse_approx(self._options.approx) is not None:
                rewriting.compile_kernels()
        self.predictors = _bind(self.predictors, catalog, limit if self._options.prefetch == "auto" else 0)
        memory.release_code()
        return self.policy.nbytes + sum(p.nbytes for p in self.predictors)


def _bind(predictors: Sequence[Predictor], catalog: ExpertCatalog, limit: int) -> list[Predictor]:
    """The predictors, compiled and fitted to the model; under a limit only those that take little of it.

    Raises PredictorError.
    """
    most = MOST_FOR_PREDICTING * limit if limit else float("inf")
    for predictor in predictors:
        predictor.check_model(catalog.identity)
        if limit:
            predictor.restrict(int(most))
        predictor.bind(len(catalog.layers), catalog.n_experts, catalog.top_k)
    return [p for p in predictors if p.nbytes <= most]


def compile_policy(policy: EvictionPolicy, n_layers: int, n_experts: int, *, ranking: bool) -> None:
    """Let numba compile the policy's kernels before memory is counted and before the first token waits for it."""
    policy.bind(make_residency(n_layers, n_experts, np.ones(n_layers, np.int32)))
    ids, out = np.zeros(1, np.int32), np.zeros((3, 1), np.int32)
    policy.begin_sequence()
    policy.access(0, ids, out[0], out[1], out[2])
    policy.request(ids, out[0], out[1], out[2])(0, 1)
    policy.compiled_request(ids, out[0], out[1], out[2])
    policy.access_each(0, ids[np.newaxis], out[0], out[1], out[2])
    policy.window(1, 1)
    if ranking:
        policy.ranking()
    policy.release(0, 0)
