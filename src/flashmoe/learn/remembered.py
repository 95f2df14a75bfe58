"""`flashmoe learn`: trains `flashmoe+` from the routing that is remembered of a model, and keeps it if it is better.

The newest part of the history is not trained on: there the policy is compared with what the model would run with
otherwise, both having seen the older part.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmoe.cache.policies import create
from flashmoe.cache.policies.adaptive import Adaptive
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.policies.belady import Belady
from flashmoe.cache.policies.default import untaught_default
from flashmoe.cache.policies.flashmoe_plus import FEATURES
from flashmoe.cache.policies.learned import PolicyFile
from flashmoe.cache.policies.lru import Lru
from flashmoe.cache.policies.online import LARGEST
from flashmoe.cache.remembered import KIND, Remembered
from flashmoe.common.plugins import DEFAULT
from flashmoe.errors import TraceError
from flashmoe.learn import plus
from flashmoe.learn.plus import PER_BATCH
from flashmoe.learn.plus_shape import CHANNEL_DECAYS, DECAYS, Sizes
from flashmoe.learn.samples import SEGMENT, Samples
from flashmoe.routing.files import split
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate.expected import slots_of
from flashmoe.simulate.replay import replay

LEAST = 1024  # tokens
LEARNT = "learnt"  # what the policy that has it as a member is called in reports
HELD_OUT = 0.1  # of the history, the newest: what is judged on
BASE_BYTES = 384 << 20  # Python with numpy and numba, while it compiles
LEAD = 0.002  # in hit rate, that makes a policy better


@dataclass(frozen=True)
class Verdict:
    """The result of learning. Hit rates of the newest part: {capacity: {policy: rate}}."""

    tokens: int  # trained on
    held_out_tokens: int
    seconds: float
    loss: list[float]  # of each epoch
    held_out: dict[str, dict[str, float]]
    better: bool  # by LEAD on average than what is used otherwise: it is used from the next start on

    def as_dict(self) -> dict[str, Any]:
        """As written to JSON."""
        return dict(self.__dict__)


def learn(
    remembered: Remembered,
    progress: plus.Progress | None = None,
    sizes: Sizes | None = None,
) -> Verdict:
    """Train, judge, and keep the policy if it is better; an earlier one that is no better is deleted.

    Raises TraceError where too little is remembered, PolicyError where the file cannot be written.
    """
    trace = remembered.history()
    tokens = trace.n_tokens if trace else 0
    if trace is None or tokens < LEAST:
        raise TraceError(
            f"{tokens} tokens of this model's routing are remembered, learning takes at least {LEAST}: use it for a "
            "while (flashmoe run, chat or serve), or train on traces with `flashmoe train policy`"
        )
    started = time.monotonic()
    old, new = split(trace, 1 - HELD_OUT)
    sizes = sizes or Sizes()
    weights, loss = plus.train(Samples(old, DECAYS), sizes, progress=progress)
    trained = PolicyFile(
        kind=KIND,
        arrays=plus.export(weights, sizes),
        n_layers=trace.n_layers,
        n_experts=trace.num_experts,
        top_k=trace.top_k,
        features=FEATURES,
        constants=sizes.constants,
        model=dict(trace.model),
        trained_on={
            "tokens": old.n_tokens,
            "sequences": old.n_sequences,
            "held_out_tokens": new.n_tokens,
            "epochs": len(loss),
            "seconds": round(time.monotonic() - started, 1),
        },
    )
    usual = untaught_default(trace.model)
    rates = compare(trace, new.n_tokens, {
        "lru": Lru, DEFAULT: lambda: create(usual), LEARNT: lambda: Adaptive(trained=trained), "belady": Belady,
    })  # fmt: skip
    better = bool(rates) and np.mean([row[LEARNT] - row[DEFAULT] for row in rates.values()]) >= LEAD
    trained.report.update(held_out=rates)
    if better:
        trained.save(remembered.policy)
    else:
        remembered.policy.unlink(missing_ok=True)
    return Verdict(
        old.n_tokens, new.n_tokens, round(time.monotonic() - started, 1), loss, rates, bool(better)
    )


def memory_for(remembered: Remembered) -> int:
    """Bytes that `learn` takes at most in a process of its own."""
    trace = remembered.history()
    if trace is None:
        return BASE_BYTES
    sizes, experts = Sizes(), trace.n_layers * trace.num_experts
    channels = len(CHANNEL_DECAYS) + 1
    per_layer = channels * sizes.r * sizes.h + trace.num_experts * (sizes.r + sizes.k * (sizes.h + 1))
    weights = 4 * 4 * trace.n_layers * per_layer  # values, gradients, two moments
    samples = trace.n_tokens // SEGMENT * experts * (4 * len(DECAYS) + 8 + 8)
    rows = PER_BATCH * SEGMENT
    batches = 3 * rows * (experts * (4 * len(DECAYS) + 16) + 4 * 4 * trace.n_layers * channels * sizes.r)
    replayed = trace.n_tokens * trace.n_layers * (8 * trace.top_k + 64)
    return BASE_BYTES + weights + samples + batches + replayed + LARGEST


def compare(
    trace: RoutingTrace, newest: int, policies: dict[str, Callable[[], EvictionPolicy]]
) -> dict[str, dict[str, float]]:
    """Hit rates on the last `newest` tokens of a trace, of which the policies have seen the rest."""
    steps = trace.steps()
    judged = steps[:-1] >= trace.n_tokens - newest
    found: dict[str, dict[str, float]] = {}
    for name, slots in slots_of(trace).items():
        replays = {label: replay(trace, make(), slots) for label, make in policies.items()}
        found[name] = {
            label: round(float(r.hits[judged].sum() / max(1, r.requests[judged].sum())), 4)
            for label, r in replays.items()
        }
    return found
