"""Sizes as people write and read them."""

from __future__ import annotations

import re

from flashmoe.errors import UsageError

_FACTORS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}{suffix}": 1024**i for i, p in enumerate("KMGT", 1) for suffix in ("", "iB")},
}


def parse_bytes(text: str | int) -> int:
    """Bytes in `text`: "6GiB", "500MB", "8G" (binary) or a plain number. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    factors = {name.upper(): factor for name, factor in _FACTORS.items()}
    if not match or match[2].upper() not in factors:
        raise UsageError(f"cannot read the size {str(text)!r}: write for example 6GiB, 500MB or 8G")
    return int(float(match[1]) * factors[match[2].upper()])


def format_bytes(n: float) -> str:
    """`n` bytes with a binary unit and three significant digits, for example "1.43 GiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while abs(n) >= 1024 and power < len(units) - 1:
        n, power = n / 1024, power + 1
    digits = 0 if power == 0 or n >= 100 else 1 if n >= 10 else 2
    return f"{n:.{digits}f} {units[power]}"
