"""The token embedding on demand: bounded memory, and a table that only ever gives rows."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

import flashmoe
from flashmoe.engines.llamacpp import inspection, token_table
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.token_table import TokenTable
from flashmoe.errors import ModelError, ReadError
from flashmoe.storage.direct import DirectFile
from flashmoe.storage.gguf import TensorInfo, read_gguf
from tests.conftest import Tiny
from tests.engines.test_exact import streaming_tables_from


@pytest.fixture
def made(tmp_path: Path) -> tuple[TensorInfo, bytes]:
    """A table of 5000 rows of 300 bytes that starts at no round place of its file."""
    data = np.random.default_rng(0).bytes(5000 * 300)
    path = tmp_path / "table"
    path.write_bytes(bytes(77) + data)
    return TensorInfo("token_embd.weight", (75, 5000), "F32", path, 77, len(data)), data


def row(table: TokenTable, token: int) -> bytes:
    return ctypes.string_at(table.address + token * table.row_bytes, table.row_bytes)


def test_rows_and_their_memory(made: tuple[TensorInfo, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_table, "MOST_BYTES", 100 * (4096 + 300))
    tensor, data = made
    file = DirectFile(tensor.file)
    table = TokenTable(tensor, file)
    for start in range(0, 5000, 60):
        wanted = [start, 4999, *range(start, min(start + 60, 5000))]
        table.fetch([*wanted, 5000, -1])
        for token in wanted:
            assert row(table, token) == data[token * 300 : token * 300 + 300]
        assert len(table._present) <= 100
    table.fetch(range(200))  # more at once than are kept: all of them, for this step
    assert all(row(table, token) == data[token * 300 : token * 300 + 300] for token in range(200))
    file.close()


def test_a_vanished_row_is_an_error(made: tuple[TensorInfo, bytes]) -> None:
    tensor, _ = made
    file = DirectFile(tensor.file)
    table = TokenTable(tensor, file)
    tensor.file.write_bytes(b"short")
    with pytest.raises(ReadError, match="truncated"):
        table.fetch([4000])
    file.close()


def test_tied_embeddings_stay_in_memory(tiny: Tiny) -> None:
    from flashmoe.storage.catalog import ExpertCatalog

    with streaming_tables_from(0):
        for name in ("olmoe", "llama", "gpt-oss", "granitemoe", "cohere2moe"):
            gguf = read_gguf(tiny(name))
            table = ExpertCatalog.from_gguf(gguf).token_table
            assert (table is not None) == ("output.weight" in gguf.tensors), name


def test_another_use_of_the_table_is_refused(
    tiny: Tiny, lib: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "INDICES", -1)  # as if a product read it
    with (
        streaming_tables_from(0),
        flashmoe.load(tiny("olmoe"), cache="100%", n_ctx=64, threads=1, library=lib) as model,
        pytest.raises(ModelError, match="token embedding"),
    ):
        model.engine.decode([1, 2, 3])
