"""The front in a thread, before llama.cpp's own server from the wheel or before one that is made up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from flashmoe.runtime.model import Model
from flashmoe.server.app import Front
from flashmoe.server.serve import FrontServer, listen

KEY = "the backend's key"


@dataclass
class Backend:
    """See flashmoe.server.upstream.InnerServer."""

    socket: str
    key: str = KEY
    n_ctx: int = 512
    parallel: int = 2
    longest_text: int = 512 * 16
    multimodal: bool = False
    last_error: str = ""


@contextmanager
def stock_server(model: Path, folder: Path) -> Iterator[Backend]:
    """The library's server as it is, in this process."""
    import xllamacpp

    backend = Backend(str(folder / "stock.sock"))
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel = backend.n_ctx * backend.parallel, backend.parallel
    params.cpuparams.n_threads = 1
    params.warmup = params.fit_params = False
    params.ctx_shift = True  # so that there are answers that take long
    params.use_jinja = params.endpoint_metrics = params.endpoint_slots = True
    params.hostnames, params.api_keys = [backend.socket], [backend.key]
    server = xllamacpp.Server(params)
    yield backend
    del server


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextmanager
def made_up_server(handler: Handler, folder: Path) -> Iterator[Backend]:
    """A backend that answers all requests with `handler`."""
    backend = Backend(str(folder / "made-up.sock"))
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        await web.UnixSite(runner, backend.socket).start()
        return runner

    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield backend
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@dataclass
class Running:
    url: str
    front: Front
    server: FrontServer


@contextmanager
def fronted(
    model: Model, backend: Backend, *, drain_seconds: float = 5.0, **options: Any
) -> Iterator[Running]:
    """The front as long as the block lasts."""
    front = Front(model, backend, name="a model", **options)
    started = threading.Event()
    front.started = started.set
    server = FrontServer(front, drain_seconds)
    (sock,) = listen("127.0.0.1", 0)
    with sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        assert started.wait(30)
        try:
            yield Running(url, front, server)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait: a request is counted, and logged, after its client has the answer."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
