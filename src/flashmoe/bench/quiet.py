"""Whether the machine had anything else to do: processor time used by others while a measurement ran.

Spinning compute threads lose many times what another program takes, so figures of a busy machine mean nothing.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

LIMIT = 0.10  # of one core
_SLACK_SECONDS = 0.15  # clocks of different kinds are compared, and short runs must not fail on a tick or two
_KERNEL_THREAD = 0x00200000  # PF_KTHREAD
_KTHREADD = 2


@dataclass(frozen=True)
class Sample:
    """Processor seconds since the start, of all processes, of the hypervisor's other guests, and of our own."""

    at: float
    all: float
    stolen: float
    ours: float


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
    """The clocks now. Children that have ended and were waited for count as ours. Zeros where there is no /proc."""
    times = os.times()
    ours = times.user + times.system + times.children_user + times.children_system
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return Sample(time.monotonic(), ours, 0.0, ours)
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, *_ = (int(field) / tick for field in fields)
    stolen = int(fields[7]) / tick if len(fields) > 7 else 0.0
    kernel = _kernel_threads_seconds(tick)
    if (
        kernel is None
    ):  # not visible here, and their work is ours: reads, reclaim. Compare what ran outside the kernel
        own_user = times.user + times.children_user
        return Sample(time.monotonic(), user + nice, stolen, own_user)
    return Sample(time.monotonic(), user + nice + system - kernel, stolen, ours)


def load_between(before: Sample, after: Sample) -> Load:
    """What others used between two samples."""
    seconds = max(after.at - before.at, 1e-9)
    others = (after.all - before.all) - (after.ours - before.ours)
    return Load(seconds, max(0.0, others) / seconds, max(0.0, after.stolen - before.stolen) / seconds)


def wait_until_quiet(patience: float = 20.0, window: float = 1.0) -> Load | None:
    """Wait until others leave the machine alone for a moment; the last load seen where `patience` runs out."""
    deadline = time.monotonic() + patience
    while True:
        before = sample()
        time.sleep(window)
        seen = load_between(before, sample())
        if max(seen.others, seen.stolen) <= LIMIT:
            return None
        if time.monotonic() > deadline:
            return seen


def _kernel_threads_seconds(tick: int) -> float | None:
    """Processor seconds of all kernel threads: loop devices and reclaim work for us. None where they are hidden."""
    if not Path(f"/proc/{_KTHREADD}").exists():
        return None
    total, seen = 0, False
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry.path, "stat").read_bytes()
        except OSError:
            continue
        fields = stat[stat.rindex(b")") + 2 :].split()
        if int(fields[6]) & _KERNEL_THREAD:
            seen = True
            total += int(fields[11]) + int(fields[12])
    return total / tick if seen else None
