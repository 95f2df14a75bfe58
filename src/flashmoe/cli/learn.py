"""`flashmoe learn`: a policy from what is remembered of a model's routing; and forgetting it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import Progress

from flashmoe.cli import options
from flashmoe.cli.progress import stderr_console, stdout_console
from flashmoe.errors import FlashMoEError


def learn(
    model: options.Model,
    forget: Annotated[
        bool,
        typer.Option("--forget", help="Delete all that was learnt and recorded of this model instead."),
    ] = False,
    json_file: options.Json = None,
    quiet: options.Silent = False,
) -> None:
    """Train the eviction policy flashmoe+ from what earlier sessions recorded of a model's routing; no torch needed.

    It is compared on the newest tenth, which it was not trained on, with the policy that the model runs with otherwise;
    if it is better, the next start uses it. Takes some minutes.
    """
    from flashmoe.cache.remembered import Remembered
    from flashmoe.cli.train import held_out_table
    from flashmoe.learn.remembered import learn as train
    from flashmoe.storage.hub import read_catalog

    remembered = Remembered(read_catalog(model).identity)
    console, out = stderr_console(quiet), stdout_console(quiet)
    if forget:
        try:
            there = remembered.forget()
        except OSError as error:
            raise FlashMoEError(f"{remembered.folder}: cannot be deleted ({error.strerror})") from None
        if json_file:
            json_file.write({"forgotten": there})
        out.print(f"forgotten: {remembered.folder}" if there else "nothing was remembered", soft_wrap=True)
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=None)

        def show(done: int, steps: int, loss: float) -> None:
            words = "judging" if done == steps else f"loss {loss:.4f}"
            bar.update(task, description=words, completed=done, total=steps)

        verdict = train(remembered, show)
    if json_file:
        json_file.write(verdict.as_dict())
    if quiet:
        return
    out.print(held_out_table(verdict.held_out, verdict.held_out_tokens))
    out.print(
        "better: the next start uses it (unless --policy or --no-learn say otherwise)"
        if verdict.better
        else "not better: the next start goes on as before. More use of the model means more to learn from",
        soft_wrap=True,
    )
