"""Models of random weights with narrow rows and up to 23,424 experts: where a layer costs more than its products.

    python scripts/experiments/narrow.py FOLDER

Makes FOLDER/n16x64.gguf and so on: layers x experts, top-8, a hidden state of 256 numbers and experts of 64 rows, Q4_0.
"""

from __future__ import annotations

from pathlib import Path

import typer

from flashmoe.bench.make_model import make_model
from flashmoe.bench.shapes import Shape

SHAPES = ((16, 64), (48, 128), (92, 160), (61, 384))


def main(folder: Path) -> None:
    for layers, experts in SHAPES:
        name = f"n{layers}x{experts}"
        shape = Shape("qwen3moe", layers, 256, 4, 2, 64, experts, 8, 64, 2048, 4096, 1e6)
        typer.echo(make_model(name, shape, folder / f"{name}.gguf"))


if __name__ == "__main__":
    typer.run(main)
