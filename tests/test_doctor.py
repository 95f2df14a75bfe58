"""`flashmoe doctor`: what it finds here, and what it says where something is wrong."""

from __future__ import annotations

import json
import os
import re
import resource
from pathlib import Path

import pytest

from flashmoe.common import machine, memory
from flashmoe.common.machine import physical_cores
from flashmoe.errors import FlashMoEWarning
from flashmoe.storage import disk
from flashmoe.storage.aio import ThreadQueue
from flashmoe.storage.direct import DirectFile
from flashmoe.tools import doctor
from tests.cli.runner import flashmoe


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file and short measurements: these tests are about words, not about speed."""
    monkeypatch.setattr(disk, "_SAMPLE_BYTES", 32 << 20)
    monkeypatch.setattr(disk, "_SECONDS", 0.001)


def test_all_checks(tmp_path: Path) -> None:
    result = flashmoe("doctor", tmp_path, "--json", "-")
    checks = {check["name"]: check for check in json.loads(result.out)}
    assert result.status == 0, checks
    assert list(checks) == ["system", "cache", "library", "processor", "memory", "pages", "drive"]
    assert checks["memory"]["facts"]["default_budget_bytes"] <= checks["memory"]["facts"]["limit_bytes"]
    assert "xllamacpp" in checks["library"]["facts"]["build"]
    if checks["drive"]["facts"]["direct"]:
        rates = checks["drive"]["facts"]["bytes_per_second"]
        assert [int(size) for size in rates] == list(doctor.SIZES)
        assert all(value > 0 for row in rates.values() for value in row.values())
    assert not list(tmp_path.iterdir())  # the file that was read is gone
    assert all(check["change"] for check in checks.values() if check["status"] != "ok")


def test_people_read_the_same(tmp_path: Path) -> None:
    result = flashmoe("doctor", tmp_path)
    assert result.status == 0
    assert [line.split()[1] for line in result.out.splitlines() if line[0] != " "] == [
        "system", "cache", "library", "processor", "memory", "pages", "drive",
    ]  # fmt: skip


def test_a_library_that_is_missing_is_a_problem(tmp_path: Path) -> None:
    result = flashmoe("doctor", tmp_path, "--json", "-", env={"FLASHMOE_LIBLLAMA": str(tmp_path)})
    assert result.status == 1
    checks = {check["name"]: check for check in json.loads(result.out)}
    assert checks["library"]["status"] == "problem"
    assert "no such library" in checks["library"]["change"]
    assert checks["memory"]["status"] != "problem"  # the rest is looked at all the same


def test_drives_that_could_be_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if DirectFile(_file(tmp_path)).direct:
        with monkeypatch.context() as patch:
            patch.setattr("flashmoe.storage.reader.open_queue", ThreadQueue)
            check = doctor.drive(tmp_path)
            assert check.status == "advice"
            assert "io_submit is refused" in check.change
        with monkeypatch.context() as patch:
            patch.setattr(doctor, "rate", lambda *_: 0.1)
            assert "that is slow" in doctor.drive(tmp_path).change
    monkeypatch.setattr(doctor, "ExpertReader", lambda files: _Buffered(files))
    assert "local" in doctor.drive(tmp_path).change


class _Buffered(doctor.ExpertReader):
    """A file system without direct reads."""

    @property
    def direct(self) -> bool:
        return False


def _file(folder: Path) -> Path:
    (folder / "f").write_bytes(bytes(4096))
    return folder / "f"


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    result = flashmoe("doctor", tmp_path / "none")
    assert result.status == 2
    assert "no such file or folder" in result.message


def test_fewer_cores_than_the_machine_has() -> None:
    if physical_cores() < 2:
        pytest.skip("one core")
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        check = doctor.processor_features()
    finally:
        os.sched_setaffinity(0, allowed)
    assert check.status == "advice"
    assert re.search(r"may use 1 of \d+ cores: widen its affinity", check.change)
    assert (check.facts["usable"], check.facts["threads"]) == (1, 1)


def test_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (doctor, machine):
        monkeypatch.setattr(module, "processor_quota", lambda: 0.5)
    check = doctor.processor_features()
    assert re.search(r"a quota of 0.5 of \d+ .* with 1 threads: raise the quota", check.change)


def test_few_addresses() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory.status_bytes("VmSize") + (1 << 30), before[1]))
    try:
        check = doctor.memory()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert check.status == "advice"
    assert re.search(r"ulimit -v leaves .* of addresses.*lift it", check.change)
    assert check.facts["default_budget_bytes"] < memory.status_bytes("VmRSS") + (1 << 30)


def test_others_in_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    _, available = memory.machine_memory()
    monkeypatch.setattr(memory, "_group_limits", lambda: iter([(available, available * 9 // 10)]))
    check = doctor.memory()
    assert re.search(r"in this control group, of which .* are left", check.text)
    assert "others in this control group use most of it" in check.change


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.warns(FlashMoEWarning, match="cannot be written"):
        check = doctor.cache()
    assert check.status == "advice"
    assert str(tmp_path) in check.text
    assert "XDG_CACHE_HOME" in check.change
