"""Approximate routing under Transformers: exact where nothing is asked for, and the kernels' choices otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import flashmoe
from flashmoe.engines.transformers.rewriting import RouteRewriter
from flashmoe.errors import FlashMoEError, ModelError
from flashmoe.routing.approximation import Approximation
from flashmoe.routing.rewrite import Rewriter
from flashmoe.runtime.model import Model
from tests.engines.transformers.conftest import Checkpoints

TOKENS = [5, 9, 2, 40, 7, 7, 1, 3, 14, 15, 8, 21]


def run(folder: Path, approx: str) -> tuple[NDArray[np.float32], Model]:
    """Logits of every token, decoded one by one after a prompt of two."""
    with flashmoe.load(
        folder, engine="transformers", cache="40%", threads=1, prefetch="none", n_ctx=64, approx=approx
    ) as model:
        model.decoder.rewind()
        model.decoder.evaluate(TOKENS[:2], decode=False)
        made = []
        for token in TOKENS[2:]:
            model.decoder.evaluate([token], decode=True)
            made.append(model.decoder.logits())
    return np.stack(made), model


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe", "gpt_oss"])
def test_nothing_or_everything(name: str, checkpoint: Checkpoints) -> None:
    """Softmax over all experts, over those picked, and with biases."""
    folder = checkpoint(name, torch.float32)
    exact, before = run(folder, "")
    same, _ = run(folder, "cache:0+drop:0")
    assert np.array_equal(exact.view(np.int32), same.view(np.int32))
    lossy, model = run(folder, "cache:10+drop:1")
    assert np.isfinite(lossy).all()
    assert not np.array_equal(exact, lossy)
    rewritten = model.rewritten
    assert rewritten is not None
    assert rewritten.tokens == len(model.catalog.layers) * len(exact)
    assert rewritten.replaced + rewritten.dropped > 0
    assert model.cache.stats["decode"].misses < before.cache.stats["decode"].misses
    assert model.cache.stats["decode"].misses <= rewritten.tokens  # the first experts


def test_other_routers_are_refused(checkpoint: Checkpoints) -> None:
    with pytest.raises(FlashMoEError, match="--approx does not know"):
        run(checkpoint("deepseek_v3", torch.float32), "cache:1")


def weighed(scores: Sequence[float], ids: Sequence[int], normalised: bool) -> torch.Tensor:
    shares = torch.softmax(torch.tensor([scores]), 1)[:, list(ids)]
    return 2 * shares / shares.sum() if normalised else shares


@pytest.mark.parametrize("normalised", [False, True])
def test_weights_of_substitutes(normalised: bool) -> None:
    """They are what the router would have given them, with the sum that the model gives."""
    scores, ids = [3.0, 2.0, 1.9, 0.5], [0, 1]
    rewriter = Rewriter(Approximation("", "", 1.0), 1, 4, 2)
    slot_of = np.array([[0, -1, 1, 2]], np.int32)
    made = RouteRewriter(rewriter, slot_of, [(torch.tensor(scores)[:, None], None)])
    picked, weights = made(0, np.array([ids], np.int32), torch.ones(1, 1), weighed(scores, ids, normalised))
    assert picked.tolist() == [[0, 2]]
    assert torch.allclose(weights, weighed(scores, [0, 2], normalised), rtol=1e-5)


def test_weights_of_another_kind() -> None:
    rewriter = Rewriter(Approximation("", "", 1.0), 1, 3, 2)
    made = RouteRewriter(
        rewriter, np.full((1, 3), -1, np.int32), [(torch.tensor([[1.0], [2.0], [3.0]]), None)]
    )
    with pytest.raises(ModelError, match="does not know"):
        made(0, np.array([[2, 1]], np.int32), torch.ones(1, 1), torch.sigmoid(torch.tensor([[3.0, 2.0]])))
