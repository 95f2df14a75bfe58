"""The tiny models themselves: small, reproducible, awkward where they mean to be, and whole again when split."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from . import ARCHITECTURES, dense, make, split


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_small_and_reproducible(name: str, tmp_path: Path) -> None:
    first = make(name, tmp_path / "a.gguf").read_bytes()
    assert first == make(name, tmp_path / "b.gguf").read_bytes()
    assert first != make(name, tmp_path / "c.gguf", seed=1).read_bytes()
    assert len(first) < 2_000_000


def test_formats_and_slices_vary(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(make("llama", tmp_path / "m.gguf"))
    experts = [t for t in reader.tensors if t.name.endswith("_exps.weight")]
    assert len({t.tensor_type for t in experts}) >= 4
    assert any(t.n_bytes // int(t.shape[2]) % 512 for t in experts)
    assert any(t.data_offset % 512 for t in experts)


def test_aligned_model_is_aligned(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(make("aligned", tmp_path / "m.gguf"))
    assert all(t.data_offset % 4096 == 0 for t in reader.tensors)


@pytest.mark.parametrize("metadata_only_first", [False, True])
def test_split_keeps_metadata_and_tensors(tmp_path: Path, metadata_only_first: bool) -> None:
    whole = gguf.GGUFReader(make("gpt-oss", tmp_path / "m.gguf"))
    paths = split(tmp_path / "m.gguf", 3, metadata_only_first=metadata_only_first)
    parts = [gguf.GGUFReader(p) for p in paths]
    assert [p.name for p in paths] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert [p.fields["split.no"].contents() for p in parts] == [0, 1, 2]
    assert {p.fields["split.count"].contents() for p in parts} == {3}
    assert {p.fields["split.tensors.count"].contents() for p in parts} == {len(whole.tensors)}
    for key in whole.fields.keys() - {"GGUF.tensor_count", "GGUF.kv_count"}:
        assert parts[0].fields[key].contents() == whole.fields[key].contents()
    tensors = [t for p in parts for t in p.tensors]
    assert (len(parts[0].tensors) == 0) == metadata_only_first
    assert [t.name for t in tensors] == [t.name for t in whole.tensors]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(tensors, whole.tensors, strict=True))


def test_dense_model_has_no_experts(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(dense(tmp_path / "m.gguf"))
    assert "llama.expert_count" not in reader.fields
    assert not any("exps" in t.name for t in reader.tensors)
