"""A batch that is killed again and again: `python -m tests.batch.kills [MODEL] [--kills 10] [--parallel 1]`.

Each process but the last is ended with SIGKILL when the journal has grown by a random number of lines. Reported: lines
of the output, and whether it is the file of a batch that nobody killed. With several sequences at once, which of them
share an evaluation depends on time, and with it last bits: then only the lines' names are compared.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.batch.inputs import read, request, same, write


def batch(model: Path | str, source: Path, out: Path, parallel: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "flashmoe.cli", "batch", str(model), str(source), str(out)]
    options = ["--cache", "50%", "-t", "1", "-c", "128", "-np", str(parallel), "-q"]
    return subprocess.Popen([*command, *options])


def answered(out: Path) -> int:
    """Whole lines of the journal."""
    journal = out.with_name(f"{out.name}.partial")
    return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0


def killed(model: Path | str, source: Path, out: Path, kills: int, parallel: int) -> list[int]:
    """Kill `kills` processes, let another come to its end; lines that each of them found."""
    lines, found = len(read(source)), []
    for left in range(kills, 0, -1):
        before = answered(out)
        found.append(before)
        enough = before + random.Random(left).randint(1, max(1, 2 * (lines - before) // (left + 1) - 1))
        with batch(model, source, out, parallel) as process:
            while process.poll() is None and answered(out) < min(enough, lines - 1):
                time.sleep(0.002)
            assert process.poll() is None, "it came to its end before it was killed: give more --lines"
            process.kill()
    found.append(answered(out))
    with batch(model, source, out, parallel) as process:
        assert process.wait(300) == 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--lines", type=int, default=60)
    parser.add_argument("--parallel", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write(folder / "in.jsonl", [request(f"number {i}") for i in range(options.lines)])
        found = killed(options.model, source, folder / "out.jsonl", options.kills, options.parallel)
        with batch(options.model, source, folder / "whole.jsonl", options.parallel) as process:
            assert process.wait(600) == 0
        ours, whole = same(folder / "out.jsonl"), same(folder / "whole.jsonl")
        names = [line["custom_id"] for line in ours]
        print(f"killed {options.kills} times, with {found[1:]} of {options.lines} lines answered")
        print("every line once, in order:", names == [line["custom_id"] for line in whole])
        print("the same answers:", sum(a == b for a, b in zip(ours, whole, strict=True)), "of", len(whole))


if __name__ == "__main__":
    main()
