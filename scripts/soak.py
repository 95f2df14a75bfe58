"""Hours of mixed load on the demo model in one process: memory must stay flat, and results must be llama.cpp's bits.

    python scripts/soak.py [--requests 20000] [--minutes 120] [--cache 25%] [--json FILE]

Requests of random prompts (a few tokens to most of the context), greedy and sampled, on several sequences at once that
take turns; some go on from what is there, some are left off in the middle, some are refused. It ends after so many
requests or minutes, whichever comes first. In between and at the end the logits of a fixed text are compared with the
stock library's. Exit status 1 where a bit differs or memory has grown by more than 2 % since the first tenth.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import flashmoe
from flashmoe.budget import status_bytes
from flashmoe.engines.base import Sampling
from flashmoe.engines.llamacpp.proof import proven_library
from flashmoe.engines.llamacpp.stock import StockModel
from flashmoe.errors import UsageError
from flashmoe.generation import Generation, Reuse
from flashmoe.hub import resolve
from flashmoe.units import format_bytes

SEQUENCES, CONTEXT, UBATCH = 4, 256, 64
TEXT = list(range(40, 140))  # tokens whose logits are compared
CHECK_EVERY = 200
GROWTH = 0.02


class Load:
    """Sequences with a random request each, advanced one step at a time."""

    def __init__(self, model: flashmoe.Model, seed: int) -> None:
        self._model, self._rng = model, random.Random(seed)
        self._running: dict[int, Generation] = {}
        self.requests = self.tokens = self.left_off = self.refused = 0

    def step(self) -> None:
        """One step of a sequence; a new request where it has none."""
        sequence = self._rng.randrange(SEQUENCES)
        if sequence not in self._running:
            self._begin(sequence)
        generation = self._running.get(sequence)
        if generation is None:
            return
        self.tokens += generation.step() is not None
        if self._rng.random() < 0.005:
            self.left_off += 1
            self._end(sequence)
        elif generation.finished:
            self._end(sequence)

    def _begin(self, sequence: int) -> None:
        rng = self._rng
        self.requests += 1
        length = rng.choice((3, 10, 30, 100, 200, CONTEXT + 10))
        try:
            self._running[sequence] = self._model.start(
                [rng.randrange(1000) for _ in range(length)],
                sequence=sequence,
                max_tokens=rng.choice((1, 4, 16, 40)),
                sampling=Sampling(temperature=rng.choice((0.0, 0.8)), seed=rng.randrange(1 << 30)),
                reuse=rng.choice((Reuse.NONE, Reuse.EXACT)),
            )
        except UsageError:  # longer than the context
            self.refused += 1

    def _end(self, sequence: int) -> None:
        self._running.pop(sequence).close()

    def drain(self) -> None:
        """Leave everything off."""
        for sequence in list(self._running):
            self._end(sequence)


def digest(logits: list[bytes]) -> str:
    return hashlib.sha256(b"".join(logits)).hexdigest()


def pooled(model: flashmoe.Model) -> str:
    """Logits of TEXT: a prompt of one micro-batch, then token by token."""
    model.keep(0, 0, goes_on=False)
    model.evaluate(TEXT[:UBATCH], decode=False)
    found = [model.engine.logits().tobytes()]
    for token in TEXT[UBATCH:]:
        model.evaluate([token], decode=True)
        found.append(model.engine.logits().tobytes())
    return digest(found)


def main(
    requests: Annotated[int, typer.Option()] = 20_000,
    minutes: Annotated[float, typer.Option()] = 120.0,
    cache: Annotated[str, typer.Option()] = "25%",
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    lib = proven_library()
    stock = StockModel(lib, resolve("demo"))
    context = stock.context(n_ctx=CONTEXT, n_ubatch=UBATCH, threads=1)
    expected = []
    for tokens in [TEXT[:UBATCH], *([token] for token in TEXT[UBATCH:])]:
        context.decode(tokens)
        expected.append(context.logits().tobytes())
    context.close()
    stock.close()
    began, samples, wrong = time.monotonic(), [], 0
    with flashmoe.load(
        "demo",
        cache=cache,
        threads=1,
        n_ctx=CONTEXT,
        n_ubatch=UBATCH,
        layout="plain",
        sequences=SEQUENCES,
        library=lib,
    ) as model:
        load = Load(model, seed)
        while load.requests < requests and time.monotonic() - began < 60 * minutes:
            target = min(requests, load.requests + CHECK_EVERY)
            while load.requests < target and time.monotonic() - began < 60 * minutes:
                load.step()
            load.drain()
            same = pooled(model) == digest(expected)
            wrong += not same
            samples.append((load.requests, status_bytes("VmRSS")))
            typer.echo(
                f"{(time.monotonic() - began) / 60:6.1f} min: {load.requests} requests, {load.tokens} tokens, "
                f"{load.left_off} left off, {load.refused} refused; {format_bytes(samples[-1][1])}; "
                f"{'equal to the last bit' if same else 'LOGITS DIFFER'}"
            )
    first = samples[len(samples) // 10][1]
    growth = samples[-1][1] / first - 1
    typer.echo(
        f"memory {growth:+.2%} since {samples[len(samples) // 10][0]} requests; {wrong} of {len(samples)} checks differ"
    )
    if json_file:
        result: dict[str, Any] = {
            "requests": load.requests,
            "tokens": load.tokens,
            "seconds": time.monotonic() - began,
        }
        result |= {"rss": samples, "growth": growth, "checks": len(samples), "wrong": wrong}
        json_file.write_text(json.dumps(result, indent=1))
    sys.exit(int(wrong > 0 or growth > GROWTH))


if __name__ == "__main__":
    typer.run(main)
