"""What learning from use is worth over a week: the sequences of a trace in order, in seven days with a restart between.

    python scripts/experiments/week_of_use.py TRACE [--capacity 25%] [--learn-after 3] [--plot week.png] [--json FILE]

A restart empties the pool; what was observed is gone. Replayed for each day: `lfu-aged`; the default policy from
nothing; going on from the weights of the days before; and, after --learn-after days, with what `flashmoe learn` makes
of them as a member. Prints the share of the gap between LRU and the oracle that each closes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from flashmoe.cache.policies import create
from flashmoe.cache.policies.adaptive import Adaptive
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.policies.flashmoe_plus import FEATURES
from flashmoe.cache.policies.learned import PolicyFile
from flashmoe.cache.remembered import KIND
from flashmoe.common.plotting import new_figure, save_figure
from flashmoe.learn import plus
from flashmoe.learn.plus_shape import DECAYS, Sizes
from flashmoe.learn.samples import Samples
from flashmoe.routing.files import read
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate.replay import parse_capacities, replay
from flashmoe.storage.hub import default_policy

DAYS = 7
AVERAGE, COLD, REMEMBERING, LEARNT = "lfu-aged", "default, cold", "default, remembering", "and flashmoe learn"


def days_of(trace: RoutingTrace) -> list[RoutingTrace]:
    """As many sequences each."""
    number = np.cumsum(trace.begins()) - 1
    day = number * DAYS // (number[-1] + 1)
    return [trace.rows(np.flatnonzero(day == d)) for d in range(DAYS)]


def trained(trace: RoutingTrace) -> PolicyFile:
    """As `flashmoe learn` trains."""
    sizes = Sizes()
    weights, _ = plus.train(Samples(trace, DECAYS), sizes)
    arrays: dict[str, Any] = plus.export(weights, sizes)
    return PolicyFile(
        KIND, arrays, trace.n_layers, trace.num_experts, trace.top_k, FEATURES, constants=sizes.constants,
        model=dict(trace.model),
    )  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Gap closed by day, a curve for each."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for name in (AVERAGE, COLD, REMEMBERING, LEARNT):
        points = [(row["day"], 100 * row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="o", ms=3)
    axes.set(xlabel="day", ylabel="% of the gap from LRU to the oracle", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def main(
    trace_file: Annotated[Path, typer.Argument(metavar="TRACE")],
    capacity: Annotated[str, typer.Option()] = "25%",
    learn_after: Annotated[int, typer.Option(help="Days; 0: never.")] = 3,
    figure: Annotated[Path | None, typer.Option("--plot")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    trace = read(trace_file)
    (slots,) = parse_capacities(capacity, trace.n_layers * trace.num_experts)
    file: PolicyFile | None = None
    learnt: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for number, day in enumerate(days_of(trace), 1):
        low, high = (replay(day, create(name), slots).hit_rate for name in ("lru", "belady"))
        policies: dict[str, EvictionPolicy] = {
            AVERAGE: create("lfu-aged"), COLD: create(default_policy("")), REMEMBERING: create(default_policy("")),
        }  # fmt: skip
        if file is not None:
            policies[LEARNT] = Adaptive(trained=file)
        row: dict[str, Any] = {"day": number, "tokens": day.n_tokens}
        for name, policy in policies.items():
            if name in (REMEMBERING, LEARNT):
                policy.recall(learnt.get(name) or learnt.get(REMEMBERING, {}))
            row[name] = round((replay(day, policy, slots).hit_rate - low) / (high - low), 3)
            if name in (REMEMBERING, LEARNT):
                learnt[name] = policy.learnt()
        rows.append(row)
        typer.echo(json.dumps(row))
        if number == learn_after:
            file = trained(trace.rows(np.arange(sum(r["tokens"] for r in rows))))
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1))
    if figure:
        draw(rows, figure)


if __name__ == "__main__":
    typer.run(main)
