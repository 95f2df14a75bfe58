"""How many processors and how much memory this process may use: affinity, control groups, limits of addresses."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flashmoe.common import cgroup, machine, memory
from flashmoe.errors import BudgetError
from flashmoe.storage import addresses

V1, V2 = "/sys/fs/cgroup/cpu", "/sys/fs/cgroup"
QUOTA, PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"
MOUNT = "40 31 0:41 /docker/ab /mine rw - cgroup2 cgroup2 rw\n"


def files(monkeypatch: pytest.MonkeyPatch, contents: dict[str, str]) -> None:
    """Let these be all the files that there are."""

    def read_text(path: Path) -> str:
        if str(path) not in contents:
            raise FileNotFoundError(path)
        return contents[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)


@pytest.mark.parametrize(
    ("groups", "contents", "quota"),
    [
        ("0::/a/b\n", {f"{V2}/a/b/cpu.max": "max 100000", f"{V2}/a/cpu.max": "150000 100000"}, 1.5),
        ("0::/a\n", {f"{V2}/a/cpu.max": "max 100000"}, None),
        ("1:cpu:/x\n", {f"{V1}/x/{QUOTA}": "50000\n", f"{V1}/x/{PERIOD}": "100000\n"}, 0.5),
        ("1:cpu,cpuacct:/\n", {f"{V1}/{QUOTA}": "-1", f"{V1}/{PERIOD}": "100000"}, None),
        # a container that sees its own group only, by the name that it has outside
        ("0::/docker/ab\n", {"/proc/self/mountinfo": MOUNT, "/mine/cpu.max": "200000 100000"}, 2.0),
        ("0::/../other\n", {f"{V2}/cpu.max": "300000 100000"}, 3.0),
        ("damaged\n", {}, None),
    ],
)
def test_quotas(
    groups: str, contents: dict[str, str], quota: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(monkeypatch, {"/proc/self/cgroup": groups, **contents})
    assert cgroup.processor_quota() == quota


def test_no_control_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    files(monkeypatch, {})
    assert cgroup.processor_quota() is None


@pytest.mark.parametrize(("quota", "threads"), [(None, 4), (0.5, 1), (1.9, 1), (3.0, 3), (64.0, 4)])
def test_threads_under_a_quota(quota: float | None, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "processor_quota", lambda: quota)
    monkeypatch.setattr(machine, "allowed_cores", lambda: 4)
    assert machine.cores() == threads


@pytest.mark.parametrize(
    ("allowed", "siblings", "expected"),
    [
        ({0, 1, 2, 3}, ["0-1", "0-1", "2-3", "2-3"], 2),  # two cores of two threads
        ({0, 2}, ["0-1", "0-1", "2-3", "2-3"], 2),
        ({2, 3}, ["0-1", "0-1", "2-3", "2-3"], 1),  # one core
        ({1, 3, 5}, None, 3),  # the system does not tell: as many as there are
    ],
)
def test_affinity(
    allowed: set[int], siblings: list[str] | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(machine, "_siblings", lambda number: siblings[number] if siblings else "")
    assert machine.allowed_cores() == expected


def test_unknown_numbers_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> set[int]:
        raise OSError

    monkeypatch.setattr(os, "sched_getaffinity", unknown)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.cores() == 1


ONE_PROCESSOR = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from flashmoe.common.machine import cores
print(cores())
"""


