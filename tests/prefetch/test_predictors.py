"""Predictors: they learn what can be known, never see the future, keep their state, and refuse what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashmoe.cache.policies import create as create_policy
from flashmoe.cache.residency import equal_quota, make_residency
from flashmoe.cli.tables import of_predictors
from flashmoe.common import plugins
from flashmoe.errors import FlashMoEError
from flashmoe.learn.prefetch import train
from flashmoe.prefetch import BUILTIN, ENTRY_POINTS, available, create, of_routing_alone
from flashmoe.prefetch.base import AHEAD, Predictor, PredictorError
from flashmoe.prefetch.files import PredictorFile
from flashmoe.prefetch.promoe import ProMoE
from flashmoe.prefetch.table import Table
from flashmoe.prefetch.table_kernels import SOURCES, class_for
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate.prefetch import judge, parse_predictors, plot, simulate_prefetch, tally
from flashmoe.simulate.report import Simulation
from tests.simulate.traces import VALIDATION, made_up, real

LAYERS, EXPERTS, K = 6, 16, 2


def chained(tokens: int = 400, seed: int = 0, vocabulary: int = 12) -> RoutingTrace:
    """Layer 0 follows the token; each further layer follows the one behind it."""
    rng = np.random.default_rng(seed)
    first = np.stack([rng.permutation(EXPERTS)[:K] for _ in range(vocabulary)])
    follow = np.stack([rng.permutation(EXPERTS) for _ in range(LAYERS)])
    words = rng.integers(0, vocabulary, tokens)
    ids = np.empty((tokens, LAYERS, K), np.int16)
    ids[:, 0] = first[words]
    for layer in range(1, LAYERS):
        ids[:, layer] = follow[layer][ids[:, layer - 1]]
    return RoutingTrace(ids, EXPERTS, token_id=words.astype(np.int32), model={"name": "chained"})


def untrained(layers: int = LAYERS, experts: int = EXPERTS, k: int = K, seed: int = 0) -> PredictorFile:
    """A promoe of random weights."""
    rng = np.random.default_rng(seed)
    c, r, h, v = len(AHEAD), 8, 8, 32
    shapes = {
        "token": (v, r), "embed": (layers, experts, r), "w1": (c, layers, 3 * r, h), "b1": (c, layers, h),
        "w2": (c, layers, h, experts), "b2": (c, layers, experts),
    }  # fmt: skip
    arrays: dict[str, NDArray[Any]] = {
        name: rng.normal(0, 0.5, s).astype(np.float16) for name, s in shapes.items()
    }
    constants = {"R": r, "H": h, "V": v, "decays": [0.5, 0.9], "ahead": list(AHEAD)}
    return PredictorFile("promoe", arrays, layers, experts, k, constants=constants, model={"name": "made up"})


def make(name: str, layers: int = LAYERS, experts: int = EXPERTS, k: int = K) -> Predictor:
    """A predictor bound to a shape."""
    if name == "promoe":
        predictor: Predictor | None = ProMoE(trained=untrained(layers, experts, k))
    else:
        predictor = create(name)
    assert predictor is not None
    predictor.bind(layers, experts, k)
    return predictor


NAMES = ["table", "moe-infinity", "finemoe", "promoe"]


def feed(predictor: Predictor, trace: RoutingTrace, start: int = 0, stop: int | None = None) -> None:
    """Decode steps of a trace."""
    for t in range(start, trace.n_tokens if stop is None else stop):
        if t == 0 or trace.sequence_id[t] != trace.sequence_id[t - 1]:
            predictor.begin_sequence()
        predictor.begin_step(int(trace.token_id[t]))
        for layer in range(trace.n_layers):
            predictor.observe(layer, trace.expert_ids[t, layer].astype(np.int32))


def chances(predictor: Predictor, layer: int) -> NDArray[np.float32]:
    """What it says of all layers ahead, [L, E]."""
    out = np.zeros((predictor.n_layers, predictor.n_experts), np.float32)
    for target in range(layer + 1, predictor.n_layers):
        predictor.predict(layer, target, out[target])
    return out


@pytest.mark.parametrize("name", NAMES)
def test_chances_are_chances_and_asking_changes_nothing(name: str) -> None:
    trace = made_up(80, LAYERS, EXPERTS, K)
    predictor = make(name)
    feed(predictor, trace, stop=60)
    predictor.begin_step(3)
    before = predictor.state()
    for layer in range(-1, LAYERS - 1):
        if layer >= 0:
            predictor.observe(layer, trace.expert_ids[60, layer].astype(np.int32))
            before = predictor.state()
        first = chances(predictor, layer)
        assert np.isfinite(first).all()
        assert first.min() >= 0
        assert first.max() <= 1
        assert np.array_equal(first, chances(predictor, layer))
        after = predictor.state()
        assert all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(data=st.data())
def test_never_sees_the_future(name: str, data: st.DataObject) -> None:
    """Two texts that are equal up to some layer of some token get equal predictions there."""
    seed = data.draw(st.integers(0, 1000))
    t = data.draw(st.integers(0, 30))
    layer = data.draw(st.integers(-1, LAYERS - 2))
    one, other = made_up(32, LAYERS, EXPERTS, K, seed), made_up(32, LAYERS, EXPERTS, K, seed + 1)
    tokens = np.arange(32, dtype=np.int32) % 5
    ids = other.expert_ids.copy()
    ids[:t] = one.expert_ids[:t]
    ids[t, : layer + 1] = one.expert_ids[t, : layer + 1]
    said = []
    for expert_ids in (one.expert_ids, ids):
        predictor = make(name)
        trace = RoutingTrace(expert_ids, EXPERTS, token_id=tokens)
        feed(predictor, trace, stop=t)
        predictor.begin_step(int(tokens[t]))
        for m in range(layer + 1):
            predictor.observe(m, expert_ids[t, m].astype(np.int32))
        said.append(chances(predictor, layer))
    assert np.array_equal(*said)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "finemoe"])  # whose map is of the step
def test_a_prompt_teaches_what_its_tokens_one_by_one_would(name: str) -> None:
    """Micro-batches, the last layer seeing only the last token (as engines do), one of them cut short."""
    trace = chained(60)
    one, many = make(name), make(name)
    one.begin_sequence()
    many.begin_sequence()
    ids = trace.expert_ids.astype(np.int32)
    for a, b, layers in ((0, 20, LAYERS), (20, 45, LAYERS), (45, 60, 3)):
        for layer in range(layers):
            first = b - 1 if layer == LAYERS - 1 else a
            many.observe_many(layer, ids[first:b, layer], trace.token_id[a:b])
        if name == "moe-infinity":  # matches once a token, so it cannot be equal: the counts are
            continue
        for t in range(a, b):
            one.begin_step(int(trace.token_id[t]))
            for layer in range(layers):
                if layer < LAYERS - 1 or t == b - 1:
                    one.observe(layer, ids[t, layer])
    if name == "moe-infinity":
        assert (
            many.state()["eam"].sum()
            == (2 * (LAYERS - 1) * 45 - 2 * 5 * 45 + 2 * 5 * 45) + 2 * 2 + 15 * 3 * K
        )
        return
    for predictor in (one, many):
        predictor.begin_step(1)
    assert np.allclose(chances(one, -1), chances(many, -1), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_on_where_it_was(name: str) -> None:
    trace = chained(90)
    whole, first, second = make(name), make(name), make(name)
    feed(whole, trace, stop=60)
    feed(first, trace, stop=60)
    second.load_state(first.state())
    for predictor in (whole, second):
        predictor.begin_sequence()
        feed(predictor, trace, 60)
        predictor.begin_step(2)
    assert np.allclose(chances(whole, -1), chances(second, -1), atol=1e-5)
    other = make(name, layers=LAYERS + 1)
    before = other.state()
    with pytest.raises(PredictorError, match="does not fit"):
        other.load_state(first.state())
    with pytest.raises(PredictorError, match="does not fit"):
        other.load_state({})
    assert all(np.array_equal(before[key], value) for key, value in other.state().items())


def test_table_learns_tokens_and_layers() -> None:
    """After some hundred tokens it knows the rule; without token ids it knows it from the layers behind."""
    trace = chained(900)
    rows = simulate_prefetch(trace, ["table"], [48])
    assert {(r.ahead, r.guesses) for r in rows} == {(a, g) for a in AHEAD for g in (1, 2, 4)}
    recall = {r.ahead: r.recall for r in rows if r.guesses == K}
    assert recall[0] > 0.95, recall
    assert recall[1] > 0.95, recall
    unknown = RoutingTrace(trace.expert_ids, EXPERTS, model=trace.model)
    blind = {r.ahead: r.recall for r in simulate_prefetch(unknown, ["table"], [48]) if r.guesses == K}
    assert blind[0] < 0.5 < 0.8 < blind[1]


def test_table_is_calibrated() -> None:
    """Of what it gives a chance of about p, about p comes; the chances of a layer sum up to about k."""
    trace = made_up(1200, LAYERS, EXPERTS, K)
    predictor = make("table")
    feed(predictor, trace, stop=300)
    said, came = [], []
    for t in range(300, 1200):
        predictor.begin_step(-1)
        for layer in range(LAYERS):
            if layer:
                out = np.zeros(EXPERTS, np.float32)
                predictor.predict(layer - 1, layer, out)
                said.append(out)
                came.append(np.isin(np.arange(EXPERTS), trace.expert_ids[t, layer]))
            predictor.observe(layer, trace.expert_ids[t, layer].astype(np.int32))
    p, y = np.array(said), np.array(came)
    assert abs(p.sum(1).mean() - K) < 0.15
    for low, high in ((0.05, 0.15), (0.15, 0.3), (0.3, 0.6)):
        some = (p >= low) & (p < high)
        assert abs(p[some].mean() - y[some].mean()) < 0.05, (low, high)


def test_table_looks_only_at_layers_that_have_spoken() -> None:
    for layer in range(-1, 12):
        for target in range(layer + 1, 13):
            c = class_for.py_func(layer, target)
            assert all(d <= 0 or d == 99 or target - d <= layer for d in SOURCES[c]), (layer, target)
            assert c == 0 or (layer >= 0 and target >= AHEAD[c])


@pytest.mark.parametrize("most", [60_000, 100_000, 1_000_000])
def test_table_takes_no_more_than_it_is_given(most: int) -> None:
    predictor = Table()
    predictor.restrict(most)
    predictor.bind(LAYERS, EXPERTS, K)
    assert 0.9 * min(most, Table().memory) < predictor.nbytes <= most


def test_table_keeps_to_its_memory_and_prefers_frequent_tokens() -> None:
    predictor = Table(memory=64 * LAYERS * EXPERTS)
    predictor.bind(LAYERS, EXPERTS, K)
    ids = np.array([1, 2], np.int32)
    for i in range(600):
        predictor.begin_step(7 if i % 2 else 1000 + i)
        for layer in range(LAYERS):
            predictor.observe(layer, ids)
    state = predictor.state()
    assert state["counts"].shape[0] <= 64
    assert 7 + 1 in state["row"][0]
    assert state["row"][1].max() <= 255  # 300 occurrences: halved once
    smaller = Table(memory=16 * LAYERS * EXPERTS)
    smaller.bind(LAYERS, EXPERTS, K)
    smaller.load_state(state)
    assert 7 + 1 in smaller.state()["row"][0]


def test_size_of_large_models_is_bounded() -> None:
    predictor = Table()
    for layers, experts, k, most in ((26, 64, 6, 40), (48, 128, 8, 60), (58, 256, 8, 100)):
        predictor.bind(layers, experts, k)  # pages are not taken yet
        assert predictor.nbytes < most << 20, predictor.nbytes
    predictor.begin_step(5)
    predictor.observe(0, np.arange(8, dtype=np.int32))
    assert np.isfinite(chances(predictor, 0)[:5]).all()


def test_odd_observations_do_no_harm() -> None:
    """Repeated, foreign and missing ids, layers left out, more ids than k."""
    for name in NAMES:
        predictor = make(name)
        predictor.begin_sequence()
        for _ in range(3):
            predictor.begin_step(-1)
            predictor.observe(0, np.array([3, 3, -1, 99, 4, 5, 6], np.int32))
            predictor.observe(4, np.zeros(0, np.int32))
            predictor.observe(5, np.array([1], np.int32))
        predictor.begin_step(2**31 - 2)
        assert np.isfinite(chances(predictor, -1)).all()


# Training ---------------------------------------------------------------------------------------------------


def test_a_trained_table_starts_warm(tmp_path: Path) -> None:
    trace = chained(800)
    path = tmp_path / "t.safetensors"
    trained = train(trace, "table")
    trained.save(path)
    warm = create(f"table:{path}")
    assert warm is not None
    first = trace.rows(np.arange(60))
    cold = judge(first, Table(), [])
    counts = judge(first, warm, [])
    assert counts[1, 0, K - 1, 0] > 0.95 * counts[1, 0, 2 * K, 0] > cold[1, 0, K - 1, 0]
    with pytest.raises(PredictorError, match="6 layers, 2 of 16 experts"):
        warm.bind(LAYERS, EXPERTS + 1, K)


def test_what_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(FlashMoEError, match="unknown kind"):
        train(chained(50), "oracle")
    with pytest.raises(FlashMoEError, match="too few"):
        train(chained(50), "promoe")


# Names and files --------------------------------------------------------------------------------------------


def test_names() -> None:
    assert create("none") is None
    assert available()[0] == "none"
    assert set(BUILTIN) <= set(available())
    assert set(BUILTIN) - set(of_routing_alone()) == {"gate", "promoe"}
    for spec, message in (
        ("tabel", "unknown predictor 'tabel': use one of none, gate, table"),
        ("none:x.safetensors", "does not exist"),
        ("promoe", "needs a trained file"),
        ("table:/nowhere.safetensors", "does not exist"),
    ):
        with pytest.raises(PredictorError, match=message):
            create(spec)
    with pytest.raises(PredictorError, match="cannot be made"):
        create("table", speed=3)
    with pytest.raises(PredictorError, match="layers and experts"):
        Table().bind(0, 4, 2)


def test_another_package_brings_a_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "mine"

        @staticmethod
        def load() -> Any:
            return Table

    class Wrong(Point):
        name = "wrong"

        @staticmethod
        def load() -> Any:
            return dict

    monkeypatch.setattr(
        plugins, "entry_points", lambda group: [Point, Wrong] if group == ENTRY_POINTS else []
    )
    assert "mine" in available()
    assert isinstance(create("mine"), Table)
    with pytest.raises(PredictorError, match="not a Predictor"):
        create("wrong")


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    untrained().save(path)
    with pytest.raises(PredictorError, match="write promoe:"):
        create(f"table:{path}")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PredictorError, match="damaged"):
        create(f"promoe:{path}")
    broken = untrained()
    broken.arrays["w1"] = broken.arrays["w1"][:1]
    broken.save(path)
    with pytest.raises(PredictorError, match="w1"):
        create(f"promoe:{path}")
    own = PredictorFile("table", {}, 1, 1, 1, model={"name": "a", "tensors_sha256": "1"})
    with pytest.raises(PredictorError, match="trained for a, not for b"):
        Table(trained=own).check_model({"name": "b", "tensors_sha256": "2"})
    with pytest.raises(PredictorError, match="cannot write"):
        untrained().save(path / "no_folder")


# The simulator ----------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_tally_counts_as_defined(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, k, most = 12, 3, 6
    chance = rng.permutation(experts).astype(np.float32)
    ids = rng.permutation(experts)[:k].astype(np.int32)
    absent = (rng.random((2, experts)) < 0.4).astype(np.uint8)
    counts = np.zeros((3, most + 1, 2), np.int64)
    tally(chance, ids, absent, np.zeros(most, np.int64), counts)
    for p, candidates in enumerate([np.ones(experts, np.uint8), *absent]):
        ranked = [e for e in np.argsort(-chance) if candidates[e]]
        wanted = {int(e) for e in ids if candidates[e]}
        assert counts[p, most].tolist() == [len(wanted), 1]
        for g in range(1, most + 1):
            assert counts[p, g - 1, 0] == len(wanted & set(ranked[:g]))
            assert counts[p, g - 1, 1] == min(g, len(ranked))


def test_absent_is_what_the_policy_does_not_hold() -> None:
    """The misses that are to be found are those of the policy's own replay."""
    trace = made_up(200, LAYERS, EXPERTS, K)
    slots = 30
    counts = judge(trace, make("table"), [slots])
    policy = create_policy("lfu-aged")
    policy.bind(make_residency(LAYERS, EXPERTS, equal_quota(slots, LAYERS, EXPERTS)))
    result = policy.replay(trace.expert_ids, trace.steps(), trace.starts())
    misses = int(result.requests.sum() - result.hits.sum())
    assert counts[0, 1, 2 * K, 0] == misses
    assert counts[0, 0, 2 * K, 0] == trace.expert_ids.size


