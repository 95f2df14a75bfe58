"""While the cores are contended there are more of OpenMP's threads than cores."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from flashmoe.common.machine import seconds_without_core
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.spinning import Team, release_threads

PATIENCE = 10.0  # seconds that OpenMP's threads may take to end: nothing joins them


def threads_settle_at(wanted: int) -> bool:
    """Whether this process comes to have so many threads."""
    end = time.monotonic() + PATIENCE
    while len(os.listdir("/proc/self/task")) != wanted:
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_a_team_comes_and_goes(lib: Library) -> None:
    before, team = len(os.listdir("/proc/self/task")), Team(lib.openmp_runtime, 3)
    for _ in range(2):
        team.assemble()
        team.assemble()
        assert threads_settle_at(before + 1 + 3)  # the one that leads
        team.dismiss()
        team.dismiss()
        assert threads_settle_at(before)


def test_waiting_is_counted() -> None:
    before = seconds_without_core()
    own = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    assert before >= 0
    assert seconds_without_core() >= own / 1e9


def test_threads_are_released(lib: Library) -> None:
    before, team = len(os.listdir("/proc/self/task")), Team(lib.openmp_runtime, 3)
    seen = []

    def lead() -> None:
        team._start(team._nothing, None, 4, 0)
        seen.append(threads_settle_at(before + 1 + 3))
        release_threads(lib)
        seen.append(threads_settle_at(before + 1))

    leader = threading.Thread(target=lead)  # OpenMP keeps no threads for it yet
    leader.start()
    leader.join()
    assert seen == [True, True]
