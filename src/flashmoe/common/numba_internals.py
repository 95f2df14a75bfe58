"""What FlashMoE uses of numba beyond what numba promises, looked at once, before the first kernel is defined.

A version that has changed how compiled code holds arrays, or the compiler's options, is refused: kernels would read
other memory. Where only the cache on disk has changed, kernels are compiled at every start instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from inspect import signature
from typing import Any

import numba

from flashmoe.errors import FlashMoEError

_log = logging.getLogger(__name__)

KNOWN = "0.61 to 0.68"


def _changed(what: str) -> FlashMoEError:
    return FlashMoEError(
        f"numba {numba.__version__} has changed {what}: FlashMoE works with {KNOWN}; "
        "install one of these: pip install 'numba>=0.61,<0.69'"
    )


try:
    from numba.core import event
    from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
    from numba.core.ccallback import CFunc
    from numba.core.codegen import CPUCodeLibrary, JITCodeLibrary
    from numba.core.compiler import CompilerBase
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.cpu import CPUTargetOptions
    from numba.core.datamodel import default_manager
    from numba.core.funcdesc import FunctionDescriptor
    from numba.core.runtime import rtsys as memory_runtime
    from numba.core.sigutils import normalize_signature
    from numba.core.typing.templates import Signature

    _LOCATORS: Any = {
        place.__name__.strip("_"): place for place in FunctionCache._impl_class._locator_classes
    }
    BesideSource, ForUser = _LOCATORS["InTreeCacheLocator"], _LOCATORS["UserWideCacheLocator"]
except (ImportError, AttributeError, KeyError) as error:
    raise _changed(f"its modules ({error})") from None

__all__ = [
    "KEEPS",
    "OPTIMISES_ONCE",
    "BesideSource",
    "CFunc",
    "CPUCodeLibrary",
    "ForUser",
    "FunctionCache",
    "NullCache",
    "Signature",
    "event",
    "global_compiler_lock",
    "memory_runtime",
    "normalize_signature",
]

_ARRAY = ("meminfo", "parent", "nitems", "itemsize", "data", "shape", "strides")  # see common.compiled
_OPTIONS = ("_nrt", "forceinline", "fastmath", "nogil", "no_cfunc_wrapper")  # see cache.kernels


def _arrays() -> bool:
    model: Any = default_manager.lookup(numba.types.Array(numba.types.int64, 2, "C"))
    return model.field_count == len(_ARRAY) and all(
        model.get_field_position(name) == at for at, name in enumerate(_ARRAY)
    )


def _options() -> bool:
    return all(hasattr(CPUTargetOptions, name) for name in _OPTIONS)


def _optimising() -> bool:
    """See common.optimised."""
    return _takes(CPUCodeLibrary._optimize_final_module) and isinstance(CPUCodeLibrary.name, property)


def _addresses() -> bool:
    return hasattr(JITCodeLibrary, "get_pointer_to_function") and hasattr(
        FunctionDescriptor, "llvm_cfunc_wrapper_name"
    )


def _cache() -> bool:
    """See common.kept."""
    return (
        _takes(FunctionCache.__init__, "py_func")
        and _takes(FunctionCache.load_overload, "sig", "target_context")
        and _takes(FunctionCache._load_overload, "sig", "target_context")
        and _takes(type(memory_runtime).initialize, "ctx")
        and "refresh" in CompilerBase.__init__.__code__.co_names
        and _takes(FunctionCache._index_key, "sig", "codegen")
        and "_cache_file" in FunctionCache.__init__.__code__.co_names
        and "_source_stamp" in IndexDataCacheFile.__init__.__code__.co_names
        and _takes(CFunc.__init__, "pyfunc", "sig", "locals", "options")
        and "_cache" in CFunc.__init__.__code__.co_names
    )


def _takes(function: Any, *names: str) -> bool:
    """Whether a method's first arguments are these."""
    return tuple(signature(function).parameters)[1 : len(names) + 1] == names


def _holds(part: Callable[[], bool]) -> bool:
    try:
        return part()
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _check() -> bool:
    """Whether compiled code can be kept on disk. Raises FlashMoEError for a numba that kernels cannot be made with."""
    for part, what in (
        (_arrays, "arrays in compiled code"),
        (_options, "options of the compiler"),
        (_addresses, "addresses of compiled functions"),
    ):
        if not _holds(part):
            raise _changed(what)
    keeps = _holds(_cache)
    if not keeps:
        _log.warning(
            "numba %s keeps compiled code on disk in another way than %s: every start compiles afresh",
            numba.__version__,
            KNOWN,
        )
    return keeps


#: Whether what optimises compiled code can be called for some functions only.
OPTIMISES_ONCE = _holds(_optimising)
#: Whether compiled code can be kept on disk.
KEEPS = _check()
