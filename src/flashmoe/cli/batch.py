"""`flashmoe batch`: a file of requests, answered as fast as the machine can."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from flashmoe.cli import options
from flashmoe.cli.groups import with_options
from flashmoe.cli.progress import LoadProgress, stderr_console
from flashmoe.cli.report import show
from flashmoe.cli.sampling import ChatOptions, SamplingOptions
from flashmoe.common.files import expanded
from flashmoe.errors import FlashMoEError


@with_options
def batch(
    *,
    model: options.Model,
    requests: Annotated[
        Path, typer.Argument(metavar="IN.jsonl", help="Requests, one a line, in OpenAI's batch format.")
    ],
    answers: Annotated[
        Path,
        typer.Argument(
            metavar="OUT.jsonl", help="Where the answers go, in the same order, when all are there."
        ),
    ],
    loading: options.ModelOptions,
    parallel: options.Parallel = 8,
    pooling: options.Pooling = "auto",
    sampling: SamplingOptions,
    chat_options: ChatOptions,
    json_file: options.Json = None,
    quiet: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> None:
    """Answer a file of requests (OpenAI's batch format), several at once; started again, it goes on where it was.

    A line that is no request, or that the model cannot answer, gets an error as its answer.
    """
    from flashmoe.runtime.batch import BatchFigures, run_batch
    from flashmoe.runtime.batch_file import Journal, Requests, failed_in
    from flashmoe.runtime.exactness import for_request
    from flashmoe.runtime.load import load

    console = stderr_console(quiet)
    asked, out = Requests(expanded(requests)), expanded(answers)
    if (failed := failed_in(out, asked)) is not None:
        lines = len(asked.ids)
        console.print(f"{answers} has all {lines} answers already")
        if json_file:
            json_file.write({"batch": BatchFigures(lines, lines, failed, 0, 0.0).as_dict()})
        return
    with LoadProgress(console) as progress:
        given = loading.load_options(
            parallel=parallel,
            cache_ram=0,
            server=chat_options.server(sampling=sampling.defaults()),
            pooling=pooling,
        )
        with load(model, options=given, progress=progress.update) as loaded:
            server = loaded.server()
            identity = {"input": asked.digest, "model": loaded.catalog.identity}
            try:
                journal = Journal(out, identity)
            except OSError as error:
                raise FlashMoEError(f"{answers}: the answers cannot be written ({error.strerror})") from None
            with journal:
                try:
                    figures = run_batch(
                        server,
                        asked,
                        journal,
                        partial(progress.update, "batch"),
                        partial(for_request, loaded),
                    )
                except BaseException:
                    progress.stop()
                    console.print(
                        f"{len(journal)} of {len(asked.ids)} lines are answered: the same command goes on there"
                    )
                    raise
            progress.stop()
            report = loaded.report()
    console.print(figures.line())
    show(console, report)
    if json_file:
        json_file.write({**report.as_dict(), "batch": figures.as_dict()})
