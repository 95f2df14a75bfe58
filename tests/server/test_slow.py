"""Requests that come a byte at a time, or not at all, against uvicorn with little patience."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from flashmoe.server.body import Limits
from flashmoe.server.errors import Refusal
from flashmoe.server.serve import KEEP_ALIVE_SECONDS, listen
from flashmoe.server.timeouts import LARGEST_HEAD, TimeoutProtocol

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n"


class Hasty(TimeoutProtocol):
    head_seconds = 0.3


LIMITS = Limits(512, 1000, False, seconds=Hasty.head_seconds)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers slower than a client has time to ask."""
    try:
        body = await LIMITS.read(scope, receive)
    except Refusal as refusal:
        await refusal.answer(scope, send)
        return
    await asyncio.sleep(2 * Hasty.head_seconds)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    config = uvicorn.Config(
        app, http=Hasty, ws="none", lifespan="off", log_level="error", timeout_keep_alive=KEEP_ALIVE_SECONDS
    )
    server = uvicorn.Server(config)
    (sock,) = listen("127.0.0.1", 0)
    with sock:
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


def exchange(sock: socket.socket, head: bytes = HEAD) -> bytes:
    sock.sendall(head + b"\r\nabcd")
    answer = b""
    while not answer.endswith(b"abcd"):
        answer += (part := sock.recv(4096))
        assert part, answer
    return answer


def test_slow_answer_is_not_cut_off(address: tuple[str, int]) -> None:
    """The time is the client's, not the server's; a second request's head has its own."""
    with socket.create_connection(address, timeout=30) as sock:
        for _ in range(2):
            assert exchange(sock).startswith(b"HTTP/1.1 200 ")
        sock.sendall(HEAD)
        assert everything(sock) == b""


def test_kept_connection_is_idle_for_longer(address: tuple[str, int]) -> None:
    """Clients hold connections for some time and send their next request as if they were open."""
    assert KEEP_ALIVE_SECONDS > 75
    with socket.create_connection(address, timeout=30) as sock:
        exchange(sock)
        time.sleep(5 * Hasty.head_seconds)
        assert exchange(sock).startswith(b"HTTP/1.1 200 ")


def test_head_without_end(address: tuple[str, int]) -> None:
    for begun in (HEAD + b"X: ", HEAD + b"X: y\r\n" * 4, b"GET /"):
        with socket.create_connection(address, timeout=30) as sock:
            sock.sendall(begun)
            answer = b""
            try:
                for _ in range(100):
                    sock.sendall(b"a" * (LARGEST_HEAD // 16))
                answer = sock.recv(4096)
            except ConnectionError:
                continue
            assert answer.startswith(b"HTTP/1.1 400 ")


def test_body_behind_a_refusal(address: tuple[str, int]) -> None:
    """It is read and forgotten, but not for ever."""
    large = HEAD.replace(b"Content-Length: 4", b"Content-Length: 100000000")
    with socket.create_connection(address, timeout=30) as sock:
        sock.sendall(large + b"\r\nabc")
        assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")

        def go_on() -> None:
            for _ in range(1000):  # of the hundred million bytes that were announced
                sock.sendall(b"abc")
                time.sleep(0.05)

        with pytest.raises(ConnectionError):
            go_on()


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"
CHUNKED = HEAD.replace(b"Content-Length: 4", b"Transfer-Encoding: chunked")


def test_offer_of_another_protocol(address: tuple[str, int]) -> None:
    """It is ignored: the request is answered with its body, and the connection goes on."""
    with socket.create_connection(address, timeout=30) as sock:
        for _ in range(2):
            assert exchange(sock, HEAD + OFFER).startswith(b"HTTP/1.1 200 ")
        sock.sendall(HEAD + OFFER + b"\r\n")
        time.sleep(0.02)
        sock.sendall(b"ab")
        time.sleep(0.02)
        sock.sendall(b"cd" + CHUNKED + OFFER + b"\r\n4\r\nefgh\r\n0\r\n\r\n")
        answers = b""
        while not answers.endswith(b"efgh"):
            answers += (part := sock.recv(4096))
            assert part, answers
        assert b"abcd" in answers
