"""`flashmoe simulate --prefetch` and `flashmoe train prefetch` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from flashmoe.cli import make_app
from tests.prefetch.test_predictors import EXPERTS, LAYERS, K, chained
from tests.simulate.traces import made_up


def run(*args: str | Path) -> str:
    """Output of a command that works."""
    result = CliRunner().invoke(make_app(), [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_train_then_judge(tmp_path: Path) -> None:
    trace, file, rows, report = (
        tmp_path / n for n in ("t.safetensors", "p.safetensors", "r.json", "report.json")
    )
    made_up(300, LAYERS, EXPERTS, K).save(trace)
    output = run("train", "prefetch", trace, "-o", file, "--json", report, "--held-out", "0.2")
    assert f"--prefetch table:{file}" in output.replace("\n", "")
    assert set(json.loads(report.read_text())["held_out"]) == {"token", "1", "2", "4"}
    output = run("simulate", trace, "--prefetch", f"table:{file},moe-infinity", "--capacity", "50%", "--policy", "lru",
                 "--first", "50", "--json", rows)  # fmt: skip
    assert "50 tokens" in output
    found = json.loads(rows.read_text())["rows"]
    assert {row["predictor"] for row in found} == {f"table:{file}", "moe-infinity"}
    assert {row["policy"] for row in found} == {"lru"}
    assert all(0 <= row[key] <= 1 for row in found for key in ("recall", "precision", "missing_found"))


def test_mistakes_are_told(tmp_path: Path) -> None:
    trace = tmp_path / "t.safetensors"
    chained(20).save(trace)
    for args, message in (
        (["--prefetch", "oracle"], "unknown predictor"),
        (["--prefetch", "table", "--policy", "lru,lfu"], "name one"),
        (["--prefetch", "promoe"], "needs a trained file"),
    ):
        result = CliRunner().invoke(make_app(), ["simulate", str(trace), *args])
        assert result.exit_code != 0
        assert message in str(result.exception)
