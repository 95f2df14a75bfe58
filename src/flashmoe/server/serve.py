"""A process that serves: a socket, uvicorn before the backend, and an orderly end."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from flashmoe.errors import UsageError
from flashmoe.server.app import Front
from flashmoe.server.loading import BACKLOG
from flashmoe.server.timeouts import TimeoutProtocol

_LAST_SECONDS = 5  # for connections to close when requests have ended
KEEP_ALIVE_SECONDS = 120  # between two requests; clients keep connections for up to 75 s, and then trust them


class FrontServer(uvicorn.Server):
    """Ends in order: new requests are refused, those that run have some time, then an error ends their streams.

    Connections are taken until the end, so that a gateway is told 503 and asks another worker.
    """

    def __init__(self, front: Front, drain_seconds: float) -> None:
        """drain_seconds: for running requests at the end, which SIGINT or SIGTERM begins."""
        super().__init__(
            uvicorn.Config(
                front,
                http=TimeoutProtocol,
                ws="none",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_LAST_SECONDS,
            )
        )
        self._front, self._drain_seconds = front, drain_seconds

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's own, but the signal is not raised again: an end in order is a success."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ends = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            ends.append(signal.SIGHUP)
        before = {s: signal.signal(s, self.handle_exit) for s in ends}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        traffic, clock = self._front.traffic, asyncio.get_running_loop().time
        traffic.drain()
        late = clock() + self._drain_seconds
        while traffic.busy and clock() < late and not self.force_exit:
            await asyncio.sleep(0.05)
        traffic.stop()
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()  # uvicorn leaves it out then


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets, one for each address that a name has; port 0 takes a free one. Raises UsageError."""
    found: list[socket.socket] = []
    try:
        addresses = dict.fromkeys(
            (family, address[0])
            for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        for family, address in sorted(addresses):  # IPv4 first
            sock = socket.socket(family, socket.SOCK_STREAM)
            found.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address, port or found[0].getsockname()[1]))
            sock.listen(BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:  # the last of names that are none
        for sock in found:
            sock.close()
        raise UsageError(
            f"cannot listen on {host} port {port} ({error}); choose others (--host, --port)"
        ) from None
    return found
