"""The GGUF parser: what the format's own package reads, and what is said of damaged files."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.errors import ModelError
from flashmoe.storage.gguf import TYPES, parse_part, read_gguf
from tests.conftest import Tiny
from tests.models import split


@pytest.mark.parametrize(
    "name", ["llama", "gpt-oss", "qwen3moe", "nvfp4", "aligned", "deepseek4", "nemotron_h_moe"]
)
def test_reads_what_the_gguf_package_reads(name: str, tiny: Tiny) -> None:
    ours, theirs = read_gguf(tiny(name)), gguf.GGUFReader(tiny(name))
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(int(n) for n in tensor.shape)
        assert info.type == tensor.tensor_type.name
        assert info.offset == tensor.data_offset
        assert info.nbytes == tensor.n_bytes
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, field in fields.items():
        assert ours.metadata[key] == field.contents(), key
    assert ours.architecture == theirs.fields["general.architecture"].contents()
    assert ours.size == tiny(name).stat().st_size


def test_type_sizes_are_those_of_the_gguf_package() -> None:
    common = {t.value: t for t in gguf.GGMLQuantizationType if t.value in TYPES}
    assert len(common) > 25
    for number, kind in common.items():
        name, block, nbytes = TYPES[number]
        assert (name, block, nbytes) == (kind.name, *gguf.GGML_QUANT_SIZES[kind])


def test_long_arrays_are_stepped_over(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("short", ["a", "bc"])
    writer.add_array("words", [f"w{i}" for i in range(5000)])
    writer.add_array("numbers", list(range(5000)))
    writer.add_uint32("after", 42)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = parse_part(path).metadata
    assert metadata["short"] == ["a", "bc"]
    assert (metadata["words"], metadata["numbers"], metadata["after"]) == (5000, 5000, 42)


def test_split_models_are_one(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny("gpt-oss").read_bytes())
    whole = read_gguf(path)
    for parts, bare in ((2, False), (4, True)):
        files = split(path, parts, metadata_only_first=bare)
        joined = read_gguf(files[0])
        assert joined.files == tuple(files)
        assert {n: (t.shape, t.type, t.nbytes) for n, t in joined.tensors.items()} == {
            n: (t.shape, t.type, t.nbytes) for n, t in whole.tensors.items()
        }
        for name, tensor in joined.tensors.items():
            original, data = whole.tensors[name], tensor.file.read_bytes()
            start = original.offset
            assert (
                data[tensor.offset : tensor.offset + tensor.nbytes]
                == path.read_bytes()[start : start + original.nbytes]
            )


def test_split_models_that_are_not_whole(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny("gpt-oss").read_bytes())
    files = split(path, 3)
    with pytest.raises(ModelError, match="part 2 of a split model; name the first"):
        read_gguf(files[1])
    renamed = files[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match="not named -00001-of-00003"):
        read_gguf(renamed)
    renamed.rename(files[0])
    content = files[2].read_bytes()
    files[2].unlink()
    with pytest.raises(ModelError, match="m-00003-of-00003.gguf: no such file"):
        read_gguf(files[0])
    files[2].write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="damaged or truncated"):
        read_gguf(files[0])
    files[2].write_bytes(files[1].read_bytes())
    with pytest.raises(ModelError, match="appears twice"):
        read_gguf(files[0])


def test_missing_folder_unreadable_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="folder"):
        read_gguf(tmp_path)
    for content in (b"", b"GGUF", b"<html>" * 100, b"\x00" * 4096):
        (tmp_path / "f.gguf").write_bytes(content)
        with pytest.raises(ModelError, match="not a GGUF file|a web page, not the file itself"):
            read_gguf(tmp_path / "f.gguf")


def test_truncated_anywhere(tiny: Tiny, tmp_path: Path) -> None:
    """At the end of every field of the header and in every tensor, a byte less is a ModelError."""
    data, part = tiny("olmoe").read_bytes(), parse_part(tiny("olmoe"))
    path = tmp_path / "m.gguf"
    ends = {4, 8, 16, 24, part.data_offset}
    ends |= {end for span in part.key_spans.values() for end in span}
    ends |= {end for t in part.tensors for end in (t.offset + 1, t.offset + t.nbytes)}
    header = data[: part.data_offset]
    for tensor in part.tensors:  # the fields of a tensor's entry: name, dimensions, type and offset
        at = header.index(struct.pack("<Q", len(tensor.name)) + tensor.name.encode()) + 8 + len(tensor.name)
        ends |= {at, at + 4, at + 4 + 8 * len(tensor.shape), at + 8 + 8 * len(tensor.shape)}
    assert len(ends) > 200
    for end in sorted(ends):
        path.write_bytes(data[: end - 1])
        with pytest.raises(ModelError) as caught:
            parse_part(path)
        assert "\n" not in str(caught.value)
    last = max(t.offset + t.nbytes for t in part.tensors)
    path.write_bytes(data[:last])
    parse_part(path)


def test_counts_that_cannot_be(tiny: Tiny, tmp_path: Path) -> None:
    data, path = bytearray(tiny("olmoe").read_bytes()), tmp_path / "m.gguf"
    for offset, value in ((8, 2**63), (16, 2**63), (8, 10**6), (16, 10**6), (24, 2**64 - 1)):
        changed = bytearray(data)
        changed[offset : offset + 8] = struct.pack("<Q", value)
        path.write_bytes(changed)
        with pytest.raises(ModelError, match="damaged or truncated"):
            parse_part(path)
    for version in (0, 1, 4, 0x03000000):
        path.write_bytes(data[:4] + struct.pack("<I", version) + data[8:])
        with pytest.raises(ModelError, match=f"version {version} is not supported"):
            parse_part(path)


def test_unknown_tensor_type_and_odd_shapes(tiny: Tiny, tmp_path: Path) -> None:
    data, path = tiny("olmoe").read_bytes(), tmp_path / "m.gguf"
    name = b"token_embd.weight"
    at = data.index(name) + len(name)  # then: dimensions (u32), 2 sizes (u64), type (u32), offset (u64)
    for changes, message in (
        ({at + 20: struct.pack("<I", 999)}, "unknown type 999"),
        ({at: struct.pack("<I", 5)}, "has 5 dimensions"),
        ({at + 4: struct.pack("<Q", 33)}, "has the shape"),
        ({at + 4: struct.pack("<Q", 0)}, "has the shape"),
        ({at + 4: struct.pack("<Q", 2**62), at + 12: struct.pack("<Q", 2**62)}, "ends at byte"),
        ({at + 24: struct.pack("<Q", 2**63)}, "ends at byte"),
    ):
        changed = bytearray(data)
        for offset, value in changes.items():
            changed[offset : offset + len(value)] = value
        path.write_bytes(changed)
        with pytest.raises(ModelError, match=message):
            parse_part(path)


@settings(max_examples=150)
@given(data=st.data())
def test_mutated_headers_neither_hang_nor_eat_memory(
    data: st.DataObject, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(tiny("gpt-oss").read_bytes())
    header = parse_part(tiny("gpt-oss")).data_offset
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, header - 1))
        new = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.sampled_from([2**64 - 1, 2**63, 2**40, 2**31, 0]).map(lambda n: struct.pack("<Q", n)),
            )
        )
        content[at : at + len(new)] = new
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        parse_part(path)
    except ModelError as error:
        assert str(path) in str(error)  # noqa: PT017 - success is fine, too
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        path.unlink()
    assert peak < 32 << 20
