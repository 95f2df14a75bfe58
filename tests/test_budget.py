"""Memory: how a budget becomes slots; tests/test_memory.py: that a process keeps to it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import psutil
import pytest
from hypothesis import strategies as st

from flashmoe.cache import sizing
from flashmoe.cache.policies import create
from flashmoe.cache.pool import slot_bytes
from flashmoe.cache.residency import PER_LAYER, check_residency
from flashmoe.common import memory
from flashmoe.errors import BudgetError, UsageError
from flashmoe.runtime import budget
from flashmoe.runtime import open_gguf as gguf
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.gguf import read_gguf
from tests.conftest import Tiny

ALIGN = 512


@pytest.fixture
def olmoe(tiny: Tiny) -> ExpertCatalog:
    """4 layers of 16 experts, top 4, each layer a size group of its own."""
    return ExpertCatalog.from_gguf(read_gguf(tiny("olmoe")))


@pytest.fixture
def gpt_oss(tiny: Tiny) -> ExpertCatalog:
    """4 layers of 12 experts, top 4; three layers share a size group."""
    return ExpertCatalog.from_gguf(read_gguf(tiny("gpt-oss")))


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("100%", [16, 16, 16, 16]),
        ("50%", [8, 8, 8, 8]),
        ("0.1%", [4, 4, 4, 4]),  # one token's experts at least
        ("250%", [16, 16, 16, 16]),
        ("32", [8, 8, 8, 8]),
        ("1", [4, 4, 4, 4]),
        ("9999", [16, 16, 16, 16]),
        ("1GiB", [16, 16, 16, 16]),
    ],
)
def test_cache_sizes(text: str, slots: list[int], olmoe: ExpertCatalog) -> None:
    assert sizing.parse_cache(text, olmoe, ALIGN) == slots


@pytest.mark.parametrize("text", ["", "%", "-1", "half", "12 slots", "5%%"])
def test_cache_sizes_that_cannot_be_read(text: str, olmoe: ExpertCatalog) -> None:
    with pytest.raises(UsageError, match=re.escape(f"cannot read --cache {text!r}")):
        sizing.parse_cache(text, olmoe, ALIGN)


@pytest.mark.parametrize("name", ["olmoe", "gpt-oss", "llama", "llama4", "nemotron_h_moe"])
def test_slots_fit_into_what_is_given(name: str, tiny: Tiny) -> None:
    """At every size: whole slots, at most what is given, and not much less."""
    catalog = ExpertCatalog.from_gguf(read_gguf(tiny(name)))
    sizes = slot_bytes(catalog, ALIGN)
    members = (np.bincount(catalog.groups) * catalog.n_experts).tolist()
    least, most = sizing.least_pool(catalog, ALIGN), sum(s * n for s, n in zip(sizes, members, strict=True))
    before, one_token = [0] * len(sizes), sizing.group_top_k(catalog)
    for given in np.linspace(least, most, 97).astype(int).tolist():
        slots = sizing.slots_for(catalog, given, ALIGN)
        used = sum(s * n for s, n in zip(sizes, slots, strict=True))
        assert used <= given
        assert all(k <= n <= m for k, n, m in zip(one_token, slots, members, strict=True))
        assert all(a <= b for a, b in zip(before, slots, strict=True)) or slots == one_token
        before = slots
    assert before == members
    assert sizing.slots_for(catalog, 100 * most, ALIGN) == members


def test_least_pool_is_the_least(olmoe: ExpertCatalog) -> None:
    least = sizing.least_pool(olmoe, ALIGN)
    assert sizing.slots_for(olmoe, least, ALIGN) == [4, 4, 4, 4]
    for given in (least - 1, 0, -5):
        with pytest.raises(BudgetError, match="one token's 4 experts"):
            sizing.slots_for(olmoe, given, ALIGN)


def test_too_small_names_a_budget_that_works() -> None:
    for least in (1, 16 << 20, (16 << 20) + 1, 5 << 30):
        named = re.search(r"(\d+)MiB$", str(budget.too_small(1, least)))
        assert named
        assert least <= int(named[1]) << 20 < least + (16 << 20)


@hypothesis.given(
    wished=st.integers(1, 1 << 20), taken=st.integers(1, 1 << 40), left=st.integers(-(1 << 40), 1 << 40)
)
def test_default_context(wished: int, taken: int, left: int) -> None:
    context = budget.default_context(wished, taken, left)
    assert min(wished, budget.SMALL_CONTEXT) <= context <= wished

    def share(tokens: int) -> float:
        """Of `left`."""
        return tokens / budget.SMALL_CONTEXT * taken / left

    agents = min(wished, budget.AGENT_CONTEXT)
    if context > budget.SMALL_CONTEXT:
        assert share(context) <= 1 / 6 * 1.0001 or (
            agents - 256 < context <= agents and share(context) <= 1 / 3 * 1.0001
        )
    if context < wished and left > 0:
        assert share(context + 256) >= 1 / 6 * 0.9999
    if left > 0 and share(agents) <= 1 / 3 * 0.9999:
        assert context > agents - 256


@hypothesis.given(
    context=st.integers(1, 1 << 20), taken=st.integers(1, 1 << 40), left=st.integers(-(1 << 40), 1 << 44)
)
def test_default_parallel(context: int, taken: int, left: int) -> None:
    parallel = budget.default_parallel(context, taken, left)
    assert 1 <= parallel <= budget.MOST_PARALLEL
    each = context / budget.SMALL_CONTEXT * taken
    if parallel > 1:
        assert parallel * each <= (left / 3 + parallel) * 1.0001
    if parallel < budget.MOST_PARALLEL:
        assert (parallel + 1) * each >= left / 3 * 0.9999 - parallel


@pytest.mark.parametrize(
    ("slots", "sequences", "allowed"), [(63, 1, 7), (63, 4, 7), (63, 8, 6), (16, 4, 1), (8, 4, 0), (8, 1, 1)]
)
def test_micro_batch_of_several_sequences(slots: int, sequences: int, allowed: int) -> None:
    """llama.cpp adds a token where a micro-batch has fewer than there are sequences."""
    catalog: Any = SimpleNamespace(n_experts=64, groups=(0,), layers=[SimpleNamespace(top_k=8)])
    assert sizing.micro_batch(catalog, [slots], 512, sequences) == allowed
    assert sizing.micro_batch(catalog, [64], 512, sequences) == 512


def test_micro_batches_weigh_reads_of_prompts_against_slots(demo: Path) -> None:
    catalog = ExpertCatalog.from_gguf(read_gguf(demo))
    whole = sum(
        size * int(n) for size, n in zip(slot_bytes(catalog, 1), sizing.group_experts(catalog), strict=True)
    )
    half = whole // 2

    def sizes(pool: int, token_bytes: float, context: int = 1 << 20) -> list[int]:
        return [u.tokens for u in sizing.ubatches(catalog, context, pool, token_bytes, 1)]

    assert sizes(whole, 0) == [512, 256, 1024, 128, 2048, 64, 4096]  # nothing is read: llama.cpp's size
    assert sizes(half, 0) == [
        4096,
        2048,
        1024,
        512,
        256,
        128,
        64,
    ]  # slots are as many: the larger, the better
    assert sizes(half, 0, context=600)[0] == 512
    assert sizes(half, half / 100)[0] == 64  # a hundred tokens more cost all slots
    assert sizes(half, 0, context=63) == sizes(sizing.least_pool(catalog, 1), 0) == []
    least = sizing.least_pool(catalog, 1)
    for each in (whole / n for n in (1000, 3000, 10_000, 30_000, 100_000)):
        found = sizing.ubatches(catalog, 4096, half, each, 1)
        fitting = [n for n in sizing.UBATCHES if half - int(each * (n - 64)) >= least]
        by_hand = {}
        for n in fitting:
            slots = sum(sizing.slots_for(catalog, half - int(each * (n - 64)), 1))
            held = slots / catalog.total_experts
            by_hand[n] = (1 - held) * sizing.prompt_reads(catalog, n) + (1 - held**0.5) * catalog.top_k
        assert {u.tokens for u in found} <= set(fitting)
        assert [u.reads for u in found] == pytest.approx(sorted(by_hand[u.tokens] for u in found))


def test_a_tight_budget_gets_a_smaller_context() -> None:
    """Only a small context is ever made to find the size: memory that was touched once counts against the budget."""
    made: list[int] = []

    class Context:
        late_bytes = 0

        def __init__(self, n_ctx: int, n_ubatch: int) -> None:
            made.append(n_ctx)
            self._cells = np.ones((n_ctx, 128 << 10), np.uint8)
            self.tensor_bytes = self._cells.nbytes

        def close(self) -> None:
            del self._cells

    def chosen(
        trained: int, left: int, parallel: int | None = None, n_ctx: int | None = None
    ) -> tuple[int, int]:
        wish = SimpleNamespace(n_ctx=n_ctx, parallel=parallel)
        return gguf._context(Context, wish, trained, left)  # type: ignore[arg-type]

    for left, least, most in ((64 << 20, 1024, 1024), (1 << 30, 1024, 1536), (2 << 30, 4096, 4096)):
        context, sequences = chosen(4096, left)
        assert least <= context <= most
        assert sequences == 1
    assert chosen(1 << 17, 32 << 30)[0] >= budget.AGENT_CONTEXT > chosen(1 << 17, 4 << 30)[0]
    # several conversations: with room for as many, each of them
    assert chosen(4096, 2 << 30, parallel=0) == (4096, 1)
    assert chosen(4096, 64 << 30, parallel=0) == (4096, budget.MOST_PARALLEL)
    assert chosen(4096, 64 << 30, parallel=2) == (4096, 2)
    assert 1024 <= chosen(4096, 2 << 30, parallel=4)[0] < 4096
    assert set(made) == {budget.SMALL_CONTEXT}
    made.clear()
    assert chosen(300, 0) == (300, 1)
    assert chosen(4096, 0, n_ctx=3000) == (3000, 1)
    assert not made


def test_check_before_loading(olmoe: ExpertCatalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense weights that are large for this machine are not loaded in vain; small ones are, to tell exactly."""
    budget.check_before_loading(olmoe, 1 << 30, ALIGN)
    budget.check_before_loading(olmoe, 1 << 20, ALIGN)
    monkeypatch.setattr(memory, "default_ram", lambda: olmoe.dense_bytes)
    budget.check_before_loading(olmoe, 1 << 30, ALIGN)
    with pytest.raises(BudgetError, match="smallest that works"):
        budget.check_before_loading(olmoe, 1 << 20, ALIGN)


