"""Whether this machine can run models well, and what to change: the checks behind `flashmoe doctor`."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashmoe.cache import remembered
from flashmoe.common.cgroup import processor_quota
from flashmoe.common.files import cache_folder, cache_is_kept
from flashmoe.common.machine import allowed_cores, cores, file_system, physical_cores, processor
from flashmoe.common.memory import (
    address_room,
    default_ram,
    machine_memory,
    memory_left,
    memory_limit,
    status_bytes,
)
from flashmoe.common.units import format_bytes
from flashmoe.engines.llamacpp import kernels
from flashmoe.engines.llamacpp.tested import tested_library
from flashmoe.errors import FlashMoEError, ReadError, UsageError
from flashmoe.storage.aio import KernelQueue
from flashmoe.storage.disk import rate, sample
from flashmoe.storage.reader import ExpertReader

OK, ADVICE, PROBLEM = "ok", "advice", "problem"
SIZES = (64 << 10, 512 << 10, 2 << 20, 8 << 20)  # of expert slices, from small experts to large ones
DEPTHS = (1, 4, 32)  # reads under way at once
_NO_QUEUE = "reads go through threads: io_submit is refused (raise /proc/sys/fs/aio-max-nr), or not there (an emulator)"
_SLOW = 0.5  # 1e9 bytes per second: a SATA SSD


@dataclass
class Check:
    """The result of a check. status: "ok", "advice" (works, could be better), or "problem" (does not work)."""

    name: str
    status: str
    text: str  # what is there
    change: str = ""  # what to do, where the status is not ok
    facts: dict[str, Any] = field(default_factory=dict)


def examine(place: Path) -> Iterator[Check]:
    """All checks, one by one; `place`: the model's file, or the folder that models will be in. Raises UsageError."""
    if not os.path.exists(place):
        raise UsageError(f"{place}: no such file or folder")
    checks: tuple[Callable[[], Check], ...] = (
        system, cache, library, processor_features, memory, huge_pages, lambda: drive(place),
    )  # fmt: skip
    for check in checks:
        try:
            yield check()
        except FlashMoEError as error:
            name = getattr(check, "__name__", "drive").replace("<lambda>", "drive")
            yield Check(name, PROBLEM, "does not work", str(error))


def system() -> Check:
    """Operating system, C library, Python."""
    text = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    facts = {"system": platform.system(), "release": platform.release(), "python": platform.python_version()}
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "fopencookie"):
        return Check("system", PROBLEM, text, "FlashMoE needs Linux with glibc", facts)
    return Check("system", OK, text, facts=facts)


def cache() -> Check:
    """Where compiled code and notes are kept."""
    folder = cache_folder()
    learnt = remembered.nbytes()
    facts = {"folder": str(folder), "kept": cache_is_kept(), "learnt_bytes": learnt}
    if facts["kept"]:
        text = f"compiled code and notes are kept in {folder}"
        if learnt:
            text += f"; {format_bytes(learnt)} learnt from use (flashmoe learn MODEL --forget)"
        return Check("cache", OK, text, facts=facts)
    return Check(
        "cache",
        ADVICE,
        f"no cache folder of yours can be written: {folder} is used",
        "it is lost when temporary folders are emptied: name a folder that can be written in XDG_CACHE_HOME",
        facts,
    )


def library() -> Check:
    """The llama.cpp library: found, of a known build, and tested. Raises LibraryError."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lib = tested_library()
    facts = {"path": str(lib.path), "build": lib.build.name, "known": lib.build.known, "kernels": lib.kernels}
    facts["openmp"] = lib.openmp
    text = f"{lib.build.name}, kernels {lib.kernels}, has passed the self-test with the slot pool"
    if told:
        return Check("library", ADVICE, text, str(told[0].message), facts)
    if not lib.repacks:
        change = "these kernels fail with repacked weights, which are not used: `flashmoe engine list` shows others"
        return Check("library", ADVICE, text, change, facts)
    return Check("library", OK, text, facts=facts)


def processor_features() -> Check:
    """Cores, how many of them may be used, and the instructions that llama.cpp's kernels use. Raises LibraryError."""
    lib = tested_library()
    features = lib.features
    physical, allowed, quota = physical_cores(), allowed_cores(), processor_quota()
    facts = {
        "processor": processor(),
        "cores": physical,
        "usable": allowed,
        "quota": quota,
        "threads": cores(),
        "features": features,
    }
    text = (
        f"{processor()}, {physical} cores; llama.cpp uses {', '.join(features) or 'no special instructions'}"
    )
    wanted = {"x86_64": "AVX2", "aarch64": "NEON"}.get(platform.machine())
    changes = []
    if wanted and wanted not in features:
        changes.append(f"{wanted} is missing: slow; in a virtual machine, pass the host's CPU on")
    if allowed < physical:
        changes.append(
            f"this process may use {allowed} of {physical} cores: widen its affinity (taskset, cpuset)"
        )
    if quota is not None and quota < physical:
        changes.append(
            f"its control group has a quota of {quota:.3g} of {physical} processors' time, so that it computes with "
            f"{cores()} threads: raise the quota (docker --cpus)"
        )
    if better := kernels.hint(lib):
        changes.append(better)
    return Check("processor", ADVICE if changes else OK, text, "; ".join(changes), facts)


