"""What the predictor `gate` takes: the time of its answers at seven real sizes, by how many experts are resident.

    python scripts/experiments/gate_cost.py [--rounds 7] [--json FILE]

Routers of random weights, in the type of a GGUF (F32) and in that of most checkpoints (BF16). Of a token's layers in
turn, as the scheduler asks: the hidden state is seen, the picks are observed, the next layer is predicted. The best of
some rounds: other programs only add to it. At most 24 layers are made; a token's time is of all.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from flashmoe.prefetch.gate import Gate, Router

#: experts, width, MoE layers, experts per token
SIZES = {
    "OLMoE-1B-7B": (64, 2048, 16, 8),
    "Qwen3-30B-A3B": (128, 2048, 48, 8),
    "gpt-oss-120b": (128, 2880, 36, 4),
    "Qwen3-235B-A22B": (128, 4096, 94, 8),
    "GLM-4.6": (160, 5120, 89, 8),
    "DeepSeek-V3": (256, 7168, 58, 8),
    "Kimi-K2": (384, 7168, 60, 8),
}
SHARES = (0.0, 0.25, 0.5, 0.75)  # of the experts that are resident
TOKENS = 3  # per round


def main(
    rounds: Annotated[int, typer.Option()] = 7,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    draw, found = np.random.default_rng(0), []
    for name, (experts, width, all_layers, top_k) in SIZES.items():
        layers = min(all_layers, 24)  # more than the processor's caches hold of large ones
        weights = [draw.standard_normal((experts, width), np.float32) for _ in range(layers)]
        norms = [draw.uniform(0.5, 1.5, width).astype(np.float32) for _ in range(layers)]
        row: dict[str, Any] = {"model": name, "experts": experts, "width": width}
        for kind in ("F32", "BF16"):
            if kind == "BF16":
                weights = [(matrix.view(np.uint32) >> 16).astype(np.uint16) for matrix in weights]
            routers = [
                Router(matrix, norm, np.zeros(experts, np.float32), np.zeros(0, np.float32))
                for matrix, norm in zip(weights, norms, strict=True)
            ]
            for share in SHARES:
                row[f"{kind}, {share:.0%}"] = seconds(routers, top_k, share, rounds) * (all_layers - 1)
        found.append(row)
        times = ", ".join(f"{key} {1e3 * value:.1f}" for key, value in row.items() if "%" in key)
        typer.echo(f"{name}: {experts} x {width}; ms a token: {times}")
    if json_file:
        json_file.write_text(json.dumps(found, indent=1))


def seconds(routers: list[Router], top_k: int, share: float, rounds: int) -> float:
    """Of an answer about a layer."""
    experts, width = routers[0].weights.shape
    gate, draw = Gate(), np.random.default_rng(1)
    gate.bind(len(routers), experts, top_k)
    gate.use_routers(routers)
    slot_of = np.full((len(routers), experts), -1, np.int32)
    slot_of[:, : round(share * experts)] = 0
    gate.use_residency(slot_of)
    hidden, out = draw.standard_normal((width,), np.float32), np.zeros(experts, np.float32)
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(TOKENS):
            gate.begin_step(0)
            for layer in range(len(routers) - 1):
                gate.see(layer, hidden)
                gate.observe(layer, np.arange(top_k, dtype=np.int32))
                gate.predict(layer, layer + 1, out)
        times.append((time.perf_counter() - began) / TOKENS / (len(routers) - 1))
    return min(times)


if __name__ == "__main__":
    typer.run(main)
