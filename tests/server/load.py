"""A server under load: `python -m tests.server.load [MODEL] [--parallel 8] [--cache 50%]`.

One client alone, then eight at once, each with 20 requests; then 200 clients that hang up at random. Reported: tokens/s
of both, memory after a first round and at the end, and whether the server still answers.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil

from tests.server.hangups import hang_up_at_random, wait_for_idle
from tests.server.process import ServerProcess, serving


@dataclass(frozen=True)
class Load:
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def ask(server: ServerProcess, clients: int, requests: int, max_tokens: int = 32) -> Load:
    """Every client sends its requests one after the other; raises where one fails."""

    def one(number: int) -> int:
        made = 0
        with server.client() as client:
            for i in range(requests):
                if i % 2:
                    events = client.completions.create(
                        model="any",
                        prompt=f"Request {i} of client {number}",
                        max_tokens=max_tokens,
                        extra_body={"ignore_eos": True},
                        stream=True,
                        stream_options={"include_usage": True},
                    )
                    usage = [event.usage for event in events][-1]
                else:
                    answer = client.chat.completions.create(
                        model="any",
                        messages=[{"role": "user", "content": f"Request {i} of client {number}"}],
                        max_tokens=max_tokens,
                        extra_body={"ignore_eos": True},
                    )
                    usage = answer.usage
                assert usage
                assert usage.completion_tokens == max_tokens
                made += usage.completion_tokens
        return made

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(one, range(clients)))
    return Load(tokens, time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--cache", default="50%")
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--hangups", type=int, default=200)
    options = parser.parse_args()
    with serving(options.model, "--cache", options.cache, "--parallel", options.parallel) as server:
        process = psutil.Process(server.pid)
        ask(server, 8, options.requests)  # predictors that `auto` tries later take memory when they are
        before = process.memory_info().rss
        alone = ask(server, 1, options.requests)
        together = ask(server, 8, options.requests)
        loaded = process.memory_info().rss
        hang_up_at_random(server, options.hangups, 16)
        wait_for_idle(server)
        after = process.memory_info().rss
        ask(server, 1, 1)
    print(f"one client: {alone.tokens_per_second:.1f} tokens/s")
    print(
        f"8 clients: {together.tokens_per_second:.1f} tokens/s, "
        f"{together.tokens_per_second / alone.tokens_per_second:.2f} of it"
    )
    print(f"memory: {before / 2**20:.1f} MiB, after the load {loaded / before - 1:+.2%}, ", end="")
    print(f"after {options.hangups} hang-ups {after / before - 1:+.2%}; it still answers")


if __name__ == "__main__":
    main()
