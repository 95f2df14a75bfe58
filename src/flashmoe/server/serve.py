"""A process that serves: a socket, uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn

from flashmoe.errors import UsageError
from flashmoe.model import Model
from flashmoe.server.app import make_app
from flashmoe.server.patience import PatientProtocol
from flashmoe.server.scheduler import Scheduler

GRACE_SECONDS = 30.0  # for running requests, when the server is told to end


class _Server(uvicorn.Server):
    """Ends in order: no new requests, a time of grace for those that run, then an error in their streams."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, grace: float) -> None:
        super().__init__(config)
        self._scheduler, self._grace = scheduler, grace

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's own, but the signal is not raised again: an end in order is a success."""
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._scheduler.refuse()
        late = asyncio.get_running_loop().call_later(self._grace, self._scheduler.stop_running)
        await super().shutdown(sockets)
        late.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises UsageError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"cannot listen on {host} port {port} ({error}); choose others (--host, --port)"
        ) from None
    return sock


def serve(
    model: Model,
    sock: socket.socket,
    *,
    name: str,
    host: str,
    api_key: str | None = None,
    cors: Sequence[str] = (),
    grace: float = GRACE_SECONDS,
    started: Callable[[], Any] = lambda: None,
) -> None:
    """Serve `model` on `sock` until SIGINT or SIGTERM. `started` is called when requests are answered."""
    scheduler = Scheduler(model)
    try:
        app = make_app(scheduler, name=name, host=host, api_key=api_key, cors=cors)
        app.router.on_startup.append(started)
        config = uvicorn.Config(
            app,
            http=PatientProtocol,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(grace) + 5,
        )
        _Server(config, scheduler, grace).run(sockets=[sock])
    finally:
        scheduler.close()
