"""Changed files of every kind: an error that FlashMoE reports, or success; never a crash, a hang or much memory."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.errors import ModelError, TraceError
from flashmoe.prefetch import PredictorError
from flashmoe.prefetch.table import Table
from flashmoe.routing.files import read
from flashmoe.storage.gguf import MAX_HEADER, parse_part
from tests.conftest import Tiny
from tests.fuzz.check import attempt
from tests.fuzz.targets import Target, targets

TITLES = (
    "gguf", "gguf, several quantisations", "gguf, first part", "trace", "trace, npz", "trace, plain npz",
    "trace, jsonl", "policy flashmoe", "policy flashmoe+", "session", "pack", "checksums", "predictor promoe",
    "predictor table",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("seeds"))


def test_every_target_has_its_test(made: dict[str, Target]) -> None:
    assert tuple(made) == TITLES


@pytest.mark.parametrize("title", TITLES)
def test_changed_files(title: str, made: dict[str, Target], tmp_path_factory: pytest.TempPathFactory) -> None:
    target, folder = made[title], tmp_path_factory.mktemp("fuzz")
    (folder / target.name).write_bytes(target.seed)
    for name, content in target.others.items():
        (folder / name).write_bytes(content)
    target.read(folder / target.name)  # the seed is good; compiles what there is to compile
    refused = []

    @settings(max_examples=60)
    @given(seed=st.integers(0, 2**32))
    def one(seed: int) -> None:
        refused.append(attempt(target, target.change(random.Random(seed)), folder).refused)

    one()
    assert any(refused)  # the changes do reach what is checked


def test_a_header_has_a_largest_size(tiny: Tiny, tmp_path: Path) -> None:
    """A string of a gigabyte in a sparse file that does have so many bytes."""
    path = tmp_path / "m.gguf"
    data = bytearray(tiny("olmoe").read_bytes())
    data[24:32] = (1 << 30).to_bytes(8, "little")  # the length of the first key
    path.write_bytes(data)
    with open(path, "r+b") as file:
        file.truncate(2 << 30)
    with pytest.raises(ModelError, match=f"more than {MAX_HEADER >> 20} MiB"):
        parse_part(path)


def test_arrays_of_arrays_of_arrays(tiny: Tiny, tmp_path: Path) -> None:
    """A chain of nested arrays, one element each: deeper than Python's stack."""
    nested = (9).to_bytes(4, "little") + (1).to_bytes(8, "little")
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    path = tmp_path / "m.gguf"
    path.write_bytes(head + (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little") + nested * 5000)
    with pytest.raises(ModelError, match="unknown value type 9"):
        parse_part(path)


def test_a_deeply_nested_line(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("[" * 100_000)
    with pytest.raises(TraceError, match="line 1"):
        read(tmp_path / "t.jsonl")


def test_an_archive_that_inflates(tmp_path: Path) -> None:

    np.savez_compressed(tmp_path / "t.npz", expert_ids=np.zeros((1 << 25, 1, 1), np.int16))
    with pytest.raises(TraceError, match="bytes in a file of"):
        read(tmp_path / "t.npz")


def test_a_table_whose_numbers_have_no_logarithm() -> None:
    """Found by changing sessions: kernels divided by zero."""
    table = Table(memory=1 << 12)
    table.bind(2, 8, 2)
    table.begin_step(3)
    table.observe(0, np.array([1, 2], np.int32))
    saved = table.state()
    for name, at in (("average", (0, 0, 0)), ("weight", (1, 0, 0, 0))):
        changed = {**saved, name: saved[name].copy()}
        changed[name][at] = -1
        with pytest.raises(PredictorError, match="damaged"):
            table.load_state(changed)
    table.load_state({**saved, "row": np.where(saved["row"] > 0, -saved["row"], 0)})
    out = np.zeros(8, np.float32)
    table.begin_step(3)
    table.predict(-1, 0, out)
    assert np.isfinite(out).all()
