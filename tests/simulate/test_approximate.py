"""Approximate routing on a trace: what is recorded, and hits that are close to a run's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import flashmoe
from flashmoe.bench.quality import QualityPlan, cut, run
from flashmoe.bench.spec import Size
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import TraceError, UsageError
from flashmoe.routing.files import merge
from flashmoe.routing.trace import DECODE, RoutingTrace
from flashmoe.runtime.options import LoadOptions
from flashmoe.simulate.approximate import simulate_approximately
from tests.cli.runner import flashmoe as command
from tests.conftest import Tiny

TEXT = "The old man came down to the harbour every evening before the lamps were lit. He walked slowly. " * 5
APPROX = "cache:0.2+drop:0.6"


@pytest.fixture(scope="module")
def trace(demo: Path, lib: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A window of the text, 16 tokens of it as a prompt, as `flashmoe quality` evaluates it."""
    path = tmp_path_factory.mktemp("ranked") / "t.safetensors"
    with flashmoe.load(demo, library=lib, threads=1, cache="25%", prefetch="none", n_ctx=256) as model:
        recorder = model.record(ranked=True)
        (window,) = cut(model.engine.tokenize(TEXT), 256)
        model.decoder.rewind()
        model.decoder.evaluate(window[:16], decode=False)
        for token in window[16:-1]:
            model.decoder.evaluate([token], decode=True)
        recorder.save(path)
    return path


def test_recorded(trace: Path) -> None:
    made = RoutingTrace.load(trace)
    assert made.ranked_ids is not None
    assert made.ranked_scores is not None
    assert made.router_weights is not None
    decoded = made.phase == DECODE
    assert (made.ranked_ids[~decoded] == -1).all()
    ids, scores = made.ranked_ids[decoded], made.ranked_scores[decoded].astype(np.float32)
    k = made.top_k
    assert ids.shape[2] == 2 * k
    assert np.array_equal(
        ids[:, :, :k], made.expert_ids[decoded]
    )  # the demo's router chooses by its scores alone
    assert (scores[:, :, 0] == 0).all()
    assert (np.diff(scores, axis=2) <= 0).all()
    weights = made.router_weights[decoded].astype(np.float32)
    assert np.allclose(np.exp(scores[:, :, :k]), weights / weights[:, :, :1], rtol=2e-2)
    assert merge([made, made]).ranked_ids is not None
    with pytest.raises(TraceError, match="ranking of experts is incomplete"):
        RoutingTrace(made.expert_ids, made.num_experts, ranked_ids=made.ranked_ids)


def test_close_to_a_run(trace: Path, demo: Path, tmp_path: Path) -> None:
    """The exact run's hits are the simulator's; the approximate one's differ by what the trace cannot see."""
    (tmp_path / "text.txt").write_text(TEXT)
    options = LoadOptions(policy="lru", prefetch="none", n_ctx=256, threads=1)
    plan = QualityPlan(
        str(demo), [Size("25%", cache="25%")], [APPROX], text=tmp_path / "text.txt", options=options
    )
    exact, lossy = (row["hit_rate"] for row in run(plan)["rows"])
    made = RoutingTrace.load(trace)
    first, second = simulate_approximately(made, ["lru"], [APPROX], [64])
    assert first.policy == "lru, exact"
    assert first.hit_rate == pytest.approx(exact, abs=0.01)  # a prompt's last tokens are another batch
    assert second.hit_rate == pytest.approx(lossy, abs=0.05)
    assert second.hit_rate > first.hit_rate + 0.05


def test_nothing_changes(trace: Path) -> None:
    exact, zero = simulate_approximately(RoutingTrace.load(trace), ["lfu-aged"], ["cache:0+drop:0"], [64])
    assert (exact.requests, exact.hits) == (zero.requests, zero.hits)


def test_command(trace: Path, tmp_path: Path) -> None:
    given = ("--approx", APPROX, "--capacity", "25%", "--policy", "lru", "--json", tmp_path / "out.json")
    done = command("simulate", trace, *given)
    assert done.status == 0, done.err
    assert f"lru, {APPROX}" in done.out
    made = RoutingTrace.load(trace)
    with pytest.raises(UsageError, match="knows the future"):
        simulate_approximately(made, ["belady"], [APPROX], [64])
    plain = RoutingTrace(made.expert_ids, made.num_experts)
    with pytest.raises(TraceError, match="--ranked"):
        simulate_approximately(plain, ["lru"], [APPROX], [64])


@pytest.mark.parametrize("name", ["deepseek2", "gpt-oss"])
def test_rankings_of_other_routers(name: str, lib: Library, tiny: Tiny) -> None:
    """With selection biases and groups, and with the softmax last: the best are those that were chosen."""
    with flashmoe.load(tiny(name), library=lib, threads=1, cache="60%", prefetch="none", n_ctx=64) as model:
        recorder = model.record(ranked=True)
        for token in (3, 5, 7):
            model.decoder.evaluate([token], decode=True)
        trace = recorder.trace()
    assert trace.ranked_ids is not None
    assert trace.score_range is not None
    assert np.array_equal(trace.ranked_ids[:, :, : trace.top_k], trace.expert_ids)
    assert (trace.score_range > 0).all()
    assert np.isfinite(trace.score_range).all()  # of the experts that may be chosen
