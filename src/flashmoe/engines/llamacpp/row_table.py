"""Tables on the drive: a row is read when the graph gathers it, not a table kept for the few that come.

Embeddings of tokens, and those of every layer's, of tokens (Gemma 4) or of hashes of the last ones (Qwen 3.8), are only
gathered from, and the ids of the rows are an input of the graph: known before its first node is computed. In a budget
the memory of such a table is worth more as expert slots; the largest are tens of GiB.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterable, Iterator

from flashmoe.storage.addresses import reserve
from flashmoe.storage.aio import Read
from flashmoe.storage.catalog import RowTable
from flashmoe.storage.reader import ExpertReader

MOST_BYTES = 8 << 20  # of a table that are kept
_PAGE = mmap.PAGESIZE


class TableRows:
    """Address space for a whole table, and memory for the pages of it that were used last."""

    def __init__(self, table: RowTable, reader: ExpertReader, file: int) -> None:
        """file: number of the table's file in `reader`."""
        tensor = table.tensor
        self.name, self.shape = tensor.name, tensor.shape
        self.rows, self._per_token = tensor.shape[1], table.per_token
        self.row_bytes = tensor.nbytes // self.rows
        self._reader, self._file = reader, file
        self._offset, self._end = tensor.offset, tensor.offset + tensor.nbytes
        # a page of memory is a page of the file: reads land in place
        self._shift = tensor.offset % _PAGE
        self._memory, self._start = reserve(self._shift + tensor.nbytes)
        reader.keep(self._memory)
        self.address = self._start + self._shift
        self._present: dict[int, None] = {}  # pages, the longest unused first

    def bytes_for(self, tokens: int) -> int:
        """Memory that it takes at most while micro-batches have so many tokens."""
        pages = -(-self.row_bytes // _PAGE) + 1
        return max(MOST_BYTES, min(tokens * self._per_token, self.rows) * pages * _PAGE)

    def fetch(self, rows: Iterable[int]) -> None:
        """Have `rows` in memory; numbers that are none are left to the engine to refuse. Raises ReadError."""
        wanted = dict.fromkeys(
            page for row in sorted({row for row in rows if 0 <= row < self.rows}) for page in self._pages(row)
        )
        missing = [page for page in wanted if page not in self._present]
        for page in wanted:
            if page in self._present:
                self._present[page] = self._present.pop(page)
        self._drop(len(self._present) + len(missing) - max(MOST_BYTES // _PAGE, len(wanted)))
        if missing:
            self._reader.wait(self._reader.demand([self._read(*run) for run in _runs(missing)]))
        self._present.update(dict.fromkeys(missing))

    def _pages(self, row: int) -> range:
        begin = self._shift + row * self.row_bytes
        return range(begin // _PAGE, (begin + self.row_bytes - 1) // _PAGE + 1)

    def _read(self, first: int, last: int) -> Read:
        """Of the pages from `first` to `last`, as far as they are the table's."""
        begin = max(self._offset, self._offset - self._shift + first * _PAGE)
        end = min(self._end, self._offset - self._shift + (last + 1) * _PAGE)
        return Read(self._file, begin, end - begin, self.address + begin - self._offset)

    def _drop(self, count: int) -> None:
        for page in list(itertools.islice(self._present, max(0, count))):
            self._memory.madvise(mmap.MADV_DONTNEED, page * _PAGE, _PAGE)
            del self._present[page]


def _runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of the consecutive ones among ascending pages."""
    first = last = pages[0]
    for page in pages[1:]:
        if page != last + 1:
            yield first, last
            first = page
        last = page
    yield first, last
