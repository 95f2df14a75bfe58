"""`flashmoe trace`: record with the demo or a tiny model is tested with the engine; here everything on files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from flashmoe.cli.trace import app, read_prompts
from flashmoe.errors import FlashMoEError, TraceError, UsageError
from flashmoe.routing.trace import RoutingTrace
from tests.simulate.traces import made_up


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if isinstance(result.exception, FlashMoEError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout if "-" in arguments else result.output  # with --json - all else is on standard error


def test_import_info_split_merge(tmp_path: Path) -> None:
    trace = made_up(120)
    np.savez(tmp_path / "a.npz", expert_ids=trace.expert_ids, sequence_id=trace.sequence_id, num_experts=16)
    assert "120 tokens, 4 sequences" in call("import", tmp_path / "a.npz", "--name", "mine")
    assert RoutingTrace.load(tmp_path / "a.safetensors").model["name"] == "mine"
    output = call("info", tmp_path / "a.safetensors")
    assert "mine" in output
    assert "reuse p50" in output
    facts = json.loads(call("info", tmp_path / "a.safetensors", "--json", "-"))
    assert (facts["tokens"], len(facts["per_layer"])) == (120, 3)
    assert facts["consistency"]["by_chance"] < facts["consistency"]["model"] < 1
    for capacity, rates in facts["expected_hit_rates"].items():
        assert f"{rates['belady']:.1%}" in output, capacity
        assert rates["lru"] <= rates["belady"]
    assert list(facts["expected_hit_rates"]) == ["12.5%", "25%", "50%"]
    parts = (tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    call("split", tmp_path / "a.safetensors", "--share", 0.5, "-o", *parts)
    call("merge", *parts, "-o", tmp_path / "z.safetensors")
    whole = RoutingTrace.load(tmp_path / "z.safetensors")
    np.testing.assert_array_equal(whole.expert_ids, trace.expert_ids)
    with pytest.raises(TraceError, match="two other files"):
        call("split", parts[0], "-o", parts[0], parts[1])
    with pytest.raises(UsageError, match="cannot import"):
        call("import", parts[0])


def test_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "a"}\n\n"b"\n{"messages": [{"role": "user", "content": "c"}]}\n{"text": "d"}\n'
    )
    assert list(read_prompts(path)) == ["a", "b", [{"role": "user", "content": "c"}], "d"]
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert list(read_prompts(tmp_path / "p.txt")) == ["one", "two"]
    for text, message in (
        ("", "no prompts"),
        ('{"x": 1}', "line 1"),
        ('"a"\n{', "line 2"),
        ("[1]", "line 1"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            list(read_prompts(path))
    with pytest.raises(UsageError, match="cannot read"):
        list(read_prompts(tmp_path / "none"))
