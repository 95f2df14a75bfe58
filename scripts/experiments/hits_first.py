"""What it gains, under the transformers engine on the CPU, to compute resident experts while the others are read.

    python scripts/experiments/hits_first.py FOLDER [CACHE, default 50%] [PAIRS, default 60]

Random tokens are decoded one by one, in turns: as the engine does, and with all experts computed when all are in.
FOLDER is a checkpoint, for example from `scripts/make_checkpoint.py FOLDER olmoe-4`.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from typing import Any

import flashmoe

WARM = 8  # tokens before any is counted


def main(folder: str, cache: str = "50%", pairs: str = "60") -> None:
    with flashmoe.load(folder, engine="transformers", cache=cache, prefetch="none", n_ctx=1024) as model:
        draw, ensure = random.Random(0), model.cache.ensure

        def all_first(*arguments: Any, each: Any, **others: Any) -> Any:
            found: list[tuple[int, int]] = []
            slots = ensure(*arguments, each=lambda *one: found.append(one), **others)
            for one in found:
                each(*one)
            return slots

        seconds: dict[Any, list[float]] = {ensure: [], all_first: []}
        for i in range(2 * (int(pairs) + WARM)):
            way = (ensure, all_first)[(i + i // 2) % 2]  # each goes first as often as the other
            model.cache.ensure = way  # type: ignore[assignment, method-assign]
            began = time.perf_counter()
            model.decoder.evaluate([draw.randrange(model.engine.n_vocab)], decode=True)
            if i >= 2 * WARM:
                seconds[way].append(time.perf_counter() - began)
        stats = model.cache.stats["decode"]
        first, last = (statistics.median(times) for times in seconds.values())
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        print(
            f"hits first {1e3 * first:.1f} ms, all when all are in {1e3 * last:.1f} ms per token (median of {pairs}); "
            f"ratio in pairs {statistics.median(ratios):.2f}; hit rate {stats.hit_rate:.3f}, stalled "
            f"{stats.stall_seconds / model.telemetry.decode.seconds:.0%} of the time"
        )


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
