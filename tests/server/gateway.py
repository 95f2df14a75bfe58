"""Two workers behind smg: `python -m tests.server.gateway [MODEL] [--conversations 40] [--clients 4]`.

Conversations of three turns go through the gateway, several at once. After a third of the turns one worker is killed
(SIGKILL), after two thirds it is started again on its port. Reported: turns that were answered, whether each later turn
found its conversation on the worker that had it, and how many texts are those of a single worker without a gateway.
"""

from __future__ import annotations

import argparse
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx

from tests.server.process import ServerProcess

TURNS = (
    "{} is my favourite number. Tell me what a friend of numbers would like to hear about it, in a few words.",
    "And what else?",
    "Say it in one word.",
)
#: One slot a worker, so that equal requests are evaluated alone; room for all conversations beside it.
WORKER = (
    "--cache",
    "50%",
    "--parallel",
    1,
    "-c",
    512,
    "--cache-ram",
    "256MiB",
    "--alias",
    "demo",
    "--verbose",
)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


@contextmanager
def gateway(urls: Sequence[str], more: Sequence[str] = (), key: str = "none") -> Iterator[str]:
    """smg before workers, when it knows all of them; its address. more: of its options; key: what it and they want."""
    port, figures = free_ports(2)
    options = {
        "host": "127.0.0.1", "port": port, "prometheus-port": figures, "prometheus-host": "127.0.0.1",
        "policy": "cache_aware", "health-check-interval-secs": 1, "health-failure-threshold": 1,
        "health-success-threshold": 1, "cb-timeout-duration-secs": 1, "shutdown-grace-period-secs": 1,
        "retry-max-backoff-ms": 1000, "request-id-headers": "x-request-id", "log-level": "warn",
        # an answer stands between two prompts: what they share may be little of the second; and SSDs take their time
        "cache-threshold": 0.1, "worker-wedge-secs": 120, "worker-stall-secs": 30,
    }  # fmt: skip
    command = [sys.executable, "-m", "smg", "launch", "--disable-tokenizer-autoload", "--worker-urls", *urls]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    command += more
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        url, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {key}"}
        try:
            for _ in range(600):
                assert process.poll() is None
                try:
                    if httpx.get(f"{url}/workers", headers=headers).json()["total"] == len(urls):
                        break
                except (httpx.TransportError, ValueError, KeyError):
                    pass
                time.sleep(0.1)
            else:
                raise AssertionError("the gateway does not find its workers")
            yield url
        finally:
            process.terminate()


@dataclass
class Turn:
    """An answer: of which request, when, tokens of the prompt and of these reused, and the worker (and its life)."""

    name: str
    text: str
    came: float
    prompt: int
    cached: int
    worker: tuple[int, int] = (-1, -1)


@dataclass
class Workers:
    """Workers on ports that stay theirs."""

    model: Path | str
    ports: list[int]
    lives: list[list[ServerProcess]] = field(default_factory=list)

    def __enter__(self) -> Workers:
        self.lives = [[self._start(port)] for port in self.ports]
        return self

    def _start(self, port: int) -> ServerProcess:
        return ServerProcess(self.model, *WORKER, "--port", port)

    def kill(self, number: int) -> None:
        self.lives[number][-1].send_signal(signal.SIGKILL)
        self.lives[number][-1].wait()

    def restart(self, number: int) -> None:
        self.lives[number].append(self._start(self.ports[number]))

    def __exit__(self, *_: object) -> None:
        for lives in self.lives:
            lives[-1].stop()

    def who_answered(self) -> dict[str, tuple[int, int]]:
        """By a request's name: the worker, and which of its lives."""
        return {
            name: (number, life)
            for number, lives in enumerate(self.lives)
            for life, process in enumerate(lives)
            for line in process.messages
            for name in re.findall(r"\(request '(.*?)'\): ok", line)
        }


def converse(url: str, number: int, answered: Sequence[threading.Semaphore] = ()) -> list[Turn]:
    """One conversation. answered: told of every answer.

    Every turn is asked twice: for one token, which tells where its beginning was, and without what was read before,
    which gives the same text on each worker: a prompt that is read in parts may round otherwise, as in llama.cpp's
    server.
    """
    messages, turns = [], []
    for i, question in enumerate(TURNS):
        messages.append({"role": "user", "content": question.format(number)})
        first = _ask(url, f"c{number}-{i}", messages, max_tokens=1)
        second = _ask(url, f"c{number}-{i}-text", messages, max_tokens=16, cache_prompt=False)
        text, usage = second["choices"][0]["message"]["content"], first["usage"]
        messages.append({"role": "assistant", "content": text})
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        turns.append(Turn(f"c{number}-{i}", text, first["came"], usage["prompt_tokens"], cached))
        for semaphore in answered:
            semaphore.release()
    return turns


def _ask(url: str, name: str, messages: list[dict[str, str]], **more: object) -> Any:
    body = {"model": "demo", "messages": messages, "temperature": 0, "ignore_eos": True, **more}
    headers = {"X-Request-Id": name}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return {**answer.json(), "came": time.monotonic()}


@dataclass
class Journey:
    """What went through the gateway, and when the first worker was killed."""

    found: list[list[Turn]]
    killed: float

    def moved(self) -> list[str]:
        """Turns that went elsewhere than the one before, or found less than that had read, though its worker was
        alive."""
        return [
            f"{after.name}: {before.worker} -> {after.worker}, {after.cached} of {before.prompt} tokens"
            for turns in self.found
            for before, after in zip(turns, turns[1:], strict=False)
            if (before.worker != (0, 0) or after.came < self.killed)
            and not (after.worker == before.worker and after.cached >= before.prompt)
        ]

    def by_worker(self) -> dict[tuple[int, int], int]:
        """Turns by worker and life."""
        workers = [turn.worker for turns in self.found for turn in turns]
        return {worker: workers.count(worker) for worker in sorted(set(workers))}


def through_the_gateway(model: Path | str, conversations: int, clients: int) -> Journey:
    """Two workers, the first of which is killed and started again meanwhile."""
    answered, times = threading.Semaphore(0), []
    ports = free_ports(2)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    with Workers(model, ports) as workers, gateway(urls) as url, ThreadPoolExecutor(clients) as pool:
        work = [pool.submit(converse, url, n, [answered]) for n in range(conversations)]
        for step in (workers.kill, workers.restart):
            for _ in range(conversations):  # a third of the turns
                assert answered.acquire(timeout=120)
            times.append(time.monotonic())
            step(0)
        found = [one.result() for one in work]
    by = workers.who_answered()
    for turns in found:
        for turn in turns:
            turn.worker = by[turn.name]
    return Journey(found, times[0])


def alone(model: Path | str, conversations: int) -> list[list[Turn]]:
    """The same with one worker."""
    with Workers(model, free_ports(1)) as workers:
        return [converse(workers.lives[0][0].url, n) for n in range(conversations)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--conversations", type=int, default=40)
    parser.add_argument("--clients", type=int, default=4)
    options = parser.parse_args()
    journey = through_the_gateway(options.model, options.conversations, options.clients)
    print(f"{sum(map(len, journey.found))} turns of {len(journey.found)} conversations answered")
    print("by worker and life:", journey.by_worker())
    print(
        "later turns not where the one before was, though that was alive:",
        *journey.moved() or ["none"],
        sep="\n  ",
    )
    ours = [turn.text for turns in journey.found for turn in turns]
    expected = [turn.text for turns in alone(options.model, options.conversations) for turn in turns]
    print(f"{sum(a == b for a, b in zip(ours, expected, strict=True))} texts are those of one worker")


if __name__ == "__main__":
    main()
