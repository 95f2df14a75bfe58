"""The figure of a benchmark: decode speed against memory, and the time line of one token where memory is least."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashmoe.bench.timeline import draw as draw_timeline
from flashmoe.common.plotting import new_figure, save_figure

_GIB = 1 << 30


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the figure of a report (the layout of `--json`) to a .png, .svg or .pdf file. Raises UsageError."""
    recorded = [row for row in report["rows"] if row.get("timeline")]
    figure = new_figure(7.5, 10.5 if recorded else 4.8)
    if not recorded:
        _speeds(figure.subplots(), report)
    else:
        above, below = figure.subplots(2, height_ratios=(4.8, 5.7))
        _speeds(above, report)
        row = min(recorded, key=_memory)
        draw_timeline(below, row["timeline"])
        below.set_title(f"one token at {_memory(row):.2f} GiB: {_pool_name(row)}")
    save_figure(figure, path)


def _speeds(axes: Any, report: dict[str, Any]) -> None:
    """Tokens per second against memory, with what the drive and the processor allow."""
    from matplotlib.ticker import FuncFormatter

    rows = report["rows"]
    pools: dict[str, list[dict[str, Any]]] = {}
    baselines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        pools.setdefault(_pool_name(row), []).append(row)
        if row["opponent_decode"]:
            baselines.setdefault(row["baseline"], []).append(row)
    for name, members in pools.items():
        _line(
            axes,
            members,
            name,
            "o-",
            lambda r: r["decode"]["tokens_per_second"],
            lambda r: r["spread"]["decode"],
        )
    for name, members in baselines.items():
        _line(
            axes,
            members,
            f"llama.cpp, {name}",
            "s--",
            lambda r: r["opponent_decode"]["tokens_per_second"],
            lambda r: r["spread"]["opponent_decode"],
        )
    first = next(iter(pools.values()))
    for key, label, style in (
        ("ssd_tokens_per_second", "SSD bound", ":"),
        ("compute_tokens_per_second", "compute bound", "-."),
    ):
        bounded = sorted((_memory(row), row["bounds"][key]) for row in first if row["bounds"][key])
        if bounded:
            axes.plot(*zip(*bounded, strict=True), style, marker=".", color="grey", label=label)
    axes.set_xlabel("memory of the process, GiB")
    axes.set_ylabel("decode, tokens/s")
    axes.set_yscale("log")
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    size = report["model"]["file_bytes"] / _GIB
    axes.set_title(
        f"{Path(report['model']['path']).name}, {size:.1f} GiB, {Path(report['settings']['routing']).name} routing"
    )
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()


def _pool_name(row: dict[str, Any]) -> str:
    prefetch = "" if row["prefetch"] == "none" else f" + {row['prefetch']}"
    return f"FlashMoE, {row['policy_used']}{prefetch}"


def _memory(row: dict[str, Any]) -> float:
    """The budget, or what the process took where only the pool was sized; GiB."""
    return float(row["budget_bytes"] or row["peak_bytes"]["ours"]) / _GIB


def _line(
    axes: Any,
    rows: list[dict[str, Any]],
    label: str,
    style: str,
    speed: Callable[[dict[str, Any]], float],
    quartiles: Callable[[dict[str, Any]], list[float]],
) -> None:
    """One line over all sizes with its quartiles; a size that several rows share counts once."""
    points = {_memory(row): (speed(row), quartiles(row)) for row in rows}
    xs = sorted(points)
    ys = [points[x][0] for x in xs]
    below = [points[x][0] - points[x][1][0] for x in xs]
    above = [points[x][1][1] - points[x][0] for x in xs]
    axes.errorbar(xs, ys, yerr=[below, above], fmt=style, capsize=3, label=label)
