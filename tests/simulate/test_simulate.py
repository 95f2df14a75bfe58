"""The simulator: exact against libcachesim, equal to the runtime's calls, never better than the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from flashmoe.cache.policies import create, without_file
from flashmoe.cache.policies.default import default_for
from flashmoe.cache.residency import equal_quota, make_residency
from flashmoe.cli.simulate import simulate as command
from flashmoe.errors import FlashMoEError, UsageError
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate import report
from flashmoe.simulate.partition import lru_curves, weighted_quota
from flashmoe.simulate.replay import Row, parse_capacities, parse_policies, replay, simulate
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.gguf import read_gguf
from flashmoe.storage.hub import DEMO, default_policy
from tests.simulate.traces import VALIDATION, made_up, real

PLAIN = without_file()


def libcachesim_hits(name: str, requests: list[int], size: int) -> int:
    """Hits of libcachesim's LRU, LFU or Belady on single requests, `size` slots."""
    lcs = pytest.importorskip(
        "libcachesim", reason="libcachesim is a test dependency: pip install libcachesim"
    )
    cache = getattr(lcs, name)(size)
    following: dict[int, int] = {}
    ahead = []
    for t in range(len(requests) - 1, -1, -1):
        ahead.append(following.get(requests[t], 2**62))
        following[requests[t]] = t
    hits = 0
    for e, after in zip(requests, reversed(ahead), strict=True):
        hits += cache.get(lcs.Request(obj_id=e, obj_size=1, next_access_vtime=after))
    return hits


@pytest.mark.parametrize(("ours", "theirs", "options"), [
    ("lru", "LRU", {}), ("lfu", "LFU", {"forget": True}), ("belady", "Belady", {}),
])  # fmt: skip
@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_equal_to_libcachesim(ours: str, theirs: str, options: dict[str, Any], size: int) -> None:
    rng = np.random.default_rng(size)
    popularity = rng.dirichlet(np.full(32, 0.3))
    ids = rng.choice(32, 20_000, p=popularity).astype(np.int16).reshape(-1, 1, 1)
    policy = create(ours, **options)
    policy.bind(make_residency(1, 32, [size]))
    assert int(policy.replay(ids).hits.sum()) == libcachesim_hits(theirs, ids.ravel().tolist(), size)


@pytest.mark.parametrize("layer", [0, 12, 25])
@pytest.mark.parametrize(("ours", "theirs"), [("lru", "LRU"), ("belady", "Belady")])
def test_equal_to_libcachesim_on_a_real_layer(ours: str, theirs: str, layer: int) -> None:
    """Top-1 of a real layer, one request at a time."""
    ids = real(VALIDATION).expert_ids[:, layer : layer + 1].reshape(-1, 1, 1)[:60_000]
    policy = create(ours)
    policy.bind(make_residency(1, 64, [16]))
    assert int(policy.replay(ids).hits.sum()) == libcachesim_hits(theirs, ids.ravel().tolist(), 16)


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "belady"])
@given(seed=st.integers(0, 2**32 - 1), slots=st.integers(2, 6), layers=st.integers(1, 3))
@settings(max_examples=30)
def test_belady_is_never_beaten(name: str, seed: int, slots: int, layers: int) -> None:
    trace = made_up(80, layers, 7, 2, seed)
    best = replay(trace, create("belady"), slots * layers)
    assert replay(trace, create(name), slots * layers).hits.sum() <= best.hits.sum()


@pytest.mark.parametrize("partition", ["per-layer", "weighted", "global"])
@pytest.mark.parametrize("name", [name for name in PLAIN if name != "belady"])
def test_equal_to_the_calls_of_the_runtime(name: str, partition: str) -> None:
    """Micro-batches, layers that see only the last token, several sequences: request by request."""
    trace = made_up(240)
    step = np.repeat(np.arange(240), 1)
    step[:20], step[90:95] = 0, 90
    ids = trace.expert_ids.copy()
    ids[:19, 2] = -1
    trace = RoutingTrace(ids, 16, sequence_id=trace.sequence_id, step=step.astype(np.int32))
    simulated = replay(trace, create(name), 24, partition, want_bits=True)
    policy = create(name)
    quota = weighted_quota(trace, 24) if partition == "weighted" else equal_quota(24, 3, 16)
    policy.bind(make_residency(3, 16, quota, partition=partition))
    offsets, starts = trace.steps(), trace.starts()
    out = [np.zeros(64, np.int32) for _ in range(3)]
    for s in range(len(offsets) - 1):
        if starts[s]:
            policy.begin_sequence()
        policy.window(int(offsets[s + 1] - offsets[s]), ids.shape[2])
        for layer in range(3):
            tokens = ids[offsets[s] : offsets[s + 1], layer]
            rows = tokens.ravel()
            want = rows[rows >= 0].astype(np.int32)
            resident = policy.residency.slot_of[layer, want] >= 0
            if policy.residency.window_count.any():
                seen = tokens[tokens[:, 0] >= 0].astype(np.int32)
                assert policy.access_each(layer, seen, *out) == 0
            else:
                assert policy.access(layer, want, *out) == len(np.unique(want[~resident]))
            bits = simulated.bits[offsets[s] : offsets[s + 1], layer].ravel()[rows >= 0]
            assert (bits[bits > 0] == np.where(resident[bits > 0], 2, 1)).all()
            assert simulated.requests[s, layer] == len(np.unique(want))


