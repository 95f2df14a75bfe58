"""Tokens per second of one and two workers: `python -m tests.server.workers [MODEL] [--cache 50%] [--rounds 3]`.

One worker asked directly, the same through smg, and two through smg; each worker has one thread, four slots, and four
clients that ask again and again. In turns; reported: medians over the rounds, and of their ratio to the first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx2 as httpx

from tests.server.gateway import gateway
from tests.server.process import serving

CLIENTS, REQUESTS, TOKENS = 4, 4, 64


def rate(url: str, workers: int) -> float:
    """Tokens per second of all clients together."""

    def one(number: int) -> None:
        with httpx.Client(timeout=120) as client:
            for i in range(REQUESTS):
                body = {
                    "model": "demo",
                    "prompt": f"{number} of {i}: once",
                    "max_tokens": TOKENS,
                    "temperature": 0,
                }
                answer = client.post(f"{url}/v1/completions", json={**body, "ignore_eos": True})
                assert answer.json()["usage"]["completion_tokens"] == TOKENS, answer.text

    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS * workers) as pool:
        list(pool.map(one, range(CLIENTS * workers)))
    return CLIENTS * workers * REQUESTS * TOKENS / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--cache", default="50%")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    options = ("--cache", given.cache, "--parallel", 4, "-c", 256, "--alias", "demo")
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(given.model, *options)).url for _ in range(2)]
        balanced = ["--policy", "round_robin"]  # prompts without a conversation
        places = {
            "one worker": (urls[0], 1),
            "one behind smg": (stack.enter_context(gateway(urls[:1], balanced)), 1),
            "two behind smg": (stack.enter_context(gateway(urls, balanced)), 2),
        }
        rates: dict[str, list[float]] = {name: [] for name in places}
        for round_ in range(-1, given.rounds):  # the first only warms up
            for name, (url, workers) in places.items():
                found = rate(url, workers)
                if round_ >= 0:
                    rates[name].append(found)
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates["one worker"], strict=True))
        print(
            f"{name}: {statistics.median(values):.1f} tokens/s ({min(values):.1f} to {max(values):.1f}), {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
