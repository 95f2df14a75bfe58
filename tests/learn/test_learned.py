"""Learned policies: training and runtime see the same, torch and numba compute the same, files are
checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from flashmoe.cache.policies import create
from flashmoe.cache.policies import flashmoe as paper
from flashmoe.cache.policies import flashmoe_plus as plus
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.policies.flashmoe import Flashmoe
from flashmoe.cache.policies.flashmoe_plus import FlashmoePlus
from flashmoe.cache.policies.learned import PolicyFile
from flashmoe.cache.residency import equal_quota, make_residency
from flashmoe.errors import FlashMoEError, PolicyError, TraceError, UsageError
from flashmoe.learn.plus_shape import DECAYS, HORIZON_WEIGHTS, Sizes
from flashmoe.learn.samples import SEGMENT, Samples
from flashmoe.routing.trace import RoutingTrace
from flashmoe.runtime.load import load
from flashmoe.simulate.partition import pool_for
from flashmoe.simulate.replay import replay, simulate
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.gguf import read_gguf
from tests.conftest import Tiny
from tests.simulate.traces import made_up


def untrained(kind: str, layers: int, experts: int, k: int, r: int = 96, h: int = 192) -> PolicyFile:
    """A policy file of random weights, in the sizes of a trained one."""
    rng = np.random.default_rng(0)
    context, m, d, c, j = 6, 24, 6, 4, 6
    i = d + 1 + context
    shapes: dict[str, tuple[int, ...]] = {
        "w1": (2 * experts, 64), "b1": (64,), "w2": (64, 64), "b2": (64,), "w3": (64, experts), "b3": (experts,),
    } if kind == "flashmoe" else {
        "embed": (experts, r), "w1": (c * r, h), "b1": (h,), "w2": (experts, context, h), "b2": (experts, context),
        "v1": (i, m), "c1": (m,), "v2": (m, j), "v0": (i, j), "c2": (j,),
    }  # fmt: skip
    arrays: dict[str, NDArray[Any]] = {
        n: rng.normal(0, 0.1, (layers, *s)).astype(np.float32) for n, s in shapes.items()
    }
    constants = {
        "decays": [0.5, 0.75, 0.9, 0.96, 0.985, 0.997], "channel_decays": [0, 2, 4], "R": r, "H": h, "K": context,
        "M": m, "horizon_weights": [1] * j,
    }  # fmt: skip
    features = paper.FEATURES if kind == "flashmoe" else plus.FEATURES
    return PolicyFile(
        kind, arrays, layers, experts, k, features, constants=constants, model={"name": "made up"}
    )


def policy_of(file: PolicyFile) -> EvictionPolicy:
    return Flashmoe(trained=file) if file.kind == "flashmoe" else FlashmoePlus(trained=file)


def drive(policy: EvictionPolicy, trace: RoutingTrace, slots: int) -> Any:
    """The runtime's calls, token by token; yields (token, layer, state) after each access."""
    n = trace.n_layers
    policy.bind(make_residency(n, trace.num_experts, equal_quota(slots * n, n, trace.num_experts)))
    out = [np.zeros(64, np.int32) for _ in range(3)]
    starts = trace.starts()
    for t in range(trace.n_tokens):
        if starts[t]:
            policy.begin_sequence()
        for layer in range(n):
            ids = trace.expert_ids[t, layer]
            if (ids >= 0).any():
                policy.access(layer, ids.astype(np.int32), *out)
            yield t, layer, policy._state


