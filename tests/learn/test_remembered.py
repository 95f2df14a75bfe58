"""What is remembered of a model between sessions, and what `flashmoe learn` makes of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import flashmoe
from flashmoe.cache import remembered as module
from flashmoe.cache.policies import create
from flashmoe.cache.policies.adaptive import Adaptive
from flashmoe.cache.policies.default import create_for, default_for
from flashmoe.cache.remembered import Remembered
from flashmoe.engines.base import SamplingParams
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import FlashMoEWarning, TraceError
from flashmoe.learn.plus_shape import Sizes
from flashmoe.learn.remembered import compare, learn
from flashmoe.routing.trace import DECODE, RoutingTrace
from flashmoe.simulate.replay import replay
from tests.cli.runner import flashmoe as command
from tests.learn.test_learned import untrained
from tests.simulate.traces import made_up

IDENTITY = {"architecture": "made-up", "name": "made up", "tensors_sha256": "0" * 64}


@pytest.fixture(autouse=True)
def own_cache(own_home: Path) -> None:
    """Nothing is remembered when a test begins."""


def remember(tokens: int, seed: int = 0) -> Remembered:
    """A model of 3 layers, 2 of 16 experts, that was used for so many tokens."""
    remembered, trace = Remembered(IDENTITY), made_up(tokens, seed=seed)
    remembered.add_history(trace.expert_ids, trace.sequence_id, trace.num_experts)
    return remembered


def session(demo: Path, lib: Library, seed: int, **options: object) -> tuple[RoutingTrace, int]:
    """The routing of a session that learns, and its hits."""
    with flashmoe.load(
        demo, cache="25%", n_ctx=256, threads=1, policy="online", prefetch="none", learn=True, trace=True,
        library=lib, **options,
    ) as model:  # fmt: skip
        sampling = SamplingParams(seed=seed, ignore_eos=True)
        for _ in model.generate("The lighthouse", max_tokens=150, sampling=sampling):
            pass
        assert model.recorder
        return model.recorder.trace(), model.cache.stats["decode"].hits


def test_the_next_session_goes_on_and_the_simulator_with_it(demo: Path, lib: Library) -> None:
    first, _ = session(demo, lib, 1)
    remembered = Remembered(first.model)
    history = remembered.history()
    assert history
    np.testing.assert_array_equal(
        np.sort(history.expert_ids, axis=2), np.sort(first.expert_ids[first.phase == DECODE], axis=2)
    )
    assert (history.token_id == -1).all()
    assert all(path.stat().st_mode & 0o077 == 0 for path in remembered.folder.iterdir())
    expected = create("online")
    remembered.recall(expected, first.n_layers, first.num_experts)
    second, hits = session(demo, lib, 2)
    slots = round(0.25 * first.n_layers * first.num_experts)
    replayed = replay(second, expected, slots)
    decoded = second.phase[second.steps()[:-1]] == DECODE
    assert int(replayed.hits[decoded].sum()) == hits
    assert hits != int(replay(second, create("online"), slots).hits[decoded].sum())
    grown = remembered.history()
    assert grown
    assert grown.n_tokens == int((first.phase == DECODE).sum() + (second.phase == DECODE).sum())
    assert grown.n_sequences == 2


def test_an_approximate_session_teaches_nothing(demo: Path, lib: Library) -> None:
    """Its routing is not the model's."""
    first, _ = session(demo, lib, 1)
    before = Remembered(first.model).history()
    session(demo, lib, 2, approx="cache:0.5")
    after = Remembered(first.model).history()
    assert before
    assert after
    assert after.n_tokens == before.n_tokens


def test_nothing_is_kept_unless_asked_for(demo: Path, tmp_path: Path) -> None:
    run = ("run", demo, "--cache", "25%", "-p", "Once", "-n", "8", "--policy", "online", "-t", 1)
    assert command(*run, "--no-learn").status == 0
    assert not module.folder().exists()
    assert command(*run).status == 0
    assert module.nbytes() > 0
    assert "forgotten" in command("learn", demo, "--forget").out
    assert module.nbytes() == 0
    assert json.loads(command("learn", demo, "--forget", "--json", "-").out) == {"forgotten": False}


