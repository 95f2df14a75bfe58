"""What a simulation has found, and what its hit rates mean for a model on a machine; figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from flashmoe.common.plotting import new_figure, save_figure
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate.replay import Row

R = TypeVar("R")


@dataclass(frozen=True)
class Machine:
    """The machine that a prediction assumes."""

    expert_bytes: float  # of one expert, all weights, averaged over the layers
    drive_bytes_per_second: float | None = None  # of direct reads
    compute_seconds_per_token: float = 0.0  # with all experts in RAM


@dataclass(frozen=True)
class Simulation(Generic[R]):
    """Rows of a simulation, what they were measured on, and what they would mean on a machine."""

    model: str
    tokens: int
    layers: int
    experts: int
    top_k: int
    rows: tuple[R, ...]
    machine: Machine | None = None

    @classmethod
    def of(cls, trace: RoutingTrace, rows: Sequence[R], machine: Machine | None = None) -> Simulation[R]:
        """The rows that were measured on a trace."""
        name = str(trace.model.get("name", "trace"))
        return cls(name, trace.n_tokens, trace.n_layers, trace.num_experts, trace.top_k, tuple(rows), machine)

    def as_dict(self) -> dict[str, Any]:
        """As written to JSON."""
        return asdict(self)


def bytes_per_token(row: Row, of: Simulation[Row]) -> float | None:
    """Bytes read per token of the trace; None without the size of an expert."""
    if of.machine is None:
        return None
    return (row.requests - row.hits) / of.tokens * of.machine.expert_bytes


def tokens_per_second(row: Row, of: Simulation[Row]) -> float | None:
    """Predicted speed where reads and compute take turns (no prefetch); None without a drive."""
    read = bytes_per_token(row, of)
    if of.machine is None or read is None or not of.machine.drive_bytes_per_second:
        return None
    seconds = of.machine.compute_seconds_per_token + read / of.machine.drive_bytes_per_second
    return 1 / seconds if seconds > 0 else None


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
