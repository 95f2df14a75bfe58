"""Faults of a real file system (FUSE), through the kernel's asynchronous reads and through plain ones."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import flashmoe
from flashmoe.engines.base import SamplingParams
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import FlashMoEWarning, ReadError
from flashmoe.storage import aio, direct
from flashmoe.storage import reader as reader_module
from flashmoe.storage.aio import KernelQueue, ThreadQueue
from tests.conftest import Tiny
from tests.faults.disk import Disk, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def disk(tmp_path: Path, tiny: Tiny) -> Iterator[Disk]:
    with Disk(tmp_path / "disk", tiny("llama")) as mounted:
        yield mounted


@pytest.fixture(params=["kernel", "threads"])
def model(
    disk: Disk, lib: Library, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[flashmoe.Model]:
    """A model on the disk that reads an expert for almost every token."""
    monkeypatch.setattr(direct, "_direct_alignment", lambda _: (4, 512))  # FUSE takes any address
    monkeypatch.setattr(reader_module, "TIMEOUT", 0.3)
    monkeypatch.setattr(reader_module, "_LAST_LOOK", 0.2)
    if request.param == "threads":
        monkeypatch.setattr(reader_module, "open_queue", ThreadQueue)
    with flashmoe.load(disk.path, cache="1", threads=1, n_ctx=128, library=lib, prefetch="table") as loaded:
        queue = KernelQueue if request.param == "kernel" else ThreadQueue
        assert isinstance(loaded.cache.reader._queue, queue)
        yield loaded


def text_of(model: flashmoe.Model) -> str:
    return "".join(model.generate("hello world", max_tokens=8, sampling=GREEDY))


def names_what_failed(message: str, model: flashmoe.Model) -> None:
    """File, layer, expert, tensor and offset, and they belong together."""
    found = re.search(r"\(reading expert (\d+) of layer (\d+), (\S+): (\d+) bytes at (\d+)\)", message)
    assert found, message
    expert, layer, offset = (int(found[i]) for i in (1, 2, 5))
    weight = next(p for p in model.catalog.layers[layer].weights if p.tensor.name == found[3])
    assert message.startswith(f"{model.catalog.gguf.files[0]}: ")
    assert 0 <= offset - (weight.offset + expert * weight.stride) <= weight.nbytes - int(found[4])


def warnings_of(caplog: pytest.LogCaptureFixture, module: str) -> list[str]:
    """What a module has warned of, messages."""
    return [r.getMessage() for r in caplog.records if (r.name, r.levelno) == (module, logging.WARNING)]


def test_an_error_that_passes_is_only_logged(
    model: flashmoe.Model, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    expected = text_of(model)
    assert not caplog.records
    before = disk.fault(kind="error", times=3)["reads"]
    assert text_of(model) == expected
    assert disk.fault()["reads"] > before + 3
    retried = warnings_of(caplog, "flashmoe.storage.direct") + warnings_of(caplog, "flashmoe.storage.aio")
    assert len(retried) == 3
    assert all("Input/output error" in m and str(disk.path) in m and "again" in m for m in retried)


def test_what_fell_back_is_logged(
    disk: Disk, lib: Library, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without O_DIRECT, or without io_submit, threads read."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "O_DIRECT", 0)
        flashmoe.load(disk.path, cache="1", threads=1, n_ctx=128, library=lib).close()
    assert any("no direct reads (O_DIRECT)" in m for m in warnings_of(caplog, "flashmoe.storage.direct"))
    assert any("reading with threads" in m for m in warnings_of(caplog, "flashmoe.storage.aio"))
    caplog.clear()
    monkeypatch.setattr(aio, "_SYSCALLS", {})
    flashmoe.load(disk.path, cache="1", threads=1, n_ctx=128, library=lib).close()
    assert not warnings_of(caplog, "flashmoe.storage.direct")
    assert any("no io_submit" in m for m in warnings_of(caplog, "flashmoe.storage.aio"))


@pytest.mark.parametrize("where", ["everywhere", "in the last block"])
def test_direct_reads_that_are_refused(model: flashmoe.Model, disk: Disk, where: str) -> None:
    """As ZFS and some FUSE file systems do it, after a good open: the page cache's way, and it is said once."""
    expected = text_of(model)
    last = model.catalog.layers[-1].weights[-1]
    reaching = (
        0 if where == "everywhere" else last.offset + 1
    )  # the fixture's model has its last expert there
    disk.fault(kind="error", errno=errno.EINVAL, direct=True, reaching=reaching)
    with pytest.warns(FlashMoEWarning, match="refuses direct reads") as warned:
        texts = [text_of(model) for _ in range(2)]
    assert texts == [expected, expected]
    assert len(warned) == 1
    assert not model.cache.reader.direct


