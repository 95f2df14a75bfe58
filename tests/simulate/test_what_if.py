"""What the last requests would have missed otherwise: the same as a replay of them from the start."""

from __future__ import annotations

from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmoe
from flashmoe.cache.policies import create, suggested
from flashmoe.cache.policies.lru import Lru
from flashmoe.cache.recent import IDS, RecentRouting
from flashmoe.cache.residency import equal_quota, make_residency
from flashmoe.cache.sizing import shares
from flashmoe.simulate import what_if
from flashmoe.simulate.what_if import MOST_REQUESTS, WhatIf
from tests.simulate.traces import made_up

EXPERTS, LAYERS, K = 16, 3, 2
TEXT = (
    "A mixture of experts has many small networks in each layer, and a router that picks a few of them for every "
    "token. So a large model computes little, but all of its weights must be at hand. "
)


def noted(ids: np.ndarray, begins: np.ndarray) -> RecentRouting:
    """All of ids [T, L, k] noted, with the tokens [T] at which a sequence begins."""
    recent = RecentRouting([ids.shape[2]] * ids.shape[1], EXPERTS)
    for step, new in zip(ids.astype(np.int32), begins, strict=True):
        if new:
            recent.begin_sequence()
        recent.begin_step(1)
        for layer, experts in enumerate(step):
            recent.add(layer, experts)
    return recent


def replayed(spec: str, ids: np.ndarray, begins: np.ndarray, slots: int) -> int:
    """Misses by the simulator's loop, first uses left out."""
    policy = create(spec)
    policy.bind(make_residency(LAYERS, EXPERTS, equal_quota(slots, LAYERS, EXPERTS)))
    found = policy.replay(ids, starts=begins)
    first_uses = sum(len(np.unique(ids[:, layer])) for layer in range(LAYERS))
    return int((found.requests - found.hits).sum()) - first_uses


def run(recent: RecentRouting, slots: int) -> WhatIf:
    """Of a run with LRU and that many slots."""
    own = create("lru")
    own.bind(make_residency(LAYERS, EXPERTS, equal_quota(slots, LAYERS, EXPERTS)))
    return WhatIf(recent, own)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 200),
    slots=st.integers(K * LAYERS, EXPERTS * LAYERS),
    factor=st.sampled_from([1.0, 1.25, 2.0]),
    begin=st.integers(0, 199),
)
def test_the_simulator_says_the_same(seed: int, tokens: int, slots: int, factor: float, begin: int) -> None:
    ids, begins = made_up(tokens, LAYERS, EXPERTS, K, seed).expert_ids, np.zeros(tokens, np.uint8)
    begins[[0, begin % tokens]] = 1
    what = run(noted(ids, begins), slots)
    larger = min(int(slots * factor), EXPERTS * LAYERS)
    assert what.larger(factor) == replayed("lru", ids, begins, larger)
    for spec, missed in what.others(["lfu", "lfu-aged"]).items():
        assert missed == replayed(spec, ids, begins, slots)
    assert what.larger(EXPERTS) == 0  # every expert has a slot


def test_only_the_last_requests_count() -> None:
    """The ring forgets, and only so much of it is replayed."""
    ids = made_up(3 * IDS // K, LAYERS, EXPERTS, K).expert_ids
    begins = np.zeros(len(ids), np.uint8)
    begins[-10] = 1
    kept, marks = noted(ids, begins).last()
    assert (kept == ids[-IDS // K :]).all()
    assert np.flatnonzero(marks).tolist() == [len(marks) - 10]
    last = MOST_REQUESTS // LAYERS
    assert last < len(kept) * LAYERS
    assert run(noted(ids, begins), 12).larger(1.0) == replayed("lru", kept[-last:], marks[-last:], 12)


def test_nothing_noted_yet() -> None:
    what = run(RecentRouting([K] * LAYERS, EXPERTS), 12)
    assert what.larger(1.0) == what.larger(2.0) == 0


def test_nobody_waits_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that is not compiled is left out, and can be compiled afterwards."""

    class New(Lru):
        name = "new"
        kernels = Lru.kernels._replace(access=numba.njit(lambda *_: 0))

    monkeypatch.setattr(what_if, "create", lambda spec: New() if spec == "new" else create(spec))
    begins = np.zeros(50, np.uint8)
    what = run(noted(made_up(50, LAYERS, EXPERTS, K).expert_ids, begins), 12)
    compiled = create("lfu")
    compiled.bind(make_residency(LAYERS, EXPERTS, [4] * LAYERS))
    compiled.access(0, np.zeros(1, np.int32), *np.zeros((3, 1), np.int32))
    assert list(what.others(["new", "lfu"])) == ["lfu"]
    assert New.kernels.access.signatures == []
    assert New.kernels.access(1) == 0


def test_no_policy_is_begun_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(what_if, "MOST_SECONDS", -1.0)
    assert run(RecentRouting([K] * LAYERS, EXPERTS), 12).others(suggested()) == {}


def test_shares_that_hold_no_token() -> None:
    assert shares(13, 3, EXPERTS, 4).tolist() == [5, 4, 4]
    assert shares(7, 3, EXPERTS, 4).tolist() == [4, 3, 0]
    assert shares(8, 3, EXPERTS, 4).tolist() == [4, 4, 0]


def test_the_advice_is_right(demo: Path) -> None:
    """LRU with the bundled model: another policy is named, and the model's own misses as few as was promised."""
    misses: dict[str | None, int] = {}
    for policy in (None, "lru"):
        with flashmoe.load("demo", cache="20%", prefetch="none", threads=1, policy=policy) as model:
            tokens = model.engine.tokenize(TEXT * 2)
            model.decoder.evaluate(tokens[:1], decode=False)
            for token in tokens[1:]:
                model.decoder.evaluate([token], decode=True)
            misses[policy] = model.cache.stats["decode"].misses
            if policy == "lru":
                what = WhatIf(model.cache.recent, model.cache.policy)
                own = model.alternatives[0]
                promised = what.others([own])[own] - what.larger(1.0)
                model.telemetry.decode.seconds, model.cache.stats["decode"].stall_seconds = 10.0, 9.0
                found = model.report()
    assert misses[None] - misses["lru"] == pytest.approx(promised, rel=0.05)
    assert found.advice["policy"] in found.advice["policies_tokens_per_second"]
    assert any(", policy " in line for line in found.lines())
