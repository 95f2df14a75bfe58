"""A neighbour that takes memory and frees it again while a model generates, in one control group or on the machine.

python -m tests.pressure OLMoE.gguf --group 6GiB --takes 4GiB --tokens 600
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from flashmoe.bench.cgroup import memory_group
from flashmoe.common.units import parse_bytes

MODEL = """
import json, sys
import flashmoe
from flashmoe.engines.base import SamplingParams
from flashmoe.runtime import governor

tokens, threads, governor._CALM = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
options = {"n_ctx": max(512, tokens + 64), "n_ubatch": 16, "threads": threads, "prefetch": "none"}
with flashmoe.load(sys.argv[1], ram=sys.argv[5], **options) as m:
    prompt = list(range(40, 72))
    made = m.start(prompt, max_tokens=tokens, sampling=SamplingParams(temperature=0))
    said = 0
    while not made.finished:
        made.step()
        if len(made.made) > said:
            said = len(made.made)
            print(json.dumps({"slots": sum(m.cache.elastic.slots), "token": made.made[-1]}), flush=True)
            if not sys.stdin.readline():  # one step for each line
                break
    print(json.dumps({"report": m.report().as_dict(), "most": sum(m.cache.elastic.most)}), flush=True)
"""

NEIGHBOUR = """
import sys
held = []
for line in sys.stdin:
    held = held + [bytearray(b"x") * int(line)] if int(line) else []
    print(len(held), flush=True)
"""


@dataclass
class Seen:
    """What a run of the model has shown, token by token."""

    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    at: list[float] = field(default_factory=list)  # seconds
    most: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    oom_kills: int = 0
    taken: tuple[int, int] = (0, 0)  # tokens made when the neighbour began, and when it had freed all


def _say(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin
    process.stdin.write(f"{text}\n")
    process.stdin.flush()


def _hear(stream: IO[str] | None) -> str:
    assert stream
    return stream.readline()


def run(
    model: Path,
    limit: int | None,
    takes: int,
    tokens: int,
    *,
    piece: int = 0,
    held: int = 0,
    threads: int = 1,
    calm: float = 5.0,
    ram: str = "auto",
) -> Seen:
    """Generate `tokens` tokens, in a group of `limit` bytes; after a third of them the neighbour takes `takes` bytes.

    piece: bytes that it takes after each token; 0: all at once, as fast as it can. held: tokens for which it keeps
    them. calm: seconds before slots are taken again; after each token they are waited for so long. ram: the budget.
    """
    seen = Seen()
    with ExitStack() as stack:
        group = memory_group(limit)
        if group:
            stack.enter_context(group)

        def start(*command: str) -> subprocess.Popen[str]:
            whole = [sys.executable, "-c", *command]
            process = subprocess.Popen(
                group.command(whole) if group else whole,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        runs = start(MODEL, str(model), str(tokens), str(threads), str(calm), ram)
        neighbour = start(NEIGHBOUR)
        has, begun, freed = 0, 0, 0
        while line := _hear(runs.stdout):
            said = json.loads(line)
            if "report" in said:
                seen.report, seen.most = said["report"], said["most"]
                break
            seen.tokens.append(said["token"])
            seen.slots.append(said["slots"])
            seen.at.append(time.perf_counter())
            made = len(seen.tokens)
            if takes and made >= tokens // 3 and has < takes and not freed:
                begun = begun or made
                _say(neighbour, str(min(piece or takes, takes - has)))
                has += piece or takes
                if piece:
                    _hear(neighbour.stdout)
            elif has and not freed and made >= begun + held:
                _say(neighbour, "0")
                freed = made
            elif freed and seen.slots[-1] < seen.slots[0]:
                time.sleep(min(calm, 1.0))  # it takes slots also while it waits for this
            _say(runs, "on")
        seen.taken = begun, freed
        if group:
            seen.oom_kills = group.usage().oom_kills
    return seen


def _rate(seen: Seen, first: int, last: int) -> float:
    return (last - first) / max(1e-9, seen.at[last - 1] - seen.at[first - 1]) if last > first > 0 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--group", help="limit of a control group for both; without, they share the machine")
    parser.add_argument("--takes", default="4GiB")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    limit = parse_bytes(given.group) if given.group else None
    seen, usual = (
        run(given.model, limit, takes, given.tokens, held=given.tokens // 3, threads=given.threads)
        for takes in (parse_bytes(given.takes), 0)
    )
    begun, freed = seen.taken
    print(
        f"slots {seen.most}, {min(seen.slots)} beside the neighbour, {seen.slots[-1]} at the end; tokens/s "
        f"{_rate(seen, 1, begun):.1f} before, {_rate(seen, begun, freed):.1f} beside it, "
        f"{_rate(seen, freed, len(seen.at)):.1f} after ({_rate(usual, 1, len(usual.at)):.1f} without); "
        f"killed: {seen.oom_kills}; output equal: {seen.tokens == usual.tokens}; memory {seen.report['memory']}"
    )


if __name__ == "__main__":
    main()
