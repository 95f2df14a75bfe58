"""`flashmoe batch` with real models: answers, slots, kills, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import flashmoe as fm
from flashmoe.engines.llamacpp.serving.server import InnerServer
from flashmoe.runtime.batch import run_batch
from flashmoe.runtime.batch_file import Journal, Requests
from tests.batch.inputs import read, request, same, write
from tests.batch.kills import answered, batch, killed
from tests.cli.runner import flashmoe
from tests.cli.test_json import check
from tests.serving.reference import UnixConnection

LINES = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("requests")
    return write(folder / "in.jsonl", [request(f"number {i}", ignore_eos=True) for i in range(LINES)])


def test_every_route_and_its_errors(demo: Path, tmp_path: Path) -> None:
    """Errors of lines are answers; the report says what was done."""
    plain = {"prompt": "The sea", "max_tokens": 5, "ignore_eos": True}
    lines = [
        request("chat"),
        {"custom_id": "text", "method": "POST", "url": "/v1/completions", "body": plain},
        {"custom_id": "later", "method": "POST", "url": "/v1/responses", "body": {"input": "A colour?"}},
        {"custom_id": "vector", "method": "POST", "url": "/v1/embeddings", "body": {"input": "The sea"}},
        request("wrong", messages="none"),
        request("long", messages=[{"role": "user", "content": "sea " * 500}]),
        "no JSON",
    ]
    source, out, figures = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", tmp_path / "figures"
    arguments = ("batch", demo, source, out, "--cache", "50%", "-t", 1, "-c", 256, "-np", 4)
    done = flashmoe(*arguments, "--json", figures)
    assert done.status == 0, done.err
    assert "7 lines answered, 4 with an error" in done.err
    found = {line["custom_id"]: line for line in read(out)}
    codes = {name: line["response"]["status_code"] for name, line in found.items() if line["response"]}
    assert codes == {"chat": 200, "text": 200, "later": 200, "vector": 501, "wrong": 400, "long": 400}
    assert found["text"]["response"]["body"]["usage"]["completion_tokens"] == 5
    assert found["chat"]["response"]["body"]["choices"][0]["message"]["content"]
    assert "--pooling mean" in found["vector"]["response"]["body"]["error"]["message"]
    assert "no JSON" in found[None]["error"]["message"]  # type: ignore[index]
    report = json.loads(figures.read_text())
    assert (report["batch"]["lines"], report["batch"]["failed"]) == (7, 4)
    assert report["io"]["read_bytes_per_token"] > 0
    check(report)
    before = out.read_bytes()
    figures.unlink()
    assert "all 7 answers already" in flashmoe(*arguments, "--json", figures).err
    again = json.loads(figures.read_text())["batch"]
    assert (again["lines"], again["answered_before"], again["failed"]) == (7, 7, 4)
    assert out.read_bytes() == before


def test_exact_answers_of_an_approximate_batch(demo: Path, tmp_path: Path) -> None:
    """The field `approx` means what it means to a server."""
    text = {
        "prompt": "The old man went down to the harbour",
        "max_tokens": 24,
        "temperature": 0,
        "cache_prompt": False,
    }
    lines = [
        {"custom_id": str(approx), "method": "POST", "url": "/v1/completions", "body": text | fields}
        for approx, fields in ((None, {}), (0, {"approx": 0}), ("drop:0.1", {"approx": "drop:0.1"}))
    ]
    texts: dict[str, Any] = {}
    for kind, more in (("exact", ()), ("lossy", ("--approx", "cache:2+drop:1"))):
        for line in lines:  # one at a time: what is decoded together with an exact answer is exact too
            name = f"{kind} {line['custom_id']}"
            out = tmp_path / f"{name}.jsonl"
            source = write(tmp_path / f"in {name}", [line])
            arguments = ("--cache", "25%", "-t", 1, "-c", 256, "-np", 1, "--prefetch", "none", *more)
            assert flashmoe("batch", demo, source, out, *arguments).status == 0
            body = read(out)[0]["response"]["body"]
            texts[name] = body["choices"][0]["text"] if "choices" in body else body["error"]["message"]
    assert texts["exact None"] == texts["exact 0"] == texts["lossy 0"] != texts["lossy None"]
    assert "without --approx" in texts["exact drop:0.1"]
    assert "with --approx cache:2+drop:1" in texts["lossy drop:0.1"]


def test_slots_are_filled_and_reads_shared(demo: Path, source: Path, tmp_path: Path) -> None:
    """Four sequences in most evaluations; each of their tokens costs fewer bytes than one alone."""
    busy, read_per_token = {}, {}
    for parallel in (1, 4):
        with fm.load(demo, cache="25%", threads=1, parallel=parallel, n_ctx=128, prefetch="none") as model:
            server = model.server()
            with Journal(tmp_path / str(parallel), {}) as journal:
                figures = run_batch(server, Requests(source), journal)
            busy[parallel] = busy_slots(server)
            read_per_token[parallel] = model.cache_stats["decode"].bytes / model.telemetry.decode.tokens
        assert figures.tokens == 6 * LINES
    assert busy[1] == 1
    assert busy[4] > 3
    assert read_per_token[4] < 0.8 * read_per_token[1]


def busy_slots(server: InnerServer) -> float:
    """In an evaluation, on average, as llama.cpp counts it."""
    connection = UnixConnection(server.socket)
    connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {server.key}"})
    text = connection.getresponse().read().decode()
    connection.close()
    return float(text.split("\nllamacpp:n_busy_slots_per_decode ")[1].split()[0])


def test_killed_again_and_again(demo: Path, source: Path, tmp_path: Path) -> None:
    """tests/batch/kills.py does it ten times."""
    found = killed(demo, source, tmp_path / "out.jsonl", 2, 1)
    assert 0 < found[1] < found[2] < LINES
    with batch(demo, source, tmp_path / "whole.jsonl", 1) as process:
        assert process.wait(120) == 0
    assert same(tmp_path / "out.jsonl") == same(tmp_path / "whole.jsonl")


def test_interrupted(demo: Path, source: Path, tmp_path: Path) -> None:
    """Ctrl-C ends long answers at once and keeps what there is."""
    lines = [*read(source)[:2], *(request(f"story {i}", max_tokens=400, ignore_eos=True) for i in range(9))]
    long, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "flashmoe.cli", "batch", str(demo), str(long), str(out)]
    options = ["--cache", "50%", "-t", "1", "-c", "512", "-np", "2"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        while answered(out) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr
        said = process.stderr.read()
        assert process.wait(60) == 130, said
    assert f"{answered(out)} of 11 lines are answered: the same command goes on there" in said
    assert "Traceback" not in said
    assert 2 <= answered(out) < 11


def test_messages(demo: Path, source: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ((tmp_path / "none", tmp_path / "out"), "requests cannot be read"),
        ((source, source), "is there already"),
        ((source, tmp_path / "no folder" / "out"), "answers cannot be written"),
    ):
        done = flashmoe("batch", demo, *arguments, "--cache", "50%", "-t", 1, "-c", 128)
        assert done.status in (1, 2)
        assert said in done.message
