"""The journal and the output: whatever is left of a process, no line is lost or there twice."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flashmoe.errors import ModelError, UsageError
from flashmoe.runtime.batch import run_batch
from flashmoe.runtime.batch_file import Journal, Requests, failed_in
from tests.batch.inputs import read, request, write

IDENTITY = {"input": "x", "model": {"name": "m"}}


class Echo:
    """In the place of a server: answers with what it was asked, and fails after `patience` answers."""

    parallel, longest_text, n_ctx, last_error = 1, 1 << 20, 512, ""

    def __init__(self, patience: int = 1 << 30) -> None:
        self.asked: Counter[str] = Counter()
        self._patience, self._lock = patience, threading.Lock()

    def exchange(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        text = json.loads(body)["messages"][0]["content"]
        with self._lock:
            if self.asked.total() >= self._patience:
                raise ModelError("gone")
            self.asked[text] += 1
        return 200, {"text": text, "usage": {"completion_tokens": 2}}

    def cancel(self) -> None:
        pass


def run(source: Path, out: Path, server: Echo) -> Any:
    with Journal(out, IDENTITY) as journal:
        return run_batch(server, Requests(source), journal)  # type: ignore[arg-type]


STRANGE = b'{"custom_id": "e", "response": null, "error": null}\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", [request(name) for name in "abcd"])


def test_order_and_form(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    figures = run(source, out, Echo())
    assert (figures.lines, figures.answered_before, figures.failed, figures.tokens) == (4, 0, 0, 8)
    assert [line["custom_id"] for line in read(out)] == list("abcd")
    assert read(out)[1] == {
        "id": "batch_req_2",
        "custom_id": "b",
        "response": {
            "status_code": 200,
            "request_id": "batch_req_2",
            "body": {"text": "What is b?", "usage": {"completion_tokens": 2}},
        },
        "error": None,
    }
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_killed_at_every_byte(source: Path, tmp_path: Path) -> None:
    """What a kill leaves is a beginning of the journal: from each, the output is the same, and what is whole in it
    is not asked again."""
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with pytest.raises(ModelError):
        run(source, out, Echo(3))
    whole = journal.read_bytes()
    assert whole.count(b"\n") == 1 + 3
    run(source, out, Echo())
    expected = out.read_bytes()
    for size in range(len(whole) + 1):
        out.unlink()
        journal.write_bytes(whole[:size])
        server = Echo()
        figures = run(source, out, server)
        assert out.read_bytes() == expected
        kept = max(0, whole[:size].count(b"\n") - 1)
        assert (figures.answered_before, server.asked.total()) == (kept, 4 - kept)
        assert max(server.asked.values()) == 1


def test_interrupted_while_it_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer is in the journal once, and counted."""
    out, struck = tmp_path / "out.jsonl", []

    def fsync(descriptor: int) -> None:
        if not struck:
            struck.append(descriptor)
            raise KeyboardInterrupt

    monkeypatch.setattr("flashmoe.runtime.batch_file.os.fsync", fsync)
    with Journal(out, IDENTITY) as journal, pytest.raises(KeyboardInterrupt):
        run_batch(Echo(), Requests(source), journal)  # type: ignore[arg-type]
    lines = [entry["line"] for entry in read(journal.path)[1:]]
    assert sorted(set(lines)) == sorted(lines)
    assert len(lines) == len(journal) > 0


def test_what_a_failing_drive_leaves(source: Path, tmp_path: Path) -> None:
    """A journal whose middle was never written."""
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with pytest.raises(ModelError):
        run(source, out, Echo(3))
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], b"\0" * len(lines[2]), lines[3]]))
    assert run(source, out, Echo()).answered_before == 1
    assert [line["custom_id"] for line in read(out)] == list("abcd")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 3 is no JSON"),
        ("[1]", "an object with a custom_id"),
        ('{"custom_id": 7}', "an object with a custom_id"),
        ("[" * 1000, "nested more than"),
        (request("b"), "line 3: the custom_id is that of line 1"),
        ({**request("x"), "method": "GET"}, "must be POST"),
        ({**request("x"), "url": "/metrics"}, "must be POST, and the url one of /v1/chat/completions"),
        ({**request("x"), "body": "text"}, "the body must be an object"),
        (request("x", stream=True), "no streams"),
    ],
    ids=str,
)
def test_lines_that_are_no_requests(line: Any, reason: str, tmp_path: Path) -> None:
    """They are answered with an error; blank ones are not there."""
    out = tmp_path / "out.jsonl"
    figures = run(write(tmp_path / "in.jsonl", [request("b"), "  ", line, request("c")]), out, Echo())
    first, second, third = read(out)
    assert reason in second["error"]["message"]
    assert second["response"] is None
    assert [first["custom_id"], third["custom_id"]] == ["b", "c"]
    assert (figures.lines, figures.failed) == (3, 1)


