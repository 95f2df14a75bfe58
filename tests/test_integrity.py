"""`flashmoe verify` and `--verify`: a flipped bit in an expert is found, whoever reads it first, in every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmoe
from flashmoe.engines.base import SamplingParams
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import FlashMoEError, ModelError, ReadError, UsageError
from flashmoe.runtime.layout import PLAIN, REPACKED
from flashmoe.storage import checksums as checksums_module
from flashmoe.storage import reader as reader_module
from flashmoe.storage.aio import KernelQueue, ThreadQueue
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.checksums import Slice, checksums_path, find_checksums, slices_of
from flashmoe.storage.gguf import read_gguf
from flashmoe.storage.pack import find_pack
from flashmoe.tools.packing import make_pack
from tests.cli.runner import flashmoe as command
from tests.conftest import Tiny
from tests.models import split

GREEDY = SamplingParams(temperature=0)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of a model with several kinds of quantisation."""
    return Path(shutil.copy(tiny("olmoe"), tmp_path / "m.gguf"))


def catalog_of(path: Path) -> ExpertCatalog:
    return ExpertCatalog.from_gguf(read_gguf(path))


def flip(path: Path, place: Slice, bit: int = 0) -> None:
    """Change one bit of an expert, and nothing else of the file's."""
    with open(path, "r+b") as file:
        file.seek(place.offset + bit // 8 % place.nbytes)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1 << bit % 8]))


def pick(path: Path, tensor: str, expert: int) -> Slice:
    return next(s for s in slices_of(catalog_of(path)) if (s.tensor, s.expert) == (tensor, expert))


def used(path: Path, lib: Library) -> int:
    """An expert of the first layer that the prompt's last token is routed to."""
    with flashmoe.load(path, cache="100%", threads=1, n_ctx=64, trace=True, library=lib) as loaded:
        list(loaded.generate(PROMPT, max_tokens=2, sampling=GREEDY))
        assert loaded.recorder
        return int(loaded.recorder.trace().expert_ids[len(PROMPT) - 1, 0, 0])


def test_checksums_are_taken_once_and_compared_from_then_on(model: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    first = flashmoe.verify(model, lambda *progress: seen.append(progress))
    assert (first.written, first.damaged, first.pack) == (True, (), None)
    assert first.checksums == checksums_path(read_gguf(model)) == model.with_suffix(".flashsums")
    assert seen[-1] == ("verify", first.read_bytes, first.read_bytes)
    assert first.read_bytes == catalog_of(model).expert_bytes
    before = first.checksums.read_bytes()
    second = flashmoe.verify(model)
    assert (second.written, second.damaged) == (False, ())
    assert first.checksums.read_bytes() == before


def test_any_flipped_bit_is_found_and_named(model: Path) -> None:
    flashmoe.verify(model)
    places = list(slices_of(catalog_of(model)))
    layers = {p.tensor.name: i for i, layer in enumerate(catalog_of(model).layers) for p in layer.weights}

    @settings(max_examples=20)
    @given(place=st.sampled_from(places), bit=st.integers(0, 1 << 20))
    def one(place: Slice, bit: int) -> None:
        flip(model, place, bit)
        try:
            found = flashmoe.verify(model).damaged
        finally:
            flip(model, place, bit)
        assert found == ((layers[place.tensor], place.expert, place.tensor),)

    one()
    assert flashmoe.verify(model).damaged == ()


def test_command(model: Path) -> None:
    result = command("verify", model)
    assert result.status == 0
    assert "m.flashsums: checksums of " in result.message
    result = command("verify", model, "--json", "-", "-q")
    assert json.loads(result.out)["damaged"] == []
    assert "as they were" in command("verify", model).message
    flip(model, pick(model, "blk.1.ffn_up_exps.weight", 3))
    result = command("verify", model, "--json", "-")
    assert result.status == 1
    assert json.loads(result.out)["damaged"] == [
        {"layer": 1, "expert": 3, "tensor": "blk.1.ffn_up_exps.weight"}
    ]
    assert "m.gguf: expert 3 of layer 1 (blk.1.ffn_up_exps.weight) is not what it was" in result.message


@pytest.mark.parametrize("queue", [KernelQueue, ThreadQueue])
@pytest.mark.parametrize("layout", [PLAIN, REPACKED])
def test_a_flipped_bit_is_one_clear_error_and_others_go_on(
    layout: str, queue: type, model: Path, lib: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    flashmoe.verify(model)
    expert = used(model, lib)
    tensor = "blk.0.ffn_up_exps.weight"
    flip(model, pick(model, tensor, expert))
    monkeypatch.setattr(reader_module, "open_queue", queue)
    with flashmoe.load(
        model, cache="1", threads=1, n_ctx=64, layout=layout, verify=True, library=lib
    ) as loaded:
        for _ in range(2):  # the expert stays absent
            with pytest.raises(
                ReadError, match=rf"m\.gguf: expert {expert} of layer 0 \({tensor}\) is damaged"
            ):
                list(loaded.generate(PROMPT, max_tokens=2, sampling=GREEDY))
        other = next(e for e in range(loaded.catalog.n_experts) if e != expert)
        loaded.cache.ensure(0, np.array([other], np.int32))
        with pytest.raises(ReadError):
            loaded.cache.ensure(0, np.array([expert], np.int32))


@pytest.mark.parametrize("layout", [PLAIN, REPACKED])
def test_a_sound_model_gives_the_same_text_and_every_slice_is_hashed_once(
    layout: str, model: Path, lib: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    flashmoe.verify(model)
    options = {"cache": "1", "threads": 1, "n_ctx": 64, "layout": layout, "library": lib}
    hashed: list[int] = []
    whole = checksums_module.checksum
    monkeypatch.setattr(checksums_module, "checksum", lambda a, n: hashed.append(n) or whole(a, n))
    with flashmoe.load(model, **options) as loaded:
        expected = list(loaded.generate(PROMPT, max_tokens=8, sampling=GREEDY))
    assert not hashed
    with flashmoe.load(model, verify=True, **options) as loaded:
        assert list(loaded.generate(PROMPT, max_tokens=8, sampling=GREEDY)) == expected
        once = len(hashed)
        assert 0 < once <= len(list(slices_of(loaded.catalog)))
        assert list(loaded.generate(PROMPT, max_tokens=8, sampling=GREEDY)) == expected
        assert len(hashed) - once < once / 2  # by far most were seen before


def test_a_prefetched_expert_is_checked(demo: Path, tmp_path: Path, lib: Library) -> None:
    """What it read is dropped; whoever asks for the expert gets the error."""
    path = Path(shutil.copy(demo, tmp_path / "m.gguf"))
    flashmoe.verify(path)
    layer = catalog_of(path).layers[1]
    flip(path, pick(path, layer.weights[-1].tensor.name, 5))
    with flashmoe.load(path, cache="50%", threads=1, n_ctx=64, verify=True, library=lib) as loaded:
        cache = loaded.cache
        cache.prefetch(1, [4, 5])
        staged = cache.staging._staged[1]
        while not all(entry.complete for entry in staged.values()):
            cache.reader.poll()
        assert (staged[4].failed, staged[5].failed) == (False, True)
        cache.ensure(1, np.array([4], np.int32))
        with pytest.raises(ReadError, match="expert 5 of layer 1"):
            cache.ensure(1, np.array([5], np.int32))
        assert cache.policy.residency.slot_of[1, 5] < 0


def test_reads_in_pieces_are_whole_again_where_they_are_checked(model: Path) -> None:
    flashmoe.verify(model)
    catalog = catalog_of(model)
    checksums = find_checksums(catalog)
    assert checksums
    reader = reader_module.ExpertReader([model])
    reader.tune(4, 512)
    reader.check(checksums_module.FirstReads(catalog, [model], checksums))
    place = pick(model, "blk.0.ffn_up_exps.weight", 2)
    memory = np.zeros(place.nbytes + 8192, np.uint8)
    read = reader_module.Read(0, place.offset, place.nbytes, memory.ctypes.data + 4096)
    assert reader.demand([read]).pending == 1
    flip(model, place)
    with pytest.raises(ReadError):
        reader.wait(reader.demand([read]))
    reader.close()


@pytest.fixture
def packed(model: Path, lib: Library, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("flashmoe.tools.packing.tested_library", lambda: lib)
    try:
        make_pack(model)
    except ModelError:
        pytest.skip("this processor repacks nothing")
    return model


def test_packs_are_checked_by_their_own_sums(packed: Path, lib: Library) -> None:
    catalog = catalog_of(packed)
    flashmoe.verify(packed)
    pack = find_pack(catalog)
    assert pack
    layer, weight = next(
        (i, p) for i, x in enumerate(catalog.layers) for p in x.weights if p.tensor.name in pack.weights
    )
    tensor = weight.tensor.name
    offset, stride = pack.weights[tensor]
    flip(pack.path, Slice(tensor, 5, 0, offset + 5 * stride, weight.nbytes))
    verdict = flashmoe.verify(packed)
    assert verdict.damaged == ()
    assert verdict.pack_damaged == ((layer, 5, tensor),)
    result = command("verify", packed)
    assert result.status == 1
    assert f"m.flashpack: expert 5 of layer {layer} ({tensor}) is not what it was" in result.message
    with flashmoe.load(packed, cache="50%", threads=1, n_ctx=64, verify=True, library=lib) as loaded:
        loaded.cache.ensure(layer, np.array([4], np.int32))
        with pytest.raises(
            ReadError, match=r"m\.flashpack: expert 5 of .* make it again with `flashmoe pack"
        ):
            loaded.cache.ensure(layer, np.array([5], np.int32))


def test_split_models(model: Path, lib: Library) -> None:
    parts = split(model, 3)
    flashmoe.verify(parts[0])
    place = pick(parts[0], "blk.1.ffn_up_exps.weight", 3)
    flip(parts[place.file], place)
    assert flashmoe.verify(parts[0]).damaged == ((1, 3, place.tensor),)
    with (
        flashmoe.load(parts[0], cache="50%", threads=1, n_ctx=64, verify=True, library=lib) as loaded,
        pytest.raises(ReadError, match=rf"{parts[place.file].name}: expert 3 of layer 1"),
    ):
        loaded.cache.ensure(1, np.array([3], np.int32))


def test_without_checksums(model: Path, lib: Library) -> None:
    with pytest.raises(UsageError, match=r"m\.gguf: no checksums .* `flashmoe verify MODEL`"):
        flashmoe.load(model, cache="50%", verify=True, library=lib)


def test_checksums_of_another_model_are_refused(model: Path, tiny: Tiny, lib: Library) -> None:
    flashmoe.verify(model)
    shutil.copy(tiny("dots1"), model)
    for use in (
        lambda: flashmoe.verify(model),
        lambda: flashmoe.load(model, cache="1", verify=True, library=lib),
    ):
        with pytest.raises(ModelError, match=r"m\.flashsums: of another model than m\.gguf; delete it"):
            use()


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8 + b"{}"])
def test_damaged_checksums(content: bytes, model: Path) -> None:
    checksums_path(read_gguf(model)).write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.flashsums: damaged; delete it"):
        flashmoe.verify(model)


def test_checksums_that_cannot_be_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums_module, "write_atomically", full)
    with pytest.raises(FlashMoEError, match=r"m\.flashsums: cannot be written \(No space left"):
        flashmoe.verify(model)
