"""The harness in parts: sizes, tokens, busy machines, memory groups, forced routing, the baseline's files."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from flashmoe.bench import baseline, quiet
from flashmoe.bench.cgroup import memory_group
from flashmoe.bench.child import Replay
from flashmoe.bench.forced import ForcedRouting, expert_table, trace_tokens
from flashmoe.bench.results import Round, bounds, make_row, spread
from flashmoe.bench.spec import Job, Plan, Setting, Size, cache_sizes, ram_sizes
from flashmoe.bench.tokens import make_tokens
from flashmoe.engines.llamacpp.library import find_library, open_library
from flashmoe.errors import FlashMoEError, UsageError
from flashmoe.routing import RoutingTrace
from flashmoe.storage.gguf import read_gguf

from ..models import make

QUIET = quiet.Load(seconds=10.0, others=0.01, stolen=0.0)
BUSY = quiet.Load(seconds=10.0, others=0.9, stolen=0.0)


def test_sizes() -> None:
    assert ram_sizes("6GiB, 50%", 1000) == [Size("6GiB", ram=6 << 30), Size("50%", ram=500)]
    assert cache_sizes("25%,300") == [Size("25%", cache="25%"), Size("300", cache="300")]
    with pytest.raises(UsageError, match="size"):
        ram_sizes("lots", 1000)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"baselines": ["ollama"]}, "--against 'ollama': choose from mmap"),
        ({"prefetchers": ["gaet"]}, "unknown predictor 'gaet'"),
        ({"pairs": 0}, "at least 1"),
    ],
)
def test_wrong_plans(wrong: dict, message: str) -> None:
    with pytest.raises(FlashMoEError, match=message):
        Plan(Path("m.gguf"), [Size("25%", cache="25%")], **wrong)


def test_jobs_survive_json() -> None:
    job = Job("pool", "m", "m", "lib", [1, 2, 3], 1, 1, 256, 64, 64, 2, cache="25%", trace="t")
    assert Job.from_json(job.to_json()) == job


def test_a_replay_is_stopped() -> None:
    """As by Ctrl-C, while it runs in another thread."""
    evaluated: list[list[int]] = []

    def evaluate(tokens: Sequence[int], decode: bool) -> float:
        evaluated.append(list(tokens))
        if decode:
            replay.stop()
        return 1.0

    replay = Replay(Job("pool", "m", "m", "lib", [1, 2, 3, 4], 2, 1, 256, 64, 64, 2), evaluate)
    with pytest.raises(FlashMoEError, match="interrupted"):
        replay.run(64, lambda: np.zeros(1, np.float32), lambda: None)
    assert evaluated == [[1, 2], [3]]


# A busy machine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("all_seconds", "stolen", "ours", "busy"),
    [(20.0, 0.0, 19.9, False), (19.0, 0.0, 10.0, True), (12.0, 3.0, 12.0, True), (0.0, 0.0, 0.5, False)],
)
def test_busy(all_seconds: float, stolen: float, ours: float, busy: bool) -> None:
    before = quiet.Sample(100.0, 50.0, 1.0, 5.0, None)
    after = quiet.Sample(110.0, 50.0 + all_seconds, 1.0 + stolen, 5.0 + ours, None)
    assert quiet.load_between(before, after).busy is busy


def test_kernel_threads_work_for_us() -> None:
    before = quiet.Sample(0.0, 50.0, 0.0, 5.0, {7: 100.0, 8: 30.0})  # 8 ends meanwhile, 9 is new
    after = quiet.Sample(10.0, 60.0, 0.0, 9.0, {7: 104.0, 9: 1.0})
    assert quiet.load_between(before, after).others == pytest.approx(0.1)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat here")
def test_another_program_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as spinning:
        try:
            seen = quiet.wait_until_quiet(timeout=0.0, window=1.0)
        finally:
            spinning.kill()
    assert seen is not None
    assert seen.others > quiet.LIMIT
    assert "of a core used by other programs" in str(seen)


def test_own_children_are_not_others() -> None:
    before = quiet.sample()
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    after = quiet.sample()
    assert after.ours - before.ours > 0.05


# A memory limit ---------------------------------------------------------------------------------------------


def test_a_group_limits_the_memory_of_a_child() -> None:
    group = memory_group(64 << 20)
    if group is None:
        pytest.skip("no right to make a memory control group here")
    with group:
        folder = group._folder
        code = "import sys; x = bytearray(int(sys.argv[1]) << 20); print(len(x))"
        small = subprocess.run(group.command([sys.executable, "-c", code, "8"]), capture_output=True)
        large = subprocess.run(group.command([sys.executable, "-c", code, "256"]), capture_output=True)
        usage = group.usage()
    assert small.returncode == 0
    assert large.returncode == -9
    assert usage.oom_kills >= 1
    assert usage.peak == 0 or 8 << 20 < usage.peak <= 64 << 20
    assert not folder.exists()


def test_without_the_right_there_is_no_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("flashmoe.bench.cgroup._parents", lambda: [(1, tmp_path / "no"), (2, tmp_path)])
    assert memory_group(1 << 30) is None
    assert not list(tmp_path.iterdir())


# Tokens -----------------------------------------------------------------------------------------------------


def test_tokens(tmp_path: Path) -> None:
    gguf = read_gguf(make("olmoe", tmp_path / "m.gguf"))
    lib = open_library(find_library())
    vocabulary = gguf.tensors["token_embd.weight"].shape[1]
    uniform, zipf = (make_tokens(kind, 500, gguf, lib, seed=1) for kind in ("uniform", "zipf"))
    assert (
        uniform == make_tokens("uniform", 500, gguf, lib, seed=1) != make_tokens("uniform", 500, gguf, lib, 2)
    )
    assert min(uniform + zipf) >= 0
    assert max(uniform + zipf) < vocabulary
    assert len(set(zipf)) < len(set(uniform))
    text = tmp_path / "text"
    text.write_text("the hello world " * 20)
    tokens = make_tokens(f"text:{text}", 30, gguf, lib, 0)
    assert len(tokens) == 30
    assert len(make_tokens("text", 100, gguf, lib, 0)) == 100
    with pytest.raises(UsageError, match="longer"):
        make_tokens(f"text:{text}", 5000, gguf, lib, 0)


# Routing by a trace -----------------------------------------------------------------------------------------


def trace(
    tokens: int = 40, layers: int = 2, top_k: int = 4, experts: int = 16, seed: int = 0
) -> RoutingTrace:
    draw = np.random.default_rng(seed)
    ids = draw.random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k]
    return RoutingTrace(ids.astype(np.int16), experts)


def test_a_trace_of_the_same_shape_is_taken_as_it_is() -> None:
    given = trace()
    table = expert_table(given, [16, 16], 4, start=3, positions=30)
    assert np.array_equal(table, given.expert_ids[3:33])


@pytest.mark.parametrize(("experts", "top_k"), [(16, 4), (16, 6), (8, 4), (4, 4), (32, 2)])
def test_a_trace_of_another_shape_fits(experts: int, top_k: int) -> None:
    given = trace()
    table = expert_table(given, [experts] * 5, top_k, start=0, positions=60)
    assert table.shape == (60, 5, top_k)
    assert table.min() >= 0
    assert table.max() < experts
    assert all(len(set(row)) == top_k for row in table.reshape(-1, top_k).tolist())
    if top_k <= 4 and experts >= 16:
        assert np.array_equal(table[:40, 1], given.expert_ids[:, 1, :top_k])
        assert not np.array_equal(table[:, 0], table[:, 2])


def test_tokens_of_a_trace_follow_its_rows() -> None:
    given = trace()
    ids = given.expert_ids.copy()
    ids[5, 1] = -1  # a token that the last layer did not see: no row of it either
    known = RoutingTrace(ids, 16, token_id=np.arange(100, 140, dtype=np.int32))
    assert trace_tokens(known, 3, 5).tolist() == [103, 104, 106, 107, 108]
    assert np.array_equal(expert_table(known, [16, 16], 4, 3, 5), given.expert_ids[[3, 4, 6, 7, 8]])
    assert trace_tokens(known, 37, 4).tolist() == [138, 139, 100, 101]
    assert trace_tokens(given, 0, 2).tolist() == [-1, -1]


def test_a_layer_that_sees_fewer_tokens_sees_the_last_ones() -> None:
    forced = ForcedRouting(expert_table(trace(), [16, 16], 4, 0, 30))
    forced.at(10, 5)
    ids = np.zeros((2, 4), np.int32)
    forced(1, ids)
    assert np.array_equal(ids, forced.table[13:15, 1])


# Results ----------------------------------------------------------------------------------------------------


LRU = Setting("lru", "none", "plain")


def measured(speed: float, logits: str = "a") -> dict:
    report = {
        "policy": "lru",
        "layout": "plain",
        "approximate": {},
        "text": "",
        "decode": {"tokens": 8, "tokens_per_second": speed},
        "io": {
            "stall_seconds": 4 / speed,
            "ceiling_bytes_per_second": 2e9,
            "read_bytes_per_token": 1e8,
            "stall_share": 0.5,
        },
    }
    decode = {
        "tokens": 8,
        "tokens_per_second": speed,
        "median_seconds": 1 / speed,
        "mean_seconds": 1 / speed,
        "token_seconds": [1 / speed],
    }
    return {
        "report": report,
        "decode": {**decode, "read_bytes": 80, "major_faults": 0},
        "prefill": {"tokens_per_second": 1.0},
        "load_seconds": 1.0,
        "first_token_seconds": 2.0,
        "group_peak_bytes": 0,
        "peak_bytes": 7,
        "limit_bytes": None,
        "logits_sha256": logits,
    }


def test_ratios_are_taken_pair_by_pair() -> None:
    rounds = [
        Round({LRU: measured(ours)}, {"mmap": measured(theirs)}, load)
        for ours, theirs, load in ((10.0, 5.0, QUIET), (20.0, 5.0, QUIET), (30.0, 10.0, BUSY))
    ]
    row = make_row(Size("50%", ram=500), LRU, "mmap", None, rounds)
    assert row["decode"]["tokens_per_second"] == 20.0
    assert row["opponent_decode"]["tokens_per_second"] == 5.0
    assert row["ratio"] == 3.0
    assert row["spread"]["ratio"] == [2.5, 3.5]
    assert row["same_logits"] is True
    assert row["busy"] is True
    assert row["bounds"] == {"ssd_tokens_per_second": 20.0, "compute_tokens_per_second": 40.0}
    json.dumps(row)


def test_different_logits_and_failed_opponents_show() -> None:
    other = Round({LRU: measured(10.0)}, {"mmap": measured(5.0, "b")}, QUIET)
    assert make_row(Size("1", ram=1), LRU, "mmap", None, [other])["same_logits"] is False
    failed = Round({LRU: measured(10.0)}, {"mmap": {"error": "killed", "limit_bytes": 1}}, QUIET)
    row = make_row(Size("1", ram=1), LRU, "mmap", None, [failed])
    assert (row["ratio"], row["opponent_decode"], row["opponent_error"]) == (None, None, "killed")


def test_an_approximation_is_not_compared_with_exact_logits() -> None:
    ours = measured(10.0)
    ours["report"]["approximate"] = {"approx": "cache:0.2"}
    rounds = [Round({LRU: ours}, {"mmap": measured(5.0, "b")}, QUIET)]
    row = make_row(Size("1", ram=1), LRU, "mmap", None, rounds)
    assert (row["same_logits"], row["ratio"]) == (None, 2.0)
    with pytest.raises(UsageError, match="choose cache:LAMBDA"):
        Plan(Path("m.gguf"), [Size("1", ram=1)], approximations=["cash"])


def test_bounds_and_spread_of_little() -> None:
    assert spread([]) is None
    assert spread([2.0]) == [2.0, 2.0]
    report = measured(10.0)["report"]
    report["io"]["ceiling_bytes_per_second"] = 0.0
    assert bounds(report)["ssd_tokens_per_second"] is None


# The baseline's files ---------------------------------------------------------------------------------------


def test_a_small_read_ahead_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = make("olmoe", tmp_path / "m.gguf")
    monkeypatch.setattr(baseline, "read_ahead", lambda path: 128 << 10)
    with baseline.opponent_files([path]) as files:
        assert (files.first, files.note) == (path, "")


def test_a_large_read_ahead_is_avoided_or_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = make("olmoe", tmp_path / "m.gguf")
    monkeypatch.setattr(baseline, "read_ahead", lambda path: 8 << 20)
    data = path.read_bytes()
    with baseline.opponent_files([path]) as files:
        assert "8192 KiB" in files.note
        seen = files.first.read_bytes()
        assert seen[: len(data)] == data
        assert len(seen) - len(data) < 4096
        device = files.first.resolve()
        looped = files.read_ahead == baseline.BEST_READ_AHEAD
        if looped:
            ahead = subprocess.run(["blockdev", "--getra", str(device)], capture_output=True, text=True)
            assert int(ahead.stdout) == 256
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    if not looped:
        pytest.skip(files.note)
    backing = subprocess.run(
        ["losetup", "--list", "--noheadings", str(device)], capture_output=True, text=True
    )
    assert str(tmp_path) not in backing.stdout


def test_without_root_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = make("olmoe", tmp_path / "m.gguf")
    monkeypatch.setattr(baseline, "read_ahead", lambda path: 8 << 20)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with baseline.opponent_files([path]) as files:
        assert files.first == path
        assert "needs root" in files.note
