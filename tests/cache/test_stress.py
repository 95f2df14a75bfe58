"""The cache under many threads at once: random requests, prefetches and failing reads, thousands of schedules.

`python -m tests.cache.test_stress 20000` runs as many schedules as one likes.
"""

from __future__ import annotations

import ctypes
import random
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest

from flashmoe.cache import sizing
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies import create
from flashmoe.cache.pool import SlotPool
from flashmoe.cache.residency import check_residency
from flashmoe.errors import ReadError
from flashmoe.storage import reader as reader_module
from flashmoe.storage.aio import ThreadQueue, open_queue
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.direct import DirectFile
from flashmoe.storage.gguf import read_gguf
from flashmoe.storage.reader import ExpertReader
from tests.models import make

SLOTS, SPARE, ACTIONS, THREADS, TOP_K = 14, 3, 12, 4, 4


class Failing:
    """A queue some of whose reads fail, before or after the bytes are in."""

    def __init__(self, files: list[DirectFile], kind: type | None, rng: random.Random, share: float) -> None:
        self._queue = open_queue(files) if kind is None else kind(files)
        self.depth, self._rng, self._share = self._queue.depth, rng, share

    def start(self, reads: list) -> None:  # type: ignore[type-arg]
        self._queue.start(reads)

    def collect(self, timeout: float, least: int = 1) -> list:  # type: ignore[type-arg]
        return [
            (number, ReadError("bad sector") if self._rng.random() < self._share else error)
            for number, error in self._queue.collect(timeout, least)
        ]

    def close(self) -> None:
        self._queue.close()


class Stage:
    """One model, and what its experts' bytes are."""

    def __init__(self, path: Path) -> None:
        self.catalog = ExpertCatalog.from_gguf(read_gguf(path))
        self.bytes = {
            tensor.name: np.ascontiguousarray(tensor.data).view(np.uint8).reshape(len(tensor.data), -1)
            for tensor in gguf.GGUFReader(path).tensors
            if "exps" in tensor.name
        }

    def schedule(self, seed: int) -> None:
        """Threads with random actions on one cache. Whatever `ensure` returns has the right bytes; nothing is lost."""
        rng = random.Random(seed)
        groups = max(self.catalog.groups) + 1
        slots, spare = [SLOTS] * groups, [SPARE] * groups
        kind = rng.choice((None, ThreadQueue))
        share = rng.choice((0.0, 0.02, 0.3))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reader_module, "open_queue", lambda files: Failing(files, kind, rng, share))
            reader = ExpertReader(self.catalog.gguf.files)
        policy = create(rng.choice(("lru", "lfu", "lfu-aged", "arc")))
        policy.bind(sizing.residency_for(self.catalog, slots, spare))
        pool = SlotPool(self.catalog, slots, reader)
        cache = ExpertCache(pool, reader, policy, spare)
        wrong: list[BaseException] = []
        turn = threading.Lock()  # slots that `ensure` returns are one caller's until the next call

        def act(own: random.Random) -> None:
            try:
                for _ in range(ACTIONS):
                    self._act(own, cache, pool, turn)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=act, args=(random.Random(f"{seed} {i}"),)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert not any(thread.is_alive() for thread in threads), f"schedule {seed} hangs"
        if wrong:
            raise AssertionError(f"schedule {seed}: {wrong[0]!r}") from wrong[0]
        self._settled(cache)
        pool.close()
        reader.close()

    def _act(self, rng: random.Random, cache: ExpertCache, pool: SlotPool, turn: threading.Lock) -> None:
        layer = rng.randrange(len(self.catalog.layers))
        experts = rng.sample(range(self.catalog.n_experts), rng.randint(1, TOP_K))
        kind = rng.random()
        if kind < 0.3:
            cache.prefetch(layer, experts)
        elif kind < 0.35:
            cache.begin_sequence()
        elif kind < 0.4:
            cache.reader.poll()
        elif kind < 0.42:  # the pool gives memory back, or takes it again, before the next layer
            cache.resize([rng.randint(TOP_K + SPARE, SLOTS) for _ in cache.elastic.most])
        elif kind < 0.47:  # a prompt begins or ends: prefill takes slots, or gives them back
            with turn, suppress(ReadError):
                cache.begin_step(rng.choice((1, 8)), TOP_K)
        else:
            late = rng.random() < 0.5
            with turn:
                try:
                    slots = cache.ensure(layer, np.array(experts, np.int32), leave_last=late).tolist()
                    if late:
                        cache.finish()
                except ReadError:
                    return
                for expert, slot in zip(experts, slots, strict=True):
                    for window in pool.windows[layer]:
                        there = ctypes.string_at(window.address + slot * window.stride, window.weight.nbytes)
                        assert there == self.bytes[window.weight.tensor.name][expert].tobytes()

    def _settled(self, cache: ExpertCache) -> None:
        """Every slot is the policy's or staging's, once."""
        cache.begin_step(1, TOP_K)
        spare = cache.staging.slots
        assert len(spare) == len(set(spare)) == SPARE * (max(self.catalog.groups) + 1)
        unused = [
            slot
            for start, used, there in zip(
                cache.policy.residency.group_start, cache.elastic.slots, cache.elastic.most, strict=False
            )
            for slot in range(int(start) + used, int(start) + there)
        ]
        check_residency(cache.policy.residency, [*spare, *unused])


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(make("gpt-oss", tmp_path_factory.mktemp("stress") / "m.gguf"))


@pytest.mark.parametrize("first", range(0, 120, 30))
def test_schedules(first: int, stage: Stage) -> None:
    for seed in range(first, first + 30):
        stage.schedule(seed)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        stage_ = Stage(make("gpt-oss", Path(folder) / "m.gguf"))
        count = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
        for number in range(count):
            stage_.schedule(number)
        print(f"{count} schedules of {THREADS} threads, {ACTIONS} actions each: none went wrong")
