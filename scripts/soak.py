"""Hours of mixed load on the demo model in one process: memory must stay flat, and results must be llama.cpp's bits.

    python scripts/soak.py [--requests 20000] [--minutes 120] [--cache 25%] [--json FILE]

Clients of llama.cpp's server in this process: random prompts (a few tokens to most of the context), greedy and sampled,
several at once; some go on from what is there, some hang up in the middle, some are refused. It ends after so many
requests or minutes, whichever comes first. In between and at the end the logits of a fixed text are compared with the
stock library's, by the engine's own loop. Exit status 1 where a bit differs or memory has grown by more than 2 % since
the first tenth.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import flashmoe
from flashmoe.common.memory import status_bytes
from flashmoe.common.units import format_bytes
from flashmoe.engines.llamacpp.stock import StockModel
from flashmoe.engines.llamacpp.tested import tested_library
from flashmoe.errors import UsageError
from flashmoe.storage.hub import resolve

SLOTS, CLIENTS, CONTEXT, UBATCH = 4, 6, 256, 64
TEXT = list(range(40, 140))  # tokens whose logits are compared
CHECK_EVERY = 200
GROWTH = 0.02


class Load:
    """Clients, each with one request after the other."""

    def __init__(self, model: flashmoe.Model, seed: int) -> None:
        self._model, self._seed = model, seed
        self._lock = threading.Lock()
        self.requests = self.tokens = self.left_off = self.refused = 0

    def run(self, requests: int, until: float) -> None:
        """So many requests in all, or until then (time.monotonic)."""
        clients = [threading.Thread(target=self._client, args=(requests, until)) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    def _client(self, requests: int, until: float) -> None:
        while time.monotonic() < until:
            with self._lock:
                if self.requests >= requests:
                    return
                self.requests += 1
                rng = random.Random(self._seed * 1_000_003 + self.requests)
            self._ask(rng)

    def _ask(self, rng: random.Random) -> None:
        length, answer = rng.choice((3, 10, 30, 100, 200, CONTEXT + 10)), rng.choice((1, 4, 16, 40))
        shared = [7] * min(20, length)  # a beginning that others have as well
        request = {
            "prompt": [*shared, *(rng.randrange(1000) for _ in range(length - len(shared)))],
            "n_predict": answer,
            "temperature": rng.choice((0.0, 0.8)),
            "seed": rng.randrange(1 << 30),
            "cache_prompt": rng.random() < 0.5,
        }
        events = self._model.server().complete(request)
        made = 0
        try:
            for event in events:
                made += bool(event.get("choices"))
                if rng.random() < 0.01:
                    self.left_off += 1
                    break
        except UsageError:  # longer than the context
            self.refused += 1
        finally:
            events.close()  # type: ignore[attr-defined]
        with self._lock:
            self.tokens += made


def digest(logits: list[bytes]) -> str:
    return hashlib.sha256(b"".join(logits)).hexdigest()


def pooled(model: flashmoe.Model) -> str:
    """Logits of TEXT: a prompt of one micro-batch, then token by token."""
    model.decoder.rewind()
    model.decoder.evaluate(TEXT[:UBATCH], decode=False)
    found = [model.engine.logits().tobytes()]
    for token in TEXT[UBATCH:]:
        model.decoder.evaluate([token], decode=True)
        found.append(model.engine.logits().tobytes())
    return digest(found)


def main(
    requests: Annotated[int, typer.Option()] = 20_000,
    minutes: Annotated[float, typer.Option()] = 120.0,
    cache: Annotated[str, typer.Option()] = "25%",
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    lib = tested_library()
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
        parallel=SLOTS,
        cache_ram=0,  # conversations that wait would be growth
        library=lib,
    ) as model:
        load = Load(model, seed)
        end = began + 60 * minutes
        while load.requests < requests and time.monotonic() < end:
            load.run(min(requests, load.requests + CHECK_EVERY), end)
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
