"""Files that are no model to run: each says what it is, and what to do."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from flashmoe.errors import ModelError
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.gguf import read_gguf
from tests.conftest import Tiny


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        ExpertCatalog.from_gguf(read_gguf(path))
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    return said.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.gguf", b"tjgg" + bytes(40), "before GGUF"),
        ("m.gguf", b"PK\x03\x04" + bytes(40), "PyTorch checkpoint: convert"),
        ("m.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("m.gguf", b"<!DOCTYPE html><html>404</html>", "a web page"),
        ("m.gguf", b"\x1f\x8b" + bytes(40), "unpack it"),
        ("m.safetensors", struct.pack("<Q", 40) + b'{"a": {}}' + bytes(40), "--engine transformers"),
        ("m.gguf", b"something else, of no format", "not a GGUF file"),
        ("m.gguf", b"", "not a GGUF file"),
        ("m.Q4_K_M.gguf.part2of2", bytes(64), r"join all pieces, in order (`cat ... > m.Q4_K_M.gguf`)"),
        ("m.Q6_K.gguf-split-b", bytes(64), r"(`cat ... > m.Q6_K.gguf`)"),
        ("m.gguf.incomplete", bytes(64), "has not ended"),
    ],
)
def test_no_gguf(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert said in refusal(path)


@pytest.mark.parametrize(
    ("name", "said"), [("m.gguf.part1of3", "join all pieces"), ("m.gguf.part", "not ended")]
)
def test_the_beginning_of_a_model(name: str, said: str, tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(tiny("llama").read_bytes()[:200_000])
    assert said in refusal(path)


@pytest.mark.parametrize(
    ("architecture", "kind", "said"),
    [
        ("clip", "mmproj", "--mmproj"),
        ("", "imatrix", "importance matrix"),
        ("llama", "adapter", "llama-export-lora"),
        ("llama", "vocab", "without weights"),
    ],
)
def test_gguf_files_without_a_model(architecture: str, kind: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(kind)
    writer.add_tensor("t", np.zeros(8, np.float32))
    finish(writer)
    assert said in refusal(path)


@pytest.mark.parametrize(
    ("number", "said"), [(139, "ik_llama.cpp"), (31, "Q4_0 or IQ4_NL"), (77, "newer FlashMoE")]
)
def test_formats_of_others(number: int, said: str, tiny: Tiny, tmp_path: Path) -> None:
    data = tiny("llama").read_bytes()
    name = b"blk.0.ffn_up_exps.weight"
    at = data.index(name) + len(name) + 4 + 3 * 8
    path = tmp_path / "m.gguf"
    path.write_bytes(data[:at] + struct.pack("<I", number) + data[at + 4 :])
    assert said in refusal(path)


def test_an_expert_a_tensor(tmp_path: Path) -> None:
    """Mixtral's first files."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    for expert in range(8):
        writer.add_tensor(f"blk.0.ffn_gate.{expert}.weight", np.zeros((4, 32), np.float32))
    finish(writer)
    assert "before April 2024" in refusal(path)


def test_prediction_without_its_model(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "glm4moe")
    writer.add_block_count(3)
    writer.add_uint32("glm4moe.nextn_predict_layers", 1)
    writer.add_tensor("blk.2.ffn_up_exps.weight", np.zeros((8, 4, 32), np.float32))
    writer.add_tensor("blk.2.nextn.eh_proj.weight", np.zeros((4, 8), np.float32))
    finish(writer)
    assert "give the file of the model itself" in refusal(path)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
