"""A model several times larger than any test machine's memory: a sparse file, all zeros, 55 GB long."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

import flashmoe
from flashmoe.common.memory import status_bytes
from flashmoe.engines.base import SamplingParams
from tests.models.architectures import EXPERTS, FULL_NORMS
from tests.models.sparse import write_sparse
from tests.models.spec import Spec

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


def test_a_model_above_the_machines_memory_loads_and_generates(tmp_path: Path) -> None:
    path = write_sparse(HUGE, tmp_path / "huge.gguf")
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
