"""Tables on the drive: bounded memory, the rows that were asked for, and tables that only ever give rows."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashmoe
from flashmoe.common.memory import status_bytes
from flashmoe.engines.llamacpp import inspection, row_table
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.row_table import TableRows
from flashmoe.engines.llamacpp.stock import StockModel
from flashmoe.errors import ModelError, ReadError
from flashmoe.storage.catalog import ExpertCatalog, RowTable
from flashmoe.storage.gguf import TensorInfo, read_gguf
from flashmoe.storage.reader import ExpertReader
from tests.conftest import Tiny
from tests.engines.reference import prompt
from tests.engines.test_exact import streaming_tables_from
from tests.models.families import ROWS as ROWS_OF_A_HASH
from tests.models.families import family
from tests.models.library import wanted
from tests.models.sparse import write_sparse
from tests.models.spec import U64

ROW, ROWS = 300, 5000
PAGES = 100  # that are kept


@pytest.fixture
def made(tmp_path: Path) -> tuple[TensorInfo, bytes]:
    """A table that starts at no round place of its file."""
    data = np.random.default_rng(0).bytes(ROWS * ROW)
    path = tmp_path / "table"
    path.write_bytes(bytes(77) + data)
    return TensorInfo("token_embd.weight", (75, ROWS), "F32", path, 77, len(data)), data


@pytest.fixture
def table(made: tuple[TensorInfo, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[TableRows]:
    monkeypatch.setattr(row_table, "MOST_BYTES", PAGES * 4096)
    reader = ExpertReader([made[0].file])
    yield TableRows(RowTable(made[0], 1), reader, 0)
    reader.close()


def row(table: TableRows, number: int) -> bytes:
    return ctypes.string_at(table.address + number * table.row_bytes, table.row_bytes)


def test_rows_and_their_memory(table: TableRows, made: tuple[TensorInfo, bytes]) -> None:
    data = made[1]
    for start in range(0, ROWS, 60):
        wanted = [start, ROWS - 1, *range(start, min(start + 60, ROWS))]
        table.fetch([*wanted, ROWS, -1])
        for number in wanted:
            assert row(table, number) == data[number * ROW : number * ROW + ROW]
        assert len(table._present) <= PAGES
    scattered = range(0, ROWS, 20)  # more at once than are kept: all of them, for this step
    table.fetch(scattered)
    assert all(row(table, n) == data[n * ROW : n * ROW + ROW] for n in scattered)
    assert len(table._present) * 4096 <= table.bytes_for(len(scattered))
    table.fetch([0])
    assert len(table._present) <= PAGES


def test_what_is_in_use_stays(table: TableRows, made: tuple[TensorInfo, bytes]) -> None:
    for start in range(0, 4000, 40):
        table.fetch([4999, *range(start, start + 40)])
    made[0].file.write_bytes(b"")  # nothing can be read any more
    table.fetch([4999])
    with pytest.raises(ReadError, match="truncated"):
        table.fetch([0])


def test_several_rows_of_a_token(made: tuple[TensorInfo, bytes]) -> None:
    reader = ExpertReader([made[0].file])
    few, many = (TableRows(RowTable(made[0], n), reader, 0).bytes_for(1024) for n in (1, 4))
    assert few < many == 4096 * 2 * 4096
    reader.close()


def test_tied_embeddings_stay_in_memory(tiny: Tiny) -> None:
    with streaming_tables_from(0):
        for name in ("olmoe", "llama", "gpt-oss", "granitemoe", "cohere2moe"):
            gguf = read_gguf(tiny(name))
            assert bool(ExpertCatalog.from_gguf(gguf).row_tables) == ("output.weight" in gguf.tensors), name


def test_another_use_of_the_table_is_refused(
    tiny: Tiny, lib: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "INDICES", -1)  # as if a product read it
    with (
        streaming_tables_from(0),
        flashmoe.load(tiny("olmoe"), cache="100%", n_ctx=64, threads=1, library=lib) as model,
        pytest.raises(ModelError, match="token_embd"),
    ):
        model.engine.decode([1, 2, 3])


def test_a_table_larger_than_memory(lib: Library, tmp_path: Path) -> None:
    """A Qwen 3.8 whose hashes point into 64 GiB: all of it is a hole but for the rows that they can fall on."""
    table, row_bytes = "per_layer_token_embd.weight", 2 * 16  # of F16
    rows = (64 << 30) // row_bytes
    places = [head * (rows // 4) for head in range(4)]
    small = family("qwen4exp", wanted)
    keys = small.keys | {"ple.head_offsets": [U64(place) for place in places]}

    def tensors(
        arch: str, keys: dict[str, Any], tokenizer: dict[str, Any]
    ) -> list[tuple[str, tuple[int, ...]]]:
        known = dict(wanted(arch, small.keys, tokenizer))
        return list((known | {table: (16, rows)}).items())

    path = write_sparse(replace(small, keys=keys, wanted=tensors), tmp_path / "m.gguf", rf"^(?!{table})")
    offset = read_gguf(path).tensors[table].offset
    with path.open("r+b") as file:
        for place in places:
            file.seek(offset + place * row_bytes)
            file.write(
                np.random.default_rng(place).standard_normal((ROWS_OF_A_HASH, 16)).astype("<f2").tobytes()
            )
    before = status_bytes("RssAnon")
    with flashmoe.load(
        path, ram=before + (1 << 30), n_ctx=64, threads=1, layout="plain", library=lib
    ) as model:
        tokens = prompt(model.engine.n_vocab)[: model.engine.n_ubatch]
        model.engine.decode(tokens)
        got = model.engine.logits()
        assert status_bytes("RssAnon") - before < 256 << 20
    stock = StockModel(lib, path)
    context = stock.context(n_ctx=64, n_ubatch=len(tokens), threads=1)
    context.decode(tokens)
    assert np.array_equal(got, context.logits())
    context.close()
    stock.close()