def test_one_processor() -> None:
    """The affinity of a real process."""
    done = subprocess.run([sys.executable, "-c", ONE_PROCESSOR], capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr


def test_memory_that_others_in_the_group_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the group around, which is the tighter one; page cache counts as free."""
    inner, outer = f"{V2}/a/b", f"{V2}/a"
    files(
        monkeypatch,
        {
            "/proc/self/cgroup": "0::/a/b\n",
            f"{inner}/memory.max": str(900 << 20),
            f"{inner}/memory.current": str(100 << 20),
            f"{inner}/memory.stat": "anon 5\n",
            f"{outer}/memory.max": "max",
            f"{outer}/memory.high": str(1000 << 20),
            f"{outer}/memory.current": str(950 << 20),
            f"{outer}/memory.stat": f"active_file {100 << 20}\ninactive_file {50 << 20}\nshmem 7\n",
        },
    )
    assert memory.memory_limit() == 900 << 20
    assert memory.memory_left() == 200 << 20


def test_memory_left_of_version_1(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "/sys/fs/cgroup/memory/x"
    files(
        monkeypatch,
        {
            "/proc/self/cgroup": "4:memory:/x\n0::/\n",
            f"{group}/memory.limit_in_bytes": str(1 << 30),
            f"{group}/memory.usage_in_bytes": str(3 << 29),  # more than the limit, which was lowered
            f"{group}/memory.stat": f"inactive_file 1\ntotal_inactive_file {1 << 20}\n",
        },
    )
    assert memory.memory_left() == 0


LIMITED = """
import resource
from flashmoe.common import memory
from flashmoe.storage import addresses
used = memory.status_bytes("{field}")
resource.setrlimit(resource.{limit}, (used + (256 << 20),) * 2)
assert memory.default_ram() < 256 << 20
try:
    addresses.reserve(1 << 30)
except addresses.BudgetError as error:
    print(error)
{more}
"""


@pytest.mark.parametrize(
    ("field", "limit", "name", "more"),
    [
        ("VmSize", "RLIMIT_AS", "ulimit -v", ""),
        # what is never touched is not counted there
        (
            "VmData",
            "RLIMIT_DATA",
            "ulimit -d",
            "memory, _ = addresses.reserve_uncounted(1 << 30); memory[5] = 1",
        ),
    ],
)
def test_limits_of_addresses(field: str, limit: str, name: str, more: str) -> None:
    program = LIMITED.format(field=field, limit=limit, more=more)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout


FEW = """
import resource
from flashmoe.common import memory
from flashmoe.engines.llamacpp import tested
from flashmoe.errors import BudgetError
path = tested.find_library()
for left, call in ((300 << 20, lambda: tested.prove(path)), (100 << 20, tested.tested_library)):
    resource.setrlimit(resource.RLIMIT_AS, (memory.status_bytes("VmSize") + left, resource.RLIM_INFINITY))
    try:
        call()
    except BudgetError as error:
        print(error)
"""


def test_libraries_are_not_loaded_where_they_would_get_no_memory() -> None:
    """They would end the process, or wait for ever."""
    done = subprocess.run([sys.executable, "-c", FEW], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    self_test, model = done.stdout.splitlines()
    assert re.search("self-test, .* takes 384 MiB of addresses, ulimit -v leaves .*: raise it", self_test)
    assert re.search("smallest model takes 144 MiB of addresses, ulimit -v leaves .*: raise it", model)


def test_promises_that_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """vm.overcommit_memory=2: what is left of what the system promises."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    files(
        monkeypatch,
        {
            "/proc/sys/vm/overcommit_memory": "2\n",
            "/proc/meminfo": "CommitLimit:    2048 kB\nCommitted_AS:   1024 kB\n",
        },
    )
    assert memory.address_room() == (1 << 20, "vm.overcommit_memory=2")
    message = str(addresses.refused(5 << 30, OSError(12, "Cannot allocate memory")))
    assert "5.00 GiB" in message
    assert "vm.overcommit_memory" in message


def test_addresses_that_are_refused_for_another_reason() -> None:
    with pytest.raises(BudgetError, match="of addresses"):
        addresses.reserve(1 << 60)


def test_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the machine's memory nor the process's is told there."""

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    for name in ("virtual_memory", "cpu_count", "disk_partitions"):
        monkeypatch.setattr(psutil, name, missing)
    files(monkeypatch, {})
    total, available = memory.machine_memory()
    assert total > available > 0
    assert memory.memory_limit() == total
    assert 0 < memory.default_ram() < total
    assert machine.physical_cores() >= 1
    assert machine.file_system(Path("/")) == ""
