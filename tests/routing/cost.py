"""What recording costs: `python -m tests.routing.cost MODEL [--cache 25%] [--blocks 40]`.

Blocks of decoding with and without a recorder alternate in one process. Reported: the median, over pairs of
neighbouring blocks, of the ratio of wall time and of the process's CPU time per token.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import flashmoe

CONTEXT = 512


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--cache", default="25%")
    parser.add_argument("--blocks", type=int, default=40, help="pairs")
    parser.add_argument("--tokens", type=int, default=32, help="per block")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with flashmoe.load(
        options.model,
        cache=options.cache,
        n_ctx=CONTEXT,
        policy="lfu-aged",
        prefetch="none",
        threads=options.threads,
    ) as model:
        recorder = model.record()
        rows: list[tuple[float, float]] = []
        tokens = np.random.default_rng(0)
        left = 0
        for block in range(-2, 2 * options.blocks):
            if left < options.tokens:
                model.decoder.rewind()
                model.decoder.evaluate(model.engine.tokenize("Once upon a time there was"), decode=False)
                left = CONTEXT - model.engine.past() - 1
            on = block % 4 in (1, 2)  # off on on off: drift cancels
            model.decoder.record(recorder if on else None)
            wall, cpu = time.perf_counter(), time.process_time()
            for token in tokens.integers(300, 900, options.tokens).tolist():
                model.decoder.evaluate([token], decode=True)
            rows.append((time.perf_counter() - wall, time.process_time() - cpu))
            left -= options.tokens
    times = np.array(rows[2:]).reshape(-1, 4, 2) / options.tokens * 1e6
    off, on = times[:, [0, 3]].mean(1), times[:, [1, 2]].mean(1)
    for i, name in enumerate(("wall", "CPU")):
        ratio = on[:, i] / off[:, i]
        low, high = np.quantile(ratio, [0.25, 0.75])
        print(
            f"{name}: {np.median(off[:, i]):.0f} us per token without, cost {100 * (np.median(ratio) - 1):+.2f} % "
            f"(quartiles {100 * (low - 1):+.2f} to {100 * (high - 1):+.2f} %)"
        )


if __name__ == "__main__":
    main()