def test_the_history_is_bounded_and_starts_anew_where_it_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 3 * 2 * 500)
    remember(400, seed=1)
    remembered = remember(300, seed=2)
    history = remembered.history()
    assert history
    assert history.n_tokens == 500
    np.testing.assert_array_equal(history.expert_ids[-300:], made_up(300, seed=2).expert_ids)
    (remembered.folder / "routing.safetensors").write_bytes(b"damaged")
    with pytest.warns(FlashMoEWarning, match="the history begins anew"):
        assert remembered.history() is None
    (remembered.folder / "online.safetensors").write_bytes(b"damaged")
    policy = create("online")
    with pytest.warns(FlashMoEWarning, match="learning begins anew"):
        remembered.recall(policy, 3, 16)
    assert (
        replay(made_up(100), policy, 12).hits.sum() == replay(made_up(100), create("online"), 12).hits.sum()
    )


def test_what_was_learnt_of_another_shape_is_left_out() -> None:
    remembered, policy = Remembered(IDENTITY), create("adaptive")
    replay(made_up(200), policy, 12)
    remembered.keep(policy)
    saved = load_file(remembered.folder / "online.safetensors")
    assert saved["weight"].any()
    again = create("adaptive")
    remembered.recall(again, 3, 16)
    np.testing.assert_array_equal(again.make_state(3, 16).online.weight, saved["weight"])
    with pytest.warns(FlashMoEWarning, match="does not fit"):
        remembered.recall(again, 3, 32)
    assert not again.make_state(3, 32).online.weight.any()


def test_learns_without_torch_and_is_used_if_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    remembered = remember(900)
    with pytest.raises(TraceError, match="900 tokens.*at least 1024"):
        learn(remembered)
    remembered = remember(2000, seed=3)
    small = Sizes(r=8, h=16, k=3, m=5)
    verdict = learn(remembered, sizes=small)
    assert list(verdict.held_out) == ["12.5%", "25%", "50%"]
    assert verdict.tokens + verdict.held_out_tokens == 2900
    assert verdict.loss[-1] < verdict.loss[0]
    assert verdict.better == remembered.policy.exists()
    monkeypatch.setattr("flashmoe.learn.remembered.LEAD", -1.0)
    assert learn(remembered, sizes=small).better
    assert default_for(IDENTITY) == f"adaptive:{remembered.policy}"
    made = create_for("default", IDENTITY, 3, 16)
    assert isinstance(made, Adaptive)
    assert made.learned
    monkeypatch.setattr("flashmoe.learn.remembered.LEAD", 1.0)
    assert not learn(remembered, sizes=small).better
    assert default_for(IDENTITY) == default_for({})


def test_a_policy_that_was_learnt_is_the_next_start_s(demo: Path, lib: Library) -> None:
    options: dict[str, object] = {"cache": "25%", "threads": 1, "n_ctx": 64, "library": lib}
    with flashmoe.load(demo, **options) as model:
        identity, catalog = model.catalog.identity, model.catalog
    file = untrained("flashmoe+", len(catalog.layers), catalog.n_experts, catalog.top_k)
    remembered = Remembered(identity)
    file.model.update(identity)
    file.save(remembered.policy)
    for more, expected in (
        ({"learn": True}, True),
        ({}, False),
        ({"learn": True, "policy": "adaptive"}, False),
    ):
        with flashmoe.load(demo, **options, **more) as model:
            assert isinstance(model.cache.policy, Adaptive)
            assert (model.cache.policy.learned is not None) == expected
    remembered.policy.write_bytes(b"damaged")
    with pytest.warns(FlashMoEWarning, match="left out"), flashmoe.load(demo, **options, learn=True) as model:
        assert getattr(model.cache.policy, "learned", file) is None


def test_the_comparison_is_on_the_newest_part() -> None:
    trace = made_up(600)
    rates = compare(trace, 100, {"lru": lambda: create("lru")})
    whole = replay(trace, create("lru"), 12)
    assert rates["25%"]["lru"] == pytest.approx(
        whole.hits[-100:].sum() / whole.requests[-100:].sum(), abs=1e-4
    )