@pytest.mark.parametrize("kind", ["flashmoe", "flashmoe+"])
def test_training_and_runtime_see_the_same(kind: str) -> None:
    """Features of every step, also over segment borders, and where a layer does not see a token."""
    trace = made_up(3 * SEGMENT + 10)
    ids = trace.expert_ids.copy()
    ids[5:20, 2] = -1
    trace = RoutingTrace(ids, 16, sequence_id=trace.sequence_id, model=trace.model)
    samples = Samples(trace, None if kind == "flashmoe" else [0.5, 0.75, 0.9, 0.96, 0.985, 0.997])
    batch = samples.batch(range(samples.n_segments))
    x, features = np.zeros(32, np.float32), numba.njit(paper.features)
    for t, layer, st in drive(policy_of(untrained(kind, 3, 16, 2)), trace, 4):
        now = int(batch.present[layer, : t + 1].sum())
        if kind == "flashmoe":
            features(st.last, st.counts, layer, now, x)
            np.testing.assert_array_equal(x, batch.inputs[layer, t])
        else:
            np.testing.assert_array_equal(st.average[layer], batch.inputs[layer, t])
            np.testing.assert_allclose(1 / (now - st.last[layer] + 1), batch.recency[layer, t], rtol=1e-6)
            assert set(np.flatnonzero(batch.picked[layer, t])) == set(ids[t, layer][ids[t, layer] >= 0])


def test_distances_are_steps_to_the_next_use() -> None:
    trace = made_up(2 * SEGMENT + 5)
    distance = Samples(trace, None).batch([1, 0, 2]).distance
    order = np.r_[SEGMENT : 2 * SEGMENT, 0:SEGMENT, 2 * SEGMENT : 2 * SEGMENT + 5]
    for row, t in enumerate(order):
        for e in range(16):
            uses = np.flatnonzero((trace.expert_ids[t + 1 :, 1] == e).any(axis=1))
            if len(uses):
                assert distance[1, row, e] == uses[0] + 1
            else:
                assert distance[1, row, e] > 1_000_000


@pytest.mark.parametrize("kind", ["flashmoe", "flashmoe+"])
def test_numba_computes_what_torch_trained(kind: str) -> None:
    torch = pytest.importorskip("torch", reason="training needs torch: pip install 'flashmoe-ssd[train]'")
    from flashmoe.learn import networks

    torch.manual_seed(1)
    trace = made_up(SEGMENT)
    if kind == "flashmoe":
        net: Any = networks.PaperNet(3, 16)
    else:
        net = networks.PlusNet(3, 16, r=8, h=16).eval()
        for value in net.parameters():  # as stored
            value.data = value.data.half().float()
        with torch.no_grad():
            net.v0 += 0.1
    constants = Sizes(r=8, h=16).constants
    arrays = {name: value.astype(np.float32) for name, value in net.export().items()}
    features = paper.FEATURES if kind == "flashmoe" else plus.FEATURES
    file = PolicyFile(kind, arrays, 3, 16, 2, features, constants=constants)
    batch = Samples(trace, None if kind == "flashmoe" else DECAYS).batch([0])
    with torch.no_grad():
        if kind == "flashmoe":
            want = -net(torch.from_numpy(batch.inputs)).numpy()
        else:
            now = torch.arange(1, SEGMENT)
            x = (torch.from_numpy(v) for v in (batch.inputs, batch.recency, batch.picked))
            chances = torch.sigmoid(net(*x, now - 1, now))
            weights = torch.tensor(HORIZON_WEIGHTS)
            want = (torch.einsum("ljne,j->lne", chances, weights) / weights.sum()).numpy()
            want = np.concatenate([want[:, :1], want], axis=1)
    checked = 0
    for t, layer, st in drive(policy_of(file), trace, 4):
        if t > 0 and st.scored[layer] == t + 1:
            residents = np.flatnonzero(st.score[layer])  # candidates when the score was made, among others
            asked = trace.expert_ids[t, layer]
            close = np.isclose(st.score[layer], want[layer, t], rtol=2e-3, atol=2e-4)
            if kind == "flashmoe":
                assert close.all()
            else:
                assert close[asked].all()
                assert close[residents].sum() >= 4
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("kind", ["flashmoe", "flashmoe+"])
def test_simulated_hits_are_the_runtime_s(kind: str) -> None:
    trace = made_up(200)
    for partition in ("per-layer", "global", "weighted"):
        file = untrained(kind, 3, 16, 2)
        bits = replay(trace, policy_of(file), 18, partition, want_bits=True).bits
        policy = policy_of(file)
        policy.bind(pool_for(trace, 18, partition))
        out = [np.zeros(8, np.int32) for _ in range(3)]
        for t in range(200):
            if trace.starts()[t]:
                policy.begin_sequence()
            for layer in range(3):
                ids = trace.expert_ids[t, layer].astype(np.int32)
                resident = policy.residency.slot_of[layer, ids] >= 0
                policy.access(layer, ids, *out)
                assert ((bits[t, layer] == 2) == resident).all()


