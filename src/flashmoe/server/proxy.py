"""The reverse proxy: an ASGI application that passes requests to the backend, and its responses back as they come.

It is plain ASGI: what a token costs here is paid thousands of times a second.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

import aiohttp
from starlette.types import Receive, Scope, Send

from flashmoe.errors import UsageError
from flashmoe.server.body import Gone, Limits
from flashmoe.server.errors import Refusal, shutting_down
from flashmoe.server.exchange import Exchange
from flashmoe.server.security import TRUSTED
from flashmoe.server.traffic import GENERATING, Traffic
from flashmoe.server.upstream import InnerServer, Upstream

_log = logging.getLogger("flashmoe.server")
_SAFE = ("GET", "HEAD", "OPTIONS")
_HEALTH = ("/health", "/v1/health")
_LONGEST_NAME = 128  # characters of a client's name for a request, in the log


class Proxy:
    """Requests to one backend. `scope[TRUSTED]` says whether a request may be made with the backend's key."""

    def __init__(
        self,
        inner: InnerServer,
        upstream: Upstream,
        traffic: Traffic,
        limits: Limits,
        exactly: Callable[[bytes], AbstractContextManager[None]],
    ) -> None:
        """exactly: for the time of a request, by its body, see `runtime.exactness`."""
        self._inner, self._upstream, self._traffic, self._limits = inner, upstream, traffic, limits
        self._for_request = exactly

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        counted = scope["method"] == "POST" and scope["path"] in GENERATING
        exchange = Exchange(self._inner, self._upstream, scope, send)
        if counted:
            exchange.on_first_byte = self._timer()
        outcome, began = "server_error", time.perf_counter()
        try:
            if scope["path"] in _HEALTH:
                self._traffic.check_open()
            if scope["method"] not in _SAFE:
                _check_route(scope["path"])
            with (
                self._traffic.entered() if scope["method"] not in _SAFE else nullcontext(),
                self._traffic.counted() if counted else nullcontext(),
            ):
                body = await self._limits.read(scope, receive)
                with self._exactly(body):
                    await self._run(exchange, body, receive)
            outcome = exchange.outcome
        except Gone:
            outcome = "cancelled"
        except Refusal as refusal:
            outcome = "client_error" if refusal.status < 500 else "server_error"
            await exchange.refuse(refusal)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            _log.warning("%s: the backend does not answer: %r", _named(scope), error)
            await exchange.refuse(Refusal(502, "the engine's server does not answer; see the log"))
        except Exception:
            _log.exception("%s failed", _named(scope))
            await exchange.refuse(Refusal(500, "internal error"))
        finally:
            if counted:
                self._traffic.on_end(outcome)
                _log.info("%s: %s after %.2f s", _named(scope), outcome, time.perf_counter() - began)

    def _exactly(self, body: bytes) -> AbstractContextManager[None]:
        """For the time of a request. Raises Refusal."""
        try:
            return self._for_request(body)
        except UsageError as error:
            raise Refusal(400, str(error)) from None

    async def _run(self, exchange: Exchange, body: bytes, receive: Receive) -> None:
        """Raises Gone when the client hangs up; the backend is hung up on then, and when the time to drain ends."""
        work = asyncio.create_task(exchange.run(body, trusted=exchange.scope[TRUSTED]))
        gone = asyncio.create_task(_until_gone(receive))
        with self._traffic.stoppable(work):
            try:
                await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
                hung_up = not work.done() and not exchange.ended
            finally:
                gone.cancel()
                if not work.done():
                    work.cancel()
                    with suppress(asyncio.CancelledError, Exception):
                        await work
        if hung_up:
            raise Gone
        if work.cancelled():
            raise shutting_down()
        work.result()

    def _timer(self) -> Exchange.Heard:
        began = time.perf_counter()
        return lambda: self._traffic.on_first_byte(time.perf_counter() - began)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_route(path: str) -> None:
    """Slots are saved by --save-cache, in a folder that is not its clients' to fill."""
    if path.startswith("/slots/"):
        raise Refusal(501, "saving and restoring slots over HTTP is off; see --save-cache")


def _named(scope: Scope) -> str:
    """A request, with its client's own name for it: that finds it in the logs of all that it went through."""
    name = dict(scope["headers"]).get(b"x-request-id", b"")[:_LONGEST_NAME].decode("latin-1")
    return f"{scope['method']} {scope['path']}" + (f" (request {name!r})" if name else "")
