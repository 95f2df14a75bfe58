"""What a gateway or an orchestrator relies on: a server that loads, is ready, drains, and ends."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx

from flashmoe.server.loading import refusing
from flashmoe.server.serve import listen
from tests.server.front import until
from tests.server.hangups import connect
from tests.server.process import serving


def test_refused_while_it_loads() -> None:
    """On every route, in the route's own shape; what comes at the end waits for the server."""
    (sock,) = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with sock:
        with refusing([sock]), socket.create_connection(("127.0.0.1", port)):  # one that asks nothing
            for method, path in (("GET", "/health"), ("GET", "/ready"), ("POST", "/v1/chat/completions?a")):
                answer = httpx.request(method, url + path)
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
                assert answer.json()["error"]["message"] == "the model is loading"
                assert answer.json()["error"]["type"] == "unavailable_error"
            assert httpx.post(f"{url}/v1/messages").json()["error"]["type"] == "overloaded_error"
            assert httpx.head(f"{url}/health").status_code == 503
        with socket.create_connection(("127.0.0.1", port)) as later:
            later.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            sock.settimeout(10)
            taken, _ = sock.accept()
            with taken:
                assert taken.recv(100).startswith(b"GET /health")


def test_health_from_the_start(demo: Path) -> None:
    """Nothing but 503 until the first 200, and nothing but 200 from there on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flashmoe.cli", "serve", str(demo), "--cache", "50%", "-t", "1"]
    seen: list[int] = []
    with subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL) as process:
        try:
            while seen[-5:] != [200] * 5:
                assert process.poll() is None
                try:
                    seen.append(httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code)
                except httpx.ConnectError:
                    assert not seen
                time.sleep(0.01)
        finally:
            process.terminate()
    assert process.returncode == 0
    assert seen[0] == 503
    assert seen == sorted(seen, reverse=True)


def stream_under_way(connection: http.client.HTTPConnection, tokens: int) -> http.client.HTTPResponse:
    """A completion of `tokens` tokens, of which the first has come."""
    body = {"prompt": "The sea", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    while b"text" not in response.readline():
        pass
    return response


def test_end_in_order(demo: Path, cache_home: Path) -> None:
    """A stream under way comes to its end, then the conversations are kept; the exit status is 0."""
    folder = cache_home / "flashmoe/sessions"
    before = set(folder.rglob("*.state"))
    with serving(demo, "--cache", "50%", "--parallel", 1, "--save-cache") as server:
        connection = connect(server)
        response = stream_under_way(connection, 100)
        server.send_signal(signal.SIGTERM)
        rest = response.read().decode()
        assert '"finish_reason":"length"' in rest
        assert rest.rstrip().endswith("data: [DONE]")
        connection.close()
        assert server.wait() == 0
    assert len(set(folder.rglob("*.state")) - before) == 1


def test_end_of_what_takes_too_long(demo: Path) -> None:
    """After the time to drain a stream is told why it ends."""
    with serving(demo, "--cache", "20%", "--drain-seconds", 0.1) as server:
        connection = connect(server)
        response = stream_under_way(connection, 500)
        server.send_signal(signal.SIGTERM)
        last = response.read().decode().split("data: ")[-1]
        assert json.loads(last)["error"]["message"] == "the server is shutting down"
        connection.close()
        assert server.wait() == 0


def test_interrupted_twice(demo: Path) -> None:
    """It does not wait, and has nothing to complain of. A hang-up of its terminal drains it, as SIGTERM does."""
    for number in (signal.SIGINT, signal.SIGHUP):
        with serving(demo, "--cache", "20%", "--drain-seconds", 600, "-c", 2048) as server:
            connection = connect(server)
            response = stream_under_way(connection, 1900)
            server.send_signal(number)
            until(lambda: httpx.get(f"{server.url}/health").status_code != 200)
            server.send_signal(signal.SIGINT)
            last = response.read().decode().split("data: ")[-1]
            assert json.loads(last)["error"]["message"] == "the server is shutting down"
            connection.close()
            assert server.wait() == 0
        assert not [line for line in server.messages if "rror" in line or "Unclosed" in line]


def test_drain_under_load(demo: Path) -> None:
    """Eight clients that ask again and again: every request is answered whole, or told to go elsewhere."""
    body = {
        "prompt": "The sea",
        "max_tokens": 24,
        "ignore_eos": True,
        "temperature": 0,
        "cache_prompt": False,
    }
    told, served = threading.Event(), threading.Semaphore(0)
    last: list[str] = []

    with serving(demo, "--cache", "50%", "--parallel", 2, "--verbose") as server:

        def ask(client: int) -> Counter[str]:
            found: Counter[str] = Counter()
            for number in range(1_000_000):
                name = f"{client}-{number}"
                try:
                    answer = httpx.post(
                        f"{server.url}/v1/completions", json=body, timeout=60, headers={"X-Request-Id": name}
                    )
                except httpx.TransportError:  # the port is closed when nothing runs any more
                    assert told.is_set()
                    last.append(name)
                    break
                if answer.status_code == 503:
                    assert told.is_set()
                    assert answer.headers["retry-after"]
                    found["refused"] += 1
                    time.sleep(0.02)
                    continue
                assert answer.json()["usage"]["completion_tokens"] == body["max_tokens"]
                found["drained" if told.is_set() else "answered"] += 1
                served.release()
            return found

        with ThreadPoolExecutor(8) as clients:
            work = [clients.submit(ask, i) for i in range(8)]
            for _ in range(10):
                assert served.acquire(timeout=60)
            told.set()
            server.send_signal(signal.SIGTERM)
            found = sum((one.result(120) for one in work), Counter[str]())
        assert server.wait() == 0
    log = "\n".join(server.messages)
    assert log.count(": ok after") == found["answered"] + found["drained"]
    assert len(last) == 8
    assert not [name for name in last if f"'{name}'" in log]
    assert found["answered"] >= 10
    assert found["drained"]  # what ran or waited came to its end
    assert found["refused"]
