"""The token embedding on demand: a row is read when its token comes, not a vocabulary kept for the few that do.

The engine only gathers rows of this table (where the output has weights of its own), and which rows is known before an
evaluation. In a tight budget the table's memory is worth more as expert slots.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

from flashmoe.storage.addresses import reserve
from flashmoe.storage.catalog import TOKEN_TABLE
from flashmoe.storage.direct import DirectFile
from flashmoe.storage.gguf import TensorInfo

MOST_BYTES = 8 << 20  # of rows that are kept


class TokenTable:
    """Address space for the whole table, and memory for the pages of the rows that were asked for."""

    name = TOKEN_TABLE

    def __init__(self, tensor: TensorInfo, file: DirectFile) -> None:
        self.shape = tensor.shape
        self.rows = tensor.shape[1]
        self.row_bytes = tensor.nbytes // self.rows
        self._file, self._offset = file, tensor.offset
        self._memory, self.address = reserve(tensor.nbytes)
        self._present: set[int] = set()
        self._most = MOST_BYTES // (mmap.PAGESIZE + self.row_bytes)

    def fetch(self, tokens: Iterable[int]) -> None:
        """Have the rows of `tokens` in memory; ids that are none are left to the engine to refuse. Raises ReadError."""
        wanted = {token for token in tokens if 0 <= token < self.rows}
        if len(self._present) + len(wanted) > self._most:
            self._memory.madvise(mmap.MADV_DONTNEED)
            self._present.clear()
        for token in sorted(wanted - self._present):
            at = token * self.row_bytes
            self._file.read_exact(self.address + at, self._offset + at, self.row_bytes)
            self._present.add(token)
