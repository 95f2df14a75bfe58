"""`flashmoe serve`: an OpenAI-compatible server over one model."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import Annotated

import typer

from flashmoe.cli import options
from flashmoe.cli.groups import with_options
from flashmoe.cli.progress import LoadProgress, stderr_console
from flashmoe.cli.report import show
from flashmoe.cli.sampling import ChatOptions, SamplingOptions
from flashmoe.common.text import argument, printable
from flashmoe.errors import UsageError

KEY_VARIABLE = "FLASHMOE_API_KEY"


@with_options
def serve(
    *,
    model: options.Model,
    loading: options.ModelOptions,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="Port to listen on; 0 for any free port.", min=0, max=65535)
    ] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", help=f"API key required from clients (or set {KEY_VARIABLE})."),
    ] = None,
    parallel: options.Parallel = 0,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            "--cors", help="Allowed CORS origin, e.g. http://localhost:3000; can be given multiple times."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            help="Additional Host header to accept on a loopback address, e.g. the name of a TLS proxy.",
        ),
    ] = None,
    pooling: options.Pooling = "auto",
    cache_ram: Annotated[
        str | None,
        typer.Option("--cache-ram", help="Memory for the prompt cache of idle conversations, e.g. 512MiB."),
    ] = None,
    drain_seconds: Annotated[
        float,
        typer.Option(
            "--drain-seconds",
            help="Seconds for running requests when the server is told to end (SIGTERM, Ctrl-C); new ones get 503.",
            min=0,
        ),
    ] = 30.0,
    learn_when_idle: Annotated[
        float | None,
        typer.Option(
            "--learn-when-idle",
            help="Seconds without a request after which the server trains the eviction policy on its history, as "
            "flashmoe learn does, until the next request (default: never).",
            min=0,
        ),
    ] = None,
    alias: Annotated[
        str | None,
        typer.Option("-a", "--alias", help="Model name to report to clients (default: the file's name)."),
    ] = None,
    sampling: SamplingOptions,
    chat_options: ChatOptions,
    json_file: options.Json = None,
    verbose: options.Verbose = False,
) -> None:
    """Serve a model through an OpenAI-compatible HTTP API."""
    try:
        import aiohttp  # noqa: F401
        import httptools  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"the server needs {error.name}: pip install 'flashmoe-ssd[serve]'") from None
    from flashmoe.runtime.load import load
    from flashmoe.server.app import Front
    from flashmoe.server.loading import refusing
    from flashmoe.server.security import is_loopback
    from flashmoe.server.serve import FrontServer, listen
    from flashmoe.simulate.recent import compile_replays

    if learn_when_idle is not None and (loading.no_learn or loading.approx):
        raise UsageError(
            "--learn-when-idle trains on what --no-learn and --approx leave out: leave them out instead"
        )
    console = stderr_console(False)
    key = argument(api_key or os.environ.get(KEY_VARIABLE) or "", "the key (--api-key)") or None
    alias = argument(alias or "", "--alias")
    sockets = listen(host, port)
    with ExitStack() as opened:
        for sock in sockets:
            opened.enter_context(sock)
        with refusing(sockets), LoadProgress(console) as progress:
            compile_replays()
            asked = loading.load_options(
                parallel=parallel,
                cache_ram=cache_ram,
                server=chat_options.server(alias=alias, sampling=sampling.defaults()),
                pooling=pooling,
            )
            loaded = opened.enter_context(load(model, options=asked, progress=progress.update))
            inner = loaded.server()
        name = alias or printable(loaded.catalog.gguf.files[0].stem)
        address, real_port = sockets[0].getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address

        def started() -> None:
            if not key and not is_loopback(host):
                console.print(
                    f"warning: {host} can be reached from other machines, and no key is set (--api-key)",
                    style="bold yellow",
                )
            url = f"http://{shown}:{real_port}"
            console.print(f"serving {name} on {url}/v1, dashboard at {url}/flashmoe/", highlight=False)

        front = Front(
            loaded, inner, name=name, host=host, api_key=key, cors=cors or [], names=allow_host or []
        )
        front.started = started
        if learn_when_idle is not None:
            from flashmoe.server.idle import IdleLearning

            assert loaded.learning
            learning = IdleLearning(loaded.learning, learn_when_idle, partial(console.print, highlight=False))
            front.traffic.on_requests, front.beside = learning.on_requests, learning.run
        FrontServer(front, drain_seconds).run(sockets=sockets)
        report = loaded.report()
        show(console, report)
        if json_file:
            json_file.write(report.as_dict())
