"""What differs between families: prefetching, late reads, several sequences, experts for values, contexts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashmoe
from flashmoe.engines.llamacpp.engine import LlamaEngine
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.sizes import ContextSizes
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.gguf import read_gguf
from tests.engines.reference import CONTEXT, Reference
from tests.engines.test_exact import streaming_tables_from
from tests.families.test_families import run
from tests.models.library import families

# blocks of prediction that the library loads; several hashes of a token; layers of other widths; linear attention
WIDE = ("hy_v3-mtp@64", "step35-mtp@64", "qwen4exp@64", "nemotron_h_moe-mtp@64", "kimi-k3@64")
CLAMPED_IN_SOME_LAYERS = ("step35", "bailingmoe3")
SEVERAL = ("qwen4exp", "kimi-k3", "deepseek4-mtp", "glm5-next")
VALUES = "k2-horizon"
WINDOWED = "maple"
NAMES = [*WIDE, *CLAMPED_IN_SOME_LAYERS, *SEVERAL, VALUES, WINDOWED]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return families(NAMES, tmp_path_factory.mktemp("traits"))


def hook_of(model: flashmoe.Model) -> Any:
    assert isinstance(model.engine, LlamaEngine)
    return model.engine._hook


@pytest.mark.parametrize("name", WIDE)
def test_prefetching_among_64_experts(name: str, paths: dict[str, Path], lib: Library) -> None:
    reference = Reference(lib, paths[name])
    try:
        with (
            streaming_tables_from(0),
            flashmoe.load(
                paths[name], cache="70%", prefetch="gate", threads=1, layout="plain", n_ctx=CONTEXT,
                all_logits=True, library=lib,
            ) as model,
        ):  # fmt: skip
            expected = reference.run(model.engine.n_ubatch, 1)
            assert np.array_equal(run(model, expected), expected.logits)
            assert len(hook_of(model)._routers.known) == len(model.catalog.layers)
            assert not any(name in model.catalog.skipped for name in model.catalog.resident)
    finally:
        reference.close()


@pytest.mark.parametrize("name", CLAMPED_IN_SOME_LAYERS)
def test_the_last_weight_is_read_late_where_layers_differ(
    name: str, paths: dict[str, Path], lib: Library
) -> None:
    with flashmoe.load(paths[name], cache="40%", n_ctx=CONTEXT, threads=1, library=lib) as model:
        for token in range(4):
            model.engine.decode([token])
        control = hook_of(model)._control
        names = hook_of(model)._late.raw[: control.late_length].split(b"\0")
        assert len(names) > 1
        assert all(name.endswith(b"-") for name in names)


@pytest.mark.parametrize("name", SEVERAL)
def test_several_sequences_at_once(name: str, paths: dict[str, Path], lib: Library) -> None:
    with flashmoe.load(
        paths[name], cache="100%", parallel=2, n_ctx=256, threads=1, prefetch="none", library=lib
    ) as model:
        request = {"n_predict": 8, "temperature": 0, "ignore_eos": True, "prompt": [1, 2, 3, 4]}

        def made(_: int) -> int:
            events = list(model.server().complete(request))
            return next(event["timings"]["predicted_n"] for event in reversed(events) if "timings" in event)

        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(made, range(2))) == [8, 8]


def test_experts_for_values_are_streamed(paths: dict[str, Path], lib: Library) -> None:
    catalog = ExpertCatalog.from_gguf(read_gguf(paths[VALUES]))
    values = [layer for layer in catalog.layers if layer.values]
    assert [layer.block for layer in values] == [layer.block for layer in catalog.layers if not layer.values]
    assert {(layer.n_experts, layer.top_k) for layer in values} == {(8, 2)}
    assert len(set(catalog.places)) == len(catalog.layers)
    with flashmoe.load(
        paths[VALUES], cache="1", n_ctx=CONTEXT, threads=1, prefetch="none", library=lib
    ) as model:
        model.engine.decode([1])
        residency = model.cache.policy.residency
        for number, layer in enumerate(model.catalog.layers):
            assert layer.values == (len(layer.weights) == 1)
            assert residency.accesses[number] == 1


def test_contexts_are_those_of_the_library(paths: dict[str, Path], lib: Library) -> None:
    """Half of the blocks look back 16 tokens; linear attention keeps a state that does not grow."""
    sizes = {}
    for name in (WINDOWED, "kimi-k3"):
        gguf = read_gguf(paths[name])
        with ContextSizes(lib, gguf) as asked:
            sizes[name] = [asked.nbytes(n, 16) for n in (256, 512)]
    few, many = sizes[WINDOWED]
    each = 2 * 2 * 16 * 2  # bytes of a token in a block: K and V, 2 heads of 16 numbers of 2 bytes
    mask = 2 * 4 * 16  # and of the masks of 16 tokens, of both kinds
    assert 2 * 256 * each <= many - few <= 3 * 256 * (each + mask)
    few, many = sizes["kimi-k3"]
    assert 0 < many - few < few
