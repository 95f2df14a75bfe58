"""Repacked layouts: in slots and from a pack file; stock llama.cpp decides what is right."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import flashmoe
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.repack import placed, repacks_slice_by_slice
from flashmoe.errors import FlashMoEError, LibraryError, ModelError, UsageError
from flashmoe.runtime.layout import AUTO, PACKED, PLAIN, REPACKED, choose_layout
from flashmoe.storage import pack as pack_module
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.gguf import read_gguf
from flashmoe.storage.pack import find_pack, pack_path
from flashmoe.tools.packing import make_pack
from tests.conftest import Tiny
from tests.engines.reference import CONTEXT, Reference, evaluate, prompt
from tests.models import split

MIXED = "olmoe"  # some of its weights are repacked by the processors that repack at all, some are not


def catalog_of(path: Path) -> ExpertCatalog:
    return ExpertCatalog.from_gguf(read_gguf(path))


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path, lib: Library) -> Path:
    """A copy of a model that this processor repacks in part."""
    path = Path(shutil.copy(tiny(MIXED), tmp_path / "m.gguf"))
    with placed(lib, catalog_of(path)) as catalog:
        if not catalog.largest_placed:
            pytest.skip("this processor repacks nothing")
    return path


@pytest.fixture
def library(lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing takes the installed library without proving it."""
    monkeypatch.setattr("flashmoe.tools.packing.tested_library", lambda: lib)


def run(path: Path, lib: Library, cache: str, layout: str) -> tuple[np.ndarray, str]:
    """Logits, and the layout that the report names; equal to the stock ones of layout REPACKED."""
    with flashmoe.load(
        path, cache=cache, threads=1, n_ctx=CONTEXT, all_logits=True, layout=layout, library=lib
    ) as pooled:
        reference = Reference(lib, path, REPACKED)
        expected = reference.run(pooled.engine.n_ubatch, 1)
        reference.close()
        tokens = prompt(expected.logits.shape[1])
        got = evaluate(pooled.engine, tokens, pooled.engine.n_ubatch, expected.decoded)
        assert np.array_equal(got.logits.view(np.int32), expected.logits.view(np.int32))
        return got.logits, str(pooled.stats["layout"])


def test_slices_are_repacked_as_the_whole_is(lib: Library) -> None:
    assert repacks_slice_by_slice(lib)


def test_repacked_kernels_are_not_the_plain_ones(lib: Library, tiny: Tiny) -> None:
    """Else equality with the repacking stock engine would show nothing: its results differ in the last bits."""
    plain, repacked = (Reference(lib, tiny("qwen3moe"), layout) for layout in (PLAIN, REPACKED))
    differ = not np.array_equal(plain.run(1, 1).logits, repacked.run(1, 1).logits)
    plain.close()
    repacked.close()
    if not differ:
        pytest.skip("this processor repacks nothing in this model")
    got, layout = run(tiny("qwen3moe"), lib, "1", REPACKED)
    assert layout == REPACKED
    with flashmoe.load(
        tiny("qwen3moe"), cache="1", threads=1, n_ctx=CONTEXT, all_logits=True, layout=PLAIN, library=lib
    ) as model:
        tokens = prompt(got.shape[1])
        assert not np.array_equal(evaluate(model.engine, tokens, 1).logits, got)


def test_auto_repacks_where_most_experts_stay(tiny: Tiny) -> None:
    catalog = catalog_of(tiny(MIXED))
    assert choose_layout(AUTO, catalog, 1.0, packed=False) == REPACKED
    assert choose_layout(AUTO, catalog, 0.25, packed=False) == PLAIN
    assert choose_layout(AUTO, catalog, 0.25, packed=True) == REPACKED
    assert choose_layout(PLAIN, catalog, 1.0, packed=True) == PLAIN
    assert choose_layout(REPACKED, catalog, 0.25, packed=False) == REPACKED


