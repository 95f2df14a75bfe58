"""A backend that fails, dawdles or is gone, and the end in order."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
from aiohttp import web

from flashmoe.runtime.model import Model
from tests.server.front import Backend, Running, fronted, made_up_server, until

REASON = 'cannot read 4096 bytes of "model.gguf" at 123: Input/output error\n(drive)'
ERROR = {"error": {"code": 500, "message": "Compute error.", "type": "server_error"}}


ASKED, LEFT = threading.Event(), threading.Event()  # a request has come; its connection has been closed
ARRIVED = threading.Semaphore(0)  # of the events of "steps", those that the client has


async def misbehave(request: web.Request) -> web.StreamResponse:
    """What the path says."""
    ASKED.set()
    what = request.path.rpartition("/")[2]
    if what == "completions":
        return web.json_response(ERROR, status=500)
    if what == "completion":
        return await stream(request, [f"data: {json.dumps(ERROR)}\n\n", "data: [DONE]\n\n"])
    if what == "ends":
        return await stream(request, ["data: 1\n\n"], complete=False)
    if what == "short":
        answer = web.StreamResponse(headers={"Content-Length": "100"})
        await answer.prepare(request)
        await answer.write(b"abc")
        return close(request, answer)
    if what == "silent":
        close(request, None)
        await asyncio.sleep(1)
    if what == "slow":
        for _ in range(int(100 * float(request.query["seconds"]))):
            await asyncio.sleep(0.01)
            if request.transport is None or request.transport.is_closing():
                LEFT.set()
                break
    if what == "steps":
        return await stream(request, ["data: x\n\n"] * int(request.query["n"]), wait=True)
    if what in ("infill", "messages"):
        return await stream(request, ["data: x\n\n"] * int(request.query["n"]), pause=0.02)
    return web.Response(text="not found", status=404)


async def stream(
    request: web.Request, events: list[str], *, complete: bool = True, pause: float = 0, wait: bool = False
) -> web.StreamResponse:
    """Answer with events, one after the other; wait: each is sent when the client has the one before."""
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    for event in events:
        await answer.write(event.encode())
        await asyncio.sleep(pause)
        if wait and not await asyncio.to_thread(ARRIVED.acquire, timeout=30):
            return close(request, answer)
    return answer if complete else close(request, answer)


def close(request: web.Request, answer: web.StreamResponse | None) -> web.StreamResponse:
    assert request.transport
    request.transport.close()
    return answer or web.Response()


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with made_up_server(misbehave, tmp_path_factory.mktemp("made-up")) as backend:
        yield backend


def test_compute_error(front: Running, backend: Backend) -> None:
    """Where the reason is known it is told, in a response and in a stream."""
    for reason in ("", REASON):
        backend.last_error = reason
        answer = httpx.post(f"{front.url}/v1/completions")
        assert answer.status_code == 500
        expected = {**ERROR["error"], "message": reason or "Compute error.", "param": None}
        assert answer.json() == {"error": expected}
        lines = httpx.post(f"{front.url}/completion").text.split("\n\n")
        assert json.loads(lines[0][6:])["error"]["message"] == reason or "Compute error."
        assert lines[1] == "data: [DONE]"


def test_no_page(front: Running) -> None:
    answer = httpx.get(f"{front.url}/")
    assert answer.status_code == 307
    assert httpx.get(f"{front.url}/", follow_redirects=True).url.path == "/flashmoe/"


def test_backend_that_ends_too_early(front: Running) -> None:
    events = httpx.post(f"{front.url}/ends").text.split("\n\n")
    assert events[0] == "data: 1"
    assert "does not answer" in json.loads(events[1][6:])["error"]["message"]
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{front.url}/short")
    for path, kind in (("silent", "server_error"), ("v1/messages/silent", "api_error")):
        answer = httpx.post(f"{front.url}/{path}")
        assert (answer.status_code, answer.json()["error"]["type"]) == (502, kind)


def test_backend_that_is_gone(pool: Model, tmp_path: Path) -> None:
    with fronted(pool, Backend(str(tmp_path / "none.sock"))) as front:
        for method, path in (("POST", "v1/chat/completions"), ("GET", "health"), ("GET", "")):
            answer = httpx.request(method, f"{front.url}/{path}")
            assert answer.status_code == 502
            assert answer.json()["error"]["message"]
        counted = 'flashmoe_requests_total{outcome="server_error"} 1.0'
        until(lambda: counted in httpx.get(f"{front.url}/metrics").text)


def test_hang_up_is_passed_on(front: Running) -> None:
    """Before the backend has begun to answer."""
    ASKED.clear(), LEFT.clear()
    address = urlsplit(front.url)
    with socket.create_connection((address.hostname or "", address.port or 0)) as client:
        client.sendall(b"POST /slow?seconds=600 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        assert ASKED.wait(60)
    assert LEFT.wait(60)  # a small part of the time that the answer would take


def test_events_are_passed_on_one_by_one(front: Running) -> None:
    """The backend waits with each event until the client has the one before."""
    with httpx.stream("POST", f"{front.url}/steps?n=20") as answer:
        for event in answer.iter_raw():
            assert event == b"data: x\n\n"
            ARRIVED.release()
    assert not ARRIVED.acquire(blocking=False)  # all were waited for


def test_queue_has_an_end(front: Running) -> None:
    traffic = front.front.traffic
    waiting = dict.fromkeys(range(258), time.monotonic() - 17.5)
    traffic._began.update(waiting)
    try:
        answer = httpx.post(f"{front.url}/v1/messages?n=1")
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "18"  # as long as others wait already
        assert answer.json()["error"]["type"] == "overloaded_error"
        assert httpx.post(f"{front.url}/tokenize").status_code == 404  # takes no slot
    finally:
        for request in waiting:
            del traffic._began[request]


def test_a_server_that_falls_behind_says_so(
    front: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in a while, not with each request."""
    monkeypatch.setattr("flashmoe.server.traffic.BEHIND_SECONDS", 40)
    traffic = front.front.traffic
    began = time.monotonic()
    waiting = {"a": began, "b": began, "c": began - 50}
    traffic._began.update(waiting)
    try:
        figures = httpx.get(f"{front.url}/metrics").text
        for _ in range(2):
            assert httpx.post(f"{front.url}/infill?n=1").status_code == 200
    finally:
        for request in waiting:
            del traffic._began[request]
    assert "flashmoe_requests_waiting 1.0\n" in figures
    assert "flashmoe_requests_parallel 2.0\n" in figures
    assert 50 <= float(figures.split("\nflashmoe_requests_waiting_seconds ")[1].split()[0]) < 60
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("2 requests wait, one for 5")


