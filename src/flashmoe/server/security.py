"""Who may ask: an API key, the names under which a loopback server is called, and bodies that come in time."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashmoe.server import openai
from flashmoe.server.page import PAGE_PATHS

#: Without a key: what supervisors ask, and the page, which asks its reader for one.
OPEN_PATHS = PAGE_PATHS | {"/health", "/ready"}
BODY_SECONDS = 60.0  # for a client to send its request


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware. Without a key everybody may ask.

    A server that listens on loopback answers only to loopback's names: a page in a browser, whose own name has been
    pointed at 127.0.0.1, gets nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        api_key: str | None,
        max_body: int,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._app, self._key = app, api_key.encode() if api_key else None
        self._max_body, self._seconds = max_body, body_seconds
        self._names = {"localhost", "127.0.0.1", "[::1]", host.lower()} if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif refusal := self._refusal(scope["path"], Headers(scope=scope)):
            await refusal(scope, receive, send)
        else:
            await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        """`receive`, for a body that has to be small enough and there in time."""
        now = asyncio.get_running_loop().time
        deadline, size, complete = now() + self._seconds, 0, False

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - now()))
            except asyncio.TimeoutError:
                raise HTTPException(408, "the request did not arrive in time") from None
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise HTTPException(413, f"the request is larger than {self._max_body} bytes")
            complete = not message.get("more_body", False)
            return message

        return limited

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        host = headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] if ":" in host else host
        if self._names is not None and name not in self._names:
            return JSONResponse(
                openai.error(f"this server does not answer to the name {name!r}", "invalid_request_error"),
                421,
            )
        if self._key is None or path in OPEN_PATHS:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._key):
            return None
        return JSONResponse(
            openai.error("a valid API key is needed", "authentication_error", code="invalid_api_key"),
            401,
            {"WWW-Authenticate": "Bearer"},
        )
