"""A model several times larger than any test machine's memory: a sparse file, all zeros, 55 GB long."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest

import flashmoe
from flashmoe.common.memory import status_bytes
from flashmoe.engines.base import SamplingParams
from tests.models.architectures import EXPERTS, FULL_NORMS
from tests.models.spec import Spec
from tests.models.writer import _add, _add_tokenizer

HUGE = Spec(
    arch="olmoe",
    about="larger than memory",
    layers=(
        "attn_norm:D attn_q:D,A attn_k:D,G attn_v:D,G attn_output:A,D "
        + FULL_NORMS
        + "ffn_norm:D ffn_gate_inp:D,E "
        + EXPERTS,
    )
    * 8,
    quants=("Q8_0",),
    sizes="D=1024 F=8192 X=8192 E=256 T=2 H=16 J=16 K=64",
)


def write_sparse(path: Path) -> Path:
    """Write HUGE's header and leave all tensors to a hole in the file."""
    writer = gguf.GGUFWriter(path, HUGE.arch)
    for key, value in HUGE.metadata().items():
        _add(writer, f"{HUGE.arch}.{key}", value)
    _add_tokenizer(writer, HUGE)
    size = 0
    for name, shape, kind in HUGE.tensors():
        quant = gguf.GGMLQuantizationType["F32" if len(shape) == 1 or "gate_inp" in name else kind]
        block, block_bytes = gguf.GGML_QUANT_SIZES[quant]
        rows = (*shape[:0:-1], shape[0] // block * block_bytes)
        nbytes = int(np.prod(rows))
        writer.add_tensor_info(name, rows, np.dtype(np.uint8), nbytes, raw_dtype=quant)
        size += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + size)
    return path


def test_a_model_above_the_machines_memory_loads_and_generates(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "huge.gguf")
    if path.stat().st_size < psutil.virtual_memory().total:
        pytest.skip("this machine has more memory than the test's model")
    before = status_bytes("RssAnon")
    with flashmoe.load(path, cache="8", n_ctx=64, threads=1) as model:
        loaded = status_bytes("RssAnon") - before
        text = "".join(model.generate("ab", max_tokens=4, sampling=SamplingParams(temperature=0)))
        assert model.telemetry.decode.tokens == 3
        assert model.cache.policy.residency.n_slots == 8
    assert text
    assert loaded < 1 << 30  # the dense weights, the context and eight slots
