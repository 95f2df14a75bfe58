"""`flashmoe simulate`: hit rates of policies on a recorded trace, and what they would mean for speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from flashmoe.cli import options
from flashmoe.cli.progress import stderr_console, stdout_console
from flashmoe.common.text import split_list
from flashmoe.common.units import parse_bytes
from flashmoe.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.status import Status

    from flashmoe.cache.maps import Embed
    from flashmoe.routing.trace import RoutingTrace
    from flashmoe.simulate.prefetch import PrefetchRow
    from flashmoe.simulate.report import Machine, Simulation
    from flashmoe.storage.catalog import ExpertCatalog


def simulate(
    trace: Annotated[Path, typer.Argument(help="Routing trace: .safetensors, .npz or .jsonl.")],
    policy: Annotated[
        str,
        typer.Option(
            "--policy",
            help="Eviction policies, comma-separated: all, default, NAME or NAME:FILE of a trained policy.",
        ),
    ] = "all",
    prefetch: Annotated[
        str | None,
        typer.Option(
            "--prefetch",
            help="Evaluate predictors instead: all, NAME or NAME:FILE, with one policy (default: lfu-aged).",
        ),
    ] = None,
    approx: Annotated[
        str | None,
        typer.Option(
            "--approx",
            help="Simulate approximations of the routing, comma-separated: cache:0.2,drop:0.5; needs a trace of "
            "flashmoe trace record --ranked.",
        ),
    ] = None,
    first: Annotated[
        int | None, typer.Option("--first", min=1, help="Maximum tokens of the trace to replay.")
    ] = None,
    capacity: Annotated[
        str,
        typer.Option(
            "--capacity",
            help="Cache capacities, comma-separated: 25%, a share such as 0.25, or a number of slots.",
        ),
    ] = "12.5%,25%,50%",
    partition: Annotated[
        str,
        typer.Option(
            "--partition", help="Partition of the slots among layers: per-layer, global or weighted."
        ),
    ] = "per-layer",
    guide: Annotated[
        Path | None,
        typer.Option(
            "--weights-from", help="Trace that determines weighted partitions (default: the same trace)."
        ),
    ] = None,
    per_sequence: Annotated[
        bool,
        typer.Option("--per-sequence", help="Start each sequence with an empty cache (default: keep it)."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="GGUF model to take expert sizes from, for bytes read per token, and the embeddings that finemoe "
            "compares.",
        ),
    ] = None,
    expert_bytes: Annotated[
        str | None,
        typer.Option("--expert-bytes", help="Size of one expert, instead of --model, e.g. 3.2MiB."),
    ] = None,
    disk: Annotated[
        str | None,
        typer.Option(
            "--disk", help="Read bandwidth of the drive per second, e.g. 3GB, for tokens per second."
        ),
    ] = None,
    compute_ms: Annotated[
        float,
        typer.Option(
            "--compute", help="Compute time per token in milliseconds, with all experts in RAM.", min=0
        ),
    ] = 0.0,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Plot hit rates to a .png, .svg or .pdf file.")
    ] = None,
    json_file: options.Json = None,
    quiet: options.Silent = False,
) -> None:
    """Simulate eviction policies on a routing trace: hit rates, gap to the oracle, bytes and tokens per second."""
    import numpy as np

    from flashmoe.cli import tables
    from flashmoe.routing.files import read
    from flashmoe.simulate import prefetch as prefetching
    from flashmoe.simulate import report
    from flashmoe.simulate.approximate import simulate_approximately
    from flashmoe.simulate.replay import parse_capacities, parse_policies, simulate

    recorded = read(trace)
    catalog = _catalog(model, recorded) if model else None
    if catalog:
        recorded = replace(recorded, model={**recorded.model, "groups": catalog.identity["groups"]})
    if first is not None:
        recorded = recorded.rows(np.arange(min(first, recorded.n_tokens)))
    slots = parse_capacities(capacity, recorded.n_layers * recorded.num_experts)
    machine = _machine(catalog, expert_bytes, disk, compute_ms)
    embed = _embeddings(catalog) if catalog else None
    found: report.Simulation[Any]
    table: Callable[[Any], RenderableType] = tables.of_policies
    draw: Callable[..., None] = report.plot
    with stderr_console(quiet).status("compiling") as status:
        if prefetch is not None:
            found = _predictions(recorded, prefetch, policy, slots, partition, embed, status)
            table, draw = tables.of_predictors, prefetching.plot
        elif approx is not None:
            status.update("simulating")
            specs = parse_policies("lfu-aged" if policy == "all" else policy)
            rows = simulate_approximately(recorded, specs, split_list(approx), slots, partition)
            found = report.Simulation.of(recorded, rows, machine)
        else:
            rows = simulate(
                recorded,
                parse_policies(policy),
                slots,
                partition,
                per_sequence,
                read(guide) if guide else None,
                lambda name, size: status.update(Text(f"{name}, {size} slots")),
                embed,
            )
            found = report.Simulation.of(recorded, rows, machine)
    if not quiet:
        stdout_console().print(table(found))
    if json_file:
        json_file.write(found.as_dict())
    if plot:
        draw(found.rows, plot, found.model)


def _predictions(
    trace: RoutingTrace,
    predictors: str,
    policy: str,
    slots: list[int],
    partition: str,
    embed: Embed | None,
    status: Status,
) -> Simulation[PrefetchRow]:
    """Predictors, judged against one policy."""
    from flashmoe.simulate.prefetch import parse_predictors, simulate_prefetch
    from flashmoe.simulate.report import Simulation

    specs = parse_predictors(predictors)
    policy = "lfu-aged" if policy == "all" else policy
    if "," in policy:
        raise UsageError(f"--prefetch judges against one policy, got {policy}: name one")
    rows = simulate_prefetch(
        trace,
        specs,
        slots,
        policy,
        partition,
        lambda name, done: status.update(Text(f"{name}, {done} of {trace.n_tokens} tokens")),
        embed,
    )
    return Simulation.of(trace, rows)


def _machine(
    catalog: ExpertCatalog | None, expert: str | None, disk: str | None, compute_ms: float
) -> Machine | None:
    """The report's Machine, or None where no size of an expert is given."""
    from flashmoe.simulate.report import Machine

    if expert is not None:
        size = float(parse_bytes(expert))
    elif catalog is not None:
        size = catalog.expert_bytes / catalog.total_experts
    elif disk is not None:
        raise UsageError("--disk needs the size of an expert: give --model FILE.gguf or --expert-bytes")
    else:
        return None
    return Machine(size, float(parse_bytes(disk.removesuffix("/s"))) if disk else None, compute_ms / 1000)


def _embeddings(catalog: ExpertCatalog) -> Embed | None:
    """Those of a GGUF model; the library that converts them is opened when the first policy asks."""
    from flashmoe.engines.llamacpp.embeddings import TokenEmbeddings, table_of

    table = table_of(catalog.gguf)
    if table is None:
        return None

    @cache
    def opened() -> TokenEmbeddings:
        from flashmoe.engines.llamacpp.library import find_library, open_library

        return TokenEmbeddings(open_library(find_library()), table)

    return lambda tokens: opened()(tokens)


def _catalog(model: str, trace: RoutingTrace) -> ExpertCatalog:
    """The experts of a GGUF model. Raises UsageError where the trace is of a model of other shape."""
    from flashmoe.storage.hub import read_catalog

    catalog = read_catalog(model)
    mine = len(catalog.layers), catalog.n_experts
    if mine != (trace.n_layers, trace.num_experts):
        raise UsageError(
            f"the trace is of {trace.n_layers} layers of {trace.num_experts} experts, {model} has {mine[0]} of "
            f"{mine[1]}: give its own model"
        )
    return catalog
