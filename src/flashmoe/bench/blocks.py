"""Random weights straight in a quantised format, a block at a time, with zero mean.

The mean matters: a common offset would add up in the residual stream, swamp it, and freeze the routing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_SPREAD = 0.3  # block scales vary by this share
_UNIFORM_16 = 4.61  # standard deviation of 0..15
_UNIFORM_256 = 73.9  # of -127..127
_MXFP4 = 5.85  # of the sixteen values of a float of 4 bits, doubled

_no_minus_eight = np.arange(16)
_no_minus_eight[0] = 8  # a nibble n stands for n - 8: without -8, as many below zero as above
_NIBBLES = (_no_minus_eight[np.arange(256) & 15] | (_no_minus_eight[np.arange(256) >> 4] << 4)).astype(
    np.uint8
)
_INT8 = np.where(np.arange(256) == 128, 0, np.arange(256)).astype(np.uint8)  # without -128


@dataclass(frozen=True)
class Format:
    """A quantised format: `weights` per block of `nbytes`; `fill` makes n blocks of standard deviation sigma."""

    weights: int
    nbytes: int
    fill: Callable[[np.random.Generator, int, float], Bytes]


def _scales(draw: np.random.Generator, n: int, scale: float) -> Bytes:
    """float16 [n] around `scale`, as bytes [n, 2]."""
    spread = 1 - _SPREAD + 2 * _SPREAD * draw.random(n, dtype=np.float32)
    return (scale * spread).astype(np.float16).view(np.uint8).reshape(n, 2)


def _random(draw: np.random.Generator, n: int, width: int) -> Bytes:
    return np.frombuffer(draw.bytes(n * width), np.uint8).reshape(n, width)


def _q4_0(draw: np.random.Generator, n: int, sigma: float) -> Bytes:
    return np.hstack([_scales(draw, n, sigma / _UNIFORM_16), _NIBBLES[_random(draw, n, 16)]])


def _q8_0(draw: np.random.Generator, n: int, sigma: float) -> Bytes:
    return np.hstack([_scales(draw, n, sigma / _UNIFORM_256), _INT8[_random(draw, n, 32)]])


def _mxfp4(draw: np.random.Generator, n: int, sigma: float) -> Bytes:
    exponents = np.rint(128 + np.log2(sigma / _MXFP4) + draw.random(n) - 0.5).clip(2, 254)
    return np.hstack([exponents.astype(np.uint8)[:, None], _random(draw, n, 16)])


def _q4_k(draw: np.random.Generator, n: int, sigma: float) -> Bytes:
    """256 weights: d, dmin, eight pairs of 6-bit scale and minimum, nibbles q. Weight: d * scale * q - dmin * minimum.

    With minimum = scale and dmin = 7.5 d, a weight is d * scale * (q - 7.5).
    """
    six = draw.integers(32, 64, (n, 8), dtype=np.uint8)
    low, high = six[:, :4], six[:, 4:]
    first = low | (high >> 4) << 6
    halves = _scales(draw, n, sigma / (_UNIFORM_16 * 48))
    minimum = (halves.copy().view(np.float16) * np.float16(7.5)).view(np.uint8)
    return np.hstack([halves, minimum, first, first, (high & 15) * np.uint8(17), _random(draw, n, 128)])


FORMATS = {
    "Q4_0": Format(32, 18, _q4_0),
    "Q8_0": Format(32, 34, _q8_0),
    "Q4_K": Format(256, 144, _q4_k),
    "MXFP4": Format(32, 17, _mxfp4),
}
