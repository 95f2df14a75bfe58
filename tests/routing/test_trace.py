"""Routing traces: the file, the recorder, other formats, and what is said of damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flashmoe.errors import TraceError
from flashmoe.routing import DECODE, PREFILL, Recorder, RoutingTrace
from flashmoe.routing.files import merge, read, read_npz, split
from flashmoe.routing.statistics import layer_statistics, plot, summary


def small(
    tokens: int = 10,
    layers: int = 3,
    k: int = 2,
    experts: int = 8,
    seed: int = 0,
    weights: bool = True,
    **fields: Any,
) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :k].astype(np.int16)
    if weights:
        fields["router_weights"] = rng.random(ids.shape).astype(np.float16)
    fields.setdefault("model", {"name": "tiny"})
    return RoutingTrace(ids, experts, token_id=rng.integers(0, 99, tokens), **fields)


def same(a: RoutingTrace, b: RoutingTrace) -> None:
    assert (a.num_experts, a.first_moe_layer, dict(a.model)) == (
        b.num_experts,
        b.first_moe_layer,
        dict(b.model),
    )
    for name in ("expert_ids", "token_id", "sequence_id", "phase", "step", "router_weights"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        if left is not None:
            np.testing.assert_array_equal(left, right, err_msg=name)
            assert left.dtype == right.dtype


@pytest.mark.parametrize("experts", [8, 300])
def test_file_gives_back_what_was_saved(tmp_path: Path, experts: int) -> None:
    trace = small(experts=experts, sequence_id=np.arange(10) // 4, first_moe_layer=1, phase=np.arange(10) % 2)
    path = tmp_path / "t.safetensors"
    trace.save(path)
    same(RoutingTrace.load(path), trace)
    same(read(path), trace)
    assert load_file(path)["expert_ids"].shape == (10, 3, 2)  # plain safetensors reads it
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_steps_begin_with_sequences() -> None:
    trace = small(tokens=7, step=np.array([0, 0, 0, 1, 1, 2, 3]), sequence_id=np.array([0, 0, 0, 0, 1, 1, 1]))
    assert trace.steps().tolist() == [0, 3, 4, 5, 6, 7]
    assert trace.starts().tolist() == [1, 0, 1, 0, 0]
    assert trace.starts(cold=True).tolist() == [2, 0, 2, 0, 0]


def test_recorder_keeps_what_it_is_given() -> None:
    rng = np.random.default_rng(0)
    recorder = Recorder(3, 2, 8, model={"name": "tiny"}, capacity=2)
    want, phases = [], []
    for step in range(20):
        n = 5 if step % 7 == 0 else 1
        ids = rng.integers(0, 8, (n, 3, 2))
        for layer in range(3):
            rows = ids[:, layer]
            if layer == 2 and n > 1:  # the last layer sees only the last token of a prompt
                rows = rows[-1:]
                ids[:-1, 2] = -1
            recorder.add(layer, rows.astype(np.int32), np.full(rows.shape, 0.25, np.float32))
        recorder.end_step(np.arange(n) + step, PREFILL if n > 1 else DECODE, step // 7)
        want.append(ids)
        phases += [PREFILL if n > 1 else DECODE] * n
    trace = recorder.trace()
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate(want))
    assert trace.phase.tolist() == phases
    assert len(trace.steps()) - 1 == 20
    assert trace.n_sequences == 3
    assert trace.router_weights is not None
    assert (trace.router_weights[trace.expert_ids >= 0] == np.float16(0.25)).all()


def test_recorder_forgets_a_failed_step() -> None:
    recorder = Recorder(2, 1, 4, weights=False)
    recorder.add(0, np.array([[3]]))
    recorder.drop_step()
    with pytest.raises(TraceError, match="nothing was recorded"):
        recorder.trace()
    recorder.add(0, np.array([[1]]))
    recorder.add(1, np.array([[2]]))
    recorder.end_step(7)
    assert recorder.trace().expert_ids.tolist() == [[[1], [2]]]


def test_import_npz_and_jsonl(tmp_path: Path) -> None:
    ids = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    np.savez(
        tmp_path / "a.npz", expert_ids=ids, sequence_id=np.array([0, 0, 1]), num_experts=16, first_moe_layer=1
    )
    trace = read(tmp_path / "a.npz")
    assert (trace.num_experts, trace.first_moe_layer, trace.n_sequences) == (16, 1, 2)
    lines = [{"num_experts": 16, "model": {"name": "a"}, "first_moe_layer": 1}]
    lines += [{"experts": row.tolist(), "sequence": s} for row, s in zip(ids, (0, 0, 1), strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    same(read(tmp_path / "a.jsonl"), trace)


def test_merge_and_split() -> None:
    a, b = small(sequence_id=np.arange(10) // 4), small(seed=1)
    both = merge([a, b])
    assert both.n_tokens == 20
    assert both.sequence_id.tolist() == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 10
    assert (np.diff(both.step) >= 0).all()
    first, second = split(both, 0.4)
    same(merge([first, second]), both)
    assert first.sequence_id.max() < second.sequence_id.min()
    drawn, rest = split(both, 0.4, seed=3)
    assert drawn.n_tokens + rest.n_tokens == 20
    assert not set(drawn.sequence_id) & set(rest.sequence_id)
    one, other = split(b, 0.3)
    assert (one.n_tokens, other.n_tokens) == (3, 7)
    with pytest.raises(TraceError, match="different shape"):
        merge([a, small(k=3)])
    with pytest.raises(TraceError, match="only one model"):
        merge([a, small(model={"name": "other"})])
    with pytest.raises(TraceError, match="between 0 and 1"):
        split(a, 1.5)
    with pytest.raises(TraceError, match="too short"):
        split(small(tokens=1), 0.5)


def test_statistics_of_a_known_trace(tmp_path: Path) -> None:
    ids = np.array([[[0, 1]], [[0, 1]], [[2, 3]], [[0, 1]]], np.int16)
    trace = RoutingTrace(ids, 4)
    (row,) = layer_statistics(trace)
    assert row.requests == 8
    assert row.experts_used == 4
    assert row.overlap == pytest.approx(2 / 6)
    assert row.reuse == (1.0, 1.0, 1.0, 3.0, 3.0)  # of 0 and 1: twice 1 expert in between, then twice 3
    assert row.top_tenth == pytest.approx(3 / 8)
    assert summary(trace)["tokens"] == 4
    pytest.importorskip("matplotlib")
    plot(small(), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_bad_traces(tmp_path: Path) -> None:
    trace = small()
    path = tmp_path / "t.safetensors"
    trace.save(path)
    data = path.read_bytes()
    for n in (0, 5, 100, len(data) - 1):
        path.write_bytes(data[:n])
        with pytest.raises(TraceError, match="damaged"):
            RoutingTrace.load(path)
    with pytest.raises(TraceError, match="does not exist"):
        RoutingTrace.load(tmp_path / "none.safetensors")
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(TraceError, match="no routing trace"):
        RoutingTrace.load(path)
    save_file(
        {"expert_ids": np.full((2, 1, 1), 9, np.int16)},
        path,
        {"format": "flashmoe-routing-trace", "version": "1", "num_experts": "8"},
    )
    with pytest.raises(TraceError, match=r"t.safetensors: .*9.*0\.\.7"):
        RoutingTrace.load(path)
    save_file(
        {"expert_ids": np.zeros((2, 1, 1), np.int16)},
        path,
        {"format": "flashmoe-routing-trace", "version": "9"},
    )
    with pytest.raises(TraceError, match="version 9"):
        RoutingTrace.load(path)
    with pytest.raises(TraceError, match="empty"):
        RoutingTrace(np.zeros((0, 2, 2), np.int16), 8)
    with pytest.raises(TraceError, match="integers"):
        RoutingTrace(np.zeros((1, 2, 2)), 8)
    with pytest.raises(TraceError, match="out of order"):
        RoutingTrace(np.zeros((2, 1, 1), np.int16), 8, step=np.array([1, 0]))
    with pytest.raises(TraceError, match="3 tokens"):
        RoutingTrace(np.zeros((3, 1, 1), np.int16), 8, phase=np.array([1, 0]))
    with pytest.raises(TraceError, match="record a trace with this model"):
        trace.check_model(3, 9)
    (tmp_path / "b.npz").write_bytes(b"PK")
    with pytest.raises(TraceError, match="damaged"):
        read_npz(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", other=1)
    with pytest.raises(TraceError, match="no array expert_ids"):
        read_npz(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", expert_ids=np.zeros((0, 2, 2), np.uint8))
    with pytest.raises(TraceError, match="empty"):
        read_npz(tmp_path / "d.npz")
    for text, message in (
        ("", "empty"),
        ("{", "line 1"),
        ('{"experts": [[1]]}\n{"experts": [[1, 2]]}', "line 2"),
    ):
        (tmp_path / "e.jsonl").write_text(text)
        with pytest.raises(TraceError, match=message):
            read(tmp_path / "e.jsonl")
    with pytest.raises(TraceError, match="cannot write"):
        trace.save(path / "where.safetensors")
