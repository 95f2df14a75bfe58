"""Cheap calls into compiled code: arguments are numbers, and arrays are pinned beforehand.

Called with a hundred arrays in tuples, numba looks at each of them before its code runs. In a loop that takes some
microseconds; between two layers of a model, whose weights fill the processor's caches, it took 50 to 70. `Pinned`
writes down once where the arrays are, as compiled code holds them itself; `pinned` reads that back, in compiled code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import typeof, types
from numba.extending import intrinsic

from flashmoe.common.kept import fields

_KINDS: dict[str, Any] = {}  # name of a kind of tuple -> its type; read while numba compiles


class Pinned:
    """Where the arrays of a (nested) tuple are: `address` is what `pinned` takes, as long as this object lives.

    The arrays may change, but neither move nor be exchanged. kind: a name for tuples of this type, and no other.
    Raises TypeError where it is another's.
    """

    def __init__(self, kind: str, values: tuple[Any, ...]) -> None:
        if _KINDS.setdefault(kind, typeof(values)) != typeof(values):
            raise TypeError(f"{kind!r} is {_KINDS[kind]}, not {typeof(values)}")
        #: The tuple.
        self.values = values
        self._memory = np.array(list(_numbers(values)), np.int64)
        self.address = int(self._memory.ctypes.data)


def _numbers(value: Any) -> Any:
    """An array in compiled code: its owner (none), whose owner (none), items, bytes of each, data, shape, strides."""
    if isinstance(value, np.ndarray):
        yield from (0, 0, value.size, value.itemsize, value.ctypes.data, *value.shape, *value.strides)
    else:
        for part in value:
            yield from _numbers(part)


def layout(kind: str) -> tuple[str, tuple[Any, ...]]:
    """Types and names in the tuples of a kind: what code that has been compiled with `pinned` relies on."""
    return str(_KINDS[kind]), tuple(fields(_KINDS[kind]))


@intrinsic(prefer_literal=True)
def _pinned(_typing: Any, address: Any, kind: Any) -> Any:
    """The tuple that a `Pinned` describes. In compiled code only; kind is a constant."""
    found = _KINDS[kind.literal_value]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = context.get_value_type(signature.return_type).as_pointer()
        return builder.load(builder.inttoptr(args[0], pointer))

    return found(types.int64, kind), generate


pinned: Any = _pinned  # to type checkers its arguments are those within


def _pointer_to(kind: Any) -> Any:
    """An intrinsic that turns an address into a pointer to `kind`; numba has none of its own."""

    @intrinsic
    def cast(_typing: Any, _address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return cast


#: In compiled code: the address of numbers as numba's `carray` takes it.
bytes_at, int16_at, uint16_at, int32_at, int64_at, float32_at = (
    _pointer_to(kind)
    for kind in (types.uint8, types.int16, types.uint16, types.int32, types.int64, types.float32)
)


def _call(builder: Any, args: Any) -> Any:
    number = ir.IntType(64)
    kind = ir.FunctionType(number, [number] * (len(args) - 1))
    return builder.call(builder.inttoptr(args[0], kind.as_pointer()), list(args[1:]))


@intrinsic
def _call4(_typing: Any, _function: Any, _a: Any, _b: Any, _c: Any, _d: Any) -> Any:
    return types.int64(*(types.int64,) * 5), lambda _context, builder, _signature, args: _call(builder, args)


@intrinsic
def _call5(_typing: Any, _function: Any, _a: Any, _b: Any, _c: Any, _d: Any, _e: Any) -> Any:
    return types.int64(*(types.int64,) * 6), lambda _context, builder, _signature, args: _call(builder, args)


#: In compiled code: call the C function at an address with four or five int64; what it returns is one, too.
call4: Any = _call4
call5: Any = _call5


def function_at(result: Any, *arguments: Any) -> Any:
    """What calls, in compiled code, the C function of one or two arguments at an address: f(address, ...).

    result, arguments: numba's types.
    """
    signature = result(types.int64, *arguments)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        nothing = result == types.void
        returned = ir.VoidType() if nothing else context.get_value_type(result)
        kind = ir.FunctionType(returned, [context.get_value_type(argument) for argument in arguments])
        made = builder.call(builder.inttoptr(args[0], kind.as_pointer()), list(args[1:]))
        return context.get_dummy_value() if nothing else made

    @intrinsic
    def call1(_typing: Any, _function: Any, _a: Any) -> Any:
        return signature, generate

    @intrinsic
    def call2(_typing: Any, _function: Any, _a: Any, _b: Any) -> Any:
        return signature, generate

    return call1 if len(arguments) == 1 else call2


@cache
def address_of(function: Any, signature: Any) -> int:
    """Where C finds a compiled function, for a signature of numba's; as long as the function lives."""
    function.compile(signature.args)
    compiled = function.overloads[signature.args]
    return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name))
