"""A read that fails for good, with several requests in one batch: nothing that depended on it is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flashmoe
from flashmoe.engines.llamacpp.engine import LlamaEngine
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import ReadError
from flashmoe.storage import direct
from flashmoe.storage import reader as reader_module
from tests.conftest import Tiny
from tests.faults.disk import Disk, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
PARALLEL, TOKENS = 4, 24


@pytest.fixture
def disk(tmp_path: Path, tiny: Tiny) -> Iterator[Disk]:
    with Disk(tmp_path / "disk", tiny("llama")) as mounted:
        yield mounted


@pytest.fixture
def model(disk: Disk, lib: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[flashmoe.Model]:
    """A model on the disk that reads an expert for almost every token."""
    monkeypatch.setattr(direct, "_direct_alignment", lambda _: (4, 512))  # FUSE takes any address
    monkeypatch.setattr(reader_module, "TIMEOUT", 0.3)
    with flashmoe.load(
        disk.path, cache="60%", threads=1, n_ctx=128, library=lib, parallel=PARALLEL, layout="plain"
    ) as loaded:
        yield loaded


def request(number: int) -> dict[str, Any]:
    return {"prompt": [70 + number] * 8, "n_predict": TOKENS, "temperature": 0, "cache_prompt": False}


class Client(threading.Thread):
    """Streams one completion, in this process."""

    def __init__(self, model: flashmoe.Model, number: int) -> None:
        super().__init__()
        self._events = model.server().complete(request(number))
        self.pieces: list[str] = []
        self.error: BaseException | None = None
        self.started = threading.Event()

    def run(self) -> None:
        try:
            for event in self._events:
                if event.get("choices"):
                    self.pieces.append(event["choices"][0]["text"])
                    self.started.set()
        except BaseException as error:
            self.error = error
        self.started.set()


def all_at_once(model: flashmoe.Model) -> list[Client]:
    clients = [Client(model, number) for number in range(PARALLEL)]
    for client in clients:
        client.start()
    return clients


def test_a_batch_with_a_failing_read_ends_all_its_requests(model: flashmoe.Model, disk: Disk) -> None:
    alone = ["".join(e["choices"][0]["text"] for e in model.server().complete(request(n))) for n in range(4)]
    for skip in (0, 2, 9):
        clients = all_at_once(model)
        for client in clients:
            client.started.wait()
        disk.fault(kind="error", skip=skip)
        for client in clients:
            client.join()
        disk.fault()
        failed = [client for client in clients if client.error]
        for client in failed:
            assert isinstance(client.error, ReadError)
            assert "Input/output error" in str(client.error)
        for number, client in enumerate(clients):
            # what was sent before the failure is what would have been sent without it: never a token too many
            assert alone[number].startswith("".join(client.pieces)) or not client.error
        assert "Input/output error" in model.server().last_error or not failed
        # and the next requests are answered as before
        again = [
            "".join(e["choices"][0]["text"] for e in model.server().complete(request(n))) for n in range(4)
        ]
        assert again == alone


def test_http_says_which_read_failed(model: flashmoe.Model, disk: Disk) -> None:
    """Without a front the server says "Compute error."; the reason is beside it, for the front to put in its place."""
    server = model.server()
    disk.fault(kind="error")
    with pytest.raises(ReadError, match="Input/output error"):
        server.ask("POST", "/completion", request(1))
    assert "Input/output error" in server.last_error
    disk.fault()
    assert server.ask("POST", "/completion", request(1))["content"]


def test_it_ends_without_a_line_of_log(demo: Path, lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that logs when its graph is ended, where that is Python's, would wait for the one that waits for it."""
    logs: list[Any] = []

    def log_set(log: Any, data: Any) -> None:
        logs.append(log)
        set_log(log, data)

    with flashmoe.load(demo, cache="50%", threads=1, n_ctx=128, library=lib) as model:
        engine = model.engine
        assert isinstance(engine, LlamaEngine)
        server = model.server()
        wait, set_log = engine.wait_until_idle, lib.llama_log_set
        at_its_end: list[Any] = []

        def wait_until_idle() -> None:
            at_its_end.append(logs[-1])
            wait()

        monkeypatch.setattr(lib, "llama_log_set", log_set)
        monkeypatch.setattr(engine, "wait_until_idle", wait_until_idle)
        server.close()
    assert [log is lib._log for log in at_its_end] == [False]
    assert logs[-1] is lib._log
