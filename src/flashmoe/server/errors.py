"""Errors that the front answers itself, in the shape that the route's clients know: OpenAI's or Anthropic's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Scope, Send

_OPENAI = {401: "authentication_error", 404: "not_found_error"}
_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}


def anthropic(path: str) -> bool:
    """Whether a route is one of Anthropic's API."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


class Refusal(Exception):
    """An answer that is an error. kind: OpenAI's `type` of it, by the status where it is left out."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})
        self._kind, self._code, self._more = kind, code, dict(more or {})

    def body(self, path: str) -> bytes:
        """The JSON object."""
        if anthropic(path):
            kind = _ANTHROPIC.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
            return json.dumps({"type": "error", "error": {"type": kind, "message": self.message}}).encode()
        kind = self._kind or _OPENAI.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        error = {"message": self.message, "type": kind, "param": None, "code": self._code, **self._more}
        return json.dumps({"error": error}).encode()

    def event(self, path: str) -> bytes:
        """The same as the last event of a stream that has begun."""
        name = b"event: error\n" if anthropic(path) else b""
        return b"%sdata: %s\n\n" % (name, self.body(path))

    async def answer(self, scope: Scope, send: Send) -> None:
        """Send it as the response."""
        body = self.body(scope["path"])
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *((name.lower().encode(), value.encode()) for name, value in self.headers.items()),
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def shutting_down() -> Refusal:
    """What requests are told that come, or still run, when the server ends."""
    return Refusal(503, "the server is shutting down", headers={"Retry-After": "5"})
