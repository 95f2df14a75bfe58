"""A tier of experts on a device in front of those in RAM: the very code that runs on a GPU, on the host as a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashmoe
from flashmoe.engines.base import SamplingParams
from flashmoe.engines.transformers import device as devices
from flashmoe.engines.transformers.device import HostDevice
from flashmoe.engines.transformers.experts import PooledExperts
from flashmoe.engines.transformers.front import device_slots, measure_latency
from flashmoe.engines.transformers.latency import TOKENS, Latency, Where
from flashmoe.errors import BudgetError, ReadError, UsageError
from flashmoe.runtime.model import Model
from tests.engines.transformers.conftest import Checkpoints
from tests.engines.transformers.models import VOCABULARY, plain

PROMPT = [(5 * i + 2) % VOCABULARY for i in range(13)]
TOKENS_MADE = 16
SLOW, FAST = ((1, 9.0),), ((1, 0.0),)  # CPUs


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    """Where `--vram` finds a GPU."""
    device = HostDevice()
    monkeypatch.setattr(devices, "open_device", lambda: device)
    return device


def load(folder: Path, cache: str, vram: str | None, **options: Any) -> Model:
    return flashmoe.load(
        folder, engine="transformers", cache=cache, vram=vram, threads=1, all_logits=True, n_ctx=64, **options
    )


def generate(model: Model) -> list[int]:
    made = model.start(PROMPT, max_tokens=TOKENS_MADE, sampling=SamplingParams(temperature=0))
    while not made.finished:
        made.step()
    return made.made


def reference(folder: Path) -> tuple[Any, list[int]]:
    model, prompt = plain(folder), torch.tensor([PROMPT])
    with torch.inference_mode():
        logits = model(prompt).logits[0].float().numpy()
        made = model.generate(prompt, max_new_tokens=TOKENS_MADE, do_sample=False)[0, len(PROMPT) :]
    return logits, made.tolist()


def check(model: Model, logits: Any, tokens: list[int]) -> dict[str, float]:
    model.decoder.evaluate(PROMPT, decode=False)
    for i, row in enumerate(logits):
        assert np.array_equal(model.engine.logits(i), row), i
    assert generate(model) == tokens
    return dict(model.stats["tiers"])


POOLS = [(vram, cache) for vram in ("1%", "40%", "100%") for cache in ("1", "40%", "100%")]
SOME = [("1%", "100%"), ("40%", "40%"), ("100%", "1")]


@pytest.mark.parametrize(
    ("name", "pools"),
    [("olmoe", POOLS), *((name, SOME) for name in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"))],
)
def test_logits_and_tokens(
    name: str, pools: list[tuple[str, str]], checkpoint: Checkpoints, host: HostDevice
) -> None:
    """At pools from one token's experts to all, in both tiers."""
    folder = checkpoint(name, torch.float32)
    logits, tokens = reference(folder)
    requests = set()
    for vram, cache in pools:
        with load(folder, cache, vram) as model:
            tiers = check(model, logits, tokens)
            hits = model.stats["cache"]["hits"]
        asked = tiers["vram_hits"] + tiers["ram_hits"] + tiers["ssd_misses"]
        requests.add(asked)
        assert tiers["vram_hits"] + tiers["ram_hits"] == hits
        assert tiers["copies"] > 0
        if vram == "100%":  # each came once at most
            assert tiers["copies"] <= model.catalog.total_experts
            assert tiers["vram_hits"] > asked / 2
    assert len(requests) == 1  # the same tokens: each request is counted in one tier


def test_a_prompt_is_copied_ahead(checkpoint: Checkpoints, host: HostDevice) -> None:
    """While a layer computes, the next one's experts come from RAM."""
    with load(checkpoint("olmoe"), "100%", "50%", prefetch="none") as model:
        for _ in range(3):
            model.engine.rewind(0)
            model.decoder.evaluate(PROMPT, decode=False)
        tiers: Any = model.engine.tiers
        assert tiers._cache.stats["prefill"].prefetch_hits > 0


def test_experts_added_in_another_type(checkpoint: Checkpoints, host: HostDevice) -> None:
    """They must be on the device together; RAM may be smaller."""
    folder = checkpoint("nemotron_h")
    logits, tokens = reference(folder)
    with load(folder, "1", "100%") as model:
        check(model, logits, tokens)
    with load(folder, "100%", "1%") as model, pytest.raises(BudgetError, match="do not fit into the pool"):
        model.decoder.evaluate(PROMPT, decode=False)


