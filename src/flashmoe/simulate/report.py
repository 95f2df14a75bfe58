"""What hit rates mean for a model on a machine; tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from flashmoe.common.plotting import new_figure, save_figure
from flashmoe.common.units import format_bytes
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate.replay import Row


@dataclass(frozen=True)
class Machine:
    """What a prediction assumes."""

    expert_bytes: float  # of one expert, all planes, averaged over the layers
    disk: float | None = None  # bytes/s of direct reads
    compute: float = 0.0  # seconds per token with all experts in RAM


def bytes_per_token(row: Row, trace: RoutingTrace, machine: Machine) -> float:
    """Bytes read per token of the trace."""
    return (row.requests - row.hits) / trace.n_tokens * machine.expert_bytes


def tokens_per_second(row: Row, trace: RoutingTrace, machine: Machine) -> float | None:
    """Predicted speed where reads and compute take turns (no prefetch); None without a disk."""
    if not machine.disk:
        return None
    seconds = machine.compute + bytes_per_token(row, trace, machine) / machine.disk
    return 1 / seconds if seconds > 0 else None


def table(rows: Sequence[Row], trace: RoutingTrace, machine: Machine | None = None) -> Table:
    """One line per policy; hit rate and gap per capacity, then reads and speed where a machine is given."""
    capacities = list(dict.fromkeys(row.capacity for row in rows))
    title = f"{trace.model.get('name', 'trace')}: {trace.n_tokens} tokens, {trace.n_layers} layers, "
    title += f"{trace.top_k} of {trace.num_experts} experts, {rows[0].partition}"
    result = Table(title=title)
    result.add_column("policy")
    for capacity in capacities:
        result.add_column(f"{100 * capacity:.4g} %", justify="right")
        result.add_column("gap", justify="right", style="dim")
        if machine:
            result.add_column("read/token", justify="right")
            if machine.disk:
                result.add_column("tokens/s", justify="right")
    best = {
        c: max(
            (r.hit_rate for r in rows if r.capacity == c and not r.policy.startswith("belady")), default=0.0
        )
        for c in capacities
    }
    for policy in dict.fromkeys(row.policy for row in rows):
        cells = [policy]
        for capacity in capacities:
            row = next(r for r in rows if r.policy == policy and r.capacity == capacity)
            rate = f"{row.hit_rate:.4f}"
            cells.append(f"[bold]{rate}[/]" if row.hit_rate == best[capacity] else rate)
            cells.append("" if row.gap_closed is None else f"{100 * row.gap_closed:+.0f} %")
            if machine:
                cells.append(format_bytes(bytes_per_token(row, trace, machine)))
                speed = tokens_per_second(row, trace, machine)
                if machine.disk:
                    cells.append("" if speed is None else f"{speed:.3g}")
        result.add_row(*cells)
    return result


def plot(rows: Sequence[Row], path: str | Path, title: str = "") -> None:
    """Hit rate by capacity, one curve per policy, to a .png, .svg or .pdf. Needs matplotlib."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for policy in dict.fromkeys(row.policy for row in rows):
        points = sorted((100 * row.capacity, row.hit_rate) for row in rows if row.policy == policy)
        oracle = policy == "belady"
        name = policy.partition(":")[0]
        axes.plot(*zip(*points, strict=True), label=name, marker="o", ms=3, color="black" if oracle else None,
                  ls="--" if oracle else "-", lw=2.2 if name.startswith("flashmoe") else 1.3)  # fmt: skip
    axes.set(xlabel="capacity, % of all experts", ylabel="hit rate", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)
