"""Connections whose requests do not come: uvicorn would keep them, and its sockets, for ever."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 60.0  # for a client to send a request's first lines; body.py sees to the rest
LARGEST_HEAD = 1 << 16  # bytes; httptools has no limit of its own
_FRAMING = (b"content-length", b"transfer-encoding")


class TimeoutProtocol(HttpToolsProtocol):
    """uvicorn's, but it closes a connection whose request's head does not come in time, or has no end.

    A connection that has just been opened has begun a request. One that is kept after a response has not, until the
    next request's first byte: uvicorn's own, longer time is for these.
    """

    head_seconds: ClassVar[float] = HEAD_SECONDS
    _late: asyncio.TimerHandle | None = None
    _head = 0  # bytes of the head that is under way
    _complete = True  # whether the latest request is there to its end
    _repeated = False  # whether the parser reads a head that was there before

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._complete:
            self._head += len(data)
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse("Invalid HTTP request received.")
        else:
            if self._complete and self._head > LARGEST_HEAD:
                self._refuse("The request's head is too large.")

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            self._stay(data[stopped.args[0] :])

    def _stay(self, rest: bytes) -> None:
        """Go on in HTTP/1.1 where the client offers another protocol (curl and Java offer HTTP/2 beside a body).

        The parser takes what follows for that protocol. Another one goes on with `rest`, if it believes that it has
        read the head.
        """
        framing = [b"%s: %s\r\n" % header for header in self.headers if header[0] in _FRAMING]
        self.parser = httptools.HttpRequestParser(self)
        if framing:
            self.cycle.more_body = True
            self.cycle.message_event.clear()
            self._repeated = True
            self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(framing) + b"\r\n")
            self._repeated = False
        if rest:
            self._feed(rest)

    def _refuse(self, message: str) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self.send_400_response(message)
        else:  # it came before the response to the one before it
            self.transport.close()

    def on_message_begin(self) -> None:
        if not self._repeated:
            super().on_message_begin()
            self._watch()

    def on_url(self, url: bytes) -> None:
        if not self._repeated:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._repeated:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._forget()
        self._complete = False
        if not self._repeated:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._forget()
        self._complete, self._head = True, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._complete:  # the rest of a request that was refused without it
            self._watch()

    def _watch(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self.head_seconds, self.transport.close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
