"""Whole benchmarks on tiny models, with real child processes."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from flashmoe.bench import quiet, runner
from flashmoe.bench.cgroup import _parents
from flashmoe.bench.forced import ForcedRouting
from flashmoe.bench.spec import BenchError, Plan, cache_sizes, ram_sizes
from flashmoe.cli.bench import app
from flashmoe.engines.llamacpp.library import find_library, open_library
from flashmoe.errors import UsageError
from flashmoe.routing import Recorder
from flashmoe.runtime.load import load

from ..models import make
from .test_parts import BUSY, trace

REPORT = ("model", "prefill", "decode", "cache", "io", "memory", "start", "bound")
ROW = (
    "budget_bytes",
    "policy",
    "prefetch",
    "baseline",
    "ratio",
    "spread",
    "runs",
    "bounds",
    "busy",
    "same_logits",
)


def plan(model: Path, **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "sizes": cache_sizes("50%"),
        "pairs": 1,
        "n_prompt": 6,
        "n_warmup": 2,
        "n_decode": 4,
        "threads": 1,
        "allow_busy": True,
        "library": find_library(),
    }
    return Plan(model, **{**values, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("olmoe", tmp_path_factory.mktemp("bench") / "m.gguf")


def test_a_benchmark_of_pairs(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = runner.run(
        plan(model, baselines=["mmap"], policies=["lru", "lfu"], pairs=2),
        lambda what, done, total: seen.append((done, total)),
    )
    assert json.loads(json.dumps(report)) == report
    assert seen[-1] == (6, 6)
    rows = report["rows"]
    assert [(r["policy"], r["baseline"]) for r in rows] == [("lru", "mmap"), ("lfu", "mmap")]
    for row in rows:
        assert set(REPORT) | set(ROW) <= set(row)
        assert row["policy_used"] == row["policy"]
        assert row["decode"]["tokens"] == 4
        assert row["cache"]["slots"] == 32
        assert row["cache"]["hits"] + row["cache"]["misses"] == 4 * 4 * 4  # tokens, layers, top-k: no warm-up
        assert len(row["runs"]["ratio"]) == 2
        assert row["decode"]["tokens_per_second"] > 0 < row["opponent_decode"]["tokens_per_second"]
        assert row["same_logits"] is True
    assert report["machine"]["threads"] == 1
    assert report["model"]["experts"] == 16


def test_each_layout_computes_what_its_opponent_does(model: Path) -> None:
    sizes = cache_sizes("100%")  # all are read before the prompt, as the baseline's are
    report = runner.run(plan(model, sizes=sizes, baselines=["plain", "stock"], layouts=["plain", "repacked"]))
    same = {(row["layout"], row["baseline"]): row["same_logits"] for row in report["rows"]}
    assert same == {
        ("plain", "plain"): True,
        ("plain", "stock"): None,
        ("repacked", "plain"): None,
        ("repacked", "stock"): True,
    }
    assert [row["cache"][f"{phase}misses"] for row in report["rows"] for phase in ("", "prefill_")] == [0] * 8


def test_a_budget_holds_the_whole_process(model: Path) -> None:
    report = runner.run(plan(model, sizes=ram_sizes("600MiB", 0)))
    (row,) = report["rows"]
    assert row["budget_bytes"] == 600 << 20
    if row["limit_bytes"]["ours"] is None:
        assert any("nothing limited the memory" in note for note in report["notes"])
        pytest.skip("no right to make a memory control group here")
    assert row["limit_bytes"] == {"ours": 600 << 20, "baseline": 600 << 20}
    assert max(row["peak_bytes"].values()) <= 600 << 20


def test_a_budget_too_small_is_told(model: Path) -> None:
    with pytest.raises(BenchError, match="smallest that works"):
        runner.run(plan(model, sizes=ram_sizes("100MiB", 0), baselines=[]))


def test_too_many_tokens_are_told(model: Path) -> None:
    with pytest.raises(UsageError, match="context"):
        runner.run(plan(model, n_decode=5000))


def test_a_busy_machine_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    def never_quiet() -> quiet.Load:
        waits.append(1)
        return BUSY

    monkeypatch.setattr(quiet, "wait_until_quiet", never_quiet)
    with pytest.raises(BenchError, match=r"busy.*0\.90 of a core.*--allow-busy"):
        runner.run(plan(model, allow_busy=False))
    assert len(waits) == 3


def test_a_pair_that_was_disturbed_is_measured_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter([BUSY, quiet.Load(1.0, 0.0, 0.0)])
    monkeypatch.setattr(quiet, "wait_until_quiet", lambda: None)
    monkeypatch.setattr(quiet, "load_between", lambda before, after: next(loads))
    report = runner.run(plan(model, allow_busy=False, baselines=[]))
    assert report["rows"][0]["busy"] is False
    assert report["rows"][0]["baseline"] == "none"
    assert next(loads, None) is None


def test_routing_by_a_trace_is_the_same_on_both_sides(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    trace(layers=4).save(path)
    report = runner.run(plan(model, routing=str(path), baselines=["mmap"]))
    (row,) = report["rows"]
    assert row["same_logits"] is True
    assert row["trace"] == str(path)
    assert any("t.safetensors" in note for note in report["notes"])


def test_routing_by_a_trace_is_what_the_engine_does(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    trace(layers=4).save(path)
    tokens = list(range(100, 112))
    with load(model, cache="50%", n_ctx=64, threads=1, library=open_library(find_library())) as loaded:
        recorder = Recorder(4, 4, 16)
        loaded.engine.record(recorder)
        forced = ForcedRouting.for_model(loaded.catalog, str(path), 5, len(tokens))
        loaded.engine.override_routing(forced)
        for position, token in enumerate(tokens):
            forced.at(position, 1)
            loaded.engine.decode([token])
            recorder.end_step(token)
    assert np.array_equal(recorder.trace().expert_ids, forced.table)
    assert np.array_equal(forced.table, trace(layers=4).expert_ids[5 : 5 + len(tokens)])


def test_the_command_line(model: Path, tmp_path: Path) -> None:
    figures, figure = tmp_path / "bench.json", tmp_path / "bench.png"
    options = (
        "--cache 50%,25% --against none --pairs 1 --tokens 3 --warmup 1 --prompt-tokens 4 --allow-busy -t 1"
    )
    result = CliRunner().invoke(
        app, [str(model), *options.split(), "--json", str(figures), "--plot", str(figure)]
    )
    assert result.exception is None, result.output
    assert "tokens/s" in result.output
    report = json.loads(figures.read_text())
    assert [row["size"] for row in report["rows"]] == ["50%", "25%"]
    assert all(row["timeline"]["token_seconds"] > 0 for row in report["rows"])
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_command_line_makes_models(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    result = CliRunner().invoke(app, ["make-model", "olmoe-1b-7b", str(out), "--scale", "0.05"])
    assert result.exception is None, result.output
    assert out.stat().st_size > 1_000_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "give the sizes"),
        ("--ram 50% --cache 50%", "give the sizes"),
        ("--cache 50% --page-cache lukewarm", "cold or warm"),
    ],
)
def test_wrong_options(model: Path, options: str, message: str) -> None:
    result = CliRunner().invoke(app, [str(model), *options.split()])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


def test_a_signal_ends_it_and_leaves_nothing_behind(model: Path) -> None:
    command = [sys.executable, "-c", f"import sys; {_START}", str(model), str(find_library())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout
        assert bench.stdout.readline() == "pool\n"
        children = psutil.Process(bench.pid).children(recursive=True)
        bench.terminate()
        assert bench.wait(timeout=30) == 128 + signal.SIGTERM
    assert not psutil.wait_procs(children, timeout=5)[1]
    groups = [path for _, folder in _parents() for path in folder.glob(f"flashmoe-bench-{bench.pid}-*")]
    assert not groups


_START = """
from pathlib import Path
from flashmoe.bench import runner
from flashmoe.bench.spec import Plan, cache_sizes
plan = Plan(Path(sys.argv[1]), cache_sizes("50%"), pairs=9, allow_busy=True, library=Path(sys.argv[2]))
runner.run(plan, lambda what, done, total: print("pool", flush=True) if "pool" in what else None)
"""
