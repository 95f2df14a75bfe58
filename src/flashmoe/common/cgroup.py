"""The control groups that this process is in, of either version, and what they let it use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_GROUPS, _MOUNTS = "/proc/self/cgroup", "/proc/self/mountinfo"


def groups(controller: str) -> Iterator[tuple[int, Path]]:
    """The folders that limit a controller ("cpu", "memory") for this process: version and folder, its own group's
    first, then those around it."""
    with suppress(OSError, ValueError):
        for line in Path(_GROUPS).read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            version = 1 if controllers else 2
            root, within = _mounted(version, controller)
            own = path.strip("/")
            if within and (own + "/").startswith(within + "/"):
                own = own[len(within) :].strip("/")
            if ".." in own.split("/"):  # its own is outside of the name space
                own = ""
            for folder in ((place := root / own), *place.parents):
                yield version, folder
                if folder == root:
                    break


def _mounted(version: int, controller: str) -> tuple[Path, str]:
    """Where a hierarchy is mounted, and which of its groups is there: a container may see but its own."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path(_MOUNTS).read_text().splitlines():
            place, _, kind = line.partition(" - ")
            fields, (fstype, _, options) = place.split(), kind.split(maxsplit=2)
            wanted = fstype == "cgroup2" if version == 2 else controller in options.split(",")
            if wanted and fstype.startswith("cgroup"):
                return Path(fields[4]), fields[3].strip("/")
    return (_ROOT if version == 2 else _ROOT / controller), ""


def processor_quota() -> float | None:
    """Processors' time per time that this process and those in its groups may use together; None without a limit."""
    shares = []
    for version, folder in groups("cpu"):
        with suppress(OSError, ValueError, IndexError, ZeroDivisionError):
            if version == 2:
                most, period = (folder / "cpu.max").read_text().split()
            else:
                most = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            if most != "max" and int(most) > 0:
                shares.append(int(most) / int(period))
    return min(shares, default=None)
