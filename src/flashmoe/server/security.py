"""Who may ask: an API key, the names under which a loopback server is called, and pages of other origins."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from flashmoe.server.errors import Refusal

#: In the scope of a request that the guard has let through: whether it came with the key, or none is needed.
TRUSTED = "flashmoe.trusted"
_SAFE = ("GET", "HEAD", "OPTIONS")
# what a page may send elsewhere without asking first
_UNASKED = ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware. Without a key everybody may ask, but for pages of other origins than `cors`.

    A server that listens on loopback answers only to loopback's names: a page in a browser, whose own name has been
    pointed at 127.0.0.1, gets nothing. A request without the key is refused, but one that only reads what the backend
    answers is passed on without the backend's key: it knows what is public, such as the files of its page.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        api_key: str | None,
        cors: Collection[str] = (),
        names: Collection[str] = (),
        own: Callable[[str], bool] = lambda _: False,
        public: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """names: further host names that a loopback server answers to, a proxy's before it.

        own: paths that the front answers itself; public: those of them that need no key.
        """
        self._app, self._key, self._cors = app, api_key.encode() if api_key else None, frozenset(cors)
        self._own, self._public = own, public
        known = {"localhost", host.lower(), *(name.lower() for name in names)}
        self._names = known if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope[TRUSTED] = self._check(scope["method"], scope["path"], Headers(scope=scope))
            except Refusal as refusal:
                await refusal.answer(scope, send)
                return
        await self._app(scope, receive, send)

    def _check(self, method: str, path: str, headers: Headers) -> bool:
        """Whether the request has the key. Raises Refusal."""
        host = headers.get("host")
        if self._names is not None and host is not None:
            self._check_name(host.lower())
        if self._key is None:
            self._check_origin(method, host, headers)
            return True
        if self._has_key(headers):
            return True
        if self._public(path) or (method in _SAFE and not self._own(path)):
            return False
        raise Refusal(
            401, "a valid API key is needed", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
        )

    def _check_name(self, host: str) -> None:
        """Names can be pointed here; addresses, and requests without a name, which no browser sends, cannot."""
        name = host if host.endswith("]") else host.rpartition(":")[0] if ":" in host else host
        assert self._names is not None
        if name not in self._names and not is_loopback(name.strip("[]")):
            raise Refusal(
                421,
                f"this server listens on this machine only and does not answer to the name {name!r}: allow it "
                "(--allow-host NAME), or listen elsewhere (--host) with a key (--api-key)",
            )

    def _check_origin(self, method: str, host: str | None, headers: Headers) -> None:
        """A browser asks before it sends JSON or a key to another origin, and is told no; other requests it sends."""
        origin = headers.get("origin")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method in _SAFE or kind not in _UNASKED or origin in self._cors:
            return
        site = headers.get("sec-fetch-site")
        foreign = (
            site not in ("same-origin", "none")
            if site
            else origin is not None and urlsplit(origin).netloc != host
        )
        if foreign:
            raise Refusal(403, "pages of other origins may not ask (--cors ORIGIN allows it)")

    def _has_key(self, headers: Headers) -> bool:
        assert self._key is not None
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = [bearer.strip()] if kind.lower() == "bearer" else []
        given.append(headers.get("x-api-key", "").strip())  # what Anthropic's clients send
        return any(hmac.compare_digest(one.encode("latin-1"), self._key) for one in given)
