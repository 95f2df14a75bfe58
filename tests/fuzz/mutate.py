"""Random changes to a file's bytes, some blind, some that know where the format keeps its numbers."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from typing import Any

_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    127,
    128,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63,
    2**64 - 1,
)
_LEAVES: tuple[Any, ...] = (
    *_NUMBERS, -1, -(2**63), 1e308, float("nan"), float("inf"), 0.5, None, True, "", "x", "\x00", "9" * 5000,
    [], {}, [0], [[]], {"a": 1}, ["a"], [-1], [10**9], "F16", "BF16", "BOOL", "{}", "[]", "1",
)  # fmt: skip


def _number(rng: random.Random) -> bytes:
    value = rng.choice(_NUMBERS)
    sizes = [(n, f) for n, f in ((1, "<B"), (2, "<H"), (4, "<I"), (8, "<Q")) if value < 256**n]
    return struct.pack(rng.choice(sizes)[1], value)


def blind(data: bytes, rng: random.Random, places: list[int]) -> bytes:
    """One change of any kind; half of them at one of `places` (where fields begin), the rest mostly near the start."""
    changed = bytearray(data)
    end = min(len(data), rng.choice((64, 512, 4096, len(data)))) or 1
    at = rng.choice(places) if places and rng.random() < 0.5 else rng.randrange(end)
    kind = rng.randrange(8)
    if kind == 0 and changed:
        at = min(at, len(changed) - 1)
        changed[at] ^= 1 << rng.randrange(8)
    elif kind <= 3:
        new = _number(rng)
        changed[at : at + len(new)] = new
    elif kind == 4:
        del changed[at : at + rng.choice((1, 4, 8, 100))]
    elif kind == 5:
        changed[at:at] = rng.choice((rng.randbytes(rng.choice((1, 8, 64))), data[:at][-64:], b"[" * 5000))
    elif kind == 6:
        del changed[at:]
    else:
        source = rng.randrange(len(data) or 1)
        piece = data[source : source + rng.choice((4, 16, 256))]
        changed[at : at + len(piece)] = piece
    return bytes(changed)


def leaf(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """A JSON value with one of its parts replaced, dropped or doubled; JSON inside strings counts as parts."""
    if depth and rng.random() < 0.15 * depth:
        return rng.choice(_LEAVES)
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        change = rng.random()
        if change < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if change < 0.2:
            return {**value, rng.choice(("x", "", key + "2")): value[key]}
        return {**value, key: leaf(value[key], rng, depth + 1)}
    if isinstance(value, list) and value:
        i = rng.randrange(len(value))
        if rng.random() < 0.15:
            return rng.choice((value[:i] + value[i + 1 :], value + value[i:], [value]))
        return value[:i] + [leaf(value[i], rng, depth + 1)] + value[i + 1 :]
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.dumps(leaf(json.loads(value), rng, depth + 1))
        except ValueError:
            pass
    return rng.choice(_LEAVES)


def safetensors(data: bytes, rng: random.Random) -> bytes:
    """A .safetensors file with one part of its JSON header changed; the header's length is right."""
    n = struct.unpack_from("<Q", data)[0]
    header = json.dumps(leaf(json.loads(data[8 : 8 + n]), rng)).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[8 + n :]


def pack(data: bytes, rng: random.Random) -> bytes:
    """A pack file with one part of its JSON header changed; the header's length is right."""
    magic, n = data[:16], struct.unpack_from("<I", data, 16)[0]
    header = json.dumps(leaf(json.loads(data[20 : 20 + n]), rng)).encode()
    return magic + struct.pack("<I", len(header)) + header + data[20 + n :]


def jsonl(data: bytes, rng: random.Random) -> bytes:
    """JSON lines with one part of one line changed."""
    lines = data.splitlines()
    i = rng.randrange(len(lines))
    lines[i] = json.dumps(leaf(json.loads(lines[i]), rng)).encode()
    return b"\n".join(lines)


def npz(data: bytes, rng: random.Random) -> bytes:
    """A .npz file with one array's bytes changed and everything around it right, checksums too."""
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        members = {name: source.read(name) for name in source.namelist()}
    name = rng.choice(list(members))
    if rng.random() < 0.5:  # the shape in the array's header, its length kept
        head, _, rest = members[name].partition(b"\n")
        shapes = (b"(999999999999,)", b"(10,)", b"()", b"(99999, 99999, 9)", b"(0,)", b"(-1,)", b"((((((")
        start, tail = head.find(b"(") if b"(" in head else 0, b", }"
        members[name] = (
            (head[:start] + rng.choice(shapes) + tail).ljust(len(head))[: len(head)] + b"\n" + rest
        )
    else:
        members[name] = blind(members[name], rng, [6, 8, 10])
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for key, value in members.items():
            archive.writestr(key, value)
    return target.getvalue()
