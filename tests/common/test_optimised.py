"""What a kernel calls is optimised with it, and only then."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from numba.extending import register_jitable

from flashmoe.common import optimised
from flashmoe.common.kept import kept
from flashmoe.common.numba_internals import OPTIMISES_ONCE, CPUCodeLibrary


@register_jitable
def squares(numbers: Any) -> float:
    total = 0.0
    for x in numbers:
        total += x * x
    return total


def test_once(monkeypatch: pytest.MonkeyPatch) -> None:
    optimised_names: list[str] = []
    whole = optimised._whole
    monkeypatch.setattr(
        optimised, "_whole", lambda library: (optimised_names.append(library.name), whole(library))
    )

    def outer(numbers: Any) -> float:
        total: float = squares(numbers)
        return total + 1.0

    assert OPTIMISES_ONCE
    assert CPUCodeLibrary._optimize_final_module is optimised._optimise
    monkeypatch.setattr("flashmoe.common.kept.KEEPS", False)
    assert kept()(outer)(np.arange(4.0)) == 15.0
    assert {name for name in optimised_names if "test_once" in name or "squares" in name} == {
        outer.__qualname__
    }
    optimised_names.clear()
    assert numba.njit(outer)(np.arange(4.0)) == 15.0  # anyone else's: as numba does it
    assert outer.__qualname__ in optimised_names
