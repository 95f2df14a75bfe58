"""The HTTP application: routes, errors in OpenAI's shape, health."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from flashmoe import __version__
from flashmoe.errors import FlashMoEError, ModelError, ReadError, UsageError
from flashmoe.server import openai
from flashmoe.server.audience import Audience
from flashmoe.server.comparing import Comparing
from flashmoe.server.completions import completions
from flashmoe.server.conversation import Preparer
from flashmoe.server.embeddings import embeddings
from flashmoe.server.live import live_routes
from flashmoe.server.metrics import Metrics
from flashmoe.server.page import page_routes
from flashmoe.server.scheduler import Scheduler, Unavailable
from flashmoe.server.security import Guard

_log = logging.getLogger("flashmoe.server")
LEAST_BODY = 1 << 20
BODY_PER_TOKEN = 64  # bytes of a request's body for each token that the context takes


def make_app(
    scheduler: Scheduler,
    *,
    name: str,
    host: str = "127.0.0.1",
    api_key: str | None = None,
    cors: Sequence[str] = (),
) -> FastAPI:
    """The application over a running scheduler. name: the model's; host: where it listens; cors: allowed origins."""
    max_body = max(LEAST_BODY, BODY_PER_TOKEN * scheduler.model.engine.n_ctx)
    guard = Middleware(Guard, host=host, api_key=api_key, max_body=max_body)
    crossing = Middleware(CORSMiddleware, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"])
    app = FastAPI(
        title="FlashMoE",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        middleware=[crossing, guard] if cors else [guard],
    )
    app.include_router(completions(scheduler, Preparer(scheduler.model.engine), name))
    app.include_router(embeddings(scheduler, name))
    audience = Audience(scheduler.model.engine)
    comparing = Comparing(scheduler.model, audience)
    app.include_router(live_routes(scheduler, audience, comparing))
    app.include_router(page_routes())
    metrics = Metrics(scheduler, comparing)
    card = {"id": name, "object": "model", "created": 0, "owned_by": "flashmoe"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model, as a list of one."""
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """The model."""
        if model != name:
            raise HTTPException(404, f"no model {model!r}: this server has {name!r}")
        return card

    @app.get("/health")
    async def health() -> Response:
        """Whether the process works."""
        fine = scheduler.healthy
        return JSONResponse({"status": "ok" if fine else "the engine has ended"}, 200 if fine else 500)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether new requests are taken."""
        fine = scheduler.accepting
        return JSONResponse({"status": "ready" if fine else "shutting down"}, 200 if fine else 503)

    @app.get("/metrics")
    def scrape() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=metrics.content_type)

    _add_errors(app)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        message = f"{'.'.join(place)}: {first['msg']}" if place else str(first["msg"])
        body = openai.error(message, "invalid_request_error", place[0] if place else None)
        return JSONResponse(body, 400)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return JSONResponse(openai.error(str(error.detail), kind), error.status_code, error.headers)

    @app.exception_handler(FlashMoEError)
    async def failed(_: Request, error: FlashMoEError) -> Response:
        if isinstance(error, Unavailable):
            return JSONResponse(openai.error(str(error), "server_error"), 503, {"Retry-After": "5"})
        if isinstance(error, (UsageError, ModelError)) and not isinstance(error, ReadError):
            code = "context_length_exceeded" if "context" in str(error) else None
            return JSONResponse(openai.error(str(error), "invalid_request_error", code=code), 400)
        return JSONResponse(openai.error(str(error), "server_error"), 500)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        _log.error("a request failed", exc_info=error)
        return JSONResponse(openai.error("internal error", "server_error"), 500)
