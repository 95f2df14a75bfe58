"""Signals at random moments, whose handlers raise: is a model afterwards what it was?

python -m tests.faults.storm llama.cpp 1000        # or transformers; a figure for the lab notes
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

import flashmoe
from flashmoe.cache.residency import check_residency

VOCABULARY = 90  # of the smallest model
#: Ctrl-C, an alarm, and a signal of the user's own.
SIGNALS = (signal.SIGINT, signal.SIGALRM, signal.SIGUSR1)


class Struck(Exception):
    """What the handlers of this module raise."""


def _strike(number: int, _frame: Any) -> None:
    raise Struck(signal.Signals(number).name)


@contextmanager
def handlers() -> Iterator[None]:
    """The signals but Ctrl-C raise Struck; Ctrl-C is Python's own."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS[1:]:
        signal.signal(number, _strike)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def logits_of(model: flashmoe.Model) -> np.ndarray:
    """Logits after each micro-batch of a prompt and after each of some single tokens, float32 [n, vocabulary]."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 24).tolist()
    size = model.engine.n_ubatch
    batches = [tokens[i : min(i + size, 16)] for i in range(0, 16, size)] + [[token] for token in tokens[16:]]
    model.engine.rewind(0)
    found = []
    for batch in batches:
        model.engine.decode(batch)
        found.append(model.engine.logits())
    return np.array(found)


def slots_in_use(model: flashmoe.Model) -> int:
    """Checks that residency is consistent; how many slots it and the staging area know of."""
    cache = model.cache
    residency = cache.policy.residency
    spare = cache.staging.slots
    passing = cache._window._passing  # until the next request
    check_residency(residency, [*spare, *passing])
    known = {*spare, *passing, *residency.slot_of[residency.slot_of >= 0].tolist()}
    for group, count in enumerate(residency.free_count.tolist()):
        start = int(residency.group_start[group])
        known.update(residency.free[start : start + count].tolist())
    return len(known)


def storm(
    evaluate: Callable[[], Any], rounds: int, signals: Sequence[signal.Signals] = SIGNALS
) -> Counter[str]:
    """Call `evaluate` so many times, a signal in each at a random moment; how the calls have ended."""
    draw = random.Random(1)
    main = threading.main_thread().ident or 0
    usual = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        evaluate()
        usual = min(usual, time.perf_counter() - began)
    ended: Counter[str] = Counter()
    for _ in range(rounds):
        number, seconds = draw.choice(signals), draw.random() * usual
        timer = threading.Timer(seconds, signal.pthread_kill, (main, number))
        how = ""
        try:
            timer.start()
            evaluate()
            how = "finished"
            timer.join()
        except (KeyboardInterrupt, Struck) as struck:
            how = how or str(struck) or "SIGINT"
        ended[how] += 1
        with suppress(RuntimeError):  # it was just about to start
            timer.join()
    return ended


def load(path: Path, **options: Any) -> flashmoe.Model:
    """A model whose cache holds a fraction of its experts."""
    return flashmoe.load(path, cache="60%", threads=1, n_ctx=128, n_ubatch=8, policy="lru", **options)


def main(kind: str, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if kind == "transformers":
            import torch

            from tests.engines.transformers.models import make_checkpoint

            path = make_checkpoint("olmoe", Path(folder), torch.bfloat16)
        else:
            from tests.models import make

            path = make("olmoe", Path(folder) / "olmoe.gguf")
        with load(path, engine=kind) as model, handlers():
            expected, slots = logits_of(model), slots_in_use(model)
            print(dict(storm(lambda: logits_of(model), rounds)), flush=True)
            print("logits equal:", np.array_equal(logits_of(model), expected))
            print("slots known:", slots_in_use(model), "of", slots)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
