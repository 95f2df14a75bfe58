"""`flashmoe serve`: an OpenAI-compatible server over one model."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Annotated

import typer

from flashmoe.cli import options
from flashmoe.cli.groups import with_options
from flashmoe.cli.progress import LoadProgress, stderr_console
from flashmoe.cli.report import show
from flashmoe.cli.sampling import ChatOptions, SamplingOptions
from flashmoe.errors import UsageError
from flashmoe.runtime.layout import AUTO

KEY_VARIABLE = "FLASHMOE_API_KEY"
_SAMPLING, _CHAT = SamplingOptions(), ChatOptions()


@with_options(sampling=SamplingOptions, chat_options=ChatOptions)
def serve(
    model: options.Model,
    ram: options.Ram = None,
    cache: options.Cache = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0 takes a free one.", min=0, max=65535)] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", help=f"API key required from clients (better: in {KEY_VARIABLE})."),
    ] = None,
    parallel: Annotated[
        int,
        typer.Option(
            "-np",
            "--parallel",
            help="Conversations evaluated together, each with a context of its own; 0: up to 4.",
            min=0,
            max=64,
        ),
    ] = 0,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", help="Origin whose pages may ask, e.g. http://localhost:3000."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", help="A further name that a loopback server answers to: its TLS proxy's, say."
        ),
    ] = None,
    pooling: Annotated[
        str,
        typer.Option(
            "--pooling", help="Embeddings: last, mean, cls, none, or auto: as the model's file says."
        ),
    ] = "auto",
    policy: options.Policy = None,
    prefetch: options.Prefetch = "auto",
    layout: options.Layout = AUTO,
    ctx_size: options.CtxSize = None,
    ubatch: options.Ubatch = 512,
    threads: options.Threads = None,
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    cache_ram: Annotated[
        str | None,
        typer.Option(
            "--cache-ram", help="Memory for conversations that wait for their next turn, e.g. 512MiB."
        ),
    ] = None,
    alias: Annotated[
        str | None, typer.Option("-a", "--alias", help="The model's name for clients (default: its file's).")
    ] = None,
    sampling: SamplingOptions = _SAMPLING,
    chat_options: ChatOptions = _CHAT,
    save_cache: options.SaveCache = False,
    save_cache_size: options.SaveCacheSize = "4GiB",
    verify: options.Verify = False,
    verbose: options.Verbose = False,
) -> None:
    """Serve a model to OpenAI's clients."""
    try:
        import aiohttp  # noqa: F401
        import httptools  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"the server needs {error.name}: pip install 'flashmoe-ssd[serve]'") from None
    from flashmoe.runtime.load import load
    from flashmoe.server.security import is_loopback
    from flashmoe.server.serve import listen
    from flashmoe.server.serve import serve as run_server
    from flashmoe.simulate.recent import compile_replays

    console = stderr_console(False)
    key = api_key or os.environ.get(KEY_VARIABLE) or None
    sockets = listen(host, port)
    with ExitStack() as listening:
        for sock in sockets:
            listening.enter_context(sock)
        with LoadProgress(console) as progress:
            compile_replays()
            loaded = load(
                model,
                ram=ram,
                cache=cache,
                policy=policy,
                prefetch=prefetch,
                layout=layout,
                n_ctx=ctx_size,
                n_ubatch=ubatch,
                threads=threads,
                parallel=parallel,
                cache_type_k=cache_type_k,
                cache_type_v=cache_type_v,
                cache_ram=cache_ram,
                server=chat_options.server(alias=alias or "", sampling=sampling.defaults()),
                pooling=pooling,
                progress=progress.update,
                save_cache=save_cache,
                save_cache_size=save_cache_size,
                verify=verify,
            )
        with loaded:
            name = alias or loaded.catalog.gguf.files[0].stem
            inner = loaded.server()
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

            run_server(
                loaded,
                inner,
                sockets,
                name=name,
                host=host,
                api_key=key,
                cors=cors or [],
                names=allow_host or [],
                started=started,
            )
            show(console, loaded.report())
