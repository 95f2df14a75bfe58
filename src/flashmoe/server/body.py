"""Request bodies: read whole, in time and within a limit, and looked into where the backend would not survive them.

The front buffers a request before it passes it on, as reverse proxies do: a client that sends slowly occupies none of
the backend's threads, and a body that is refused has not reached the backend.
"""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope

from flashmoe.engines.llamacpp.serving.bodies import (
    DEEPEST,
    TOO_DEEP,
    does_not_fit,
    longest_text,
    too_deep,
)
from flashmoe.server.errors import Refusal

LEAST_BODY = 1 << 20  # bytes that are always allowed
PICTURES = 64 << 20  # bytes that are allowed where images are
AROUND_TEXT = 64 << 10  # bytes of a body beside its text
BODY_SECONDS = 60.0  # for a client to send its body


class Gone(Exception):
    """The client has closed the connection."""


class Limits:
    """Limits of a request's body.

    n_ctx: tokens of the context of one slot; longest_text: bytes of a text that may be worth tokenizing; multimodal: a
    body may hold pictures, in base64.
    """

    def __init__(
        self, n_ctx: int, longest_text: int, multimodal: bool, seconds: float = BODY_SECONDS
    ) -> None:
        self._n_ctx, self._text, self._seconds = n_ctx, longest_text, seconds
        self.most = max(LEAST_BODY, longest_text + AROUND_TEXT, PICTURES if multimodal else 0)

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """The body. Raises Refusal, and Gone."""
        for name, value in scope["headers"]:
            if name == b"content-length" and int(value) > self.most:
                raise self._too_large()  # before the client has sent it
        try:
            body = await asyncio.wait_for(self._collect(receive), self._seconds)
        except asyncio.TimeoutError:
            message = f"the request's body did not arrive within {self._seconds:g} seconds"
            raise Refusal(408, message, headers={"Connection": "close"}) from None
        deep = body.count(b"[") + body.count(b"{") > DEEPEST
        if (deep or len(body) > self._text) and _kind(scope) != b"multipart/form-data":
            await asyncio.to_thread(self._look_into, body)
        return body

    async def _collect(self, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            part = message.get("body", b"")
            size += len(part)
            if size > self.most:
                raise self._too_large()
            parts.append(part)
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the request is larger than {self.most} bytes")

    def _look_into(self, body: bytes) -> None:
        """Raises Refusal for JSON that is nested too deeply, or that holds a text that cannot fit in the context."""
        if too_deep(body):
            raise Refusal(400, TOO_DEEP)
        if len(body) > self._text and (longest := longest_text(body)) > self._text:
            raise Refusal(
                400,
                does_not_fit(longest, self._n_ctx, self._text),
                kind="exceed_context_size_error",
                code="context_length_exceeded",
                more={"n_ctx": self._n_ctx},
            )


def _kind(scope: Scope) -> bytes:
    """The media type of a request."""
    for name, value in scope["headers"]:
        if name == b"content-type":
            return bytes(value.partition(b";")[0].strip().lower())
    return b""
