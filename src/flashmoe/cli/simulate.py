"""`flashmoe simulate`: hit rates of policies on a recorded trace, and what they would mean for speed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flashmoe.cli.progress import stderr_console
from flashmoe.cli.report import write_json
from flashmoe.common.units import parse_bytes
from flashmoe.errors import UsageError

if TYPE_CHECKING:
    from flashmoe.routing.trace import RoutingTrace


def simulate(
    trace: Annotated[Path, typer.Argument(help="A routing trace: .safetensors, .npz or .jsonl.")],
    policy: Annotated[
        str, typer.Option("--policy", help="Comma-separated: all, NAME or NAME:FILE of a trained policy.")
    ] = "all",
    prefetch: Annotated[
        str | None,
        typer.Option(
            "--prefetch",
            help="Judge predictors of routing instead: all, NAME or NAME:FILE; --policy names one (lfu-aged).",
        ),
    ] = None,
    first: Annotated[
        int | None, typer.Option("--first", min=1, help="Only that many tokens of the trace.")
    ] = None,
    capacity: Annotated[
        str, typer.Option("--capacity", help="Comma-separated: 25%, a share such as 0.25, or slots.")
    ] = "12.5%,25%,50%",
    partition: Annotated[
        str, typer.Option("--partition", help="Shares of the layers: per-layer, global or weighted.")
    ] = "per-layer",
    guide: Annotated[
        Path | None,
        typer.Option("--weights-from", help="Trace for weighted shares (default: the same trace)."),
    ] = None,
    per_sequence: Annotated[
        bool, typer.Option("--per-sequence", help="Start each sequence cold (default: one session).")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="GGUF whose expert sizes give the bytes read per token.")
    ] = None,
    expert_bytes: Annotated[
        str | None, typer.Option("--expert-bytes", help="Size of one expert instead, e.g. 3.2MiB.")
    ] = None,
    disk: Annotated[str | None, typer.Option("--disk", help="Read speed per second, e.g. 3GB.")] = None,
    compute_ms: Annotated[
        float, typer.Option("--compute", help="Milliseconds per token with all experts in RAM.")
    ] = 0.0,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a figure of hit-rate curves.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to a file.")] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No table, no progress.")] = False,
) -> None:
    """Replay a trace through eviction policies: hit rates, the gap to the oracle, bytes and tokens per
    second."""
    import numpy as np

    from flashmoe.routing.files import read
    from flashmoe.simulate import report
    from flashmoe.simulate.replay import parse_capacities, parse_policies, simulate

    recorded = read(trace)
    if first is not None:
        recorded = recorded.rows(np.arange(min(first, recorded.n_tokens)))
    slots = parse_capacities(capacity, recorded.n_layers * recorded.num_experts)
    machine = _machine(model, expert_bytes, disk, compute_ms, recorded.n_layers * recorded.num_experts)
    console = stderr_console(quiet)
    if prefetch is not None:
        _prefetch(recorded, prefetch, policy, slots, partition, plot, json_file, quiet)
        return
    with console.status("compiling") as status:
        rows = simulate(
            recorded,
            parse_policies(policy),
            slots,
            partition,
            per_sequence,
            read(guide) if guide else None,
            lambda name, size: status.update(f"{name}, {size} slots"),
        )
    if not quiet:
        Console().print(report.table(rows, recorded, machine))
    if json_file:
        write_json(json_file, [row.as_dict() for row in rows])
    if plot:
        report.plot(rows, plot, str(recorded.model.get("name", trace.stem)))


def _prefetch(
    trace: RoutingTrace,
    predictors: str,
    policy: str,
    slots: list[int],
    partition: str,
    figure: Path | None,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Judge predictors: a table, JSON, a figure."""
    from flashmoe.simulate import prefetch

    specs = prefetch.parse_predictors(predictors)
    policy = "lfu-aged" if policy == "all" else policy
    if "," in policy:
        raise UsageError(f"--prefetch judges against one policy, got {policy}: name one")
    with stderr_console(quiet).status("compiling") as status:
        rows = prefetch.simulate_prefetch(
            trace,
            specs,
            slots,
            policy,
            partition,
            lambda name, done: status.update(f"{name}, {done} of {trace.n_tokens} tokens"),
        )
    if not quiet:
        Console().print(prefetch.table(rows, trace))
    if json_file:
        write_json(json_file, [row.as_dict() for row in rows])
    if figure:
        prefetch.plot(rows, figure, str(trace.model.get("name", "trace")))


def _machine(model: str | None, expert: str | None, disk: str | None, compute_ms: float, total: int):  # type: ignore[no-untyped-def]
    """The report's Machine, or None where no size of an expert is given."""
    from flashmoe.simulate.report import Machine

    if model is None and expert is None:
        if disk is not None:
            raise UsageError("--disk needs the size of an expert: give --model FILE.gguf or --expert-bytes")
        return None
    size = float(parse_bytes(expert)) if expert is not None else _expert_bytes(str(model), total)
    return Machine(size, float(parse_bytes(disk.removesuffix("/s"))) if disk else None, compute_ms / 1000)


def _expert_bytes(model: str, total: int) -> float:
    """Mean bytes of an expert of a GGUF model. Raises UsageError where the trace is of a model of other
    shape."""
    from flashmoe.storage.catalog import ExpertCatalog
    from flashmoe.storage.gguf import read_gguf
    from flashmoe.storage.hub import resolve

    catalog = ExpertCatalog.from_gguf(read_gguf(resolve(model)))
    if catalog.total_experts != total:
        raise UsageError(
            f"the trace is of {total} experts, {model} has {catalog.total_experts}: give its own model"
        )
    return catalog.expert_bytes / catalog.total_experts
