"""Local routing consistency: against its definition, written out."""

from __future__ import annotations

import numpy as np
import pytest

from flashmoe.routing.consistency import by_chance, routing_consistency
from flashmoe.routing.trace import RoutingTrace
from tests.simulate.traces import made_up, real


def by_definition(trace: RoutingTrace, length: int) -> float:
    """The best F1 over all thresholds of "chosen for the whole segment" against "asked for by the token"."""
    best = 0.0
    for threshold in range(1, length + 1):
        right = chosen = asked = 0
        for start in range(trace.n_tokens - length + 1):
            if len(set(trace.sequence_id[start : start + length])) > 1:
                continue
            for layer in range(trace.n_layers):
                segment = trace.expert_ids[start : start + length, layer]
                counts = np.bincount(segment.ravel(), minlength=trace.num_experts)
                right += int(counts[counts >= threshold].sum())
                chosen += length * int((counts >= threshold).sum())
                asked += int(counts.sum())
        best = max(best, 2 * right / (chosen + asked))
    return best


@pytest.mark.parametrize("length", [1, 4, 16])
def test_it_is_what_its_definition_says(length: int) -> None:
    trace = made_up(100)
    assert routing_consistency(trace, length)[0] == pytest.approx(by_definition(trace, length))


def test_the_ends_of_the_scale() -> None:
    rng = np.random.default_rng(0)
    same = RoutingTrace(np.tile(np.arange(4, dtype=np.int16), (40, 2, 1)), 16)
    assert routing_consistency(same) == (1.0, [1.0, 1.0])
    random = np.argsort(rng.random((4000, 1, 16)), axis=2)[:, :, :4].astype(np.int16)
    assert routing_consistency(RoutingTrace(random, 16))[0] == pytest.approx(by_chance(4, 16), abs=0.005)


def test_what_has_no_segment() -> None:
    trace = made_up(100)
    unseen = trace.expert_ids.copy()
    unseen[::10, 1] = -1  # a layer that did not see some tokens: its segments end there
    whole, per_layer = routing_consistency(RoutingTrace(unseen, trace.num_experts))
    assert 0 < whole < 1
    assert np.isnan(per_layer[1])


def test_a_real_model_is_far_from_chance() -> None:
    whole, per_layer = routing_consistency(real("olmoe-1b-7b-decode.npz"))
    assert whole == pytest.approx(0.494, abs=0.001)
    assert min(per_layer) > by_chance(8, 64) + 0.05
