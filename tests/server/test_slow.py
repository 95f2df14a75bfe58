"""Requests that come a byte at a time, or not at all, against uvicorn with little patience."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse

from flashmoe.server.patience import PatientProtocol
from flashmoe.server.security import Guard
from flashmoe.server.serve import listen

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n"


class Hasty(PatientProtocol):
    head_seconds = 0.3


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers slower than a client has time to ask."""
    try:
        body = await Request(scope, receive).body()
    except Exception as error:
        await JSONResponse(str(error), getattr(error, "status_code", 500))(scope, receive, send)
        return
    await asyncio.sleep(2 * Hasty.head_seconds)
    await JSONResponse(body.decode())(scope, receive, send)


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    guarded = Guard(app, host="127.0.0.1", api_key=None, max_body=1000, body_seconds=Hasty.head_seconds)
    config = uvicorn.Config(guarded, http=Hasty, lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    with listen("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        yield sock.getsockname()
        server.should_exit = True
        thread.join()


def everything(sock: socket.socket) -> bytes:
    """Until the server closes."""
    data = b""
    while part := sock.recv(4096):
        data += part
    return data


@pytest.mark.parametrize("begun", [b"", b"P", HEAD])
def test_head_that_does_not_come(address: tuple[str, int], begun: bytes) -> None:
    with socket.create_connection(address, timeout=30) as sock:
        sock.sendall(begun)
        assert everything(sock) == b""


def test_body_that_does_not_come(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=30) as sock:
        sock.sendall(HEAD + b"\r\nab")
        assert sock.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_slow_answer_is_not_cut_off(address: tuple[str, int]) -> None:
    """The time is the client's, not the server's; a second request's head has its own."""
    with socket.create_connection(address, timeout=30) as sock:
        for _ in range(2):
            sock.sendall(HEAD + b"\r\nabcd")
            answer = b""
            while not answer.endswith(b'"abcd"'):
                answer += sock.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200 ")
        sock.sendall(HEAD)
        assert everything(sock) == b""
