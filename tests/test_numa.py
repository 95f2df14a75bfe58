"""Memory of machines with several nodes."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmoe.common import numa
from flashmoe.storage.addresses import reserve
from tests.cache.test_pool import pool_of
from tests.conftest import Tiny

Machine = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Pretends a machine: cores of each node, nodes with memory, those that are allowed, and the process's cores."""

    def pretend(cores: list[str], memory: str, allowed: str, own: set[int]) -> None:
        for number, listed in enumerate(cores):
            (tmp_path / f"node{number}").mkdir()
            (tmp_path / f"node{number}/cpulist").write_text(f"{listed}\n")
        (tmp_path / "has_memory").write_text(f"{memory}\n")
        (tmp_path / "status").write_text(f"Name:\tx\nMems_allowed_list:\t{allowed}\nThreads:\t1\n")
        monkeypatch.setattr(numa, "_NODES", tmp_path)
        monkeypatch.setattr(numa, "_STATUS", tmp_path / "status")
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: own)

    return pretend


@pytest.mark.parametrize(
    ("cores", "memory", "allowed", "own", "expected"),
    [
        (["0-3"], "0", "0", {0, 1, 2, 3}, [0]),
        (["0-3,8-11", "4-7,12-15"], "0-1", "0-1", set(range(16)), [0, 1]),
        (["0-3", "4-7"], "0-1", "0-1", {4, 5}, [1]),  # bound to one node's cores
        (["0-3", "4-7"], "0-1", "0", set(range(8)), [0]),  # or to its memory
        (["0-3", "4-7", ""], "0-2", "0-2", set(range(8)), [0, 1]),  # memory without cores is slow
        (["0-3", "4-7"], "0", "0-1", set(range(8)), [0]),
        (["0", "1", "2", "3"], "0-3", "0,2-3", {0, 1, 2, 3}, [0, 2, 3]),
    ],
)
def test_nodes(
    cores: list[str], memory: str, allowed: str, own: set[int], expected: list[int], machine: Machine
) -> None:
    machine(cores, memory, allowed, own)
    assert numa.nodes() == expected


def test_no_nodes_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "_NODES", tmp_path)
    assert numa.nodes() == []


def test_one_node_is_left_alone(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(["0-3"], "0", "0", {0})
    monkeypatch.setattr(numa, "_call", lambda *_: pytest.fail("nothing is to be spread"))
    numa.spread(0, 1 << 20)
    with numa.spreading():
        pass


def test_calls(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes 0 and 70, as bits; a policy of the user's own is not replaced."""
    machine(["0-3"], "0", "0-99", {0, 9})
    (numa._NODES / "has_memory").write_text("0,70")
    (numa._NODES / "node70").mkdir()
    (numa._NODES / "node70/cpulist").write_text("9")
    mask = numa._mask()
    assert mask is not None
    assert int.from_bytes(bytes(mask), "little") == 1 | 1 << 70
    bind, choose, ask = numa._SYSCALLS[platform.machine()]
    called: list[tuple[int, ...]] = []
    monkeypatch.setattr(numa, "_call", lambda *arguments: (called.append(arguments), 0)[1])
    numa.spread(1 << 20, 4096)
    with numa.spreading():
        pass
    assert [call[0] for call in called] == [ask, bind, ask, choose, choose]
    assert called[1][1:4] == (1 << 20, 4096, 3)
    assert called[1][5] > 71
    assert called[3][1] == 3
    assert called[4][1] == 0

    def bound(number: int, mode: int, *_: int) -> int:
        called.append((number,))
        numa.ctypes.c_int.from_address(mode).value = 2  # MPOL_BIND
        return 0

    called.clear()
    monkeypatch.setattr(numa, "_call", bound)
    numa.spread(1 << 20, 4096)
    assert called == [(ask,)]


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="a kernel without NUMA")
def test_the_system_takes_them(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """With this machine's own nodes, as if they were several."""
    own = numa.nodes()
    assert own
    monkeypatch.setattr(numa, "nodes", lambda: own * 2)

    def policy(address: int) -> str:
        """Of the mapping that an address is in."""
        lines = [line.split() for line in Path("/proc/self/numa_maps").read_text().splitlines()]
        return max((int(line[0], 16), line[1]) for line in lines if int(line[0], 16) <= address)[1]

    memory, address = reserve(1 << 20)
    numa.spread(address, 1 << 20)
    memory[0] = 1
    assert policy(address).startswith("interleave")
    with pool_of(tiny("olmoe"), 4) as (_, _, pool):
        assert all(policy(address).startswith("interleave") for address, _ in pool.regions)
    with numa.spreading():
        mode = numa.ctypes.c_int(-1)
        numa._call(numa._SYSCALLS[platform.machine()][2], numa.ctypes.addressof(mode), 0, 0, 0, 0)
        assert mode.value == 3
    numa._call(numa._SYSCALLS[platform.machine()][2], numa.ctypes.addressof(mode), 0, 0, 0, 0)
    assert mode.value == 0
