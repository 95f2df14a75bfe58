"""Sizes as people write and read them."""

from __future__ import annotations

import pytest

from flashmoe.common.units import format_bytes, parse_bytes
from flashmoe.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6GiB", 6 << 30),
        ("6gib", 6 << 30),
        ("8G", 8 << 30),
        ("500MB", 500_000_000),
        ("1.5 KiB", 1536),
        (" 2T ", 2 << 40),
        ("123", 123),
        ("7B", 7),
        (4096, 4096),
        ("0", 0),
    ],
)
def test_parse(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "6 GiBs", "1e9", "6,5GiB", "½G", "nan", "6GiB 2", "0x10"]
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="cannot read the size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536 << 20, "1.50 GiB"),
        (int(12.34 * 2**20), "12.3 MiB"),
        (500 << 20, "500 MiB"),
        (5 << 40, "5.00 TiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_format(n: int, expected: str) -> None:
    assert format_bytes(n) == expected


@pytest.mark.parametrize("n", [1, 999, 1 << 20, 3 << 30, 12345678901])
def test_what_is_shown_can_be_read(n: int) -> None:
    assert parse_bytes(format_bytes(n)) == pytest.approx(n, rel=0.01)