def test_layers_of_a_group_share_its_slots(gpt_oss: ExpertCatalog) -> None:
    assert gpt_oss.groups == (0, 0, 1, 0)
    roomy = sizing.residency_for(gpt_oss, [14, 6])
    assert roomy.quota.tolist() == [5, 5, 6, 4]
    assert roomy.partition[0] == PER_LAYER
    assert (roomy.n_slots, roomy.group_start.tolist()) == (20, [0, 14, 20])
    tight = sizing.residency_for(gpt_oss, [4, 4])  # an equal share would not hold one token's experts
    assert (tight.n_slots, tight.group_start.tolist()) == (8, [0, 4, 8])
    policy = create("lru")
    policy.bind(tight)
    ids, out = np.arange(4, dtype=np.int32), np.zeros((3, 4), np.int32)
    for layer in (0, 1, 2, 3, 0):
        assert policy.access(layer, ids, *out) >= 0  # every layer can be served all the same
        assert set(out[0].tolist()) == ({4, 5, 6, 7} if layer == 2 else {0, 1, 2, 3})
        check_residency(tight)


def test_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < memory.memory_limit() <= psutil.virtual_memory().total
    assert 0 < memory.default_ram() < psutil.virtual_memory().available


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        (
            "0::/a/b\n",
            {"/sys/fs/cgroup/a/b/memory.max": "max", "/sys/fs/cgroup/a/memory.max": "1048576"},
            1 << 20,
        ),
        ("0::/a\n", {"/sys/fs/cgroup/a/memory.max": "max"}, None),
        ("4:memory:/x\n0::/\n", {"/sys/fs/cgroup/memory/x/memory.limit_in_bytes": "2097152"}, 2 << 20),
        ("4:cpu,memory:/\n", {"/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("1:cpu:/\n", {}, None),
    ],
)
def test_limits_of_control_groups(
    cgroup: str, files: dict[str, str], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {"/proc/self/cgroup": cgroup, **files}

    def read_text(path: Path) -> str:
        if str(path) not in contents:
            raise FileNotFoundError(path)
        return contents[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    total = psutil.virtual_memory().total
    assert memory.memory_limit() == (expected or total)


def test_status_bytes() -> None:
    assert 1 << 20 < memory.status_bytes("VmRSS") <= memory.status_bytes("VmHWM")
    assert memory.status_bytes("Nothing") == 0


def test_scratch_takes_the_place_of_slots(olmoe: ExpertCatalog) -> None:
    used = 100 << 20
    least = budget.plan_pool(olmoe, 0, used, ALIGN).least
    sizes = slot_bytes(olmoe, ALIGN)

    def scratch(slots: list[int]) -> int:
        return 1000 * sum(slots)

    for more in range(0, sum(sizes) * 14, 999):
        plan = budget.plan_pool(olmoe, least + more, used, ALIGN, scratch=scratch)
        beside = budget.plan_pool(olmoe, least + more, used, ALIGN)
        assert plan.least == least + scratch([4, 4, 4, 4])
        assert bool(plan.slots) == (least + more >= plan.least)
        if plan.slots:
            taken = sum(n * size for n, size in zip(plan.slots, sizes, strict=True))
            assert used + taken + scratch(plan.slots) <= least + more
            assert sum(plan.slots) >= sum(beside.slots) - 4


def test_share_that_is_expected_grows_with_the_budget(tiny: Tiny) -> None:
    catalog = ExpertCatalog.from_gguf(read_gguf(tiny("olmoe")))
    shares = [budget.expected_share(catalog, n, None, 4096) for n in (0, 161 << 20, 1 << 30)]
    assert 0 < shares[0] < shares[1] <= shares[2] == 1
    assert budget.expected_share(catalog, 0, "25%", 4096) == 0.25
