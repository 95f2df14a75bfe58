"""A predictor sees the tokens of a conversation that is alone, whatever was decoded together before."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import flashmoe


def test_alone_after_a_batch(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with flashmoe.load(demo, cache="50%", threads=1, parallel=2, prefetch="gate") as model:
        inner, prefetcher = model.server(), model.prefetcher
        assert prefetcher
        seen: list[int] = []
        begin = prefetcher.begin_step

        def spy(tokens: Any) -> None:
            seen.extend(tokens)
            begin(tokens)

        monkeypatch.setattr(prefetcher, "begin_step", spy)
        both = threading.Barrier(2)

        def decode(n: int) -> None:
            events = inner.complete({"prompt": "a", "max_tokens": n, "temperature": 0, "ignore_eos": True})
            next(events)
            both.wait(30)
            for _ in events:
                pass

        threads = [threading.Thread(target=decode, args=(n,)) for n in (50, 350)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) >= 250
