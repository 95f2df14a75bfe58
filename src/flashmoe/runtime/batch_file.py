"""Files of a batch: requests in OpenAI's batch format, and a journal of answers that outlives any end of the process.

Input, one JSON object a line: {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}.
Output, in the input's order: {"id": ..., "custom_id": ..., "response": {"status_code", "request_id", "body"}, "error"}.
Answers are appended to the journal, OUT.partial, as they come; OUT is written from it when all are there. What a kill
leaves of a last line is cut off, and its request is asked again: no line is lost or there twice.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import xxhash

from flashmoe.common.files import replacing
from flashmoe.common.signals import SafeLock
from flashmoe.common.text import printable
from flashmoe.engines.llamacpp.serving.bodies import TOO_DEEP, too_deep
from flashmoe.errors import FlashMoEError, UsageError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
_FORMAT, _VERSION = "flashmoe-batch", 1
_MARK = json.dumps({"format": _FORMAT})[:-1].encode()  # what a journal begins with
Result = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A line of the input. number: its place in the file, from 1; refused: why it is no request, "" where it is."""

    number: int
    custom_id: str | None
    url: str = ""
    body: bytes = b""
    refused: str = ""

    def result(self, *, response: tuple[int, Any] | None = None, error: str = "") -> Result:
        """The line of the output. response: status and body; error: why there is none."""
        name = f"batch_req_{self.number}"
        answered = {"status_code": response[0], "request_id": name, "body": response[1]} if response else None
        refused = {"code": "invalid_request", "message": error} if error else None
        return {"id": name, "custom_id": self.custom_id, "response": answered, "error": refused}


