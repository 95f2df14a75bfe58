"""The request that compiled code makes without Python: it is `request`, and what it let in can be withdrawn."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.cache.policies import BUILTIN, EvictionPolicy, create
from flashmoe.cache.policies.base import MISSES, CompiledRequest
from flashmoe.cache.residency import check_residency, equal_quota, make_residency
from flashmoe.storage.hub import DEMO, default_policy
from tests.cache.test_expert_cache import Checked
from tests.conftest import Tiny
from tests.kernels import EXPERTS, LAYERS, K
from tests.learn.test_learned import untrained

FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)
POLICIES = [name for name in BUILTIN if name != "belady"]
STEPS = st.lists(
    st.tuples(
        st.integers(0, LAYERS - 1),
        st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=3 * K),
        st.booleans(),
    ),
    max_size=60,
)


def call(compiled: CompiledRequest, layer: int, n: int) -> int:
    return int(FUNCTION(compiled.function)(compiled.pool, compiled.arrays, layer, n))


@pytest.fixture(scope="module")
def spec_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """spec_of(name): what `create` takes, a policy that learns with weights of its own."""

    def get(name: str) -> str:
        if name == "flashmoe":
            path = tmp_path_factory.mktemp("policy") / "p.safetensors"
            untrained(name, LAYERS, EXPERTS, K).save(path)
            return f"{name}:{path}"
        return default_policy(DEMO) if name == "flashmoe+" else name

    return get


def arrays_of(policy: EvictionPolicy) -> list[np.ndarray]:
    """All that a policy and its residency consist of."""
    found: list[np.ndarray] = []

    def collect(part: Any) -> None:
        if isinstance(part, np.ndarray):
            found.append(part)
        elif isinstance(part, tuple):
            for inner in part:
                collect(inner)

    collect((tuple(policy.residency), policy._state))
    return found


@pytest.mark.parametrize("partition", ["per-layer", "global"])
@pytest.mark.parametrize("name", POLICIES)
def test_compiled_request_is_request(name: str, partition: str, spec_of: Any) -> None:
    """Answers, slots, misses, residency and the policy's own arrays, after every request, a refused one too."""
    spec = spec_of(name)

    @given(steps=STEPS, share=st.integers(K, EXPERTS))
    @settings(max_examples=25)
    def check(steps: list[tuple[int, list[int], bool]], share: int) -> None:
        policies, requests, buffers = [], [], []
        for compiled in (False, True):
            policy = create(spec)
            quota = equal_quota(share * LAYERS, LAYERS, EXPERTS)
            policy.bind(make_residency(LAYERS, EXPERTS, quota, partition=partition))
            buffer = [np.full(3 * K, -9, np.int32) for _ in range(4)]
            make = policy.compiled_request if compiled else policy.request
            policies.append(policy)
            buffers.append(buffer)
            requests.append(make(*buffer))
        for layer, ids, begins in steps:
            for policy, buffer in zip(policies, buffers, strict=True):
                if begins:
                    policy.begin_sequence()
                buffer[0][: len(ids)] = ids
            answer = requests[0](layer, len(ids))
            assert call(requests[1], layer, len(ids)) == answer
            for one, other in zip(*buffers, strict=True):
                assert np.array_equal(one, other)
            for one, other in zip(arrays_of(policies[0]), arrays_of(policies[1]), strict=True):
                assert np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
            check_residency(policies[1].residency)
            if answer >= 0:
                assert (answer >> 32) + (answer & MISSES) == len(set(ids))

    check()


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
@pytest.mark.parametrize("policy", ["lru", "arc", "lfu-aged"])
@given(data=st.data())
@settings(max_examples=15)
def test_withdraw(policy: str, name: str, tiny: Tiny, data: st.DataObject) -> None:
    """What a compiled request let in and nobody has read is absent again; what was there before stays if it was not
    given up, and all that is asked for later has the right bytes.
    """
    checked = Checked(Path(tiny(name)), 8, policy)
    try:
        cache, catalog, residency = checked.cache, checked.catalog, checked.policy.residency
        cache.reserve(64)
        cache.phase = "decode"
        ids = st.lists(st.integers(0, catalog.n_experts - 1), min_size=1, max_size=3)
        for _ in range(data.draw(st.integers(1, 12))):
            layer, wanted = data.draw(st.integers(0, len(catalog.layers) - 1)), data.draw(ids)
            cache.begin_step(1, catalog.top_k)
            if data.draw(st.booleans()):
                checked.ensure(layer, wanted)
                continue
            compiled = cache.compiled_request(len(wanted))
            assert compiled
            before = residency.slot_of.copy()
            cache.ids[: len(wanted)] = wanted
            done = call(compiled, layer, len(wanted))
            assert done >= 0
            assert done & MISSES == sum(before[layer, e] < 0 for e in set(wanted))
            if done & MISSES and data.draw(st.booleans()):
                # or it is gone on with
                slots = cache.ensure(layer, np.array(wanted, np.int32), requested=done).tolist()
                checked.check(layer, wanted, slots)
                continue
            cache.withdraw(layer, done)
            after = residency.slot_of
            assert not cache.pending
            assert ((after < 0) | (after == before)).all()
            for expert in wanted:
                assert after[layer, expert] == before[layer, expert]
            assert (after != before).sum() <= done & MISSES
            checked.check_residency()
            for other in range(len(catalog.layers)):
                present = np.flatnonzero(after[other] >= 0).tolist()
                first = cache.first_slots[other]
                checked.check(other, present, [int(after[other, e]) - first for e in present])
    finally:
        checked.close()
