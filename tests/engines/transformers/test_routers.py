"""Routers as the predictor `gate` takes them: the model's own memory, in the model's type."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flashmoe
from flashmoe.engines.transformers.routers import find_routers
from tests.engines.transformers.conftest import Checkpoints

BITS = {torch.float32: np.float32, torch.float16: np.int16, torch.bfloat16: np.uint16}


@pytest.mark.parametrize("dtype", BITS)
def test_routers_are_the_model_s_own(dtype: torch.dtype, checkpoint: Checkpoints) -> None:
    folder = checkpoint("qwen3_moe", dtype)
    with flashmoe.load(folder, engine="transformers", cache="50%", threads=1, n_ctx=64) as model:
        experts = [name for name, _ in model.model.named_modules() if name.endswith(".mlp.experts")]
        found = find_routers(model.model, tuple(experts))
        assert len(found) == len(experts) == len(model.catalog.layers)
        for name, router in zip(experts, found, strict=True):
            own = model.model.get_submodule(name.removesuffix("experts")[:-1]).gate.weight
            assert router.weights.ctypes.data == own.data_ptr()
            assert router.weights.dtype == BITS[dtype]
            assert router.weights.shape == own.shape
            assert router.norm.dtype == np.float32
