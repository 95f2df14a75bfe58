"""The backend: requests to llama.cpp's server over its Unix socket, and which headers go through.

Every request has a connection of its own. That costs some 50 microseconds on a Unix socket; kept connections would each
hold one of the backend's threads, and the backend closes them after five seconds or a hundred requests, perhaps under
the next request.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any, Protocol

import aiohttp
from yarl import URL

HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    )
)
_NOT_PASSED = HOP_BY_HOP | {b"host", b"content-length", b"expect", b"authorization", b"x-api-key"}
_OWN = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")  # headers that aiohttp would add
_LARGE = 1 << 20  # bytes of a body that is better sent in pieces
_LARGEST_LINE = 1 << 16  # of a head: the backend's are short, a client's may come back in them

RawHeaders = Iterable[tuple[bytes, bytes]]


class InnerServer(Protocol):
    """What the front needs of the backend."""

    socket: str
    key: str
    n_ctx: int
    parallel: int
    multimodal: bool
    last_error: str

    @property
    def longest_text(self) -> int: ...


class Upstream:
    """Requests to the backend. To be opened and closed in the event loop."""

    def __init__(self, inner: InnerServer) -> None:
        self._inner = inner
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Before the first request."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(self._inner.socket, limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),  # answers may take hours
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_OWN,
            max_line_size=_LARGEST_LINE,
            max_field_size=_LARGEST_LINE,
        )

    async def close(self) -> None:
        """After the last one."""
        if self._session is not None:
            await self._session.close()

    async def request(
        self,
        method: str,
        target: bytes,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        *,
        trusted: bool = True,
    ) -> aiohttp.ClientResponse:
        """The response's head; its body is still to be read, and the response to be closed. trusted: with the key."""
        assert self._session is not None
        sent = list(headers)
        if trusted:
            sent.append(("Authorization", f"Bearer {self._inner.key}"))
        data: Any = None
        if body:
            data = body if len(body) < _LARGE else io.BytesIO(body)
        url = URL("http://localhost" + target.decode("latin-1"), encoded=True)
        return await self._session.request(method, url, headers=sent, data=data, allow_redirects=False)

    async def fetch(self, path: str) -> bytes:
        """The body of a GET, b"" where that fails."""
        try:
            response = await self.request("GET", path.encode())
            async with response:
                return await response.read() if response.status == 200 else b""
        except (aiohttp.ClientError, OSError):
            return b""


def request_headers(raw: RawHeaders) -> list[tuple[str, str]]:
    """A client's headers for the backend. Its credentials are for the front, and the front knows the body's length."""
    raw = list(raw)
    dropped = _NOT_PASSED | _named_by_connection(raw)
    return [(name.decode("latin-1"), _text(value)) for name, value in raw if name not in dropped]


def response_headers(raw: RawHeaders) -> list[tuple[bytes, bytes]]:
    """The backend's headers for a client. Which pages may read an answer is for the front to say."""
    lowered = [(name.lower(), value) for name, value in raw]
    dropped = HOP_BY_HOP | _named_by_connection(lowered)
    return [
        (name, value)
        for name, value in lowered
        if name not in dropped and not name.startswith(b"access-control-")
    ]


def _named_by_connection(headers: RawHeaders) -> frozenset[bytes]:
    """Headers that a Connection header declares hop-by-hop."""
    return frozenset(
        part.strip().lower() for name, value in headers if name == b"connection" for part in value.split(b",")
    )


def _text(value: bytes) -> str:
    """A header's value, so that aiohttp, which writes UTF-8, writes these bytes where it can."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
