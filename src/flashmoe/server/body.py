"""Request bodies: read whole, in time and within a limit, and looked into where the backend would not survive them.

The front buffers a request before it passes it on, as reverse proxies do: a client that sends slowly occupies none of
the backend's threads, and a body that is refused has not reached the backend.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import numpy as np
from starlette.types import Receive, Scope

from flashmoe.server.errors import Refusal

LEAST_BODY = 1 << 20  # bytes that are always allowed
PICTURES = 64 << 20  # bytes that are allowed where images are
AROUND_TEXT = 64 << 10  # bytes of a body beside its text
BODY_SECONDS = 60.0  # for a client to send its body
DEEPEST = 256  # JSON in JSON; the backend walks it by recursion, and some 100,000 levels end the process

_TEXTS = frozenset(("prompt", "content", "messages", "input", "system"))
_NO_TEXTS = frozenset(
    ("data", "file_data", "multimodal_data", "url")
)  # pictures and sounds, in the midst of texts
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


class Gone(Exception):
    """The client has closed the connection."""


class Limits:
    """What a body may be.

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
        long = len(body) > self._text
        if (deep or long) and _kind(scope) != b"multipart/form-data":
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
        if _depth(body) > DEEPEST:
            raise Refusal(400, f"the JSON is nested more than {DEEPEST} levels deep")
        if len(body) <= self._text:
            return
        try:
            longest = _longest_text(json.loads(body))
        except ValueError:
            return  # the backend says what is wrong with it
        if longest > self._text:
            raise Refusal(
                400,
                f"the request has a text of {longest} bytes; the longest that may fit in the context of "
                f"{self._n_ctx} tokens has {self._text}",
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


def _depth(body: bytes) -> int:
    """How deeply JSON is nested, or would be if it were well-formed."""
    marks = np.frombuffer(_STRING.sub(b"", body), np.uint8)
    opened, closed = (marks == ord("[")) | (marks == ord("{")), (marks == ord("]")) | (marks == ord("}"))
    return int(np.cumsum(opened.astype(np.int32) - closed.astype(np.int32)).max(initial=0))


def _longest_text(value: Any) -> int:
    """Bytes of the longest string that a prompt is made of."""
    longest, rest = 0, [(value, False)]
    while rest:
        item, is_text = rest.pop()
        if isinstance(item, dict):
            rest += [
                (inner, is_text or name in _TEXTS) for name, inner in item.items() if name not in _NO_TEXTS
            ]
        elif isinstance(item, list):
            rest += [(inner, is_text) for inner in item]
        elif is_text and isinstance(item, str) and not item.startswith("data:"):
            longest = max(longest, len(item.encode("utf-8", "surrogatepass")))
    return longest