def test_names_of_requests_are_in_the_log(front: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Also of those that fail; a long name is cut."""
    caplog.set_level("INFO", "flashmoe.server")
    for path, name in (("/infill?n=1", "client-7"), ("/v1/messages?cut", "b" * 1000)):
        with suppress(httpx.HTTPError):
            httpx.post(front.url + path, headers={"X-Request-Id": name})

    def said() -> list[str]:
        return [
            r.getMessage() for r in caplog.records if (r.name, r.levelname) == ("flashmoe.server", "INFO")
        ]

    until(lambda: len(said()) == 2)
    first, second = said()
    assert first.startswith("POST /infill (request 'client-7'): ok after ")
    assert f"(request '{'b' * 128}')" in second


@contextmanager
def ending(front: Running, path: str) -> Iterator[httpx.Response]:
    """The response to a request under way, at the backend, when the server is told to end."""

    def end() -> None:
        front.server.should_exit = ASKED.wait(60)

    ASKED.clear()
    thread = threading.Thread(target=end)
    thread.start()
    with httpx.stream("POST", front.url + path) as answer:
        yield answer
    thread.join()


def test_end_in_order(pool: Model, backend: Backend) -> None:
    """What runs comes to its end."""
    with fronted(pool, backend) as front, ending(front, "/infill?n=50") as answer:
        assert answer.read().count(b"data: x\n\n") == 50
    with pytest.raises(httpx.ConnectError):
        httpx.get(front.url)


def test_requests_while_it_ends(pool: Model, backend: Backend) -> None:
    with fronted(pool, backend) as front:
        front.front.traffic.drain()
        answer = httpx.post(f"{front.url}/v1/completions")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert httpx.get(f"{front.url}/ready").status_code == 503
        assert httpx.get(f"{front.url}/health").status_code == 503
        assert "flashmoe_accepting 0.0\n" in httpx.get(f"{front.url}/metrics").text
        assert httpx.get(f"{front.url}/metrics").status_code == 200


@pytest.mark.parametrize("path", ["/infill?n=1000", "/v1/messages?n=1000"])
def test_end_of_what_takes_too_long(pool: Model, backend: Backend, path: str) -> None:
    """After the time to drain a stream is told why it ends."""
    with fronted(pool, backend, drain_seconds=0.3) as front, ending(front, path) as answer:
        last = answer.read().decode().rstrip().split("\n\n")[-1]
    name, _, data = last.rpartition("data: ")
    assert json.loads(data)["error"]["message"] == "the server is shutting down"
    assert name == ("event: error\n" if "messages" in path else "")


def test_end_of_what_has_not_begun(pool: Model, backend: Backend) -> None:
    """It is refused after the time to drain; a complete answer would be another."""
    with fronted(pool, backend, drain_seconds=0.3) as front, ending(front, "/slow?seconds=600") as answer:
        assert answer.status_code == 503
