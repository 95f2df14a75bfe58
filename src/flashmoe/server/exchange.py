"""One request to the backend and its response, piece by piece."""

from __future__ import annotations

from collections.abc import Callable

import aiohttp
from starlette.types import Scope, Send

from flashmoe.engines.llamacpp.serving.options import in_our_words
from flashmoe.server import repair
from flashmoe.server.errors import Refusal, anthropic
from flashmoe.server.upstream import InnerServer, Upstream, request_headers, response_headers

PAGE = b"flashmoe/"  # where a browser goes if the backend has no page of its own
_FORM = b"application/x-www-form-urlencoded"
_JSON = ("content-type", "application/json")


class Exchange:
    """Sends the response to `send` itself, and knows what can still be said when something goes wrong."""

    Heard = Callable[[], None]

    def __init__(self, inner: InnerServer, upstream: Upstream, scope: Scope, send: Send) -> None:
        self.scope = scope
        self._inner, self._upstream, self._send = inner, upstream, send
        self._method, self._path = scope["method"], scope["path"]
        self._begun = self._events = False
        #: Whether the response is complete.
        self.ended = False
        #: "ok", "client_error" or "server_error", when it has ended.
        self.outcome = "server_error"
        #: Called when the first byte of the response's body is there.
        self.on_first_byte: Exchange.Heard = lambda: None

    async def run(self, body: bytes, *, trusted: bool) -> None:
        """Ask and pass the answer on. Cancelled, or when it fails, it closes the connection to the backend."""
        target = self.scope["raw_path"]
        if self.scope["query_string"]:
            target += b"?" + self.scope["query_string"]
        if not target.startswith(b"/"):
            raise Refusal(400, "a request's target must be a path")
        headers = request_headers(self.scope["headers"])
        if body[:1] == b"{":
            headers = _as_json(headers)
        response = await self._upstream.request(self._method, target, headers, body, trusted=trusted)
        try:
            if response.status == 415 and self._method in ("GET", "HEAD"):
                await self._unpack(target, headers, trusted)
            elif response.status == 404 and self._path == "/" and self._method == "GET":
                await self._answer(307, [(b"location", PAGE)], b"")
            elif response.status >= 400 and self._method != "HEAD":
                await self._explain(response)
            else:
                await self._relay(response)
        finally:
            response.close()

    async def refuse(self, refusal: Refusal) -> None:
        """Say what went wrong: as the response, or as the last event of one that is a stream of events."""
        if not self._begun:
            self._begun = self.ended = True
            await refusal.answer(self.scope, self._send)
        elif self._events and not self.ended:
            self.ended = True
            await self._send({"type": "http.response.body", "body": refusal.event(self._path)})
        # else the client sees a connection that ends too early

    async def _relay(self, response: aiohttp.ClientResponse) -> None:
        """The response as it is, unbuffered."""
        self._events = response.content_type == "text/event-stream"
        await self._begin(response.status, response_headers(response.raw_headers))
        self.outcome = _outcome(response.status)
        send, content, events = self._send, response.content, self._events
        chunk = await content.readany()
        if chunk:
            self.on_first_byte()
        while chunk:
            if events and repair.COMPUTE_ERROR in chunk:
                chunk = repair.explained(chunk, self._inner.last_error)
                self.outcome = "server_error"
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            chunk = await content.readany()
        self.ended = True
        await send({"type": "http.response.body", "body": b""})

    async def _explain(self, response: aiohttp.ClientResponse) -> None:
        """An error that may have too few words."""
        headers, body = response_headers(response.raw_headers), await response.read()
        if response.status == 404:
            body = repair.no_such_route(self._method, self._path, body)
        else:
            body = repair.explained(body, self._inner.last_error)
            body = in_our_words(body.decode("latin-1")).encode("latin-1")
        if self._path.startswith("/v1/") and not anthropic(self._path):
            body = repair.as_openai(body)
        await self._answer(response.status, headers, body)

    async def _unpack(self, target: bytes, headers: list[tuple[str, str]], trusted: bool) -> None:
        """The backend has its page compressed only, and refuses clients that do not offer to unpack it: curl, say."""
        headers = [(name, value) for name, value in headers if name != "accept-encoding"]
        headers.append(("accept-encoding", "gzip"))
        async with await self._upstream.request("GET", target, headers, trusted=trusted) as response:
            kept, body = response_headers(response.raw_headers), await response.read()
            if response.headers.get("Content-Encoding") == "gzip":
                kept, body = repair.unpacked(kept, body)
            await self._answer(response.status, kept, body)

    async def _answer(self, status: int, headers: repair.RawHeaders, body: bytes) -> None:
        await self._begin(status, repair.with_length(headers, body))
        self.outcome = _outcome(status)
        self.ended = True
        await self._send({"type": "http.response.body", "body": body})

    async def _begin(self, status: int, headers: repair.RawHeaders) -> None:
        self._begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


def _outcome(status: int) -> str:
    return "ok" if status < 400 else "client_error" if status < 500 else "server_error"


def _as_json(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """`curl -d` calls JSON a form; the backend would read it as one, and no more than some kilobytes of it."""
    for i, (name, value) in enumerate(headers):
        if name == "content-type":
            if value.lower().startswith(_FORM.decode()):
                headers[i] = _JSON
            return headers
    return [*headers, _JSON]
