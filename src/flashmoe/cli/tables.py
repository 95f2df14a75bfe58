"""Tables of what `flashmoe simulate` has found."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from flashmoe.common.units import format_bytes
from flashmoe.simulate.prefetch import PrefetchRow, label
from flashmoe.simulate.replay import Row
from flashmoe.simulate.report import Simulation, bytes_per_token, tokens_per_second


def _title(found: Simulation[Any]) -> str:
    return f"{found.model}: {found.tokens} tokens, {found.layers} layers, {found.top_k} of {found.experts} experts"


def of_policies(found: Simulation[Row]) -> Table:
    """A line per policy; hit rate and gap per capacity, then reads and speed where a machine is given."""
    rows, machine = found.rows, found.machine
    capacities = list(dict.fromkeys(row.capacity for row in rows))
    result = Table(title=f"{_title(found)}, {rows[0].partition}")
    result.add_column("policy")
    for capacity in capacities:
        result.add_column(f"{100 * capacity:.4g} %", justify="right")
        result.add_column("gap", justify="right", style="dim")
        if machine:
            result.add_column("read/token", justify="right")
            if machine.drive_bytes_per_second:
                result.add_column("tokens/s", justify="right")
    best = {
        c: max(
            (r.hit_rate for r in rows if r.capacity == c and not r.policy.startswith("belady")), default=0.0
        )
        for c in capacities
    }
    for policy in dict.fromkeys(row.policy for row in rows):
        cells: list[str | Text] = [policy]
        for capacity in capacities:
            row = next(r for r in rows if r.policy == policy and r.capacity == capacity)
            rate = f"{row.hit_rate:.4f}"
            cells.append(Text(rate, style="bold" if row.hit_rate == best[capacity] else ""))
            cells.append("" if row.gap_closed is None else f"{100 * row.gap_closed:+.0f} %")
            if machine:
                cells.append(format_bytes(bytes_per_token(row, found) or 0))
                speed = tokens_per_second(row, found)
                if machine.drive_bytes_per_second:
                    cells.append("" if speed is None else f"{speed:.3g}")
        result.add_row(*cells)
    return result


def of_predictors(simulation: Simulation[PrefetchRow]) -> Group:
    """A table per capacity, one line per predictor and distance: of all experts picked the share that k and 2k guesses
    found; of the first 1, 2 and 4 guesses among absent experts the share that was right; of the misses the share
    that 4 and 2k guesses among absent ones found. All in percent."""
    rows, k = simulation.rows, simulation.top_k
    found = {(r.predictor, r.ahead, r.guesses, r.capacity): r for r in rows}
    tables: list[Table] = []
    for capacity in dict.fromkeys(row.capacity for row in rows):
        title = f"{_title(simulation)}; absent: under {rows[0].policy} at {100 * capacity:.4g} %"
        result = Table(title=title)
        result.add_column("predictor", overflow="fold")
        result.add_column("known", no_wrap=True)
        columns = [(k, "recall"), (2 * k, "recall")]
        columns += [(g, "missing_precision") for g in (1, 2, 4)] + [(g, "missing_found") for g in (4, 2 * k)]
        heads = {"recall": "found", "missing_precision": "right", "missing_found": "misses"}
        for guesses, what in columns:
            result.add_column(f"{heads[what]}\n{guesses}", justify="right")
        for name, ahead in dict.fromkeys((row.predictor, row.ahead) for row in rows):
            kept = [found.get((name, ahead, g, capacity)) for g, _ in columns]
            values = [getattr(row, what, None) for row, (_, what) in zip(kept, columns, strict=True)]
            cells = ["" if value is None else f"{100 * value:.1f}" for value in values]
            result.add_row(label(name), "token" if ahead == 0 else f"{ahead} on", *cells)
        tables.append(result)
    return Group(*tables)