def test_hits_of_the_device_are_those_of_its_policy(checkpoint: Checkpoints, host: HostDevice) -> None:
    """A tier on the device hits as a pool of its size in RAM does."""
    folder = checkpoint("olmoe")
    with load(folder, "100%", "40%", prefetch="none", policy="lru") as model:
        generate(model)
        tiers = model.stats["tiers"]
    with load(folder, "40%", None, prefetch="none", policy="lru") as model:
        generate(model)
        alone = model.stats
    assert tiers["vram_hits"] == alone["cache"]["hits"] > 0
    assert tiers["ssd_misses"] + tiers["ram_hits"] == alone["cache"]["misses"] > 0
    assert alone["tiers"] == {}


@pytest.mark.parametrize("cpu", [SLOW, FAST])
def test_computing_on_the_cpu(cpu: Any, checkpoint: Checkpoints, host: HostDevice, monkeypatch: Any) -> None:
    """An expert in RAM is copied or computed there, whichever is said to be faster."""
    folder = checkpoint("qwen2_moe", torch.float32)
    logits, tokens = reference(folder)
    with load(folder, "60%", "30%") as model:
        tiers = model.engine.tiers
        monkeypatch.setattr(tiers, "_latency", Latency(1.0, 0.0, cpu))
        figures = check(model, logits, tokens)
    assert (figures["computed_on_cpu"] > 0) is (cpu is FAST)
    assert figures["vram_hits"] > 0 < figures["ram_hits"]


def test_prefetching_leaves_what_the_device_has(
    checkpoint: Checkpoints, host: HostDevice, monkeypatch: Any
) -> None:
    with load(checkpoint("olmoe"), "50%", "50%", prefetch="none") as model:
        generate(model)
        asked: list[list[int]] = []
        monkeypatch.setattr(model.cache, "prefetch", lambda layer, experts: asked.append(list(experts)))
        tiers: Any = model.engine.tiers
        here = np.flatnonzero(tiers._cache.policy.residency.slot_of[1] >= 0).tolist()
        assert here
        tiers.prefetch(1, range(model.catalog.n_experts))
        assert sorted(asked[0] + here) == list(range(model.catalog.n_experts))


def test_a_failed_read_and_an_interrupt_leave_the_tiers_consistent(
    checkpoint: Checkpoints, host: HostDevice, monkeypatch: Any
) -> None:
    folder = checkpoint("mixtral")
    logits, tokens = reference(folder)
    with load(folder, "1", "30%") as model:
        reader = model.cache.reader
        for error in (ReadError("the drive is gone"), KeyboardInterrupt()):
            calls = 0

            def fail(
                ticket: Any, wait: Callable[[Any], None] = reader.wait, error: BaseException = error
            ) -> None:
                nonlocal calls
                calls += 1
                if calls == 4:
                    raise error
                wait(ticket)

            with monkeypatch.context() as patch:
                patch.setattr(reader, "wait", fail)
                with pytest.raises(type(error)):
                    model.decoder.evaluate(PROMPT, decode=False)
            assert calls == 4
        check(model, logits, tokens)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "granitemoe", "nemotron_h"])
def test_what_a_gpu_computes(name: str, checkpoint: Checkpoints) -> None:
    """Without the library's forward, which waits: the same numbers, in another order of reduction."""
    folder = checkpoint(name, torch.float32) if name != "nemotron_h" else checkpoint(name)
    with flashmoe.load(folder, engine="transformers", cache="100%", threads=1, all_logits=True) as model:
        model.decoder.evaluate(PROMPT, decode=False)
        exact = [model.engine.logits(i) for i in range(len(PROMPT))]
        pooled: list[PooledExperts] = [
            module.pooled_experts for module in model.model.modules() if hasattr(module, "pooled_experts")
        ]
        for experts in pooled:
            experts._exact, experts._apart = False, True
        model.engine.rewind(0)
        model.decoder.evaluate(PROMPT, decode=False)
        for i, row in enumerate(exact):
            tolerance = 1e-4 if name != "nemotron_h" else 0.05
            np.testing.assert_allclose(model.engine.logits(i), row, rtol=tolerance, atol=tolerance)


