"""What is answered while the model loads: 503, so that a gateway or an orchestrator waits, and a client tries again."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from flashmoe.server.errors import Refusal

BACKLOG = 2048  # connections that wait to be taken
_HEAD_SECONDS = 10.0  # for a client to send a request's head
_LAST_SECONDS = 0.2  # the same, when the model has loaded
_LARGEST_HEAD = 1 << 16
_RETRY_SECONDS = 1
_AGAIN_SECONDS = 0.05  # after a connection that could not be taken


@contextmanager
def refusing(sockets: Sequence[socket.socket]) -> Iterator[None]:
    """Every request is told that the model loads, as long as the block lasts; `sockets` listen on after it.

    Connections that come at its end wait in the sockets for the server.
    """
    loop = asyncio.new_event_loop()
    ends = asyncio.Event()
    thread = threading.Thread(
        target=loop.run_until_complete, args=(_refuse(sockets, ends),), name="flashmoe-loading", daemon=True
    )
    for sock in sockets:
        sock.setblocking(False)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(ends.set)
        thread.join()
        loop.close()


async def _refuse(sockets: Sequence[socket.socket], ends: asyncio.Event) -> None:
    taken: set[asyncio.Task[None]] = set()
    ended = asyncio.ensure_future(ends.wait())

    async def accept(sock: socket.socket) -> None:
        """Each connection that is taken is answered: the server will not see it."""
        while not ends.is_set():
            accepted = asyncio.ensure_future(asyncio.get_running_loop().sock_accept(sock))
            await asyncio.wait((accepted, ended), return_when=asyncio.FIRST_COMPLETED)
            if not accepted.done():
                accepted.cancel()
            elif accepted.exception() is None:
                taken.add(task := asyncio.ensure_future(_answer(accepted.result()[0])))
                task.add_done_callback(taken.discard)
            else:  # the client has gone, or every descriptor is in use for now
                await asyncio.wait((ended,), timeout=_AGAIN_SECONDS)

    await asyncio.gather(*map(accept, sockets))
    if taken:
        await asyncio.wait(taken, timeout=_LAST_SECONDS)
    for task in taken:
        task.cancel()
    await asyncio.gather(*taken, return_exceptions=True)


async def _answer(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with connection, suppress(OSError, asyncio.TimeoutError):
        connection.setblocking(False)
        head = await asyncio.wait_for(_head(connection), _HEAD_SECONDS)
        if head:
            await asyncio.wait_for(loop.sock_sendall(connection, _response(head)), _HEAD_SECONDS)


async def _head(connection: socket.socket) -> bytes:
    """A request's lines and what came with them; b"" where they have no end."""
    head = b""
    while b"\r\n\r\n" not in head:
        piece = await asyncio.get_running_loop().sock_recv(connection, _LARGEST_HEAD)
        head += piece
        if not piece or len(head) > _LARGEST_HEAD:
            return b""
    return head


def _response(head: bytes) -> bytes:
    """llama.cpp's type of error, in the shape that the route's clients know."""
    method, path, _ = (head.split(b"\r\n")[0] + b"  ").split(b" ", 2)
    refusal = Refusal(503, "the model is loading", kind="unavailable_error")
    body = refusal.body(path.decode("latin-1").partition("?")[0])
    lines = (
        "HTTP/1.1 503 Service Unavailable",
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"retry-after: {_RETRY_SECONDS}",
        "connection: close",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if method == b"HEAD" else body)
