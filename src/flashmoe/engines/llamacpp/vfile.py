"""A FILE* of our own: the model as the engine's loader should see it.

Dense ranges come from the real files by direct reads; expert ranges are "read" by touching nothing; the parts of a
split model appear as one file, behind a header that lists them all. glibc's fopencookie makes the FILE*.
"""

from __future__ import annotations

import bisect
import ctypes as C
import struct
from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

from flashmoe.errors import LibraryError
from flashmoe.storage.ahead import ReadAhead
from flashmoe.storage.direct import DirectFile
from flashmoe.storage.gguf import GGUF, MAGIC, type_number

# after a seek, the C library reads from a multiple of it: larger wastes, smaller calls more
_STREAM_BUFFER = 256 << 10
_READ = C.CFUNCTYPE(C.c_ssize_t, C.c_void_p, C.c_void_p, C.c_size_t)
_SEEK = C.CFUNCTYPE(C.c_int, C.c_void_p, C.POINTER(C.c_int64), C.c_int)


class Segment(NamedTuple):
    """`length` bytes from `start` of the virtual file: bytes at `offset` of `source`, or of nothing."""

    start: int
    length: int
    source: DirectFile | bytes | None
    offset: int


def segments(gguf: GGUF, files: Sequence[DirectFile | bytes], holes: Container[str]) -> list[Segment]:
    """The virtual file of a model, in order; the tensors named in `holes` have no bytes.

    files: the model's, or their headers where all tensors are holes.
    """
    if len(gguf.parts) == 1:
        header: Segment = Segment(0, gguf.parts[0].data_offset, files[0], 0)
        starts = {t.name: t.offset for t in gguf.tensors.values()}
    else:
        data, starts = _joined_header(gguf)
        header = Segment(0, len(data), data, 0)
    source = dict(zip(gguf.files, files, strict=True))
    tensors = (
        Segment(starts[t.name], t.nbytes, None if t.name in holes else source[t.file], t.offset)
        for t in gguf.tensors.values()
    )
    return sorted([header, *tensors])


def _joined_header(gguf: GGUF) -> tuple[bytes, dict[str, int]]:
    """One GGUF header for all parts of a split model, and where each tensor starts behind it."""
    first = gguf.parts[0]
    raw = first.header()
    keys = [raw[a:b] for name, (a, b) in first.key_spans.items() if not name.startswith("split.")]
    infos, starts, offset = [], {}, 0
    for part in gguf.parts:
        for t in part.tensors:
            name = t.name.encode()
            infos.append(struct.pack("<Q", len(name)) + name)
            infos.append(
                struct.pack(f"<I{len(t.shape)}QIQ", len(t.shape), *t.shape, type_number(t.type), offset)
            )
            starts[t.name] = offset
            offset += -(-t.nbytes // first.alignment) * first.alignment
    head = MAGIC + struct.pack("<IQQ", 3, len(starts), len(keys)) + b"".join(keys) + b"".join(infos)
    head += bytes(-len(head) % first.alignment)
    return head, {name: len(head) + start for name, start in starts.items()}


class VirtualFile:
    """Opens segments as a C stream. `stream` is a FILE*; `error` is what a read raised, if any.

    `progress` is called with the dense bytes read so far. Must live until the stream is closed.
    """

    def __init__(self, parts: list[Segment], progress: Callable[[int], None]) -> None:
        self._parts, self._starts = parts, [part.start for part in parts]
        self._size = max(part.start + part.length for part in parts)
        self._progress = progress
        self._position = self._dense_read = 0
        self._reads = ReadAhead()
        self.error: BaseException | None = None
        libc = C.CDLL(None, use_errno=True)
        if not hasattr(libc, "fopencookie"):
            raise LibraryError(
                "loading a model needs fopencookie, which this system's C library lacks (Linux has it)"
            )

        class Functions(C.Structure):
            _fields_ = [(name, C.c_void_p) for name in ("read", "write", "seek", "close")]

        self._callbacks = _READ(self._on_read), _SEEK(self._on_seek)
        read, seek = (C.cast(callback, C.c_void_p) for callback in self._callbacks)
        libc.fopencookie.restype, libc.fopencookie.argtypes = C.c_void_p, [C.c_void_p, C.c_char_p, Functions]
        self.stream = libc.fopencookie(None, b"rb", Functions(read, None, seek, None))
        self._buffer = C.create_string_buffer(_STREAM_BUFFER)
        libc.setvbuf.argtypes = [C.c_void_p, C.c_void_p, C.c_int, C.c_size_t]
        libc.setvbuf(self.stream, C.addressof(self._buffer), 0, _STREAM_BUFFER)
        libc.fclose.argtypes = [C.c_void_p]
        self._fclose = libc.fclose

    def close(self) -> None:
        self._fclose(self.stream)
        self._reads.close()

    def _on_read(self, _cookie: int, buffer: int, wanted: int) -> int:
        try:
            if self.error:
                return -1
            count = self._copy(buffer, min(wanted, self._size - self._position))
        except BaseException as error:  # raised again by the loader: nothing may leave a C callback
            self.error = error
            return -1
        self._position += count
        return count

    def _copy(self, buffer: int, wanted: int) -> int:
        """Copy up to `wanted` bytes at the position; stops at the end of a segment."""
        if wanted <= 0:
            return 0
        part = self._parts[bisect.bisect_right(self._starts, self._position) - 1]
        skip = self._position - part.start
        if skip >= part.length:  # padding between tensors
            following = bisect.bisect_right(self._starts, self._position)
            end = self._starts[following] if following < len(self._starts) else self._size
            count = min(wanted, end - self._position)
            C.memset(buffer, 0, count)
            return count
        count = min(wanted, part.length - skip)
        if isinstance(part.source, bytes):
            C.memmove(buffer, part.source[skip : skip + count], count)
        elif part.source is not None:
            self._reads.copy(part.source, buffer, (part.offset, part.length), skip, count)
            self._dense_read += count
            self._progress(self._dense_read)
        return count

    def _on_seek(self, _cookie: int, offset: C._Pointer[C.c_int64], whence: int) -> int:
        position = offset[0] + (0, self._position, self._size)[whence]
        if position < 0:
            return -1
        self._position = offset[0] = position
        return 0
