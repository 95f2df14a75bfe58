"""The predictor `promoe`: it learns a rule, and numba computes what torch trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashmoe.learn.prefetch import train
from flashmoe.learn.train import Plan
from flashmoe.prefetch import create
from flashmoe.prefetch.base import AHEAD
from flashmoe.simulate.prefetch import judge
from tests.prefetch.test_predictors import EXPERTS, LAYERS, K, chained, feed


def test_promoe_learns_and_computes_what_torch_does(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="training needs torch: pip install 'flashmoe-ssd[train]'")
    from flashmoe.learn.prefetch_networks import BEFORE, LENGTH, Net, Segments

    trace = chained(1600)
    trained = train(trace, "promoe", Plan(epochs=8, minutes=1, threads=1, sizes={"r": 16, "h": 24}))
    assert trained.report["loss"][-1][0] < 0.7 * trained.report["loss"][0][0]
    path = tmp_path / "p.safetensors"
    trained.save(path)
    predictor = create(f"promoe:{path}")
    assert predictor is not None
    counts = judge(trace.rows(np.arange(200)), predictor, [])
    assert counts[1, 0, K - 1, 0] / counts[1, 0, 2 * K, 0] > 0.8
    # the same numbers in torch, for the last token of a segment
    net = Net(LAYERS, EXPERTS, 16, 24)
    net.load_state_dict({name: torch.from_numpy(a.astype(np.float32)) for name, a in trained.arrays.items()})
    segments = Segments(trace)
    picked, token, past, _, _ = segments.batch(np.array([0]))
    with torch.no_grad():
        wanted = torch.sigmoid(net(picked, token, past)).numpy()[:, :, -1]
    feed(predictor, trace, stop=LENGTH - 1)
    predictor.begin_step(int(trace.token_id[LENGTH - 1]))
    out = np.zeros(EXPERTS, np.float32)
    for layer in range(-1, LAYERS - 1):
        if layer >= 0:
            predictor.observe(layer, trace.expert_ids[LENGTH - 1, layer].astype(np.int32))
        for c, ahead in enumerate(AHEAD):
            target = layer + ahead if ahead else 3
            if (ahead == 0) == (layer < 0) and target < LAYERS:
                predictor.predict(layer, target, out)
                assert np.allclose(out, wanted[c, target], atol=1e-4), (layer, target)
    assert BEFORE > 0
