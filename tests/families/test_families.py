"""Every architecture with experts that the library knows: logits are stock's, and what is recorded, simulated and
planned is what the run did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import flashmoe
from flashmoe.cache.policies import create
from flashmoe.cache.sizing import group_top_k
from flashmoe.engines.llamacpp.engine import LlamaEngine
from flashmoe.engines.llamacpp.library import Library
from flashmoe.runtime.layout import PLAIN, REPACKED
from flashmoe.runtime.model import Model
from flashmoe.simulate.curve import hit_curve
from flashmoe.simulate.partition import pool_for
from flashmoe.tools.plan import Machine, make_plan
from tests.engines.reference import CONTEXT, Reference, Run, prompt
from tests.engines.test_exact import streaming_tables_from
from tests.models.families import FAMILIES, WIDE
from tests.models.library import families

PART = "50%"
WITHOUT_LOGITS = ("llama-embed-moe", "nomic-bert-moe")  # their graphs end with embeddings
BATCH = 16  # models that are made together
MACHINE = Machine(compute={"Q8_0": 10.0}, drive={1: 1.0, 4: 2.0, 32: 3.0})


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The path of a model, made when it is first asked for, with those that are asked for next."""
    folder = tmp_path_factory.mktemp("families")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            names = [name] if name.endswith(WIDE) else list(FAMILIES)
            at = names.index(name)
            made.update(families(names[at : at + BATCH], folder))
        return made[name]

    return get


def run(model: Model, expected: Run) -> np.ndarray:
    """Logits of the tokens of a stock run, [tokens, vocabulary], evaluated as the model's own loop does."""
    step, logits = model.engine.n_ubatch, []
    tokens = prompt(expected.logits.shape[1])
    for start in range(0, len(tokens), step):
        batch = tokens[start : start + step]
        model.decoder.evaluate(batch, decode=False)
        logits += [model.engine.logits(i) for i in range(len(batch))]
    for token in expected.decoded:
        model.decoder.evaluate([token], decode=True)
        logits.append(model.engine.logits())
    return np.stack(logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name: str, path_of: Callable[[str], Path], lib: Library) -> None:
    path = path_of(name)
    layout = (PLAIN, REPACKED)[list(FAMILIES).index(name) % 2]
    reference = Reference(lib, path, layout)
    options = {"n_ctx": CONTEXT, "threads": 1, "layout": layout, "all_logits": True, "library": lib}
    options |= {"policy": "lru", "prefetch": "none"}
    try:
        for cache in ("1", PART):
            with (
                streaming_tables_from(0 if cache == PART else 1 << 40),
                flashmoe.load(path, cache=cache, trace=True, **options) as model,  # type: ignore[arg-type]
            ):
                expected = reference.run(model.engine.n_ubatch, 1)
                got = run(model, expected)
                differing = np.flatnonzero((got.view(np.int32) != expected.logits.view(np.int32)).any(axis=1))
                assert not len(differing), f"{cache}: logits differ from token {differing[0]} on"
                assert np.isfinite(got).all()
                assert np.std(got, axis=0).mean() > 0 or name in WITHOUT_LOGITS  # they depend on the text
                as_recorded(model)
            if cache == "1":
                assert model.cache.policy.residency.n_slots == sum(group_top_k(model.catalog))
    finally:
        reference.close()


def as_recorded(model: Model) -> None:
    """The trace of a run fits its model, and its simulation makes the hits that the run made."""
    assert isinstance(model.engine, LlamaEngine)
    assert model.recorder is not None
    catalog, trace = model.catalog, model.recorder.trace()
    trace.check_model(len(catalog.layers), catalog.n_experts)
    assert trace.model == catalog.identity
    assert trace.layer_top_k.tolist() == [layer.top_k for layer in catalog.layers]
    assert (trace.expert_ids[-1, :, 0] >= 0).all()  # every layer of the pool is asked
    policy = create("lru")
    policy.bind(pool_for(trace, model.cache.policy.residency.n_slots))
    assert policy.residency.quota.tolist() == model.cache.policy.residency.quota.tolist()
    simulated = policy.replay(trace.expert_ids, trace.steps(), trace.starts())
    counted = model.cache_stats.values()
    assert simulated.hits.sum() == sum(phase.hits - phase.prefetch_hits for phase in counted)
    assert simulated.requests.sum() == sum(phase.requests for phase in counted)
    plan = make_plan(catalog, MACHINE, hit_curve(trace, "own", "lru"), lambda tokens, _: 1000 * tokens)
    assert plan.layers == trace.n_layers
    assert [row.tokens_per_second for row in plan.rows] == sorted(row.tokens_per_second for row in plan.rows)
