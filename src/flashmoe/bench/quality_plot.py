"""The figure of `flashmoe quality`: speed and reads against perplexity, one line a mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashmoe.common.plotting import new_figure, save_figure


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the figure of a report (the layout of `--json`) to a .png, .svg or .pdf file. Raises UsageError.

    Every line begins at its size's exact run.
    """
    figure = new_figure(8, 8)
    above, below = figure.subplots(2, 1, sharex=True)
    sizes = list(dict.fromkeys(row["size"] for row in report["rows"]))
    styles = ("-", "--", ":", "-.")
    for number, size in enumerate(sizes):
        rows = [row for row in report["rows"] if row["size"] == size]
        exact = rows[0]
        modes: dict[str, list[dict[str, Any]]] = {}
        for row in rows[1:]:
            modes.setdefault(_mode(row["approx"]), []).append(row)
        for color, (mode, members) in enumerate(modes.items()):
            points = [exact, *sorted(members, key=lambda row: row["misses_per_token"], reverse=True)]
            x = [100 * point["perplexity_change"] for point in points]
            look = {"ls": styles[number % len(styles)], "marker": "o", "ms": 4, "color": f"C{color}"}
            above.plot(x, [p["tokens_per_second"] for p in points], label=f"{mode}, {size}", **look)
            below.plot(x, [p["misses_per_token"] for p in points], **look)
    above.set(ylabel="decode, tokens/s", title=f"{report['model']}: {exact['tokens']} tokens")
    below.set(ylabel="misses per token", xlabel="perplexity against the exact run, %")
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    if above.lines:
        above.legend(fontsize=8)
    save_figure(figure, path)


def _mode(approx: str) -> str:
    """The kind of an approximation, without its numbers."""
    kinds = [part.partition(":")[0] for part in approx.split("+")]
    return "+".join("levels" if kind.isdigit() else kind for kind in kinds)
