"""Routing of a real model: the runtime's hits are the simulator's, and recording goes on where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import flashmoe
from flashmoe.cache.policies import BUILTIN, create
from flashmoe.cache.policies.base import MISSES
from flashmoe.cache.residency import make_residency
from flashmoe.cli.trace import app
from flashmoe.engines.base import SamplingParams
from flashmoe.engines.llamacpp.embeddings import TokenEmbeddings, table_of
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import FlashMoEWarning
from flashmoe.prefetch.base import Predictor
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.routing.trace import PREFILL, RoutingTrace
from flashmoe.runtime import open_gguf as gguf
from flashmoe.runtime.model import Model
from flashmoe.simulate.told import replay_told
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.gguf import read_gguf
from flashmoe.storage.hub import DEMO, default_policy
from tests.conftest import Tiny
from tests.learn.test_learned import untrained

PROMPTS = ("Tell me a story about a king and his three sons.", "The bread was cold, and nobody came.")


@pytest.mark.parametrize("name", [*(n for n in BUILTIN if n != "belady"), "adaptive:FILE"])
def test_hits_of_the_runtime_are_the_simulator_s(name: str, lib: Library, demo: Path, tmp_path: Path) -> None:
    """Request by request, prompts in micro-batches included."""
    spec = name
    learned = default_policy(DEMO)  # flashmoe+:FILE
    if name == "flashmoe":
        catalog = ExpertCatalog.from_gguf(read_gguf(demo))
        file = untrained("flashmoe", len(catalog.layers), catalog.n_experts, catalog.top_k)
        file.save(tmp_path / "p.safetensors")
        spec = f"flashmoe:{tmp_path / 'p.safetensors'}"
    elif name == "flashmoe+":
        spec = learned
    elif name == "adaptive:FILE":
        spec = learned.replace("flashmoe+", "adaptive")
    calls: list[tuple[int, list[int]]] = []  # of layers that miss some
    with flashmoe.load(
        demo,
        cache="25%",
        n_ctx=128,
        n_ubatch=8,
        threads=1,
        policy=spec,
        prefetch="none",
        library=lib,
    ) as model:
        model.record(ranked=name == "finemoe")
        policy, ensure = model.cache.policy, model.cache.ensure

        def noted(layer: int, ids: Any, **options: Any) -> Any:
            before, done = policy.residency.slot_of[layer].copy(), options["requested"]
            slots = ensure(layer, ids, **options)
            missed = [e for e in np.unique(ids).tolist() if before[e] < 0]
            if done >= 0:  # compiled code has asked the policy already
                missed = sorted(model.cache._miss_expert[: done & MISSES].tolist())
            if missed:
                calls.append((layer, missed))
            return slots

        model.cache.ensure = noted  # type: ignore[method-assign]
        for prompt in PROMPTS:
            for _ in model.generate(prompt, max_tokens=12, sampling=SamplingParams(temperature=0)):
                pass
        assert model.recorder is not None
        trace, pool = model.recorder.trace(), policy.residency
        # a prompt's experts are read ahead of their layer even without prefetching: to the simulator these are misses
        counted = sum(phase.hits - phase.prefetch_hits for phase in model.cache.stats.values())
    simulated = create(spec)
    simulated.bind(make_residency(pool.n_layers, pool.n_experts, pool.quota, pool.group))
    if simulated.needs_ranking:
        table = table_of(read_gguf(demo))
        assert table is not None
        simulated.use_embeddings(TokenEmbeddings(lib, table))
        result = replay_told(trace, simulated, want_bits=True)
        told, own = simulated.state(), policy.state()
        assert told["number"][0] == own["number"][0] > 12
        assert all(np.array_equal(told[part], own[part]) for part in ("past", "embedding", "visits", "score"))
    else:
        result = simulated.replay(trace.expert_ids, trace.steps(), trace.starts(), want_bits=True)
    first = trace.steps()
    at = 0
    for a, b in zip(first, first[1:], strict=False):
        for layer in range(trace.n_layers):
            ids = trace.expert_ids[a:b, layer]
            if missed := sorted(ids[(ids >= 0) & (result.bits[a:b, layer] == 1)].tolist()):
                assert calls[at] == (layer, missed), (a, layer)
                at += 1
    assert at == len(calls)
    assert (trace.phase == PREFILL).any()
    assert result.hits.sum() == counted > 0


def test_layers_that_pick_fewer_experts_than_others(lib: Library, tiny: Tiny) -> None:
    """A trace and what the report's advice looks at have -1 in the place of further experts."""
    with flashmoe.load(
        tiny("nemotron_h_moe"), cache="60%", n_ctx=128, threads=1, prefetch="none", trace=True, library=lib
    ) as model:
        text = list(model.generate(PROMPTS[0], max_tokens=12, sampling=SamplingParams(temperature=0)))
        assert model.recorder is not None
        trace = model.recorder.trace()
        recent, _ = model.cache.recent.last()
        picked = [(trace.expert_ids[:, layer] >= 0).sum(axis=1) for layer in range(trace.n_layers)]
        assert len({int(n.max()) for n in picked}) > 1
        decoded = trace.expert_ids[trace.phase != PREFILL]
        assert np.array_equal(recent[-len(decoded) :], decoded)

        class Broken:
            def begin_step(self) -> None:
                pass

            def add(self, *_: Any) -> None:
                raise ValueError("no room")

        model.decoder.engine.record(Broken())
        with pytest.warns(flashmoe.errors.FlashMoEWarning, match="recording .* has ended: no room"):
            again = list(model.generate(PROMPTS[0], max_tokens=12, sampling=SamplingParams(temperature=0)))
        assert again == text