class Requests:
    """The lines of an input file, blank ones left out. It is read again and again.

    Raises UsageError where it cannot be read, has no request, or is not what it was before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise UsageError(
                f"{path}: the requests are no file, and are read more than once: save them in one"
            )
        self._first: dict[str, int] = {}  # line in which a custom_id is first
        digest = xxhash.xxh3_128()
        self.ids: list[str | None] = [line.custom_id for line in self._read(digest)]
        #: Tells this content from another.
        self.digest = digest.hexdigest()
        if not self.ids:
            raise UsageError(f"{path}: there is no request in it")

    def __iter__(self) -> Iterator[Line]:
        digest = xxhash.xxh3_128()
        yield from self._read(digest)
        if digest.hexdigest() != self.digest:
            raise UsageError(f"{self.path}: the requests have been changed meanwhile: name another output")

    def _read(self, digest: xxhash.xxh3_128) -> Iterator[Line]:
        try:
            with open(self.path, "rb") as file:
                for number, raw in enumerate(file, 1):
                    digest.update(raw)
                    if raw.strip():
                        yield self._line(number, raw)
        except OSError as error:
            raise UsageError(f"{self.path}: the requests cannot be read ({error.strerror})") from None

    def _line(self, number: int, raw: bytes) -> Line:
        if too_deep(raw):
            return Line(number, None, refused=f"line {number}: {TOO_DEEP}")
        try:
            value = json.loads(raw)
        except ValueError as error:
            return Line(number, None, refused=f"line {number} is no JSON ({error})")
        name = value.get("custom_id") if isinstance(value, dict) else None
        if not isinstance(name, str):
            return Line(
                number, None, refused=f"line {number}: a request is an object with a custom_id, a text"
            )
        url, body = value.get("url"), value.get("body")
        if (first := self._first.setdefault(name, number)) != number:
            reason = f"the custom_id is that of line {first}"
        elif value.get("method", "POST") != "POST" or url not in URLS:
            reason = f"the method must be POST, and the url one of {', '.join(URLS)}"
        elif not isinstance(body, dict):
            reason = "the body must be an object"
        elif body.get("stream"):
            reason = "a batch has no streams: leave out stream"
        else:
            return Line(number, name, url, json.dumps(body).encode())
        return Line(number, name, refused=f"line {number}: {reason}")


class Journal:
    """Answers so far, and the output when all are there. A context manager.

    Raises UsageError where the journal belongs to another input or model, or another process writes it.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        """identity: what answers depend on, JSON."""
        self._out = Path(os.path.realpath(out))
        self.path = self._out.with_name(f"{self._out.name}.partial")
        self._places: dict[int, tuple[int, int]] = {}  # by line of the input: offset and bytes of its result
        self._failed = set[int]()
        # a signal handler that raises finds an answer in the file and here, or nowhere
        self._whole = SafeLock()
        header = {"format": _FORMAT, "version": _VERSION, **json.loads(json.dumps(identity))}
        self._file: IO[bytes] = open(self.path, "a+b")  # noqa: SIM115 - closed by `close`
        try:
            self._lock()
            self._read(header)
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, line: Line) -> bool:
        return line.number in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def failed(self) -> int:
        """Lines whose answer is an error."""
        return len(self._failed)

    def add(self, results: Iterable[tuple[Line, Result]]) -> None:
        """Append answers, those left out that are there; they are on the drive when this returns."""
        with self._whole:
            for line, result in results:
                if line in self:
                    continue
                data = _entry(line.number, result)
                offset = self._file.tell()
                self._file.write(data)
                self._note(line.number, result, offset, len(data))
            self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Write the output, in the input's order, and remove the journal."""
        with replacing(self._out) as file:
            for number in sorted(self._places):
                offset, size = self._places[number]
                self._file.seek(offset)
                result = json.loads(self._file.read(size))["result"]
                file.write(json.dumps(result).encode() + b"\n")
        self.path.unlink()

    def close(self) -> None:
        """What was added stays."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{printable(str(self.path))}: another process writes it") from None
        except OSError:  # a file system without locks
            pass

    def _read(self, header: Mapping[str, Any]) -> None:
        """Take what is there up to the first line that is not whole, and cut off the rest."""
        self._file.seek(0)
        found = _parsed(first := self._file.readline())
        if first[: len(_MARK)] != _MARK[: len(first)] or (found is None and first.endswith(b"\n")):
            raise UsageError(
                f"{printable(str(self.path))} is there already, and is no journal of a batch: move it"
            )
        if found is None:  # not even the first line came to its end
            self._file.seek(0)
            self._file.truncate()
            self._file.write(json.dumps(header).encode() + b"\n")
            return
        if found != header:
            raise UsageError(
                f"{printable(str(self.path))} is of another input or model: remove it, or name another output"
            )
        offset = len(first)
        for raw in self._file:
            entry = _parsed(raw)
            if entry is None or not isinstance(entry.get("line"), int) or not _is_answer(entry.get("result")):
                break
            self._note(entry["line"], entry["result"], offset, len(raw))
            offset += len(raw)
        self._file.truncate(offset)
        self._file.seek(offset)

    def _note(self, number: int, result: Result, offset: int, size: int) -> None:
        self._places[number] = offset, size
        if has_failed(result):
            self._failed.add(number)


def has_failed(result: Result) -> bool:
    """Whether a line of an output is an error."""
    return result["error"] is not None or result["response"]["status_code"] >= 400


def failed_in(out: Path, requests: Requests) -> int | None:
    """Lines with an error in an output that is there already, None where none is. Raises UsageError where the file is
    something else."""
    if not os.path.exists(out):
        return None
    try:
        if os.path.isfile(out) and not os.path.samefile(out, requests.path):
            with open(out, "rb") as file:
                names, failed = list[str | None](), 0
                for raw in file:
                    if (result := _answered(raw)) is None:
                        break  # what is no output may be large
                    names.append(result["custom_id"])
                    failed += has_failed(result)
                else:
                    if names == requests.ids:
                        return failed
        elif os.path.isdir(out):
            raise UsageError(f"{printable(str(out))} is a folder: name a file")
    except OSError as error:
        raise FlashMoEError(f"{printable(str(out))}: it cannot be read ({error.strerror})") from None
    raise UsageError(
        f"{printable(str(out))} is there already, and is not the output of these requests: name another"
    )


def _answered(raw: bytes) -> Result | None:
    """The answer that is a line of an output, None where it is none."""
    result = _parsed(raw)
    return result if result is not None and _is_answer(result) else None


def _is_answer(result: Any) -> bool:
    if not (isinstance(result, dict) and result.keys() >= {"custom_id", "response", "error"}):
        return False
    response = result["response"]
    status = response.get("status_code") if isinstance(response, dict) else None
    return isinstance(status, int) or (response is None and result["error"] is not None)


def _entry(number: int, result: Result) -> bytes:
    return json.dumps({"line": number, "result": result}).encode() + b"\n"


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """The object that is a whole line, None where it is none."""
    try:
        value = json.loads(raw) if raw.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
