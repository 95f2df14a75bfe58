"""Memory: a process keeps to its budget; tests/test_budget.py: how that becomes slots."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import peaks
from tests.cli.runner import COMMAND


class ControlGroup:
    """A memory control group (version 1 or 2) with a limit, for one process."""

    def __init__(self, folder: Path, version: int) -> None:
        self.folder, self.version = folder, version

    def limit(self, nbytes: int) -> None:
        if self.version == 2:
            (self.folder / "memory.max").write_text(str(nbytes))
            with suppress(OSError):
                (self.folder / "memory.swap.max").write_text("0")
        else:
            (self.folder / "memory.limit_in_bytes").write_text(str(nbytes))
            with suppress(OSError):
                (self.folder / "memory.memsw.limit_in_bytes").write_text(str(nbytes))

    def enter(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def oom_kills(self) -> int:
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        found = re.search(r"^oom_kill (\d+)$", (self.folder / name).read_text(), re.MULTILINE)
        return int(found[1]) if found else 0


@pytest.fixture
def control_group() -> Iterator[ControlGroup]:
    """A new memory control group, below this process's own; removed again."""
    entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    places: list[tuple[Path, int]] = []
    for _, controllers, path in entries:
        if "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            places += [(root / path.strip("/"), 1), (root, 1)]
        elif controllers == "":
            root = Path("/sys/fs/cgroup")
            places += [(root / path.strip("/"), 2), (root, 2)]
    made: ControlGroup | None = None
    reason = "there is no memory controller"
    for parent, version in places:
        folder = parent / f"flashmoe-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError as error:
            reason = str(error)
            continue
        group = ControlGroup(folder, version)
        try:
            group.limit(1 << 30)
            made = group
            break
        except OSError as error:
            reason = str(error)
            folder.rmdir()
    if made is None:
        pytest.skip(f"no right to make a memory control group ({reason})")
    try:
        yield made
    finally:
        made.folder.rmdir()


def test_process_keeps_to_its_budget(control_group: ControlGroup, demo: Path, tmp_path: Path) -> None:
    """In a control group of exactly `--ram`: the least budget that works, rounded up as its message does."""
    assert demo.is_file()
    arguments = [*COMMAND, "run", "demo", "-t", "1", "-n", "32", "-p", "The history of the lighthouse. " * 40]
    arguments += ["--temp", "2", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--seed", "1"]
    refused = subprocess.run([*arguments, "--ram", "1MiB"], capture_output=True, text=True, timeout=120)
    found = re.search(r"the smallest that works is (\d+)MiB", refused.stderr)
    assert found, refused.stderr
    limit = int(found[1]) << 20
    control_group.limit(limit)
    report = tmp_path / "report.json"
    done = subprocess.run(
        [*arguments, "--ram", f"{found[1]}MiB", "--json", str(report)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=control_group.enter,
    )
    assert done.returncode == 0, done.stderr
    assert control_group.oom_kills == 0
    figures = json.loads(report.read_text())
    assert figures["memory"]["budget_bytes"] == limit
    assert figures["memory"]["peak_bytes"] <= limit
    assert figures["cache"]["misses"] > 0
    assert figures["decode"]["tokens"] == 31


def test_gpt_oss_keeps_to_its_budget(control_group: ControlGroup, tmp_path: Path) -> None:
    """Two layers of the real model's shape, with its tables per expert and its large slots; no weights."""
    del control_group  # there is a right to make one
    peaks.write_sparse("gpt-oss-20b", tmp_path / "m.gguf", layers=2)
    found = peaks.peak(tmp_path / "m.gguf", 1000 << 20, 64, 4, step=64)
    assert found["in_group"]
    assert found["slots"] < found["experts"] == 64
    assert 0.9 * found["budget"] < found["peak"] <= found["budget"]
