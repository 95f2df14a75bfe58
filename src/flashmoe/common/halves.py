"""Floats of 16 bits (float16, bfloat16) in compiled code, which numba has no type for."""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import binding, ir
from numba import config, types
from numba.extending import intrinsic


def _converts() -> bool:
    """Whether the processor that code is compiled for has an instruction for float16; without, a function would be
    called that is not there."""
    own = not any(getattr(config, name, None) for name in ("CPU_NAME", "CPU_FEATURES"))
    known = binding.get_host_cpu_features().get("f16c", False) or platform.machine() == "aarch64"
    return bool(own and known)


@intrinsic
def _float32_of(_typing: Any, number: Any) -> Any:
    """A float32 as it is; a uint16 as the bits of a bfloat16, an int16 as those of a float16 (finite ones)."""

    def as_it_is(_context: Any, _builder: Any, _signature: Any, args: Any) -> Any:
        return args[0]

    def from_bfloat16(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.IntType(32)(16))
        return builder.bitcast(bits, ir.FloatType())

    def from_float16(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if _converts():
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
        # in integers. The exponents' offsets differ by 112
        number = ir.IntType(32)
        bits = builder.sext(args[0], number)
        sign = builder.and_(bits, number(0x80000000))
        magnitude = builder.shl(builder.and_(bits, number(0x7FFF)), number(13))
        value = builder.bitcast(builder.or_(sign, magnitude), ir.FloatType())
        return builder.fmul(value, ir.FloatType()(2.0**112))

    made = {types.float32: as_it_is, types.uint16: from_bfloat16, types.int16: from_float16}
    return types.float32(number), made[number]


float32_of: Any = _float32_of  # to type checkers its arguments are those within
