"""Where the tests find real routing traces, and small made-up ones."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from flashmoe.routing.files import read
from flashmoe.routing.trace import RoutingTrace

VALIDATION = "deepseek-v2-lite-puffin-validation.npz"


def folder() -> Path:
    """The folder of real traces: FLASHMOE_TRACES, else shared/traces beside the repository."""
    default = Path(__file__).parents[2].parent / "shared" / "traces"
    return Path(os.environ.get("FLASHMOE_TRACES", default))


@cache
def real(name: str) -> RoutingTrace:
    """A real trace; skips the test where it is absent."""
    path = folder() / name
    if not path.is_file():
        pytest.skip(f"real routing traces are not here: {path} (set FLASHMOE_TRACES to their folder)")
    return read(path)


def made_up(tokens: int = 300, layers: int = 3, experts: int = 16, k: int = 2, seed: int = 0) -> RoutingTrace:
    """A trace with skewed, drifting popularity in sequences of about 30 tokens."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.2, (layers, experts))
    sequence = np.arange(tokens) // 30
    ids = np.empty((tokens, layers, k), np.int16)
    for t in range(tokens):
        if t % 30 == 0:
            topic = rng.normal(0, 1.2, (layers, experts))
        noise = rng.gumbel(0, 1, (layers, experts))
        ids[t] = np.argsort(-(logits + topic + noise), axis=1)[:, :k]
    return RoutingTrace(ids, experts, sequence_id=sequence.astype(np.int32), model={"name": "made up"})
