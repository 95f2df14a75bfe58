"""How far `flashmoe plan` is from measured runs: tokens/s of both at the same budgets.

    python scripts/experiments/plan_error.py MODEL [--ram 75%,50%,25%] [--routing TRACE] [--pairs 2] [--json FILE]

The plan comes first, then `flashmoe bench` at the same budgets, and the plan again: a drive whose speed changes shows
in the difference of the two.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmoe.bench.spec import ram_sizes
from flashmoe.storage.gguf import read_gguf

CONTEXT = 256  # tokens; what the benchmark takes for so few


def flashmoe(*arguments: object) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "flashmoe.cli", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(
    model: Path,
    ram: Annotated[str, typer.Option()] = "75%,50%,25%",
    routing: Annotated[Path | None, typer.Option()] = None,
    pairs: Annotated[int, typer.Option()] = 2,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    sizes = [size.ram for size in ram_sizes(ram, read_gguf(model).size) if size.ram]
    text = ",".join(map(str, sizes))
    by_trace = ["--trace", routing] if routing else []

    def plan() -> dict[int, dict[str, Any]]:
        made = json.loads(flashmoe("plan", model, "--ram", text, "--json", "-", "-c", CONTEXT, *by_trace))
        return {row["budget_bytes"]: row for row in made["rows"]}

    before = plan()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        by_routing = ["--routing", routing] if routing else []
        flashmoe(
            "bench", model, "--ram", text, "--against", "none", "--pairs", pairs, "--layout", "plain", "--warmup", 48,
            "--json", out, "-q", "--allow-busy", *by_routing,
        )  # fmt: skip
        measured = json.loads(out.read_text())["rows"]
    after = plan()
    rows = []
    for size, found in zip(sizes, measured, strict=True):
        speed = found["decode"]["tokens_per_second"]
        expected = (before[size]["tokens_per_second"] + after[size]["tokens_per_second"]) / 2
        rows.append(
            {
                "ram": size,
                "measured": found,
                "plan": [before[size], after[size]],
                "error": expected / speed - 1,
            }
        )
        typer.echo(
            f"{size >> 20:6} MiB: plan {before[size]['tokens_per_second']:.1f} "
            f"and {after[size]['tokens_per_second']:.1f}, measured {speed:.1f} tokens/s: {expected / speed - 1:+.0%}"
        )
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
