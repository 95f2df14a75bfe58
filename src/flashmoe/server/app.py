"""The front: an ASGI application of what is ours (dashboard, telemetry, metrics), before llama.cpp's server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from flashmoe.runtime.exactness import for_request
from flashmoe.runtime.model import Model
from flashmoe.server.body import Limits
from flashmoe.server.broadcast import Broadcast
from flashmoe.server.comparing import Comparing
from flashmoe.server.errors import Refusal
from flashmoe.server.live import Live, live_routes
from flashmoe.server.metrics import Metrics
from flashmoe.server.page import PAGE, PAGE_PATHS, page_routes
from flashmoe.server.proxy import Proxy
from flashmoe.server.security import Guard
from flashmoe.server.traffic import Traffic
from flashmoe.server.upstream import InnerServer, Upstream

#: Without a key: what supervisors ask, and the page, which asks its reader for one.
PUBLIC = PAGE_PATHS | {"/ready"}


def is_own(path: str) -> bool:
    """Whether a path is the front's; all others are the backend's."""
    return path.startswith(PAGE) or path in ("/flashmoe", "/metrics", "/ready")


class Front:
    """The ASGI application before a running backend."""

    def __init__(
        self,
        model: Model,
        inner: InnerServer,
        *,
        name: str,
        host: str = "127.0.0.1",
        api_key: str | None = None,
        cors: Sequence[str] = (),
        names: Sequence[str] = (),
    ) -> None:
        """name: the model's; host: where it listens; cors: allowed origins; names: see Guard."""
        #: Called when requests are answered.
        self.started: Callable[[], Any] = lambda: None
        #: Runs from then on, and is cancelled at the end.
        self.beside: Callable[[], Coroutine[Any, Any, None]] | None = None
        self.traffic = Traffic(inner.parallel)
        self._upstream = Upstream(inner)
        limits = Limits(inner.n_ctx, inner.longest_text, inner.multimodal)
        self._proxy = Proxy(inner, self._upstream, self.traffic, limits, partial(for_request, model))
        self._own = self._make_own(model, inner, name)
        guard = Guard(
            self._dispatch,
            host=host,
            api_key=api_key,
            cors=cors,
            names=names,
            own=is_own,
            public=PUBLIC.__contains__,
        )
        self._app: ASGIApp = guard
        if cors:
            self._app = CORSMiddleware(
                guard, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"]
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_own(scope["path"]):
            await self._proxy(scope, receive, send)
        else:
            await self._own(scope, receive, send)

    def _make_own(self, model: Model, inner: InnerServer, name: str) -> Starlette:
        broadcast = Broadcast(model.engine)
        comparing = Comparing(model, broadcast)
        live = Live(model, inner, self.traffic, broadcast, comparing, name)
        metrics = Metrics(model, self.traffic, comparing)

        async def ready(_: Request) -> Response:
            """Whether new requests are taken."""
            if self.traffic.accepting:
                return JSONResponse({"status": "ready"})
            return JSONResponse({"status": "shutting down"}, 503)

        async def scrape(_: Request) -> Response:
            """For Prometheus."""
            ours = await run_in_threadpool(metrics.text)
            return Response(ours + await self._upstream.fetch("/metrics"), media_type=metrics.content_type)

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            await self._upstream.open()
            self.started()
            beside = asyncio.create_task(self.beside()) if self.beside else None
            yield
            if beside is not None:
                beside.cancel()
                await asyncio.wait((beside,))
            await self._upstream.close()

        return Starlette(
            routes=[Route("/ready", ready), Route("/metrics", scrape), *live_routes(live), *page_routes()],
            exception_handlers={HTTPException: _refused, Refusal: _refused, Exception: _broken},
            lifespan=lifespan,
        )


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = Refusal(error.status_code, str(error.detail), headers=error.headers)
    assert isinstance(error, Refusal)
    body = error.body(request.url.path)
    return Response(body, error.status, error.headers, "application/json")


async def _broken(request: Request, _: Exception) -> Response:
    """Starlette raises the error again when this is sent, so it is in the log."""
    return await _refused(request, Refusal(500, "internal error"))