def memory() -> Check:
    """The machine's memory, what this process may use of it, and the default budget."""
    (total, available), limit, left, room = machine_memory(), memory_limit(), memory_left(), address_room()
    facts = {
        "ram_bytes": total,
        "available_bytes": available,
        "limit_bytes": limit,
        "left_bytes": left,
        "address_bytes": room[0] if room else None,
        "default_budget_bytes": default_ram(),
    }
    text = f"{format_bytes(total)}, {format_bytes(available)} available"
    if limit < total:
        text += (
            f", at most {format_bytes(limit)} in this control group, of which {format_bytes(left)} are left"
        )
    text += f"; --ram is {format_bytes(default_ram())} by default"
    changes = []
    if not status_bytes("VmRSS"):
        changes.append(
            "/proc cannot be read: what this process has is not known, and a budget is kept by estimates only: mount it"
        )
    if room:
        changes.append(
            f"{room[1]} leaves {format_bytes(room[0])} of addresses, of which experts take as many as the model has "
            "bytes: lift it"
        )
    if left < min(available, limit) // 2:
        changes.append("others in this control group use most of it: raise its limit, or end them")
    if left < 1 << 30:
        changes.append("less than 1 GiB is available: end other programs")
    return Check("memory", ADVICE if changes else OK, text, "; ".join(changes), facts)


def huge_pages() -> Check:
    """Pages: reads into huge ones are one piece for the drive."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        chosen = re.search(r"\[(\w+)\]", setting.read_text())
    except OSError:
        chosen = None
    mode = chosen[1] if chosen else "not supported"
    facts = {"page_bytes": mmap.PAGESIZE, "transparent_huge_pages": mode}
    text = f"pages of {format_bytes(mmap.PAGESIZE)}, transparent huge pages: {mode}"
    if mode in ("always", "madvise"):
        return Check("pages", OK, text, facts=facts)
    change = f"reads cost more processor time without them: echo madvise | sudo tee {setting}"
    return Check("pages", ADVICE, text, change, facts)


def drive(place: Path) -> Check:
    """Direct reads at sizes and depths of experts. Raises ReadError."""
    kind = file_system(place) or "an unknown file system"
    facts: dict[str, Any] = {"file_system": kind}
    with ExitStack() as stack:
        try:
            path = stack.enter_context(sample(place, SIZES[-1]))
        except ReadError as error:
            return Check("drive", ADVICE, f"{kind}, not measured", str(error), facts)
        reader = stack.enter_context(closing(ExpertReader([path])))
        rates = _rates(reader)
        facts |= {
            "direct": reader.direct,
            "asynchronous": isinstance(reader._queue, KernelQueue),
            "alignment_bytes": reader.files[0].align,
        }
    if not reader.direct:
        text = f"{kind} at {place} does not offer direct reads"
        return Check("drive", ADVICE, text, "keep models on a local ext4, xfs or btrfs file system", facts)
    facts["bytes_per_second"] = {
        str(size): {str(depth): 1e9 * value for depth, value in row.items()} for size, row in rates.items()
    }
    best = max(max(row.values()) for row in rates.values())
    text = f"{kind}, direct reads of up to {best:.2f} GB/s ({ceilings(rates)})"
    if not facts["asynchronous"]:
        return Check("drive", ADVICE, text, _NO_QUEUE, facts)
    if best < _SLOW:
        return Check(
            "drive", ADVICE, text, "that is slow: keep models on an NVMe drive of this machine", facts
        )
    return Check("drive", OK, text, facts=facts)


def _rates(reader: ExpertReader) -> dict[int, dict[int, float]]:
    """1e9 bytes per second by size and depth; none where the file system refuses direct reads, also the first of them.
    Raises ReadError."""
    rates: dict[int, dict[int, float]] = {}
    for size in SIZES:
        for depth in DEPTHS:
            if not reader.direct:
                return {}
            rates.setdefault(size, {})[depth] = rate(reader, size, depth)
    return rates


def ceilings(rates: dict[int, dict[int, float]]) -> str:
    """The best rate of each size, in words."""
    return ", ".join(f"{format_bytes(size)}: {max(row.values()):.2f}" for size, row in rates.items())
