"""The core does not know which engine it serves: the same routing gives the same hits in both and in the simulator."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flashmoe
from flashmoe.cache.policies import create
from flashmoe.cache.residency import make_residency
from flashmoe.engines.base import SamplingParams
from flashmoe.engines.llamacpp.library import Library
from flashmoe.learn import prefetch as learning
from flashmoe.learn.train import Plan
from flashmoe.routing.trace import DECODE, RoutingTrace
from flashmoe.runtime.model import Model
from tests.engines.transformers.conftest import Checkpoints
from tests.engines.transformers.models import VOCABULARY, make_checkpoint

CACHE = "30%"
BATCH = 4  # tokens of a prompt at once: llama.cpp needs all that they ask a layer for at once


def record(folder: Path, policy: str) -> tuple[RoutingTrace, list[int]]:
    """The trace of two prompts in the transformers engine, and the hits of prefill and decode."""
    with flashmoe.load(
        folder,
        engine="transformers",
        cache=CACHE,
        policy=policy,
        threads=1,
        prefetch="none",
        trace=True,
        n_ubatch=BATCH,
    ) as model:
        for prompt in ([5, 9, 2, 40, 7, 7, 1], [3, 14, 15]):
            for _ in run(model, prompt):
                pass
        assert model.recorder is not None
        return model.recorder.trace(), [s.hits for s in model.cache.stats.values()]


def run(model: Model, prompt: list[int]) -> Iterable[Any]:
    made = model.start(prompt, max_tokens=20, sampling=SamplingParams(temperature=0))
    while not made.finished:
        yield made.step()


def simulate(trace: RoutingTrace, policy: str, model: Model) -> int:
    pool, simulated = model.cache.policy.residency, create(policy)
    simulated.bind(make_residency(pool.n_layers, pool.n_experts, pool.quota, pool.group))
    return int(simulated.replay(trace.expert_ids, trace.steps(), trace.starts()).hits.sum())


def replayed(model: Model, trace: RoutingTrace) -> int:
    """Hits where an engine is made to route as the trace says."""
    first = trace.steps()
    rows: list[Any] = [None]

    def forced(layer: int, ids: Any) -> None:
        ids[:] = trace.expert_ids[rows[0], layer]

    model.engine.override_routing(forced)
    starts = set(np.flatnonzero(trace.starts()).tolist())
    for a, b in zip(first, first[1:], strict=False):
        if a in starts:
            model.engine.rewind(0)
            model.cache.begin_sequence()
        rows[0] = slice(a, b)
        model.decoder.evaluate([1] * (b - a), decode=bool(trace.phase[a] == DECODE))
    return sum(s.hits for s in model.cache.stats.values())


@pytest.mark.parametrize("policy", ["lru", "lfu-aged"])
def test_hits(policy: str, lib: Library, demo: Path, tmp_path: Path) -> None:
    with flashmoe.load(
        demo,
        cache=CACHE,
        policy=policy,
        threads=1,
        prefetch="none",
        layout="plain",
        library=lib,
        all_logits=True,  # else the last layer evaluates only the last token
        n_ubatch=BATCH,
    ) as llama:
        layers, experts, top_k = len(llama.catalog.layers), llama.catalog.n_experts, llama.catalog.top_k
        folder = make_checkpoint(
            "olmoe",
            tmp_path,
            torch.bfloat16,
            shape={"num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": top_k},
        )
        trace, hits = record(folder, policy)
        assert min(hits) > 0
        assert replayed(llama, trace) == sum(hits) == simulate(trace, policy, llama)
    with flashmoe.load(
        folder, engine="transformers", cache=CACHE, policy=policy, threads=1, prefetch="none", n_ubatch=BATCH
    ) as model:
        assert replayed(model, trace) == sum(hits)


def test_generate_of_the_library_is_recorded_and_counted(checkpoint: Checkpoints) -> None:
    with flashmoe.load(
        checkpoint("olmoe"), engine="transformers", cache="50%", threads=1, trace=True
    ) as model:
        prompt = torch.tensor([[1, 2, 3, 4, 5]])
        model.model.generate(prompt, max_new_tokens=6, do_sample=False)
        assert model.recorder is not None
        trace = model.recorder.trace()
        assert trace.token_id[:5].tolist() == [1, 2, 3, 4, 5]
        assert len(trace.token_id) == 5 + 5  # the last token made is not evaluated
        assert trace.router_weights is not None
        assert (trace.expert_ids >= 0).all()
        assert all(phase.requests > 0 for phase in model.cache.stats.values())


def test_prefetching_reads_ahead_and_changes_nothing(tmp_path: Path) -> None:
    """With every kind of predictor, one of them trained on this engine's own trace."""
    folder = make_checkpoint("qwen3_moe", tmp_path, torch.bfloat16, shape={"num_experts": 48})
    made = []
    trained = tmp_path / "promoe.safetensors"
    for prefetch in ("none", "gate", "table", "moe-infinity", "finemoe", f"promoe:{trained}"):
        if prefetch.startswith("promoe"):
            learning.train(made[0], "promoe", Plan(epochs=1, threads=1)).save(trained)
        with flashmoe.load(
            folder, engine="transformers", cache="50%", threads=1, prefetch=prefetch, trace=True
        ) as model:
            for i in range(3):
                for _ in run(model, [(i + 7 * j) % VOCABULARY for j in range(180)]):
                    pass
            assert model.recorder is not None
            made.append(model.recorder.trace())
            if prefetch != "none":
                assert model.prefetcher is not None
                assert model.prefetcher._state.asked.sum() > 0  # it has guessed
    for trace in made[1:]:
        np.testing.assert_array_equal(made[0].expert_ids, trace.expert_ids)
