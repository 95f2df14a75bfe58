"""What a process with a budget takes at most, for real shapes: sparse files (no weights), experts picked at random.

python -m tests.peaks gpt-oss-120b 12GiB           # 512 tokens of a prompt, 32 after it; minutes of computing
python -m tests.peaks demo 208MiB --cold           # numba compiles everything anew
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from flashmoe.bench import make_model as making
from flashmoe.bench.cgroup import memory_group
from flashmoe.bench.shapes import SHAPES, Tensor
from flashmoe.common.units import parse_bytes

PROMPT, DECODED = 512, 32

CHILD = """
import json, sys
import numpy as np
import flashmoe
from flashmoe.common.memory import status_bytes
from flashmoe.storage.addresses import commit

model, ram, n_prompt, n_decode, step = sys.argv[1], *map(int, sys.argv[2:])
with flashmoe.load(model, ram=ram, n_ctx=512 if model == "demo" else 2048, n_ubatch=step or None) as loaded:
    draw, experts = np.random.default_rng(0), loaded.catalog.n_experts

    def pick(layer, ids):
        for row in ids:
            row[:] = draw.choice(experts, len(row), replace=False)

    loaded.engine.override_routing(pick)
    decoder, tokens = loaded.decoder, draw.integers(0, 500, n_prompt).tolist()
    for region in loaded.cache.pool.regions:  # at once: in the background it takes its time
        commit(*region)
    decoder.rewind()
    for at in range(0, n_prompt, loaded.engine.n_ubatch):
        decoder.evaluate(tokens[at : at + loaded.engine.n_ubatch], decode=False)
    for _ in range(n_decode):
        decoder.evaluate(tokens[:1], decode=True)
    report = loaded.report()
print(json.dumps({
    "peak": status_bytes("VmHWM"),
    "budget": ram,
    "slots": report.cache["slots"],
    "experts": report.cache["total_experts"],
    "n_ubatch": loaded.engine.n_ubatch,
    "given_back": report.memory["most_given_back_bytes"],
}))
"""


def write_sparse(name: str, path: Path, layers: int | None = None) -> None:
    """A GGUF of a shape in MXFP4 (experts) and Q8_0: the header, and a hole for the tensors."""
    shape = SHAPES[name] if layers is None else replace(SHAPES[name], layers=layers)

    def hole(out: Any, tensors: list[tuple[Tensor, str]], *_: object) -> None:
        making._pad(out)
        sizes = (-(-making._nbytes(*tensor) // making._ALIGNMENT) * making._ALIGNMENT for tensor in tensors)
        out.truncate(out.tell() + sum(sizes))

    with patch.object(making, "_write_tensors", hole), patch.object(making, "_SPARE", -(1 << 60)):
        making.make_model(name, shape, path, quant="MXFP4")


def peak(
    model: str | Path, ram: int, n_prompt: int, n_decode: int, step: int = 0, cold: str | None = None
) -> dict[str, Any]:
    """Run in a control group of the budget, where one can be made. cold: an empty folder for compiled code."""
    command = [sys.executable, "-c", CHILD, *map(str, (model, ram, n_prompt, n_decode, step))]
    environment = {**os.environ, **({"NUMBA_CACHE_DIR": cold} if cold else {})}
    group = memory_group(ram)
    try:
        done = subprocess.run(
            group.command(command) if group else command, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:] or f"status {done.returncode}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        found["in_group"] = group is not None
        return found
    finally:
        if group:
            group.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", help=f"demo, or one of {', '.join(SHAPES)}")
    parser.add_argument("ram")
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--tokens", type=int, default=DECODED)
    parser.add_argument("--cold", action="store_true", help="with an empty folder for compiled code")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "m.gguf"
        if given.shape != "demo":
            write_sparse(given.shape, model)
        found = peak(
            "demo" if given.shape == "demo" else model,
            parse_bytes(given.ram),
            given.prompt,
            given.tokens,
            cold=f"{folder}/numba" if given.cold else None,
        )
    share = found["peak"] / found["budget"]
    print(
        f"{given.shape} at {given.ram}: peak {found['peak'] / 2**20:.0f} MiB, {share:.3f} of the budget; {found}"
    )


if __name__ == "__main__":
    main()
