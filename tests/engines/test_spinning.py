"""While the cores are contended there are more of OpenMP's threads than cores."""

from __future__ import annotations

import os
from pathlib import Path

from flashmoe.common.machine import seconds_without_core
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.spinning import Team


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_a_team_comes_and_goes(lib: Library) -> None:
    before, team = threads(), Team(lib.openmp_runtime, 3)
    for _ in range(2):
        team.assemble()
        team.assemble()
        assert threads() == before + 1 + 3  # the one that leads
        team.dismiss()
        team.dismiss()
        assert threads() == before


def test_waiting_is_counted() -> None:
    before = seconds_without_core()
    own = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    assert before >= 0
    assert seconds_without_core() >= own / 1e9
