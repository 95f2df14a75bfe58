"""What it gains to multiply a layer's resident experts while the missing ones are read (engines/llamacpp/overlap.py).

    python scripts/experiments/overlap.py MODEL.gguf TRACE --cache 25%,50%,75% [--threads 1] [--drive 0.8] [--worth 0]
    python scripts/experiments/overlap.py MODEL.gguf TRACE --cache 25%,50%,75% --bound

Decodes with a trace's routing, eight tokens with and eight without, and the whole once more the other way round; the
first of each eight is not counted. `--drive`: read no faster than so many GB/s, by reads that are handed over later.

`--bound`: without, and notes of every layer with a read the wait before its first products (gate and up), these
products, the wait before the last one (down). From them: what the layer would take if its residents were multiplied
during the waits, at no cost, and if each missing expert were, too, as soon as it is in, but for the last. (That down's
products of the residents could be made during the first wait, too, is not in it.)
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import typer

import flashmoe
from flashmoe.bench.forced import ForcedRouting
from flashmoe.engines.llamacpp import overlap
from flashmoe.engines.llamacpp.hook import RouterHook
from flashmoe.storage import aio

BLOCK = 8  # tokens
DOWN = 0.5  # its product takes half of what gate's and up's take


class SlowQueue(aio.KernelQueue):
    """Hands reads over no faster than `rate` bytes per second, as one drive that works on one after the other."""

    rate = 0.0

    def __init__(self, files: Any) -> None:
        super().__init__(files)
        self._free_at = 0.0
        self._due: dict[int, float] = {}
        self._held: deque[aio.Done] = deque()

    def start(self, reads: list[tuple[int, aio.Read]]) -> None:
        for number, read in reads:
            self._free_at = max(self._free_at, time.monotonic()) + read.nbytes / self.rate
            self._due[number] = self._free_at
        super().start(reads)

    def collect(self, timeout: float, least: int = 1) -> list[aio.Done]:
        until = time.monotonic() + timeout
        while True:
            now = time.monotonic()
            self._held += super().collect(0)
            ended = [done for done in self._held if self._due[done[0]] <= now]
            if len(ended) >= least or now >= until:
                self._held = deque(done for done in self._held if self._due[done[0]] > now)
                for number, _ in ended:
                    del self._due[number]
                return ended
            soonest = sorted(self._due.values())[: max(1, least - len(ended))][-1] if self._due else until
            time.sleep(max(2e-5, min(until, soonest) - now))


class Notes:
    """What the hook of one model does in each layer: (late experts, wait, products, wait) in seconds."""

    def __init__(self) -> None:
        self.layers: list[list[float]] = []
        self.left = 0.0
        self.cache: Any = None

    def seen(self) -> tuple[float, int]:
        stats = self.cache.stats["decode"]
        return stats.stall_seconds, stats.misses + stats.late_hits

    def rename(self, hook: Any, control: Any, node: int) -> None:
        waited, late = self.seen()
        RENAME(hook, control, node)
        now_waited, now_late = self.seen()
        self.left = time.perf_counter()
        self.layers.append([now_late - late, now_waited - waited, 0.0, 0.0])

    def finish(self, hook: Any, control: Any) -> None:
        self.layers[-1][2] = time.perf_counter() - self.left
        waited, _ = self.seen()
        FINISH(hook, control)
        self.layers[-1][3] = self.seen()[0] - waited


RENAME, FINISH = RouterHook._rename, RouterHook._finish


def bounds(late: float, first: float, products: float, second: float, k: int) -> tuple[float, float]:
    """Seconds that a layer would save: residents multiplied during the waits; and missing experts as they come."""
    down = DOWN * products
    present = first + products + second + down
    came = present - down if second > 1e-4 else first  # when down's bytes were in
    saved = []
    for left in (late / k, 1 / k):  # the share of the products that has to wait for the last bytes
        at = max(first, products * (1 - left)) + products * left
        saved.append(present - (max(at + down * (1 - left), came) + down * left))
    return saved[0], saved[1]


class Session:
    """A model, and a trace that its tokens follow."""

    def __init__(self, loaded: flashmoe.Model, trace: str, prompt: int, tokens: int) -> None:
        self.model, self._draw, self._at = loaded, np.random.default_rng(0), prompt
        self._forced = ForcedRouting.for_model(loaded.catalog, trace, 0, prompt + tokens)
        loaded.engine.override_routing(self._forced)
        loaded.decoder.rewind()
        self._forced.at(0, prompt)
        loaded.decoder.evaluate(self._draw.integers(5, 1000, size=prompt).tolist(), decode=False)

    def decode(self) -> float:
        """One token; its seconds."""
        self._forced.at(self._at, 1)
        self._at += 1
        began = time.perf_counter()
        self.model.decoder.evaluate([int(self._draw.integers(5, 1000))], decode=True)
        return time.perf_counter() - began


def bound(loaded: flashmoe.Model, session: Session, notes: Notes, warmup: int, tokens: int) -> str:
    notes.cache, k = loaded.cache, loaded.catalog.top_k
    for _ in range(warmup):
        session.decode()
    loaded.decoder.forget_decode()
    notes.layers.clear()
    seconds = sum(session.decode() for _ in range(tokens))
    stats, layers = loaded.cache_stats["decode"], np.array(notes.layers)
    reading = layers[layers[:, 0] > 0]
    saved = np.array([bounds(row[0], row[1], row[2], row[3], k) for row in reading]).sum(axis=0) / seconds
    first, second = layers[:, 1].sum() / seconds, layers[:, 3].sum() / seconds
    return (
        f"a token {1e3 * seconds / tokens:.1f} ms; hits {stats.hit_rate:.3f}; "
        f"waits {first:.1%} before gate and up, {second:.1%} before down; layers that read "
        f"{len(reading) / len(layers):.0%}, with {reading[:, 0].mean():.1f} of {k} experts; gate and up "
        f"{1e3 * np.median(reading[reading[:, 2] > 0, 2]):.2f} ms a layer; bound: {saved[0]:.1%} if residents are "
        f"multiplied meanwhile, {saved[1]:.1%} if others are as they come"
    )


def alternate(
    loaded: flashmoe.Model, session: Session, swapped: bool, warmup: int, tokens: int
) -> list[list[tuple[float, float, int]]]:
    """Of each token without, and with: seconds, seconds waited, bytes."""
    made = loaded.engine._hook._overlap  # type: ignore[attr-defined]
    for _ in range(warmup):
        session.decode()
    layers = made.layers
    seen: list[list[tuple[float, float, int]]] = [[], []]
    for i in range(tokens):
        on = (i // BLOCK + swapped) % 2
        made.layers = layers if on else frozenset()
        stats = loaded.cache_stats["decode"]
        waited, read = stats.stall_seconds, stats.bytes_read
        seconds = session.decode()
        if i % BLOCK:
            seen[on].append((seconds, stats.stall_seconds - waited, stats.bytes_read - read))
    return seen


def main(
    model: Path,
    trace: str,
    cache: Annotated[str, typer.Option()] = "25%,50%,75%",
    prefetch: Annotated[str, typer.Option()] = "auto",
    layout: Annotated[str, typer.Option()] = "auto",
    threads: Annotated[int, typer.Option()] = 0,
    drive: Annotated[float, typer.Option()] = 0.0,
    worth: Annotated[int, typer.Option()] = overlap.WORTH,
    only_bound: Annotated[bool, typer.Option("--bound")] = False,
    prompt: Annotated[int, typer.Option()] = 32,
    warmup: Annotated[int, typer.Option()] = 48,
    tokens: Annotated[int, typer.Option()] = 64,
) -> None:
    SlowQueue.rate = 1e9 * drive
    for size in cache.split(","):
        seen: list[list[tuple[float, float, int]]] = [[], []]
        for swapped in (False,) if only_bound else (False, True):
            notes = Notes()
            with ExitStack() as stack:
                stack.enter_context(patch.object(aio, "KernelQueue", SlowQueue if drive else aio.KernelQueue))
                stack.enter_context(patch.object(overlap, "WORTH", 1 << 60 if only_bound else worth))
                if only_bound:
                    stack.enter_context(patch.object(RouterHook, "_rename", lambda *a, n=notes: n.rename(*a)))
                    stack.enter_context(patch.object(RouterHook, "_finish", lambda *a, n=notes: n.finish(*a)))
                loaded = stack.enter_context(
                    flashmoe.load(
                        model,
                        cache=size,
                        prefetch=prefetch,
                        layout=layout,
                        threads=threads or None,
                        n_ctx=512,
                    )
                )
                notes.cache = loaded.cache
                session = Session(loaded, trace, prompt, warmup + tokens)
                if only_bound:
                    typer.echo(f"{size}: {bound(loaded, session, notes, warmup, tokens)}")
                    continue
                for all_of, more in zip(
                    seen, alternate(loaded, session, swapped, warmup, tokens), strict=True
                ):
                    all_of += more
        if only_bound:
            continue
        means = [np.mean(one, axis=0) for one in seen]
        for name, (seconds, waited, read) in zip(("without", "with"), means, strict=True):
            typer.echo(
                f"{size} {name}: {1e3 * seconds:.1f} ms a token, {waited / seconds:.1%} waited, {read / 1e6:.0f} MB"
            )
        medians = [np.median([token[0] for token in one]) for one in seen]
        typer.echo(
            f"{size}: {means[0][0] / means[1][0]:.2f}x by means, {medians[0] / medians[1]:.2f}x by medians"
        )


if __name__ == "__main__":
    typer.run(main)