@pytest.fixture
def record(lib: Library, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """record(output): `flashmoe trace record` of three prompts."""
    monkeypatch.setattr(gguf, "tested_library", lambda: lib)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A cat sat.\nThe rain fell on the roof.\nWhy not?\n", encoding="utf-8")
    options = ["-n", "6", "-c", "64", "-t", "1", "--temp", "0", "--cache", "50%"]

    def call(output: Path, *more: str) -> Any:
        return CliRunner().invoke(
            app, ["record", str(demo), "--prompts", str(prompts), "-o", str(output), *options, *more]
        )

    return call


def last_logits(lib: Library, demo: Path, prepare: Callable[[Model], None]) -> bytes:
    """After four tokens, decoded by a model that was prepared."""
    with flashmoe.load(demo, cache="50%", n_ctx=64, threads=1, prefetch="none", library=lib) as model:
        prepare(model)
        for token in range(100, 104):
            model.engine.decode([token])
        return model.engine.logits().tobytes()


def test_an_observer_that_fails_ends_nothing_but_itself(lib: Library, demo: Path) -> None:
    class Full:
        calls = 0

        def begin_step(self) -> None:
            pass

        def add(self, layer: int, ids: Any, weights: Any = None) -> None:
            self.calls += 1
            if self.calls == 5:
                raise RuntimeError("no room left")

    expected, observer = last_logits(lib, demo, lambda model: None), Full()
    with pytest.warns(FlashMoEWarning, match="recording of the routing has ended: no room left"):
        assert last_logits(lib, demo, lambda model: model.engine.record(observer)) == expected
    assert observer.calls == 5


@pytest.mark.parametrize("place", ["begin_sequence", "use_routers"])
def test_a_predictor_that_fails_between_steps(place: str, lib: Library, demo: Path) -> None:
    def fail(self: Predictor, *_: Any) -> None:
        raise ZeroDivisionError(place)

    def nothing(self: Predictor, *_: Any) -> None:
        pass

    quiet = dict.fromkeys(
        ("make_state", "begin_sequence", "begin_step", "observe", "observe_many", "predict"), nothing
    )
    predictor = type("Broken", (Predictor,), {**quiet, place: fail})()

    def texts(model: Model) -> list[str]:
        sampling = SamplingParams(temperature=0)
        return ["".join(model.generate("A colour is", max_tokens=8, sampling=sampling)) for _ in range(2)]

    with flashmoe.load(demo, cache="50%", threads=1, library=lib, prefetch="none") as model:
        expected = texts(model)
    with flashmoe.load(demo, cache="50%", threads=1, library=lib, prefetch="table") as model:
        assert model.prefetcher
        model.prefetcher._predictors = model.prefetcher._learning = [predictor]
        with pytest.warns(FlashMoEWarning, match=f"prefetching has ended: {place}"):
            assert texts(model) == expected


def test_a_predictor_that_fails_ends_nothing_but_itself(lib: Library, demo: Path) -> None:
    class Broken(Predictor):
        name = "broken"
        calls = 0

        def make_state(self, n_layers: int, n_experts: int, top_k: int) -> None:
            pass

        def begin_step(self, token: int) -> None:
            self.calls += 1

        def observe(self, layer: int, ids: Any) -> None:
            if self.calls == 2 and layer:
                raise ZeroDivisionError("division by zero")

        def predict(self, layer: int, target: int, out: Any) -> None:
            out[:] = 0

    def predict(model: Model) -> None:
        model.engine.prefetch(Prefetcher([predictor], model.cache))
        model.cache.phase = "decode"

    expected, predictor = last_logits(lib, demo, lambda model: None), Broken()
    with pytest.warns(FlashMoEWarning, match="prefetching has ended: division by zero"):
        assert last_logits(lib, demo, predict) == expected
    assert predictor.calls == 2


def test_recording_goes_on_where_it_was_interrupted(
    record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert record(tmp_path / "whole.safetensors").exit_code == 0
    whole = RoutingTrace.load(tmp_path / "whole.safetensors")
    output = tmp_path / "parts.safetensors"
    generate = Model.generate
    begun: list[str] = []

    def interrupted(model: Model, prompt: str, **options: Any) -> Iterator[str]:
        begun.append(prompt)
        for number, piece in enumerate(generate(model, prompt, **options)):
            if len(begun) == 2 and number == 3:
                raise KeyboardInterrupt
            yield piece

    with monkeypatch.context() as patch:
        patch.setattr(Model, "generate", interrupted)  # in the middle of the second prompt
        assert record(output).exit_code != 0
    assert RoutingTrace.load(output).n_sequences == 1  # an unfinished prompt is not kept
    result = record(output)
    assert result.exit_code == 0, result.output
    assert "1 of 3 prompts: going on" in result.output
    parts = RoutingTrace.load(output)
    for field in ("expert_ids", "router_weights", "token_id", "sequence_id", "phase", "step"):
        np.testing.assert_array_equal(getattr(parts, field), getattr(whole, field), err_msg=field)
    assert record(output).exit_code == 0  # nothing left to do
    assert record(output, "--restart", "-q").exit_code == 0
    np.testing.assert_array_equal(RoutingTrace.load(output).expert_ids, whole.expert_ids)
