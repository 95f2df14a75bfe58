"""Replays that tell a policy what a run tells it: nothing else changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashmoe.cache.policies import create
from flashmoe.engines.llamacpp.embeddings import TokenEmbeddings, table_of
from flashmoe.engines.llamacpp.library import Library
from flashmoe.simulate.partition import pool_for
from flashmoe.simulate.prefetch import judge
from flashmoe.simulate.replay import simulate
from flashmoe.simulate.told import replay_told
from flashmoe.storage.gguf import read_gguf
from tests.cli.runner import flashmoe as command
from tests.prefetch.test_predictors import make
from tests.simulate.traces import made_up


@pytest.mark.parametrize("cold", [False, True])
def test_step_by_step_is_at_once(cold: bool) -> None:
    """Micro-batches, through the window and without, single tokens, sequences that begin anew."""
    trace = made_up(200)
    trace = replace(trace, step=np.repeat(np.arange(80, dtype=np.int32), np.r_[[4] * 40, [1] * 40]))
    for slots in (12, 30):
        whole, parts = create("lru"), create("lru")
        whole.bind(pool_for(trace, slots))
        parts.bind(pool_for(trace, slots))
        once = whole.replay(trace.expert_ids, trace.steps(), trace.starts(cold), want_bits=True)
        told = replay_told(trace, parts, cold, want_bits=True)
        assert all(np.array_equal(a, b) for a, b in zip(once, told, strict=True))


def test_what_routers_say_is_told() -> None:
    """The second best of a token is what the next one picks: with the ranking, the map of the token knows it."""
    draw = np.random.default_rng(0)
    trace = made_up(300, layers=4)
    ranked = np.full((300, 4, 4), -1, np.int16)
    ranked[:, :, :2] = trace.expert_ids
    ranked[:-1, :, 2:] = trace.expert_ids[1:]
    words = draw.integers(0, 3, 300).astype(np.int32)
    scores = np.tile(np.array([0, -0.1, -0.2, -0.3], np.float16), (300, 4, 1))
    told = replace(trace, token_id=words, ranked_ids=ranked, ranked_scores=scores,
                   score_range=np.ones((300, 4), np.float16))  # fmt: skip
    bare = replace(trace, token_id=words)
    one, other = (judge(t, make("finemoe", 4, 16, 2), [32], "finemoe") for t in (told, bare))
    assert not np.array_equal(one[1, 0], other[1, 0])
    hits = [row.hits for t in (told, bare) for row in simulate(t, ["finemoe"], [32])]
    assert hits[0] != hits[1]


def test_embeddings_are_those_of_the_file(demo: Path, lib: Library) -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'flashmoe-ssd[bench]'")
    table = table_of(read_gguf(demo))
    assert table is not None
    embed = TokenEmbeddings(lib, table)
    own = next(t for t in gguf.GGUFReader(demo).tensors if t.name == "token_embd.weight")
    wanted = gguf.dequantize(own.data, own.tensor_type)
    assert np.array_equal(embed([5, 7, 4095, 5]), wanted[[5, 7, 4095, 5]])
    assert not embed([table.shape[1], -1]).any()
    embed.close()


def test_command_compares_embeddings(demo: Path, tmp_path: Path) -> None:
    file, rates = tmp_path / "t.safetensors", []
    trace = made_up(120, 8, 32, 4)
    replace(trace, token_id=np.arange(120, dtype=np.int32) % 40).save(file)
    for more in ((), ("--model", demo)):
        out = tmp_path / "r.json"
        options = ("--policy", "finemoe", "--capacity", "25%", "--json", out)
        assert command("simulate", file, *options, *more).status == 0
        (row,) = json.loads(out.read_text())["rows"]
        rates.append(row["hits"])
    assert rates[0] != rates[1]
