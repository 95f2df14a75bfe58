"""Signals at random moments, whose handlers raise: is a model afterwards what it was?

python -m tests.faults.storm llama.cpp 1000        # or other KINDS, one after the other; a figure for the lab notes
"""

from __future__ import annotations

import json
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


def forwards_of(model: flashmoe.Model) -> np.ndarray:
    """Logits of Transformers' own model, called in the main thread, and with it the cache."""
    import torch

    with torch.inference_mode():
        kept = [
            model.engine.model(torch.arange(start, start + n)[None]).logits  # type: ignore[attr-defined]
            for start, n in ((3, 8), (40, 8), (7, 1), (8, 1), (9, 1))
        ]
    return np.concatenate([found[0].float().numpy() for found in kept])


def make_model(kind: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A tiny model, and how it is loaded."""
    if kind in ("transformers", "forward"):
        import torch

        from tests.engines.transformers.models import make_checkpoint

        path = make_checkpoint("olmoe", folder, torch.bfloat16)
        return path, {"engine": "transformers", "prefetch": "none"}
    from tests.models import make

    path = make("olmoe", folder / "olmoe.gguf")
    return path, {"prefetch": "table" if kind == "llama.cpp+table" else "none"}


#: What is evaluated, or that a model is loaded.
KINDS = ("llama.cpp", "llama.cpp+table", "loading", "transformers", "forward")


def main(kind: str, rounds: int) -> dict[str, Any]:
    evaluate = forwards_of if kind == "forward" else logits_of
    with tempfile.TemporaryDirectory() as folder:
        path, options = make_model(kind, Path(folder))
        with load(path, **options) as model, handlers():
            expected, slots = evaluate(model), slots_in_use(model)
            if kind == "loading":
                ended = storm(lambda: load(path, **options).close(), rounds)
            else:
                ended = storm(lambda: evaluate(model), rounds)
            equal = np.array_equal(evaluate(model), expected)
            return {"ended": ended, "equal": equal, "slots": slots_in_use(model), "slots_before": slots}


if __name__ == "__main__":
    for kind in sys.argv[1:-1]:
        print(json.dumps(main(kind, int(sys.argv[-1]))), flush=True)
    os._exit(0)
