"""Parses `--approx`: which approximation of the routing, and how much of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashmoe.errors import UsageError

#: Names of what stands for an exact run.
EXACT = ("", "0", "none")
#: What `--approx 1` to `3` stand for where the model was not calibrated: see docs/approximate.md.
LEVELS: Mapping[str, str] = {"1": "cache:0.2", "2": "cache:0.4", "3": "cache:1"}
MOST_BOOST, MOST_DROP = 10.0, 1.0
_PART = re.compile(r"(cache|drop):(\d+(?:\.\d*)?|\.\d+)")


@dataclass(frozen=True)
class Approximation:
    """How far the routing of decoded tokens may differ from the model's own.

    boost: LAMBDA of cache-conditional routing: how many mean ranges of a layer's scores a resident expert is preferred
    by. drop: F: a missing expert is left out where its share of the weights is below F / top-k.
    """

    text: str  # as it was asked for
    rule: str = ""  # what a level stands for, else the same
    boost: float = 0.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.boost <= MOST_BOOST:
            raise UsageError(f"--approx {self.text}: LAMBDA lies between 0 and {MOST_BOOST:g}")
        if not 0 <= self.drop <= MOST_DROP:
            raise UsageError(f"--approx {self.text}: F lies between 0 and {MOST_DROP:g}")


def parse(text: str, levels: Mapping[str, str] = LEVELS) -> Approximation | None:
    """The approximation that `cache:LAMBDA`, `drop:F`, both joined by "+", or a level (1 to 3) asks for.

    None for an exact run ("0", "none", ""). Raises UsageError.
    """
    text = text.strip()
    rule = levels.get(text, text)
    if rule in EXACT:
        return None
    given: dict[str, Any] = {}
    for part in rule.split("+"):
        match = _PART.fullmatch(part.strip())
        name = {"cache": "boost", "drop": "drop"}[match[1]] if match else ""
        if match is None or name in given:
            raise UsageError(
                f"--approx {text}: choose cache:LAMBDA (for example cache:0.2), drop:F (drop:0.5), "
                "both (cache:0.2+drop:0.5), a level from 1 to 3, or 0 for an exact run"
            )
        given[name] = float(match[2])
    return Approximation(text, rule, **given)
