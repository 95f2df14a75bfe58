"""`flashmoe doctor`: what it finds here, and what it says where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
