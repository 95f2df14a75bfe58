"""State restored from a file, accepted only if its owner could have written it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Least and largest value of an array: numbers, or arrays that broadcast to its shape.
Limits = tuple[Any, Any]

_LARGEST = 1e18  # its square is still a float32: sums of products that overflow are not numbers, and compare with none


def load_state(
    own: Mapping[str, NDArray[Any]], saved: Mapping[str, NDArray[Any]], limits: Mapping[str, Limits]
) -> str:
    """Copy saved arrays into those of the same names in `own`; or change nothing, and say which one does not fit.

    Shapes and types must be equal, floats must be numbers that can be computed with, and values must lie within
    `limits`: compiled code uses some arrays as indices and does not look where they point.
    """
    for name, value in own.items():
        array = saved.get(name)
        if array is None or array.shape != value.shape or array.dtype != value.dtype:
            return name
        if array.dtype.kind == "f" and not (np.abs(array) <= _LARGEST).all():
            return name
        low, high = limits.get(name, (None, None))
        if low is not None and ((array < low) | (array > high)).any():
            return name
    for name, value in own.items():
        value[...] = saved[name]
    return ""
