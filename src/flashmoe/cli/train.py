"""`flashmoe train`: an eviction policy or a predictor of routing, learned from routing traces."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress
from rich.table import Table

from flashmoe.cli import options
from flashmoe.cli.progress import stderr_console, stdout_console

Traces = Annotated[list[Path], typer.Argument(help="Routing traces of one model.")]
HeldOut = Annotated[
    float, typer.Option("--held-out", help="Share of sequences held out for evaluation, 0 to 1.")
]
Threads = Annotated[
    int | None, typer.Option("-t", "--threads", help="Number of training threads.", min=1, max=512)
]
_MOST = (1 << 63) - 1  # torch's
Seed = Annotated[
    int, typer.Option("--seed", help="Random seed of weights and order of samples.", min=0, max=_MOST)
]
app = typer.Typer(help="Learn from routing traces (needs torch).", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Learn from routing traces (needs torch: pip install 'flashmoe-ssd[train]')."""


@app.command("policy")
def policy(
    traces: Traces,
    output: Annotated[Path, typer.Option("-o", "--output", help="Policy file to write (.safetensors).")],
    kind: Annotated[
        str, typer.Option("--kind", help="Policy to train: flashmoe (the paper's network) or flashmoe+.")
    ] = "flashmoe+",
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Maximum epochs (default: 200, flashmoe+: 5).", min=1)
    ] = None,
    minutes: Annotated[
        float, typer.Option("--minutes", help="Maximum training time in minutes.", min=0)
    ] = 10.0,
    held_out: HeldOut = 0.05,
    threads: Threads = None,
    seed: Seed = 0,
    json_file: options.Json = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Plot losses and hit rates to a .png, .svg or .pdf file.")
    ] = None,
    quiet: options.Silent = False,
) -> None:
    """Train an eviction policy, to be used with --policy KIND:FILE."""
    from flashmoe.learn.train import Plan, train
    from flashmoe.learn.train import plot as draw
    from flashmoe.routing.files import merge, read

    trace = merge([read(path) for path in traces])
    plan = Plan(epochs=epochs, minutes=minutes, held_out=held_out, threads=threads, seed=seed)
    console = stderr_console(quiet)
    started = time.monotonic()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=None)

        def show(epoch: int, most: int, step: int, steps: int, loss: float, held: float | None) -> None:
            bar.update(
                task, description=f"epoch {epoch}/{most}, loss {loss:.4f}", completed=step, total=steps
            )
            if held is not None:
                seconds = time.monotonic() - started
                console.print(
                    f"epoch {epoch:3d}  loss {loss:.5f}  held out {held:.5f}  {seconds:.0f} s",
                    highlight=False,
                )

        trained = train(trace, kind, plan, show)
    trained.save(output)
    if json_file:
        json_file.write({"trained_on": trained.trained_on, **trained.report})
    if plot:
        draw(trained, plot)
    if not quiet:
        stdout_console().print(
            held_out_table(trained.report["held_out"], trained.trained_on["held_out_tokens"])
        )
        stdout_console().print(f"wrote {output}: use it with --policy {kind}:{output}", soft_wrap=True)


@app.command("prefetch")
def prefetch(
    traces: Traces,
    output: Annotated[Path, typer.Option("-o", "--output", help="Predictor file to write (.safetensors).")],
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            help="Predictor to train: table (initial state of the online predictor) or promoe (a network).",
        ),
    ] = "table",
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Epochs (default: 1, promoe: 3).", min=1)
    ] = None,
    minutes: Annotated[
        float, typer.Option("--minutes", help="Maximum training time in minutes (promoe).", min=0)
    ] = 5.0,
    held_out: HeldOut = 0.05,
    threads: Threads = None,
    seed: Seed = 0,
    json_file: options.Json = None,
    quiet: options.Silent = False,
) -> None:
    """Train a predictor for prefetching, to be used with --prefetch KIND:FILE."""
    from flashmoe.learn.prefetch import train
    from flashmoe.learn.train import Plan
    from flashmoe.routing.files import merge, read

    trace = merge([read(path) for path in traces])
    plan = Plan(epochs=epochs, minutes=minutes, held_out=held_out, threads=threads, seed=seed)
    with Progress(console=stderr_console(quiet), transient=True) as bar:
        task = bar.add_task("preparing", total=None)

        def show(what: str, done: int, total: int, loss: float | None) -> None:
            text = what if loss is None else f"{what}, loss {loss:.4f}"
            bar.update(task, description=text, completed=done, total=total)

        trained = train(trace, kind, plan, show)
    trained.save(output)
    if json_file:
        json_file.write({"trained_on": trained.trained_on, **trained.report})
    if not quiet:
        if "held_out" in trained.report:
            k = trained.top_k
            table = Table(
                title=f"share of the experts found on {trained.trained_on['held_out_tokens']} held-out tokens"
            )
            for column in ("known", f"with {k} guesses", f"with {2 * k}"):
                table.add_column(column)
            for known, row in trained.report["held_out"].items():
                name = "token alone" if known == "token" else f"layers up to {known} behind"
                table.add_row(name, *(f"{100 * value:.1f} %" for value in row.values()))
            stdout_console().print(table)
        stdout_console().print(f"wrote {output}: use it with --prefetch {kind}:{output}", soft_wrap=True)


def held_out_table(rates: dict[str, dict[str, float]], tokens: int) -> Table:
    table = Table(title=f"hit rates on {tokens} held-out tokens, per-layer")
    table.add_column("policy")
    for capacity in rates:
        table.add_column(capacity, justify="right")
        table.add_column("gap", justify="right", style="dim")
    for name in next(iter(rates.values()), {}):
        cells = [name]
        for row in rates.values():
            room = row["belady"] - row["lru"]
            cells += [f"{row[name]:.4f}", f"{100 * (row[name] - row['lru']) / room:+.0f} %" if room else ""]
        table.add_row(*cells)
    return table
