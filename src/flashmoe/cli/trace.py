"""`flashmoe trace`: record, inspect, import, merge and split routing traces."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from flashmoe.cli import options
from flashmoe.cli.groups import with_options
from flashmoe.cli.progress import stderr_console, stdout_console
from flashmoe.cli.sampling import SamplingOptions
from flashmoe.common.text import printable, read_text_file
from flashmoe.errors import TraceError, UsageError

if TYPE_CHECKING:
    from flashmoe.routing.trace import RoutingTrace

SAVE_EVERY = 30.0  # seconds

app = typer.Typer(help="Record, inspect, import, merge and split routing traces.", no_args_is_help=True)


@app.command()
@with_options
def record(
    *,
    model: options.Model,
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            help='Prompts: a .jsonl file of {"prompt": ...} or {"messages": [...]}, or a text file, one per line.',
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Trace to write, or to continue.")],
    n_predict: Annotated[
        int,
        typer.Option(
            "-n",
            "--n-predict",
            help="Maximum tokens to generate per prompt.",
            min=-1,
            max=options.MOST_TOKENS,
        ),
    ] = 128,
    ram: options.Ram = None,
    cache: options.Cache = None,
    ctx_size: options.CtxSize = None,
    threads: options.Threads = None,
    sampling: SamplingOptions,
    restart: Annotated[
        bool, typer.Option("--restart", help="Overwrite an existing trace instead of continuing it.")
    ] = False,
    ranked: Annotated[
        bool,
        typer.Option(
            "--ranked",
            help="Also record what the router ranked next, for flashmoe simulate --approx; slower.",
        ),
    ] = False,
    quiet: options.Silent = False,
) -> None:
    """Run a model over many prompts and record its routing. Run it again to continue where it stopped."""
    import numpy as np

    from flashmoe.routing.files import merge
    from flashmoe.routing.trace import RoutingTrace

    todo = list(read_prompts(prompts))
    before = RoutingTrace.load(output) if output.exists() and not restart else None
    done = before.n_sequences if before else 0
    if done > len(todo):
        raise UsageError(
            f"{output} has {done} prompts, {prompts} only {len(todo)}: add --restart, or change -o"
        )
    console = stderr_console(quiet)
    if before:
        console.print(f"{output} has {done} of {len(todo)} prompts: going on", highlight=False)
    if done == len(todo):
        return

    from flashmoe.runtime.load import load

    chosen = sampling.sampling()
    with load(model, ram=ram, cache=cache, n_ctx=ctx_size, threads=threads) as loaded:
        recorder = loaded.record(ranked=ranked)
        if before and dict(before.model) != loaded.catalog.identity:
            raise UsageError(f"{output} is a trace of another model: add --restart, or choose another -o")

        complete = 0  # tokens of finished prompts: one that is interrupted is recorded again

        def save() -> None:
            if complete:
                rows = recorder.trace().rows(np.arange(complete))
                merge([*([before] if before else []), rows]).save(output)

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        saved = time.monotonic()
        try:
            with Progress(*columns, console=console, transient=True) as bar:
                task = bar.add_task("prompts", total=len(todo), completed=done)
                for prompt in todo[done:]:
                    stream = (
                        loaded.generate(prompt, max_tokens=n_predict, sampling=chosen)
                        if isinstance(prompt, str)
                        else loaded.chat(prompt, max_tokens=n_predict, sampling=chosen)
                    )
                    for _ in stream:
                        pass
                    complete = len(recorder)
                    bar.update(task, advance=1, description=f"{len(recorder)} tokens")
                    if time.monotonic() - saved > SAVE_EVERY:
                        save()
                        saved = time.monotonic()
        finally:
            save()
    console.print(f"wrote {output}: {complete} new tokens", highlight=False)


def read_prompts(path: Path) -> Iterator[str | list[dict[str, str]]]:
    """Prompts of a file: per line a JSON object (.jsonl) or a text. Raises UsageError with the line that is
    wrong."""
    try:
        text = read_text_file(path, str(path))
    except OSError as error:
        raise UsageError(f"cannot read the prompts {path}: {error}") from None
    lines = text.replace("\r\n", "\n").split("\n")  # a text may hold what else Python ends lines at
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UsageError(f"{path} has no prompts: give one per line")
    for number, line in enumerate(lines, 1):
        if path.suffix != ".jsonl":
            yield line
            continue
        try:
            row = json.loads(line)
            if isinstance(row, str):
                yield row
            elif "messages" in row:
                yield [{"role": str(m["role"]), "content": str(m["content"])} for m in row["messages"]]
            else:
                yield str(row["prompt"] if "prompt" in row else row["text"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(
                f'{path}, line {number}: give {{"prompt": "..."}} or {{"messages": [...]}}'
            ) from None


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="Routing trace: .safetensors, .npz or .jsonl.")],
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Plot the statistics to a .png, .svg or .pdf file.")
    ] = None,
    json_file: options.Json = None,
    quiet: options.Silent = False,
) -> None:
    """Show a trace: its shape, how alike neighbouring tokens are routed, hit rates to expect, and each layer."""
    from flashmoe.routing import consistency, statistics
    from flashmoe.routing.files import read
    from flashmoe.simulate.expected import expected_hit_rates

    trace = read(file)
    facts, rows = statistics.summary(trace), statistics.layer_statistics(trace)
    whole, per_layer = consistency.routing_consistency(trace)
    by_chance = consistency.by_chance(trace.top_k, trace.num_experts)
    with stderr_console(quiet).status("replaying"):
        expected = expected_hit_rates(trace)
    if plot:
        statistics.plot(trace, plot)
    if json_file:
        layers = [{**row.__dict__, "consistency": own} for row, own in zip(rows, per_layer, strict=True)]
        json_file.write(
            {
                **facts,
                "consistency": {
                    "segment_tokens": consistency.SEGMENT,
                    "model": whole,
                    "by_chance": by_chance,
                },
                "expected_hit_rates": expected,
                "per_layer": layers,
            }
        )
    console = stdout_console(quiet)
    model: Any = facts.pop("model")
    console.print(f"{model.get('name', file.stem)}", style="bold")
    console.print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
    if whole == whole:  # else no sequence is long enough
        console.print(
            f"local routing consistency (SRP) {whole:.3f} over {consistency.SEGMENT} tokens, {by_chance:.3f} by chance",
            highlight=False,
        )
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("hit rates to expect")
    for name in next(iter(expected.values()), {}):
        table.add_column(name, justify="right")
    for capacity, rates in expected.items():
        table.add_row(capacity, *(f"{rate:.1%}" for rate in rates.values()))
    if expected:
        console.print(table)
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for name in ("layer", "requests", "used", "top tenth", "entropy", "overlap", "SRP"):
        table.add_column(name, justify="right")
    for q in statistics.QUANTILES:
        table.add_column(f"reuse p{100 * q:.0f}", justify="right")
    for row, own in zip(rows, per_layer, strict=True):
        table.add_row(
            str(row.layer), str(row.requests), str(row.experts_used), f"{row.top_tenth:.3f}",
            f"{row.entropy:.3f}", f"{row.overlap:.3f}", f"{own:.3f}" if own == own else "",
            *(f"{value:.0f}" for value in row.reuse),
        )  # fmt: skip
    console.print(table)
    console.print(
        "top tenth: share of requests to the most popular tenth of the experts; SRP: how far a segment's tokens ask "
        "for the same experts, 1 if for no others (arXiv 2505.16056); reuse: other experts asked for between two "
        "uses of one (LRU with as many slots has it still); belady: the best that any policy can do",
        style="dim",
    )


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="File to convert: .npz or .jsonl.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Output file (default: the source's name with .safetensors)."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Model name to store in the trace.")] = None,
) -> None:
    """Convert a trace from .npz (expert_ids [tokens, layers, k]) or .jsonl (one token per line)."""
    from dataclasses import replace

    from flashmoe.routing.files import read

    if source.suffix.lower() not in (".npz", ".jsonl"):
        raise UsageError(f"cannot import {source}: give a .npz or .jsonl file")
    trace = read(source)
    if name:
        trace = replace(trace, model={**trace.model, "name": name})
    _write(trace, output or source.with_suffix(".safetensors"))


@app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="Routing traces of one model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Output file.")],
) -> None:
    """Concatenate traces of one model."""
    from flashmoe.routing import files as traces

    _write(traces.merge([traces.read(file) for file in files]), output)


@app.command()
def split(
    file: Annotated[Path, typer.Argument(help="Routing trace.")],
    outputs: Annotated[tuple[Path, Path], typer.Option("-o", "--output", help="The two output files.")],
    share: Annotated[
        float, typer.Option("--share", help="Share of the tokens in the first output, 0 to 1.")
    ] = 0.9,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            help="Random seed for choosing sequences (default: the last sequences go to the second output).",
        ),
    ] = None,
) -> None:
    """Split a trace in two; sequences stay whole."""
    from flashmoe.routing import files as traces

    if outputs[0] == outputs[1] or file in outputs:
        raise TraceError("the two outputs must be two other files than the trace")
    for part, output in zip(traces.split(traces.read(file), share, seed), outputs, strict=True):
        _write(part, output)


def _write(trace: RoutingTrace, output: Path) -> None:
    trace.save(output)
    print(f"{printable(str(output))}: {trace.n_tokens} tokens, {trace.n_sequences} sequences")