@pytest.mark.parametrize("kind", ["flashmoe", "flashmoe+"])
def test_training_beats_lru_on_what_it_has_not_seen(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="training needs torch: pip install 'flashmoe-ssd[train]'")
    from flashmoe.cli.train import app

    made_up(4000, seed=3).save(tmp_path / "t.safetensors")
    out = tmp_path / "p.safetensors"
    arguments = ["policy", str(tmp_path / "t.safetensors"), "-o", str(out), "--kind", kind, "--threads", "1"]
    arguments += [
        "--epochs",
        "8" if kind == "flashmoe" else "3",
        "--held-out",
        "0.2",
        "--json",
        str(tmp_path / "r.json"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rates = PolicyFile.load(out, kind).report["held_out"]["25%"]
    assert rates[kind] > rates["lru"]
    policy = create(f"{kind}:{out}")
    assert replay(made_up(300, seed=3), policy, 12).hit_rate > 0.2


def test_bad_policy_files(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    file = untrained("flashmoe", 3, 16, 2)
    file.save(path)
    policy = create(f"flashmoe:{path}")
    with pytest.raises(PolicyError, match="3 layers of 16 experts.*4 of 16"):
        policy.bind(make_residency(4, 16, [2] * 4))
    policy.check_model({"name": "made up"})
    with pytest.raises(PolicyError, match=r"write flashmoe:"):
        create(f"flashmoe+:{path}")
    with pytest.raises(PolicyError, match="needs a trained file"):
        create("flashmoe+")
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    with pytest.raises(PolicyError, match="damaged"):
        create(f"flashmoe:{path}")
    save_file({"x": np.zeros(1)}, path)
    with pytest.raises(PolicyError, match="no policy file"):
        create(f"flashmoe:{path}")
    wrong = dict(file.arrays)
    wrong["w2"] = wrong["w2"][:, :, :3]
    with pytest.raises(PolicyError, match="w2 should be"):
        Flashmoe(trained=PolicyFile("flashmoe", wrong, 3, 16, 2, paper.FEATURES))
    with pytest.raises(PolicyError, match="features"):  # the known trap: interleaved
        Flashmoe(trained=PolicyFile("flashmoe", file.arrays, 3, 16, 2, ["interleaved"]))
    named = PolicyFile(
        "flashmoe", file.arrays, 3, 16, 2, paper.FEATURES, model={"name": "A", "tensors_sha256": "1"}
    )
    with pytest.raises(PolicyError, match="trained for A, not for B"):
        Flashmoe(trained=named).check_model({"name": "B", "tensors_sha256": "2"})
    path.unlink()
    named.save(path)
    assert set(load_file(path)) == set(file.arrays)


def test_a_policy_of_another_training(tmp_path: Path, tiny: Tiny) -> None:
    path, model = tmp_path / "p.safetensors", tiny("olmoe")
    identity = ExpertCatalog.from_gguf(read_gguf(model)).identity
    replace(untrained("flashmoe", 4, 16, 4), model={**identity, "router_sha256": "of another"}).save(path)
    with pytest.raises(PolicyError, match="trained for another version of"):
        load(model, policy=f"flashmoe:{path}")
    trace = replace(made_up(300, 4, 16, 4), model=identity)
    with pytest.raises(PolicyError, match="trained for another version of"):
        simulate(trace, [f"flashmoe:{path}"])


def test_bad_training() -> None:
    from flashmoe.learn.train import train

    with pytest.raises(UsageError, match="unknown kind"):
        train(made_up(300), "nope")
    pytest.importorskip("torch", reason="training needs torch: pip install 'flashmoe-ssd[train]'")
    with pytest.raises(TraceError, match="too few"):
        train(made_up(100))
    with pytest.raises(FlashMoEError):
        PolicyFile.load("/nowhere.safetensors", "flashmoe")
