"""Training of predictors from routing traces."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from flashmoe.errors import TraceError, UsageError
from flashmoe.learn.train import Plan
from flashmoe.prefetch.base import AHEAD, Predictor
from flashmoe.prefetch.files import PredictorFile
from flashmoe.prefetch.table import Table
from flashmoe.routing.files import split
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate.prefetch import judge

KINDS = ("table", "promoe")
JUDGED = 3000  # held-out tokens that the report judges, at most

#: Called with (what is being done, steps done, steps, loss or None).
Progress = Callable[[str, int, int, float | None], None]


def train(
    trace: RoutingTrace, kind: str = "table", plan: Plan | None = None, progress: Progress | None = None
) -> PredictorFile:
    """Train a predictor of a kind on a trace; returns what `PredictorFile.save` writes.

    Raises UsageError for an unknown kind or without torch where that is needed, TraceError for a trace that is too
    short.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown kind {kind!r}: train one of {', '.join(KINDS)}")
    plan = plan or Plan()
    least = 512 if kind == "promoe" else 2
    if trace.n_tokens < least:
        raise TraceError(f"{trace.n_tokens} tokens are too few to learn from: record at least {least}")
    started = time.monotonic()
    part, rest = split(trace, 1 - plan.held_out) if trace.n_sequences > 1 else (trace, trace)
    trained_on: dict[str, Any] = {
        "tokens": part.n_tokens,
        "sequences": part.n_sequences,
        "held_out_tokens": rest.n_tokens if rest is not trace else 0,
    }
    report: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    if kind == "table":
        arrays = _table(part, plan, progress)
    else:
        try:
            from flashmoe.learn import prefetch_networks
        except ImportError:
            raise UsageError("training needs torch: pip install 'flashmoe-ssd[train]'") from None
        arrays, constants, report["loss"] = prefetch_networks.fit(part, rest, plan, progress)
    trained_on["seconds"] = round(time.monotonic() - started, 1)
    trained = PredictorFile(
        kind,
        arrays,
        trace.n_layers,
        trace.num_experts,
        trace.top_k,
        constants=constants,
        model=dict(trace.model),
        trained_on=trained_on,
        report=report,
    )
    if rest is not trace:
        trained.report["held_out"] = found(trained, rest)
    return trained


def _table(trace: RoutingTrace, plan: Plan, progress: Progress | None) -> dict[str, Any]:
    """One pass (or more, with `plan.epochs`) of the table's own learning."""
    table = Table()
    table.bind(trace.n_layers, trace.num_experts, trace.top_k)
    starts = trace.begins()
    epochs = plan.epochs or 1
    for epoch in range(epochs):
        for a in range(0, trace.n_tokens, 1000):
            piece = slice(a, a + 1000)
            table.learn_text(trace.expert_ids[piece], trace.token_id[piece], starts[piece])
            if progress:
                done = epoch * trace.n_tokens + min(a + 1000, trace.n_tokens)
                progress("learning", done, epochs * trace.n_tokens, None)
    table.begin_sequence()
    return table.state()


def found(trained: PredictorFile, trace: RoutingTrace) -> dict[str, dict[str, float]]:
    """Recall with k and 2k guesses on (a part of) a trace: {"token", "1", "2", "4"} -> {"k", "2k"}."""
    predictor: Predictor
    if trained.kind == "table":
        predictor = Table(trained=trained)
    else:
        from flashmoe.prefetch.promoe import ProMoE

        predictor = ProMoE(trained=trained)
    first = trace.rows(np.arange(min(JUDGED, trace.n_tokens)))
    counts = judge(first, predictor, [])
    k, most = trace.top_k, counts.shape[2] - 1
    return {
        ("token" if ahead == 0 else str(ahead)): {
            name: round(float(counts[c, 0, g - 1, 0] / max(1, counts[c, 0, most, 0])), 4)
            for name, g in (("k", k), ("2k", most))
        }
        for c, ahead in enumerate(AHEAD)
    }
