"""Whether this machine can run models well, and what to change: the checks behind `flashmoe doctor`."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from flashmoe.common.machine import cores, file_system, processor
from flashmoe.common.memory import default_ram, memory_limit
from flashmoe.common.units import format_bytes
from flashmoe.engines.llamacpp.abi import known_builds
from flashmoe.engines.llamacpp.library import find_library, open_library
from flashmoe.engines.llamacpp.tested import self_test
from flashmoe.errors import FlashMoEError, UsageError
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
    """What was looked at. status: "ok", "advice" (works, could be better), or "problem" (does not work)."""

    name: str
    status: str
    text: str  # what is there
    change: str = ""  # what to do, where the status is not ok
    facts: dict[str, Any] = field(default_factory=dict)


def examine(place: Path) -> Iterator[Check]:
    """All checks, one by one; `place`: the model's file, or the folder that models will be in. Raises UsageError."""
    if not place.exists():
        raise UsageError(f"{place}: no such file or folder")
    checks: tuple[Callable[[], Check], ...] = (
        system, library, processor_features, memory, huge_pages, lambda: drive(place),
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


def library() -> Check:
    """The llama.cpp library: found, of a known build or like one, and tested. Raises LibraryError."""
    path = find_library()
    lib = open_library(path)
    self_test(path)
    facts = {"path": str(path), "build": lib.build.name, "known": lib.build.known, "openmp": lib.openmp}
    text = f"{lib.build.name}, has passed the self-test with the slot pool"
    if not lib.build.known:
        advice = f"not a build that FlashMoE knows: where it fails, install one of {known_builds()}"
        return Check("library", ADVICE, text, advice, facts)
    return Check("library", OK, text, facts=facts)


def processor_features() -> Check:
    """Cores, and the instructions that llama.cpp's kernels want. Raises LibraryError."""
    line = open_library(find_library()).llama_print_system_info().decode(errors="replace")
    features = sorted({name for name, on in re.findall(r"(\w+) = (\d+)", line) if on != "0"})
    physical = cores()
    usable = len(os.sched_getaffinity(0))
    facts = {"processor": processor(), "cores": physical, "usable": usable, "features": features}
    text = (
        f"{processor()}, {physical} cores; llama.cpp uses {', '.join(features) or 'no special instructions'}"
    )
    wanted = {"x86_64": "AVX2", "aarch64": "NEON"}.get(platform.machine())
    if wanted and wanted not in features:
        return Check(
            "processor",
            ADVICE,
            text,
            f"{wanted} is missing: slow; in a virtual machine, pass the host's CPU on",
            facts,
        )
    if usable < physical:
        return Check("processor", ADVICE, text, f"this process may use {usable} of {physical} cores", facts)
    return Check("processor", OK, text, facts=facts)


def memory() -> Check:
    """What there is, what this process may use, and the default budget."""
    machine, limit = psutil.virtual_memory(), memory_limit()
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    facts = {
        "ram_bytes": machine.total,
        "available_bytes": machine.available,
        "limit_bytes": limit,
        "default_budget_bytes": default_ram(),
    }
    text = f"{format_bytes(machine.total)}, {format_bytes(machine.available)} available"
    if limit < machine.total:
        text += f", at most {format_bytes(limit)} in this control group"
    text += f"; --ram is {format_bytes(default_ram())} by default"
    if address_space != resource.RLIM_INFINITY:
        return Check(
            "memory", ADVICE, text, "addresses are limited (ulimit -v): the pool may be refused", facts
        )
    if min(machine.available, limit) < 1 << 30:
        return Check("memory", ADVICE, text, "less than 1 GiB is available: end other programs", facts)
    return Check("memory", OK, text, facts=facts)


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
    with sample(place) as path:
        kind = file_system(place)
        reader = ExpertReader([path])
        try:
            facts: dict[str, Any] = {
                "file_system": kind,
                "direct": reader.direct,
                "asynchronous": isinstance(reader._queue, KernelQueue),
                "alignment_bytes": reader.files[0].align,
            }
            if not reader.direct:
                text = f"{kind} at {place} does not offer direct reads"
                return Check(
                    "drive", ADVICE, text, "keep models on a local ext4, xfs or btrfs file system", facts
                )
            rates = {size: {depth: rate(reader, size, depth) for depth in DEPTHS} for size in SIZES}
        finally:
            reader.close()
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


def ceilings(rates: dict[int, dict[int, float]]) -> str:
    """The best rate of each size, in words."""
    return ", ".join(f"{format_bytes(size)}: {max(row.values()):.2f}" for size, row in rates.items())