def test_a_text_that_cannot_fit(tmp_path: Path) -> None:
    """It never reaches the tokenizer."""
    server, out = Echo(), tmp_path / "out.jsonl"
    server.longest_text = 1000
    long = request("x", messages=[{"role": "user", "content": "a" * 1001}])
    run(write(tmp_path / "in.jsonl", [long, request("b")]), out, server)
    assert read(out)[0]["response"]["status_code"] == 400
    assert "1001 bytes" in read(out)[0]["response"]["body"]["error"]["message"]
    assert server.asked.total() == 1


def test_whose_journal_it_is(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Journal(out, IDENTITY), pytest.raises(UsageError, match="another process"), Journal(out, IDENTITY):
        pass
    other = {**IDENTITY, "input": "y"}
    with pytest.raises(UsageError, match="another input or model"), Journal(out, other):
        pass


@pytest.mark.parametrize("line", ["somebody's notes\n", '{"custom_id": "a"}\n', "notes", "{", "\n"], ids=repr)
def test_a_file_in_the_journal_s_place(line: str, source: Path, tmp_path: Path) -> None:
    """It is not ours to write to, be it the input."""
    journal = tmp_path / "out.jsonl.partial"
    journal.write_text(line)
    if line == "{":  # what a kill may leave of a journal
        assert run(source, tmp_path / "out.jsonl", Echo()).lines == 4
        return
    with pytest.raises(UsageError, match="is no journal of a batch: move it"):
        run(source, tmp_path / "out.jsonl", Echo())
    assert journal.read_text() == line


def test_an_input_that_changes_meanwhile(source: Path, tmp_path: Path) -> None:
    """The answers are those of what was there at the beginning, or none is an output."""
    out, requests = tmp_path / "out.jsonl", Requests(source)
    write(source, [*read(source), request("e")])
    with Journal(out, IDENTITY) as journal, pytest.raises(UsageError, match="have been changed meanwhile"):
        run_batch(Echo(), requests, journal)  # type: ignore[arg-type]
    assert not out.exists()


def test_an_output_that_is_there(source: Path, tmp_path: Path) -> None:
    out, requests = tmp_path / "out.jsonl", Requests(source)
    assert failed_in(out, requests) is None
    with pytest.raises(UsageError, match="is a folder"):
        failed_in(tmp_path, requests)
    (tmp_path / "link").symlink_to(out)
    assert failed_in(tmp_path / "link", requests) is None
    run(source, tmp_path / "link", Echo())
    assert (tmp_path / "link").is_symlink()
    assert failed_in(out, requests) == 0
    whole = read(out)
    write(out, [*whole[:-1], {**whole[-1], "response": None, "error": {"code": "x", "message": "y"}}])
    assert failed_in(out, requests) == 1
    answers = out.read_bytes()
    for more in (b"and more", b"[" * 100_000 + b"\n", b"{}\n", STRANGE):
        out.write_bytes(answers + more)
        with pytest.raises(UsageError, match="there already"):
            failed_in(out, requests)
    write(out, whole[:-1])
    for path in (out, source, Path("/dev/zero")):
        with pytest.raises(UsageError, match="there already"):
            failed_in(path, requests)


def test_inputs_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Requests(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="no request"):
        Requests(write(tmp_path / "empty.jsonl", ["", " "]))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="save them in one"):
        Requests(tmp_path / "pipe")