def test_cold_starts_and_micro_batches_that_do_not_fit() -> None:
    trace = made_up(90)
    warm, cold = (replay(trace, create("lru"), 24, per_sequence=p) for p in (False, True))
    assert cold.hits.sum() < warm.hits.sum()
    assert cold.hits[np.flatnonzero(trace.starts())].sum() == 0
    wide = RoutingTrace(
        trace.expert_ids, 16, step=np.zeros(90, np.int32)
    )  # one micro-batch of all 16 experts
    assert replay(wide, create("lru"), 6).requests.sum() > 0  # served token by token
    with pytest.raises(UsageError, match="3 slots do not hold one token's 4 experts"):
        simulate(made_up(30, 1, 16, 4), ["lru"], [3])


def test_rows_and_gap() -> None:
    trace = made_up()
    rows = simulate(trace, ["lru", "lfu-aged", "belady"], [12, 24])
    assert [(r.policy, r.capacity) for r in rows[:3]] == [("lru", 0.25), ("lfu-aged", 0.25), ("belady", 0.25)]
    assert (rows[0].gap_closed, rows[2].gap_closed) == (0, 1)
    assert rows[1].gap_closed == pytest.approx((rows[1].hits - rows[0].hits) / (rows[2].hits - rows[0].hits))
    assert all(r.requests == 300 * 3 * 2 and r.hit_rate == r.hits / r.requests for r in rows)
    full = simulate(trace, ["lru"], [48])[0]
    assert full.gap_closed is None
    assert full.requests - full.hits == len(
        {(layer, e) for row in trace.expert_ids for layer in range(3) for e in row[layer]}
    )


def test_the_default_is_that_of_the_trace_s_model(demo: Path) -> None:
    trace = made_up()
    default, named = simulate(trace, ["default", default_policy("")], [12])
    assert default.policy == "default"
    assert default.hits == named.hits
    identity = ExpertCatalog.from_gguf(read_gguf(demo)).identity
    assert default_for(identity) == default_policy(DEMO)
    assert default_for({}) == default_for(identity | {"tensors_sha256": "another"}) == default_policy("")


def test_weighted_shares_help_lru() -> None:
    trace = real(VALIDATION)
    quota = weighted_quota(trace, 416)
    assert quota.sum() == 416
    assert quota.min() >= 6
    curves = lru_curves(trace)
    equal = replay(trace, create("lru"), 416)
    assert curves[:, 16].sum() == pytest.approx(equal.hits.sum(), rel=2e-3)  # order within a token differs
    assert replay(trace, create("lru"), 416, "weighted").hits.sum() > equal.hits.sum()
    with pytest.raises(UsageError, match="too few"):
        weighted_quota(trace, 100)


@pytest.mark.parametrize(("name", "partition", "want"), [
    ("lru", "per-layer", {208: 0.313, 416: 0.474, 832: 0.716}),
    ("lfu-aged", "per-layer", {208: 0.333, 416: 0.505, 832: 0.742}),
    ("belady", "per-layer", {208: 0.416, 416: 0.668, 832: 0.871}),
    ("lru", "global", {416: 0.445}),
    ("belady", "global", {416: 0.714}),
])  # fmt: skip
def test_known_hit_rates(name: str, partition: str, want: dict[int, float]) -> None:
    """The figures that came with the real trace."""
    trace = real(VALIDATION)
    for slots, rate in want.items():
        assert replay(trace, create(name), slots, partition).hit_rate == pytest.approx(rate, abs=6e-4)


def test_arguments() -> None:
    assert parse_capacities("12.5%,0.5, 7", 64) == [8, 32, 7]
    assert parse_policies("lru,all,x:a.safetensors") == [
        "lru",
        *[n for n in PLAIN if n != "lru"],
        "x:a.safetensors",
    ]
    for bad in ("", "0", "101%", "x", "-3"):
        with pytest.raises(UsageError, match="capacity"):
            parse_capacities(bad, 64)
    with pytest.raises(UsageError, match="no policy"):
        parse_policies(" , ")
    with pytest.raises(UsageError, match="unknown partition"):
        simulate(made_up(), ["lru"], [24], partition="none")
    with pytest.raises(FlashMoEError, match="unknown policy"):
        simulate(made_up(), ["nope"], [24])


def test_predictions() -> None:
    trace = made_up()
    row = Row("lru", "per-layer", 0.25, 1800, 900, 0.5, 0.0, 0.1)
    found = report.Simulation.of(trace, [row], report.Machine(1e6, 1e9, 0.007))
    assert report.bytes_per_token(row, found) == 3e6
    assert report.tokens_per_second(row, found) == pytest.approx(100)
    unknown = report.Simulation.of(trace, [row])
    assert report.bytes_per_token(row, unknown) is report.tokens_per_second(row, unknown) is None


def test_command(tmp_path: Path) -> None:
    trace = tmp_path / "t.safetensors"
    made_up().save(trace)
    app = typer.Typer()
    app.command()(command)
    out, figure = tmp_path / "out.json", tmp_path / "out.png"
    arguments = [
        str(trace),
        "--policy",
        "lru,lfu",
        "--capacity",
        "25%,50%",
        "--json",
        str(out),
        "--plot",
        str(figure),
    ]
    result = CliRunner().invoke(
        app, [*arguments, "--expert-bytes", "1MiB", "--disk", "1GB/s"], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.output
    written = json.loads(out.read_text())
    assert (written["tokens"], written["machine"]["expert_bytes"]) == (300, 1 << 20)
    rows = written["rows"]
    keys = {"policy", "partition", "capacity", "requests", "hits", "hit_rate", "gap_closed", "seconds"}
    assert [set(row) for row in rows] == [keys] * 4
    assert figure.stat().st_size > 1000
    failed = CliRunner().invoke(app, [str(trace), "--policy", "lru", "--json", str(trace / "below.json")])
    assert isinstance(failed.exception, FlashMoEError)
    failed = CliRunner().invoke(app, [str(trace), "--disk", "1GB"])
    assert isinstance(failed.exception, UsageError)