def test_kernels_that_crash_with_repacked_weights(
    model: Path, lib: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a pack file does not lead to them; who asks for them is told."""
    monkeypatch.setattr("flashmoe.tools.packing.tested_library", lambda: lib)
    make_pack(model)
    monkeypatch.setattr(lib, "repacks", False)
    with flashmoe.load(model, cache="100%", n_ctx=CONTEXT, threads=1, library=lib) as loaded:
        assert loaded.stats["layout"] == PLAIN
        assert not any(weight.place for layer in loaded.catalog.layers for weight in layer.weights)
    with pytest.raises(LibraryError, match="fail with repacked weights .* use --layout plain"):
        flashmoe.load(model, cache="100%", layout=REPACKED, library=lib)
    with pytest.raises(LibraryError, match="fail with repacked weights"):
        make_pack(model)


def test_experts_picked_twice_per_token_are_never_repacked(tiny: Tiny, lib: Library, library: None) -> None:
    """llama.cpp's repacked kernels write over a token's rows then: its own results change with the micro-batch."""
    path = tiny("grovemoe")
    assert choose_layout(AUTO, catalog_of(path), 1.0, packed=False) == PLAIN
    with pytest.raises(ModelError, match="wrong results for this architecture .* --layout plain"):
        flashmoe.load(path, cache="100%", layout=REPACKED, library=lib)
    with pytest.raises(ModelError, match="wrong results"):
        make_pack(path)
    with flashmoe.load(path, cache="100%", n_ctx=CONTEXT, threads=1, library=lib) as model:
        assert model.stats["layout"] == PLAIN


def test_unknown_layout(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match="unknown layout 'fast': choose from auto, plain, repacked"):
        flashmoe.load(tiny(MIXED), layout="fast")


@pytest.mark.parametrize("cache", ["1", "60%", "100%"])
def test_pack_is_used_and_exact(cache: str, model: Path, lib: Library, library: None) -> None:
    pack, fresh = make_pack(model)
    assert fresh
    assert pack.path == model.with_suffix(".flashpack")
    assert pack.path.stat().st_size == pack.size
    before = model.read_bytes()
    _, layout = run(model, lib, cache, AUTO)
    assert layout == PACKED
    assert model.read_bytes() == before
    again, fresh = make_pack(model)
    assert (again, fresh) == (pack, False)
    with flashmoe.load(model, cache=cache, n_ctx=CONTEXT, threads=1, layout=PLAIN, library=lib) as plain:
        assert plain.stats["layout"] == PLAIN


def test_reads_of_a_pack_are_not_repacked_again(model: Path, lib: Library, library: None) -> None:
    make_pack(model)
    with flashmoe.load(model, cache="1", n_ctx=CONTEXT, threads=1, library=lib) as loaded:
        weights = [weight for layer in loaded.catalog.layers for weight in layer.weights]
        assert not any(weight.place for weight in weights)
        assert {weight.file for weight in weights} == {0, 1}  # what is not repacked stays in the model


@pytest.mark.parametrize("parts", [2, 4])
def test_pack_of_a_split_model(parts: int, model: Path, lib: Library, library: None) -> None:
    files = split(model, parts)
    pack, _ = make_pack(files[0])
    assert pack.path == pack_path(read_gguf(files[0]))
    assert run(files[0], lib, "60%", AUTO)[1] == PACKED


def test_pack_of_another_processor_is_refused_and_made_again(
    model: Path, lib: Library, library: None
) -> None:
    pack, _ = make_pack(model)
    data = bytearray(pack.path.read_bytes())
    offset, _ = min(pack.weights.values())
    data[offset : offset + 64] = data[
        offset + 64 : offset + 128
    ]  # the first expert is interleaved in another way
    pack.path.write_bytes(data)
    for layout in (AUTO, REPACKED):
        with pytest.raises(ModelError, match="made for another processor, .* `flashmoe pack MODEL`"):
            flashmoe.load(model, cache="100%", layout=layout, library=lib)
    flashmoe.load(model, cache="100%", layout=PLAIN, library=lib).close()
    assert make_pack(model)[1]
    assert run(model, lib, "100%", AUTO)[1] == PACKED


def test_pack_of_another_model_is_refused(model: Path, tiny: Tiny, lib: Library, library: None) -> None:
    pack, _ = make_pack(model)
    shutil.copy(tiny("dots1"), model)
    with pytest.raises(ModelError, match=r"made from another model than m\.gguf"):
        flashmoe.load(model, cache="100%", library=lib)
    assert pack.path.exists()


def test_pack_of_the_same_model_with_other_weights_is_refused(
    model: Path, lib: Library, library: None
) -> None:
    make_pack(model)
    weight = next(p for p in catalog_of(model).layers[0].weights)
    data = bytearray(model.read_bytes())
    # as after fine-tuning: header and size are equal
    data[weight.offset : weight.offset + weight.nbytes] = bytes(weight.nbytes)
    model.write_bytes(data)
    with pytest.raises(ModelError, match="another processor|another model"):
        flashmoe.load(model, cache="100%", library=lib)


def damage(data: bytes) -> Iterator[bytes]:
    length = struct.unpack_from("<I", data, 16)[0]
    header = json.loads(data[20 : 20 + length])
    yield b""
    yield data[:18]
    yield b"x" + data[1:]
    yield data[:-1]
    yield data[:20] + b"[" + data[21:]
    yield data[:20] + bytes(length) + data[20 + length :]
    for change in ({"planes": 1}, {"source": None}, {"planes": []}):
        text = json.dumps({**header, **change}).encode()
        yield data[:16] + struct.pack("<I", len(text)) + text + data[20 + length :]


def test_damaged_packs_are_refused(model: Path, lib: Library, library: None) -> None:
    path = make_pack(model)[0].path
    whole = path.read_bytes()
    for data in damage(whole):
        path.write_bytes(data)
        with pytest.raises(ModelError, match=r"m\.flashpack: (damaged|made from another)"):
            flashmoe.load(model, cache="100%", library=lib)
    assert make_pack(model)[1]
    assert path.read_bytes() == whole


def test_any_damaged_expert_is_found_by_its_checksum(model: Path, library: None) -> None:
    pack, _ = make_pack(model)
    whole = pack.path.read_bytes()
    catalog = catalog_of(model)
    done: list[int] = []
    assert pack.damaged(catalog, done.append) == []
    assert done == sorted(done)
    for weight, expert, offset in list(pack_module._slices(catalog, pack))[::7]:
        data = bytearray(whole)
        data[offset + 7 * expert % weight.nbytes] ^= 1
        pack.path.write_bytes(data)
        assert pack.damaged(catalog, lambda _: None) == [(weight.tensor.name, expert)]


def test_nothing_to_pack(tiny: Tiny, tmp_path: Path, library: None) -> None:
    path = Path(shutil.copy(tiny("nvfp4"), tmp_path / "m.gguf"))
    with pytest.raises(ModelError, match="nothing to pack"):
        make_pack(path)
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_interrupted_packing_leaves_nothing_and_keeps_the_old_pack(model: Path, library: None) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        assert stage == "pack"
        assert 0 < done < total
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_pack(model, stop)
    assert [path.name for path in model.parent.iterdir()] == ["m.gguf"]
    pack, _ = make_pack(model)
    data = pack.path.read_bytes()[:-1]
    pack.path.write_bytes(data)
    with pytest.raises(KeyboardInterrupt):
        make_pack(model, stop)
    assert pack.path.read_bytes() == data


def test_no_room(model: Path, library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(FlashMoEError, match=r"m\.flashpack: needs .* of disk space: make room"):
        make_pack(model)


def test_folder_that_cannot_be_written(model: Path, library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pack_module.tempfile, "mkstemp", refuse)
    with pytest.raises(FlashMoEError, match="cannot be written .* a folder where you may write"):
        make_pack(model)


def test_pack_lies_behind_pages(model: Path, library: None) -> None:
    """Direct reads want whole pages; an expert's weights are neighbours."""
    pack, _ = make_pack(model)
    for layer in catalog_of(model).layers:
        weights = [p for p in layer.weights if p.tensor.name in pack.weights]
        end = None
        for weight in weights:
            offset, stride = pack.weights[weight.tensor.name]
            assert offset % 4096 == stride % 4096 == 0
            assert end in (None, offset)
            end = offset + -(-weight.nbytes // 4096) * 4096
    assert find_pack(catalog_of(model)) == pack
