"""Tokens per second of 1, 2, 4 and 8 clients, against the stock server out of the same wheel, in turns.

    python -m tests.server.clients [MODEL] [--cache 100%] [--cache 50%] [--rounds 5] [--threads 1] [--json FILE]

Every client sends its requests one after the other, without streaming. Both servers get the same context, slots,
threads and layouts; ours is `flashmoe serve`, front and all. Reported: medians over the rounds, and of their ratio.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from flashmoe.storage.hub import resolve
from tests.server.process import serving

CLIENTS, TOKENS = (1, 2, 4, 8), 128
STOCK = """
import sys, time
import xllamacpp
path, n_ctx, parallel, threads, plain = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel = n_ctx * parallel, parallel
params.n_batch = params.n_ubatch = min(512, n_ctx)
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.warmup = params.fit_params = False
params.use_jinja, params.no_extra_bufts = True, bool(plain)
params.hostnames, params.port, params.verbosity, params.cache_ram_mib = ["127.0.0.1"], 0, 0, 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def stock(path: Path, n_ctx: int, parallel: int, threads: int, plain: bool) -> Iterator[str]:
    """The stock server in a process of its own; its address."""
    command = [sys.executable, "-c", STOCK, str(path), *map(str, (n_ctx, parallel, threads, int(plain)))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        yield process.stdout.readline().strip()
        process.stdin.close()


def ask(url: str, clients: int, requests: int) -> float:
    """Tokens per second of all clients together."""

    def one(number: int) -> int:
        address, made = urlsplit(url), 0
        for turn in range(requests):
            connection = http.client.HTTPConnection(address.hostname or "", address.port)
            body = {"prompt": f"Story {turn} of {number}", "n_predict": TOKENS, "ignore_eos": True}
            body |= {"temperature": 0, "cache_prompt": False}
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
            assert answer["tokens_predicted"] == TOKENS, answer
            made += TOKENS
            connection.close()
        return made

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(one, range(clients)))
    return tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--cache", action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=4, help="of each client, each round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--layout", default="plain")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    caches = options.cache or ["100%", "50%"]
    rates: dict[str, dict[int, list[float]]] = {}
    with ExitStack() as stack:
        servers = {"stock": stack.enter_context(
            stock(resolve(options.model), options.ctx, options.parallel, options.threads, options.layout == "plain")
        )}  # fmt: skip
        for cache in caches:
            arguments = (
                "--cache",
                cache,
                "--parallel",
                options.parallel,
                "-c",
                options.ctx,
                "--layout",
                options.layout,
            )
            ours = stack.enter_context(serving(options.model, "-t", options.threads, *arguments))
            servers[cache] = ours.url
        for round_ in range(-1, options.rounds):  # the first only warms up
            for clients in CLIENTS:
                for name, url in servers.items():
                    rate = ask(url, clients, options.requests)
                    if round_ >= 0:
                        rates.setdefault(name, {}).setdefault(clients, []).append(rate)
    for name, found in rates.items():
        for clients, values in found.items():
            ratio = statistics.median(a / b for a, b in zip(values, rates["stock"][clients], strict=True))
            print(
                f"{name:>6}, {clients} clients: {statistics.median(values):7.1f} tokens/s "
                f"({min(values):.1f} to {max(values):.1f}), {ratio:.2f} of stock"
            )
    if options.json:
        options.json.write_text(json.dumps(rates, indent=1))


if __name__ == "__main__":
    main()
