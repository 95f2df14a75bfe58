"""Several prompts in turns over one context: each gets the logits that stock llama.cpp gives it alone, bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import flashmoe
from flashmoe.engines.base import Sampling
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.stock import StockModel
from flashmoe.generation import Generation, Reuse, split
from flashmoe.layout import PLAIN, REPACKED
from tests.conftest import Tiny
from tests.engines.reference import CONTEXT, prompt
from tests.models import ARCHITECTURES

MADE = 6
GREEDY = Sampling(temperature=0)


class NoEnd:
    """Lets no end token come: the tests want their tokens."""

    def __init__(self, model: flashmoe.Model) -> None:
        self.ends = [token for token in range(model.engine.n_vocab) if model.engine.is_end(token)]

    def apply(self, logits: NDArray[np.float32]) -> None:
        logits[self.ends] = -np.inf

    def accept(self, token: int) -> bool:
        return True


def alone(
    stock: StockModel, generation: Generation, n_ubatch: int, threads: int, n_ctx: int
) -> list[NDArray[np.float32]]:
    """Logits after the prompt and after each token made, by stock llama.cpp."""
    context = stock.context(n_ctx=n_ctx, n_ubatch=n_ubatch, threads=threads)
    try:
        for chunk in split(generation.prompt, n_ubatch):
            context.decode(chunk)
        logits = [context.logits()]
        for token in generation.made[:-1]:
            context.decode([token])
            logits.append(context.logits())
        return logits
    finally:
        context.close()


def step(model: flashmoe.Model, generation: Generation, seen: list[NDArray[np.float32]]) -> None:
    """One step; `seen` gets the logits that the token was chosen from."""
    if generation.step():
        logits = model.engine.logits()
        finite = np.isfinite(logits)
        seen.append(np.where(finite, logits, 0))


def assert_same(
    seen: list[NDArray[np.float32]], expected: list[NDArray[np.float32]], ends: list[int]
) -> None:
    assert len(seen) == len(expected)
    for got, right in zip(seen, expected, strict=True):
        right[ends] = 0
        assert np.array_equal(got.view(np.int32), right.view(np.int32))


def check_turns(
    path: Path,
    lib: Library,
    *,
    cache: str,
    n_ubatch: int,
    layout: str = PLAIN,
    threads: int = 1,
    n_ctx: int = CONTEXT,
    scale: int = 1,
    cut: bool = False,
) -> None:
    """Three prompts in turns, one of them abandoned for another. scale: of their lengths; cut: memory can be cut."""
    stock = StockModel(lib, path, repack=layout == REPACKED)
    with flashmoe.load(
        path,
        cache=cache,
        threads=threads,
        n_ctx=n_ctx,
        n_ubatch=n_ubatch,
        layout=layout,
        sequences=3,
        library=lib,
    ) as model:
        assert model.engine.n_ubatch == n_ubatch
        rule = NoEnd(model)
        tokens = prompt(model.engine.n_vocab, 40 * scale)
        begun: list[tuple[Generation, list[NDArray[np.float32]]]] = []

        def begin(prompt_tokens: list[int], sequence: int) -> Generation:
            generation = model.start(
                prompt_tokens,
                sequence=sequence,
                max_tokens=MADE,
                sampling=GREEDY,
                reuse=Reuse.EXACT,
                rules=[rule],
            )
            begun.append((generation, []))
            return generation

        begin(tokens[: 21 * scale], 0)
        begin(tokens[5 * scale : 38 * scale], 1)
        abandoned = begin(tokens[: 30 * scale], 2)
        for _ in range(5):
            for generation, seen in begun:
                step(model, generation, seen)
        held = model.engine.past(2)
        begun.pop()
        abandoned.close()
        again = begin(tokens[: 18 * scale] + tokens[30 * scale :], 2)  # begins as the abandoned one did
        while any(not generation.finished for generation, _ in begun):
            for generation, seen in begun:
                if not generation.finished:
                    step(model, generation, seen)
        shared = min(18 * scale, held) // n_ubatch * n_ubatch
        assert again.reused in (0, shared)  # none where the model's memory cannot be cut
        assert again.reused or not cut
        for generation, seen in begun:
            assert_same(seen, alone(stock, generation, n_ubatch, threads, n_ctx), rule.ends)
    stock.close()


# a small pool allows no micro-batches
@pytest.mark.parametrize(("cache", "n_ubatch", "layout"), [("100%", 8, REPACKED), ("1", 1, PLAIN)])
@pytest.mark.parametrize("name", ["demo", *ARCHITECTURES])
def test_turns_change_nothing(
    name: str,
    cache: str,
    n_ubatch: int,
    layout: str,
    lib: Library,
    tiny: Tiny,
    request: pytest.FixtureRequest,
) -> None:
    if (name, layout) == ("grovemoe", REPACKED):
        pytest.skip("llama.cpp computes wrong results: see tests/engines/test_repack.py")
    path = request.getfixturevalue("demo") if name == "demo" else tiny(name)
    cut = name in ("demo", "llama", "olmoe", "deepseek2")
    check_turns(path, lib, cache=cache, n_ubatch=n_ubatch, layout=layout, cut=cut)


def test_long_prompts_on_two_threads(lib: Library, tiny: Tiny) -> None:
    """From 512 cells on, the kernel for one token's attention shares them out among threads."""
    check_turns(tiny("olmoe"), lib, cache="100%", n_ubatch=128, threads=2, n_ctx=512, scale=12, cut=True)
