"""`flashmoe plan`: what a model will do here, before it is downloaded."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flashmoe.cli import options
from flashmoe.cli.progress import stdout_console
from flashmoe.common.machine import cores
from flashmoe.common.units import format_bytes, parse_bytes
from flashmoe.errors import UsageError


def plan(
    model: options.Model,
    ram: Annotated[
        str | None,
        typer.Option(
            "--ram", help="Memory budgets to evaluate, comma-separated, e.g. 4GiB,8GiB (default: several)."
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Routing trace of the model to take hit rates from.")
    ] = None,
    place: Annotated[
        Path | None,
        typer.Option("--drive", help="Folder on the drive where a model on the hub would be stored."),
    ] = None,
    ctx_size: options.CtxSize = None,
    threads: options.Threads = None,
    json_file: options.Json = None,
    quiet: options.Silent = False,
) -> None:
    """Predict a model's tokens/s at several memory budgets. Of a model on the hub, only the header is downloaded."""
    from flashmoe.engines.llamacpp.sizes import ContextSizes
    from flashmoe.engines.llamacpp.tested import tested_library
    from flashmoe.routing.files import read
    from flashmoe.runtime.options import LoadOptions
    from flashmoe.simulate.curve import hit_curve, nearest, shipped
    from flashmoe.storage.catalog import ExpertCatalog
    from flashmoe.storage.hub import default_policy, header
    from flashmoe.tools.plan import make_plan, measure

    if place is not None and not os.path.isdir(place):
        raise UsageError(f"{place}: no such folder (--drive)")
    LoadOptions(n_ctx=ctx_size, threads=threads)  # refuses what `run` refuses
    budgets = [parse_bytes(size) for size in ram.split(",")] if ram else []
    gguf, there = header(model)
    catalog = ExpertCatalog.from_gguf(gguf)
    if trace:
        recorded = read(trace)
        recorded.check_model(len(catalog.layers), catalog.n_experts)
        recorded = replace(recorded, model={**recorded.model, "groups": catalog.identity["groups"]})
        curve = hit_curve(recorded, trace.stem, default_policy(""))
    else:
        curve = nearest(shipped(), catalog.gguf.name, catalog.n_experts, catalog.top_k)
    n_threads = threads or cores()
    drive = place or (catalog.gguf.files[0] if there else Path())
    library = tested_library()
    machine = measure(catalog, library, n_threads, drive)
    with ContextSizes(library, gguf) as sizes:
        made = make_plan(catalog, machine, curve, sizes.nbytes, budgets, ctx_size)
    if json_file:
        json_file.write(asdict(made))
    console = stdout_console(quiet)
    console.print(
        f"{made.model}: {made.architecture}, {format_bytes(made.file_bytes)}, {made.quantisation}; "
        f"{made.layers} layers of {made.experts} experts, {made.top_k} per token; "
        f"{format_bytes(made.dense_bytes)} dense, {format_bytes(made.total_expert_bytes)} of experts",
        soft_wrap=True,
    )
    least = format_bytes(made.least_budget_bytes)
    console.print(f"hit rates of {made.statistics}; smallest --ram {least}", soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in (
        "--ram",
        "-c",
        "-ub",
        "slots",
        "hits",
        "read/token",
        "compute",
        "reads",
        "tokens/s",
        "bound",
    ):
        table.add_column(title, justify="left" if title == "bound" else "right")
    for row in made.rows:
        table.add_row(
            format_bytes(row.budget_bytes), str(row.context), str(row.ubatch), f"{row.slots} ({row.capacity:.0%})",
            f"{row.hit_rate:.1%}", format_bytes(row.read_bytes_per_token),
            _format_time(row.compute_seconds_per_token), _format_time(row.read_seconds_per_token),
            f"{row.tokens_per_second:.1f}", row.bound,
        )  # fmt: skip
    console.print(table, soft_wrap=True)
    console.print(f"recommended: {made.recommendation}", soft_wrap=True)
    console.print(made.ubatch_reason, soft_wrap=True)


def _format_time(seconds: float) -> str:
    return f"{1e3 * seconds:.{1 if seconds < 0.1 else 0}f} ms"
