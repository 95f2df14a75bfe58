"""How far the default policy can be below the moving average: every trace, cut into pieces that each start cold.

    python scripts/experiments/safe_start.py TRACE... [--tokens 60,120,300] [--capacity 12.5%,25%,50%] [--json FILE]

Prints, for each length of a piece, the points of hits that --policy is above `lfu-aged`: mean and least over the
pieces, and how many are more than 0.3 below. A piece of 0 tokens is the whole trace.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from flashmoe.cache.policies import create
from flashmoe.routing.files import read
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate.replay import parse_capacities, replay
from flashmoe.storage.hub import default_policy

BOUND = 0.3  # points


def points(trace: RoutingTrace, policy: str, slots: int, tokens: int) -> list[float]:
    """Points of hits above `lfu-aged` of each piece of so many tokens; a last one that is shorter is left out."""
    found = []
    for start in range(0, trace.n_tokens - tokens + 1, tokens):
        piece = trace.rows(np.arange(start, start + tokens))
        ours, average = (replay(piece, create(name), slots).hit_rate for name in (policy, "lfu-aged"))
        found.append(100 * (ours - average))
    return found


def main(
    traces: list[Path],
    tokens: Annotated[str, typer.Option(help="Lengths of pieces; 0: all of the trace.")] = "60,90,120,300,0",
    capacity: Annotated[str, typer.Option()] = "12.5%,25%,50%",
    policy: Annotated[str, typer.Option()] = default_policy(""),
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    rows = []
    for path in traces:
        trace = read(path)
        total = trace.n_layers * trace.num_experts
        for length in (int(n) or trace.n_tokens for n in tokens.split(",")):
            if length > trace.n_tokens:
                continue
            for slots in parse_capacities(capacity, total):
                found = np.array(points(trace, policy, slots, length))
                row = {
                    "trace": path.stem,
                    "tokens": length,
                    "pieces": len(found),
                    "capacity": slots / total,
                    "mean": round(float(found.mean()), 3),
                    "least": round(float(found.min()), 3),
                    "below": int((found < -BOUND).sum()),
                }
                rows.append(row)
                typer.echo(json.dumps(row))
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
