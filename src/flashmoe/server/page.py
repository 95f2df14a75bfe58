"""The dashboard at `/flashmoe/`: files of the package, read once; nothing in a request names a file."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

PAGE = "/flashmoe/"
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def _read() -> dict[str, Response]:
    pages = {}
    for file in files("flashmoe.server").joinpath("static").iterdir():
        kind = _TYPES[file.name.rpartition(".")[2]]
        path = PAGE if file.name == "index.html" else f"{PAGE}static/{file.name}"
        pages[path] = Response(file.read_bytes(), media_type=kind, headers=_HEADERS)
    return pages


_PAGES = _read()

#: The page's paths. They hold no figures and need no key: the page asks for it.
PAGE_PATHS = frozenset(_PAGES) | {PAGE.rstrip("/")}


def page_routes() -> list[Route]:
    """A route for each file."""

    def answer(page: Response) -> Callable[[Request], Awaitable[Response]]:
        async def get(_: Request) -> Response:
            return page

        return get

    async def slash(_: Request) -> Response:
        """The page's own paths are relative."""
        return RedirectResponse("flashmoe/")

    return [Route(path, answer(page)) for path, page in _PAGES.items()] + [Route(PAGE.rstrip("/"), slash)]