def test_latencies_are_measured(checkpoint: Checkpoints, host: HostDevice) -> None:
    with load(checkpoint("gpt_oss"), "50%", "50%") as model:
        tiers: Any = model.engine.tiers
        experts = model.model.get_submodule("model.layers.0.mlp.experts").pooled_experts
        measured = measure_latency(host, tiers._slots, tiers._ram_slots, experts)
        assert [n for n, _ in measured.host] == list(TOKENS)
        assert min(measured.copy, measured.device, *(s for _, s in measured.host)) > 0


SECONDS = st.floats(0, 10)


@st.composite
def latencies(draw: st.DrawFn) -> Latency:
    tokens = sorted(draw(st.sets(st.integers(1, 64), min_size=1, max_size=6)))
    return Latency(draw(SECONDS), draw(SECONDS), tuple((n, draw(SECONDS)) for n in tokens))


@given(latencies(), st.integers(1, 512), SECONDS)
def test_choice(latency: Latency, n: int, paid: float) -> None:
    choice = latency.choose(n, paid)
    cheaper = latency.host_seconds(n) + paid < latency.copy + latency.device
    assert choice is (Where.COMPUTE if cheaper else Where.COPY)
    if choice is Where.COPY:  # more to compute, or more spent already, never speaks for the CPU
        assert latency.choose(n, paid + 1) is Where.COPY
    measured = [s for _, s in latency.host]
    if n in dict(latency.host):
        assert latency.host_seconds(n) >= min(measured)
    # what is computed time and again is copied before it has cost twice a copy
    spent, steps = 0.0, 0
    while latency.choose(n, spent) is Where.COMPUTE and latency.host_seconds(n) > 1e-3:
        spent, steps = spent + latency.host_seconds(n), steps + 1
        assert spent < latency.copy + latency.device


@given(st.lists(st.tuples(st.integers(1, 64), SECONDS), min_size=1, max_size=6, unique_by=lambda p: p[0]))
def test_more_tokens_never_cost_the_cpu_less(points: list[tuple[int, float]]) -> None:
    rising = tuple(zip(sorted(n for n, _ in points), sorted(s for _, s in points), strict=True))
    latency = Latency(1.0, 0.0, rising)
    seconds = [latency.host_seconds(n) for n in range(1, 200)]
    assert all(a <= b + 1e-9 for a, b in zip(seconds, seconds[1:], strict=False))
    for n, measured in rising:
        assert latency.host_seconds(n) == pytest.approx(measured)


def test_sizes(checkpoint: Checkpoints, host: HostDevice) -> None:
    with load(checkpoint("olmoe"), "50%", None) as model:
        catalog = model.catalog
    whole = device_slots("100%", catalog, 1 << 40, 1 << 20)
    assert whole == [catalog.total_experts]
    assert device_slots("50%", catalog, 1 << 40, 1 << 20) == [catalog.total_experts // 2]
    assert device_slots(str(1 << 40), catalog, 1 << 40, 1 << 20) == whole
    with pytest.raises(
        BudgetError, match=r"--vram 100% needs .* of the GPU's memory, 1\.00 MiB of it .* are free"
    ):
        device_slots("100%", catalog, 1 << 20, 1 << 20)
    with pytest.raises(
        BudgetError, match=r"--vram 1\.00 MiB is too small .* the smallest that works is 16MiB"
    ):
        device_slots("1MiB", catalog, 1 << 40, 1 << 20)
    assert sum(device_slots("16MiB", catalog, 1 << 40, 1 << 20)) >= catalog.top_k
    with pytest.raises(UsageError, match="cannot read the size"):
        device_slots("much", catalog, 1 << 40, 0)


def test_budgets(checkpoint: Checkpoints, host: HostDevice) -> None:
    folder = checkpoint("olmoe")
    with flashmoe.load(folder, engine="transformers", ram="3GiB", vram="2GiB", threads=1, n_ctx=64) as model:
        assert generate(model)
        assert model.stats["tiers"]["vram_slots"] == model.catalog.total_experts


def test_without_a_gpu(checkpoint: Checkpoints, demo: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UsageError, match="--vram needs a CUDA GPU, and .*: leave it away"):
        load(checkpoint("olmoe"), "50%", "50%")
    with pytest.raises(UsageError, match="--vram is for --engine transformers"):
        flashmoe.load(demo, cache="50%", vram="50%")
