"""Connections whose requests do not come: uvicorn would keep them, and its sockets, for ever."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 60.0  # for a client to send a request's first lines; body.py sees to the rest
LARGEST_HEAD = 1 << 16  # bytes; httptools has no limit of its own


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's, but it closes a connection whose request's head does not come in time, or has no end.

    A connection that has just been opened has begun a request. One that is kept after a response has not, until the
    next request's first byte: uvicorn's own, longer time is for these.
    """

    head_seconds: ClassVar[float] = HEAD_SECONDS
    _late: asyncio.TimerHandle | None = None
    _head = 0  # bytes of the head that is under way
    _complete = True  # whether the latest request is there to its end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._complete:
            self._head += len(data)
        super().data_received(data)
        if self._complete and self._head > LARGEST_HEAD and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.send_400_response("The request's head is too large.")
            else:  # it came before the response to the one before it
                self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._watch()

    def on_headers_complete(self) -> None:
        self._forget()
        self._complete = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._forget()
        self._complete, self._head = True, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._complete:  # the rest of a request that was refused without it
            self._watch()

    def _unsupported_upgrade_warning(self) -> None:
        """An offer to go on in another protocol may be ignored; but this parser does not go on after it."""
        self.cycle.keep_alive = False

    def _watch(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self.head_seconds, self.transport.close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
