"""Clients that go away."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx2 as httpx

from tests.server.process import ServerProcess


def connect(server: ServerProcess) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)


def wait_for_idle(server: ServerProcess, key: str = "none") -> None:
    """Until no request runs or waits; a hang-up is seen within a moment."""
    for _ in range(600):
        frame = httpx.get(f"{server.url}/flashmoe/live", headers={"Authorization": f"Bearer {key}"}).json()
        if frame["requests"] == {"running": 0, "waiting": 0}:
            return
        time.sleep(0.05)
    raise AssertionError(frame["requests"])


def hang_up_at_random(server: ServerProcess, requests: int, at_once: int) -> None:
    """Clients that go before, in, or after their answer."""

    def one(number: int) -> None:
        connection = connect(server)
        body = {
            "prompt": f"Number {number}",
            "max_tokens": 200,
            "ignore_eos": True,
            "stream": number % 3 != 0,
        }
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            if number % 4:
                time.sleep(number % 7 * 0.03)
                connection.sock.settimeout(number % 5 * 0.2)
                connection.sock.recv(200)
        except (TimeoutError, BlockingIOError):
            pass
        finally:
            connection.close()

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, range(requests)))