def test_direct_reads_that_are_refused_from_the_first_on(disk: Disk, lib: Library) -> None:
    with flashmoe.load(disk.path, cache="1", threads=1, n_ctx=128, library=lib) as loaded:
        expected = text_of(loaded)
    disk.fault(kind="error", errno=errno.EOPNOTSUPP, direct=True)
    with (
        pytest.warns(FlashMoEWarning, match="refuses direct reads"),
        flashmoe.load(disk.path, cache="1", threads=1, n_ctx=128, library=lib) as loaded,
    ):
        assert text_of(loaded) == expected


def test_an_error_that_stays_is_reported_and_goes_with_the_fault(model: flashmoe.Model, disk: Disk) -> None:
    expected = text_of(model)
    for skip in (0, 1, 7, 20):
        disk.fault(kind="error", skip=skip)
        with pytest.raises(ReadError, match=r"reading at byte \d+ failed \(Input/output error\)") as failed:
            text_of(model)
        names_what_failed(str(failed.value), model)
        disk.fault()
        assert text_of(model) == expected


def test_short_reads_are_read_to_their_end(model: flashmoe.Model, disk: Disk) -> None:
    expected = text_of(model)
    disk.fault(kind="short")
    assert text_of(model) == expected


def test_a_slow_disk_changes_nothing(model: flashmoe.Model, disk: Disk) -> None:
    expected = text_of(model)
    disk.fault(kind="slow", seconds=0.01)
    assert text_of(model) == expected
    assert model.stats["io"]["stall_share"] > 0


def test_a_prefetch_that_fails_is_read_again_on_demand(model: flashmoe.Model, disk: Disk) -> None:
    """An expert is prefetched while the disk fails, and asked for when it is sound again."""
    cache = model.cache
    absent = [e for e in range(cache.policy.residency.n_experts) if cache.policy.residency.slot_of[0, e] < 0]
    window = model.cache.pool.windows[0][0]
    disk.fault(kind="error")
    tickets = [cache.reader.prefetch(cache.pool.reads(0, absent[0], 0)[:1])]
    with pytest.raises(ReadError):
        cache.reader.wait(tickets[0])
    disk.fault()
    slot = int(cache.ensure(0, np.array([absent[0]], np.int32))[0])
    there = np.ctypeslib.as_array(
        (ctypes.c_uint8 * window.weight.nbytes).from_address(window.address + slot * window.stride)
    )
    start = window.weight.offset + absent[0] * window.weight.nbytes
    assert there.tobytes() == disk.path.read_bytes()[start : start + window.weight.nbytes]


def test_a_hanging_disk_is_reported_and_its_memory_is_left_alone(model: flashmoe.Model, disk: Disk) -> None:
    expected = text_of(model)
    disk.fault(kind="hang")
    for _ in range(3):
        with pytest.raises(ReadError, match="has not answered for") as failed:
            text_of(model)
        names_what_failed(str(failed.value), model)
    assert disk.fault()["held"]  # it answers now: late bytes arrive where nobody reads any more
    assert text_of(model) == expected
    assert not model.cache.reader._given_up


def test_closing_while_the_disk_hangs(model: flashmoe.Model, disk: Disk) -> None:
    disk.fault(kind="hang")
    with pytest.raises(ReadError, match="has not answered for"):
        text_of(model)
    model.close()
    assert reader_module._ABANDONED.pop() is model.cache.reader
    assert model.cache.reader._memory  # what the disk may still write to
    assert disk.fault()["held"]  # closing has not waited for it


def test_loading_from_a_failing_disk(disk: Disk, lib: Library) -> None:
    for skip in (3, 6):
        disk.fault(kind="error", skip=skip)
        with pytest.raises(flashmoe.FlashMoEError, match="Input/output error"):
            flashmoe.load(disk.path, cache="1", threads=1, n_ctx=128, library=lib)
    disk.fault()
    with flashmoe.load(disk.path, cache="1", threads=1, n_ctx=128, library=lib) as loaded:
        assert text_of(loaded)


def test_file_replaced_or_deleted_while_in_use(lib: Library, tiny: Tiny, tmp_path: Path) -> None:
    """A new file under the old name, or none: the open one is read on. Overwritten in place: refused."""
    path = tmp_path / "m.gguf"
    shutil.copy(tiny("llama"), path)
    with flashmoe.load(path, cache="1", threads=1, n_ctx=128, library=lib) as model:
        expected = text_of(model)
        other = tmp_path / "other"
        other.write_bytes(os.urandom(path.stat().st_size))
        os.replace(other, path)
        assert text_of(model) == expected
        path.unlink()
        assert text_of(model) == expected
    shutil.copy(tiny("llama"), path)
    with flashmoe.load(path, cache="1", threads=1, n_ctx=128, library=lib) as model:
        text_of(model)
        path.write_bytes(os.urandom(path.stat().st_size))
        with pytest.raises(ReadError, match="has changed while in use"):
            text_of(model)