def test_prompts_are_fed_but_not_judged() -> None:
    trace = chained(200)
    step = np.r_[np.zeros(100), np.arange(1, 101)].astype(np.int32)
    mixed = RoutingTrace(trace.expert_ids, EXPERTS, token_id=trace.token_id, step=step)
    counts = judge(mixed, make("table"), [40])
    assert counts[0, 0, 2 * K, 1] == 100 * LAYERS


def test_lists_tables_and_figures(tmp_path: Path) -> None:
    assert parse_predictors("all") == ["table", "moe-infinity", "finemoe"]
    assert parse_predictors("none, table,table") == ["table"]
    for text in ("", "none", "gate"):
        with pytest.raises(FlashMoEError):
            parse_predictors(text)
    trace = made_up(40, 3, 8, 2)
    rows = simulate_prefetch(trace, ["table", "moe-infinity"], [12, 6])
    assert {"predictor", "ahead", "guesses", "recall", "precision", "missing_found", "missing_precision", "capacity",
            "policy"} == set(vars(rows[0]))  # fmt: skip
    assert len(of_predictors(Simulation.of(trace, rows)).renderables) == 2
    pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'flashmoe-ssd[plot]'")
    plot(rows, tmp_path / "f.png", "made up")
    assert (tmp_path / "f.png").stat().st_size > 1000


def test_real_routing_is_foreseen() -> None:
    """DeepSeek-V2-Lite, nothing trained: the first 400 tokens, and by then what a guess is worth."""
    trace = real(VALIDATION).rows(np.arange(400))
    rows = simulate_prefetch(trace, ["table"], [416])
    recall = {r.ahead: r.recall for r in rows if r.guesses == 6}
    assert recall[1] > 0.5, recall
    assert recall[0] > 0.3, recall
    first = next(r for r in rows if r.ahead == 1 and r.guesses == 1)
    assert first.missing_precision > 0.5, first
