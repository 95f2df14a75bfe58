"""Who may ask: an API key, the names under which a loopback server is called, and bodies that come in time."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashmoe.server import openai

OPEN_PATHS = frozenset({"/health", "/ready"})  # asked by supervisors, which have no key
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
        self, app: ASGIApp, *, host: str, api_key: str | None, body_seconds: float = BODY_SECONDS
    ) -> None:
        self._app, self._key, self._seconds = app, api_key.encode() if api_key else None, body_seconds
        self._names = {"localhost", "127.0.0.1", "[::1]", host.lower()} if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope["path"], headers)
        if refusal:
            await refusal(scope, receive, send)
            return
        deadline = asyncio.get_running_loop().time() + self._seconds
        complete = False

        async def receive_in_time() -> Message:
            nonlocal complete
            if complete:
                return await receive()
            left = deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, left))
            except asyncio.TimeoutError:
                return {"type": "http.disconnect"}
            complete = not message.get("more_body", False)
            return message

        await self._app(scope, receive_in_time, send)

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
