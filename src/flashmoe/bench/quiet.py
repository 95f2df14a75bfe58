"""Whether the machine had anything else to do: processor time used by others while a measurement ran.

Spinning compute threads lose many times what another program takes, so figures of a busy machine mean nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LIMIT = 0.10  # of one core
_SLACK_SECONDS = 0.15  # clocks of different kinds are compared, and short runs must not fail on a tick or two
_KERNEL_THREAD = 0x00200000  # PF_KTHREAD
_KTHREADD = 2


@dataclass(frozen=True)
class Sample:
    """Processor seconds so far: of all programs, of the hypervisor's other guests, our own, each kernel thread's.

    `kernel` None: kernel threads cannot be seen, and `all` and `ours` are what ran outside the kernel.
    """

    at: float
    all: float
    stolen: float
    ours: float
    kernel: Mapping[int, float] | None


@dataclass(frozen=True)
class Load:
    """What others took over `seconds`, in cores."""

    seconds: float
    others: float
    stolen: float

    @property
    def busy(self) -> bool:
        allowed = LIMIT + _SLACK_SECONDS / max(self.seconds, 1e-9)
        return self.others > allowed or self.stolen > allowed

    def __str__(self) -> str:
        return f"{self.others:.2f} of a core used by other programs, {self.stolen:.2f} by the host"


def sample() -> Sample:
    """The clocks now. Children that have ended and were waited for count as ours."""
    now, times = time.monotonic(), os.times()
    own_user, own_system = times.user + times.children_user, times.system + times.children_system
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:  # not Linux: nothing is known of others
        return Sample(now, own_user, 0.0, own_user, None)
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, *_ = (int(field) / tick for field in fields)
    stolen = int(fields[7]) / tick if len(fields) > 7 else 0.0
    kernel = _kernel_threads(tick)
    if kernel is None:
        return Sample(now, user + nice, stolen, own_user, None)
    return Sample(now, user + nice + system, stolen, own_user + own_system, kernel)


def load_between(before: Sample, after: Sample) -> Load:
    """What others used between two samples; the work of kernel threads (loop devices, reclaim) is ours."""
    seconds = max(after.at - before.at, 1e-9)
    known, kernel = before.kernel or {}, after.kernel or {}
    ours = after.ours - before.ours + sum(now - known.get(thread, 0.0) for thread, now in kernel.items())
    others = max(0.0, after.all - before.all - ours)
    return Load(seconds, others / seconds, max(0.0, after.stolen - before.stolen) / seconds)


def wait_until_quiet(timeout: float = 20.0, window: float = 1.0) -> Load | None:
    """Wait until others leave the machine alone for a moment; the last load seen where `timeout` runs out."""
    deadline = time.monotonic() + timeout
    while True:
        before = sample()
        time.sleep(window)
        seen = load_between(before, sample())
        if max(seen.others, seen.stolen) <= LIMIT:
            return None
        if time.monotonic() > deadline:
            return seen


def _kernel_threads(tick: int) -> dict[int, float] | None:
    """Processor seconds of every kernel thread by its number. None where they are hidden, as in a container."""
    if not Path(f"/proc/{_KTHREADD}").exists():
        return None
    seconds = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry.path, "stat").read_bytes()
        except OSError:  # it has ended
            continue
        fields = stat[stat.rindex(b")") + 2 :].split()
        if int(fields[6]) & _KERNEL_THREAD:
            seconds[int(entry.name)] = (int(fields[11]) + int(fields[12])) / tick
    return seconds or None
