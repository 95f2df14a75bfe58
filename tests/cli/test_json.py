"""`--json` of every command: a file or standard output, strict JSON, one layout of names and units."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from flashmoe.cli import make_app
from flashmoe.storage import disk
from tests.bench.test_runs import model as bench_model  # noqa: F401
from tests.cli.runner import COMMAND, flashmoe
from tests.conftest import Tiny
from tests.simulate.traces import made_up

SHORT = ("-n", 4, "-t", 1, "--cache", "50%", "-q")
BENCH = "--cache 50% --against none --pairs 1 --tokens 3 --warmup 1 --prompt-tokens 4 --allow-busy -t 1 -q"
#: Their keys are data: sizes, types, policies, capacities.
KEYED_BY_DATA = {
    "bytes_per_second", "compute_bytes_per_second", "drive_bytes_per_second", "policies_tokens_per_second", "held_out",
    "expected_hit_rates",
}  # fmt: skip
UNITS = ("bytes", "seconds", "per_second")
#: Other spellings of what has a name and a unit already.
FOREIGN = re.compile(
    r"(^|_)(s|ms|us|secs?|millis\w*|gb|gib|mb|mib|kb|kib|percent|pct|ratio_of|rate_of|num|n)(_|$)"
)


def names(value: Any, keyed_by_data: bool = False) -> Iterator[tuple[str, Any]]:
    """Every key of a report with its value; keys that are data are left out."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not keyed_by_data:
                yield name, item
            yield from names(item, name in KEYED_BY_DATA or (keyed_by_data and isinstance(item, dict)))
    elif isinstance(value, list):
        for item in value:
            yield from names(item)


def check(report: Any) -> None:
    """The rules of docs/reference/formats.md."""
    found = list(names(report))
    assert found
    for name, value in found:
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name), name
        assert not FOREIGN.search(name), name
        if "bytes" in name.split("_"):
            assert re.search(r"(^|_)bytes(_per_(second|token))?$", name), name
        if "second" in name.split("_"):
            assert name.endswith("_per_second"), name
        if re.search(r"(_share|_rate|^capacity)$", name) and value is not None:
            assert 0 <= value <= 1, name


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short measurements of the drive."""
    monkeypatch.setattr(disk, "_SAMPLE_BYTES", 32 << 20)
    monkeypatch.setattr(disk, "_SECONDS", 0.001)
    monkeypatch.setattr(disk, "_LEAST_FILE", 32 << 20)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    made_up(400, 3, 8, 2).save(tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors"


def strict(text: str) -> Any:
    """What any parser of JSON reads: no NaN, nothing before or after."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def arguments(command: str, model: Path, trace: Path) -> tuple[object, ...]:
    """A short call of a command; `run` and others read a prompt from standard input."""
    written = trace.with_name("out.safetensors")
    return {
        "run": ("run", model, *SHORT),
        "chat": ("chat", "demo", *SHORT),
        "verify": ("verify", model),
        "doctor": ("doctor", trace.parent),
        "plan": ("plan", model, "-t", 1),
        "quality": ("quality", "demo", "--cache", "25%", "-t", 1, "--tokens", 8, "--approx", "1"),
        "simulate": ("simulate", trace, "--policy", "lru"),
        "simulate --prefetch": ("simulate", trace, "--prefetch", "table", "--capacity", "50%"),
        "bench": ("bench", model, *BENCH.split()),
        "trace info": ("trace", "info", trace),
        "policies": ("policies",),
        "learn": ("learn", model, "--forget"),
        "predictors": ("predictors",),
        "train policy": ("train", "policy", trace, "-o", written, "--epochs", 1, "--held-out", 0.2, "-t", 1),
        "train prefetch": ("train", "prefetch", trace, "-o", written, "--held-out", 0.2),
    }[command]


def test_a_key_that_breaks_the_rules_is_seen() -> None:
    for wrong in (
        "read_ms",
        "bytes_read",
        "loadSeconds",
        "gb_per_s",
        "tokens_per_s",
        "per_second_rate",
        "n_tokens",
    ):
        with pytest.raises(AssertionError):
            check({wrong: 0.5})
    with pytest.raises(AssertionError):
        check({"hit_rate": 50.0})
    check(
        {
            "rows": [
                {"read_bytes": 1, "load_seconds": 0.1, "hit_rate": 0.5, "held_out": {"25%": {"lfu-aged": 1}}}
            ]
        }
    )


def test_no_command_is_left_out() -> None:
    """`serve`, `batch` and `engine` have tests of their own."""
    root = typer.main.get_command(make_app())

    def walk(command: Any, name: str) -> Iterator[str]:
        for child, sub in getattr(command, "commands", {}).items():
            yield from walk(sub, name if sub.hidden else f"{name} {child}".strip())
        if any("--json" in parameter.opts for parameter in command.params):
            yield name

    known = {"run", "chat", "verify", "doctor", "plan", "quality", "simulate", "bench", "trace info", "train policy",
             "train prefetch", "serve", "batch", "policies", "predictors", "learn"}  # fmt: skip
    of_engine = {"engine list", "engine build", "engine add", "engine check"}  # tests/builder
    assert set(walk(root, "")) == known | of_engine


@pytest.mark.parametrize(
    "command",
    ["run", "chat", "verify", "doctor", "plan", "quality", "simulate", "simulate --prefetch", "bench", "trace info",
     "train policy", "train prefetch", "policies", "predictors", "learn"],
)  # fmt: skip
def test_the_report_of(command: str, tiny: Tiny, tmp_path: Path, trace: Path) -> None:
    if command.startswith("train policy"):
        pytest.importorskip("torch", reason="training needs torch: pip install 'flashmoe-ssd[train]'")
    model = tmp_path / "m.gguf"  # verify writes beside it
    model.symlink_to(tiny("llama"))
    result = flashmoe(*arguments(command, model, trace), "--json", "-", stdin="hello\n")
    assert result.status == 0, result.err
    check(strict(result.out))


def test_the_report_of_a_server(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "serve", "demo", "--port", "0", "-t", "1", "--cache", "50%", "-c", "256", "--json", "-"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr
    assert any("serving" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert "tokens/s" in err
    check(strict(out))


def test_text_and_tables_leave_standard_output(tiny: Tiny, trace: Path) -> None:
    result = flashmoe("run", tiny("llama"), "-p", "hello", *SHORT, "--json", "-")
    assert strict(result.out)["text"] in result.err
    result = flashmoe("simulate", trace, "--policy", "lru", "--json", "-")
    assert strict(result.out)["rows"][0]["policy"] == "lru"
    assert "hit" not in result.out.replace('"hit', "").replace("hits", "")
    assert "lru" in result.err


def test_a_file_is_replaced_as_a_whole(trace: Path, tmp_path: Path) -> None:
    report = tmp_path / "new" / "r.json"
    for _ in range(2):
        result = flashmoe("trace", "info", trace, "--json", report)
        assert result.status == 0
        assert "reuse" in result.out
        check(strict(report.read_text()))
        assert list(report.parent.iterdir()) == [report]


def test_a_failed_write_is_an_error_and_keeps_the_file(trace: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "r.json", tmp_path):
        result = flashmoe("trace", "info", trace, "-q", "--json", place)
        assert result.status == 1
        assert "the report cannot be written" in result.message


def test_a_pipe_is_written_not_replaced(trace: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    assert flashmoe("trace", "info", trace, "-q", "--json", pipe).status == 0
    check(strict(reader.communicate(timeout=60)[0]))
    assert stat.S_ISFIFO(pipe.stat().st_mode)
