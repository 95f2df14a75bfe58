"""What a decoded token costs beside stock's, all experts resident, and where: sides in turns in one process.

    python scripts/experiments/token_cost.py MODEL.gguf [--rounds 12] [--block 25] [--threads 2]

Every side decodes the same tokens after the same prompt, a block of them at a time, in one thread (OpenMP's threads
belong to the thread that evaluates). Each adds something to the one before it:

    stock     llama.cpp without the pool
    asked     ... with an eval callback, compiled, that never stops
    stopped   ... that stops where a layer's router has chosen
    pool      FlashMoE's pool and callback, without Python: what a token of `run` and `serve` is
    begun     ... with Python before and after a token, and its counting: what `flashmoe bench` measures
    handed    ... each token handed to that thread and back: what a loop of `Model.decoder.evaluate` takes

and `stock handed` is stock with each token handed over. Medians, and the mean of the middle half, of all tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numba import cfunc, types

import flashmoe
from flashmoe.bench.child import fill
from flashmoe.common.signals import run_apart
from flashmoe.engines.llamacpp.callback import _WEIGHTS_NAME, block_of
from flashmoe.engines.llamacpp.stock import StockModel

PROMPT = 64
Decode = Callable[[int], Any]


@cfunc(types.uint8(types.int64, types.uint8, types.int64))
def never(_node: Any, ask: Any, _data: Any) -> Any:
    return 0 if ask != 0 else 1


@cfunc(types.uint8(types.int64, types.uint8, types.int64))
def at_layers(node: Any, ask: Any, _data: Any) -> Any:
    return block_of(node, _WEIGHTS_NAME) >= 0 if ask != 0 else 1


def timed(decode: Decode, tokens: list[int]) -> list[float]:
    seconds = []
    for token in tokens:
        began = time.perf_counter()
        decode(token)
        seconds.append(time.perf_counter() - began)
    return seconds


def in_thread(call: Callable[[], Any]) -> Any:
    """Call it in the thread of every evaluation."""
    return run_apart(call, lambda: None)


def handed(decode: Decode) -> Decode:
    return lambda token: in_thread(partial(decode, token))


def apart(decode: Decode, tokens: list[int]) -> list[float]:
    found: list[float] = in_thread(partial(timed, decode, tokens))
    return found


def evaluating(context: Any) -> Decode:
    return lambda token: context.decode([token])


def middle(seconds: list[float]) -> float:
    ordered = sorted(seconds)
    return float(np.mean(ordered[len(ordered) // 4 : -(len(ordered) // 4)]))


def main(
    model: Path,
    rounds: Annotated[int, typer.Option()] = 12,
    block: Annotated[int, typer.Option()] = 25,
    threads: Annotated[int, typer.Option()] = 2,
    rest: Annotated[float, typer.Option(help="Seconds between two blocks.")] = 0.1,
) -> None:
    n_ctx = PROMPT + block
    draw = np.random.default_rng(0)
    with flashmoe.load(
        model, cache="100%", layout="plain", threads=threads, n_ctx=n_ctx, n_ubatch=PROMPT
    ) as loaded:
        fill(loaded)
        engine: Any = loaded.engine
        stock = StockModel(engine.library, model)
        make = partial(stock.context, n_ctx=n_ctx, n_ubatch=PROMPT, threads=threads)
        callbacks = {
            "stock": None,
            "asked": (never.address or 0, 0),
            "stopped": (at_layers.address or 0, 0),
        }
        contexts = {name: make(callback=callback) for name, callback in callbacks.items()}
        sides: dict[str, tuple[Decode, Callable[[Decode, list[int]], list[float]]]] = {
            name: (evaluating(context), apart) for name, context in contexts.items()
        }
        sides["pool"] = (evaluating(engine._context), apart)
        sides["begun"] = (lambda token: loaded.decoder.evaluate([token], decode=True), apart)
        sides["handed"] = (lambda token: loaded.decoder.evaluate([token], decode=True), timed)
        sides["stock handed"] = (handed(sides["stock"][0]), timed)
        prompt = draw.integers(5, engine.n_vocab, PROMPT).tolist()
        loaded.decoder.rewind()
        loaded.decoder.evaluate(prompt, decode=False)
        loaded.decoder.evaluate(prompt[:1], decode=True)
        for context in contexts.values():
            in_thread(partial(context.decode, prompt))
        seen: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            tokens = draw.integers(5, engine.n_vocab, block).tolist()
            order = list(sides)[:: 1 if number % 2 else -1]
            for name in order:
                for context in (*contexts.values(), engine._context):
                    in_thread(partial(context.rewind, PROMPT))
                if name == "pool":  # the hook is as its last token has left it
                    in_thread(partial(engine._hook.begin, [0]))
                time.sleep(rest)
                decode, run = sides[name]
                taken = run(decode, tokens)
                if name == "pool":
                    in_thread(engine._hook._settle)
                if number:
                    seen[name] += taken[2:]
        base = middle(seen["stock"])
        for name, taken in seen.items():
            mean = middle(taken)
            typer.echo(
                f"{name:13s} median {1e6 * np.median(taken):6.0f} us, mean of the middle half {1e6 * mean:6.0f} "
                f"({1e6 * (mean - base):+4.0f}), stock / it {base / mean:.3f}"
            )
        for context in contexts.values():
            context.close()
        stock.close()


if __name__ == "__main__":
    typer.run(main)
