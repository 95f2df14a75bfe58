"""What a token costs by sequences at once: `python -m tests.batch.sequences [MODEL] [--lines 64] [--tokens 64]`.

The same requests as a batch for each pool and number of sequences. Reported: bytes read for a decoded token, hit rate,
and tokens per second of the whole batch, prompts included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.batch.inputs import request, write

SUBJECTS = (
    "the sea", "a lighthouse", "winter in the mountains", "a small village", "the night train", "bread and salt",
    "an old clock", "the garden", "a letter from home", "the long road", "a quiet library", "rain on the roof",
)  # fmt: skip


def batch(model: str, source: Path, cache: str, parallel: int, folder: Path) -> Any:
    """Its report."""
    out, report = folder / f"{cache}-{parallel}.jsonl", folder / "report.json"
    options = ["--cache", cache, "-np", str(parallel), "-c", "256", "-t", "1", "--json", str(report), "-q"]
    command = [sys.executable, "-m", "flashmoe.cli", "batch", model, str(source), str(out), *options]
    subprocess.run(command, check=True, timeout=600)
    return json.loads(report.read_text())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--cache", action="append")
    parser.add_argument("--lines", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        more = {"max_tokens": options.tokens, "ignore_eos": True, "temperature": 0.8, "seed": 1}
        subjects = [f"{SUBJECTS[i % len(SUBJECTS)]}, part {i}" for i in range(options.lines)]
        source = write(Path(name) / "in.jsonl", [request(subject, **more) for subject in subjects])
        for cache in options.cache or ["25%", "50%"]:
            for parallel in (1, 4, 8, 16):
                found = batch(options.model, source, cache, parallel, Path(name))
                print(
                    f"{cache}, {parallel:2} sequences: {found['io']['read_bytes_per_token'] / 1e3:8.1f} kB/token, "
                    f"hit rate {found['cache']['hit_rate']:.3f}, {found['batch']['tokens_per_second']:6.1f} tokens/s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
