"""Room on the stack for the library's threads: its tokenizers match long texts recursively (std::regex)."""

from __future__ import annotations

import ctypes as C
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from flashmoe.common.memory import counts_promises

_Result = TypeVar("_Result")

_WANTED = 1 << 30  # of addresses: memory is taken page by page, as it is used
_MODEST = 64 << 20  # where addresses are limited, or count as memory
BYTES_PER_CHARACTER = 350  # of stack, of a run of equal characters: 25,000 overflow the usual 8 MiB


def on_large_stack(call: Callable[[], _Result]) -> _Result:
    """What `call` returns, or raises, in a thread with a large stack."""
    raise_thread_stacks()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


@cache
def raise_thread_stacks() -> int:
    """Give the threads that are made from here on large stacks; returns their size in bytes, 0 where unknown."""
    size = _WANTED
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY or counts_promises():
        size = _MODEST
    try:
        libc = C.CDLL(None)
        attributes = C.create_string_buffer(256)  # pthread_attr_t
        if libc.pthread_attr_init(attributes) or libc.pthread_attr_setstacksize(attributes, C.c_size_t(size)):
            return 0
        return 0 if libc.pthread_setattr_default_np(attributes) else size
    except AttributeError:  # another libc than GNU's
        return 0
