"""What the eval callback takes: nanoseconds of each stop at a layer, and of all that a token asks of it.

    python scripts/experiments/hook_cost.py MODEL.gguf --cache 100% [--prefetch auto] [--record] [--threads 2]

A compiled function around the callback reads the clock before and after it. A stop is where the router of a layer has
spoken; layers whose experts are all resident are told from the others by the bytes waited for (none). Tokens are drawn
uniformly; medians of all stops, and of the sums over a token.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import typer
from llvmlite import binding, ir
from numba import carray, cfunc, types
from numba.extending import intrinsic

import flashmoe
from flashmoe.common.compiled import int64_at
from flashmoe.engines.llamacpp.callback import on_node
from flashmoe.engines.llamacpp.hook import RouterHook

_MOST = 1 << 22
_HEAD = 8  # [0] stops noted, [1] nanoseconds of asking, [2] callback, [4:8] two timespecs
notes = np.zeros(_HEAD + _MOST, np.int64)
notes[2] = on_node.address
binding.add_symbol("flashmoe_hook_notes", notes.ctypes.data)
_clock: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))


@intrinsic
def _notes(_typing: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        number, name = ir.IntType(64), "flashmoe_hook_notes"
        known = builder.module.globals.get(name)
        return builder.ptrtoint(known or ir.GlobalVariable(builder.module, number, name), number)

    return types.int64(), generate


@intrinsic
def _call(_typing: Any, _function: Any, _node: Any, _ask: Any, _data: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        byte, number = ir.IntType(8), ir.IntType(64)
        kind = ir.FunctionType(byte, [number, byte, number])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), list(args[1:]))

    return types.uint8(types.int64, types.int64, types.uint8, types.int64), generate


@cfunc(types.uint8(types.int64, types.uint8, types.int64))
def timed(node: Any, ask: Any, data: Any) -> Any:
    address: Any = _notes()  # type: ignore[call-arg]
    kept = carray(int64_at(address), _HEAD + _MOST)
    _clock(1, address + 32)
    answer: Any = _call(kept[2], node, ask, data)
    _clock(1, address + 48)
    taken = 1000000000 * (kept[6] - kept[4]) + kept[7] - kept[5]
    if ask != 0:
        kept[1] += taken
    elif kept[0] < _MOST:
        kept[_HEAD + kept[0]] = taken
        kept[0] += 1
    return answer


def main(
    model: Path,
    cache: Annotated[str, typer.Option()] = "100%",
    prefetch: Annotated[str, typer.Option()] = "auto",
    layout: Annotated[str, typer.Option()] = "plain",
    record: Annotated[bool, typer.Option("--record")] = False,
    threads: Annotated[int, typer.Option()] = 0,
    prompt: Annotated[int, typer.Option()] = 512,
    warmup: Annotated[int, typer.Option()] = 64,
    tokens: Annotated[int, typer.Option()] = 64,
) -> None:
    with (
        patch.object(RouterHook, "function", property(lambda _: timed.address)),
        flashmoe.load(
            model,
            cache=cache,
            prefetch=prefetch,
            layout=layout,
            threads=threads or None,
            n_ctx=2048,
            trace=record,
        ) as loaded,
    ):
        decoder, vocabulary = loaded.decoder, loaded.engine.n_vocab
        draw = np.random.default_rng(0)
        decoder.rewind()
        for start in range(0, prompt, loaded.engine.n_ubatch):
            n = min(loaded.engine.n_ubatch, prompt - start)
            decoder.evaluate(draw.integers(vocabulary, size=n).tolist(), decode=False)
        for _ in range(warmup):
            decoder.evaluate([int(draw.integers(vocabulary))], decode=True)
        decoder.forget_decode()
        hits: list[int] = []
        asked: list[int] = []
        per_token: list[tuple[float, int, int]] = []
        missed = 0
        for _ in range(tokens):
            notes[:2] = 0
            began = time.perf_counter()
            decoder.evaluate([int(draw.integers(vocabulary))], decode=True)
            seconds = time.perf_counter() - began
            stops = notes[_HEAD : _HEAD + int(notes[0])]
            per_token.append((seconds, int(stops.sum()), int(notes[1])))
            (hits if loaded.cache_stats["decode"].misses == missed else asked).extend(stops.tolist())
            missed = loaded.cache_stats["decode"].misses
        seconds, stops, asking = np.median(np.array(per_token), axis=0)
        stats = loaded.cache_stats["decode"]
        typer.echo(
            f"{model.name}: a token {1e3 * seconds:.2f} ms, of it stops {stops / 1e6:.3f} and questions "
            f"{asking / 1e6:.3f} ms; hit rate {stats.hit_rate:.4f}, counted overhead "
            f"{1e6 * stats.overhead_seconds / tokens:.0f} us a token"
        )
        for name, found in (("tokens without misses", hits), ("others", asked)):
            if found:
                low, middle, high = np.percentile(found, [25, 50, 90]) / 1e3
                typer.echo(
                    f"  {name}: {len(found)} stops, us: 25 % {low:.1f}, median {middle:.1f}, 90 % {high:.1f}"
                )


if __name__ == "__main__":
    typer.run(main)
