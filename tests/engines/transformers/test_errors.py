"""Users' mistakes get one clear line."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
import transformers

import flashmoe
from flashmoe.cli import main
from flashmoe.engines.transformers.library import quiet
from flashmoe.errors import FlashMoEError, FlashMoEWarning, LibraryError, ModelError, UsageError
from flashmoe.storage.checkpoint import INDEX, SINGLE, read_checkpoint
from flashmoe.storage.hub import resolve, resolve_checkpoint
from tests.engines.transformers.conftest import Checkpoints
from tests.engines.transformers.models import make_checkpoint


@pytest.fixture
def copy(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "copy"))


def load(folder: Path | str, **options: object) -> None:
    flashmoe.load(folder, engine="transformers", **({"cache": "50%", "threads": 1} | options)).close()  # type: ignore[arg-type]


def test_dense_model(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=32
    )
    with quiet():
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"a dense model \(llama\)"):
        load(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    make_checkpoint("olmoe", tmp_path, torch.bfloat16, max_shard_size="60KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=f"{gone.name}: is missing, {INDEX} names it"):
        load(tmp_path)


def test_truncated_file(copy: Path) -> None:
    data = (copy / SINGLE).read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        (copy / SINGLE).write_bytes(data[:size])
        with pytest.raises(ModelError, match=r"model\.safetensors: damaged or truncated"):
            load(copy)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4000, 4004]}}',
    ],
)
def test_damaged_header(copy: Path, header: bytes) -> None:
    (copy / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(ModelError, match="damaged or truncated"):
        load(copy)


def test_missing_experts(copy: Path) -> None:
    """An index that leaves tensors out, and a config that asks for more of them."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ModelError, match="are missing"):
        load(copy)
    (copy / "config.json").write_text(json.dumps(config | {"num_experts": 14}))
    with pytest.raises(ModelError, match="12 tensors of 14 experts"):
        load(copy)
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    with pytest.raises(ModelError, match=r"are missing or have another shape, .*; download the model again"):
        load(copy)


def test_what_cannot_be_run(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    for change, why in (
        ({"model_type": "unheard_of", "architectures": None}, "transformers cannot read its config.json"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "a quantised checkpoint"),
    ):
        (copy / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=why):
            load(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        load(copy)


def test_wrong_paths(tmp_path: Path, checkpoint: Checkpoints) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        read_checkpoint(tmp_path / "none")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is a file; name the folder"):
        load(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor"):
        load(tmp_path)
    with pytest.raises(ModelError, match="or run it with --engine transformers"):
        resolve(checkpoint("olmoe"))
    with pytest.raises(UsageError, match="the demo model is a GGUF"):
        resolve_checkpoint("demo")
    with pytest.raises(UsageError, match="takes a whole repository: hf:a/b"):
        resolve_checkpoint("hf:a/b:c.gguf")


def test_wrong_options(checkpoint: Checkpoints) -> None:
    folder = checkpoint("olmoe")
    with pytest.raises(UsageError, match=r"unknown engine 'vllm': choose from llama\.cpp, transformers"):
        flashmoe.load(folder, engine="vllm")
    with pytest.raises(UsageError, match=r"--layout repacked is llama\.cpp's"):
        load(folder, layout="repacked")
    with pytest.warns(FlashMoEWarning, match="more than this model was trained for"):
        load(folder, n_ctx=1000)
    with pytest.raises(FlashMoEError, match="is too small for this model: the smallest that works is"):
        load(folder, cache=None, ram="64MiB")


def test_without_transformers(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(checkpoint("olmoe"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LibraryError, match=r"pip install 'flashmoe-ssd\[transformers\]'"):
        load(folder)
    monkeypatch.setattr(sys, "argv", ["flashmoe", "run", folder, "--engine", "transformers", "-p", "x"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) <= 2, lines
    assert "needs a package that is not installed" in " ".join(lines)


def test_model_of_the_library_is_for_this_engine_only(demo: Path) -> None:
    with (
        flashmoe.load(demo, cache="50%", n_ctx=64, threads=1) as model,
        pytest.raises(UsageError, match="engine="),
    ):
        _ = model.model
