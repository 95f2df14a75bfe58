"""The pool's windows hold exactly the file's bytes, whatever the alignment, the format or the number of weights."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest

from flashmoe.cache.pool import SlotPool, Window, slot_bytes, slot_layout
from flashmoe.storage import aio, direct
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.gguf import read_gguf
from flashmoe.storage.reader import ExpertReader
from tests.conftest import Tiny
from tests.models import ARCHITECTURES, split

AWKWARD = ["llama", "aligned", "gpt-oss", "nvfp4", "gemma4", "qwen3moe", "dots1", "nemotron_h_moe", "olmoe"]


@contextmanager
def pool_of(path: Path, slots_per_group: int) -> Iterator[tuple[ExpertCatalog, ExpertReader, SlotPool]]:
    catalog = ExpertCatalog.from_gguf(read_gguf(path))
    reader = ExpertReader(catalog.gguf.files)
    pool = SlotPool(catalog, [slots_per_group] * (max(catalog.groups) + 1), reader)
    try:
        yield catalog, reader, pool
    finally:
        pool.close()
        reader.close()


def in_slot(window: Window, slot: int) -> bytes:
    """What the engine's kernels see of one expert."""
    return ctypes.string_at(window.address + slot * window.stride, window.weight.nbytes)


@pytest.mark.parametrize("name", AWKWARD)
def test_every_expert_arrives_whole(name: str, tiny: Tiny) -> None:
    theirs = {t.name: t.data for t in gguf.GGUFReader(tiny(name)).tensors}
    with pool_of(tiny(name), 5) as (catalog, reader, pool):
        for index, layer in enumerate(catalog.layers):
            for first in range(0, layer.n_experts, 5):
                experts = range(first, min(first + 5, layer.n_experts))
                slots = [(expert * 3 + 1) % 5 for expert in experts]  # not in order, and each slot used again
                wanted = [pool.reads(index, e, s) for e, s in zip(experts, slots, strict=True)]
                reader.wait(reader.demand([read for reads in wanted for read in reads]))
                for expert, slot in zip(experts, slots, strict=True):
                    pool.fill_tables(index, expert, slot)
                for expert, slot in zip(experts, slots, strict=True):
                    for window in (*pool.windows[index], *pool.tables(index)):
                        original = np.ascontiguousarray(theirs[window.weight.tensor.name][expert]).tobytes()
                        assert in_slot(window, slot) == original, (window.weight.tensor.name, expert)


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "gemma4", "qwen3moe"])
def test_drives_that_want_whole_pages(name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices that do not meet the drive's alignment arrive beside their place and are moved, without a thread."""
    monkeypatch.setattr(direct, "_direct_alignment", lambda _: (4096, 4096))
    moved: list[int] = []
    memmove = aio.C.memmove

    def counted(target: int, source: int, nbytes: int) -> None:
        moved.append(target - source)
        memmove(target, source, nbytes)

    test_every_expert_arrives_whole(name, tiny)
    with pool_of(tiny(name), 5) as (catalog, reader, pool):
        if not isinstance(reader._queue, aio.KernelQueue):
            pytest.skip("no direct reads here")
        monkeypatch.setattr(aio.C, "memmove", counted)
        reader.tune(4, 4096)  # cut reads where that is possible
        for layer in range(len(catalog.layers)):
            reader.wait(reader.demand([read for slot in range(5) for read in pool.reads(layer, slot, slot)]))
        assert reader._queue._fallback is None
    assert moved
    assert all(0 < distance < 4096 for distance in moved)


def test_parts_of_a_split_model(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny("gpt-oss").read_bytes())
    theirs = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    files = split(path, 4)
    with pool_of(files[0], 2) as (catalog, reader, pool):
        assert len({p.file for layer in catalog.layers for p in layer.weights}) > 1
        for index, layer in enumerate(catalog.layers):
            reader.wait(reader.demand(pool.reads(index, layer.n_experts - 1, 1)))
            pool.fill_tables(index, layer.n_experts - 1, 1)
            for window in (*pool.windows[index], *pool.tables(index)):
                original = np.ascontiguousarray(theirs[window.weight.tensor.name][-1]).tobytes()
                assert in_slot(window, 1) == original


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("align", [1, 512, 4096])
def test_slots_and_their_slack_do_not_overlap(name: str, align: int, tiny: Tiny) -> None:
    """Reads may write up to `align` - 1 bytes before and after a slice: that must stay within its own slot."""
    catalog = ExpertCatalog.from_gguf(read_gguf(tiny(name)))
    for layer in catalog.layers:
        for weight in layer.weights:
            layout = slot_layout(weight, align)
            assert layout.stride % max(align, 32) == 0
            assert layout.shift % 32 == 0  # the kernels want aligned rows
            for expert in range(layer.n_experts):
                offset = weight.offset + expert * weight.nbytes
                head = offset % align
                tail = -(head + weight.nbytes) % align
                assert layout.shift - head >= 0
                assert layout.shift + weight.nbytes + tail <= layout.stride
    sizes = slot_bytes(catalog, align)
    assert len(sizes) == max(catalog.groups) + 1
    for layer, group in zip(catalog.layers, catalog.groups, strict=True):
        assert sizes[group] >= layer.expert_bytes + sum(t.nbytes for t in layer.tables)


def test_whole_pages_read_in_place(tiny: Tiny) -> None:
    """Slices of whole pages at page-aligned offsets need no slack."""
    catalog = ExpertCatalog.from_gguf(read_gguf(tiny("aligned")))
    weights = [p for layer in catalog.layers for p in layer.weights if p.nbytes % 4096 == 0]
    assert weights
    for weight in weights:
        assert slot_layout(weight, 4096).shift == 0
        assert slot_layout(weight, 4096).stride == weight.nbytes


def test_regions_do_not_overlap(tiny: Tiny) -> None:
    with pool_of(tiny("gemma4"), 7) as (catalog, _, pool):
        spans: dict[tuple[object, ...], tuple[int, int]] = {}
        for index, group in enumerate(catalog.groups):
            for number, window in enumerate(pool.windows[index]):
                layout = slot_layout(window.weight, max(f.align for f in pool._reader.files))
                start = window.address - layout.shift
                spans[(group, number)] = (start, start + 7 * window.stride)
            for number, window in enumerate(pool.tables(index)):
                spans[(group, number, "table")] = (window.address, window.address + 7 * window.stride)
        ordered = sorted(spans.values())
        assert all(a[1] <= b[0] for a, b in zip(ordered, ordered[1:], strict=False))


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_what_is_reserved_is_what_the_budget_counts(name: str, tiny: Tiny) -> None:
    with pool_of(tiny(name), 7) as (catalog, reader, pool):
        align = max(file.align for file in reader.files)
        assert sum(nbytes for _, nbytes in pool.regions) == 7 * sum(slot_bytes(catalog, align))
        copies = sum(rows.nbytes for tables in pool._tables for _, rows in tables)
        assert copies == catalog.table_bytes


def test_memory_is_reserved_first_and_committed_by_prefault(tiny: Tiny) -> None:
    slots = 4096  # more than the model has experts: about 80 MiB
    with pool_of(tiny("hunyuan-moe"), 2) as (catalog, reader, _):
        before = resident_bytes()
        pool = SlotPool(catalog, [slots] * (max(catalog.groups) + 1), reader)
        total = sum(size * slots for size in slot_bytes(catalog, max(f.align for f in reader.files)))
        assert total > 64 << 20
        assert resident_bytes() - before < 16 << 20
        pool.prefault()
        pool._prefault.join()
        assert total - (8 << 20) < resident_bytes() - before < total + (2 << 20)
        pool.close()


def test_close_stops_prefaulting(tiny: Tiny) -> None:
    with pool_of(tiny("olmoe"), 4) as (_, _, pool):
        pool.prefault()
        pool.close()
        assert pool._prefault._thread is not None
        assert not pool._prefault._thread.is_alive()


def test_what_is_placed_starts_on_a_cache_line_and_has_no_slack(tiny: Tiny) -> None:
    catalog = ExpertCatalog.from_gguf(read_gguf(tiny("olmoe")))
    moved: list[tuple[int, int]] = []
    name = catalog.layers[0].weights[0].tensor.name
    placed = catalog.placed({name: lambda source, slot: moved.append((source, slot))})
    weights = [p for layer in placed.layers for p in layer.weights if p.place]
    assert [p.tensor.name for p in weights] == [name]
    assert placed.largest_placed == weights[0].nbytes
    assert catalog.largest_placed == 0
    layout = slot_layout(weights[0], 4096)
    assert (layout.shift, layout.stride % 64) == (0, 0)
    assert weights[0].nbytes <= layout.stride < weights[0].nbytes + 64
    reader = ExpertReader(placed.gguf.files)
    reader.reserve_bounce_buffers(placed.largest_placed)
    pool = SlotPool(placed, [3] * (max(placed.groups) + 1), reader)
    reader.wait(reader.demand(pool.reads(0, 2, 1)))
    window = pool.windows[0][0]
    assert [slot for _, slot in moved] == [window.address + window.stride]
    pool.close()
    reader.close()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what a mapping is")
def test_forked_processes_do_not_get_the_pool(tiny: Tiny) -> None:
    """`dc`: not copied on fork. A map is what begins before the region and ends after its begin."""
    with pool_of(tiny("gpt-oss"), 5) as (_, _, pool):
        flags: dict[int, list[str]] = {}
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split()[0]:
                first, end = (int(number, 16) for number in line.split()[0].split("-"))
            elif line.startswith("VmFlags:"):
                flags.update({address: line.split() for address, _ in pool.regions if first <= address < end})
        assert flags.keys() == {address for address, _ in pool.regions}
        assert all("dc" in found for found in flags.values())
